"""The jitted steps of generation: prefill prompts into cache rows, decode one token in every row, sample.

Every row has its own length, sampling parameters and seed. A row's random key comes from its seed and the position of
the token drawn, so what a row says does not depend on its neighbours or on when it joined.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.config import GPTConfig
from nanochat_jax.model import GPT, Cache, Params, check_length, empty_cache, logits_of

FEW = 64
"""Candidates kept where every row restricts itself to at most so many (top-k): sorting the vocabulary is slow."""

Knobs = dict
"""Per row: "temperature", "top_p", "min_p" float32 [B], "top_k", "seed" int32 [B]."""


def sample(logits_BV: jax.Array, knobs: Knobs, positions_B: jax.Array, candidates: int) -> jax.Array:
    """One token a row, int32 [B]: top-k, then top-p (arXiv 1904.09751), then min-p (arXiv 2407.01082), then a draw.

    Temperature 0 takes the most likely token. `candidates` (static): how many of the best tokens are looked at: at
    least every row's top_k, or the vocabulary where a row has none; 1 where every row is greedy.
    """
    if candidates == 1:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    best_BC, tokens_BC = jax.lax.top_k(logits_BV, min(candidates, logits_BV.shape[-1]))
    count = best_BC.shape[-1]
    temperature_B1 = knobs["temperature"][:, None]
    scaled_BC = best_BC / jnp.maximum(temperature_B1, 1e-6)
    top_k_B1 = jnp.where(knobs["top_k"] > 0, knobs["top_k"], count)[:, None]
    keep_BC = jnp.arange(count)[None, :] < top_k_B1
    probs_BC = jax.nn.softmax(jnp.where(keep_BC, scaled_BC, -jnp.inf), axis=-1)
    before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
    keep_BC &= before_BC < knobs["top_p"][:, None]
    keep_BC &= probs_BC >= knobs["min_p"][:, None] * probs_BC[:, :1]
    keep_BC |= jnp.arange(count)[None, :] == 0

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (count,))

    noise_BC = jax.vmap(noise)(knobs["seed"], positions_B)
    drawn_B = jnp.argmax(jnp.where(keep_BC, scaled_BC + noise_BC, -jnp.inf), axis=-1)
    choice_B = jnp.where(knobs["temperature"] > 0, drawn_B, 0)
    return jnp.take_along_axis(tokens_BC, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "candidates"), donate_argnames="cache")
def prefill(
    params: Params,
    cache: Cache,
    tokens_PT: jax.Array,
    counts_P: jax.Array,
    source_R: jax.Array,
    slot_R: jax.Array,
    knobs: Knobs,
    *,
    cfg: GPTConfig,
    candidates: int,
) -> tuple[jax.Array, Cache]:
    """Run P prompts once and put them into R cache rows, several of which may share a prompt; draw their first tokens.

    tokens_PT is padded on the right, counts_P are the true lengths, row i takes prompt source_R[i] into cache row
    slot_R[i] (a slot past the end is dropped: padding). knobs are per R. Returns int32 [R] and the cache.
    """
    prompts, length = tokens_PT.shape
    zeros = jnp.zeros((prompts,), jnp.int32)
    model = GPT(cfg)
    x_PTD, filled = model.apply({"params": params}, tokens_PT, empty_cache(cfg, prompts, length), zeros, counts_P)
    last_PD = x_PTD[jnp.arange(prompts), jnp.maximum(counts_P - 1, 0)]
    logits_RV = logits_of(params, cfg, last_PD)[source_R]

    def put(row: jax.Array, new: jax.Array) -> jax.Array:
        if row.ndim == 2:
            return row.at[slot_R].set(new[source_R], mode="drop")
        return row.at[slot_R, :, :length].set(new[source_R], mode="drop")

    return sample(logits_RV, knobs, counts_P[source_R], candidates), jax.tree.map(put, cache, filled)


@functools.partial(jax.jit, static_argnames=("cfg", "candidates"), donate_argnames="cache")
def decode(
    params: Params,
    cache: Cache,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    knobs: Knobs,
    *,
    cfg: GPTConfig,
    candidates: int,
) -> tuple[jax.Array, Cache]:
    """Feed one token a row at its position and draw the next, int32 [B]; the cache is updated in place."""
    x_B1D, cache = GPT(cfg).apply({"params": params}, tokens_B[:, None], cache, positions_B)
    return sample(logits_of(params, cfg, x_B1D[:, 0]), knobs, positions_B + 1, candidates), cache


@functools.partial(jax.jit, static_argnames="cfg")
def last_logits(params: Params, tokens_PT: jax.Array, counts_P: jax.Array, *, cfg: GPTConfig) -> jax.Array:
    """Logits float32 [P, V] after the last true token of each right-padded prompt."""
    check_length(cfg, tokens_PT.shape[1])
    x_PTD = GPT(cfg).apply({"params": params}, tokens_PT)[0]
    return logits_of(params, cfg, x_PTD[jnp.arange(tokens_PT.shape[0]), counts_P - 1])
