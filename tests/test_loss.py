"""The loss: its own gradients against those of automatic differentiation, whole and in chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import model as gpt
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.loss import kernel_takes, token_losses, weighted_loss
from nanochat_jax.sharding import make_mesh

CFG = GPTConfig.from_depth(ModelConfig(depth=1, aspect_ratio=32, head_dim=16, sequence_len=48), 500)
LENGTH = 40


@pytest.fixture(scope="module")
def params():
    fresh = jax.jit(gpt.init_params, static_argnums=0)(CFG, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.05 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), fresh)


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(7), (3, LENGTH + 1), 0, 500)
    weights = jax.random.normal(jax.random.key(8), (3, LENGTH))
    return tokens[:, :-1], tokens[:, 1:].at[0, 3:9].set(-1), weights


def plain(params, cfg, inputs, targets, weights):
    """The loss as one would write it down, left to automatic differentiation."""
    log_probs = jax.nn.log_softmax(gpt.forward(params, cfg, inputs))
    losses = -jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(targets >= 0, losses, 0.0) * weights)


def gradients(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 4)), static_argnums=1)


@pytest.fixture(scope="module")
def expected(params, batch):
    return gradients(plain)(params, CFG, *batch)


@pytest.mark.parametrize(
    ("chunk", "attention"),
    [*((chunk, "reference") for chunk in (0, 8, 17, 64)), (0, "pallas_interpreted"), (17, "pallas_interpreted")],
)
def test_loss_and_gradients_are_those_of_the_formula(params, batch, expected, chunk, attention):
    cfg = dataclasses.replace(CFG, loss_chunk=chunk, attention=attention)
    got = gradients(weighted_loss)(params, cfg, *batch)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got[1], expected[1])
    assert not np.asarray(got[1][0]["lm_head"]["kernel"])[:, 500:].any()  # columns that stand for no token


def test_gradients_scale_with_what_follows_the_loss(params, batch, expected):
    got = gradients(lambda *args: -3.0 * weighted_loss(*args))(params, CFG, *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -3 * b, rtol=2e-4, atol=6e-5), got[1], expected[1])


def test_losses_of_tokens_add_up_to_it(params, batch):
    inputs, targets, weights = batch
    losses = jax.jit(token_losses, static_argnums=1)(params, CFG, inputs, targets)
    assert losses.dtype == jnp.float32 and (np.asarray(losses)[0, 3:9] == 0).all()
    np.testing.assert_allclose(jnp.sum(losses * weights), plain(params, CFG, *batch), rtol=1e-5)


def test_no_array_of_all_logits_is_kept_or_made_in_chunks(params, batch):
    cfg = dataclasses.replace(CFG, loss_chunk=8)
    step = jax.jit(jax.grad(weighted_loss), static_argnums=1)
    text = step.lower(params, cfg, *batch).as_text()
    assert f"3x8x{CFG.padded_vocab_size}x" in text
    assert f"3x{LENGTH}x{CFG.padded_vocab_size}x" not in text and f"3x{LENGTH}x{CFG.vocab_size}x" not in text


def test_not_by_the_kernel_where_its_threads_would_share_logits():
    assert kernel_takes(dataclasses.replace(CFG, attention="cudnn")) and not kernel_takes(CFG)
    assert not kernel_takes(dataclasses.replace(CFG, attention="cudnn", vocab_size=50257))  # padded to 50,304


@pytest.mark.parametrize(("mesh", "kernels"), [("fsdp=2", True), ("tensor=2", False)])
def test_by_the_kernel_where_a_device_has_the_whole_vocabulary(params, batch, mesh, kernels):
    cfg, batch = dataclasses.replace(CFG, attention="pallas_interpreted"), [x[:2] for x in batch]
    expected = gradients(plain)(params, CFG, *batch)
    with jax.set_mesh(make_mesh(mesh)):
        got = gradients(weighted_loss)(params, cfg, *batch)
        made = str(jax.make_jaxpr(weighted_loss, static_argnums=1)(params, cfg, *batch))
    assert ("softcapped_cross_entropy" in made) == kernels
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got[1], expected[1])
