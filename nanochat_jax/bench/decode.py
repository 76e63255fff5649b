"""The engine: reading prompts and writing answers, with random weights of the model's shape.

Every row has a prompt of its own, half the context long. Time of decoding is that of whole answers less that of the
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanochat_jax.bench import Settings
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import Config
from nanochat_jax.inference.engine import Engine, SamplingParams
from nanochat_jax.metrics import peak_memory_bytes
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import check_mesh, make_mesh
from nanochat_jax.train import born_params

ANSWER_TOKENS = 128
"""Tokens of an answer, at most: a quarter of the context."""


class NoSpecials:
    """In place of a tokenizer: no token ends an answer or calls a tool."""

    special_ids = frozenset()

    def special_id(self, name: str) -> int:
        """An id that no model draws."""
        return -1

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokens a second of reading and of writing for each number of rows; those of all rows together."""
    cfg = gpt_config(config, config.tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, cfg)
    params = born_params(cfg, mesh, config.seed)
    length, answer = cfg.sequence_len // 2, min(ANSWER_TOKENS, cfg.sequence_len // 4)
    random = np.random.default_rng(config.seed)
    records = []
    for rows in settings.rows or (1, 16):
        log(f"bench decode: {rows} rows")
        engine = Engine(params, cfg, NoSpecials(), max_rows=rows, max_len=cfg.sequence_len, mesh=mesh)
        prompts = random.integers(cfg.vocab_size, size=(rows, length)).tolist()

        def generate(count: int, engine: Engine = engine, prompts: list = prompts) -> None:
            engine.generate(prompts, SamplingParams(top_k=50, max_tokens=count))

        prefill = timed(lambda: generate(1), settings.repeat)
        whole = timed(lambda: generate(1 + answer), settings.repeat)
        seconds = whole.median - prefill.median
        records.append(
            {
                "rows": rows,
                **{f"prefill_{name}": value for name, value in prefill.ms().items()},
                **{f"answer_{name}": value for name, value in whole.ms().items()},
                "prefill_tok_per_sec": rows * length / prefill.median,
                "decode_tok_per_sec": rows * answer / seconds,
                "decode_step_ms": 1000 * seconds / answer,
            }
        )
    return {
        "prompt_tokens": length,
        "answer_tokens": answer,
        "compute_dtype": cfg.compute_dtype,
        "repeat": settings.repeat,
        "peak_bytes": peak_memory_bytes(),
        "speeds": records,
    }
