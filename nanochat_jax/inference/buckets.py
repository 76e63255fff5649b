"""Shapes that are compiled for: sizes rounded up to few different ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PREFILL_TOKENS = 16384
"""Padded prompt tokens of one prefill, of which there are more only where a mesh or a lone prompt wants it."""
PADDED_TOGETHER = 1024
"""Padded prompt tokens up to which prompts of different lengths are read at once, where padding costs little."""


def bucket(size: int, smallest: int = 1, limit: int | None = None) -> int:
    """`size` rounded up to smallest * 2^i, at most to `limit`; what is above that stays as it is."""
    rounded = smallest
    while rounded < size:
        rounded *= 2
    return rounded if limit is None else max(size, min(rounded, limit))


def prompt_bucket(size: int, limit: int) -> int:
    """Tokens that a prompt of `size` is padded to: 32, 64, 128, 192, 256, 384, 512, ... or `limit`; longer ones as they
    are.
    """
    rounded = bucket(size, 32)
    if rounded > 128 and size <= 3 * rounded // 4:
        rounded = 3 * rounded // 4
    return max(size, min(rounded, limit))


def prompts_at_once(waiting: int, length: int, limit: int) -> int:
    """How many of so many prompts of `length` tokens are read at once: all that PREFILL_TOKENS allows, padded to a
    power of two or to `limit`, where that adds a third at most, or else the largest power of two of them.
    """
    few = max(1, min(waiting, PREFILL_TOKENS // length))
    rounded = bucket(few, limit=limit)
    fits = rounded * length <= PREFILL_TOKENS and 3 * rounded <= 4 * few
    return rounded if fits else 1 << few.bit_length() - 1


def decode_buckets(most: int) -> list[int]:
    """How many rows are decoded at once, ascending: 1, 4, 16, ... up to half of `most`, and all."""
    sizes = [1]
    while 2 * 4 * sizes[-1] <= most:
        sizes.append(4 * sizes[-1])
    return sizes if most == 1 else [*sizes, most]


def reach_buckets(longest: int) -> list[int]:
    """How many slots of each row a decode reads, ascending: of `longest`, 3/8, 3/8 of that, ..., not below 128."""
    reaches = [longest]
    while (shorter := -(-3 * reaches[0] // 8)) >= 128:
        reaches.insert(0, shorter)
    return reaches


def padded(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [rows, length], padded on the right with 0, and their lengths [rows]."""
    tokens, counts = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], counts[i] = prompt, len(prompt)
    return tokens, counts
