"""Generation's own forward pass: the logits of the trained model, through rings, shared prompts and int8."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import resolve
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.inference import decoding
from nanochat_jax.inference.decoding import Int8, empty_cache, logits_of, prepare, product, quantized, read, step
from nanochat_jax.inference.sampling import prefill, token_nats
from nanochat_jax.model import forward, init_params
from nanochat_jax.sharding import make_mesh
from nanochat_jax.train import eval_losses

advance = jax.jit(step, static_argnames="cfg")


@pytest.fixture(scope="module")
def cfg():
    """Four layers of which three keep a ring of 129 slots; two query heads share a key/value head."""
    return GPTConfig.from_depth(ModelConfig(4, 16, 16, 2, 300, "SSSL"), 100)


@pytest.fixture(params=["xla_blocked", "pallas_interpreted"])
def stepping(request, cfg):
    """The configuration that decodes: attention over the cache by XLA, or in a kernel."""
    return replace(cfg, attention=request.param)


@pytest.fixture(params=["xla_blocked", "pallas_interpreted", "native"])
def alone(request, cfg):
    """The same, and in C++ on one device."""
    if request.param != "native":
        return replace(cfg, attention=request.param)
    request.getfixturevalue("native")
    return replace(cfg, native=True)


@pytest.fixture(scope="module")
def params(cfg):
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda p: p + 0.15 * jax.random.normal(next(keys), p.shape), params)


@pytest.fixture(scope="module")
def tokens(cfg):
    return np.asarray(jax.random.randint(jax.random.key(2), (2, 300), 0, cfg.vocab_size))


@pytest.fixture(scope="module")
def expected(params, cfg, tokens):
    return np.asarray(jax.jit(forward, static_argnums=1)(params, cfg, tokens))


def test_reading_equals_the_full_forward(params, cfg, tokens, expected):
    weights = prepare(params, cfg)
    got = logits_of(weights, cfg, read(weights, cfg, jnp.asarray(tokens)).hidden_DPT)
    np.testing.assert_allclose(jnp.moveaxis(got, 0, -1), expected, atol=1e-4)


def filled(params, cfg, tokens, counts, cache, slots, *, shared=False):
    weights = prepare(params, cfg)
    most = max(counts)
    prompts = np.stack([np.where(np.arange(most) < n, row[:most], 0) for n, row in zip(counts, tokens, strict=True)])
    last = np.asarray([row[n] for n, row in zip(counts, tokens, strict=True)])
    source = np.repeat(np.arange(len(counts)), len(slots) // len(counts))
    place = np.arange(len(counts))
    return weights, prefill(
        weights, cache, prompts, np.asarray(counts), last, source, np.asarray(slots), place, cfg=cfg, shared=shared
    )


def test_a_model_that_trains_with_mosaic_reads_prompts_with_cudnn(params, cfg, tokens, monkeypatch):
    used = set()

    def attend(q, k, v, window, impl):
        used.add(impl)
        return q

    monkeypatch.setattr(decoding, "attend", attend)
    for impl in ("mosaic", "pallas"):
        jax.eval_shape(lambda impl=impl: read(prepare(params, cfg), replace(cfg, attention=impl), jnp.asarray(tokens)))
    assert used == {"cudnn", "pallas"}


def test_decoding_past_the_rings_end_equals_the_full_forward(params, cfg, alone, tokens, expected):
    """Prompts shorter and longer than a ring, in rows of a larger batch, decoded to the end of the context."""
    counts, slots = (40, 200), (2, 0)
    assert [panel["k"].shape[2] for panel in empty_cache(cfg, 1, 300)["own"]] == [129, 129, 129, 300]
    weights, cache = filled(params, cfg, tokens, counts, empty_cache(cfg, 3, 300), slots)
    active = np.asarray([True, False, True])
    for at in range(100):
        position = np.zeros(3, np.int32)
        token = np.zeros(3, np.int32)
        for i, slot in enumerate(slots):
            position[slot], token[slot] = counts[i] + at, tokens[i, counts[i] + at]
        logits_VB, cache = advance(weights, cache, token, position, np.zeros(3, np.int32), active, cfg=alone)
        for i, slot in enumerate(slots):
            np.testing.assert_allclose(logits_VB[:, slot], expected[i, counts[i] + at], atol=2e-4)


def test_a_row_fed_again_while_it_waits_is_as_if_fed_once(params, cfg, alone, tokens, expected):
    weights, cache = filled(params, cfg, tokens, (40, 200), empty_cache(cfg, 2, 300), (0, 1))
    position, first = np.asarray([40, 200]), np.zeros(2, np.int32)
    for active in (True, False, False):
        flags = np.asarray([True, active])
        token = tokens[[0, 1], position]
        logits_VB, cache = advance(weights, cache, token, position, first, flags, cfg=alone)
        np.testing.assert_allclose(logits_VB[:, 0], expected[0, position[0]], atol=2e-4)
        position[0] += 1
        position[1] += active
    logits_VB, _ = advance(weights, cache, tokens[[0, 1], position], position, first, np.ones(2, bool), cfg=alone)
    np.testing.assert_allclose(logits_VB[:, 1], expected[1, 201], atol=2e-4)


def test_rows_that_share_a_prompt_equal_rows_that_own_it(params, cfg, alone, tokens, expected):
    """Two prompts, one longer than the windows; each of its two rows goes on in its own way."""
    counts, first = (40, 200), np.asarray([40, 40, 200, 200])
    cache = empty_cache(cfg, 4, 64, prompts=2, prompt_length=256)
    assert cache["own"][0]["k"].shape[2] == 64 and cache["shared"][0]["k"].shape[:3] == (2, 2, 129)
    weights, cache = filled(params, cfg, tokens, counts, cache, (0, 1, 2, 3), shared=True)
    other = tokens.copy()
    other[:, 210:] = (tokens[:, 210:] + 1) % cfg.vocab_size
    other[0, 45:] = (tokens[0, 45:] + 1) % cfg.vocab_size
    full = jax.jit(forward, static_argnums=1)(params, cfg, other)
    for at in range(20):
        position = first + at
        token = np.asarray([tokens[0, 40 + at], other[0, 40 + at], tokens[1, 200 + at], other[1, 200 + at]])
        logits_VB, cache = advance(weights, cache, token, position, first, np.ones(4, bool), cfg=alone)
        for b, rows in enumerate((expected[0], full[0], expected[1], full[1])):
            np.testing.assert_allclose(logits_VB[:, b], rows[position[b]], atol=2e-4)


def test_int8_rounds_each_output_by_its_own_scale():
    weight = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    weight[3] *= 1000
    rounded = quantized(jnp.asarray(weight))
    assert rounded.values.dtype == jnp.int8
    error = np.abs(np.asarray(rounded.values) * np.asarray(rounded.scales)[:, None] - weight)
    assert (error <= np.abs(weight).max(axis=1, keepdims=True) / 254 * 1.001).all()


@pytest.mark.parametrize("columns", [(1,), (5,), (3, 4)])
def test_int8_products_are_near_and_in_the_shape_of_the_exact_ones(columns):
    random = np.random.default_rng(1)
    weight = jnp.asarray(random.normal(size=(6, 32)).astype(np.float32))
    x = jnp.asarray(random.normal(size=(32, *columns)).astype(np.float32))
    exact, near = product(weight, x), product(quantized(weight), x)
    assert near.shape == exact.shape == (6, *columns) and near.dtype == x.dtype
    assert 0 < jnp.abs(near - exact).max() < 0.03 * jnp.abs(exact).max() + 0.1


def test_int8_weights_are_the_layers_matrices_and_cost_little(params, cfg, tokenizer):
    cfg = GPTConfig.from_depth(ModelConfig(2, 32, 16, None, 64), tokenizer.vocab_size)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    noisy = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(3), p.shape), params)
    whole, rounded = prepare(noisy, cfg), prepare(noisy, cfg, "int8")
    assert {name for name, leaf in rounded["h_0"].items() if isinstance(leaf, Int8)} == {"qkv", "out", "fc", "down"}
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (2, 65), 0, cfg.vocab_size))
    inputs, targets = tokens[:, :-1], np.where(np.arange(64) % 7, tokens[:, 1:], -1)
    trained = eval_losses(noisy, inputs, targets, cfg=cfg)
    exact, near = (token_nats(weights, inputs, targets, cfg=cfg) for weights in (whole, rounded))
    np.testing.assert_allclose(exact, trained, atol=1e-4)
    assert 0 < abs(float(near.sum() - exact.sum())) < 0.01 * float(exact.sum())


def test_a_kernel_no_gpu_has_checked_is_not_chosen_by_itself(cfg):
    def chosen(asked, dtype, width=128):
        attention = resolve(asked, "gpu", dtype, "9.0", width, 13000)
        return decoding.has_kernel(replace(cfg, attention=attention, compute_dtype=dtype, head_dim=width))

    assert not chosen("auto", "bfloat16") and not chosen("auto", "float32") and not chosen("cudnn", "bfloat16")
    assert chosen("pallas", "bfloat16") and not chosen("pallas", "bfloat16", 96)


@pytest.mark.parametrize("spec", ["data=2,tensor=2", "fsdp=4"])
def test_rows_and_heads_over_a_mesh_decode_to_the_same_logits(params, cfg, stepping, tokens, expected, spec):
    first, active = np.zeros(4, np.int32), np.ones(4, bool)
    position = np.asarray([40, 200, 40, 200])
    _, cache = filled(params, cfg, tokens, (40, 200), empty_cache(cfg, 4, 300), (0, 2, 1, 3))
    with jax.set_mesh(make_mesh(spec)):
        weights = prepare(params, cfg)
        for at in range(3):
            token = tokens[[0, 1, 0, 1], position + at]
            logits_VB, cache = advance(weights, cache, token, position + at, first, active, cfg=stepping)
            for b in range(4):
                np.testing.assert_allclose(logits_VB[:, b], expected[b % 2, position[b] + at], atol=2e-4)


@pytest.mark.parametrize("spec", ["data=2,tensor=2", "fsdp=2,tensor=2"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_heads_and_rows_over_a_mesh_give_the_same_logits(params, cfg, tokens, expected, spec, quantize):
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        weights = prepare(params, cfg, quantize)
    fc = weights["h_0"]["fc"].values if quantize == "int8" else weights["h_0"]["fc"]
    assert fc.sharding.shard_shape(fc.shape)[0] == fc.shape[0] // 2
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(read, cfg=cfg))
        got = logits_of(weights, cfg, run(weights, tokens_PT=jnp.asarray(tokens)).hidden_DPT)
    want = expected
    if quantize == "int8":
        alone = prepare(params, cfg, quantize)
        want = jnp.moveaxis(logits_of(alone, cfg, read(alone, cfg, jnp.asarray(tokens)).hidden_DPT), 0, -1)
    np.testing.assert_allclose(jnp.moveaxis(got, 0, -1), want, atol=1e-4 if quantize == "none" else 0.3)
