"""Causal sliding-window attention in plain XLA that computes only the blocks some query can see.

For CPUs, where the full T x S score matrix is the slowest part of a step: a block of queries is multiplied with the one
contiguous range of keys its window reaches, so that half of a causal layer and most of a windowed one is never
computed. The backward pass is written out (FlashAttention-2's, arXiv 2307.08691, with the weights kept): left to
automatic differentiation it transposes and pads arrays of scores.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kernels.reference import MASKED

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]


def blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Each block of queries and the keys that it can see; small blocks waste less of a narrow window."""
    block = 128 if window >= 256 else 64
    for start in range(0, length, block):
        stop = min(start + block, length)
        yield slice(start, stop), slice(max(0, start - window), stop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, window: int) -> jax.Array:
    """As `reference_attention`. Returns [B, T, N, H] in q's dtype."""
    return _forward(q_BTNH, k_BSKH, v_BSKH, window)[0]


def _forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, window: int) -> tuple[jax.Array, Saved]:
    q_PGTH = _grouped(q_BTNH * jnp.asarray(q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype), k_BSKH.shape[2])
    k_PSH, v_PSH = (_grouped(x, x.shape[2])[:, 0] for x in (k_BSKH, v_BSKH))
    out_PGTH, *sums = _each_head(functools.partial(_head_forward, window), q_PGTH, k_PSH, v_PSH)
    return _ungrouped(out_PGTH, q_BTNH.shape), (q_PGTH, k_PSH, v_PSH, out_PGTH, *sums)


def _backward(window: int, saved: Saved, grad_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_PGTH = saved[0]
    batch, length, _, width = grad_BTNH.shape
    kv_heads = q_PGTH.shape[0] // batch
    grads = _each_head(functools.partial(_head_backward, window), *saved, _grouped(grad_BTNH, kv_heads))
    kv_shape = batch, length, kv_heads, width
    return tuple(_ungrouped(x, shape) for x, shape in zip(grads, (grad_BTNH.shape, kv_shape, kv_shape), strict=True))


blocked_attention.defvjp(_forward, _backward)


def _each_head(one: Callable, *arrays: jax.Array) -> tuple:
    """`one` of each pair of row and key head. A CPU does single products faster than batches of them."""
    return jax.lax.platform_dependent(
        *arrays, cpu=lambda *xs: jax.lax.map(lambda x: one(*x), xs), default=lambda *xs: jax.vmap(one)(*xs)
    )


def _head_forward(window: int, q_GTH: jax.Array, k_SH: jax.Array, v_SH: jax.Array) -> tuple:
    """Output [G, T, H]; what the backward pass wants: sums of the weights [G, T, 1], weights of each block."""
    outs, totals, weights = [], [], []
    for rows, keys in blocks(q_GTH.shape[1], window):
        scores_GTS = _dot("GTH,SH->GTS", q_GTH[:, rows], k_SH[keys])
        i_T1, j_1S = jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(keys.start, keys.stop)[None, :]
        visible_TS = (j_1S <= i_T1) & (j_1S >= i_T1 - window)
        scores_GTS = jnp.where(visible_TS[None], scores_GTS, MASKED)
        weights_GTS = jnp.exp(scores_GTS - jnp.max(scores_GTS, axis=-1, keepdims=True))
        totals.append(jnp.sum(weights_GTS, axis=-1, keepdims=True))
        weights.append(weights_GTS.astype(v_SH.dtype))
        outs.append(_dot("GTS,SH->GTH", weights[-1], v_SH[keys]) / totals[-1])
    return jnp.concatenate(outs, axis=1).astype(q_GTH.dtype), jnp.concatenate(totals, axis=1), weights


def _head_backward(
    window: int,
    q_GTH: jax.Array,
    k_SH: jax.Array,
    v_SH: jax.Array,
    out_GTH: jax.Array,
    totals_GT1: jax.Array,
    weights: list[jax.Array],
    grad_GTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q before its scaling [G, T, H], of keys and of values [1, S, H]."""
    dtype = grad_GTH.dtype
    # The weights were kept as they are before division by their sums, which the gradient takes on instead.
    grad_GTH = grad_GTH.astype(jnp.float32) / totals_GT1
    delta_GT1 = jnp.sum(grad_GTH * out_GTH.astype(jnp.float32), axis=-1, keepdims=True)
    grad_GTH = grad_GTH.astype(dtype)
    # Of keys and values the gradients grow transposed: so it is q and the gradient that are, not the scores.
    dk_HS = dv_HS = jnp.zeros(k_SH.shape[::-1], jnp.float32)
    dqs = []
    for (rows, keys), weights_GTS in zip(blocks(q_GTH.shape[1], window), weights, strict=True):
        grad, q = grad_GTH[:, rows], q_GTH[:, rows]
        dweights_GTS = _dot("GTH,SH->GTS", grad, v_SH[keys])
        dscores_GTS = weights_GTS.astype(jnp.float32) * (dweights_GTS - delta_GT1[:, rows])
        dscores_GTS = dscores_GTS.astype(dtype)
        dqs.append(_dot("GTS,SH->GTH", dscores_GTS, k_SH[keys]))
        dk_HS = dk_HS.at[:, keys].add(_dot("GTH,GTS->HS", q, dscores_GTS))
        dv_HS = dv_HS.at[:, keys].add(_dot("GTH,GTS->HS", grad, weights_GTS))
    dq_GTH = jnp.concatenate(dqs, axis=1) * q_GTH.shape[-1] ** -0.5
    return dq_GTH.astype(dtype), dk_HS.T[None].astype(dtype), dv_HS.T[None].astype(dtype)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Products summed and returned in float32. XLA's CPU compiler refuses some whose operands have 16 bits."""

    def on_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))

    def elsewhere(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=elsewhere)


def _grouped(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B * K, G, T, H], the query heads of a key head together."""
    batch, length, heads, width = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return x_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, -1, length, width)


def _ungrouped(x_PGTH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, to [B, T, N, H]."""
    batch, length, heads, width = shape
    return x_PGTH.reshape(batch, heads, length, width).swapaxes(1, 2)
