"""The forward kernel for Hopper (compute capability 9.0): FlashAttention-3 (arXiv 2407.08608) through Mosaic GPU.

The two compute warpgroups take turns: while one multiplies, the other does its softmax. The weights stay in registers
and are the left operand of their product with V.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.flash_tiles import Carry, Setup, first_keys, key_span, walk
from kernels.hopper_common import BLOCK, HEIGHT, by_role, fill, launch, log2_scale, multiply, over, place, visible
from kernels.reference import MASKED

KEYS = 128
STAGES = 2
LOWEST = 1e-10 * MASKED
"""Where the running maximum starts: far below any score and far above MASKED, so that the weight of an invisible key
is exactly 0, in a tile of which a row sees nothing too."""


def _kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    out_ref: jax.Ref,
    logsumexp_ref: jax.Ref,
    *,
    q_smem: jax.Ref,
    k_smem: jax.Ref,
    v_smem: jax.Ref,
    logsumexp_smem: jax.Ref,
    q_full: jax.Ref,
    k_full: jax.Ref,
    v_full: jax.Ref,
    k_empty: jax.Ref,
    v_empty: jax.Ref,
    turn: jax.Ref,
    setup: Setup,
    spill: jax.Ref | None = None,
) -> None:
    length, heads, width = q_ref.shape[1:]
    batch, head, tile, warpgroup = place()
    # Rows near the end see most keys: first, so that they are not what the device waits for at the end.
    top = (length // BLOCK - 1 - tile) * BLOCK
    bottom = top + BLOCK - 1
    span = key_span((top, bottom), (first_keys(top, setup.window), first_keys(bottom, setup.window)), KEYS)

    def change_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    factor = log2_scale(setup)

    def compute() -> None:
        mine = pl.ds(top + warpgroup * HEIGHT, HEIGHT)
        q, logsumexp, full = q_smem.at[warpgroup], logsumexp_smem.at[warpgroup], q_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, mine, head], q, full)
        plgpu.barrier_wait(full)

        def step(tile: jax.Array, carry: Carry, masked: bool) -> Carry:
            out, highest, total = carry
            stage = jax.lax.rem(tile - span.begin, STAGES)
            plgpu.barrier_wait(k_full.at[stage])

            def product(scores_ref: jax.Ref) -> jax.Array:
                plgpu.wgmma(scores_ref, q, k_smem.at[stage].transpose((1, 0)))
                change_turn()
                return scores_ref[...]

            raw = pl.run_scoped(product, plgpu.ACC((HEIGHT, KEYS), jnp.float32))
            plgpu.barrier_arrive(k_empty.at[stage])
            lead = top + warpgroup * HEIGHT - tile * KEYS
            scores = visible(raw, setup, lead, masked)
            new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
            shrink = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores * factor - over(new_highest, scores.shape))
            total = total * shrink + weights.sum(axis=1)
            out = out * over(shrink, out.shape)
            out, total, new_highest, low = jax.lax.optimization_barrier(
                (out, total, new_highest, weights.astype(v_ref.dtype))
            )
            plgpu.barrier_wait(v_full.at[stage])
            change_turn()
            out = _add_product(out, low, v_smem.at[stage], spill)
            plgpu.barrier_arrive(v_empty.at[stage])
            return out, new_highest, total

        nothing = (
            jnp.zeros((HEIGHT, width), jnp.float32),
            jnp.full((HEIGHT,), LOWEST),
            jnp.zeros((HEIGHT,), jnp.float32),
        )
        pl.when(warpgroup == 1)(change_turn)
        out, highest, total = walk(span, step, nothing)
        pl.when(warpgroup == 0)(change_turn)
        q[...] = (out * over(1 / total, out.shape)).astype(q.dtype)
        logsumexp[...] = highest + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(logsumexp, logsumexp_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        kv_head = head // (heads // k_ref.shape[2])

        def copy(source: jax.Ref, target: jax.Ref, full: jax.Ref, i: jax.Array, stage: jax.Array) -> None:
            here = pl.ds((span.begin + i) * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(source.at[batch, here, kv_head], target.at[stage], full.at[stage])

        fill(
            span.end - span.begin,
            STAGES,
            (k_empty, lambda i, stage: copy(k_ref, k_smem, k_full, i, stage)),
            (v_empty, lambda i, stage: copy(v_ref, v_smem, v_full, i, stage)),
        )

    by_role(compute, load)


def _add_product(out: jax.Array, weights: jax.Array, v: jax.Ref, spill: jax.Ref | None) -> jax.Array:
    def product(out_ref: jax.Ref) -> None:
        multiply(out_ref, weights, v, spill)

    if spill is None:
        return pl.run_state(product)(plgpu.ACC.init(out))
    # The interpreter knows no accumulator that starts with a value.
    return out + pl.run_scoped(lambda out_ref: (product(out_ref), out_ref[...])[1], plgpu.ACC(out.shape))


def forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, setup: Setup) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's dtype, and the base-2 logsumexp of the scaled scores [B, N, T] in float32.

    T is a multiple of BLOCK, H is 64 or 128, all are of one 16-bit type.
    """
    batch, length, heads, width = q_BTNH.shape
    tiles = plgpu.SMEM((STAGES, KEYS, width), q_BTNH.dtype)
    full = plgpu.Barrier(num_barriers=STAGES)
    empty = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    return launch(
        _kernel,
        setup,
        name="hopper_forward",
        outs=[q_BTNH, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        scratch={
            "q_smem": plgpu.SMEM((2, HEIGHT, width), q_BTNH.dtype),
            "k_smem": tiles,
            "v_smem": tiles,
            "logsumexp_smem": plgpu.SMEM((2, HEIGHT), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=2),
            "k_full": full,
            "v_full": full,
            "k_empty": empty,
            "v_empty": empty,
            "turn": plgpu.Barrier(num_arrivals=2),
        },
        grid=(batch, heads, length // BLOCK),
    )(q_BTNH, k_BSKH, v_BSKH)
