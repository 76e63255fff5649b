"""The Pallas kernel of decoding, interpreted on the CPU, against XLA's own attention over the cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import decode_attention as kernel
from kernels.decode_attention import Setup, decode_attention, parts_of
from nanochat_jax.inference.decoding import attend_cache, put
from nanochat_jax.model import EPS, rms, rope, rotate

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)


class Case(NamedTuple):
    """Rows at these positions, K key/value heads of G queries of width 16, a ring of so many slots; prompts that rows
    share, each in a ring of so many, and where a row's own slots begin.
    """

    positions: tuple[int, ...]
    heads: int = 1
    group: int = 1
    slots: int = 65
    window: int = 64
    first: tuple[int, ...] = ()
    prompts: int = 0
    prompt_slots: int = 0
    value: bool = False


CASES = {
    "rings that are empty, full and came round": Case((0, 64, 200), heads=2),
    "more slots than a tile and than tokens, two queries a head, values apart": Case(
        (1, 199), 2, 2, 200, 512, value=True
    ),
    "rows that share prompts, whole": Case((150, 180, 140, 300), 1, 2, 65, 64, (129, 129, 139, 139), 2, 160),
    "rows that share prompts, of which the window hides": Case(
        (150, 180, 140, 210), 2, 1, 65, 64, (129, 129, 139, 139), 2, 65
    ),
    "rings longer than the window": Case((90, 250), slots=150),
    "prompts of a token, which is the row's own": Case((0, 70), prompts=1, prompt_slots=65),
    "all of a prompt is behind the window": Case((400, 401), 1, 1, 65, 64, (130, 130), 1, 65),
}


def arrays(case, dtype):
    """qkv, the value that stands apart or None, tables, positions, first slots, own panels and shared ones or None."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    rows, width = len(case.positions), 16

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    def panels(count, slots):
        return {name: normal(count, case.heads, slots, width) for name in ("k", "v")}

    qkv, own = normal(rows, case.heads, case.group + 2, width), panels(rows, case.slots)
    value = normal(rows, case.heads, width) if case.value else None
    shared = panels(case.prompts, case.prompt_slots) if case.prompts else None
    positions = jnp.asarray(case.positions, jnp.int32)
    first = jnp.asarray(case.first or [0] * rows, jnp.int32)
    return qkv, value, rope(positions, width, 1e5, dtype), positions, first, own, shared


def by_kernel(case, qkv, value, tables, positions, first, own, shared, **setup):
    rows_and_heads = qkv.shape[:2]
    cos, sin = (jnp.broadcast_to(table, (*rows_and_heads, table.shape[-1])) for table in tables)
    places = jnp.broadcast_to(jnp.stack([positions, first], axis=-1)[:, None], (*rows_and_heads, 2))
    setup = Setup(case.window, 1.2, EPS, True, **setup)
    return decode_attention(qkv, value, cos, sin, places, own, shared, setup=setup)


def by_xla(case, qkv, value, tables, positions, first, own, shared):
    cos, sin = (table[:, None] for table in tables)
    qk = 1.2 * rms(rotate(qkv[:, :, :-1], cos, sin))
    new = {"k": qk[:, :, -1], "v": qkv[:, :, -1] if value is None else value}
    slots = (positions - first) % case.slots
    own = {name: put(panel, new[name], slots) for name, panel in own.items()}
    return attend_cache(qk[:, :, :-1], own, shared, positions, first, case.window), own


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_sees_and_keeps_what_xlas_own_attention_does_in_float32(case, dtype, tolerance):
    given = arrays(case, dtype)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, given)
    leaves = map(jax.tree.leaves, (by_kernel(case, *given), by_xla(case, *exact)))
    for got, expected in zip(*leaves, strict=True):
        assert got.shape == expected.shape and got.dtype == dtype
        assert np.linalg.norm(np.float32(got) - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("programs", [1, 4, 9])
def test_parts_of_several_tiles_come_to_the_same(programs):
    case = Case((700, 900), 1, 1, 300, 299, (500, 650), 2, 700)
    given = arrays(case, jnp.float32)
    assert parts_of(case.prompt_slots, 2, programs)[0] > kernel.SLOTS
    leaves = map(jax.tree.leaves, (by_kernel(case, *given, programs=programs), by_xla(case, *given)))
    for got, expected in zip(*leaves, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_slots_that_hold_no_token_yet_do_not_count_nor_are_read_in_tiles_of_their_own():
    case = Case((3, 70), slots=200, window=199)
    qkv, value, tables, positions, first, own, _ = arrays(case, jnp.float32)
    wild = jax.tree.map(lambda panel: panel.at[0, :, 4:].set(1e4).at[0, :, kernel.SLOTS :].set(jnp.nan), own)
    (y, _), (expected, _) = (by_kernel(case, qkv, value, tables, positions, first, x, None) for x in (wild, own))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(("slots", "panels"), [(513, 6), (2048, 6), (513, 96), (2048, 96), (1, 1), (2048, 2000)])
def test_parts_cover_the_slots_in_whole_tiles(slots, panels):
    size, parts = parts_of(slots, panels, kernel.PROGRAMS)
    assert size % kernel.SLOTS == 0 and (parts - 1) * size < slots <= parts * size
    assert parts * panels >= min(kernel.PROGRAMS, panels * (slots // kernel.SLOTS)) or parts == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("group", "value", "shared"), [(1, False, False), (2, True, False), (2, True, True)])
def test_it_lowers_for_cuda_without_a_device(dtype, group, value, shared):
    def shape(*sizes, of=dtype):
        return jax.ShapeDtypeStruct(sizes, of)

    def panels(rows, slots):
        return dict.fromkeys(("k", "v"), shape(rows, 6, slots, 128))

    heads = 32, 6
    given = [shape(*heads, group + 2, 128), shape(*heads, 128) if value else None, *[shape(*heads, 128)] * 2]
    given += [shape(*heads, 2, of=jnp.int32), panels(32, 513), panels(2, 700) if shared else None]
    run = jax.jit(lambda *given: decode_attention(*given, setup=Setup(512, 1.2, EPS, False)))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
