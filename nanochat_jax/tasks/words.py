"""The word list of the spelling tasks, made from the corpus inside the package."""

from __future__ import annotations

import functools
import re
from collections import Counter
from importlib import resources

import pyarrow.parquet as pq

from nanochat_jax.tasks.task import split_of

WORD = re.compile(r"\b[a-z]{3,12}\b")
MIN_COUNT = 3
"""Rarer words are mostly slips of the print and foreign names."""


@functools.cache
def word_list(split: str) -> tuple[str, ...]:
    """Lower-case words of 3 to 12 letters of one split, in alphabetical order. A word is in one split only."""
    counts: Counter[str] = Counter()
    with resources.as_file(resources.files("nanochat_jax") / "corpus") as folder:
        # The last shard is the validation text.
        for path in sorted(folder.glob("*.parquet"))[:-1]:
            for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
                counts.update(WORD.findall(text))
    return tuple(sorted(word for word, n in counts.items() if n >= MIN_COUNT and split_of(f"word {word}") == split))
