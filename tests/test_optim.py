"""Muon, AdamW, schedules and horizon against an independent float64 NumPy transcription of MODEL's mathematics."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import BaseConfig, Config, FinetuneConfig, GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.model import count_params, init_params, param_shapes
from nanochat_jax.optim import (
    ADAMW,
    POLAR_EXPRESS,
    Schedule,
    adamw,
    horizon,
    labels,
    make_optimizer,
    muon,
    polar_by_gram,
    polar_express,
    polar_iterated,
)
from nanochat_jax.zero import from_portable, to_portable, view

MODEL = ModelConfig(depth=2, aspect_ratio=32, head_dim=32, n_kv_head=1, sequence_len=32)


def muon_step(p, g, m, v, mu, lr, wd):
    """One step for one matrix in the reference's orientation, [out, in]."""
    m = m + (1 - mu) * (g - m)
    g = g + mu * (m - g)
    rows, cols = g.shape
    norm = np.linalg.norm(g)
    x = g * (norm / np.sqrt(rows)) / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-6)
    x = x / (1.01 * np.linalg.norm(x) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        if rows > cols:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * np.sqrt(min(rows, cols)) / max(np.linalg.norm(x), 1e-6)
    axis = 1 if rows >= cols else 0
    n = x.shape[axis]
    mean = (x**2).mean(axis, keepdims=True)
    v = v + 0.1 * (mean - v)
    s = 1 / np.sqrt(np.maximum(v, 1e-10))
    x = x * s * np.sqrt(mean.sum() * n) / max(np.sqrt((mean * n * s**2).sum()), 1e-10)
    lr = lr * np.sqrt(max(1, rows / cols))
    return p - lr * x - lr * wd * p * (x * p >= 0), m, v


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24), (12, 2)])
def test_muon_equals_the_transcription(shape):
    """Wide, tall and square, three matrices to a stack, five steps with changing momentum and decay."""
    rng = np.random.default_rng(0)
    params = rng.normal(size=(3, *shape))
    expected = [(p.T, np.zeros(shape[::-1]), 0.0) for p in params]
    tx = muon("float32")
    ours = {"stack": jnp.asarray(params, jnp.float32)}
    state = tx.init(ours)
    update = jax.jit(tx.update)
    for step in range(5):
        grads = rng.normal(size=params.shape) * 0.01
        if step == 0:
            grads[1] = 0.0  # the first gradient of one matrix is exactly zero, as behind a zero output projection
        hyper = {"lr": {"muon": 0.02}, "momentum": 0.85 + 0.02 * step, "weight_decay": 0.3 - 0.05 * step}
        updates, state = update({"stack": jnp.asarray(grads, jnp.float32)}, state, ours, hyper=hyper)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)
        for i, (p, m, v) in enumerate(expected):
            expected[i] = muon_step(p, grads[i].T, m, v, hyper["momentum"], 0.02, hyper["weight_decay"])
    for i, found in enumerate(ours["stack"]):
        off = np.abs(found - expected[i][0].T)
        # Where an update is zero but for rounding, whether it agrees in sign with the weight, and so whether the weight
        # decays, is undecided: at most a few elements, by no more than the decay.
        assert (off > 1e-5).mean() < 0.005
        assert (off <= 1e-5 + 5 * 0.02 * 0.3 * np.sqrt(max(1, shape[1] / shape[0])) * np.abs(params[i])).all()


def low_rank(rng, shape):
    """Rank 4 and a little noise, as gradients of few tokens are: the small singular values are what rounding hurts."""
    x = rng.normal(size=(shape[0], 4)) @ rng.normal(size=(4, shape[1])) + 1e-4 * rng.normal(size=shape)
    return x / (1.01 * np.linalg.norm(x))


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (48, 96)])
def test_polynomials_of_the_gram_matrix_are_as_exact_as_the_iteration(shape):
    x = low_rank(np.random.default_rng(2), shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    for a, b, c in POLAR_EXPRESS:
        s = s * (a + b * s**2 + c * s**4)
    exact = u * s @ vt
    off = {
        way: np.linalg.norm(jax.jit(way)(jnp.asarray(x, jnp.float32)) - exact) / np.linalg.norm(exact)
        for way in (polar_by_gram, polar_iterated)
    }
    assert off[polar_by_gram] < max(2 * off[polar_iterated], 2e-5)
    assert off[polar_iterated] < 2e-4  # 5e-8 of the largest singular value, times the product of the first coefficients


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_matrices_one_by_one_are_the_stack_at_once(dtype, tolerance):
    """What a CPU runs and what the others run."""
    x = jnp.asarray(np.stack([low_rank(np.random.default_rng(i), (32, 128)) for i in range(3)]), dtype)
    found, expected = (np.asarray(jax.jit(way)(x), np.float32) for way in (polar_express, polar_iterated))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("group", list(ADAMW))
def test_adamw_equals_the_transcription(group):
    beta1, beta2, decay = ADAMW[group]
    rng = np.random.default_rng(1)
    p = rng.normal(size=(5, 3))
    ours, m, v = {"w": jnp.asarray(p, jnp.float32)}, 0.0, 0.0
    tx = adamw(group)
    state = tx.init(ours)
    for step in range(1, 5):
        g = rng.normal(size=p.shape)
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, ours, hyper={"lr": {group: 0.1}})
        ours = jax.tree.map(lambda a, b: a + b, ours, updates)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p * (1 - 0.1 * decay)
        p = p - 0.1 * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-10)
    np.testing.assert_allclose(ours["w"], p, atol=1e-6)


def test_adamw_keeps_moments_in_the_dtype_of_the_parameter():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    tx = adamw("wte")
    updates, state = tx.update(params, tx.init(params), params, hyper={"lr": {"wte": 0.1}})
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16
    assert updates["w"].dtype == jnp.float32


def test_every_parameter_has_exactly_one_group():
    cfg = GPTConfig.from_depth(MODEL, 70)
    params = param_shapes(cfg)
    found = labels(params)
    assert found["h_1"]["attn"]["ve_gate"]["kernel"] == "muon"
    assert found["wte"]["embedding"] == "wte" and found["value_embed_1"]["embedding"] == "value_embeds"
    assert found["smear_lambda"] == found["smear_gate"]["kernel"] == "smear"
    with pytest.raises(KeyError, match="newcomer"):
        labels(params | {"newcomer": jnp.zeros(3)})


def test_portable_state_goes_and_comes_back():
    cfg = GPTConfig.from_depth(MODEL, 70)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    tx, seen = make_optimizer("float32"), view(params, 8)
    hyper = Schedule(BaseConfig(), 10, cfg.n_embd).hyper(3)
    fresh = tx.init(seen)
    _, state = jax.jit(tx.update)(seen, fresh, seen, hyper=hyper)
    portable = to_portable(state, params)
    assert portable["h_0/attn/q/kernel"]["momentum"].shape == params["h_0"]["attn"]["q"]["kernel"].shape
    assert sum(len(moments) for moments in portable.values()) > len(portable)
    again = from_portable(portable, fresh, params, 8)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_base_schedule_follows_the_rules():
    s = Schedule(BaseConfig(warmup_steps=40), 1000, 768)
    assert s.lr_multiplier(0) == 1 / 40 and s.lr_multiplier(39) == 1.0 and s.lr_multiplier(350) == 1.0
    left = (1000 - 700) / 650
    assert s.lr_multiplier(700) == pytest.approx(left + (1 - left) * 0.05)
    assert s.momentum(0) == 0.85 and s.momentum(200) == pytest.approx(0.91)
    assert s.momentum(400) == pytest.approx(0.97 - 0.07 * 50 / 650)
    assert Schedule(BaseConfig(), 4000, 768).momentum(600) == 0.97
    assert s.momentum(999) == pytest.approx(0.97 - 0.07 * 649 / 650)
    decayed = Schedule(BaseConfig(), 1000, 768, weight_decay=0.4)
    assert decayed.decay(0) == pytest.approx(0.4) and decayed.decay(500) == pytest.approx(0.2)


def test_finetuning_schedules_follow_the_rules():
    mid = Schedule(Config().mid, 100, 768)
    assert mid.lr_multiplier(79) == 1.0 and mid.lr_multiplier(90) == pytest.approx(0.5)
    assert mid.momentum(0) == 0.85 and Schedule(Config().mid, 1000, 768).momentum(300) == 0.95
    sft = Schedule(Config().sft, 100, 768)
    assert sft.lr_multiplier(25) == pytest.approx(0.75) and sft.momentum(0) == sft.momentum(99) == 0.95
    assert sft.hyper(0)["lr"]["muon"] == pytest.approx(0.02 * 0.02)
    rl = Schedule(Config().rl, 100, 768)
    assert rl.hyper(0)["lr"]["value_embeds"] == pytest.approx(0.05 * 0.1)
    assert rl.hyper(0)["lr"]["lm_head"] == pytest.approx(0.05 * 0.004)
    assert rl.hyper(0)["weight_decay"] == 0
    assert Schedule(FinetuneConfig(), 10, 192).rates()["wte"] == pytest.approx(0.6)


def test_horizon_follows_from_depth():
    config = Config(model=ModelConfig(depth=6))
    cfg = GPTConfig.from_depth(config.model, 32768)
    counts, twelve = count_params(cfg), count_params(GPTConfig.from_depth(ModelConfig(depth=12), 32768))
    scaling = counts["blocks"] + counts["lm_head"]
    reference = 12 * (twelve["blocks"] + twelve["lm_head"])
    h = horizon(config, cfg)
    assert h.tokens == 12 * scaling
    assert h.batch_tokens == 2 ** round(math.log2(2**19 * (h.tokens / reference) ** 0.383))
    assert h.steps == h.tokens // h.batch_tokens
    assert h.lr_scale == pytest.approx(math.sqrt(h.batch_tokens / 2**19))
    assert h.weight_decay == pytest.approx(0.28 * h.lr_scale * reference / h.tokens)
    grouped = Config(model=ModelConfig(depth=16, n_kv_head=4))  # 4 does not divide depth 12's heads
    h = horizon(grouped, GPTConfig.from_depth(grouped.model, 32768))
    assert h.weight_decay == pytest.approx(0.28 * h.lr_scale * reference / h.tokens)
    twelve_config = Config()
    for ratio in (1e-9, 1e308):
        with pytest.raises(UserError, match=re.escape(f"--base.target-param-data-ratio {ratio:g} gives")):
            horizon(replace(config, base=replace(config.base, target_param_data_ratio=ratio)), cfg)
    assert horizon(twelve_config, GPTConfig.from_depth(twelve_config.model, 32768)).batch_tokens == 2**19


def test_the_rate_of_smear_is_not_scaled_with_the_batch():
    rates = Schedule(BaseConfig(), 10, 768, lr_scale=0.5).rates()
    assert rates["smear"] == 0.2 and rates["x0"] == 0.25 and rates["resid"] == 0.0025 and rates["muon"] == 0.01
