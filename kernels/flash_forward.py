"""The forward kernel: softmax over the visible tiles of keys, one pass, the running maximum and sum in float32.

FlashAttention-2 (arXiv 2307.08691). One program computes one tile of rows of one head. Scores are kept in units of
log 2, so that exp2 needs no product of its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels.flash_tiles import Carry, Setup, first_keys, visible_tiles, walk
from kernels.reference import MASKED

LOG2_E = math.log2(math.e)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, accumulated in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def compiler_params(width: int) -> triton.CompilerParams:
    """Named, because without parameters a Pallas call means Triton in some JAX versions and Mosaic in others."""
    return triton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2)


def scores_of(
    q: jax.Array, k: jax.Array, scale: float, rows: jax.Array, first: jax.Array, start: jax.Array, masked: bool
) -> jax.Array:
    """Scaled scores [rows, keys] in units of log 2 of the keys from `start` on; invisible ones are MASKED.

    MASKED is finite, so that a row that sees nothing of its first tile gives no NaN: what it adds up there is
    multiplied with exp2(MASKED - maximum), exactly 0, once it sees its first key.
    """
    scores = dot(q, k.T) * (scale * LOG2_E)
    if not masked:
        return scores
    keys = start + jnp.arange(k.shape[0])[None, :]
    return jnp.where((keys <= rows[:, None]) & (keys >= first[:, None]), scores, MASKED)


def _kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    first_ref: jax.Ref | None,
    out_ref: jax.Ref,
    logsumexp_ref: jax.Ref,
    *,
    setup: Setup,
) -> None:
    (height, width), keys = q_ref.shape, setup.tiles.keys
    rows = pl.program_id(0) * height + jnp.arange(height)
    first = first_keys(rows, setup.window) if first_ref is None else first_ref[...]
    q = q_ref[...]

    def step(tile: jax.Array, carry: Carry, masked: bool) -> Carry:
        out, highest, total = carry
        here = pl.ds(tile * keys, keys)
        scores = scores_of(q, k_ref[here, :], setup.scale, rows, first, tile * keys, masked)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores - new_highest[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        v = v_ref[here, :]
        return out * shrink[:, None] + dot(weights.astype(v.dtype), v), new_highest, total

    nothing = jnp.zeros((height, width), jnp.float32), jnp.full(height, MASKED), jnp.zeros(height, jnp.float32)
    out, highest, total = walk(visible_tiles(first, rows, keys), step, nothing)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    logsumexp_ref[...] = highest + jnp.log2(total)


@functools.partial(jax.jit, static_argnames="setup")  # layers alike are compiled once
def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    first_BT: jax.Array | None,
    setup: Setup,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's dtype, and the base-2 logsumexp of the scaled scores [B, N, T] in float32.

    What each row sees is given by the window of `setup` or by its first key.
    """
    batch, length, heads, width = q_BTNH.shape
    group = heads // k_BSKH.shape[2]
    rows = pl.BlockSpec((None, setup.tiles.rows, None, width), lambda i, n, b: (b, i, n, 0))
    all_keys = pl.BlockSpec((None, length, None, width), lambda i, n, b: (b, 0, n // group, 0))
    firsts = None if first_BT is None else pl.BlockSpec((None, setup.tiles.rows), lambda i, n, b: (b, i))
    return pl.pallas_call(
        functools.partial(_kernel, setup=setup),
        grid=(length // setup.tiles.rows, heads, batch),
        in_specs=[rows, all_keys, all_keys, firsts],
        out_specs=[rows, pl.BlockSpec((None, None, setup.tiles.rows), lambda i, n, b: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=compiler_params(width),
        interpret=setup.interpret,
        name="flash_forward",
    )(q_BTNH, k_BSKH, v_BSKH, first_BT)
