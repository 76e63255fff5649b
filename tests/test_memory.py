"""Memory: what is kept for the backward pass, what a compiled step needs, and the microbatch that is chosen."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import memory, run
from nanochat_jax.cli import TrainOptions, UsageError, parse
from nanochat_jax.config import (
    ABOVE_ZERO,
    RANGES,
    BaseConfig,
    Config,
    EvalConfig,
    FinetuneConfig,
    GPTConfig,
    ModelConfig,
    RLConfig,
    TokenizerConfig,
    check_ranges,
)
from nanochat_jax.errors import UserError
from nanochat_jax.loss import token_losses, weighted_loss
from nanochat_jax.memory import device_limit, program_bytes, train_bytes, train_rows
from nanochat_jax.model import init_params
from nanochat_jax.optim import Schedule
from nanochat_jax.sharding import make_mesh, path_of, put_batch
from nanochat_jax.stages.rl import fit_update
from nanochat_jax.stages.session import Session
from nanochat_jax.train import compiler_options, state_shapes, train_step

CFG = GPTConfig.from_depth(ModelConfig(depth=2, aspect_ratio=24, head_dim=16, sequence_len=64), 512)
ONE_LAYER = GPTConfig.from_depth(ModelConfig(depth=1, aspect_ratio=48, head_dim=16, sequence_len=64), 512)
initial = jax.jit(init_params, static_argnums=0)
# XLA of older versions undoes rematerialisation on a CPU.
HONOURS_REMAT = jax.__version_info__ >= (0, 12)


def tokens(rows=2, length=64):
    table = np.random.default_rng(0).integers(512, size=(rows, length + 1), dtype=np.int32)
    return table[:, :-1], table[:, 1:]


def total_loss(params, cfg, batch):
    return weighted_loss(params, cfg, *batch, jnp.full(batch[0].shape, 1 / batch[0].size))


def kept_bytes(cfg, rows):
    """Bytes of the residuals of the loss, the parameters themselves left out; logits are not kept."""
    cfg = replace(cfg, loss_chunk=8)
    params, batch = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0))), tokens(rows)
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: total_loss(p, cfg, batch), p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward)) - sum(
        x.size * 4 for x in jax.tree.leaves(params)
    )


def test_remat_changes_no_parameter():
    plain, remat = (initial(replace(CFG, remat=on), jax.random.key(3)) for on in (False, True))
    assert [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(remat)] == [
        path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain)
    ]
    assert remat["h_0"]["attn"]["q"]["kernel"].shape == (48, 48)
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


def test_remat_keeps_less_for_the_backward_pass():
    plain, remat = (
        kept_bytes(replace(CFG, remat=on), 9) - kept_bytes(replace(CFG, remat=on), 1) for on in (False, True)
    )
    # A further row costs what its layers' inputs are, not their insides.
    assert remat < 0.4 * plain


def compiled_gradient(cfg, rows):
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return jax.jit(jax.value_and_grad(total_loss), static_argnums=1).lower(params, cfg, tokens(rows)).compile()


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def test_remat_gives_the_same_gradients_and_needs_less_memory():
    plain, remat = (compiled_gradient(replace(CFG, remat=on, loss_chunk=8), 16) for on in (False, True))
    params = jax.tree.map(lambda x: x + 0.02, initial(CFG, jax.random.key(0)))
    (loss, grads), (same, others) = (compiled(params, tokens(16)) for compiled in (plain, remat))
    assert float(loss) == pytest.approx(float(same), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, others)
    if HONOURS_REMAT:
        assert temporaries(remat) < 0.7 * temporaries(plain)


@pytest.mark.parametrize("chunk", [7, 16, 64, 100])
def test_the_loss_is_the_same_in_chunks_of_any_size(chunk):
    params = jax.tree.map(lambda x: x + 0.02, initial(ONE_LAYER, jax.random.key(0)))
    losses = jax.jit(token_losses, static_argnums=1)
    whole, chunked = (losses(params, replace(ONE_LAYER, loss_chunk=size), *tokens()) for size in (0, chunk))
    np.testing.assert_allclose(whole, chunked, rtol=1e-5)


def test_a_gpu_compiles_rematerialisation_without_the_scheduler_that_undoes_it():
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    remat = compiler_options(replace(CFG, remat=True), gpu)
    assert remat and not compiler_options(CFG, gpu) and not compiler_options(replace(CFG, remat=True), make_mesh("1"))
    jax.jit(jnp.sin).lower(1.0).compile(remat)  # this version of XLA knows the option
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(jnp.sin).lower(1.0).compile(remat | {"xla_gpu_no_such_option": False})


def test_chunks_of_the_loss_need_less_memory_when_compiled():
    whole, chunked = (temporaries(compiled_gradient(replace(ONE_LAYER, loss_chunk=chunk), 16)) for chunk in (0, 9))
    logits = 16 * 64 * 512 * 4
    assert whole - chunked > logits


def test_bytes_are_those_of_one_device_and_count_donated_buffers_once():
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=NamedSharding(make_mesh("8"), P("data")))

    def double(x):
        return x * 2

    assert program_bytes(jax.jit(double).lower(x), {}) == 2 * 4096
    assert program_bytes(jax.jit(double, donate_argnums=0).lower(x), {}) == 4096


def test_a_program_the_compiler_refuses_for_its_size_does_not_fit():
    def refusing(message):
        def compile(options):
            raise jax.errors.JaxRuntimeError(message)

        return SimpleNamespace(compile=compile)

    assert program_bytes(refusing("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"), {}) == float("inf")
    with pytest.raises(jax.errors.JaxRuntimeError):
        program_bytes(refusing("INTERNAL: broken"), {})


def auto(**changes):
    return replace(Config(), base=BaseConfig(device_batch_size="auto"), **changes)


def choose(config, mesh, rows, cfg=CFG, log=print):
    return train_rows(config, config.base, "base", cfg, mesh, rows, log)


def test_the_choice_is_the_largest_step_that_fits_and_is_compiled_once():
    mesh, cfg = make_mesh("2"), replace(ONE_LAYER, loss_chunk=8)
    compilations, said = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if "backend_compile" in name else None
    )
    needs = {rows: train_bytes(cfg, mesh, 2 // rows, rows, 64) for rows in (1, 2)}
    assert needs[1] < needs[2] and len(compilations) >= 2
    config = auto(loss_chunk=8, device_memory_gb=(needs[1] + needs[2]) / 2 / 2**30)
    compilations.clear()
    assert choose(config, mesh, 2, ONE_LAYER, said.append) == 1
    sizes = [f"{size / 2**20:.0f} MiB" for size in (needs[1], config.device_memory_gb * 2**30, needs[2])]
    assert said == ["base: device-batch-size auto: 1 row a device ({} of {}; 2 would need {})".format(*sizes)]

    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state_shapes(cfg, mesh))
    inputs, targets = (x.reshape(2, 2, 64) for x in tokens(4))
    batch = put_batch({"inputs": inputs, "targets": targets}, mesh, leading=1)
    with jax.set_mesh(mesh):
        train_step(state, batch, Schedule(config.base, 10, cfg.n_embd).hyper(0), cfg=cfg)
    assert not compilations


def test_a_step_of_rl_is_measured_with_its_weights(monkeypatch):
    monkeypatch.setattr(memory, "program_bytes", lambda lowered, options: lowered.in_avals)
    (_, batch, _), _ = train_bytes(ONE_LAYER, make_mesh("2"), 3, 4, 32, weights=True)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "inputs": ((3, 8, 32), jnp.int32), "targets": ((3, 8, 32), jnp.int32), "weights": ((3, 8, 32), jnp.float32)
    }  # fmt: skip


def linear(cfg, mesh, microbatches, rows, length, weights=False):
    """A step of `rows` rows needs rows GiB, half of that with remat."""
    return rows * 2**30 / (1 + cfg.remat)


def test_the_search_finds_the_largest_and_looks_at_few(monkeypatch):
    looked = []
    monkeypatch.setattr(memory, "train_bytes", lambda cfg, mesh, steps, rows, *_: looked.append(rows) or rows * 2**30)
    for limit in range(1, 30):
        looked.clear()
        rows = choose(auto(device_memory_gb=limit), make_mesh("1"), 24, log=lambda line: None)
        assert rows == max(n for n in (1, 2, 3, 4, 6, 8, 12, 24) if n <= limit) and len(set(looked)) == len(looked) <= 4


def test_where_one_row_does_not_fit_the_error_names_need_limit_and_ways_out(monkeypatch):
    monkeypatch.setattr(memory, "train_bytes", linear)
    mesh = make_mesh("1")
    with pytest.raises(UserError, match=r"base: .* one row of 64 tokens needs 1.00 GiB .*0.75 GiB can be had: --remat "
                       r"would need 0.50 GiB; .*--loss-chunk.*--model.sequence-len.*--mesh fsdp"):  # fmt: skip
        choose(auto(device_memory_gb=0.75, loss_chunk=0), mesh, 4)
    with pytest.raises(UserError) as error:
        choose(auto(device_memory_gb=0.25, loss_chunk=4), mesh, 4, cfg=replace(CFG, remat=True))
    assert "--remat" not in str(error.value) and "--loss-chunk" not in str(error.value)


def test_what_sampling_takes_is_said_where_no_row_fits_beside_it(monkeypatch):
    monkeypatch.setattr(memory, "train_bytes", linear)
    config = replace(Config(), device_memory_gb=2.0)
    stage = replace(config.rl, device_batch_size="auto")
    said = (
        r"needs 1\.00 GiB a device, 2\.00 GiB less the 3\.00 GiB of sampling can be had: lower --rl\.questions-per-step"
    )
    with pytest.raises(UserError, match=said):
        train_rows(config, stage, "rl", CFG, make_mesh("1"), 4, print, taken=3 * 2**30)


def test_stages_take_the_choice(monkeypatch):
    monkeypatch.setattr(memory, "train_bytes", linear)
    said = []
    session = SimpleNamespace(
        name="mid", config=auto(device_memory_gb=5), stage=BaseConfig(device_batch_size="auto"), cfg=CFG,
        mesh=make_mesh("2"), log=said.append,
    )  # fmt: skip
    assert Session.rows(session, 24 * 64) == (3, 8)
    assert said[0].startswith("mid: device-batch-size auto: 4 rows a device (4.00 GiB of 5.00 GiB; 6 would need")
    # Samples of rl stand beside the engine's cache, a row of which is keys and values, smear's embedding, words seen.
    row = 2 * sum(min(60, window + 1) for window in CFG.windows) * 48 * 4 + 48 * 4 + CFG.vocab_size
    fit_update(session, 2 * 3 * 8000, 60)
    assert session.stage.device_batch_size == 3
    left = float(said[1].split(" of ")[1].split(" GiB")[0])
    assert left == pytest.approx(5 - 3 * 8000 * row / 2**30, abs=0.01) and left < 4
    assert session.cfg.loss_chunk == memory.HEAD_TOKENS // 3
    session.stage = BaseConfig(device_batch_size=7)
    with pytest.raises(UserError, match="7 on 2 data shards does not divide"):
        Session.rows(session, 24 * 64)


def test_the_limit_is_what_is_stated_or_what_is_free(monkeypatch):
    assert device_limit(auto(device_memory_gb=1.5), make_mesh("8")) == 1.5 * 2**30
    monkeypatch.setattr(memory, "free_host_memory", lambda: 80_000)
    assert device_limit(auto(), make_mesh("8")) == 9_000
    monkeypatch.setattr(memory, "gather_json", lambda value: [value, 7_000])
    assert device_limit(auto(), make_mesh("8")) == 7_000  # another process has less


def gpus(*stats):
    devices = [
        SimpleNamespace(platform="gpu", device_kind="X100", process_index=0, memory_stats=lambda s=s: s) for s in stats
    ]
    return SimpleNamespace(devices=np.asarray(devices))


def test_the_limit_of_a_gpu_is_what_others_have_left():
    full, busy = {"bytes_limit": 2000, "bytes_in_use": 0}, {"bytes_limit": 2000, "bytes_in_use": 1000}
    assert device_limit(auto(), gpus(full)) == 1800 and device_limit(auto(), gpus(full, busy)) == 900
    with pytest.raises(UserError, match="X100 does not tell"):
        device_limit(auto(), gpus(None))


def test_options_reach_the_configuration_and_come_back():
    words = [
        "--base.device-batch-size",
        "auto",
        "--rl.device-batch-size",
        "auto",
        "--mid.device-batch-size",
        "2",
        "--remat",
    ]
    words += ["--loss-chunk", "128", "--device-memory-gb", "12"]
    config = parse(TrainOptions, Config(), words, "test", "").config
    assert (config.base.device_batch_size, config.rl.device_batch_size, config.mid.device_batch_size) == (
        "auto",
        "auto",
        2,
    )
    assert (config.remat, config.loss_chunk, config.device_memory_gb) == (True, 128, 12.0)
    check_ranges(config)
    assert run.config_from_dict(json.loads(json.dumps(asdict(config))), "test") == config
    assert run.gpt_config(config, 512).remat
    with pytest.raises(UsageError):
        parse(TrainOptions, Config(), ["--base.device-batch-size", "most"], "test", "")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss_chunk": -1}, "--loss-chunk -1"),
        ({"device_memory_gb": 0.0}, "--device-memory-gb 0.0: more than 0 is needed"),
        ({"device_memory_gb": 1e308}, r"--device-memory-gb 1e\+308: 0 to 1048576 is needed"),
        ({"base": BaseConfig(device_batch_size=0)}, "--base.device-batch-size 0"),
        ({"base": BaseConfig(target_param_data_ratio=0)}, "--base.target-param-data-ratio 0: more than 0"),
        ({"model": ModelConfig(rope_base=0)}, "--model.rope-base 0: more than 0"),
        ({"base": BaseConfig(warmdown_ratio=float("nan"))}, "--base.warmdown-ratio nan is no number"),
        ({"base": BaseConfig(warmdown_ratio=-1.0)}, "--base.warmdown-ratio -1.0: 0 to 1 is needed"),
        ({"base": BaseConfig(momentum_peak=2.0)}, "--base.momentum-peak 2.0: 0 to 0.9999 is needed"),
        ({"base": BaseConfig(warmup_steps=-5)}, "--base.warmup-steps -5: at least 0 is needed"),
        ({"base": BaseConfig(matrix_lr=-0.1)}, "--base.matrix-lr -0.1: at least 0 is needed"),
        ({"base": BaseConfig(init_step=3)}, "--base.init-step need --base.init-from"),
        ({"mid": FinetuneConfig(val_rows=-1)}, "--mid.val-rows -1"),
        ({"model": ModelConfig(depth=100_000)}, "--model.depth 100000: 1 to 1000 is needed"),
        ({"model": ModelConfig(sequence_len=10**12)}, "--model.sequence-len 1000000000000: 1 to 16777216 is needed"),
        ({"tokenizer": TokenizerConfig(vocab_size=5 * 10**9)}, "--tokenizer.vocab-size 5000000000: 1 to 16777216 is"),
        ({"rl": RLConfig(questions_per_step=10**9)}, "--rl.questions-per-step 1000000000: 1 to 65536 is needed"),
        ({"eval": EvalConfig(temperature=-0.5)}, "--eval.temperature -0.5: 0 to 100"),
        ({"eval": EvalConfig(num_samples=4)}, "--eval.num-samples 4 greedy answers are all the same"),
        (
            {"base": BaseConfig(num_iterations=9, target_flops=1e9)},
            r"--base.num-iterations 9 and --base.target-flops 1e\+09",
        ),
    ],
)
def test_values_without_meaning_are_errors(change, words):
    check_ranges(replace(Config(), base=BaseConfig(target_param_data_ratio=0.5)))
    with pytest.raises(UserError, match=words):
        check_ranges(replace(Config(), **change))


def test_every_range_is_that_of_a_field():
    fields = asdict(Config())
    names = set(fields).union(*(section for section in fields.values() if isinstance(section, dict)))
    assert {*RANGES, *ABOVE_ZERO} <= names


def test_memory_may_change_when_a_run_goes_on():
    changed = auto(remat=True, loss_chunk=8, device_memory_gb=3.0)
    assert run._fixed(asdict(Config()), {"base", "rl"}) == run._fixed(asdict(changed), {"base", "rl"})
