"""The word list of the spelling tasks, made from the corpus inside the package."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

from nanochat_jax.data.shards import read_texts, shard_files
from nanochat_jax.tasks.task import split_of

WORD = re.compile(r"\b[a-z]{3,12}\b")
MIN_COUNT = 3
"""Rarer words are mostly slips of the print and foreign names."""


@functools.cache
def word_list(split: str) -> tuple[str, ...]:
    """Lower-case words of 3 to 12 letters of one split, in alphabetical order. A word is in one split only."""
    counts: Counter[str] = Counter()
    train_files, _ = shard_files(Path(__file__).parent.parent / "corpus")
    for text in read_texts(train_files):
        counts.update(WORD.findall(text))
    return tuple(sorted(word for word, n in counts.items() if n >= MIN_COUNT and split_of(f"word {word}") == split))
