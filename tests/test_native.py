"""The kernels in C++: products against numpy, whole answers against those without them, what they refuse, the compiler."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.bench.decode import NoSpecials
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.model import init_params
from nanochat_jax.sharding import make_mesh

ONE = make_mesh("1")


@pytest.fixture(scope="module")
def cfg():
    """Rings of 33 and 96 slots; the vocabulary ends in the midst of a tile."""
    return GPTConfig.from_depth(ModelConfig(2, 48, 16, 3, 96, "SL"), 301)


@pytest.fixture(scope="module")
def params(cfg):
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda p: p + 0.15 * jax.random.normal(next(keys), p.shape), params)


@pytest.mark.parametrize("columns", [8, 16, 24, 32, 56, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (37, 5), (3, 100), (200, 33)])
def test_a_product_and_what_surrounds_it_equal_numpys(native, outputs, inputs, columns):
    random = np.random.default_rng(0)
    weight, x, plus = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((outputs, inputs), (inputs, columns), (outputs, columns))
    )
    exact = weight.astype(np.float64) @ x
    np.testing.assert_allclose(native.product(weight, x), exact, atol=1e-5 * np.sqrt(inputs))
    normed = exact / np.sqrt((x.astype(np.float64) ** 2).mean(axis=0) + 1e-6)
    got = native.product(jnp.asarray(weight), x, plus, normed=True, squared=True, eps=1e-6)
    np.testing.assert_allclose(got, np.maximum(normed, 0) ** 2 + plus, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [16, 48])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (37, 4), (3, 100), (200, 192)])
def test_products_of_integers_are_exact(native, outputs, inputs, columns):
    if not native.has_int8(inputs, columns):
        pytest.skip("this processor has no AVX-512 VNNI")
    random = np.random.default_rng(0)
    weight, x = (random.integers(-128, 128, size).astype(np.int8) for size in ((outputs, inputs), (inputs, columns)))
    weight[:, :2], x[:2] = 127, -128
    got = native.product_int8(jnp.asarray(weight), jnp.asarray(x))
    np.testing.assert_array_equal(got, weight.astype(np.int32) @ x.astype(np.int32))


def test_products_in_several_threads_at_once_do_not_mix(native):
    random = np.random.default_rng(0)
    weights = [random.normal(size=(256, 64)).astype(np.float32) for _ in range(16)]
    x = random.normal(size=(64, 16)).astype(np.float32)
    together = jax.jit(lambda weights, x: [native.product(weight, x) for weight in weights])
    for _ in range(20):
        for weight, y in zip(weights, together(weights, x), strict=True):
            np.testing.assert_allclose(y, weight @ x, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 8])
def test_answers_are_those_of_xla(native, cfg, params, samples):
    """Rows of several lengths that join and leave, past the end of a ring, in float32 token for token."""
    random = np.random.default_rng(0)
    lengths = (3, 20, 45) if samples > 1 else (3, 5, 20, 31, 32, 33, 34, 40, 45, 50, 60)
    prompts = [random.integers(cfg.vocab_size, size=length).tolist() for length in lengths]
    texts = []
    for native_too in (False, True):
        asked = replace(cfg, native=native_too)
        engine = Engine(params, asked, NoSpecials(), max_rows=16, mesh=ONE, samples=samples, max_new=40)
        answers = [
            engine.generate(prompts, SamplingParams(temperature=t, max_tokens=35, top_k=20, seed=5), samples=samples)
            for t in (0.0, 1.0)
        ]
        texts.append([[one.ids for one in some] for some in answers])
    assert texts[0] == texts[1]


def test_the_engine_uses_them_where_asked(native, cfg, params, monkeypatch):
    """Nothing else would notice if it did not."""
    called = []
    for name in ("product", "product_int8", "attention"):
        made = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, made=made, **k: called.append(name) or made(*a, **k))

    def calls(asked, quantize):
        called.clear()
        other = replace(cfg, native=asked, rope_base=777.0)  # not compiled before
        engine = Engine(params, other, NoSpecials(), max_rows=16, mesh=ONE, quantize=quantize)
        engine.generate([[1, 2, 3]] * 16, SamplingParams(max_tokens=3))
        return {name: called.count(name) for name in set(called)}

    layers = cfg.n_layer
    assert calls(False, "none") == {} == calls(False, "int8")
    assert calls(True, "none") == {"product": 4 * layers + 1, "attention": layers}
    integers = {"product_int8": 4 * layers} if native.has_int8(cfg.n_embd, 16) else {}
    assert calls(True, "int8") == {"product": 1, "attention": layers} | integers


@pytest.mark.parametrize(
    ("changed", "mesh", "said"),
    [
        ({"compute_dtype": "bfloat16"}, "1", "--compute-dtype bfloat16"),
        ({"head_dim": 24, "n_embd": 72}, "1", "--model.head-dim 24"),
        ({}, "data=2", "2 devices"),
    ],
)
def test_what_they_cannot_do_is_refused_in_one_line(cfg, params, changed, mesh, said):
    with pytest.raises(UserError, match=said) as caught:
        Engine(params, replace(cfg, native=True, **changed), NoSpecials(), max_rows=4, mesh=make_mesh(mesh))
    assert "leave out --native" in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_compiler_and_with_a_broken_one_one_line_says_so(native, cfg, params, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    asked = replace(cfg, native=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C.. compiler .CXX=no-such-compiler. is found"):
        Engine(params, asked, NoSpecials(), max_rows=4, mesh=ONE)
    monkeypatch.delenv("CXX")
    broken = tmp_path / "native.cc"
    broken.write_text("int main( {")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(UserError, match=r"cannot compile native.cc: .*error") as caught:
        Engine(params, asked, NoSpecials(), max_rows=4, mesh=ONE)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "nanochat_jax" / "native").iterdir())


def test_they_are_compiled_once(native, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in native.FLAGS))
    first = native._compiled()
    made = first.stat().st_mtime_ns
    assert native._compiled() == first and first.stat().st_mtime_ns == made
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    assert native._compiled() != first
