"""The tokenizer: learning a vocabulary, encoding and decoding."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nanochat_jax.bench import Settings
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import Config
from nanochat_jax.data.download import prepare_shards
from nanochat_jax.data.shards import read_texts
from nanochat_jax.errors import UserError
from nanochat_jax.stages.tokenizer import CutTexts
from nanochat_jax.tokenizer import Tokenizer

LEARNED_CHARS = 20_000_000
"""Characters to learn from, at most: the time rises with them, the speed of encoding hardly changes."""
DOCUMENTS = 2000
"""Documents of the validation file that are encoded."""


def learned(config: Config, files: Sequence[Path]) -> tuple[Tokenizer, int, float]:
    """A tokenizer of the configured size, the characters it is from and the seconds it took."""
    texts = CutTexts(read_texts(files), config.tokenizer.doc_cap, min(config.tokenizer.max_chars, LEARNED_CHARS))
    start = time.perf_counter()
    tokenizer = Tokenizer.train(texts, config.tokenizer.vocab_size, config.tokenizer.pattern)
    return tokenizer, texts.characters, time.perf_counter() - start


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of learning; MB of UTF-8 and tokens a second of encoding, on one core and on all, and of decoding."""
    files, validation = prepare_shards(config.data, log)
    log(f"bench tokenizer: learning {config.tokenizer.vocab_size:,} tokens")
    tokenizer, characters, seconds = learned(config, files)
    texts = list(islice(read_texts([validation]), DOCUMENTS))
    size = sum(len(text.encode()) for text in texts)
    ids = tokenizer.encode_batch(texts)
    tokens = sum(map(len, ids))
    if not tokens:
        raise UserError(f"{validation}, the last shard and so the one to measure on, holds no text: add another")

    def encode(threads: int | None) -> None:
        tokenizer.encode_batch(texts, threads)

    def decode() -> None:
        for document in ids:
            tokenizer.decode(document)

    work = {
        "encode, 1 thread": lambda: encode(1),
        f"encode, {min(os.cpu_count() or 1, 16)} threads": lambda: encode(None),
        "decode": decode,
    }
    records = []
    for name, action in work.items():
        log(f"bench tokenizer: {name}")
        timing = timed(action, settings.repeat)
        rates = {"mb_per_sec": size / 1e6 / timing.median, "tok_per_sec": tokens / timing.median}
        records.append({"work": name} | timing.ms() | rates)
    return {
        "vocab_size": tokenizer.vocab_size,
        "train_characters": characters,
        "train_seconds": seconds,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "right": [tokenizer.decode(document) for document in ids] == texts,
        "speeds": records,
    }
