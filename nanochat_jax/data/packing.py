"""The buffer behind best-fit packing: it finds the longest item that fits without looking at all of them.

Items are kept in queues by length, so that a placement costs a binary search over the lengths present. Among items of
one length the one that came first leaves first.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BestFitBuffer(Generic[Item]):
    """Items with lengths, taken out by best fit."""

    def __init__(self) -> None:
        self._items: dict[int, Item] = {}  # by number of arrival, and so in order of arrival
        self._queues: dict[int, deque[int]] = {}  # length -> numbers of arrival
        self._lengths: list[int] = []  # the keys of _queues, sorted
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, length: int, item: Item) -> None:
        """Puts an item in, behind the others of its length."""
        if length not in self._queues:
            self._queues[length] = deque()
            insort(self._lengths, length)
        self._queues[length].append(self._arrivals)
        self._items[self._arrivals] = item
        self._arrivals += 1

    def take(self, room: int) -> Item | None:
        """Takes out the longest item of at most `room`, the earliest among equals; None where none fits."""
        at = bisect_right(self._lengths, room)
        return self._pop(at - 1) if at else None

    def take_shortest(self) -> Item:
        """Takes out the shortest item, the earliest among equals. The buffer must not be empty."""
        return self._pop(0)

    def items(self) -> list[Item]:
        """All items in order of arrival. Adding them to an empty buffer in this order gives an equal buffer."""
        return list(self._items.values())

    def _pop(self, at: int) -> Item:
        length = self._lengths[at]
        queue = self._queues[length]
        number = queue.popleft()
        if not queue:
            del self._queues[length], self._lengths[at]
        return self._items.pop(number)
