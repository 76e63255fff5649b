"""One training step of the base stage on random tokens: how fast, how much memory, and where its time goes.

The parts are jitted on their own, so that they need not add up to the step: in the step the compiler sees across them.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.bench import Settings
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import Config, GPTConfig
from nanochat_jax.fp8 import check_compiled, fp8_products, precision
from nanochat_jax.memory import account, train_rows, with_loss_chunk
from nanochat_jax.metrics import mfu, peak_memory_bytes
from nanochat_jax.model import Params, attend, count_params, flops_per_token, hidden
from nanochat_jax.optim import Schedule, base_schedule
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import check_mesh, data_shards, make_mesh, put_batch, rows_of_microbatch, rows_of_step
from nanochat_jax.train import (
    TrainState,
    apply_gradients,
    batch_loss,
    born_params,
    compiler_options,
    train_step,
    unreduced_gradients,
    with_optimizer,
)

Log = Callable[[str], None]
CACHE_HIT = "/jax/compilation_cache/cache_hits"
hidden_states = jax.jit(hidden, static_argnames="cfg")
optimizer_update = jax.jit(apply_gradients, static_argnames="cfg", donate_argnames="state")


class Setup(NamedTuple):
    """What a step of the base stage is compiled for."""

    cfg: GPTConfig
    mesh: Mesh
    schedule: Schedule
    microbatches: int
    rows: int
    """Of a microbatch, over all data shards."""


def prepared(config: Config, log: Log) -> Setup:
    """The step that `config` asks for. UserError where the mesh does not divide it."""
    cfg = gpt_config(config, config.tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, cfg)
    log(f"precision: {precision(cfg, mesh.devices.flat[0])}")
    schedule, horizon = base_schedule(config, cfg)
    shards = data_shards(mesh)
    step_rows = rows_of_step("base", horizon.batch_tokens, cfg.sequence_len, shards)
    on_a_shard = train_rows(config, config.base, "base", cfg, mesh, step_rows // shards, log)
    rows = rows_of_microbatch("base", step_rows, on_a_shard, shards)
    return Setup(with_loss_chunk(config, cfg, rows // shards, mesh), mesh, schedule, step_rows // rows, rows)


def figures(config: Config, settings: Settings, log: Log) -> dict[str, Any]:
    """Times in ms, rates, the compiler's account of the step in bytes and FLOPs, and the parts."""
    setup = prepared(config, log)
    cfg, mesh, schedule, microbatches, rows = setup
    shape = (microbatches, rows, cfg.sequence_len)
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=shape, dtype=np.int32)
    batch = put_batch({"inputs": tokens, "targets": np.roll(tokens, -1, axis=-1)}, mesh, leading=1)
    log(f"bench train: {microbatches} x {rows} rows of {cfg.sequence_len} tokens, attention {cfg.attention}; compiling")
    with jax.set_mesh(mesh):
        state = with_optimizer(cfg, mesh, born_params(cfg, mesh, config.seed))
        with counting(CACHE_HIT) as hits:
            start = time.perf_counter()
            lowered = train_step.lower(state, batch, schedule.hyper(0), cfg=cfg)
            traced = time.perf_counter()
            program = lowered.compile(compiler_options(cfg, mesh))
            compiled = time.perf_counter()
        text = program.as_text()
        check_compiled(cfg, mesh.devices.flat[0], text)
        analysis = account(program) | {
            "fp8_products": fp8_products(text),
            "trace_seconds": traced - start,
            "compile_seconds": compiled - traced,
            "compiled_before": bool(hits),
        }

        def step() -> jax.Array:
            nonlocal state
            state, metrics = program(state, batch, schedule.hyper(0))
            return metrics["loss"]

        timing = timed(step, settings.repeat)
        loss, peak = float(step()), peak_memory_bytes()
        parts = [] if settings.step_only else profile(setup, state, batch, timing.median, settings.repeat, log)
    rate = tokens.size / timing.median
    flops = flops_per_token(cfg)
    return {
        "architecture": asdict(cfg) | {"parameters": count_params(cfg)["total"]},
        "mesh": config.mesh,
        "rows": rows,
        "microbatches": microbatches,
        "tokens": tokens.size,
        "step": timing.ms(),
        "tok_per_sec": rate,
        "tflop_per_sec": rate * flops / 1e12,
        "mfu": mfu(rate, flops, mesh.size),
        "loss": loss,
        "peak_bytes": peak,
        "program": analysis,
        "parts": parts,
    }


@contextmanager
def counting(event: str) -> Iterator[list[str]]:
    """The times that JAX reports `event` meanwhile."""
    seen: list[str] = []

    def listen(name: str, **_: Any) -> None:
        if name == event:
            seen.append(name)

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


def profile(
    setup: Setup, state: TrainState, batch: dict[str, jax.Array], step: float, repeat: int, log: Log
) -> list[dict[str, Any]]:
    """Each part's time in a step and its share of the step's `step` seconds; parts marked by two spaces are within the
    one above.
    """
    cfg, _, schedule, microbatches, rows = setup
    micro = jax.tree.map(lambda x: x[0], batch)
    params, hyper = state.params, schedule.hyper(0)
    seconds: dict[str, float] = {}

    def take(name: str, action: Callable[[], Any], times: int) -> None:
        log(f"bench train: timing {name.strip()}")
        seconds[name] = timed(action, repeat).median * times

    take("gradients", lambda: gradients(params, batch, cfg=cfg), 1)
    take("  layers forward", lambda: hidden_states(params, cfg, micro["inputs"]), microbatches)
    take("  layers", lambda: hidden_gradients(params, batch, cfg=cfg), 1)
    qkv = [
        jax.random.normal(jax.random.key(i), (rows, cfg.sequence_len, n, cfg.head_dim), cfg.compute_dtype)
        for i, n in enumerate((cfg.n_head, cfg.n_kv_head, cfg.n_kv_head))
    ]
    for window, layers in sorted(Counter(min(w, cfg.sequence_len) for w in cfg.windows).items()):
        name = f"    attention, window {window}, {layers} of {cfg.n_layer} layers"
        take(name, lambda w=window: attention_gradients(*qkv, window=w, cfg=cfg), microbatches * layers)
    seconds["  head and loss, by difference"] = seconds["gradients"] - seconds["  layers"]
    grads = gradients(params, batch, cfg=cfg)[1]

    def update() -> jax.Array:
        nonlocal state
        state, norm = optimizer_update(state, cfg, grads, hyper)
        return norm

    take("optimizer", update, 1)
    seconds["rest, by difference"] = step - seconds["gradients"] - seconds["optimizer"]
    return [{"part": name, "ms": 1000 * value, "share": value / step} for name, value in seconds.items()]


@functools.partial(jax.jit, static_argnames="cfg")
def gradients(params: Params, batch: dict[str, jax.Array], *, cfg: GPTConfig) -> tuple[jax.Array, Params]:
    """Loss and gradients of a step, not yet reduced."""
    return unreduced_gradients(functools.partial(batch_loss, cfg), params, batch, jnp.sum(batch["targets"] >= 0))


@functools.partial(jax.jit, static_argnames="cfg")
def hidden_gradients(params: Params, batch: dict[str, jax.Array], *, cfg: GPTConfig) -> tuple[jax.Array, Params]:
    """As `gradients`, of everything before the head, which stands aside: each position is drawn to the one before."""

    def loss(params: Params, microbatch: dict[str, jax.Array], counted: jax.Array) -> jax.Array:
        x_BTD = hidden(params, cfg, microbatch["inputs"]).astype(jnp.float32)
        return jnp.sum(x_BTD * jax.lax.stop_gradient(jnp.roll(x_BTD, 1, axis=1))) / counted

    return unreduced_gradients(loss, params, batch, jnp.sum(batch["targets"] >= 0))


@functools.partial(jax.jit, static_argnames=("window", "cfg"))
def attention_gradients(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int, cfg: GPTConfig
) -> tuple[jax.Array, ...]:
    """Attention of one layer, forward and backward."""
    out_BTNH, backward = jax.vjp(lambda q, k, v: attend(q, k, v, window, cfg.attention), q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH, *backward(q_BTNH)
