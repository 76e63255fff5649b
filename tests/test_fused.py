"""The small Pallas kernels around attention, interpreted on the CPU: rotary positions with the norm; the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.cross_entropy import softcapped_cross_entropy
from kernels.rotary_norm import rotary_norm
from nanochat_jax.model import EPS, rms, rope, rotate

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)


def tables(length, width, dtype):
    return tuple(x[0, :, 0, : width // 2] for x in rope(jnp.arange(length)[None], width, 1e5, dtype))


@pytest.mark.parametrize("length", [64, 48, 7])  # whole, halved and single positions of a program
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01)])
def test_rotary_norm_and_its_gradient_are_those_of_the_model(length, dtype, tolerance):
    x, grad = (jax.random.normal(jax.random.key(i), (2, length, 3, 16), dtype) for i in range(2))
    cos, sin = rope(jnp.arange(length)[None], 16, 1e5, dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, x):
        out, pullback = jax.vjp(function, x)
        return out, *pullback(grad)

    expected = both(lambda x: 1.2 * rms(rotate(x, cos, sin)), x)
    got = both(lambda x: rotary_norm(x, *tables(length, 16, dtype), 1.2, EPS, True), x)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        a, b = np.float32(a), np.float32(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_rotary_norm_of_nothing_is_nothing():
    zeros = jnp.zeros((1, 4, 1, 16))
    grad = jax.grad(lambda x: jnp.sum(rotary_norm(x, *tables(4, 16, jnp.float32), 1.2, EPS, True)))(zeros)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(("vocab_size", "width"), [(512, 512), (500, 512), (300, 320)])
def test_cross_entropy_and_its_gradient_are_those_of_the_formula(vocab_size, width):
    logits = 20 * jax.random.normal(jax.random.key(0), (2, 5, width))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, vocab_size).at[0, 1].set(-1)

    def formula(logits):
        capped = 15 * jnp.tanh(logits[..., :vocab_size] / 15)
        picked = jnp.take_along_axis(capped, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets >= 0, jax.nn.logsumexp(capped, axis=-1) - picked, 0.0)

    losses, sums, grads = softcapped_cross_entropy(logits, targets, cap=15.0, vocab_size=vocab_size, interpret=True)
    np.testing.assert_allclose(losses, formula(logits), atol=2e-5)
    assert losses[0, 1] == 0
    grads = jnp.where((targets >= 0)[..., None], grads / sums[..., None], 0.0)
    np.testing.assert_allclose(grads, jax.grad(lambda x: jnp.sum(formula(x)))(logits), atol=1e-6)


def test_cross_entropy_of_extreme_logits_is_finite():
    logits = jnp.array([[[1e30, -1e30, 0.0, 3e3]]])
    losses, sums, grads = softcapped_cross_entropy(logits, jnp.array([[1]]), cap=15.0, vocab_size=4, interpret=True)
    np.testing.assert_allclose(losses, np.log(2 + np.exp(-15) + np.exp(-30)) + 30, rtol=1e-5)
    assert np.isfinite(sums).all() and np.isfinite(grads).all()


def test_they_lower_for_cuda_without_a_device():
    def normed(x, cos, sin):
        return jnp.sum(rotary_norm(x, cos, sin, 1.2, EPS, False).astype(jnp.float32))

    def loss(logits, targets):
        return softcapped_cross_entropy(logits, targets, cap=15.0, vocab_size=32768)

    x, table = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 2048, 6, 128), (2048, 64)))
    logits, targets = jax.ShapeDtypeStruct((2, 8, 32768), jnp.bfloat16), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = jax.jit(jax.grad(normed)).trace(x, table, table).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 2  # forward, backward
        text = jax.jit(loss).trace(logits, targets).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 1
