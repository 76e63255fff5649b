"""The backward kernels for Hopper: one for dQ, which walks key tiles, one for dK and dV, which walks row tiles.

Both visit the tiles that some query sees and no others, 64 x 64 at a time. Nothing is added up across blocks: dK and dV
of grouped queries are one block's sum over the heads of a group.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.flash_tiles import Carry, Setup, Span, first_keys, key_span, last_rows, row_span, walk
from kernels.hopper_common import BLOCK, HEIGHT, by_role, fill, launch, log2_scale, multiply, over, place, visible

STAGES = 3


def _products(
    a: jax.Ref, b: jax.Ref, c: jax.Ref, d: jax.Ref, weigh: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """weigh(a @ b.T), while the tensor cores make the second result, c @ d.T; [HEIGHT, HEIGHT] both."""

    def both(first: jax.Ref, second: jax.Ref) -> tuple[jax.Array, jax.Array]:
        plgpu.wgmma(first, a, b.transpose((1, 0)))
        plgpu.wgmma(second, c, d.transpose((1, 0)))
        return weigh(plgpu.wgmma_accumulator_load(first, wait_n=1)), second[...]

    return pl.run_scoped(both, *(plgpu.ACC((HEIGHT, HEIGHT), jnp.float32),) * 2)


def _consume(
    span: Span,
    shared: Span,
    base: jax.Array,
    full: jax.Ref,
    empty: jax.Ref,
    step: Callable[[jax.Array, jax.Array, bool], None],
) -> None:
    """`step(tile, stage, masked)` over a span, the other tiles of the block's shared span let pass.

    `base` tiles went through the ring before.
    """

    def visit(tile: jax.Array, carry: Carry, masked: bool | None) -> Carry:
        stage = jax.lax.rem(base + tile - shared.begin, STAGES)
        plgpu.barrier_wait(full.at[stage])
        if masked is not None:
            step(tile, stage, masked)
        plgpu.barrier_arrive(empty.at[stage])
        return carry

    def let_pass(tile: jax.Array, carry: Carry) -> Carry:
        return visit(tile, carry, None)

    jax.lax.fori_loop(shared.begin, span.begin, let_pass, ())
    walk(span, visit, ())
    jax.lax.fori_loop(span.end, shared.end, let_pass, ())


def _dq_kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    dout_ref: jax.Ref,
    logsumexp_ref: jax.Ref,
    delta_ref: jax.Ref,
    dq_ref: jax.Ref,
    *,
    q_smem: jax.Ref,
    dout_smem: jax.Ref,
    logsumexp_smem: jax.Ref,
    delta_smem: jax.Ref,
    k_smem: jax.Ref,
    v_smem: jax.Ref,
    ready: jax.Ref,
    full: jax.Ref,
    empty: jax.Ref,
    setup: Setup,
    spill: jax.Ref | None = None,
) -> None:
    length, heads, width = q_ref.shape[1:]
    batch, head, tile, warpgroup = place()
    start = (length // BLOCK - 1 - tile) * BLOCK

    def span_of(top: jax.Array, height: int) -> Span:
        bottom = top + height - 1
        return key_span((top, bottom), (first_keys(top, setup.window), first_keys(bottom, setup.window)), HEIGHT)

    shared = span_of(start, BLOCK)

    def compute() -> None:
        top = start + warpgroup * HEIGHT
        mine, here = pl.ds(top, HEIGHT), ready.at[warpgroup]
        q, dout = q_smem.at[warpgroup], dout_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, mine, head], q, here)
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, mine, head], dout, here)
        plgpu.copy_gmem_to_smem(logsumexp_ref.at[batch, head, mine], logsumexp_smem.at[warpgroup], here)
        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, mine], delta_smem.at[warpgroup], here)
        plgpu.barrier_wait(here)
        logsumexp, delta = logsumexp_smem[warpgroup], delta_smem[warpgroup]

        def walked(dq_ref: jax.Ref) -> jax.Array:
            def step(tile: jax.Array, stage: jax.Array, masked: bool) -> None:
                k = k_smem.at[stage]

                def weigh(raw: jax.Array) -> jax.Array:
                    scores = visible(raw, setup, top - tile * HEIGHT, masked)
                    return jnp.exp2(scores * log2_scale(setup) - over(logsumexp, raw.shape))

                weights, dweights = _products(q, k, dout, v_smem.at[stage], weigh)
                dscores = weights * (dweights - over(delta, weights.shape))
                multiply(dq_ref, dscores.astype(k.dtype), k, spill)
                plgpu.wgmma_wait(0)

            _consume(span_of(top, HEIGHT), shared, 0, full, empty, step)
            return dq_ref[...]

        dq = pl.run_scoped(walked, plgpu.ACC((HEIGHT, width), jnp.float32))
        q[...] = (dq * setup.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        kv_head = head // (heads // k_ref.shape[2])

        def copy(i: jax.Array, stage: jax.Array) -> None:
            here = pl.ds((shared.begin + i) * HEIGHT, HEIGHT)
            for source, target in ((k_ref, k_smem), (v_ref, v_smem)):
                plgpu.copy_gmem_to_smem(source.at[batch, here, kv_head], target.at[stage], full.at[stage])

        fill(shared.end - shared.begin, STAGES, (empty, copy))

    by_role(compute, load)


def _dkv_kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    dout_ref: jax.Ref,
    logsumexp_ref: jax.Ref,
    delta_ref: jax.Ref,
    dk_ref: jax.Ref,
    dv_ref: jax.Ref,
    *,
    k_smem: jax.Ref,
    v_smem: jax.Ref,
    q_smem: jax.Ref,
    dout_smem: jax.Ref,
    logsumexp_smem: jax.Ref,
    delta_smem: jax.Ref,
    ready: jax.Ref,
    full: jax.Ref,
    empty: jax.Ref,
    setup: Setup,
    spill: jax.Ref | None = None,
) -> None:
    """Scores stand transposed, [keys, rows], so that the weights are the left operands of both products over rows."""
    length, heads, width = q_ref.shape[1:]
    group = heads // k_ref.shape[2]
    batch, kv_head, tile, warpgroup = place()
    start = tile * BLOCK

    def span_of(low: jax.Array, count: int) -> Span:
        high = low + count - 1
        last = last_rows(low, setup.window, length), last_rows(high, setup.window, length)
        return row_span((low, high), last, HEIGHT)

    shared = span_of(start, BLOCK)
    tiles = shared.end - shared.begin

    def compute() -> None:
        low = start + warpgroup * HEIGHT
        mine, here = pl.ds(low, HEIGHT), ready.at[warpgroup]
        k, v = k_smem.at[warpgroup], v_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[batch, mine, kv_head], k, here)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, mine, kv_head], v, here)
        plgpu.barrier_wait(here)

        def walked(dk_ref: jax.Ref, dv_ref: jax.Ref) -> tuple[jax.Array, jax.Array]:
            def step(tile: jax.Array, stage: jax.Array, masked: bool) -> None:
                q, dout = q_smem.at[stage], dout_smem.at[stage]

                def weigh(raw: jax.Array) -> jax.Array:
                    scores = visible(raw, setup, tile * HEIGHT - low, masked, rows_axis=1)
                    return jnp.exp2(scores * log2_scale(setup) - over(logsumexp_smem[stage], raw.shape, axis=1))

                weights, dweights = _products(k, q, v, dout, weigh)
                multiply(dv_ref, weights.astype(q.dtype), dout, spill)
                dscores = weights * (dweights - over(delta_smem[stage], weights.shape, axis=1))
                multiply(dk_ref, dscores.astype(q.dtype), q, spill)
                plgpu.wgmma_wait(0)
                # The statistics were read by threads, and TMA is to overwrite them after they were.
                plgpu.commit_smem()

            @pl.loop(0, group)
            def _(g: jax.Array) -> None:
                _consume(span_of(low, HEIGHT), shared, g * tiles, full, empty, step)

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
            here = pl.ds((shared.begin + jax.lax.rem(i, tiles)) * HEIGHT, HEIGHT)
            for source, target in ((q_ref, q_smem), (dout_ref, dout_smem)):
                plgpu.copy_gmem_to_smem(source.at[batch, here, head], target.at[stage], full.at[stage])
            for source, target in ((logsumexp_ref, logsumexp_smem), (delta_ref, delta_smem)):
                plgpu.copy_gmem_to_smem(source.at[batch, head, here], target.at[stage], full.at[stage])

        fill(group * tiles, STAGES, (empty, copy))

    by_role(compute, load)


def _scratch(
    like: jax.Array, kept: tuple[str, ...], walked: tuple[str, ...], *, stats: int, ready: int, full: int
) -> dict[str, Any]:
    """Shared memory of a kernel: tiles kept and walked, `stats` tiles of row statistics, arrivals at barriers."""
    tiles = dict.fromkeys(kept, 2) | dict.fromkeys(walked, STAGES)
    smem = {name: plgpu.SMEM((count, HEIGHT, like.shape[3]), like.dtype) for name, count in tiles.items()}
    smem |= {name: plgpu.SMEM((stats, HEIGHT), jnp.float32) for name in ("logsumexp", "delta")}
    return {f"{name}_smem": memory for name, memory in smem.items()} | {
        "ready": plgpu.Barrier(num_arrivals=ready, num_barriers=2),
        "full": plgpu.Barrier(num_arrivals=full, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    }


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
    batch, length, heads, _ = q_BTNH.shape
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH.astype(jnp.float32), dout_BTNH.astype(jnp.float32), precision="highest"
    )
    operands = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, logsumexp_BNT, delta_BNT)

    (dq_BTNH,) = launch(
        _dq_kernel,
        setup,
        name="hopper_dq",
        outs=[q_BTNH],
        scratch=_scratch(q_BTNH, ("q", "dout"), ("k", "v"), stats=2, ready=4, full=2),
        grid=(batch, heads, length // BLOCK),
    )(*operands)
    dk_BSKH, dv_BSKH = launch(
        _dkv_kernel,
        setup,
        name="hopper_dkv",
        outs=[k_BSKH, v_BSKH],
        scratch=_scratch(q_BTNH, ("k", "v"), ("q", "dout"), stats=STAGES, ready=2, full=4),
        grid=(batch, k_BSKH.shape[2], length // BLOCK),
    )(*operands)
    return dq_BTNH, dk_BSKH, dv_BSKH
