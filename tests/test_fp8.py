"""fp8 products: what they round, where they are used, the form that XLA recognises, and how little it costs in loss."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_train import batches

from nanochat_jax import fp8
from nanochat_jax.config import BaseConfig, Config, GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.optim import Schedule
from nanochat_jax.run import gpt_config, open_run
from nanochat_jax.sharding import make_mesh, put_batch
from nanochat_jax.train import born_params, eval_losses, state_shapes, train_step, with_optimizer

PATH = "h_0/mlp/fc/kernel"
CFG = GPTConfig.from_depth(ModelConfig(depth=1, aspect_ratio=128, head_dim=64, sequence_len=32), 128, fp8=True)
PLAIN = dataclasses.replace(CFG, fp8=False)
SCHEDULE = Schedule(BaseConfig(warmup_steps=2, warmdown_ratio=0.2), 40, CFG.n_embd, lr_scale=0.1, weight_decay=0.1)
FORMATS = {fp8.E4M3: (ml_dtypes.float8_e4m3fn, 448), fp8.E5M2: (ml_dtypes.float8_e5m2, 57344)}


def rounded(x, dtype):
    """By hand: over the smallest power of two that leaves the maximum within range, to fp8 and back, float64."""
    kind, limit = FORMATS[dtype]
    x = np.asarray(x, np.float64)
    unscale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / limit))
    return (x / unscale).astype(kind).astype(np.float64) * unscale


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 3 * jax.random.normal(keys[0], (2, 24, 128))
    kernel = 0.05 * jax.random.normal(keys[1], (128, 192))
    grad = 1e-7 * jax.random.normal(keys[2], (2, 24, 192)) ** 3
    return x.astype(dtype), kernel, grad.astype(dtype)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_all_three_products_are_those_of_rounded_operands(dtype, tolerance):
    x, kernel, grad = operands(dtype)

    @jax.jit
    def products(x, kernel, grad):
        y, backward = jax.vjp(lambda x, kernel: fp8.matmul(x, kernel, PATH), x, kernel)
        return y, *backward(grad)

    y, dx, dw = products(x, kernel, grad)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, "float32")
    x8, w8, g8 = rounded(x, fp8.E4M3), rounded(kernel, fp8.E4M3), rounded(grad, fp8.E5M2)
    wanted = x8 @ w8, g8 @ w8.T, x8.reshape(48, 128).T @ g8.reshape(48, 192)
    for got, right in zip((y, dx, dw), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), right, rtol=tolerance, atol=tolerance * right.std())
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert 0.01 < np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact) < 0.06


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("peak", [0.0, 1e-30, 1.0, 448.0, np.nextafter(np.float32(448), np.float32(449)), 1e38])
def test_any_finite_maximum_stays_in_range(dtype, peak):
    x = jnp.linspace(-1, 1, 33) * jnp.float32(peak)
    values, unscale = fp8.quantize(x, dtype)
    back = np.asarray(values, np.float64) * float(unscale)
    assert np.isfinite(back).all()
    if peak >= 1e-12:  # no finer than the range allows, no coarser than the mantissa
        assert np.abs(np.asarray(values, np.float64)).max() > FORMATS[dtype][1] / 2.3
        np.testing.assert_allclose(back, x, rtol=2.0**-3, atol=peak * 2.0**-14)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen(bad):
    x = jnp.ones((128, 128)).at[3, 5].set(bad)
    y, _ = jax.vjp(lambda x: fp8.matmul(x, jnp.eye(128), PATH), x)
    assert np.isnan(y[3]).any()


@pytest.mark.parametrize(
    "rows, columns, used",
    [(128, 128, True), (768, 3072, True), (144, 128, True), (112, 768, False), (768, 6, False), (136, 256, False)],
)
def test_only_layers_whose_size_allows_it(rows, columns, used):
    assert fp8.fits(rows, columns) is fp8.fits(columns, rows) is used


def step_text(cfg):
    mesh = make_mesh("1")
    batch = put_batch(next(batches(1)), mesh, leading=1)
    with jax.set_mesh(mesh):
        traced = train_step.trace(state_shapes(cfg, mesh), batch, SCHEDULE.hyper(0), cfg=cfg)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_matrices_of_the_layers_and_nothing_else_train_in_fp8():
    made = re.findall(r"stablehlo.convert .* -> tensor<(\d+x\d+)x(f8\w+)>", step_text(CFG))
    kernels = [shape for shape, kind in made if kind == "f8E4M3FN" and not shape.startswith("256x")]
    assert sorted(kernels) == 4 * ["128x128"] + ["128x512", "512x128"]  # q, k, v, proj; fc and proj
    assert sorted(shape for shape, kind in made if kind == "f8E5M2") == 5 * ["256x128"] + ["256x512"]  # of 256 tokens
    narrow = dataclasses.replace(CFG, n_embd=64, n_head=1, n_kv_head=1)
    assert "f8E" not in step_text(PLAIN) + step_text(narrow)


def test_lowered_for_a_gpu_operands_have_the_form_that_xla_recognises():
    def loss(x, kernel):
        return jnp.sum(fp8.matmul(x, kernel, PATH) ** 2)

    x, kernel, _ = operands("bfloat16")
    text = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    made = dict(re.findall(r"(%\w+) = (.*)", text))
    kinds = []
    for dot in (line for line in made.values() if "stablehlo.dot_general" in line):
        assert "batching_dims" not in dot and dot.endswith("xbf16>")
        left, right = re.search(r"dot_general (%\w+), (%\w+)", dot).groups()
        kind = []
        for operand in (left, right):
            values, scalar = re.search(r"multiply (%\w+), (%\w+)", made[operand]).groups()
            assert re.search(r"dims = \[\] : \(tensor<bf16>\)", made[scalar])
            kind.append(re.search(r"stablehlo.convert .* : \(tensor<\d+x\d+x(\w+)>\)", made[values])[1])
        kinds.append(tuple(kind))
    assert kinds == [("f8E4M3FN", "f8E4M3FN"), ("f8E5M2", "f8E4M3FN"), ("f8E4M3FN", "f8E5M2")]


def alive(path, leaf):
    """Initial parameters, but for those that keep the layers out of the loss at first."""
    if "proj" in str(path) or "lm_head" in str(path):
        return 0.05 * jax.random.normal(jax.random.key(leaf.shape[0]), leaf.shape)
    return leaf


def train(spec, cfg, steps):
    mesh, losses = make_mesh(spec), []
    params = jax.tree_util.tree_map_with_path(alive, born_params(cfg, mesh, 0))
    state = with_optimizer(cfg, mesh, params)
    with jax.set_mesh(mesh):
        for step, batch in enumerate(batches(steps)):
            state, metrics = train_step(state, put_batch(batch, mesh, leading=1), SCHEDULE.hyper(step), cfg=cfg)
            losses.append(float(metrics["loss"]))
    return state, np.asarray(losses)


@pytest.fixture(scope="module")
def alone():
    return train("1", CFG, 20)


def test_fp8_learns_as_well(alone):
    plain = train("1", PLAIN, 20)[1]
    assert plain[-1] < plain[0] - 2
    assert 1e-4 < np.abs(alone[1] - plain).max() < 0.03


def test_evaluation_is_not_in_fp8(alone):
    tokens = next(batches(1))["inputs"][0]
    losses = [eval_losses(alone[0].params, tokens, tokens, cfg=cfg) for cfg in (CFG, PLAIN)]
    np.testing.assert_array_equal(*losses)


def test_rematerialised_layers_are_in_fp8_too(alone):
    remat = dataclasses.replace(CFG, remat=True)
    np.testing.assert_allclose(train("1", remat, 4)[1], alone[1][:4], rtol=1e-4)
    assert step_text(remat).count("xf8E5M2>\n") == step_text(CFG).count("xf8E5M2>\n")


@pytest.mark.parametrize("spec", ["8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_any_mesh_gives_the_losses_of_one_device(alone, spec):
    losses = train(spec, CFG, 6)[1]
    np.testing.assert_allclose(losses[:2], alone[1][:2], rtol=1e-6)
    np.testing.assert_allclose(losses, alone[1][:6], rtol=5e-4)  # what is rounded to the other side grows


def device(platform, capability=None):
    return SimpleNamespace(platform=platform, device_kind="Some GPU", compute_capability=capability)


def test_what_the_start_says():
    assert fp8.precision(PLAIN, device("gpu", "7.0")) == "float32"
    assert "emulated" in fp8.precision(CFG, device("cpu"))
    assert "fp8" in fp8.precision(CFG, device("gpu", "8.9")) and "fp8" in fp8.precision(CFG, device("gpu", "12.0"))


def test_a_model_too_narrow_for_fp8_is_one_clear_line():
    narrow = dataclasses.replace(CFG, n_embd=64, n_head=1, n_kv_head=1, head_dim=64)
    with pytest.raises(UserError, match="--fp8: no matrix of a model of width 64"):
        fp8.precision(narrow, device("cpu"))


@pytest.mark.parametrize("platform, capability", [("gpu", "8.6"), ("gpu", "gfx90a"), ("tpu", None)])
def test_a_device_without_fp8_is_one_clear_line(platform, capability):
    with pytest.raises(UserError, match=r"--fp8: Some GPU .* 8\.9 is needed"):
        fp8.precision(CFG, device(platform, capability))


def test_a_gpu_program_that_lacks_an_fp8_product_is_an_error():
    call = (
        "  %cublas-lt-matmul.{} = (bf16[8,16]{{1,0}}, s8[33]{{0}}) custom-call(f8e4m3fn[8,16]{{1,0}} %a, %b, %c, %d), "
    )
    enough = "".join(call.format(i) + 'custom_call_target="__cublas$lt$matmul$f8"\n' for i in range(18))
    other = call.format(0) + 'custom_call_target="__cublas$lt$matmul", metadata={op_name="f8"}\n'
    assert fp8.fp8_products(enough + other) == fp8.expected_products(CFG) == 18  # three of each of six matrices
    fp8.check_compiled(CFG, device("gpu", "9.0"), enough)
    fp8.check_compiled(CFG, device("cpu"), other)
    fp8.check_compiled(PLAIN, device("gpu", "9.0"), other)
    with pytest.raises(UserError, match=r"made 17 fp8 products .* 18 are needed"):
        fp8.check_compiled(CFG, device("gpu", "9.0"), enough.split("\n", 1)[1] + other)
    narrow_keys = dataclasses.replace(CFG, n_kv_head=1)
    assert fp8.expected_products(narrow_keys) == 12  # k and v are 128 x 64


def test_a_run_keeps_to_what_it_was_begun_with(tmp_path):
    config = dataclasses.replace(Config(), fp8=True)
    assert gpt_config(config, 512).fp8 and not gpt_config(Config(), 512).fp8
    open_run(config, tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "done.json").write_text("{}")
    with pytest.raises(UserError, match="fp8 was True, now False"):
        open_run(Config(), tmp_path)
