"""The loader of pretraining: from parquet files to packed batches, tokenized on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nanochat_jax.bench import Settings
from nanochat_jax.bench.measure import timed
from nanochat_jax.bench.tokenizer import learned
from nanochat_jax.config import Config
from nanochat_jax.data.download import prepare_shards
from nanochat_jax.data.pretrain import pretrain_batches
from nanochat_jax.optim import base_schedule
from nanochat_jax.run import gpt_config

SAMPLE_TOKENS = 2**17
"""Tokens of a sample, at least; many times what is prefetched where batches are small."""


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokens a second of steps as `pretrain` takes them, with a tokenizer learned for it."""
    files, _ = prepare_shards(config.data, log)
    log(f"bench loader: learning {config.tokenizer.vocab_size:,} tokens")
    tokenizer = learned(config, files)[0]
    cfg = gpt_config(config, tokenizer.vocab_size)
    batch_tokens = base_schedule(config, cfg)[1].batch_tokens
    rows = batch_tokens // cfg.sequence_len
    batches = pretrain_batches(files, tokenizer, config.data, rows=rows, sequence_len=cfg.sequence_len)
    count = -(-SAMPLE_TOKENS // batch_tokens)

    def take() -> None:
        for _ in range(count):
            next(batches)

    log(f"bench loader: batches of {batch_tokens:,} tokens")
    timing = timed(take, settings.repeat)
    batches.close()
    return {
        "packing": config.data.packing,
        "streams": config.data.streams,
        "threads": min(os.cpu_count() or 1, 16),
        "batch_tokens": batch_tokens,
        "sample_tokens": count * batch_tokens,
        "sample": timing.ms(),
        "tok_per_sec": count * batch_tokens / timing.median,
    }
