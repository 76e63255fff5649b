"""One query a row over its KV cache, in Pallas (Triton): rotary positions and norm of query and key, the new key and
value put into the cache, and the softmax over what is visible, in two kernels where XLA takes six.

Decoding reads few bytes in many small kernels, so that their number is what it costs. The cache is cut into parts, as
one program for each head would leave most of a GPU without work (Flash-Decoding, Dao et al. 2023); a second kernel puts
the parts together. A cache is a ring of S slots (`nanochat_jax/inference/decoding.py`): token p stands in slot p mod S.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels.flash_forward import LOG2_E
from kernels.reference import MASKED

PROGRAMS = 512
"""Programs that a GPU should have at least, if the cache is long enough: some four for each of its processors."""
SLOTS = 64
"""Slots that a program reads at once; a power of two. With 4 warps one query of width 128 keeps 64 sums a thread."""

Panels = dict[str, jax.Array]
"""Keys "k" and values "v" [B, K, S, H]."""


class Setup(NamedTuple):
    """What a kernel is compiled for: keys that a query sees before its own, the factor and epsilon of the norm, and how
    many programs there should be.
    """

    window: int
    scale: float
    eps: float
    interpret: bool
    programs: int = PROGRAMS


class Part(NamedTuple):
    """What a program reads: slots [start, end) of a ring of `slots`, whose newest token is number `last`; tokens before
    number `oldest` are invisible.
    """

    start: jax.Array
    end: jax.Array
    slots: int
    last: jax.Array
    oldest: jax.Array


def parts_of(slots: int, panels: int, programs: int) -> tuple[int, int]:
    """(slots of a part, how many parts) for each of so many panels of keys."""
    wanted = -(-programs // panels)
    size = max(1, slots // wanted // SLOTS) * SLOTS
    return size, -(-slots // size)


def _turned(ref: jax.Ref, at: int, cos: jax.Array, sin: jax.Array, setup: Setup) -> jax.Array:
    """A head as attention takes it, float32 [H], rounded as in training (`kernels/rotary_norm.py`)."""
    width = ref.shape[1]
    swapped = ref[at, (jnp.arange(width) + width // 2) % width]
    turned = ref[at, :].astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin
    y = turned.astype(ref.dtype).astype(jnp.float32)
    factor = setup.scale * jax.lax.rsqrt(jnp.sum(y * y) / width + setup.eps)
    return (y * factor).astype(ref.dtype).astype(jnp.float32)


def _together(out: jax.Array, highest: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmaxes over separate keys as one over all of them: of each its weighted values [n, H], its largest score and
    the sum of its weights [n].
    """
    top = jnp.max(highest)
    factors = jnp.exp2(highest - top)
    return jnp.sum(out * factors[:, None], axis=0), top, jnp.sum(total * factors)


def _attend(
    queries: list[jax.Array], k_ref: jax.Ref, v_ref: jax.Ref, part: Part, new: tuple[jax.Array, jax.Array] | None
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Of each query: its weighted values [H], the largest of its scores in units of log 2, the sum of its weights.

    `new`: the newest key and its value, which the cache may not hold yet. Each of the SLOTS positions of a tile has a
    maximum and sums of its own, as adding up over slots takes the threads of a program together.
    """
    width = k_ref.shape[1]
    count = jnp.minimum(part.last + 1, part.slots)  # slots that hold a token

    def tile(number: jax.Array, carry: list) -> list:
        slots = number * SLOTS + jnp.arange(SLOTS)
        there = jnp.broadcast_to((slots < part.slots)[:, None], (SLOTS, width))
        at = pl.ds(number * SLOTS, SLOTS), slice(None)
        k, v = (triton.load(ref.at[at], mask=there, other=0).astype(jnp.float32) for ref in (k_ref, v_ref))
        if new is not None:
            here = (slots == jax.lax.rem(part.last, part.slots))[:, None]
            k, v = (jnp.where(here, x[None], old) for x, old in zip(new, (k, v), strict=True))
        stands = part.last - jax.lax.rem(jnp.maximum(part.last - slots, 0), part.slots)
        visible = (slots < count) & (stands >= part.oldest)
        after = []
        for q, (out, highest, total) in zip(queries, carry, strict=True):
            scores = jnp.sum(k * q[None], axis=1) * (width**-0.5 * LOG2_E)
            scores = jnp.where(visible, scores, MASKED)
            new_highest = jnp.maximum(highest, scores)
            shrink, weights = jnp.exp2(highest - new_highest), jnp.exp2(scores - new_highest)
            after.append((out * shrink[:, None] + weights[:, None] * v, new_highest, total * shrink + weights))
        return after

    nothing = jnp.zeros((SLOTS, width), jnp.float32), jnp.full(SLOTS, MASKED), jnp.zeros(SLOTS, jnp.float32)
    end = -(-jnp.minimum(part.end, count) // SLOTS)
    found = jax.lax.fori_loop(part.start // SLOTS, end, tile, [nothing] * len(queries))
    return [_together(*each) for each in found]


def _part_kernel(
    setup: Setup,
    sizes: tuple[int, int],
    shared_parts: int,
    places_ref: jax.Ref,
    cos_ref: jax.Ref,
    sin_ref: jax.Ref,
    qkv_ref: jax.Ref,
    value_ref: jax.Ref | None,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    shared_k_ref: jax.Ref | None,
    shared_v_ref: jax.Ref | None,
    out_ref: jax.Ref,
    highest_ref: jax.Ref,
    total_ref: jax.Ref,
    new_k_ref: jax.Ref,
    new_v_ref: jax.Ref,
) -> None:
    group = qkv_ref.shape[0] - 2
    position, first = places_ref[0], places_ref[1]
    cos, sin = cos_ref[...].astype(jnp.float32), sin_ref[...].astype(jnp.float32)
    queries = [_turned(qkv_ref, g, cos, sin, setup) for g in range(group)]
    number = pl.program_id(0)

    def store(found: list) -> None:
        for g, (out, highest, total) in enumerate(found):
            out_ref[g, :] = out
            highest_ref[g] = highest
            total_ref[g] = total

    @pl.when(number >= shared_parts)
    def _() -> None:
        key = _turned(qkv_ref, group, cos, sin, setup)
        value = qkv_ref[group + 1, :] if value_ref is None else value_ref[...]
        start = (number - shared_parts) * sizes[0]
        part = Part(start, start + sizes[0], k_ref.shape[0], position - first, position - first - setup.window)
        slot = jax.lax.rem(part.last, part.slots)
        store(_attend(queries, k_ref, v_ref, part, (key, value.astype(jnp.float32))))

        @pl.when((slot >= part.start) & (slot < part.end))
        def _() -> None:
            new_k_ref[slot, :] = key.astype(new_k_ref.dtype)
            new_v_ref[slot, :] = value.astype(new_v_ref.dtype)

    if shared_k_ref is not None:

        @pl.when(number < shared_parts)
        def _() -> None:
            start = number * sizes[1]
            part = Part(start, start + sizes[1], shared_k_ref.shape[0], first - 1, position - setup.window)
            store(_attend(queries, shared_k_ref, shared_v_ref, part, None))


def _join_kernel(parts: int, out_ref: jax.Ref, highest_ref: jax.Ref, total_ref: jax.Ref, y_ref: jax.Ref) -> None:
    some = jnp.arange(len(highest_ref)) < parts
    highest = triton.load(highest_ref, mask=some, other=MASKED)
    total = triton.load(total_ref, mask=some, other=0)
    out = triton.load(out_ref, mask=jnp.broadcast_to(some[:, None], out_ref.shape), other=0)
    out, _, total = _together(out, highest, total)
    y_ref[...] = (out / total).astype(y_ref.dtype)


@functools.partial(jax.jit, static_argnames="setup")  # layers alike are compiled once
def decode_attention(
    qkv_BKXH: jax.Array,
    value_BKH: jax.Array | None,
    cos_BKH: jax.Array,
    sin_BKH: jax.Array,
    places_BK2: jax.Array,
    own: Panels,
    shared: Panels | None,
    *,
    setup: Setup,
) -> tuple[jax.Array, Panels]:
    """What each row's queries see, [B, K, G, H]; and `own` with each row's new key and value, in place.

    qkv_BKXH: of each key/value head G queries, then its key and value, X = G + 2, before rotary positions and norm;
    value_BKH: instead of the value there. cos_BKH, sin_BKH: of the row's position, as `model.rope` has them.
    places_BK2 int32: the position, and where the row's own slots begin, what is before being its shared prompt; own has
    one panel for each row, shared one for each B / P rows, next to each other. H is a power of two.
    """
    batch, heads, x, width = qkv_BKXH.shape
    group, slots = x - 2, own["k"].shape[2]
    size, parts = parts_of(slots, batch * heads, setup.programs)
    shared_size, shared_parts, shared_slots, together = 0, 0, 0, 1
    if shared is not None:
        together, shared_slots = batch // len(shared["k"]), shared["k"].shape[2]
        shared_size, shared_parts = parts_of(shared_slots, batch * heads, setup.programs)
    every = parts + shared_parts
    room = pl.next_power_of_2(every)

    def of_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda s, k, b: (b, k, *[0] * len(shape)))

    def of_part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda s, k, b: (b, k, s, *[0] * len(shape)))

    prompt = pl.BlockSpec((None, None, shared_slots, width), lambda s, k, b: (b // together, k, 0, 0))
    numbers = jax.ShapeDtypeStruct((batch, heads, room, group), jnp.float32)
    params = triton.CompilerParams(num_warps=4, num_stages=2)
    panels = own["k"], own["v"], *((None, None) if shared is None else (shared["k"], shared["v"]))
    specs = [of_row(2), of_row(width), of_row(width), of_row(x, width), None if value_BKH is None else of_row(width)]
    specs += [of_row(slots, width)] * 2 + [None if shared is None else prompt] * 2
    at = 4 if value_BKH is None else 5  # of own's keys among the arrays that are there
    out, highest, total, k_BKSH, v_BKSH = pl.pallas_call(
        functools.partial(_part_kernel, setup, (size, shared_size), shared_parts),
        grid=(every, heads, batch),
        in_specs=specs,
        out_specs=[of_part(group, width), of_part(group), of_part(group), *[of_row(slots, width)] * 2],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, room, group, width), jnp.float32),
            numbers,
            numbers,
            *(jax.ShapeDtypeStruct(panel.shape, panel.dtype) for panel in panels[:2]),
        ],
        input_output_aliases={at: 3, at + 1: 4},
        compiler_params=params,
        interpret=setup.interpret,
        name="decode_attention",
    )(places_BK2, cos_BKH, sin_BKH, qkv_BKXH, value_BKH, *panels)
    y_BKGH = pl.pallas_call(
        functools.partial(_join_kernel, every),
        grid=(group, heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, room, None, width), lambda g, k, b: (b, k, 0, g, 0)),
            *[pl.BlockSpec((None, None, room, None), lambda g, k, b: (b, k, 0, g))] * 2,
        ],
        out_specs=pl.BlockSpec((None, None, None, width), lambda g, k, b: (b, k, g, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, group, width), qkv_BKXH.dtype),
        compiler_params=params,
        interpret=setup.interpret,
        name="decode_attention_join",
    )(out, highest, total)
    return y_BKGH, {"k": k_BKSH, "v": v_BKSH}
