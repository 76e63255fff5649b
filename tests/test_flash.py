"""The Pallas attention, interpreted on the CPU: against the specification, tile by tile, over a mesh and in training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from stage_runs import WORK, quiet, records, start

from kernels.attention import attention, resolve
from kernels.flash_attention import flash_attention
from kernels.flash_tiles import Tiles, visited_tiles
from kernels.reference import reference_attention
from nanochat_jax import model as gpt
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.loss import token_losses
from nanochat_jax.run import _read_record
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages import pretrain

BLOCK = 16
TILES = Tiles(BLOCK, BLOCK, BLOCK, BLOCK)
LENGTH = 40  # no multiple of the tiles
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)

interpreted = functools.partial(flash_attention, tiles=TILES, interpret=True)


def operands(heads, kv_heads, dtype=jnp.float32, length=LENGTH, batch=2, width=16):
    """q, k, v and a gradient of the output."""
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def _out_and_gradients(function, q, k, v, dout, window, doc_start=None):
    out, pullback = jax.vjp(lambda *qkv: function(*qkv, window=window, doc_start=doc_start), q, k, v)
    return out, *pullback(dout)


out_and_gradients = jax.jit(_out_and_gradients, static_argnums=0)
out_and_gradients_static = jax.jit(_out_and_gradients, static_argnums=0, static_argnames="window")


def check(arrays, window, doc_start=None, atol=4e-6, function=interpreted):
    expected = out_and_gradients(reference_attention, *arrays, window, doc_start)
    # A window that is traced compiles once for all windows: the kernels are given each row's first key anyway.
    both = out_and_gradients_static if doc_start is None else out_and_gradients
    got = both(function, *arrays, window=window, doc_start=doc_start)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol, err_msg=name)


def documents():
    """A row that is one document, and one with documents of 3, 13 (to the edge of a tile), 20 and 4."""
    lengths = [[LENGTH], [3, 13, 20, 4]]
    starts = [np.repeat(np.cumsum([0, *row[:-1]]), row) for row in lengths]
    return jnp.asarray(starts, jnp.int32)


@pytest.mark.parametrize("window", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, LENGTH, 1000])
def test_grouped_queries_and_documents_match_the_reference(window):
    check(operands(4, 2), window, documents())


@pytest.mark.parametrize("window", [BLOCK + 1, LENGTH])
def test_plain_heads_match_the_reference(window):
    check(operands(2, 2), window)


def test_tiles_of_all_sizes_and_padded_heads_match_the_reference():
    """Width 24 is padded to 32; the four sizes differ, so that none stands for another."""
    tiles = Tiles(rows=64, keys=16, kept=16, walked=32)
    function = functools.partial(flash_attention, tiles=tiles, interpret=True)
    check(operands(3, 1, length=90, width=24), 33, function=function)


def test_bfloat16_is_as_near_as_its_precision():
    check(operands(4, 2, jnp.bfloat16), 20, documents(), atol=0.03)


def test_what_is_invisible_has_gradient_zero():
    q, k, v, dout = operands(4, 2)
    only_row_30 = jnp.zeros_like(dout).at[:, 30].set(dout[:, 30])
    _, dq, dk, dv = out_and_gradients(interpreted, q, k, v, only_row_30, window=BLOCK - 1, doc_start=documents())
    for gradient in (dk, dv):
        touched = np.abs(np.asarray(gradient)).max((2, 3)) > 0
        for row, first in enumerate((15, 16)):  # the window's first key, the document's
            np.testing.assert_array_equal(np.flatnonzero(touched[row]), np.arange(first, 31))
    assert not np.delete(np.asarray(dq), 30, axis=1).any()


def test_number_of_visited_tiles():
    assert visited_tiles(2048, 512, 128, 128) == (70, 70)
    assert visited_tiles(2048, 2048, 128, 128) == (136, 136)
    assert visited_tiles(2048, 0, 128, 128) == (16, 16)
    assert visited_tiles(2048, 512, 128, 64) == (140, 140)


@pytest.mark.parametrize("document", [0, 40])
def test_the_kernels_visit_only_visible_tiles(document):
    """NaN spreads, through masks too, from every tile that is read to every tile of results: a count of the reads."""
    window, length = 20, 6 * BLOCK
    q, k, v, dout = operands(1, 1, length=length, batch=1)
    starts = np.where(np.arange(length) >= document, document, 0)
    rows, keys = np.arange(length)[:, None], np.arange(length)[None, :]
    visible = (keys <= rows) & (keys >= np.maximum(rows - window, starts[:, None]))
    visible_tiles = visible.reshape(6, BLOCK, 6, BLOCK).any((1, 3))
    if document == 0:
        assert visited_tiles(length, window, BLOCK, BLOCK) == (visible_tiles.sum(),) * 2

    def spoiled(x, tile):
        return x.at[:, tile * BLOCK : (tile + 1) * BLOCK].set(jnp.nan)

    def tiles_with_nan(x):
        return np.isnan(np.asarray(x)).reshape(6, -1).any(1)

    run = functools.partial(out_and_gradients, interpreted, window=window, doc_start=jnp.asarray(starts)[None])
    for tile in range(6):
        out, dq, _, _ = run(q, k, spoiled(v, tile), dout)
        np.testing.assert_array_equal(tiles_with_nan(out), visible_tiles[:, tile])
        np.testing.assert_array_equal(tiles_with_nan(dq), visible_tiles[:, tile])
        _, _, dk, dv = run(q, k, v, spoiled(dout, tile))
        np.testing.assert_array_equal(tiles_with_nan(dk), visible_tiles[tile])
        np.testing.assert_array_equal(tiles_with_nan(dv), visible_tiles[tile])


@pytest.mark.parametrize("window", [512, 2048])
@pytest.mark.parametrize(
    ("dtype", "with_documents"), [(jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float32, False)]
)
def test_lowers_for_cuda_without_a_device(window, dtype, with_documents):
    """What Triton cannot express fails here, forward and backward; numbers are the business of the other tests."""
    q = jax.ShapeDtypeStruct((2, 2048, 6, 128), dtype)
    k = jax.ShapeDtypeStruct((2, 2048, 3, 128), dtype)
    starts = jax.ShapeDtypeStruct((2, 2048), jnp.int32) if with_documents else None

    def loss(q, k, v, doc_start):
        return jnp.sum(attention(q, k, v, window=window, doc_start=doc_start, impl="pallas").astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, starts).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3  # forward, dQ, dKV


def test_sharded_attention_is_the_same_and_gathers_nothing():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    q, k, v, dout = operands(4, 2, batch=4)
    single = out_and_gradients(reference_attention, q, k, v, dout, window=20)

    @jax.jit
    def sharded(q, k, v, dout):
        out, pullback = jax.vjp(lambda *qkv: gpt.attend(*qkv, 20, "pallas_interpreted"), q, k, v)
        return out, *pullback(dout)

    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor", None))
        placed = [jax.device_put(x, spec) for x in (q, k, v, dout)]
        compiled = sharded.lower(*placed).compile()
        results = compiled(*placed)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(results, single, strict=True):
        assert a.sharding.is_equivalent_to(spec, 4)
        np.testing.assert_allclose(a, b, atol=4e-6)


def test_the_model_learns_the_same_with_it():
    model = ModelConfig(depth=1, aspect_ratio=32, head_dim=16, n_kv_head=1, sequence_len=48, smear=False, lambdas=False)
    cfg = dataclasses.replace(GPTConfig.from_depth(model, 64), windows=(20,))
    fresh = jax.jit(gpt.init_params, static_argnums=0)(cfg, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.05 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), fresh)
    tokens = jax.random.randint(jax.random.key(2), (2, 41), 0, 64)

    @functools.partial(jax.jit, static_argnums=0)
    def both(cfg, params):
        def loss(params):
            return jnp.mean(token_losses(params, cfg, tokens[:, :-1], tokens[:, 1:]))

        return jax.value_and_grad(loss)(params)

    expected, got = (both(dataclasses.replace(cfg, attention=a), params) for a in ("xla_blocked", "pallas_interpreted"))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got[1], expected[1])


def test_what_it_means_on_each_platform():
    assert resolve("pallas", "cpu", "float32") == "pallas_interpreted"
    assert resolve("pallas", "gpu", "float32") == "pallas"
    assert [resolve("auto", platform, "bfloat16", "8.0") for platform in ("cpu", "gpu", "tpu")] == [
        "xla_blocked",
        "cudnn",
        "xla_blocked",
    ]
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, here: tpu") as error:
        resolve("pallas", "tpu", "bfloat16")
    assert "\n" not in str(error.value)
    q, k, v, _ = operands(2, 2)
    with pytest.raises(ValueError, match="knows no document starts"):
        attention(q, k, v, window=4, doc_start=documents(), impl="xla_blocked")


def test_a_run_trains_with_it(tmp_path, capsys):
    model = dataclasses.replace(tiny.config.model, depth=1, sequence_len=32)
    steps = {"num_iterations": 3, "stop_after": 2, "total_batch_size": 4 * 32, "device_batch_size": 4}
    base = dataclasses.replace(tiny.config.base, eval_tokens=128, **steps)
    config = dataclasses.replace(tiny.config, attention="pallas", model=model, base=base)
    pretrain.run(config, start(tmp_path, config), quiet)
    losses = [row["loss"] for row in records(tmp_path) if row["kind"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert _read_record(tmp_path)["used"]["attention"] == "pallas_interpreted"
    assert "pallas_interpreted" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_pipeline_runs_with_it(tmp_path):
    """Training, validation, samples and rollouts, whose prompts are read with it."""
    config = dataclasses.replace(tiny.config, attention="pallas")
    start(tmp_path, config)
    for stage, work in WORK.items():
        work(config, tmp_path, quiet)
        assert (tmp_path / stage / "done.json").exists() and records(tmp_path, stage)
