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


def visible_tiles(first: jax.Array, last: jax.Array, tile: int) -> Span:
    """Tiles of `tile` keys that consecutive rows see, which are `last`, given the first key of each; or of `tile` rows
    that see consecutive keys, which are `first`, given the last row of each.
    """
    return visible_span((jnp.min(first), jnp.max(first)), (jnp.min(last), jnp.max(last)), tile)


def visible_span(first: Ends, last: Ends, tile: int) -> Span:
    """As `visible_tiles`, given the least and the greatest of both."""
    inner, outer = (first[1] + tile - 1) // tile, (last[0] + 1) // tile
    # Where no tile is wholly visible, the masked ones before and after meet at `inner`.
    return Span(first[0] // tile, inner, jnp.maximum(inner, outer), last[1] // tile + 1)


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
        span = visible_tiles(first_keys(tile, window), tile, keys)
        by_rows += int(span.end - span.begin)
    for start in range(0, length, keys):
        tile = jnp.arange(start, start + keys)
        span = visible_tiles(tile, last_rows(tile, window, length), rows)
        by_keys += int(span.end - span.begin)
    return by_rows, by_keys
