"""The backward kernels: one for dQ, which walks key tiles, one for dK and dV, which walks row tiles.

Both compute the weights again from the logsumexp of the forward pass (FlashAttention-2, arXiv 2307.08691, algorithm 2).
Nothing is added up across programs: dK and dV of grouped queries are one program's sum over the heads of a group.
An invisible score is MASKED, so its weight exp2(MASKED - logsumexp) and its gradient are exactly 0.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_forward import LOG2_E, compiler_params, dot, scores_of
from kernels.flash_tiles import Carry, Setup, first_keys, last_rows, visible_tiles, walk
from kernels.reference import MASKED


def _dq_kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    dout_ref: jax.Ref,
    logsumexp_ref: jax.Ref,
    delta_ref: jax.Ref,
    first_ref: jax.Ref | None,
    dq_ref: jax.Ref,
    *,
    setup: Setup,
) -> None:
    (height, width), keys = q_ref.shape, setup.tiles.walked
    rows = pl.program_id(0) * height + jnp.arange(height)
    first = first_keys(rows, setup.window) if first_ref is None else first_ref[...]
    q, dout, logsumexp, delta = q_ref[...], dout_ref[...], logsumexp_ref[...], delta_ref[...]

    def step(tile: jax.Array, carry: Carry, masked: bool) -> Carry:
        here = pl.ds(tile * keys, keys)
        k = k_ref[here, :]
        scores = scores_of(q, k, setup.scale, rows, first, tile * keys, masked)
        weights = jnp.exp2(scores - logsumexp[:, None])
        dscores = weights * (dot(dout, v_ref[here, :].T) - delta[:, None])
        return (carry[0] + dot(dscores.astype(k.dtype), k),)

    (dq,) = walk(visible_tiles(first, rows, keys), step, (jnp.zeros((height, width), jnp.float32),))
    dq_ref[...] = (dq * setup.scale).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    dout_ref: jax.Ref,
    logsumexp_ref: jax.Ref,
    delta_ref: jax.Ref,
    last_ref: jax.Ref | None,
    dk_ref: jax.Ref,
    dv_ref: jax.Ref,
    *,
    setup: Setup,
) -> None:
    """Scores stand transposed, [keys, rows], so that the two products over rows need no transposition."""
    count, width = k_ref.shape
    (length, group, _), height = q_ref.shape, setup.tiles.walked
    keys = pl.program_id(0) * count + jnp.arange(count)
    last = last_rows(keys, setup.window, length) if last_ref is None else last_ref[...]
    span = visible_tiles(keys, last, height)
    k, v = k_ref[...], v_ref[...]

    def head(g: jax.Array, sums: Carry) -> Carry:
        def step(tile: jax.Array, carry: Carry, masked: bool) -> Carry:
            dk, dv = carry
            here = pl.ds(tile * height, height)
            q, dout = q_ref[here, g, :], dout_ref[here, g, :]
            scores = dot(k, q.T) * (setup.scale * LOG2_E)
            if masked:
                rows = tile * height + jnp.arange(height)[None, :]
                scores = jnp.where((rows >= keys[:, None]) & (rows <= last[:, None]), scores, MASKED)
            weights = jnp.exp2(scores - logsumexp_ref[g, here][None, :])
            dv = dv + dot(weights.astype(dout.dtype), dout)
            dscores = weights * (dot(v, dout.T) - delta_ref[g, here][None, :])
            return dk + dot(dscores.astype(q.dtype), q), dv

        return walk(span, step, sums)

    nothing = jnp.zeros((count, width), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, head, (nothing, nothing))
    dk_ref[...] = (dk * setup.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


@functools.partial(jax.jit, static_argnames="setup")  # layers alike are compiled once
def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    first_BT: jax.Array | None,
    last_BS: jax.Array | None,
    out_BTNH: jax.Array,
    logsumexp_BNT: jax.Array,
    dout_BTNH: jax.Array,
    setup: Setup,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v in their dtypes, from what `forward` returned and the gradient of its output."""
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group, kept = heads // kv_heads, setup.tiles.kept
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH.astype(jnp.float32), dout_BTNH.astype(jnp.float32), precision="highest"
    )
    operands = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, logsumexp_BNT, delta_BNT)
    common = {"compiler_params": compiler_params(width), "interpret": setup.interpret}

    rows = pl.BlockSpec((None, kept, None, width), lambda i, n, b: (b, i, n, 0))
    rows_stats = pl.BlockSpec((None, None, kept), lambda i, n, b: (b, n, i))
    all_keys = pl.BlockSpec((None, length, None, width), lambda i, n, b: (b, 0, n // group, 0))
    ends = None if first_BT is None else pl.BlockSpec((None, kept), lambda i, n, b: (b, i))
    dq_BTNH = pl.pallas_call(
        functools.partial(_dq_kernel, setup=setup),
        grid=(length // kept, heads, batch),
        in_specs=[rows, all_keys, all_keys, rows, rows_stats, rows_stats, ends],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        name="flash_dq",
        **common,
    )(*operands, first_BT)

    keys = pl.BlockSpec((None, kept, None, width), lambda j, n, b: (b, j, n, 0))
    all_rows = pl.BlockSpec((None, length, group, width), lambda j, n, b: (b, 0, n, 0))
    all_stats = pl.BlockSpec((None, group, length), lambda j, n, b: (b, n, 0))
    dk_BSKH, dv_BSKH = pl.pallas_call(
        functools.partial(_dkv_kernel, setup=setup),
        grid=(length // kept, kv_heads, batch),
        in_specs=[all_rows, keys, keys, all_rows, all_stats, all_stats, ends],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKH)],
        name="flash_dkv",
        **common,
    )(*operands, last_BS)
    return dq_BTNH, dk_BSKH, dv_BSKH
