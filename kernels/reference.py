"""Causal sliding-window attention in plain JAX: the specification every other implementation is tested against."""

import jax
import jax.numpy as jnp

MASKED = -1e30


def reference_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int, doc_start: jax.Array | None = None
) -> jax.Array:
    """Masked softmax attention. Query i sees keys j with i - window <= j <= i; N is a multiple of K (GQA).

    Scores and softmax in float32, scaled by H^-0.5; the result [B, T, N, H] has q's dtype. T equals S. With `doc_start`
    [B, T] int32, the first position of the document that row i belongs to, keys before it are invisible as well.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * width**-0.5
    i_T1 = jnp.arange(length)[:, None]
    j_1S = jnp.arange(length)[None, :]
    visible_TS = (j_1S <= i_T1) & (j_1S >= i_T1 - window)
    visible_BTS = visible_TS[None]
    if doc_start is not None:
        visible_BTS = visible_BTS & (j_1S[None] >= doc_start[:, :, None])
    weights_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED), axis=-1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)
