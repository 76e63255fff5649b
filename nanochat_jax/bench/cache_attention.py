"""Attention of decoding alone, by XLA and by the kernel: a query a row over its KV cache, half of the context filled.

Times are of one layer's call among many, each of which waits for the one before, on the device. Errors are those of
what is seen and of the new keys and values against XLA in float32; all other slots must be as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.bench.attention import LIMITS, runs_here
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import GPTConfig
from nanochat_jax.inference.decoding import empty_cache, has_kernel, over_cache
from nanochat_jax.model import rope

CALLS = 200
"""Calls that are timed at once."""
TOGETHER = 16
"""Rows that share a prompt, where there are so many."""


def figures(cfg: GPTConfig, rows: int, repeat: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records for each window, with rows on their own and with shared prompts; none where there is no kernel."""
    interpreted = "interpreted" in cfg.attention
    ways = {"xla": replace(cfg, attention="reference")}
    ways["kernel"] = cfg if interpreted else replace(cfg, attention="pallas")
    if not has_kernel(ways["kernel"]) or not (interpreted or runs_here("pallas", cfg)):
        return
    layers = {min(window, cfg.sequence_len): layer for layer, window in enumerate(cfg.windows)}
    for window, layer in sorted(layers.items()):
        for prompts in (0, *[rows // TOGETHER] * (rows % TOGETHER == 0)):
            given = arrays(cfg, layer, rows, prompts, seed)
            exact = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, given)
            with jax.default_matmul_precision("highest"):
                expected = once(replace(ways["xla"], compute_dtype="float32"), layer)(*exact)
            for name, how in ways.items():
                record = {"impl": name, "rows": rows, "window": window, "prompts": prompts}
                try:
                    record |= measured(how, layer, given, expected, 1 if interpreted else CALLS, repeat)
                except Exception as error:  # a kernel that fails must not hide what XLA does
                    record |= {"right": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
                yield record


def arrays(cfg: GPTConfig, layer: int, rows: int, prompts: int, seed: int) -> tuple:
    """What `over_cache` takes before the configuration: normally distributed, positions at about half of the
    context, an eighth of them the row's own where prompts are shared.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    half = cfg.sequence_len // 2
    own_tokens = half // 4 if prompts else cfg.sequence_len
    shapes = jax.eval_shape(lambda: empty_cache(cfg, rows, own_tokens, prompts, cfg.sequence_len))

    def filled(panels: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        return {name: jax.random.normal(next(keys), shape.shape, shape.dtype) for name, shape in panels.items()}

    dtype, per_kv = jnp.dtype(cfg.compute_dtype), cfg.n_head // cfg.n_kv_head
    qkv = jax.random.normal(next(keys), (cfg.n_kv_head, per_kv + 2, cfg.head_dim, rows), dtype)
    v = jax.random.normal(next(keys), (cfg.n_kv_head, cfg.head_dim, rows), dtype)
    own, shared = filled(shapes["own"][layer]), filled(shapes["shared"][layer]) if prompts else None
    if rows == 1:
        own = {name: panel[0] for name, panel in own.items()}  # as decoding has it, see `squeezed`
    positions = half + jnp.arange(rows, dtype=jnp.int32) % 7
    first = jnp.full(rows, half - half // 8 if prompts else 0, jnp.int32)
    tables = rope(positions, cfg.head_dim, cfg.rope_base, dtype)
    return qkv, v if cfg.has_value_embedding(layer) else None, own, shared, tables, positions, first


def once(cfg: GPTConfig, layer: int) -> Callable[..., Any]:
    """One call, compiled."""
    return jax.jit(lambda *given: over_cache(*given, cfg, layer))


def errors_of(got: tuple, expected: tuple, given: tuple) -> dict[str, float]:
    """Relative errors of what is seen, "out", and of the new keys and values, "k" and "v"; infinite where a slot is no
    longer what it was though it is not the new one.
    """
    *_, positions, first = given
    rows = jnp.arange(len(positions))

    def error(x: jax.Array, y: jax.Array) -> float:
        return float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))

    errors = {"out": error(got[0], expected[0])}
    for name in ("k", "v"):
        new, right, old = (x[name].reshape(len(rows), *x[name].shape[-3:]) for x in (got[1], expected[1], given[2]))
        slots = (positions - first) % new.shape[2]
        kept = jnp.array_equal(new.at[rows, :, slots].set(0), old.at[rows, :, slots].set(0))
        errors[name] = error(new[rows, :, slots], right[rows, :, slots]) if kept else float("inf")
    return errors


def measured(cfg: GPTConfig, layer: int, given: tuple, expected: tuple, calls: int, repeat: int) -> dict[str, Any]:
    """Microseconds of a call, and errors."""
    errors = errors_of(once(cfg, layer)(*given), expected, given)

    @jax.jit
    def many(qkv: jax.Array, v: jax.Array | None, own: dict[str, jax.Array], *rest: Any) -> jax.Array:
        def again(_: int, carry: tuple) -> tuple:
            qkv, own = carry
            y_BKGH, own = over_cache(qkv, v, own, *rest, cfg, layer)
            return qkv.at[:, :-2].add((1e-6 * y_BKGH.transpose(1, 2, 3, 0)).astype(qkv.dtype)), own

        return jax.lax.fori_loop(0, calls, again, (qkv, own))[0]

    timing = timed(lambda: many(*given), repeat)
    return {
        "us": 1e3 * timing.ms()["median_ms"] / calls,
        **{f"{name}_error": value for name, value in errors.items()},
        "right": all(error <= LIMITS[cfg.compute_dtype] for error in errors.values()),
    }
