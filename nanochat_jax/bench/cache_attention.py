"""Attention of decoding alone, by XLA and by the kernel: a query a row over its KV cache, half of the context filled.

Times are of one layer's call among many, each of which waits for the one before, on the device. Errors are those of
what is seen and kept against XLA in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.bench.attention import LIMITS
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import GPTConfig
from nanochat_jax.inference.decoding import empty_cache, over_cache_by_kernel, over_cache_by_xla
from nanochat_jax.model import rope

CALLS = 200
"""Calls that are timed at once."""
TOGETHER = 16
"""Rows that share a prompt, where there are so many."""


def figures(cfg: GPTConfig, rows: int, repeat: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records for each window, with rows on their own and with shared prompts."""
    interpreted = "interpreted" in cfg.attention
    by_kernel = replace(cfg, attention="pallas_interpreted" if interpreted else "pallas")
    ways = {"xla": (over_cache_by_xla, cfg), "kernel": (over_cache_by_kernel, by_kernel)}
    layers = {min(window, cfg.sequence_len): layer for layer, window in enumerate(cfg.windows)}
    for window, layer in sorted(layers.items()):
        for prompts in (0, *[rows // TOGETHER] * (rows % TOGETHER == 0)):
            given = arrays(cfg, layer, rows, prompts, seed)
            exact = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, given)
            with jax.default_matmul_precision("highest"):
                expected = once(over_cache_by_xla, replace(cfg, compute_dtype="float32"), layer)(*exact)
            for name, (way, how) in ways.items():
                record = {"impl": name, "rows": rows, "window": window, "prompts": prompts}
                try:
                    record |= measured(way, how, layer, given, expected, 1 if interpreted else CALLS, repeat)
                except Exception as error:  # a kernel that fails must not hide what XLA does
                    record |= {"right": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
                yield record


def arrays(cfg: GPTConfig, layer: int, rows: int, prompts: int, seed: int) -> tuple:
    """What `over_cache_by_xla` takes before the configuration: normally distributed, positions at about half of the
    context, an eighth of them the row's own where prompts are shared.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    half = cfg.sequence_len // 2
    own_tokens = half // 4 if prompts else cfg.sequence_len
    shapes = jax.eval_shape(lambda: empty_cache(cfg, rows, own_tokens, prompts, cfg.sequence_len))

    def filled(panels: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        return {name: jax.random.normal(next(keys), shape.shape, shape.dtype) for name, shape in panels.items()}

    dtype = jnp.dtype(cfg.compute_dtype)
    heads = cfg.n_kv_head, cfg.n_head // cfg.n_kv_head + 2, cfg.head_dim, rows
    qkv = jax.random.normal(next(keys), heads, dtype)
    own, shared = filled(shapes["own"][layer]), filled(shapes["shared"][layer]) if prompts else None
    positions = half + jnp.arange(rows, dtype=jnp.int32) % 7
    first = jnp.full(rows, half - half // 8 if prompts else 0, jnp.int32)
    return qkv, None, own, shared, rope(positions, cfg.head_dim, cfg.rope_base, dtype), positions, first


def once(way: Callable[..., Any], cfg: GPTConfig, layer: int) -> Callable[..., Any]:
    """One call, compiled."""
    return jax.jit(lambda *given: way(*given, cfg, layer))


def measured(
    way: Callable[..., Any], cfg: GPTConfig, layer: int, given: tuple, expected: Any, calls: int, repeat: int
) -> dict[str, Any]:
    """Microseconds of a call, and errors."""
    got = once(way, cfg, layer)(*given)
    pairs = [(x.astype(jnp.float32), y) for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True)]
    errors = [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs]

    @jax.jit
    def many(qkv: jax.Array, v: None, own: dict[str, jax.Array], *rest: Any) -> jax.Array:
        def again(_: int, carry: tuple) -> tuple:
            qkv, own = carry
            y_BKGH, own = way(qkv, v, own, *rest, cfg, layer)
            return qkv.at[:, :-2].add((1e-6 * y_BKGH.transpose(1, 2, 3, 0)).astype(qkv.dtype)), own

        return jax.lax.fori_loop(0, calls, again, (qkv, own))[0]

    timing = timed(lambda: many(*given), repeat)
    return {
        "us": 1e3 * timing.ms()["median_ms"] / calls,
        "out_error": max(errors),
        "right": all(error <= LIMITS[cfg.compute_dtype] for error in errors),
    }
