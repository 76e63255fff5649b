"""The plan: counts that must be exact, estimates that must scale as they should, and nothing spent."""

import dataclasses
import json
import math
from dataclasses import replace

import jax
import pytest

import run_speedrun
from nanochat_jax import cli
from nanochat_jax import plan as plan_module
from nanochat_jax.cli import EXPERIMENTS, load_experiment
from nanochat_jax.config import BaseConfig, Config, FinetuneConfig, GPTConfig, ModelConfig, RLConfig
from nanochat_jax.data.download import SHARD_BYTES
from nanochat_jax.errors import UserError
from nanochat_jax.memory import train_bytes
from nanochat_jax.model import count_params, flops_per_token, param_shapes
from nanochat_jax.optim import horizon
from nanochat_jax.plan import format_plan, plan, step_memory
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import make_mesh


def tiny(**changes):
    model = ModelConfig(depth=2, aspect_ratio=32, head_dim=32, sequence_len=128)
    config = replace(Config(), model=model, tokenizer=replace(Config().tokenizer, vocab_size=512))
    base = replace(config.base, num_iterations=20, total_batch_size=1024, device_batch_size=4)
    mid = replace(config.mid, mixture=("identity*2", "choice:100"), total_batch_size=1024, val_rows=0)
    return replace(config, **{"base": base, "mid": mid, **changes})


def stage(figures, name):
    return next(s for s in figures["stages"] if s["stage"] == name)


def test_base_is_exact():
    config = tiny()
    figures = plan(config)
    cfg = GPTConfig.from_depth(config.model, 512)
    base = stage(figures, "base")
    assert base["steps"] == 20 and base["tokens"] == 20 * 1024
    assert base["flops"] == 20 * 1024 * flops_per_token(cfg)
    assert figures["model"]["total"] == sum(leaf.size for leaf in jax.tree.leaves(param_shapes(cfg)))
    assert figures["total"]["flops"] == pytest.approx(sum(s["flops"] for s in figures["stages"]))
    json.dumps(figures)


def test_base_follows_the_horizon_and_stop_after():
    config = replace(tiny(), base=replace(Config().base, stop_after=7))
    length = horizon(config, GPTConfig.from_depth(config.model, 512))
    assert length.steps > 7 and stage(plan(config), "base")["tokens"] == 7 * length.batch_tokens
    config = replace(config, base=replace(config.base, stop_after=None))
    assert stage(plan(config), "base")["steps"] == length.steps


def test_stages_that_are_not_run_are_not_planned(capsys):
    words = ["--experiment", str(EXPERIMENTS / "nanochat_july.py"), "--plan", "--stages", "tokenizer,base,sft"]
    cli.run_command("speedrun", run_speedrun.SpeedrunOptions, run_speedrun.speedrun, "", words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[lines.index(["Stages"]) + 2 :][:3]] == ["base", "sft", "total"]
    mid = replace(tiny().mid, device_batch_size=3)  # no divisor of a step's rows
    figures, whole = plan(tiny(mid=mid), ("base", "sft")), plan(tiny())
    assert figures["rows"].keys() == {"base", "sft"}
    assert figures["total"]["flops"] == sum(stage(whole, name)["flops"] for name in ("base", "sft"))
    assert figures["disk"]["checkpoints"] == whole["disk"]["checkpoints"] / 2
    assert "rows a microbatch: 1)" in format_plan(plan(tiny(), ("rl",)))


def test_finetuning_steps_come_from_the_mixture():
    # 2 x 1000 identity rows and 100 of choice, 60 tokens each, packed into 8 rows of 128 tokens a step.
    assert stage(plan(tiny()), "mid")["steps"] == math.ceil(2100 * 60 / 1024)
    padded = FinetuneConfig(mixture=("gsm8k:320", "arc_easy"), packing="pad", val_rows=0)
    assert stage(plan(tiny(sft=padded)), "sft")["steps"] == math.ceil((320 + 2251) / 32)
    held_out = replace(padded, val_rows=10**9)
    assert stage(plan(tiny(sft=held_out)), "sft")["steps"] == math.ceil((320 + 2251) * 0.9 / 32)
    assert stage(plan(tiny(sft=replace(padded, num_iterations=5))), "sft")["tokens"] == 5 * 32 * 128


def test_own_conversations_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    line = '[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]'
    path.write_text((line.ljust(399) + "\n") * 64)
    mine = FinetuneConfig(mixture=(f"{path}*2",), val_rows=0)
    assert stage(plan(tiny(sft=mine)), "sft")["steps"] == math.ceil(128 * 100 / (32 * 128))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan(tiny(sft=replace(mine, mixture=("~/mine.jsonl*2",)))) == plan(tiny(sft=mine))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        plan(tiny(sft=FinetuneConfig(mixture=("nowhere.jsonl",))))


def test_rl_counts_rollouts_and_the_control():
    config = tiny(rl=replace(Config().rl, num_iterations=3, questions_per_step=4, samples_per_question=2, control=True))
    figures = plan(config)
    per_token = figures["model"]["flops_per_token"]
    rl = stage(figures, "rl")
    assert rl["tokens"] == 3 * 8 * (220 + 256)
    assert rl["flops"] == pytest.approx(per_token * (rl["tokens"] + 3 * (8 * 256 + 4 * 220) / 3))
    assert stage(figures, "sft_continued")["flops"] == rl["flops"]
    few = replace(config.rl, num_iterations=None, task="gsm8k", questions_per_step=10_000)
    assert stage(plan(tiny(rl=few)), "rl")["steps"] == 1, "as training has it"


def test_the_plan_of_a_stages_command_is_of_that_stage(capsys):
    for command, planned in (("pretrain", ["base"]), ("rl", ["rl", "sft_continued"]), ("tokenizer", [])):
        assert cli.main([command, "--experiment", str(EXPERIMENTS / "smoke.py"), "--plan"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        first = lines.index(["Stages"]) + 2
        assert [line[0] for line in lines[first : lines.index([], first)]] == [*planned, "total"]


def test_fp8_that_the_run_would_refuse_is_not_planned():
    with pytest.raises(UserError, match="--fp8: no matrix of a model of width 64"):
        plan(replace(tiny(), fp8=True))
    wide = replace(tiny().model, aspect_ratio=64)
    assert plan(replace(tiny(), fp8=True, model=wide)) == plan(replace(tiny(), model=wide))


def test_kernels_that_the_run_would_refuse_are_not_planned():
    with pytest.raises(UserError, match=r"--native on with .*2 devices"):
        plan(replace(tiny(), native="on", mesh="2", compute_dtype="float32"))
    assert plan(replace(tiny(), native="on", compute_dtype="float32"))  # no compiler is asked for


def test_memory_is_shared_out_over_the_mesh():
    one, eight, cut = (plan(replace(tiny(), mesh=m, compute_dtype="float32"))["memory"] for m in ("1", "8", "fsdp=8"))
    counts = count_params(GPTConfig.from_depth(tiny().model, 512))
    assert one["weights"] == 4 * counts["total"] and one["gradients"] == 2 * 4 * counts["total"]
    assert one["optimizer"] == 4 * (2 * counts["total"] - counts["blocks"])
    assert eight["weights"] == one["weights"] and eight["optimizer"] == one["optimizer"] / 8
    assert cut["weights"] == one["weights"] / 8 and cut["gradients"] == one["gradients"] / 8
    assert math.isclose(one["total"], sum(size for name, size in one.items() if name != "total"))
    fewer = {name: replace(getattr(tiny(), name), device_batch_size=2) for name in ("base", "mid", "sft")}
    assert one["activations"] == 4 * plan(replace(tiny(), **fewer, compute_dtype="float32"))["memory"]["activations"]


def test_memory_knows_remat_and_chunks_of_the_loss():
    def memory(**changes):
        return plan(replace(tiny(), compute_dtype="bfloat16", **changes))["memory"]

    plain, remat, chunked = memory(loss_chunk=0), memory(loss_chunk=0, remat=True), memory(loss_chunk=16)
    assert remat["activations"] < 0.6 * plain["activations"] and remat["logits"] == plain["logits"]
    assert chunked["logits"] == plain["logits"] / 8 and chunked["activations"] == plain["activations"]
    assert memory(loss_chunk="auto")["logits"] == plain["logits"] / 2  # 512 tokens of the 8 rows of 128, on a CPU
    blocked, cudnn = (
        step_memory(tiny(), replace(cfg, attention="reference"), 8, "gpu", cfg.attention)["activations"]
        for cfg in (gpt_config(tiny(attention=impl), 512, "gpu") for impl in ("xla_blocked", "auto"))
    )
    assert cudnn < blocked == plain["activations"]
    hours = [stage(plan(tiny(remat=on)), "base")["hours"]["1 x H100"] for on in (False, True)]
    assert hours[1] == pytest.approx(hours[0] * 4 / 3)


def test_memory_knows_which_vocabularies_the_kernel_of_the_loss_takes():
    """50,304 is what nanoGPT pads to; no multiple of 256."""

    def per_logit(vocab_size, attention):
        cfg = gpt_config(tiny(), vocab_size)
        return step_memory(tiny(), cfg, 8, "gpu", attention)["logits"] / vocab_size

    assert per_logit(50_176, "cudnn") == per_logit(32_768, "cudnn") < per_logit(50_304, "cudnn")
    assert per_logit(32_768, "reference") == per_logit(50_304, "reference")


@pytest.mark.parametrize(
    ("capability", "cuda", "dtype", "attention"),
    [
        ("7.5", 12000, "float32", "xla_blocked"),
        ("8.6", 12000, "bfloat16", "cudnn"),
        ("9.0", 13000, "bfloat16", "mosaic"),
    ],
)
def test_auto_on_generations_of_gpus(monkeypatch, capability, cuda, dtype, attention):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("kernels.attention.compute_capability", lambda: capability)
    monkeypatch.setattr("kernels.attention.cuda_version", lambda: cuda)
    config = replace(Config(), model=replace(Config().model, depth=4))
    cfg = gpt_config(config, 512)
    assert (cfg.compute_dtype, cfg.attention) == (dtype, attention)


def test_auto_counts_one_row_a_device():
    auto, one = (
        plan(tiny(mesh="2", **dict.fromkeys(("base", "mid", "sft"), replace(tiny().base, device_batch_size=size))))
        for size in ("auto", 1)
    )
    assert auto["rows"] == {"base": 1, "mid": 1, "sft": 1} and auto["memory"] == one["memory"]


SHAPES = [
    # depth, aspect ratio, length, rows, mesh, precision, remat, chunk
    (1, 64, 256, 4, "1", "float32", False, 0),
    (2, 128, 256, 16, "tensor=8", "float32", False, 0),
    pytest.param(4, 64, 512, 8, "data=2,tensor=4", "bfloat16", True, 64, marks=pytest.mark.slow),
    pytest.param(2, 32, 256, 16, "1", "bfloat16", True, 0, marks=pytest.mark.slow),
    pytest.param(2, 32, 256, 8, "1", "bfloat16", False, 16, marks=pytest.mark.slow),
    pytest.param(6, 64, 512, 4, "1", "bfloat16", True, 64, marks=pytest.mark.slow),
    pytest.param(4, 64, 1024, 4, "1", "float32", False, 0, marks=pytest.mark.slow),
    pytest.param(4, 64, 512, 2, "8", "bfloat16", False, 64, marks=pytest.mark.slow),
    pytest.param(4, 64, 512, 4, "fsdp=8", "float32", True, 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("depth, ratio, length, rows, mesh, dtype, remat, chunk", SHAPES)
def test_memory_agrees_with_what_is_compiled(depth, ratio, length, rows, mesh, dtype, remat, chunk):
    if remat and jax.__version_info__ < (0, 12):
        pytest.skip("XLA of this JAX undoes remat on a CPU")
    model = ModelConfig(depth, ratio, 32, None, length)
    config = replace(Config(), model=model, mesh=mesh, remat=remat, loss_chunk=chunk)
    cfg = GPTConfig.from_depth(model, 2048, compute_dtype=dtype, remat=remat, loss_chunk=chunk)
    estimate = step_memory(config, cfg, rows, "cpu", cfg.attention)["total"]
    assert 1 / 1.5 < estimate / train_bytes(cfg, make_mesh(mesh), 2, rows, length) < 1.5


@pytest.mark.parametrize("card", [8, 12, 24, 80])
def test_presets_fit_their_cards(card):
    config = load_experiment(EXPERIMENTS / f"gpu_{card}gb.py")
    cfg = replace(gpt_config(config, config.tokenizer.vocab_size, "gpu"), attention="reference")
    need = step_memory(config, cfg, config.base.device_batch_size, "gpu", "cudnn")["total"]
    assert 0.5 * card < need / 2**30 < 0.8 * card  # nine tenths of a card can be had
    assert "estimated, not measured on such a card" in (EXPERIMENTS / f"gpu_{card}gb.py").read_text()


def test_disk():
    embedded = replace(tiny(), data=replace(Config().data, source="embedded"))
    assert plan(embedded)["disk"]["shards"] == 0
    assert plan(tiny())["disk"]["shards"] == 241 * SHARD_BYTES
    twice = {name: replace(getattr(embedded, name), keep=5) for name in ("base", "mid", "sft", "rl")}
    assert plan(replace(embedded, **twice))["disk"]["checkpoints"] == plan(embedded)["disk"]["checkpoints"] * 2


def test_hours_and_dollars(monkeypatch):
    monkeypatch.setattr(plan_module, "peak_flops", lambda device: 1e12)
    config = replace(tiny(), mesh="2", device_hour_cost=3.0)
    figures = plan(config)
    (hardware,) = figures["total"]["hours"]
    base = stage(figures, "base")
    assert hardware.startswith("2 x ")
    assert base["hours"][hardware] == pytest.approx(base["flops"] / (2 * 0.4e12) / 3600)
    assert base["dollars"][hardware] == pytest.approx(base["hours"][hardware] * 6)
    rl = stage(figures, "rl")
    assert rl["rollout_flops"] > 0
    work = rl["flops"] - rl["rollout_flops"] + rl["rollout_flops"] / plan_module.ROLLOUT_EFFICIENCY
    assert rl["hours"][hardware] == pytest.approx(work / (2 * 0.4e12) / 3600)
    assert "dollars on 2 x" in format_plan(figures)


def test_rl_counts_the_tokens_of_all_its_updates():
    once, thrice = (stage(plan(tiny(rl=RLConfig(clip=0.2, updates_per_batch=n))), "rl") for n in (1, 3))
    assert thrice["tokens"] == 3 * once["tokens"] and thrice["rollout_flops"] == once["rollout_flops"]
    assert thrice["flops"] == pytest.approx(3 * once["flops"] - 2 * once["rollout_flops"])


def test_text_says_everything():
    text = format_plan(plan(replace(Config(), device_hour_cost=3.0)))
    for words in (
        "value embeds", "scaling", "flops per token", "base", "mid", "sft", "rl", "CPU cores", "1 x H100", "dollars",
        "weights", "optimizer", "activations", "shards", "checkpoints", "estimate", "40% MFU", "smoltalk 800", "not counted",
    ):  # fmt: skip
        assert words in text, words
    free = format_plan(plan(Config()))
    assert "dollars on" not in free and "no dollars, as --device-hour-cost" in free


def test_nothing_is_downloaded_or_compiled(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a plan spends nothing")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    monkeypatch.setattr(jax, "jit", forbidden)
    figures = plan(Config())
    monkeypatch.undo()
    assert figures == plan(Config())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mesh": "none"}, "--mesh"),
        ({"mesh": "tensor=5"}, "tensor=5 does not divide the key/value heads"),
        ({"mesh": "7"}, "--base.total-batch-size .* a multiple of 7 rows"),
        ({"model": ModelConfig(depth=0)}, "depth"),
        ({"base": BaseConfig(total_batch_size=1000)}, "--base.total-batch-size 1000"),
        ({"base": BaseConfig(device_batch_size=3)}, "--base.device-batch-size 3 "),
        (
            {"base": BaseConfig(target_flops=1.0)},
            "--base.target-flops 1 is less than one step .* lower --base.total-ba",
        ),
        ({"base": BaseConfig(target_param_data_ratio=1e-6)}, "--base.target-param-data-ratio 1e-06 is less than one"),
        ({"rl": RLConfig(updates_per_batch=2)}, "--rl.updates-per-batch 2 needs --rl.clip"),
    ],
)
def test_impossible_configurations_are_errors(change, words):
    with pytest.raises(UserError, match=words):
        plan(dataclasses.replace(Config(), **change))
