"""The kernels in C++: products against numpy, whole answers against those without them, what they refuse, the compiler."""

import functools
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.bench.decode import NoSpecials
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.decoding import empty_cache, layer_product, over_cache, prepare, quantized, read
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.inference.sampling import prefill
from nanochat_jax.model import init_params, rope
from nanochat_jax.sharding import make_mesh

ONE = make_mesh("1")


@pytest.fixture(scope="module")
def cfg():
    """Rings of 33 and 96 slots; the vocabulary ends in the midst of a tile."""
    return replace(GPTConfig.from_depth(ModelConfig(2, 48, 16, 3, 96, "SL"), 301), windows=(32, 96))


@pytest.fixture(scope="module")
def params(cfg):
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda p: p + 0.15 * jax.random.normal(next(keys), p.shape), params)


def needs(native, kind):
    """Skips where the product of such weights is XLA's."""
    if kind == "int8" and not native.load().has_int8:
        pytest.skip("this processor has no AVX-512 VNNI")


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 8, 15, 16, 17, 32, 56, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (16, 5), (48, 100), (208, 33)])
def test_a_product_and_what_surrounds_it_equal_numpys(native, outputs, inputs, columns):
    random = np.random.default_rng(0)
    weight, x, plus = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((outputs, inputs), (inputs, columns), (outputs, columns))
    )
    packed = native.packed(jnp.asarray(weight))
    exact = weight.astype(np.float64) @ x
    np.testing.assert_allclose(native.product(packed, x), exact, atol=1e-5 * np.sqrt(inputs))
    x[:, -1], exact[:, -1] = 0, 0  # where only eps is left
    normed = exact / np.sqrt((x.astype(np.float64) ** 2).mean(axis=0) + 1e-6)
    got = native.product(packed, x, plus, normed=True, squared=True, eps=1e-6)
    np.testing.assert_allclose(got, np.maximum(normed, 0) ** 2 + plus, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 8, 16, 17, 48, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (16, 4), (48, 100), (208, 192)])
def test_products_of_integers_are_exact(native, outputs, inputs, columns):
    needs(native, "int8")
    random = np.random.default_rng(0)
    weight = random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    x = random.integers(-127, 128, (inputs, columns)).astype(np.float32)
    x[0], weight[:, :2] = 127, -128  # so that a column is not divided
    plus = random.integers(-9, 9, (outputs, columns)).astype(np.float32)
    scales = 2.0 ** random.integers(-3, 4, outputs).astype(np.float32)
    got = native.product(native.packed(jnp.asarray(weight)), x, plus, jnp.asarray(scales))
    exact = weight.astype(np.int64) @ x.astype(np.int64)
    np.testing.assert_array_equal(got, (exact * scales[:, None] + plus).astype(np.float32))


@pytest.mark.parametrize("columns", [1, 16, 40])
def test_products_in_8_bits_are_those_of_xla(native, columns):
    needs(native, "int8")
    random = np.random.default_rng(0)
    rounded = quantized(jnp.asarray(random.normal(size=(64, 48)), jnp.float32))
    whole = random.integers(-126, 127, (48, columns))
    whole[0] = 127
    x = jnp.asarray(
        (whole + random.uniform(-0.4, 0.4, whole.shape)) * (whole < 127) + 127 * (whole == 127), jnp.float32
    )
    packed = rounded._replace(values=native.packed(rounded.values))
    for how in ({}, {"normed": True, "squared": True}):
        want = layer_product(rounded, x / 64, **how)
        np.testing.assert_allclose(layer_product(packed, x / 64, **how), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("lengths", [(70, 0, 33, 1), (0, 64, 0, 70), (0, 0, 0, 0)])
def test_of_prompts_what_is_real_is_computed_and_little_else(native, lengths, kind):
    """Prompts whose ends lie within a panel; of the rest at most what shares a panel with them."""
    needs(native, kind)
    random, longest = np.random.default_rng(0), 70
    weight = jnp.asarray(random.normal(size=(32, 48)) * 9, kind)
    scales = jnp.ones(32) if kind == "int8" else None
    x = jnp.asarray(random.normal(size=(48, len(lengths) * longest)), jnp.float32)
    real = (np.arange(longest)[None] < np.asarray(lengths)[:, None]).reshape(-1)
    near = np.convolve(real, np.ones(2 * 32 + 1), "same") > 0  # 32: the widest panel
    plus = random.normal(size=(32, x.shape[1])).astype(np.float32)
    # So that it is seen where something is computed: what was in memory before is not like it.
    plus[:, ~near] = marker = np.float32(np.random.default_rng().uniform(1e30, 1e31))
    product = functools.partial(native.product, native.packed(weight), x, scales_O=scales, normed=True, eps=1e-6)
    whole = np.asarray(product(np.where(near, plus, 0)))
    part = np.asarray(product(plus, lengths_P=jnp.asarray(lengths)))
    np.testing.assert_array_equal(part[:, real], whole[:, real])
    assert not (part[:, ~near] == marker).any()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_numbers_that_are_none_are_not_hidden(native, kind):
    needs(native, kind)
    x = jnp.ones((4, 16)).at[2, 3].set(jnp.nan).at[1, 5].set(jnp.inf)
    scales = jnp.ones(16) if kind == "int8" else None
    y = native.product(native.packed(jnp.ones((16, 4), kind)), x, None, scales, squared=True)
    assert not np.isfinite(y[:, (3, 5)]).any() and np.isfinite(np.delete(y, (3, 5), axis=1)).all()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_column_is_the_same_among_any_number_of_others(native, kind):
    needs(native, kind)
    random = np.random.default_rng(0)
    weight = jnp.asarray(random.normal(size=(48, 100)) * 9, kind)
    scales = jnp.asarray(random.uniform(size=48), jnp.float32) if kind == "int8" else None
    x = jnp.asarray(random.normal(size=(100, 70)), jnp.float32)

    def asked(x):
        return np.asarray(native.product(native.packed(weight), x, None, scales, normed=True, eps=1e-6))

    alone = asked(x[:, :1])
    for columns in (2, 3, 4, 8, 16, 17, 70):
        np.testing.assert_array_equal(asked(x[:, :columns])[:, :1], alone)


@pytest.mark.parametrize("heads", [(1, 1, 16), (2, 3, 112), (1, 2, 144)])
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("slots", [21, 30])
def test_attention_over_the_cache_is_that_of_xla(native, heads, together, slots):
    """Rows before and past the end of their ring, with a window, without and with prompts that rows share."""
    kv_heads, per_kv, width = heads
    cfg = GPTConfig.from_depth(ModelConfig(1, width * kv_heads * per_kv, width, kv_heads, 96, "L"), 64)
    cfg = replace(cfg, windows=(20,))
    random, rows = np.random.default_rng(0), 6
    positions = jnp.asarray([0, 3, 20, 21, 40, 77] if together == 1 else [30, 31, 45, 5, 6, 7])
    first = jnp.zeros(rows, int) if together == 1 else jnp.asarray([30] * 3 + [5] * 3)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    own = {name: normal(rows, kv_heads, slots, width) for name in ("k", "v")}
    shared = None if together == 1 else {name: normal(2, kv_heads, slots, width) for name in ("k", "v")}
    given = normal(kv_heads, per_kv + 2, width, rows), normal(kv_heads, width, rows), own, shared
    given += *rope(positions, width, 100.0, jnp.float32), positions, first
    asked = (replace(cfg, native=native) for native in (False, True))
    want, got = (
        jax.jit(over_cache, static_argnums=(7, 8))(*given[:4], given[4:6], *given[6:], cfg, 0) for cfg in asked
    )
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)


@pytest.mark.parametrize("together", [1, 2])
def test_attention_finds_its_rows_in_the_whole_cache_and_leaves_the_others(native, together):
    """Rows in no order, some with a shared prompt; of the last two columns nothing is computed."""
    cfg = GPTConfig.from_depth(ModelConfig(1, 32, 16, 2, 96, "L"), 64)
    random, slots, running = np.random.default_rng(0), np.array([4, 1, 7, 2, 0]), 3
    positions, first = np.array([30, 9, 12, 0, 5]), np.array([6, 6, 6, 0, 5]) * (together > 1)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def attended(qkv, own, shared, positions, first, *where):
        tables = rope(jnp.asarray(positions), 16, 100.0, jnp.float32)
        given = qkv, None, own, shared, tables, jnp.asarray(positions), jnp.asarray(first)
        return over_cache(*given, replace(cfg, native=bool(where)), 0, *map(jnp.asarray, where))

    qkv, own = normal(2, 3, 16, 5), {name: normal(8, 2, 40, 16) for name in ("k", "v")}
    shared = {name: normal(8 // together, 2, 40, 16) for name in ("k", "v")} if together > 1 else None
    y, new = attended(qkv, own, shared, positions, first, slots, running)
    for column, slot in enumerate(slots):
        mine = jax.tree.map(lambda x, slot=slot: x[slot : slot + 1], own)
        prompt = jax.tree.map(lambda x, slot=slot: x[slot // together][None], shared)
        row = slice(column, column + 1)
        want, kept = attended(qkv[..., row], mine, prompt, positions[row], first[row])
        if column < running:
            np.testing.assert_allclose(y[row], want, atol=2e-5)
            np.testing.assert_allclose(new["k"][slot], kept["k"][0], atol=2e-5)
    others = np.delete(np.arange(8), slots[:running])
    for name in ("k", "v"):
        np.testing.assert_array_equal(new[name][others], own[name][others])


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(("longest", "lengths"), [(4, (4, 3)), (3, (0, 2)), (5, (5, 0, 1)), (1, (1,) * 15)])
def test_prompts_of_fewer_tokens_than_a_vector_has_lanes(native, kind, longest, lengths):
    needs(native, kind)
    random = np.random.default_rng(0)
    weight, x = (random.integers(-9, 9, shape).astype(np.float32) for shape in ((48, 8), (8, len(lengths) * longest)))
    x[0] = 127  # rounding to 8 bits then leaves integers as they are
    scales = None if kind == "float32" else jnp.ones(48)
    packed = native.packed(jnp.asarray(weight.astype(kind)))
    got = native.product(packed, jnp.asarray(x), None, scales, jnp.asarray(lengths, jnp.int32))
    real = (np.arange(longest) < np.asarray(lengths)[:, None]).reshape(-1)
    np.testing.assert_array_equal(np.asarray(got)[:, real], (weight @ x)[:, real])


def test_of_prompts_without_a_token_nothing_is_computed(native):
    """Not even where there are fewer columns than a vector has."""
    packed = native.packed(jnp.ones((16, 4)))
    assert native.product(packed, jnp.ones((4, 6)), None, None, jnp.zeros(2, jnp.int32)).shape == (16, 6)


@pytest.mark.parametrize("longer", [(5, 17, 23), (4, 5, 9, 12, 17, 20, 23)])
def test_rows_that_go_on_come_first_and_say_what_they_say_alone(native, cfg, params, monkeypatch, longer):
    """Of 24 rows 3, or 7, for which as many are decoded as there are, wherever they are in the cache: those behind them
    are not computed.
    """
    options = {"mesh": ONE, "logprobs": True}
    engines = [Engine(params, replace(cfg, native=True), NoSpecials(), max_rows=n, **options) for n in (24, 1)]
    prompts = [[i + 1] for i in range(24)]
    lengths = (60 if i in longer else 2 for i in range(24))
    how = [SamplingParams(max_tokens=n, seed=i, repetition_penalty=1.5) for i, n in enumerate(lengths)]
    decoded, host_rows = [], engines[0]._host_rows
    monkeypatch.setattr(engines[0], "_host_rows", lambda: decoded.append(host_rows()) or decoded[-1])
    answers = engines[0].generate(prompts, how)
    owners, rows = decoded[-1]
    slots = rows.by_name()["slot"].tolist()
    assert sorted(owners) == [*range(len(longer))] and slots[: len(longer)] == [*longer]
    assert len(set(slots)) == len(slots) == (4 if len(longer) == 3 else 24)
    for i in longer:
        (alone,) = engines[1].generate(prompts[i : i + 1], how[i])
        assert answers[i].ids == alone.ids
        np.testing.assert_allclose(answers[i].logprobs, alone.logprobs, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize(("vocabulary", "count"), [(300, 50), (301, 1), (1000, 20), (20, 20)])
def test_the_best_are_those_of_xla_in_their_order(native, vocabulary, count, rows):
    """Rounded logits, so that many are equal, and some that are no number, or infinite."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(vocabulary, rows)).round(1)
    places = random.integers(vocabulary, size=4), random.integers(rows, size=4)
    logits[places] = np.nan, -np.nan, np.inf, -np.inf
    logits = jnp.asarray(logits, jnp.float32)
    for got, want in zip(native.top(logits, count), jax.lax.top_k(logits.T, count), strict=True):
        np.testing.assert_array_equal(got, want)


def test_random_numbers_are_those_of_jax(native):
    def drawn(seed, at, impl):
        key = jax.random.fold_in(jax.random.key(seed, impl=impl), at)
        return jax.random.gumbel(key, (7,)), jax.random.bits(jax.random.split(key, (2,))[1], (3, 5))

    seeds, places = jnp.array([0, 1, -5, 2**31 - 1]), jnp.array([0, 77, 2**31 - 1, 3])
    both = [
        jax.jit(jax.vmap(lambda s, at, impl=impl: drawn(s, at, impl)))(seeds, places)
        for impl in (None, native.random())
    ]
    for want, got in zip(*both, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("length", [1, 16, 50, 96])
def test_reading_prompts_is_that_of_xla(native, cfg, params, length):
    """Of a length that is not a multiple of a vector's, past a window of the attention, several at once."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(cfg.vocab_size, size=(3, length)))
    want, got = (
        jax.jit(read, static_argnums=1)(prepare(params, asked), asked, tokens)
        for asked in (cfg, replace(cfg, native=True))
    )
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-4)


@pytest.mark.parametrize("longest", [96, 75])
def test_prompts_of_several_lengths_fill_the_cache_as_in_xla(native, cfg, params, longest):
    """None, less than a ring, more than one; a prompt for two rows, and one for none."""
    lengths, source, slots = (0, 1, 20, 75, longest), (2, 0, 4, 3, 2, 1), (3, 0, 5, 1, 4, 6)
    random = np.random.default_rng(0)
    tokens = random.integers(cfg.vocab_size, size=(len(lengths), longest))
    caches = []
    for asked in (cfg, replace(cfg, native=True)):
        empty = jax.tree.map(lambda x: jnp.full_like(x, 7), empty_cache(asked, 6, 96))
        arrays = tokens, lengths, [5] * len(lengths), source, slots, [0] * len(lengths)
        given = (jnp.asarray(array, jnp.int32) for array in arrays)
        caches.append(prefill(prepare(params, asked), empty, *given, cfg=asked, shared=False))
    want, got = caches
    for name in ("prev", "seen"):
        np.testing.assert_allclose(got[name], want[name], atol=2e-4)
    for ours, theirs in zip(got["own"], want["own"], strict=True):
        for name in ("k", "v"):
            ring = ours[name].shape[2]
            for prompt, slot in zip(source, slots, strict=True):
                if slot < 6:
                    held = np.arange(max(0, lengths[prompt] - ring), lengths[prompt]) % ring
                    np.testing.assert_allclose(ours[name][slot, :, held], theirs[name][slot, :, held], atol=2e-4)
                    rest = np.delete(ours[name][slot], held, axis=1)
                    assert (rest == 7).all()  # nothing else is touched
            assert (ours[name][2] == 7).all()


def test_products_in_several_threads_at_once_do_not_mix(native):
    random = np.random.default_rng(0)
    weights = [random.normal(size=(256, 64)).astype(np.float32) for _ in range(16)]
    x = random.normal(size=(64, 16)).astype(np.float32)
    together = jax.jit(lambda weights, x: [native.product(native.packed(weight), x) for weight in weights])
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


def test_prompts_of_like_lengths_are_read_together(native, cfg, params):
    prompts = [list(range(length)) for length in (40, 300, 250, 90, 20)]

    def prefills(**options):
        asked = replace(cfg, native=options.pop("native", True))
        engine = Engine(params, asked, NoSpecials(), max_rows=8, mesh=ONE, max_len=400, **options)
        engine.generate(prompts, SamplingParams(max_tokens=1))
        return {name[1] for name in engine.compiled if name[0] == "prefill"}

    assert prefills() == {(2, 384), (4, 128)}  # up to 1,024 padded tokens at once
    alone = {(1, length) for length in (32, 64, 128, 256, 384)}
    assert prefills(native=False) == prefills(quantize="int8") == prefills(lone_prompts=True) == alone


def test_the_engine_uses_them_where_asked(native, cfg, params, monkeypatch):
    """Nothing else would notice if it did not."""
    called = []
    for name in ("product", "attention", "prompt_attention", "filled", "top", "random"):
        made = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, made=made, **k: called.append(name) or made(*a, **k))

    def calls(asked, quantize="none"):
        called.clear()
        other = replace(cfg, native=asked, rope_base=777.0)  # not compiled before
        engine = Engine(params, other, NoSpecials(), max_rows=16, mesh=ONE, quantize=quantize)
        engine.generate([[1, 2, 3]] * 16, SamplingParams(max_tokens=3, top_k=5))
        assert ("kernels in C++" in engine.describe()) == bool(called)
        assert ("while part of it is in use" in engine.describe()) == (not called and quantize == "none")  # a copy
        assert not called or len(engine.reaches) == 1  # they read no slots that no row has reached
        return {name: called.count(name) for name in set(called)}

    layers = cfg.n_layer
    each = {"attention": layers, "prompt_attention": layers, "filled": 2 * layers, "top": 1, "random": 1}
    assert calls(False) == {} == calls(False, "int8")
    assert calls(True) == each | {"product": 8 * layers + 1}  # of prompts, and of a step
    cfg = replace(cfg, qk_scale=1.1)
    assert calls(None) == each | {"product": 8 * layers + 1}
    assert calls(True, "int8") == each | {"product": (8 * layers if native.load().has_int8 else 0) + 1}


@pytest.mark.parametrize(("dtype", "mesh"), [("bfloat16", "1"), ("float32", "data=2")])
def test_left_to_the_engine_they_are_not_used_where_they_cannot_be(cfg, params, dtype, mesh):
    asked = replace(cfg, native=None, compute_dtype=dtype)
    engine = Engine(params, asked, NoSpecials(), max_rows=4, mesh=make_mesh(mesh))
    assert engine.cfg.native is False and "C++" not in engine.describe()


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
    assert "leave it at auto, or off" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def compiling(native, monkeypatch, tmp_path):
    """The module as if nothing had been compiled yet, with a folder of its own for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_loaded", native._loaded.__wrapped__)
    return native


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_is_missing_or_fails_is_told_in_one_line(compiling, cfg, params, monkeypatch, tmp_path):
    def told(*said):
        with pytest.raises(UserError) as caught:
            Engine(params, replace(cfg, native=True), NoSpecials(), max_rows=4, mesh=ONE)
        assert "\n" not in str(caught.value) and all(words in str(caught.value) for words in said), caught.value
        engine = Engine(params, replace(cfg, native=None), NoSpecials(), max_rows=4, mesh=ONE)  # goes on without
        assert engine.cfg.native is False and said[0] in engine.describe()

    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    told("no C++ compiler (CXX=no-such-compiler -O1) is found", "leave it at auto")
    monkeypatch.setenv("CXX", "c++ 'unclosed")
    told("CXX=c++ 'unclosed", "No closing quotation")
    monkeypatch.setenv("CXX", program(tmp_path / "not-a-program", "neither script nor binary"))
    told("not-a-program", "Exec format error")
    monkeypatch.delenv("CXX")
    broken = tmp_path / "native.cc"
    broken.write_text("int main( {")
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "SOURCE", broken)
        told("cannot compile native.cc: ", "error")
    assert not list((tmp_path / "cache" / "nanochat_jax" / "native").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "SOURCE", tmp_path / "gone.cc")
        told("gone.cc", "No such file or directory")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
        told("no folder for what is compiled", "Set XDG_CACHE_HOME")


@pytest.mark.parametrize("found", ["damaged", "another"])
def test_they_are_compiled_once_for_a_compiler_its_options_and_the_processor(compiling, monkeypatch, found):
    monkeypatch.setattr(compiling, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in compiling.FLAGS))
    monkeypatch.setattr(compiling.jax.ffi, "register_ffi_target", lambda *_, **__: None)  # those in use stay
    compiled = []
    monkeypatch.setattr(compiling, "_compile", lambda *a, made=compiling._compile: compiled.append(a[1]) or made(*a))
    place = compiling._place(compiling._command())
    place.parent.mkdir(parents=True)
    if found == "another":
        subprocess.run(["c++", "-shared", "-x", "c++", "-o", place, os.devnull], check=True)
    else:
        place.write_bytes(b"damaged")
    loaded = compiling._loaded()
    assert compiled == [place] and place.stat().st_size > 10_000
    if found == "damaged":  # this process has the other one open under its name
        assert compiling._loaded() == loaded and len(compiled) == 1
    assert list(place.parent.iterdir()) == [place]
    monkeypatch.setenv("CXX", "env c++")  # a command of several words
    second = compiling._place(compiling._command())
    monkeypatch.setenv("CXXFLAGS", "-DOTHER")
    assert len({place, second, compiling._place(compiling._command())}) == 3


def test_a_failure_is_kept(compiling, monkeypatch):
    asked = []
    monkeypatch.setattr(
        compiling, "_command", lambda: asked.append(1) or (_ for _ in ()).throw(compiling.NativeError("no"))
    )
    monkeypatch.setattr(compiling, "_loaded", functools.cache(compiling._loaded))
    for _ in range(3):
        with pytest.raises(compiling.NativeError, match="no"):
            compiling.load()
    assert len(asked) == 1
