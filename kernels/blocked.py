"""Causal sliding-window attention in plain XLA that computes only the blocks some query can see.

For CPUs, where the full T x S score matrix is the slowest part of a step: a block of queries is multiplied with the one
contiguous range of keys its window reaches, so that half of a causal layer and most of a windowed one is never
computed. The backward pass is written out (FlashAttention-2's, arXiv 2307.08691, with the weights kept): left to
automatic differentiation it transposes and pads arrays of scores.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels.reference import MASKED

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]


def blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Each block of queries and the keys that it can see; small blocks waste less of a narrow window."""
    block = 128 if window >= length else 64
    for start in range(0, length, block):
        stop = min(start + block, length)
        yield slice(start, stop), slice(max(0, start - window), stop)


def blocked_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int) -> jax.Array:
    """As `reference_attention`. Returns [B, T, N, H] in q's dtype."""
    return _attention(q_BTNH, k_BSKH, v_BSKH, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, window: int) -> jax.Array:
    return _forward(q_BTNH, k_BSKH, v_BSKH, window)[0]


def _forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, window: int) -> tuple[jax.Array, Saved]:
    # Heads before positions: the products become batched matrix products over contiguous panels.
    q_BKGTH = _grouped(q_BTNH * jnp.asarray(q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype), k_BSKH.shape[2])
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    outs, totals, weights = [], [], []
    for rows, keys in blocks(q_BTNH.shape[1], window):
        scores = _dot("BKGTH,BKSH->BKGTS", q_BKGTH[..., rows, :], k_BKSH[..., keys, :])
        i_T1, j_1S = jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(keys.start, keys.stop)[None, :]
        visible_TS = (j_1S <= i_T1) & (j_1S >= i_T1 - window)
        scores = jnp.where(visible_TS[None, None, None], scores, MASKED)
        weights_BKGTS = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        totals.append(jnp.sum(weights_BKGTS, axis=-1, keepdims=True))
        weights.append(weights_BKGTS.astype(v_BKSH.dtype))
        outs.append(_dot("BKGTS,BKSH->BKGTH", weights[-1], v_BKSH[..., keys, :]) / totals[-1])
    out_BKGTH = jnp.concatenate(outs, axis=3).astype(q_BTNH.dtype)
    saved = q_BKGTH, k_BKSH, v_BKSH, out_BKGTH, jnp.concatenate(totals, axis=3), weights
    return _ungrouped(out_BKGTH), saved


def _backward(window: int, saved: Saved, grad_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BKGTH, k_BKSH, v_BKSH, out_BKGTH, totals_BKGT1, weights = saved
    # The weights were kept as they are before division by their sums, which the gradient takes on instead.
    grad = _grouped(grad_BTNH, k_BKSH.shape[1]).astype(jnp.float32) / totals_BKGT1
    delta_BKGT1 = jnp.sum(grad * out_BKGTH.astype(jnp.float32), axis=-1, keepdims=True)
    grad_BKGTH = grad.astype(grad_BTNH.dtype)
    # Of keys and values the gradients grow transposed: so it is q and the gradient that are, not the scores.
    dk_BKHS = dv_BKHS = jnp.zeros((*k_BKSH.shape[:2], k_BKSH.shape[3], k_BKSH.shape[2]), jnp.float32)
    dqs = []
    for (rows, keys), weights_BKGTS in zip(blocks(grad_BTNH.shape[1], window), weights, strict=True):
        g, q = grad_BKGTH[..., rows, :], q_BKGTH[..., rows, :]
        dweights = _dot("BKGTH,BKSH->BKGTS", g, v_BKSH[..., keys, :])
        dscores = weights_BKGTS.astype(jnp.float32) * (dweights - delta_BKGT1[..., rows, :])
        dscores = dscores.astype(q.dtype)
        dqs.append(_dot("BKGTS,BKSH->BKGTH", dscores, k_BKSH[..., keys, :]))
        dk_BKHS = dk_BKHS.at[..., keys].add(_dot("BKGTH,BKGTS->BKHS", q, dscores))
        dv_BKHS = dv_BKHS.at[..., keys].add(_dot("BKGTH,BKGTS->BKHS", g, weights_BKGTS))
    dq_BKGTH = jnp.concatenate(dqs, axis=3) * grad_BTNH.shape[-1] ** -0.5
    dk_BSKH, dv_BSKH = (x.transpose(0, 3, 1, 2).astype(k_BKSH.dtype) for x in (dk_BKHS, dv_BKHS))
    return _ungrouped(dq_BKGTH.astype(grad_BTNH.dtype)), dk_BSKH, dv_BSKH


_attention.defvjp(_forward, _backward)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _grouped(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    batch, length, heads, width = x_BTNH.shape
    return x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    batch, kv_heads, group, length, width = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)
