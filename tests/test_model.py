"""The model against what it must be: causal, equal with and without cache, gradients where they belong, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention, cuda_version, resolve
from nanochat_jax import model as gpt
from nanochat_jax.config import GPTConfig, ModelConfig, windows
from nanochat_jax.errors import UserError
from nanochat_jax.model import count_params, flops_per_token, param_shapes

# Compiled as a whole: op by op, a forward pass takes seconds.
forward = jax.jit(gpt.forward, static_argnums=1)
logits_of = jax.jit(gpt.logits_of, static_argnums=1)
init_params = jax.jit(gpt.init_params, static_argnums=0)

MODEL = ModelConfig(depth=3, aspect_ratio=16, head_dim=16, n_kv_head=1, sequence_len=256, window_pattern="SL")
CFG = GPTConfig.from_depth(MODEL, 100)


@pytest.fixture(scope="module")
def params():
    """Parameters with every zero replaced by noise, so that each part of the model matters."""
    fresh = init_params(CFG, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), fresh)


def transcription(params, cfg, tokens):
    """MODEL's mathematics for one row, in float64 NumPy, position by position where that is clearer."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def rms(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    length = len(tokens)
    e = rms(p["wte"]["embedding"][tokens])
    x = e.copy()
    for t in range(1, length):
        x[t] = e[t] + p["smear_lambda"][0] * sigmoid(e[t, :24] @ p["smear_gate"]["kernel"])[0] * e[t - 1]
    x0, middle = x, None
    for i in range(cfg.n_layer):
        x = p["resid_lambda"][i] * x + p["x0_lambda"][i] * x0
        block, h = p[f"h_{i}"], rms(x)
        q = (h @ block["attn"]["q"]["kernel"]).reshape(length, cfg.n_head, cfg.head_dim)
        k = (h @ block["attn"]["k"]["kernel"]).reshape(length, cfg.n_kv_head, cfg.head_dim)
        v = (h @ block["attn"]["v"]["kernel"]).reshape(length, cfg.n_kv_head, cfg.head_dim)
        if i % 2 == (cfg.n_layer - 1) % 2:
            gate = 3 * sigmoid(h[:, :12] @ block["attn"]["ve_gate"]["kernel"])
            v = v + gate[:, :, None] * p[f"value_embed_{i}"]["embedding"][tokens].reshape(v.shape)
        half = cfg.head_dim // 2
        angle = np.arange(length)[:, None] / 100000 ** (2 * np.arange(half) / cfg.head_dim)[None]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def rotate(y, cos=cos, sin=sin, half=half):
            a, b = y[..., :half], y[..., half:]
            return np.concatenate([a * cos + b * sin, -a * sin + b * cos], -1)

        q, k = 1.2 * rms(rotate(q)), 1.2 * rms(rotate(k))
        out = np.zeros_like(q)
        for n in range(cfg.n_head):
            kv = n // (cfg.n_head // cfg.n_kv_head)
            for t in range(length):
                first = max(0, t - cfg.windows[i])
                score = k[first : t + 1, kv] @ q[t, n] / np.sqrt(cfg.head_dim)
                weight = np.exp(score - score.max())
                out[t, n] = (weight / weight.sum()) @ v[first : t + 1, kv]
        x = x + out.reshape(length, -1) @ block["attn"]["proj"]["kernel"]
        x = x + np.maximum(rms(x) @ block["mlp"]["fc"]["kernel"], 0) ** 2 @ block["mlp"]["proj"]["kernel"]
        if i == cfg.n_layer // 2:
            middle = x
    x = rms(x - p["backout_lambda"][0] * middle)
    return 15 * np.tanh((x @ p["lm_head"]["kernel"])[:, : cfg.vocab_size] / 15)


def test_logits_equal_the_mathematics(params):
    tokens = np.random.default_rng(0).integers(0, 100, 200)
    expected = transcription(params, CFG, tokens)
    got = np.asarray(forward(params, CFG, jnp.asarray(tokens)[None]))[0]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_implementations_of_attention_agree():
    keys = jax.random.split(jax.random.key(3), 3)
    for length, window, kv in ((130, 40, 2), (256, 128, 4), (96, 96, 1), (64, 0, 2)):
        q = jax.random.normal(keys[0], (2, length, 4, 8))
        k, v = (jax.random.normal(key, (2, length, kv, 8)) for key in keys[1:])

        def loss(qkv, impl, window=window):
            return jnp.sum(jnp.sin(attention(*qkv, window=window, impl=impl)))

        both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        a, grad_a = both((q, k, v), "reference")
        b, grad_b = both((q, k, v), "xla_blocked")
        np.testing.assert_allclose(a, b, rtol=1e-4)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grad_a, grad_b)


@pytest.mark.parametrize("length", [32, 64, 100])
def test_blocked_attention_in_16_bits_on_rows_of_any_length(length):
    """Rows of one block too, of which XLA once could not make the gradients on a CPU."""
    keys = jax.random.split(jax.random.key(3), 3)
    qkv = tuple(jax.random.normal(key, (1, length, 2, 16), jnp.bfloat16) for key in keys)

    def gradients(qkv, impl):
        return jax.grad(lambda qkv: jnp.sum(jnp.sin(attention(*qkv, window=128, impl=impl).astype(jnp.float32))))(qkv)

    exact = gradients(tuple(x.astype(jnp.float32) for x in qkv), "reference")
    for a, b in zip(exact, jax.jit(gradients, static_argnums=1)(qkv, "xla_blocked"), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a, b.astype(jnp.float32), atol=0.03)


def test_attention_that_cannot_run_is_an_error():
    assert resolve("auto", "cpu", "float32") == "xla_blocked"
    assert resolve("auto", "gpu", "bfloat16", "9.0", 256) == resolve("auto", "gpu", "float16", "8.0") == "cudnn"
    assert resolve("auto", "gpu", "bfloat16", "9.0", cuda=13000) == "mosaic"
    assert resolve("auto", "gpu", "float32", "9.0", cuda=13000) == resolve("auto", "gpu", "float32", "8.6") == "pallas"
    assert resolve("auto", "gpu", "float32", "7.5") == resolve("auto", "gpu", "float32", "gfx90a") == "xla_blocked"
    for cuda in (0, 12080, 12090):  # none known; two whose assembler gets causal masks wrong
        assert resolve("auto", "gpu", "bfloat16", "9.0", cuda=cuda) == "cudnn"
        with pytest.raises(ValueError, match=rf"needs .* CUDA 13, .* CUDA {cuda / 1000:.2f}, .*requirements-cuda13"):
            resolve("mosaic", "gpu", "bfloat16", "9.0", cuda=cuda)
    versions = ("PJRT C API\ncuda 13000\n", "cuda 12090", "rocm 60200", "cpu")
    assert [cuda_version(text) for text in versions] == [13000, 12090, 0, 0]
    for capability, width in (("7.5", 128), ("8.9", 256), ("9.0", 12), ("gfx90a", 128)):
        assert resolve("auto", "gpu", "bfloat16", capability, width) == "xla_blocked"
        with pytest.raises(ValueError, match=f"multiple of 8, at most .* {capability}, bfloat16, {width};"):
            resolve("cudnn", "gpu", "bfloat16", capability, width)
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        resolve("cudnn", "cpu", "float32")
    with pytest.raises(ValueError, match="unknown"):
        resolve("flash9", "cpu", "float32")


def test_causal_by_gradient(params):
    """The logits at t depend on no later input and, through the full layer, on the first one."""
    tokens = jax.random.randint(jax.random.key(5), (1, 24), 0, 100)

    def at(table, t):
        return jnp.sum(forward({**params, "wte": {"embedding": table}}, CFG, tokens)[0, t] ** 2)

    # Tokens differ from each other, so a row of the table stands for one position.
    tokens = jnp.asarray(np.random.default_rng(1).permutation(100)[:24])[None]
    grad = jax.jit(jax.grad(at), static_argnums=1)(params["wte"]["embedding"], 10)
    touched = np.abs(np.asarray(grad)).sum(-1)[np.asarray(tokens)[0]]
    assert (touched[:11] > 0).all()
    assert (touched[11:] == 0).all()


def test_padding_rows_are_never_predicted(params):
    assert CFG.padded_vocab_size == 128
    assert forward(params, CFG, jnp.zeros((1, 4), jnp.int32)).shape == (1, 4, 100)


def test_a_token_beyond_the_table_is_no_number():
    rows = np.asarray(gpt.rows_of(jnp.ones((4, 3)), jnp.asarray([[3, 4]])))
    assert (rows[0, 0] == 1).all() and np.isnan(rows[0, 1]).all()


def test_too_long_is_an_error(params):
    with pytest.raises(ValueError, match="2560"):
        forward(params, CFG, jnp.zeros((1, 2561), jnp.int32))


def test_initial_values():
    cfg = GPTConfig.from_depth(ModelConfig(depth=2, aspect_ratio=64, head_dim=64), 1000)
    p = init_params(cfg, jax.random.key(0))
    s = (3 / cfg.n_embd) ** 0.5
    assert np.std(p["wte"]["embedding"]) == pytest.approx(0.8, rel=0.02)
    assert np.std(p["lm_head"]["kernel"]) == pytest.approx(0.001, rel=0.02)
    for name, bound in (("q", s), ("k", s), ("v", s)):
        w = np.asarray(p["h_0"]["attn"][name]["kernel"])
        assert np.abs(w).max() == pytest.approx(bound, rel=0.02) and abs(w.mean()) < 0.02 * bound
    assert np.abs(p["h_1"]["mlp"]["fc"]["kernel"]).max() == pytest.approx(0.4 * s, rel=0.02)
    assert not np.any(p["h_0"]["attn"]["proj"]["kernel"]) and not np.any(p["h_0"]["mlp"]["proj"]["kernel"])
    gate = np.asarray(p["smear_gate"]["kernel"])
    assert gate.min() >= 0 and gate.max() <= 0.02
    np.testing.assert_allclose(p["resid_lambda"], [1.15, 1.05], rtol=1e-6)
    np.testing.assert_allclose(p["x0_lambda"], [0.20, 0.05], rtol=1e-6)
    assert p["smear_lambda"][0] == 0 and p["backout_lambda"][0] == pytest.approx(0.2)


def test_a_parameter_keeps_its_value_when_others_come_and_go():
    deep = init_params(dataclasses.replace(CFG, n_layer=5, windows=(256,) * 5), jax.random.key(0))
    shallow = init_params(dataclasses.replace(CFG, n_layer=3, windows=(256,) * 3), jax.random.key(0))
    np.testing.assert_array_equal(deep["h_2"]["attn"]["q"]["kernel"], shallow["h_2"]["attn"]["q"]["kernel"])
    np.testing.assert_array_equal(deep["wte"]["embedding"], shallow["wte"]["embedding"])


def test_sizes_follow_from_depth():
    cfg = GPTConfig.from_depth(ModelConfig(depth=12), 32768)
    assert (cfg.n_embd, cfg.n_head, cfg.n_kv_head) == (768, 6, 6)
    assert cfg.windows[:4] == (512, 512, 512, 2048) and cfg.windows[-1] == 2048
    counts = count_params(cfg)
    assert counts["wte"] == counts["lm_head"] == 32768 * 768
    assert counts["value_embeds"] == 6 * 32768 * 768
    assert counts["blocks"] == 12 * 12 * 768**2 + 6 * 12 * 6
    assert counts["total"] == sum(leaf.size for leaf in jax.tree.leaves(param_shapes(cfg)))
    keys = 9 * 512 + 3 * 2048
    assert flops_per_token(cfg) == 6 * (counts["blocks"] + counts["lm_head"] + 24) + 12 * 768 * keys
    assert windows("SSSL", 6, 300) == (128, 128, 128, 300, 128, 300)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (ModelConfig(depth=0), "depth"),
        (ModelConfig(depth=12, n_kv_head=4), "n-kv-head"),
        (ModelConfig(window_pattern="SX"), "window-pattern"),
    ],
)
def test_impossible_sizes_are_one_clear_line(model, word):
    with pytest.raises(UserError, match=word) as error:
        GPTConfig.from_depth(model, 100)
    assert "\n" not in str(error.value)
