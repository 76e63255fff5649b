"""Causal sliding-window attention in plain XLA that computes only the blocks some query can see.

For CPUs, where the full T x S score matrix is the slowest part of a step: a query block is multiplied with the one
contiguous range of keys its window reaches, so that half of a causal layer and most of a windowed one is never
computed.
"""

import jax
import jax.numpy as jnp

from kernels.reference import MASKED


def visible_range(start: int, stop: int, window: int) -> tuple[int, int]:
    """First and one past the last key that the queries [start, stop) can see."""
    return max(0, start - window), stop


def blocked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int, block: int = 128
) -> jax.Array:
    """As `reference_attention`; `block` is the queries computed at once. Returns [B, T, N, H] in q's dtype."""
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    # Heads before positions: the products become batched matrix products over contiguous panels.
    q_BKGTH = (q_BTNH * jnp.asarray(width**-0.5, q_BTNH.dtype)).reshape(
        batch, length, kv_heads, heads // kv_heads, width
    )
    q_BKGTH = q_BKGTH.transpose(0, 2, 3, 1, 4)
    k_BKSH = k_BSKH.transpose(0, 2, 1, 3)
    v_BKSH = v_BSKH.transpose(0, 2, 1, 3)
    outs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = visible_range(start, stop, window)
        scores = jnp.einsum(
            "BKGTH,BKSH->BKGTS",
            q_BKGTH[:, :, :, start:stop],
            k_BKSH[:, :, first:last],
            preferred_element_type=jnp.float32,
        )
        i_T1 = jnp.arange(start, stop)[:, None]
        j_1S = jnp.arange(first, last)[None, :]
        visible_TS = (j_1S <= i_T1) & (j_1S >= i_T1 - window)
        weights = jax.nn.softmax(jnp.where(visible_TS[None, None, None], scores, MASKED), axis=-1)
        outs.append(jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BSKH.dtype), v_BKSH[:, :, first:last]))
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
