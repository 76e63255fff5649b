"""The backward kernels for Hopper: one for dQ, which walks key tiles, one for dK and dV, which walks row tiles.

Both visit the tiles that some query sees and no others, 64 x 64 at a time. Nothing is added up across blocks: dK and dV
of grouped queries are one block's sum over the heads of a group.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import hopper_common as hopper
from kernels.flash_tiles import Carry, Setup, Span, last_rows, visible_span, walk
from kernels.hopper_common import BLOCK, HEIGHT, Refs

STAGES = 2
Step = Callable[[jax.Array, jax.Array, bool], None]


def _products(
    a: jax.Ref, b: jax.Ref, c: jax.Ref, d: jax.Ref, weigh: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """weigh(a @ b.T), while the tensor cores make the second result, c @ d.T; [HEIGHT, HEIGHT] both."""

    def both(first: jax.Ref, second: jax.Ref) -> tuple[jax.Array, jax.Array]:
        plgpu.wgmma(first, a, b.transpose((1, 0)))
        plgpu.wgmma(second, c, d.transpose((1, 0)))
        return weigh(plgpu.wgmma_accumulator_load(first, wait_n=1)), second[...]

    return pl.run_scoped(both, *(plgpu.ACC((HEIGHT, HEIGHT), jnp.float32),) * 2)


def _consume(mine: Span, both: Span, past: jax.Array, shared: SimpleNamespace, step: Step) -> None:
    """`step(tile, stage, masked)` over a warpgroup's span; other tiles of the span of both warpgroups are let pass.

    `past` tiles went through the ring before.
    """

    def visit(tile: jax.Array, carry: Carry, masked: bool | None) -> Carry:
        stage = jax.lax.rem(past + tile - both.begin, STAGES)
        plgpu.barrier_wait(shared.full.at[stage])
        if masked is not None:
            step(tile, stage, masked)
        plgpu.barrier_arrive(shared.empty.at[stage])
        return carry

    def let_pass(tile: jax.Array, carry: Carry) -> Carry:
        return visit(tile, carry, None)

    jax.lax.fori_loop(both.begin, mine.begin, let_pass, ())
    walk(mine, visit, ())
    jax.lax.fori_loop(mine.end, both.end, let_pass, ())


def _dq_kernel(refs: Refs, shared: SimpleNamespace, setup: Setup) -> None:
    *row_refs, k_ref, v_ref, logsumexp_ref, delta_ref, dq_ref = refs
    length, heads, width = dq_ref.shape[1:]
    batch, head, block, warpgroup = hopper.place()
    start = (length // BLOCK - 1 - block) * BLOCK
    both = hopper.keys_of(start, BLOCK, setup, HEIGHT)

    def compute() -> None:
        top = start + warpgroup * HEIGHT
        mine, ready = pl.ds(top, HEIGHT), shared.ready.at[warpgroup]
        q, dout, logsumexp, delta = (x.at[warpgroup] for x in (shared.q, shared.dout, shared.logsumexp, shared.delta))
        for source, target in zip(row_refs, (q, dout), strict=True):
            plgpu.copy_gmem_to_smem(source.at[batch, mine, head], target, ready)
        for source, target in ((logsumexp_ref, logsumexp), (delta_ref, delta)):
            plgpu.copy_gmem_to_smem(source.at[batch, head, mine], target, ready)
        plgpu.barrier_wait(ready)
        logsumexp, delta = logsumexp[...], delta[...]

        def walked(dq_ref: jax.Ref) -> jax.Array:
            def step(tile: jax.Array, stage: jax.Array, masked: bool) -> None:
                def weigh(scores: jax.Array) -> jax.Array:
                    scores = hopper.visible(scores, setup, top - tile * HEIGHT, masked)
                    return jnp.exp2(scores * hopper.log2_scale(setup) - hopper.over(logsumexp, scores.shape))

                k = shared.k.at[stage]
                weights, dweights = _products(q, k, dout, shared.v.at[stage], weigh)
                dscores = weights * (dweights - hopper.over(delta, weights.shape))
                hopper.multiply(dq_ref, dscores.astype(k.dtype), k, shared.spill)
                plgpu.wgmma_wait(0)

            _consume(hopper.keys_of(top, HEIGHT, setup, HEIGHT), both, 0, shared, step)
            return dq_ref[...]

        dq = pl.run_scoped(walked, plgpu.ACC((HEIGHT, width), jnp.float32))
        q[...] = (dq * setup.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        kv_head = head // (heads // k_ref.shape[2])

        def copy(i: jax.Array, stage: jax.Array) -> None:
            here = pl.ds((both.begin + i) * HEIGHT, HEIGHT)
            for source, target in ((k_ref, shared.k), (v_ref, shared.v)):
                plgpu.copy_gmem_to_smem(source.at[batch, here, kv_head], target.at[stage], shared.full.at[stage])

        hopper.fill(both.end - both.begin, STAGES, (shared.empty, copy))

    hopper.by_role(compute, load)


def _dkv_kernel(refs: Refs, shared: SimpleNamespace, setup: Setup) -> None:
    """Scores stand transposed, [keys, rows], so that the weights are the left operands of both products over rows."""
    q_ref, dout_ref, k_ref, v_ref, logsumexp_ref, delta_ref, dk_ref, dv_ref = refs
    length, heads, width = q_ref.shape[1:]
    group = heads // k_ref.shape[2]
    batch, kv_head, block, warpgroup = hopper.place()

    def rows_of(low: jax.Array, count: int) -> Span:
        high = low + count - 1
        last = last_rows(low, setup.window, length), last_rows(high, setup.window, length)
        return visible_span((low, high), last, HEIGHT)

    both = rows_of(block * BLOCK, BLOCK)
    tiles = both.end - both.begin

    def compute() -> None:
        low = block * BLOCK + warpgroup * HEIGHT
        mine, ready = pl.ds(low, HEIGHT), shared.ready.at[warpgroup]
        k, v = shared.k.at[warpgroup], shared.v.at[warpgroup]
        for source, target in ((k_ref, k), (v_ref, v)):
            plgpu.copy_gmem_to_smem(source.at[batch, mine, kv_head], target, ready)
        plgpu.barrier_wait(ready)

        def walked(dk_ref: jax.Ref, dv_ref: jax.Ref) -> tuple[jax.Array, jax.Array]:
            def step(tile: jax.Array, stage: jax.Array, masked: bool) -> None:
                def weigh(scores: jax.Array) -> jax.Array:
                    scores = hopper.visible(scores, setup, tile * HEIGHT - low, masked, rows_axis=1)
                    return jnp.exp2(
                        scores * hopper.log2_scale(setup) - hopper.over(shared.logsumexp[stage], scores.shape, axis=1)
                    )

                q, dout = shared.q.at[stage], shared.dout.at[stage]
                weights, dweights = _products(k, q, v, dout, weigh)
                hopper.multiply(dv_ref, weights.astype(q.dtype), dout, shared.spill)
                dscores = weights * (dweights - hopper.over(shared.delta[stage], weights.shape, axis=1))
                hopper.multiply(dk_ref, dscores.astype(q.dtype), q, shared.spill)
                plgpu.wgmma_wait(0)
                # Threads have read the statistics that TMA is to overwrite: what they do and what it does has an order.
                plgpu.commit_smem()

            @pl.loop(0, group)
            def _(g: jax.Array) -> None:
                _consume(rows_of(low, HEIGHT), both, g * tiles, shared, step)

            return dk_ref[...], dv_ref[...]

        dk, dv = pl.run_scoped(walked, *(plgpu.ACC((HEIGHT, width), jnp.float32),) * 2)
        k[...] = (dk * setup.scale).astype(k.dtype)
        v[...] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[batch, mine, kv_head])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[batch, mine, kv_head])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        def copy(i: jax.Array, stage: jax.Array) -> None:
            head = kv_head * group + jax.lax.div(i, tiles)
            here = pl.ds((both.begin + jax.lax.rem(i, tiles)) * HEIGHT, HEIGHT)
            for source, target in ((q_ref, shared.q), (dout_ref, shared.dout)):
                plgpu.copy_gmem_to_smem(source.at[batch, here, head], target.at[stage], shared.full.at[stage])
            for source, target in ((logsumexp_ref, shared.logsumexp), (delta_ref, shared.delta)):
                plgpu.copy_gmem_to_smem(source.at[batch, head, here], target.at[stage], shared.full.at[stage])

        hopper.fill(group * tiles, STAGES, (shared.empty, copy))

    hopper.by_role(compute, load)


def _shared(
    like: jax.Array, kept: tuple[str, str], walked: tuple[str, str], stats: int, copies: tuple[int, int]
) -> dict[str, Any]:
    """Two tiles kept of each name, STAGES walked, `stats` of row statistics; `copies`: to fill a kept tile, a stage."""
    tiles = dict.fromkeys(kept, 2) | dict.fromkeys(walked, STAGES)
    return {name: plgpu.SMEM((count, HEIGHT, like.shape[3]), like.dtype) for name, count in tiles.items()} | {
        "logsumexp": plgpu.SMEM((stats, HEIGHT), jnp.float32),
        "delta": plgpu.SMEM((stats, HEIGHT), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=copies[0], num_barriers=2),
        "full": plgpu.Barrier(num_arrivals=copies[1], num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    }


@functools.partial(jax.jit, static_argnames="setup")  # layers alike are compiled once
def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    logsumexp_BNT: jax.Array,
    dout_BTNH: jax.Array,
    setup: Setup,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v in their dtypes, from what `forward` returned and the gradient of its output."""
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH.astype(jnp.float32), dout_BTNH.astype(jnp.float32), precision="highest"
    )
    operands = q_BTNH, dout_BTNH, k_BSKH, v_BSKH, logsumexp_BNT, delta_BNT
    rows, keys = ("q", "dout"), ("k", "v")
    shared = _shared(q_BTNH, rows, keys, stats=2, copies=(4, 2))
    (dq,) = hopper.launch(_dq_kernel, setup, "hopper_dq", [q_BTNH], q_BTNH.shape[2], shared)(*operands)
    shared = _shared(q_BTNH, keys, rows, stats=STAGES, copies=(2, 4))
    dk, dv = hopper.launch(_dkv_kernel, setup, "hopper_dkv", [k_BSKH, v_BSKH], k_BSKH.shape[2], shared)(*operands)
    return dq, dk, dv
