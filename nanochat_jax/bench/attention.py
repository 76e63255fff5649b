"""Attention alone: every implementation that runs here, forward and backward, each window of the model.

Rates count the FLOPs of those 128 x 128 tiles of the score matrix in which some query sees a key: 4 for each pair and
channel forward (two products), 10 backward (five). What computes more than those tiles is slower by that much. Errors
are those of output and gradients of the first rows against the specification in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import IMPLEMENTATIONS, attention, compute_capability, resolve
from kernels.flash_tiles import visited_tiles
from kernels.reference import reference_attention
from nanochat_jax.bench import Settings
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import Config, GPTConfig
from nanochat_jax.errors import UserError
from nanochat_jax.run import gpt_config

TILE = 128
CHECKED_ROWS = 2
LIMITS = {"float32": 1e-3, "bfloat16": 1e-2}
"""Relative errors up to which an implementation is right; float32 on a GPU may be TF32."""
Arrays = tuple[jax.Array, ...]
forward = jax.jit(attention, static_argnames=("window", "impl"))


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """A record for each implementation, number of rows and window. UserError where one named cannot run here."""
    cfg = gpt_config(config, config.tokenizer.vocab_size)
    platform, dtype, length = jax.default_backend(), cfg.compute_dtype, cfg.sequence_len
    named = settings.impls or [impl for impl in IMPLEMENTATIONS if runs_here(impl, cfg)]
    try:
        impls = [resolve(impl, *here(cfg)) for impl in named]
    except ValueError as error:
        raise UserError(str(error)) from None
    shape = {"T": length, "N": cfg.n_head, "K": cfg.n_kv_head, "H": cfg.head_dim}
    records = []
    for rows in settings.rows or ((16,) if platform == "gpu" else (2,)):
        heads = (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head, cfg.n_head)
        keys = jax.random.split(jax.random.key(config.seed), len(heads))
        arrays = [
            jax.random.normal(key, (rows, length, n, cfg.head_dim), dtype) for key, n in zip(keys, heads, strict=True)
        ]
        for window in sorted({min(window, length) for window in cfg.windows}):
            expected = specified(*(x[:CHECKED_ROWS].astype(jnp.float32) for x in arrays), window=window)
            tiles = visited_tiles(-(-length // TILE) * TILE, window, TILE, TILE)[0]
            flops = rows * cfg.n_head * cfg.head_dim * tiles * TILE**2
            for impl in impls:
                log(f"bench attention: {impl}, {rows} rows, window {window}")
                record = {"impl": impl, "rows": rows, "window": window}
                try:
                    record |= measured(arrays, impl, window, expected, LIMITS[dtype], flops, settings.repeat)
                except Exception as error:  # a kernel that fails must not hide what the others do
                    record |= {"right": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
                records.append(record)
    return {"shape": shape | {"dtype": dtype}, "attention": records}


def here(cfg: GPTConfig) -> tuple[str, str, str, int]:
    """What `resolve` decides by."""
    return jax.default_backend(), cfg.compute_dtype, compute_capability(), cfg.head_dim


def runs_here(impl: str, cfg: GPTConfig) -> bool:
    """Whether an implementation runs here at full speed, not interpreted."""
    try:
        return "interpreted" not in resolve(impl, *here(cfg))
    except ValueError:
        return False


def measured(
    arrays: list[jax.Array], impl: str, window: int, expected: Arrays, limit: float, flops: float, repeat: int
) -> dict[str, Any]:
    """Times, rates and errors of one implementation; `flops` a product needs half of, 2 for each pair and channel."""
    *qkv, dout = arrays
    out, pullback = forward_for_backward(*qkv, window=window, impl=impl)
    got = (out, *backward(pullback, dout))
    names = ("out", "dq", "dk", "dv")
    pairs = [(x[:CHECKED_ROWS].astype(jnp.float32), y) for x, y in zip(got, expected, strict=True)]
    errors = {n: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for n, (x, y) in zip(names, pairs, strict=True)}
    times = {
        "forward": (timed(lambda: forward(*qkv, window=window, impl=impl), repeat), 4 * flops),
        "backward": (timed(lambda: backward(pullback, dout), repeat), 10 * flops),
    }
    rates = {f"{name}_tflop_per_sec": work / timing.median / 1e12 for name, (timing, work) in times.items()}
    return {
        **{f"{name}_{key}": value for name, (timing, _) in times.items() for key, value in timing.ms().items()},
        **rates,
        **{f"{name}_error": value for name, value in errors.items()},
        "max_abs_error": max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs),
        "right": all(error <= limit for error in errors.values()),
    }


@functools.partial(jax.jit, static_argnames=("window", "impl"))
def forward_for_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, impl: str
) -> tuple[jax.Array, Callable[[jax.Array], Arrays]]:
    """The output and what gives the gradients, with what it keeps."""
    return jax.vjp(lambda *qkv: attention(*qkv, window=window, impl=impl), q, k, v)


@jax.jit
def backward(pullback: Callable[[jax.Array], Arrays], dout: jax.Array) -> Arrays:
    """The gradients alone."""
    return pullback(dout)


@functools.partial(jax.jit, static_argnames="window")
def specified(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, *, window: int) -> Arrays:
    """What output and gradients should be."""
    with jax.default_matmul_precision("highest"):
        out, pullback = jax.vjp(functools.partial(reference_attention, window=window), q, k, v)
        return out, *pullback(dout)
