"""The Hopper attention without a Hopper: interpreted on the CPU, races included, and lowered for the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels.attention import attention, resolve
from kernels.flash_tiles import Setup
from kernels.hopper_attention import hopper_attention
from kernels.hopper_backward import backward
from kernels.hopper_forward import forward
from kernels.reference import reference_attention
from nanochat_jax import model as gpt
from nanochat_jax.errors import UserError
from nanochat_jax.run import gpt_config

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)

interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX interprets no wgmma of a transposed tile; 0.12 does"
)


def operands(heads, kv_heads, length, width, dtype=jnp.float16):
    """q, k, v and a gradient of the output."""
    shapes = [(1, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def interpret():
    return plgpu.InterpretGPUParams(detect_races=True)


@functools.partial(jax.jit, static_argnums=0)
def out_and_gradients(function, q, k, v, dout):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(dout)


@interpreter
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "window", "dtype"),
    [
        (384, 2, 1, 64, 200, jnp.float16),  # masked, unmasked, masked tiles; rings that go round; grouped queries
        (300, 1, 1, 128, 1000, jnp.bfloat16),  # all keys, rows padded
        pytest.param(128, 2, 2, 64, 0, jnp.float16, marks=pytest.mark.slow),  # each row sees itself
        pytest.param(512, 4, 2, 128, 129, jnp.float16, marks=pytest.mark.slow),
        pytest.param(512, 2, 1, 64, 63, jnp.float16, marks=pytest.mark.slow),
        pytest.param(640, 2, 1, 128, 512, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_it_matches_the_reference(length, heads, kv_heads, width, window, dtype):
    arrays = operands(heads, kv_heads, length, width, dtype)
    expected = out_and_gradients(functools.partial(reference_attention, window=window), *map(jnp.float32, arrays))
    ours = functools.partial(hopper_attention, window=window, interpret=interpret())
    for name, a, b in zip(("out", "dq", "dk", "dv"), out_and_gradients(ours, *arrays), expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float32(a), b, atol=4 * eps, rtol=2 * eps, err_msg=name)


@interpreter
def test_the_kernels_visit_only_visible_tiles():
    """NaN spreads, through masks too, from a tile that is read to every tile of results: what was visited."""
    length, window, spoiled = 384, 70, slice(64, 128)
    rows, keys = np.arange(length)[:, None], np.arange(length)[None, :]
    visible = (keys <= rows) & (keys >= rows - window)
    q, k, v, dout = operands(1, 1, length, 64)
    setup = Setup(window, 64**-0.5, None, interpret())
    logsumexp = jnp.zeros((1, 1, length))

    def tiles_with_nan(x, size):
        return np.isnan(np.asarray(x)).reshape(length // size, -1).any(1)

    bad_v = v.at[:, spoiled].set(jnp.nan)
    out, _ = jax.jit(forward, static_argnums=3)(q, k, bad_v, setup)
    blocks = visible.reshape(3, 128, 3, 128).any((1, 3))
    np.testing.assert_array_equal(tiles_with_nan(out, 128), blocks[:, 0])
    tiles = visible.reshape(6, 64, 6, 64).any((1, 3))
    grads = jax.jit(backward, static_argnums=6)
    dq, _, _ = grads(q, k, bad_v, q, logsumexp, dout, setup)
    np.testing.assert_array_equal(tiles_with_nan(dq, 64), tiles[:, 1])
    _, dk, dv = grads(q, k, v, q, logsumexp, dout.at[:, spoiled].set(jnp.nan), setup)
    for gradient in (dk, dv):
        np.testing.assert_array_equal(tiles_with_nan(gradient, 64), tiles[1])


def loss(q, k, v, window):
    return jnp.sum(gpt.attend(q, k, v, window, "mosaic").astype(jnp.float32))


def lower(mesh, q, k, window):
    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
        return gradients.trace(q, k, k, window).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("window", "width", "group", "dtype"),
    [
        (512, 128, 1, jnp.bfloat16),
        (512, 64, 2, jnp.float16),
        (2048, 128, 2, jnp.bfloat16),
        (2048, 64, 1, jnp.bfloat16),
    ],
)
def test_lowers_for_hopper_without_a_device(window, width, group, dtype):
    """Layouts, barriers and shared memory are settled here, forward and backward."""
    q, k = (jax.ShapeDtypeStruct((2, 2048, n, width), dtype) for n in (2 * group, 2))
    text = lower(AbstractMesh((), (), abstract_device=H100), q, k, window)
    assert text.count("custom_call @mosaic_gpu") == 3  # forward, dQ, dKV


def test_sharded_each_device_has_its_own_rows_and_heads():
    q, k = (jax.ShapeDtypeStruct((8, 256, n, 128), jnp.bfloat16) for n in (8, 4))
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, abstract_device=H100)
    calls = [line for line in lower(mesh, q, k, 100).splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 3
    for call in calls:
        assert "2x256x4x128xbf16" in call and "2x256x2x128xbf16" in call and "8x256" not in call


def test_where_it_cannot_run_it_says_so():
    assert resolve("mosaic", "gpu", "bfloat16", "9.0", 128, 13000) == "mosaic"
    assert resolve("auto", "gpu", "bfloat16", "9.0", 128, 13000) == "mosaic"
    with pytest.raises(
        ValueError, match=r"here: gpu -, CUDA 0\.00, bfloat16"
    ):  # what is here is asked where nothing is said
        resolve("mosaic", "gpu", "bfloat16")
    for where in (
        ("cpu", "bfloat16", "", 128),
        ("gpu", "float32", "9.0", 128),
        ("gpu", "bfloat16", "8.0", 128),
        ("gpu", "bfloat16", "10.0", 128),
        ("gpu", "bfloat16", "9.0", 96),
    ):
        with pytest.raises(
            ValueError, match=f"here: {where[0]} {where[2] or '-'}, CUDA 13.00, {where[1]}, {where[3]}; use --attention"
        ):
            resolve("mosaic", *where, 13000)
    with pytest.raises(
        UserError, match=r"mosaic needs an NVIDIA GPU of compute capability 9\.x .* here: cpu -, CUDA 0.00, float32"
    ):
        gpt_config(dataclasses.replace(tiny.config, attention="mosaic"), 64)
    q, k, v, _ = operands(1, 1, 128, 32)
    with pytest.raises(ValueError, match=r"heads of width 64 or 128 .*, here: 32, float16; use --attention auto"):
        attention(q, k, v, window=4, impl="mosaic")
    with pytest.raises(ValueError, match="knows no document starts"):
        attention(q, k, v, window=4, doc_start=jnp.zeros((1, 128), jnp.int32), impl="mosaic")
