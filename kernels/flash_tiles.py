"""Which tiles of the score matrix the flash kernels visit: arithmetic shared by the kernels and their tests.

Row i sees the keys first(i) <= j <= i, key j is seen by the rows j <= i <= last(j), and neither `first` nor `last` ever
falls. So the keys that a tile of rows sees are one range of key tiles, and the rows that see a tile of keys one range
of row tiles. At both ends of a range stand tiles of which only a part is visible, which need a mask; between them none
is needed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Carry = tuple[jax.Array, ...]
Ends = tuple[jax.Array, jax.Array]


class Span(NamedTuple):
    """A range of tiles [begin, end), of which [inner, outer) need no mask."""

    begin: jax.Array
    inner: jax.Array
    outer: jax.Array
    end: jax.Array


class Tiles(NamedTuple):
    """Rows and keys in a tile of the forward pass; in the backward ones, those a program keeps and those it walks."""

    rows: int
    keys: int
    kept: int
    walked: int

    @classmethod
    def choose(cls, length: int, width: int, itemsize: int) -> "Tiles":
        """Powers of two whose operands fit in the 99 KiB of shared memory of a consumer GPU; 16 at least, for `dot`.

        `length` and head `width` in elements of `itemsize` bytes.
        """
        small = -(-width * itemsize // 256)
        limit = max(16, _power_of_two(length))
        sizes = (max(16, _power_of_two(size // small)) for size in (128, 64, 64, 32))
        return cls(*(min(size, limit) for size in sizes))


class Setup(NamedTuple):
    """What the kernels are compiled for."""

    window: int | None
    """None where the ends of what is visible are given for each row and key."""
    scale: float
    tiles: Tiles
    interpret: bool


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def padded_width(width: int) -> int:
    """The head width that Triton can load: a power of two, 16 at least."""
    return max(16, _power_of_two(width))


def first_keys(rows: jax.Array, window: int) -> jax.Array:
    """The first key that each of `rows` sees, in a row of one document."""
    return jnp.maximum(rows - window, 0)


def last_rows(keys: jax.Array, window: int, length: int) -> jax.Array:
    """The last of `length` rows that sees each of `keys`, in a row of one document."""
    return jnp.minimum(keys + window, length - 1)


def key_tiles(rows: jax.Array, first: jax.Array, tile: int) -> Span:
    """Tiles of `tile` keys that a tile of consecutive `rows` sees, given the first key of each."""
    return key_span(_ends(rows), _ends(first), tile)


def key_span(rows: Ends, first: Ends, tile: int) -> Span:
    """As `key_tiles`, given the least and the greatest of the rows and of their first keys."""
    return _span(first[0] // tile, _ceil(first[1], tile), (rows[0] + 1) // tile, rows[1] // tile + 1)


def row_tiles(keys: jax.Array, last: jax.Array, tile: int) -> Span:
    """Tiles of `tile` rows that see a tile of consecutive `keys`, given the last row of each."""
    return row_span(_ends(keys), _ends(last), tile)


def row_span(keys: Ends, last: Ends, tile: int) -> Span:
    """As `row_tiles`, given the least and the greatest of the keys and of their last rows."""
    return _span(keys[0] // tile, _ceil(keys[1], tile), (last[0] + 1) // tile, last[1] // tile + 1)


def _ends(x: jax.Array) -> Ends:
    return jnp.min(x), jnp.max(x)


def _ceil(size: jax.Array, tile: int) -> jax.Array:
    return (size + tile - 1) // tile


def _span(begin: jax.Array, inner: jax.Array, outer: jax.Array, end: jax.Array) -> Span:
    """Where no tile is wholly visible, the masked ones before and after meet at `inner`."""
    return Span(begin, inner, jnp.maximum(inner, outer), end)


def walk(span: Span, step: Callable[..., Carry], carry: Carry) -> Carry:
    """`step(tile, carry, masked=...)` over a span: masked edge, unmasked interior, masked edge."""
    begin, inner, outer, end = span
    for start, stop, masked in ((begin, inner, True), (inner, outer, False), (outer, end, True)):
        carry = jax.lax.fori_loop(start, stop, functools.partial(step, masked=masked), carry)
    return carry


def visited_tiles(length: int, window: int, rows: int, keys: int) -> tuple[int, int]:
    """Tiles of `rows` x `keys` visited by (a pass over rows: forward, dQ; a pass over keys: dKV), of one document."""
    by_rows = by_keys = 0
    for start in range(0, length, rows):
        tile = jnp.arange(start, start + rows)
        span = key_tiles(tile, first_keys(tile, window), keys)
        by_rows += int(span.end - span.begin)
    for start in range(0, length, keys):
        tile = jnp.arange(start, start + keys)
        span = row_tiles(tile, last_rows(tile, window, length), rows)
        by_keys += int(span.end - span.begin)
    return by_rows, by_keys
