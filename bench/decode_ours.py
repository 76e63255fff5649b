"""This project's side of compare_decode.py: its engine on the same weights and prompts, in turns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from turns import answer, held_to

from nanochat_jax import cli


def main() -> None:
    """Serves with the weights that the file named by the only argument tells of."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["device"] == "cpu":
        held_to(spec["threads"])  # before the threads of JAX begin

    from nanochat_jax import convert
    from nanochat_jax.bench.decode import NoSpecials
    from nanochat_jax.bench.measure import environment
    from nanochat_jax.config import Config
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.inference.requests import SamplingParams
    from nanochat_jax.run import gpt_config
    from nanochat_jax.sharding import make_mesh

    found = convert.open_checkpoint(Path(spec["checkpoint"]), 0)
    config = replace(Config(), model=convert.model_config(found), compute_dtype=spec["dtype"])
    cfg = gpt_config(config, spec["model"]["vocab_size"])
    params = convert.converted(found, cfg)
    sampling = SamplingParams(**spec["sampling"])
    engines: dict[tuple, Engine] = {}

    def engine_of(max_rows: int, variant: str, max_len: int, max_new: int) -> Engine:
        shared, quantize = "shared" in variant, "int8" if "int8" in variant else "none"
        native = False if "xla" in variant else None
        together = {"samples": spec["samples"], "max_new": max_new} if shared else {}
        key = (max_rows, shared, quantize, native, max_len, max_new)
        if key not in engines:
            where = {"max_rows": max_rows, "max_len": max_len, "mesh": make_mesh("1")}
            engines[key] = Engine(
                params, replace(cfg, native=native), NoSpecials(), quantize=quantize, **where, **together
            )
        return engines[key]

    def generate(engine: Engine, prompts: list[list[int]], tokens: int, samples: int, **changed: Any) -> tuple:
        start = time.perf_counter()
        answers = engine.generate(prompts, replace(sampling, max_tokens=tokens, **changed), samples=samples)
        seconds = time.perf_counter() - start
        assert all(len(one.ids) == tokens for one in answers)
        return seconds, [one.ids for one in answers]

    def decode(variant: str, rows: int, prompt: list[int], steps: int) -> dict[str, float]:
        engine = engine_of(rows, variant, spec["model"]["sequence_len"], steps + 1)
        first, _ = generate(engine, [prompt], 1, rows)
        whole, _ = generate(engine, [prompt], steps + 1, rows)
        return {"seconds": whole - first, "first": first}

    def rollouts(variant: str, prompts: list[list[int]], samples: int, tokens: int, at_once: int) -> dict[str, float]:
        """Seconds of all questions; `at_once` is for the reference, the variant says how ours asks."""
        together = "one batch" in variant
        max_len = max(map(len, prompts)) + tokens
        engine = engine_of(samples * len(prompts) if together else samples, variant, max_len, tokens)
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        return {"seconds": sum(generate(engine, batch, tokens, samples)[0] for batch in batches)}

    def greedy(variant: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        engine = engine_of(len(prompts), variant, spec["model"]["sequence_len"], tokens)
        return generate(engine, prompts, tokens, 1, temperature=0.0)[1]

    works: dict[str, Callable[..., Any]] = {"decode": decode, "rollouts": rollouts, "greedy": greedy}
    answer(lambda work, variant, **options: works[work](variant, **options), environment())


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
