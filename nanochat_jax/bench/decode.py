"""The engine: reading prompts and writing answers, with random weights of the model's shape.

"speeds": every row has a prompt of its own, half the context long; time of decoding is that of whole answers less that
of the prompts. "over_cache": attention alone, where there is a kernel for it. "arrivals": requests of different lengths
come at random times, each in a thread of its own as in the server, so fast that most of them wait; the same ones, one
after the other in an engine of one row, are its yardstick, in turns with it. How much rows gain depends on how much of
the time goes into reading prompts, which takes a row among others what it takes a lone one; so there are two mixes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.bench import Settings, cache_attention
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import Config, GPTConfig
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.metrics import mfu, peak_bandwidth, peak_memory_bytes
from nanochat_jax.model import Params, count_params, flops_per_token
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import check_mesh, make_mesh
from nanochat_jax.train import born_params

ANSWER_TOKENS = 128
"""Tokens of an answer, at most: a quarter of the context."""
REQUESTS = 64
"""Requests that arrive."""
HURRY = 16
"""How many times as fast they arrive as one row alone could answer them."""
ROUNDS = 3
"""Times that the requests are answered by each engine in turn, runs that compile not counted."""
ANSWERS = (4, 2)
"""The longest answers that are asked for, the context over this: half as long as the longest prompts, and as long."""


class NoSpecials:
    """In place of a tokenizer: no token ends an answer or calls a tool."""

    marker_ids = frozenset()

    def special_id(self, name: str) -> int:
        return -1

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


def random_model(config: Config, vocab_size: int) -> tuple[Params, GPTConfig, Mesh]:
    """A model of the configured shape as training begins with it, and the devices it is on."""
    cfg = gpt_config(config, vocab_size)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, cfg)
    return born_params(cfg, mesh, config.seed), cfg, mesh


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokens a second of reading and of writing for each number of rows; those of all rows together."""
    params, cfg, mesh = random_model(config, config.tokenizer.vocab_size)
    length, answer = cfg.sequence_len // 2, min(ANSWER_TOKENS, cfg.sequence_len // 4)
    random = np.random.default_rng(config.seed)

    def engine_of(rows: int) -> Engine:
        options = {"max_len": cfg.sequence_len, "mesh": mesh, "quantize": settings.quantize}
        return Engine(params, cfg, NoSpecials(), max_rows=rows, **options)

    records, engines, over_cache = [], [], []
    for rows in settings.rows or (1, 16):
        log(f"bench decode: {rows} rows")
        over_cache += cache_attention.figures(cfg, rows, settings.repeat, config.seed)
        engine = engine_of(rows)
        prompts = random.integers(cfg.vocab_size, size=(rows, length)).tolist()

        def generate(count: int, engine: Engine = engine, prompts: list = prompts) -> None:
            engine.generate(prompts, SamplingParams(top_k=50, max_tokens=count))

        prefill = timed(lambda: generate(1), settings.repeat)
        whole = timed(lambda: generate(1 + answer), settings.repeat)
        seconds = whole.median - prefill.median
        step_bytes = least_bytes(engine, cfg, length + answer / 2)
        peak = peak_bandwidth(mesh.devices.flat[0]) if mesh.size == 1 else None
        records.append(
            {
                "rows": rows,
                **{f"prefill_{name}": value for name, value in prefill.ms().items()},
                **{f"answer_{name}": value for name, value in whole.ms().items()},
                "prefill_tok_per_sec": rows * length / prefill.median,
                "decode_tok_per_sec": rows * answer / seconds,
                "decode_step_ms": 1000 * seconds / answer,
                "decode_step_mb": step_bytes / 1e6,
                "decode_gb_per_sec": step_bytes * answer / seconds / 1e9,
                "mbu": peak and step_bytes * answer / seconds / peak,
                "prefill_mfu": mfu(rows / prefill.median, prompt_flops(cfg, length), mesh.size),
                "compilations": len(engine.compiled),
            }
        )
        engines.append(engine.describe())
    several = [rows for rows in settings.rows or (16, 32) if rows > 1]
    arrived = []
    if several and not settings.step_only:
        log("bench decode: arrivals")
        alone, *together = map(engine_of, (1, *several))
        for part in ANSWERS:
            arrived += arrivals(alone, together, cfg, config.seed, cfg.sequence_len // part)
    return {
        "prompt_tokens": length,
        "answer_tokens": answer,
        "compute_dtype": cfg.compute_dtype,
        "quantize": settings.quantize,
        "peak_bytes": peak_memory_bytes(),
        "engines": engines,
        "speeds": records,
        **({"over_cache": over_cache} if over_cache else {}),
        "arrivals": arrived,
    }


def least_bytes(engine: Engine, cfg: GPTConfig, tokens: float) -> float:
    """Bytes that a decode step of all rows reads at least, with so many tokens in each: the weights of its products,
    and the keys and values that its queries see. Their rate over the memory's peak is nanochat's MBU.
    """
    products = {name: value for name, value in engine.weights.items() if not name.startswith(("wte", "value_embed_"))}
    width = 2 * cfg.n_kv_head * cfg.head_dim * jnp.dtype(cfg.compute_dtype).itemsize
    seen = sum(min(tokens, window + 1) for window in cfg.windows)
    return sum(x.nbytes for x in jax.tree.leaves(products)) + engine.max_rows * seen * width


def prompt_flops(cfg: GPTConfig, tokens: int) -> float:
    """FLOPs of reading a prompt of so many tokens: a forward pass, of whose output head the last position alone."""
    short = dataclasses.replace(cfg, sequence_len=tokens)
    return tokens * flops_per_token(short) / 3 - 2 * (tokens - 1) * count_params(cfg)["lm_head"]


def arrivals(
    alone: Engine, together: Sequence[Engine], cfg: GPTConfig, seed: int, longest: int
) -> list[dict[str, Any]]:
    """Answer tokens a second of REQUESTS requests, prompts of a 32nd to half of the context and answers of a 32nd of it
    to `longest` tokens: one after the other, and in each engine as they arrive, from the first arrival to the last
    answer's end. Ratios are of a round.
    """
    random, least = np.random.default_rng(seed), cfg.sequence_len // 32
    lengths = random.integers(least, cfg.sequence_len // 2 + 1, REQUESTS)
    prompts = [random.integers(cfg.vocab_size, size=length).tolist() for length in lengths]
    counts = random.integers(least, longest + 1, REQUESTS).tolist()
    gaps = random.exponential(size=REQUESTS)
    when = (np.cumsum(gaps) - gaps[0]) / np.sum(gaps)

    def request(engine: Engine, i: int) -> None:
        for _ in engine.stream(prompts[i], SamplingParams(top_k=50, max_tokens=counts[i], seed=i)):
            pass

    def in_turn() -> float:
        start = time.perf_counter()
        for i in range(REQUESTS):
            request(alone, i)
        return time.perf_counter() - start

    def arriving(engine: Engine, within: float) -> float:
        def later(i: int) -> None:
            time.sleep(max(0.0, start + within * when[i] - time.perf_counter()))
            request(engine, i)

        with ThreadPoolExecutor(REQUESTS) as threads:
            start = time.perf_counter()
            list(threads.map(later, range(REQUESTS)))
        return time.perf_counter() - start

    def compiled_before(engine: Engine, run: Callable[[], float]) -> float:
        """Seconds of the first run in which nothing is compiled."""
        while True:
            known, took = len(engine.compiled), run()
            if len(engine.compiled) == known:
                return took

    within = compiled_before(alone, in_turn) / HURRY
    rounds = [
        [
            compiled_before(alone, in_turn),
            *(compiled_before(engine, lambda engine=engine: arriving(engine, within)) for engine in together),
        ]
        for _ in range(ROUNDS)
    ]
    one, *several = zip(*rounds, strict=True)
    records = []
    for engine, seconds in zip(together, several, strict=True):
        ratios = sorted(a / b for a, b in zip(one, seconds, strict=True))
        records.append(
            {
                "rows": engine.max_rows,
                "prompt_tokens": sum(map(len, prompts)),
                "answer_tokens": sum(counts),
                "tok_per_sec": sum(counts) / statistics.median(seconds),
                "one_row_tok_per_sec": sum(counts) / statistics.median(one),
                "ratio": statistics.median(ratios),
                "lowest_ratio": ratios[0],
                "highest_ratio": ratios[-1],
                "compilations": len(engine.compiled),
            }
        )
    return records
