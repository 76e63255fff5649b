"""The forward kernel for Hopper (compute capability 9.0): FlashAttention-3 (arXiv 2407.08608) through Mosaic GPU.

The two compute warpgroups take turns: while one multiplies, the other does its softmax. The weights stay in registers
and are the left operand of their product with V. Left out: the overlap of both inside a warpgroup.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import hopper_common as hopper
from kernels.flash_tiles import Carry, Setup, walk
from kernels.hopper_common import BLOCK, HEIGHT, Refs
from kernels.reference import MASKED

KEYS = 128
STAGES = 2
LOWEST = 1e-10 * MASKED
"""Where the running maximum starts: far below any score and far above MASKED, so that the weight of an invisible key
is exactly 0, in a tile of which a row sees nothing too."""


def _kernel(refs: Refs, shared: SimpleNamespace, setup: Setup) -> None:
    q_ref, k_ref, v_ref, out_ref, logsumexp_ref = refs
    length, heads, width = q_ref.shape[1:]
    batch, head, block, warpgroup = hopper.place()
    # Rows near the end see most keys: first, so that they are not what the device waits for at the end.
    start = (length // BLOCK - 1 - block) * BLOCK
    span, factor = hopper.keys_of(start, BLOCK, setup, KEYS), hopper.log2_scale(setup)

    def change_turn() -> None:
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.turn)

    def compute() -> None:
        top = start + warpgroup * HEIGHT
        mine = pl.ds(top, HEIGHT)
        q, logsumexp, ready = (x.at[warpgroup] for x in (shared.q, shared.logsumexp, shared.q_full))
        plgpu.copy_gmem_to_smem(q_ref.at[batch, mine, head], q, ready)
        plgpu.barrier_wait(ready)

        def step(tile: jax.Array, carry: Carry, masked: bool) -> Carry:
            out, highest, total = carry
            stage = jax.lax.rem(tile - span.begin, STAGES)
            plgpu.barrier_wait(shared.k_full.at[stage])

            def product(scores_ref: jax.Ref) -> jax.Array:
                plgpu.wgmma(scores_ref, q, shared.k.at[stage].transpose((1, 0)))
                change_turn()
                return scores_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC((HEIGHT, KEYS), jnp.float32))
            plgpu.barrier_arrive(shared.k_empty.at[stage])
            scores = hopper.visible(scores, setup, top - tile * KEYS, masked)
            new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
            shrink = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores * factor - hopper.over(new_highest, scores.shape))
            total = total * shrink + weights.sum(axis=1)
            done = out * hopper.over(shrink, out.shape), new_highest, total, weights.astype(v_ref.dtype)
            # The softmax is to be over before the other warpgroup's turn begins.
            out, highest, total, weights = jax.lax.optimization_barrier(done)
            plgpu.barrier_wait(shared.v_full.at[stage])
            change_turn()
            out = _add_product(out, weights, shared.v.at[stage], shared.spill)
            plgpu.barrier_arrive(shared.v_empty.at[stage])
            return out, highest, total

        nothing = jnp.zeros((HEIGHT, width), jnp.float32), jnp.full(HEIGHT, LOWEST), jnp.zeros(HEIGHT, jnp.float32)
        pl.when(warpgroup == 1)(change_turn)
        out, highest, total = walk(span, step, nothing)
        pl.when(warpgroup == 0)(change_turn)
        q[...] = (out * hopper.over(1 / total, out.shape)).astype(q.dtype)
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

        hopper.fill(
            span.end - span.begin,
            STAGES,
            (shared.k_empty, lambda i, stage: copy(k_ref, shared.k, shared.k_full, i, stage)),
            (shared.v_empty, lambda i, stage: copy(v_ref, shared.v, shared.v_full, i, stage)),
        )

    hopper.by_role(compute, load)


def _add_product(out: jax.Array, weights: jax.Array, v: jax.Ref, spill: jax.Ref | None) -> jax.Array:
    def product(out_ref: jax.Ref) -> None:
        hopper.multiply(out_ref, weights, v, spill)

    if spill is None:
        return pl.run_state(product)(plgpu.ACC.init(out))
    # The interpreter knows no accumulator that starts with a value.
    return out + pl.run_scoped(lambda out_ref: (product(out_ref), out_ref[...])[1], plgpu.ACC(out.shape))


@functools.partial(jax.jit, static_argnames="setup")  # layers alike are compiled once
def forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, setup: Setup) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's dtype, and the base-2 logsumexp of the scaled scores [B, N, T] in float32.

    T is a multiple of BLOCK, H is 64 or 128, all are of one 16-bit type.
    """
    batch, length, heads, width = q_BTNH.shape
    tiles = plgpu.SMEM((STAGES, KEYS, width), q_BTNH.dtype)
    full, empty = (plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES) for arrivals in (1, 2))
    shared = {
        "q": plgpu.SMEM((2, HEIGHT, width), q_BTNH.dtype),
        "logsumexp": plgpu.SMEM((2, HEIGHT), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=2),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    shared |= {"k": tiles, "k_full": full, "k_empty": empty, "v": tiles, "v_full": full, "v_empty": empty}
    outs = [q_BTNH, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)]
    return hopper.launch(_kernel, setup, "hopper_forward", outs, heads, shared)(q_BTNH, k_BSKH, v_BSKH)
