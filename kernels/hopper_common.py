"""What the Hopper kernels have in common: the launch, the roles in a block, the mask and the ring of tiles.

A block has two warpgroups that compute, a tile of 64 rows (or keys) each, and a third one that fills shared memory
through TMA. A ring has a few stages: the loader waits until both warpgroups have emptied one, they until it is full.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.flash_tiles import Setup, Span, first_keys, visible_span
from kernels.reference import MASKED

HEIGHT = 64
"""Rows (or keys) of a compute warpgroup: what one wgmma multiplies."""
BLOCK = 2 * HEIGHT
"""Rows (or keys) of a block; lengths are padded to a multiple."""
Refs = tuple[jax.Ref, ...]
Body = Callable[[Refs, SimpleNamespace, Setup], None]


def launch(
    body: Body, setup: Setup, name: str, outs: list[Any], heads: int, shared: dict[str, Any]
) -> Callable[..., Any]:
    """`body(arrays, shared, setup)` for each batch row, head and BLOCK positions, `outs` being like its results.

    `shared`: memory and barriers of a block. Positions run fastest, so that neighbours find K and V in the L2 cache.
    """
    if setup.interpret:
        shared = shared | {"spill": plgpu.SMEM((2, HEIGHT, BLOCK), outs[0].dtype)}

    def program(*refs: jax.Ref, spill: jax.Ref | None = None, **shared: jax.Ref) -> None:
        body(refs, SimpleNamespace(spill=spill, **shared), setup)

    return plgpu.kernel(
        program,
        out_type=[jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs],
        scratch_types=shared,
        grid=(outs[0].shape[0], heads, outs[0].shape[1] // BLOCK),
        grid_names=("batch", "head", "block"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=setup.interpret,
    )


def place() -> tuple[jax.Array, ...]:
    """Batch row, head, block and warpgroup of this program."""
    return tuple(jax.lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))


def by_role(compute: Callable[[], None], load: Callable[[], None]) -> None:
    """Both roles of a block, with the registers each needs: 240 and 24 of the 504 that three threads share."""
    loads = jax.lax.axis_index("warpgroup") == 2

    @pl.when(jnp.logical_not(loads))
    def _compute() -> None:
        plgpu.set_max_registers(240, action="increase")
        compute()

    @pl.when(loads)
    def _load() -> None:
        plgpu.set_max_registers(24, action="decrease")
        load()


def fill(count: jax.Array, stages: int, *rings: tuple[jax.Ref, Callable[[jax.Array, jax.Array], None]]) -> None:
    """The loader's work: `load(i, stage)` for i < count, in every ring of (barriers of empty stages, load)."""

    @pl.loop(0, count)
    def _(i: jax.Array) -> None:
        stage = jax.lax.rem(i, stages)
        for empty, load in rings:

            @pl.when(i >= stages)
            def _wait(empty: jax.Ref = empty) -> None:
                plgpu.barrier_wait(empty.at[stage])

            load(i, stage)


def keys_of(top: jax.Array, height: int, setup: Setup, tile: int) -> Span:
    """Tiles of `tile` keys that the `height` rows from `top` on see."""
    bottom = top + height - 1
    return visible_span((first_keys(top, setup.window), first_keys(bottom, setup.window)), (top, bottom), tile)


def visible(scores: jax.Array, setup: Setup, lead: jax.Array, masked: bool, rows_axis: int = 0) -> jax.Array:
    """The scores, invisible ones MASKED where the tile needs a mask; `lead`: its first row less its first key."""
    if not masked:
        return scores
    rows, keys = (plgpu.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (rows_axis, 1 - rows_axis))
    back = lead + rows - keys
    return jnp.where((back >= 0) & (back <= setup.window), scores, MASKED)


def log2_scale(setup: Setup) -> float:
    """Factor from a product of q and k to units of log 2, positive; in exp2(scores * factor - x) it costs nothing."""
    return setup.scale * math.log2(math.e)


def multiply(sums: jax.Ref, left: jax.Array, right: jax.Ref, spill: jax.Ref | None) -> None:
    """sums += left @ right, with `left` in registers; the interpreter knows left operands in shared memory only."""
    if spill is not None:
        spilled = spill.at[jax.lax.axis_index("warpgroup"), :, pl.ds(0, left.shape[1])]
        spilled[...] = left
        left = spilled
    plgpu.wgmma(sums, left, right)


def over(vector: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A vector repeated over a tile, its entries along `axis`."""
    return jax.lax.broadcast_in_dim(vector, shape, (axis,))
