"""The small Pallas kernels around attention, interpreted on the CPU: rotary positions with the norm; the loss."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.cross_entropy import softcapped_cross_entropy
from kernels.rotary_norm import rotary_norm
from nanochat_jax.config import GPTConfig, ModelConfig, StageConfig
from nanochat_jax.model import EPS, rms, rope, rotate
from nanochat_jax.optim import Schedule
from nanochat_jax.sharding import make_mesh, put_batch
from nanochat_jax.train import born_params, train_step, with_optimizer

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


@pytest.mark.parametrize(("vocab_size", "width"), [(512, 512), (500, 512), (700, 768)])
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
    logits = jnp.pad(jnp.array([[[1e30, -1e30, 0.0, 3e3]]]), ((0, 0), (0, 0), (0, 252)))
    losses, sums, grads = softcapped_cross_entropy(logits, jnp.array([[1]]), cap=15.0, vocab_size=4, interpret=True)
    np.testing.assert_allclose(losses, np.log(2 + np.exp(-15) + np.exp(-30)) + 30, rtol=1e-5)
    assert np.isfinite(sums).all() and np.isfinite(grads).all()


def test_a_target_that_is_no_token_is_no_number_and_touches_no_other_row():
    logits, targets = jax.random.normal(jax.random.key(0), (1, 3, 256)), jnp.array([[5, 250, 2**30]])
    losses, _, grads = softcapped_cross_entropy(logits, targets, cap=15.0, vocab_size=250, interpret=True)
    np.testing.assert_array_equal(np.isnan(losses), [[False, True, True]])
    assert not np.asarray(grads)[..., 250:].any()


def test_each_logit_is_one_threads():
    with pytest.raises(ValueError, match="takes multiples of 256 logits, here: 320"):
        softcapped_cross_entropy(jnp.zeros((1, 1, 320)), jnp.zeros((1, 1), jnp.int32), cap=15.0, vocab_size=300)


def test_a_training_step_with_them_is_the_same_on_any_mesh():
    model = ModelConfig(depth=1, aspect_ratio=64, head_dim=16, sequence_len=48, n_kv_head=2)
    random = np.random.default_rng(0)
    tokens = {
        name: random.integers(-(name == "targets"), 500, (2, 8, 37), dtype=np.int32) for name in ("inputs", "targets")
    }

    def losses(attention, spec):
        cfg, mesh = replace(GPTConfig.from_depth(model, 500), attention=attention), make_mesh(spec)
        state = with_optimizer(cfg, mesh, born_params(cfg, mesh, 0))
        seen, schedule = [], Schedule(StageConfig(), 4, cfg.n_embd)
        with jax.set_mesh(mesh):
            for step in range(2):
                batch = put_batch(tokens, mesh, leading=1)
                state, metrics = train_step(state, batch, schedule.hyper(step), cfg=cfg)
                seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
        return seen

    expected = losses("reference", "1")
    for spec in ("8", "data=2,fsdp=2,tensor=2"):
        np.testing.assert_allclose(losses("pallas_interpreted", spec), expected, rtol=2e-5, err_msg=spec)


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
