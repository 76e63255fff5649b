"""The buffer behind best-fit packing: it finds the longest item that fits without looking at all of them.

Among items of one length the one that came first leaves first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BestFitBuffer(Generic[Item]):
    """Items with lengths, taken out by best fit."""

    def __init__(self) -> None:
        self._items: dict[int, Item] = {}  # by number of arrival, and so in order of arrival
        self._sorted: list[tuple[int, int]] = []  # (length, number of arrival)
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, length: int, item: Item) -> None:
        """Puts an item in, behind the others of its length."""
        insort(self._sorted, (length, self._arrivals))
        self._items[self._arrivals] = item
        self._arrivals += 1

    def take(self, room: int) -> Item | None:
        """Takes out the longest item of at most `room`, the earliest among equals; None where none fits."""
        end = bisect_left(self._sorted, (room + 1,))
        return self._pop(bisect_left(self._sorted, self._sorted[end - 1][:1])) if end else None

    def take_shortest(self) -> Item:
        """Takes out the shortest item, the earliest among equals. The buffer must not be empty."""
        return self._pop(0)

    def items(self) -> list[Item]:
        """All items in order of arrival. Adding them to an empty buffer in this order gives an equal buffer."""
        return list(self._items.values())

    def _pop(self, at: int) -> Item:
        return self._items.pop(self._sorted.pop(at)[1])
