"""The stages as functions: equal on any mesh, exact when interrupted, and each leaving what the next one needs."""

import contextlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from stage_runs import last_state, losses, quiet, records, reinforce, start, start_after

from kernels import native
from nanochat_jax.checkpoint import steps
from nanochat_jax.config import DEFAULT_ROWS, MODEL_STAGES
from nanochat_jax.data.download import ensure_shards
from nanochat_jax.data.files import write_json
from nanochat_jax.data.shards import shard_files
from nanochat_jax.errors import UserError
from nanochat_jax.evals import core
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.model import flops_per_token
from nanochat_jax.optim import horizon
from nanochat_jax.report import write_report
from nanochat_jax.run import finished, gpt_config, load_model, open_run
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages import ahead, evaluate, finetune, pretrain, samples
from nanochat_jax.stages.ahead import check_ahead
from nanochat_jax.stages.session import open_session
from nanochat_jax.tasks import Mixture, humaneval
from nanochat_jax.train import eval_losses
from run_speedrun import SpeedrunOptions, speedrun


def test_every_stage_leaves_its_papers(run):
    for stage in (*MODEL_STAGES, "sft_continued"):
        done = json.loads((run / stage / "done.json").read_text())
        assert done["stage"] == stage and done["steps"] > 0 and done["flops"] > 0
        assert "step" in (run / stage / "samples.md").read_text()
        assert list((run / stage / "checkpoints").glob("step_*"))
    for stage in ("base", "mid", "sft"):
        steps = [row["step"] for row in MetricsLog.read(run / stage / "metrics.jsonl") if row["kind"] == "train"]
        assert steps == list(range(12))
        assert losses(run, stage)[-1] < losses(run, stage)[0]


def test_evaluations_have_the_promised_form(run):
    base = json.loads((run / "base" / "eval.json").read_text())
    assert 0 < base["bpb"]["val"] < 8
    last = [row["bpb"] for row in MetricsLog.read(run / "base" / "metrics.jsonl") if row["kind"] == "val"][-1]
    assert base["bpb"]["val"] == pytest.approx(last, rel=1e-5)
    assert 0 < base["bpb"]["train"] != base["bpb"]["val"]
    sft = json.loads((run / "sft" / "eval.json").read_text())
    assert set(sft["tasks"]) == {"arithmetic", "choice"} and sft["chatcore"] is None
    for figures in sft["tasks"].values():
        assert figures["n"] == 8 and figures["interval"][0] <= figures["accuracy"] <= figures["interval"][1]
    comparison = json.loads((run / "rl" / "eval.json").read_text())["comparison"]
    assert comparison["n"] == 8 and len(comparison["rl_minus_sft"]) == 3
    assert comparison["sft_continued_flops"] == pytest.approx(comparison["rl_flops"], rel=0.6)


def test_rl_is_compared_with_answers_that_were_given_alike(run, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "load_model", lambda workdir, source, *_: asked.append(source) or [source] * 5)
    monkeypatch.setattr(evaluate, "measure", lambda *_: {"arithmetic": {"correct": [0] * 8}})

    def compared_with(config):
        asked.clear()
        evaluate.compare(
            config, run, None, SimpleNamespace(name="arithmetic"), [1] * 8, config.eval.max_examples, quiet
        )
        return asked

    assert "sft" not in compared_with(tiny.config)
    with monkeypatch.context() as patch:  # the answers were given by a model on its way
        patch.setattr(evaluate, "finished", lambda *which: finished(*which) | {"steps": 99})
        assert "sft" in compared_with(tiny.config)
    assert "sft" in compared_with(replace(tiny.config, eval=replace(tiny.config.eval, max_new_tokens=3)))


def test_only_the_evaluation_of_the_last_step_and_of_what_is_configured_counts(run, tmp_path):
    (tmp_path / "sft").mkdir()
    for name in ("done.json", "eval.json", "correct.json"):
        (tmp_path / "sft" / name).write_text((run / "sft" / name).read_text())
    assert evaluate.is_current(tiny.config, tmp_path, "sft")
    for change, same in (({"max_examples": 7}, False), ({"chat": ("choice",)}, False), ({"base": ("core",)}, True)):
        config = replace(tiny.config, eval=replace(tiny.config.eval, **change))
        assert evaluate.is_current(config, tmp_path, "sft") == same
    saved = json.loads((tmp_path / "sft" / "correct.json").read_text())
    write_json(tmp_path / "sft" / "correct.json", saved | {"settings": {"seed": 42}})  # before names were noted
    assert evaluate.is_current(tiny.config, tmp_path, "sft")
    (tmp_path / "sft" / "eval.json").write_text(json.dumps({"step": 5}))
    assert not evaluate.is_current(tiny.config, tmp_path, "sft")
    (tmp_path / "sft" / "eval.json").write_text("{")
    assert not evaluate.is_current(tiny.config, tmp_path, "sft")


def test_another_evaluation_than_the_runs_own_leaves_its_figures(run):
    before = (run / "sft" / "eval.json").read_text()
    config = replace(tiny.config, eval=replace(tiny.config.eval, chat=("choice",), max_examples=2))
    assert set(evaluate.run(config, run, "sft", None, None, quiet)["tasks"]) == {"choice"}
    assert (run / "sft" / "eval.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mesh": "99"}, "needs 99 devices"),
        ({"mesh": "tensor=8"}, "does not divide"),
        ({"sft": replace(tiny.config.sft, total_batch_size=33)}, "--sft.total-batch-size 33"),
        ({"mid": replace(tiny.config.mid, mixture=("gone.jsonl",))}, "gone.jsonl cannot be read"),
        ({"mid": replace(tiny.config.mid, mixture=())}, "--mid.mixture is empty"),
        ({"mid": replace(tiny.config.mid, mixture=("choice:0", "identity*0"))}, "--mid.mixture is empty"),
        ({"sft": replace(tiny.config.sft, device_batch_size=3)}, "--sft.device-batch-size 3 "),
        (
            {"sft": replace(tiny.config.sft, init_from="runs/nowhere/other")},
            "sft starts from runs/nowhere/other, which has no",
        ),
        (
            {
                "data": replace(tiny.config.data, mirror="nowhere"),
                "eval": replace(tiny.config.eval, chat=("arc_easy",)),
            },
            "cannot get allenai/ai2_arc ARC-Easy test",
        ),
        ({"rl": replace(tiny.config.rl, samples_per_question=1)}, "2 samples or more"),
        ({"rl": replace(tiny.config.rl, temperature=0.0)}, "--rl.temperature 0.0"),
        ({"rl": replace(tiny.config.rl, temperature=101.0)}, "temperature 101.0 is outside 0 to 100"),
        ({"rl": replace(tiny.config.rl, updates_per_batch=2)}, "--rl.updates-per-batch 2 needs --rl.clip"),
        (
            {"mesh": "8", "base": replace(tiny.config.base, total_batch_size=tiny.config.model.sequence_len)},
            "--base.total",
        ),
    ],
)
def test_what_ends_a_later_stage_is_known_before_the_first(change, words, tmp_path):
    check_ahead(tiny.config, MODEL_STAGES, tmp_path, quiet)
    config = replace(tiny.config, **change)
    with pytest.raises(UserError, match=words):
        check_ahead(config, MODEL_STAGES, tmp_path, quiet)
    if "mesh" not in change:
        check_ahead(config, ["base"], tmp_path, quiet)  # which does not need it


def test_kernels_that_cannot_be_had_are_refused_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("kernels.native._loaded", native._loaded.__wrapped__)
    check_ahead(tiny.config, MODEL_STAGES, tmp_path, quiet)
    with pytest.raises(UserError, match=r"--native on: no C.. compiler .CXX=no-such-compiler. is found"):
        check_ahead(replace(tiny.config, native="on"), MODEL_STAGES, tmp_path, quiet)


@pytest.mark.parametrize(("streams", "words"), [(1, "--data.streams 1 cannot be dealt to 2"), (6, "no multiple of")])
def test_streams_that_processes_cannot_share_are_refused_ahead(streams, words, run, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_jax.stages.ahead.data_part", lambda mesh: (1, 2))
    config = replace(tiny.config, data=replace(tiny.config.data, streams=streams))
    with pytest.raises(UserError, match=words):
        check_ahead(config, ["base"], tmp_path, quiet)
    check_ahead(config, ["mid"], run, quiet)  # which reads everything in every process


def test_what_an_evaluation_needs_is_known_before_the_first_stage(tmp_path, monkeypatch):
    core = replace(tiny.config, eval=replace(tiny.config.eval, base=("bpb", "core")))
    with pytest.raises(UserError, match=r"has no core\.yaml"):
        check_ahead(replace(core, data=replace(core.data, eval_bundle="nowhere")), ["base"], tmp_path, quiet)

    def refuse():
        raise UserError("no isolation here")

    monkeypatch.setattr(humaneval, "require_isolation", refuse)
    programs = replace(tiny.config, eval=replace(tiny.config.eval, chat=("humaneval",)))
    with pytest.raises(UserError, match="no isolation here"):
        check_ahead(programs, ["base", "mid"], tmp_path, quiet)
    check_ahead(programs, ["base"], tmp_path, quiet)  # after which no programs are run
    on_the_way = replace(tiny.config.base, core_every=5)
    with pytest.raises(UserError, match=r"has no core\.yaml"):
        check_ahead(
            replace(tiny.config, base=on_the_way, data=replace(core.data, eval_bundle="nowhere")),
            ["base"],
            tmp_path,
            quiet,
        )


def test_prompts_that_core_could_not_score_on_the_way_are_found_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "core.yaml").touch()
    rows = [{"context": "7 " * 700, "continuation": "8"}]
    task = core.CoreTask("lm", "language_modeling", 0, " ", 0.0, rows)
    monkeypatch.setattr(core, "read_bundle", lambda folder: [task])
    data = replace(tiny.config.data, eval_bundle=str(tmp_path))
    config = replace(tiny.config, base=replace(tiny.config.base, core_every=4), data=data)
    with pytest.raises(UserError, match=r"CORE task lm has a prompt of \d+ tokens, the model reaches 640"):
        pretrain.run(config, start(tmp_path / "run", config), quiet)
    assert not list((tmp_path / "run" / "base" / "checkpoints").glob("step*"))


def test_prompts_too_long_for_rl_are_found_when_there_is_a_tokenizer(run, tmp_path):
    config = replace(tiny.config, model=replace(tiny.config.model, sequence_len=16))
    words = r"--rl\.task arithmetic has a prompt of \d+ tokens, the context is 16"
    with pytest.raises(UserError, match=words):
        check_ahead(config, ["rl"], run, quiet)
    check_ahead(config, ["sft"], run, quiet)
    with pytest.raises(UserError, match=words):
        open_run(config, tmp_path, log=quiet)
        speedrun(SpeedrunOptions(config), tmp_path)
    assert finished(tmp_path, "tokenizer") and not (tmp_path / "base").exists()


def test_whether_there_is_a_tokenizer_is_as_the_leader_sees_it(run, monkeypatch):
    """Another process may not see yet what was just written; what the check does all do together."""
    config = replace(tiny.config, model=replace(tiny.config.model, sequence_len=16))
    monkeypatch.setattr(ahead, "finished", lambda *_: None)
    monkeypatch.setattr(ahead, "leaders", lambda _: {"stage": "tokenizer"})
    with pytest.raises(UserError, match=r"--rl\.task arithmetic has a prompt of"):
        check_ahead(config, ["rl"], run, quiet)


def test_special_tokens_that_a_converted_tokenizer_has_are_taken_as_they_are(run):
    config = replace(tiny.config, tokenizer=replace(tiny.config.tokenizer, specials=("[PAD]",)))
    check_ahead(config, ["mid"], run, quiet)


def test_a_start_may_be_what_the_same_run_makes(tmp_path):
    for folder, there in ((tmp_path, True), (tmp_path / "other", False)):
        config = replace(tiny.config, sft=replace(tiny.config.sft, init_from=str(folder / "base")))
        with contextlib.nullcontext() if there else pytest.raises(UserError, match=r"sft starts from .* has no check"):
            check_ahead(config, MODEL_STAGES, tmp_path, quiet)


def test_a_start_that_the_same_run_makes_only_later_is_refused_ahead(tmp_path):
    for later in ("mid", "sft"):
        config = replace(tiny.config, mid=replace(tiny.config.mid, init_from=str(tmp_path / later)))
        with pytest.raises(UserError, match=f"mid starts from .*, which has no checkpoint: train {later} first"):
            check_ahead(config, MODEL_STAGES, tmp_path, quiet)


def test_a_stage_without_a_start_is_refused_ahead(run, tmp_path):
    for stages, missing in ((["base", "rl"], "sft"), (["tokenizer", "sft"], "base"), (["mid"], "base")):
        with pytest.raises(UserError, match=rf"{stages[-1]} starts from .*, which .*: train {missing} first"):
            check_ahead(tiny.config, stages, tmp_path, quiet)
    check_ahead(tiny.config, ["base", "sft"], tmp_path, quiet)
    check_ahead(tiny.config, ["rl"], run, quiet)
    elsewhere = replace(tiny.config, mid=replace(tiny.config.mid, init_from=str(run / "base")))
    check_ahead(elsewhere, ["mid", "sft"], tmp_path, quiet)  # sft starts from the mid to come, not from base
    for stages in (["sft"], ["mid", "sft"]):  # the first is told its start, so nobody asks for base
        told = replace(getattr(tiny.config, stages[0]), init_from=str(run / "base"))
        check_ahead(replace(tiny.config, **{stages[0]: told}), stages, tmp_path, quiet)
    (tmp_path / "mid" / "checkpoints" / "step_00000005").mkdir(parents=True)
    check_ahead(tiny.config, ["mid"], tmp_path, quiet)  # which goes on from there
    config = replace(tiny.config, rl=replace(tiny.config.rl, init_from=str(run)))
    with pytest.raises(UserError, match=rf"--rl\.init-from {run} is a run: name the stage of it, such as {run}/base"):
        check_ahead(config, ["rl"], tmp_path, quiet)
    (tmp_path / "rl" / "checkpoints" / "step_00000012").mkdir(parents=True)
    with pytest.raises(UserError, match=r"rl starts from .*/sft, which has no checkpoint"):  # so will sft_continued
        check_ahead(tiny.config, ["rl"], tmp_path, quiet)
    (tmp_path / "sft_continued" / "checkpoints" / "step_00000002").mkdir(parents=True)
    check_ahead(tiny.config, ["rl"], tmp_path, quiet)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": replace(tiny.config.tokenizer, vocab_size=400)}, "was trained with another tokenizer"),
        ({"model": replace(tiny.config.model, head_dim=8)}, "has n_head 2, this run 4"),
    ],
)
def test_a_start_that_does_not_fit_is_found_when_there_is_a_tokenizer(change, words, run, tmp_path):
    config = replace(tiny.config, rl=replace(tiny.config.rl, init_from=str(run / "sft")), **change)
    with pytest.raises(UserError, match=words):
        open_run(config, tmp_path, log=quiet)
        speedrun(SpeedrunOptions(config), tmp_path)
    assert finished(tmp_path, "tokenizer") and not (tmp_path / "base").exists()


def test_a_horizon_of_no_step_is_refused_ahead(tmp_path):
    base = replace(tiny.config.base, num_iterations=None, target_flops=1.0)
    with pytest.raises(UserError, match=r"--base\.target-flops 1 is less than one step of 512 tokens: raise it"):
        check_ahead(replace(tiny.config, base=base), ["base"], tmp_path, quiet)


def test_a_default_batch_is_checked_ahead_too(tmp_path):
    config = replace(tiny.config, mesh="3", sft=replace(tiny.config.sft, total_batch_size=None))
    for stages in (["sft"], ["rl"]):  # rl trains sft on, for comparison
        with pytest.raises(UserError, match=f"--sft.total-batch-size .* is {DEFAULT_ROWS} rows"):
            check_ahead(config, stages, tmp_path, quiet)


def test_the_report_shows_all_stages(run):
    text = write_report(run).read_text()
    for word in ("BASE", "MID", "SFT", "RL", "ChatCORE", "arithmetic"):
        assert word in text
    assert "<img" in (run / "report.html").read_text()


def test_eight_devices_give_the_same_losses(run, tmp_path):
    config = replace(tiny.config, mesh="8")
    folder = start(tmp_path, config)
    pretrain.run(config, folder, quiet)
    np.testing.assert_allclose(losses(folder), losses(run), atol=1e-3)
    finetune.run(config, folder, "mid", quiet)
    np.testing.assert_allclose(losses(folder, "mid"), losses(run, "mid"), atol=5e-3)


def test_devices_that_hold_different_copies_stop_the_run(tmp_path, monkeypatch):
    config = replace(tiny.config, mesh="8")
    monkeypatch.setattr("nanochat_jax.stages.session.parted", lambda _: ["params/wte/embedding", "params/x0_lambda"])
    with pytest.raises(
        UserError, match=r"different copies of params/wte/embedding and 1 other arrays at step \d+: a f"
    ):
        pretrain.run(config, start(tmp_path, config), quiet)
    assert not list((tmp_path / "base" / "checkpoints").glob("step*"))


def test_a_stage_says_the_seconds_that_it_notes(run, tmp_path):
    """rl leaves out those of what it is compared with."""
    folder, said = start_after(run, tmp_path, "rl", tiny.config), []
    open_session(tiny.config, folder, "rl", tiny.config.rl, said.append).finish(seconds=3600.0)
    assert finished(folder, "rl")["seconds"] == 3600
    assert "in 1h00m" in said[-1]


def test_validation_loss_counts_each_conversation_once(run, tmp_path):
    """However many rows a batch has: smaller and larger than the held-out rows."""
    session = open_session(tiny.config, run, "sft", tiny.config.sft, quiet)
    session.state = SimpleNamespace(params=load_model(run, "sft")[0])
    _, held_out = Mixture(tiny.config.sft.mixture, "train", tiny.config.data).split(30)
    packed = {"settings": tiny.config.sft, "sequence_len": 64, "seed": 1}
    values = [finetune.validation_loss(session, held_out, rows, packed) for rows in (1, 7, 64)]
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    long = {"messages": [{"role": "user", "content": "x " * 99}, {"role": "assistant", "content": "y"}]}
    assert finetune.validation_loss(session, [long], 1, packed) is None  # no target within the context


def test_held_out_conversations_are_never_trained_on():
    train, held_out = Mixture(("arithmetic:60*3", "choice:20"), "train", tiny.config.data).split(6)
    questions = [[row["messages"][0]["content"] for row in part] for part in (train, held_out)]
    assert len(questions[1]) == len(set(questions[1])) == 6
    assert not set(questions[0]) & set(questions[1])


def test_base_shows_on_the_way_what_it_writes_and_what_it_took(tmp_path):
    base = replace(tiny.config.base, num_iterations=3, sample_every=2, eval_every=2, save_every=0)
    config, said = replace(tiny.config, base=base), []
    pretrain.run(config, start(tmp_path, config), said.append)
    shown = [line.split(" -> ")[0] for line in said if " -> " in line]
    assert shown == [f"base {step}: {text!r}" for step in (2, 3) for text in samples.TEXTS]
    assert "step 3" in (tmp_path / "base" / "samples.md").read_text()
    rows = MetricsLog.read(tmp_path / "base" / "metrics.jsonl")
    seconds = [row["step_seconds"] for row in rows if row["kind"] == "train"]
    validations = [row for row in rows if row["kind"] == "val"]
    assert [row["tokens"] for row in validations] == [2 * 512, 3 * 512]
    assert [row["step_seconds"] for row in validations] == pytest.approx([seconds[1], seconds[1] + seconds[2]])
    done = finished(tmp_path, "base")
    assert validations[-1]["flops"] == done["flops"]
    assert any("base: finished: 3 steps, 1.54k tokens" in line for line in said)


def test_fine_tuning_measures_its_tasks_on_the_way(run, tmp_path):
    sft = replace(tiny.config.sft, num_iterations=5, tasks_every=2, tasks_rows=3, eval_every=0, save_every=2)
    config, said = replace(tiny.config, sft=sft), []
    folder = start_after(run, tmp_path, "sft", config)
    finetune.run(replace(config, sft=replace(sft, stop_after=2)), folder, "sft", said.append)
    finetune.run(config, folder, "sft", said.append)  # which does not measure step 2 again
    rows = [row for row in records(folder, "sft") if row["kind"] == "tasks"]
    assert [row["step"] for row in rows] == [2, 4]
    figures = evaluate.run(config, folder, "sft", ("choice",), None, quiet, step=4)
    assert rows[1]["accuracy"]["choice"] == figures["tasks"]["choice"]["accuracy"]
    assert [line.split("(n ")[1].split(",")[0] for line in said if ": accuracy" in line] == ["3", "8"] * 2
    # Continuing sft for rl's comparison is timed, and measured at its end.
    folder = start_after(run, tmp_path / "after", "rl", replace(config, sft=replace(sft, tasks_every=1)))
    finetune.continued(config, folder, 2 * 512 * flops_per_token(gpt_config(config, 512)), None, quiet)
    assert not [row for row in records(folder, "sft_continued") if row["kind"] == "tasks"]


def test_chatcore_on_the_way_is_that_of_its_five_tasks(monkeypatch):
    chances = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0}
    asked = {}

    def half_right(task, engine, tokenizer, settings, limit, log, seed):
        asked[task.name] = limit
        return {"accuracy": 0.5, "n": 8}

    monkeypatch.setattr(evaluate, "evaluate_task", half_right)
    monkeypatch.setattr(evaluate, "make_engine", lambda *_, **__: SimpleNamespace(describe=lambda: "engine"))
    names = [*chances, "spelling_bee"]
    tasks = [SimpleNamespace(name=name, kind="categorical" if chances.get(name) else "generative") for name in names]
    state, cfg, said = SimpleNamespace(params=None), SimpleNamespace(sequence_len=64), []
    config = replace(tiny.config, eval=replace(tiny.config.eval, max_examples=None))
    session = SimpleNamespace(
        config=config, state=state, cfg=cfg, tokenizer=None, mesh=None, name="sft", step=7, log=said.append
    )
    found = finetune.task_figures(session, tasks, 24)
    assert found["accuracy"] == dict.fromkeys(names, 0.5)
    assert found["chatcore"] == pytest.approx((3 / 3 + 2 / 2) / 5)  # guessing is 0
    assert {name: limit for name, limit in asked.items() if limit} == dict.fromkeys(
        ("gsm8k", "humaneval", "spelling_bee"), 24
    )
    assert said == ["engine", "sft 7: ChatCORE 0.4000"]
    assert finetune.task_figures(session, tasks[1:], 24)["chatcore"] is None


def test_conversations_that_teach_nothing_are_no_stage(run, tmp_path):
    long = {"messages": [{"role": "user", "content": "x " * 99}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(long["messages"]) + "\n" for _ in range(12)))
    sft = replace(tiny.config.sft, mixture=(str(tmp_path / "c.jsonl"),), num_iterations=None, val_rows=0)
    config = replace(tiny.config, sft=sft)
    folder = start_after(run, tmp_path / "run", "sft", config)
    with pytest.raises(UserError, match="none of the 12 conversations of the mixture has a target within 64 tokens"):
        finetune.run(config, folder, "sft", quiet)
    assert not finished(folder, "sft")


def test_what_rl_is_compared_with_is_made_anew_where_rl_started_from_another_model(run, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(finetune, "train", lambda *_: trained.append(1))
    before = finished(run, "sft_continued")
    assert before["start"] == {"stage": "sft", "step": 12, "finished": finished(run, "sft")["finished"]}
    write_json(tmp_path / "sft_continued" / "done.json", before)
    for begun in (finished(run, "rl")["start"], None):  # None: of an older rl, which noted nothing
        finetune.continued(tiny.config, tmp_path, before["flops"], begun, quiet)
        assert (tmp_path / "sft_continued").is_dir()
    others = [change | {"flops": before["flops"]} for change in ({}, {"start": before["start"] | {"stage": "mid"}})]
    for other in (*others, before | {"flops": 2 * before["flops"]}):
        write_json(tmp_path / "sft_continued" / "done.json", other)
        said = []
        finetune.continued(tiny.config, tmp_path, before["flops"], before["start"], said.append)
        assert not (tmp_path / "sft_continued").exists() and "made anew" in said[0]
    assert len(trained) == 5


def test_what_rl_is_compared_with_is_what_it_started_from(run, tmp_path, monkeypatch):
    step = steps(run / "mid" / "checkpoints")[0]
    start_from = {"init_from": str(run / "mid"), "init_step": step}
    config = replace(tiny.config, rl=replace(tiny.config.rl, num_iterations=1, eval_every=0, **start_from))
    folder, said = start(tmp_path / "run", config), []
    write_json(folder / "sft_continued" / "done.json", finished(run, "sft_continued"))
    reinforce(config, folder, said.append)  # there is no sft in this folder
    assert "sft_continued: not begun where rl was: made anew" in said
    begun = [line for line in said if "starting from" in line]
    assert begun == [f"{name}: starting from step {step} of {run / 'mid'}" for name in ("rl", "sft_continued")]
    asked = []
    monkeypatch.setattr(evaluate, "load_model", lambda *args: asked.append((*args[:2], *args[4:])) or [None] * 5)
    monkeypatch.setattr(evaluate, "measure", lambda *_: {"arithmetic": {"correct": [0] * 8}})
    figures = evaluate.compare(config, folder, None, SimpleNamespace(name="arithmetic"), [1] * 8, 8, quiet)
    write_json(folder / "rl" / "eval.json", {"comparison": figures})
    assert f"sft is what rl started from: step {step} of {run / 'mid'}." in write_report(folder).read_text()
    assert asked == [(run, "mid", step), (folder, "sft_continued", None)]


def test_rows_to_validate_on_are_missed_before_training(tmp_path):
    base = replace(tiny.config.base, eval_tokens=10)
    config, said = replace(tiny.config, base=base), []
    with pytest.raises(UserError, match="gives no row of 64 tokens within eval-tokens 10"):
        pretrain.run(config, start(tmp_path, config), said.append)
    assert not any("compiled" in line for line in said)


@pytest.mark.parametrize("gone", ["sft", "sft_continued"])
def test_rl_is_measured_where_what_it_is_compared_with_is_gone(gone, run, tmp_path):
    """And compared with the rows that are left of it."""
    for path in run.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / gone).unlink()
    (tmp_path / gone).mkdir()
    rows = {"step": finished(run, gone)["steps"], "correct": {"arithmetic": [0] * 8}}
    rows["settings"] = evaluate.decides(tiny.config, gone, tiny.config.eval.max_examples)
    for there in (True, False):
        said = []
        for name, value in (("done", finished(run, gone)), ("correct", rows if there else {})):
            (tmp_path / gone / f"{name}.json").write_text(json.dumps(value))
        figures = evaluate.run(tiny.config, tmp_path, "rl", ("arithmetic",), None, said.append)
        assert figures["tasks"]["arithmetic"]["n"] == 8 and ("comparison" in figures) == there
        assert (f"rl: not compared, as there is no checkpoint in {tmp_path / gone}" in said) != there


def test_a_first_shard_that_gives_no_figure_is_missed_before_training(tmp_path):
    train_files, val_file = shard_files(ensure_shards(tiny.config.data, quiet))
    data, said = tmp_path / "data", []
    data.mkdir()
    pq.write_table(pa.table({"text": [""] * 3}), data / "a.parquet")
    (data / "b.parquet").symlink_to(train_files[0])
    (data / "c.parquet").symlink_to(val_file)
    config = replace(tiny.config, data=replace(tiny.config.data, dir=str(data)))
    with pytest.raises(UserError, match=f"{data}/a.parquet gives no row"):
        pretrain.run(config, start(tmp_path / "run", config), said.append)
    assert not any("compiled" in line for line in said)
    # Which nobody misses where it is not asked for.
    base, no_bpb = replace(tiny.config.base, num_iterations=1), replace(tiny.config.eval, base=())
    pretrain.run(replace(config, base=base, eval=no_bpb), tmp_path / "run", quiet)
    assert finished(tmp_path / "run", "base")


def test_best_fit_from_few_documents_is_said(tmp_path):
    base, few = replace(tiny.config.base, eval_tokens=10), {}
    for packing in ("bestfit", "stream"):
        config = replace(tiny.config, base=base, data=replace(tiny.config.data, packing=packing, buffer_docs=5000))
        said = few[packing] = []
        with pytest.raises(UserError, match="gives no row"):
            pretrain.run(config, start(tmp_path / packing, config), said.append)
    assert any("--data.packing stream is for few documents" in line for line in few["bestfit"])
    assert not any("few documents" in line for line in few["stream"])


def test_a_finished_stage_is_left_alone(run):
    before = (run / "base" / "metrics.jsonl").read_text()
    said = []
    pretrain.run(tiny.config, run, said.append)
    assert "skipped" in said[0] and (run / "base" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_batch_size": 500}, "multiple of 64"),
        ({"device_batch_size": 3}, "does not divide the 8 rows"),
        ({"init_from": "nowhere/base"}, "no checkpoint"),
    ],
)
def test_impossible_values_are_one_clear_line(run, tmp_path, change, message):
    config = replace(tiny.config, base=replace(tiny.config.base, **change))
    with pytest.raises(UserError, match=message) as error:
        pretrain.run(config, start(tmp_path, config), quiet)
    assert "\n" not in str(error.value)


def test_a_stage_without_the_one_before_says_which(tmp_path):
    with pytest.raises(UserError, match="train base first"):
        finetune.run(tiny.config, start(tmp_path, tiny.config), "mid", quiet)


def test_a_finished_stage_without_its_checkpoints_is_not_to_be_trained_first(run, tmp_path):
    for stage, following in (("base", "mid"), ("mid", "sft")):
        folder = start(tmp_path / stage, tiny.config)
        write_json(folder / stage / "done.json", finished(run, stage))
        with pytest.raises(
            UserError, match=rf"{following} starts from .*/{stage}, which has no .* is finished, but they"
        ):
            check_ahead(tiny.config, [following], folder, quiet)


def test_a_stage_begun_from_one_that_was_trained_anew_is_said(run, tmp_path):
    config = replace(tiny.config, rl=replace(tiny.config.rl, control=False, num_iterations=2, eval_every=0))
    folder, said = start_after(run, tmp_path, "rl", config), []
    first = replace(config, rl=replace(config.rl, stop_after=1, num_iterations=2))
    reinforce(first, folder, quiet)
    (folder / "sft").unlink()
    shutil.copytree(run / "sft", folder / "sft")
    anew = finished(run, "sft") | {"finished": "later"}
    write_json(folder / "sft" / "done.json", anew)
    reinforce(config, folder, said.append)
    was = "it began from step 12 of sft, which was trained anew since"
    assert f"rl: {was}; delete {folder / 'rl'} to begin from that" in said
    reinforce(config, folder, said.append)
    assert said[-1] == f"rl: finished before, skipped; {was}: delete {folder / 'rl'} to train it from that"
    assert f"rl: {was}" in write_report(folder).read_text()
    assert f"rl: {was}" not in write_report(run).read_text()
    done = finished(folder, "rl")
    write_json(folder / "rl" / "done.json", done | {"start": done["start"] | {"finished": None}})
    assert "rl: it began from step 12 of sft, which was trained on since" in write_report(folder).read_text()


def test_weights_can_come_from_another_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(run))
    config = replace(tiny.config, mid=replace(tiny.config.mid, init_from="~/base", stop_after=1))
    folder = start(tmp_path, config)
    check_ahead(config, ["mid"], folder, quiet)
    finetune.run(config, folder, "mid", quiet)
    assert losses(folder, "mid")[0] == losses(run, "mid")[0]


def test_the_optimizers_moments_can_come_along(run, tmp_path):
    config = replace(tiny.config, mid=replace(tiny.config.mid, init_optimizer=True, stop_after=2))
    folder = start_after(run, tmp_path, "mid", config)
    finetune.run(config, folder, "mid", quiet)
    assert losses(folder, "mid")[0] == losses(run, "mid")[0] and losses(folder, "mid")[1] != losses(run, "mid")[1]
    base, mid = (last_state(where, stage)[0]["optimizer"] for where, stage in ((run, "base"), (folder, "mid")))
    assert mid["wte/embedding"]["count"] == base["wte/embedding"]["count"] + 2  # Adam's bias correction goes on


def test_a_stage_can_start_from_an_earlier_checkpoint(run, tmp_path):
    mid, first = replace(tiny.config.mid, stop_after=1), {}
    earliest, *_, newest = steps(run / "base" / "checkpoints")
    for step, found in ((None, newest), (earliest, earliest), ("best", newest)):
        config, said = replace(tiny.config, mid=replace(mid, init_step=step)), []
        folder = start_after(run, tmp_path / str(step), "mid", config)
        finetune.run(config, folder, "mid", said.append)
        assert f"mid: starting from step {found} of {folder / 'base'}" in said
        first[step] = losses(folder, "mid")[0]
    assert first["best"] == first[None] != first[earliest]
    config = replace(tiny.config, mid=replace(mid, init_step=5))
    other = replace(config, mid=replace(config.mid, init_from=str(run / "base")))
    with pytest.raises(UserError, match=r"--mid\.init-step 5: .*base has \d"):
        check_ahead(other, ["base", "mid"], tmp_path, quiet)
    with pytest.raises(UserError, match=r"--mid\.init-step 5: .*base has \d"):
        finetune.run(config, start_after(run, tmp_path / "gone", "mid", config), "mid", quiet)


def test_moments_that_a_conversion_has_not_are_refused(run, tmp_path):
    config = replace(tiny.config, mid=replace(tiny.config.mid, init_optimizer=True))
    folder = start(tmp_path / "converted", config)
    shutil.copytree(run / "base", folder / "base")
    write_json(folder / "base" / "done.json", finished(folder, "base") | {"converted_from": "model_000012.pt"})
    with pytest.raises(UserError, match="holds no moments"):
        finetune.run(config, folder, "mid", quiet)


def test_the_newest_model_is_the_last_stage(run):
    params, cfg, _, stage, step = load_model(run)
    assert (stage, step, cfg.n_layer) == ("rl", 12, 2) and params["wte"]["embedding"].shape == (512, 32)


def test_weights_of_another_tokenizer_or_architecture_are_refused(run, tmp_path):
    other = replace(tiny.config, tokenizer=replace(tiny.config.tokenizer, doc_cap=20))
    from_run = replace(tiny.config.base, init_from=str(run / "base"), stop_after=1)
    folder = start(tmp_path / "tokens", replace(other, base=from_run))
    with pytest.raises(UserError, match="another tokenizer"):
        pretrain.run(replace(other, base=from_run), folder, quiet)
    scaled = replace(tiny.config, model=replace(tiny.config.model, qk_scale=1.0), base=from_run)
    folder = start(tmp_path / "scale", scaled)
    with pytest.raises(UserError, match=r"qk_scale 1\.2, this run 1\.0"):
        pretrain.run(scaled, folder, quiet)


def test_other_windows_than_those_of_the_start_are_said_once(run, tmp_path):
    longer = replace(tiny.config.model, sequence_len=128)
    mid = replace(tiny.config.mid, init_from=str(run / "base"), num_iterations=1)
    config, said = replace(tiny.config, model=longer, mid=mid), []
    folder = start(tmp_path, config)
    check_ahead(config, ["mid"], folder, said.append)
    finetune.run(config, folder, "mid", said.append)
    assert [line for line in said if "windows" in line] == [
        f"mid: {run / 'base'} had the windows (128, 64), from now on (128, 128)"
    ]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Evaluates a base model that is not there, with `bpb` as its figure, in a run of `tiny.config`."""
    open_run(tiny.config, tmp_path, log=quiet)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: (None, None, None, "base", 12))
    monkeypatch.setattr(evaluate, "prepare_shards", lambda *_: ([None], None))

    def run_with(config=tiny.config, bpb=1.5, log=quiet):
        monkeypatch.setattr(evaluate, "validation_bpb", lambda *_: bpb)
        return evaluate.run(config, tmp_path, "base", None, None, log)

    return run_with


@pytest.mark.parametrize(
    ("section", "change", "same"),
    [
        ("base", {"eval_tokens": 300}, False),
        ("data", {"dir": "other"}, False),
        ("data", {"packing": "bestfit"}, False),
        ("model", {"rope_base": 10_000.0}, False),
        (None, {"compute_dtype": "bfloat16"}, False),
        (None, {"seed": 7}, False),
        ("data", {"cache": "elsewhere", "mirror": "elsewhere", "eval_bundle": "elsewhere", "num_shards": 3}, True),
        ("eval", {"batch_size": 3}, True),
        ("base", {"device_batch_size": 3}, True),
        (None, {"attention": "reference", "loss_chunk": 5}, True),
    ],
)
def test_only_what_decides_the_figures_keeps_them_out_of_the_runs_own(measured, tmp_path, section, change, same):
    if section:
        change = {section: replace(getattr(tiny.config, section), **change)}
    assert measured(replace(tiny.config, **change))["bpb"] == {"val": 1.5, "train": 1.5}
    assert (tmp_path / "base" / "eval.json").exists() == same


def test_figures_that_cannot_be_written_are_still_given(measured, tmp_path):
    (tmp_path / "base").write_text("no folder")
    said = []
    assert measured(log=said.append)["bpb"] == {"val": 1.5, "train": 1.5}
    assert f"{tmp_path / 'base'}: the evaluation cannot be written there" in said[-1]


def test_figures_that_are_no_numbers_are_null_and_named(measured, tmp_path):
    said = []
    assert measured(bpb=float("nan"), log=said.append)["bpb"] == {"val": None, "train": None}
    assert json.loads((tmp_path / "base" / "eval.json").read_text())["bpb"] == {"val": None, "train": None}
    assert said[-2].startswith("base bpb val: nan") and said[-1].startswith("base bpb train: nan")


@pytest.mark.parametrize("step_tokens", [8 * 64, None])
def test_validation_takes_no_more_rows_at_once_than_a_step_of_training(run, step_tokens):
    params, cfg, tokenizer, *_ = load_model(run, "base")
    base = replace(tiny.config.base, device_batch_size=20_000, total_batch_size=step_tokens)
    config, seen = replace(tiny.config, base=base), set()

    def nats(params, inputs, targets, *, cfg):
        seen.add(len(inputs))
        return eval_losses(params, inputs, targets, cfg=cfg)

    file = shard_files(ensure_shards(config.data, quiet))[1]
    on = (params, cfg, make_mesh("1"), tokenizer), file, config
    bpb = evaluate.validation_bpb(*on, nats=nats)
    assert seen == {(step_tokens or horizon(config, cfg).batch_tokens) // 64} and max(seen) < 20_000
    assert bpb == pytest.approx(evaluate.validation_bpb(*on, rows=3), rel=1e-5)
