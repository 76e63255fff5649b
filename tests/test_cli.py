"""The command line: options as promised, and one clear line for every mistake a user can make."""

import errno
import io
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import chat, cli, run
from nanochat_jax.checkpoint import Checkpointer
from nanochat_jax.config import Config, DataConfig, GPTConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.model import param_shapes
from nanochat_jax.server.context import fit
from nanochat_jax.tasks import LOADERS
from nanochat_jax.tasks.hub import load_rows
from nanochat_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
EXPERIMENT = """
from dataclasses import replace
from nanochat_jax.config import Config
c = Config()
config = replace(
    c,
    model=replace(c.model, depth=1, aspect_ratio=32, head_dim=16, sequence_len=64),
    data=replace(c.data, source="embedded", packing="stream"),
    base=replace(c.base, num_iterations=3, total_batch_size=128, device_batch_size=1),
    eval=replace(c.eval, base=("bpb",)),
)
"""
TEXTS = [f"the cat sat on mat {i}, and then it ran away from the dog\n" for i in range(200)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experiments") / "mini.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, experiment) -> Path:
    """A run folder with a tokenizer and a base model that finds all tokens equally likely."""
    workdir = tmp_path_factory.mktemp("runs") / "mini"
    config = cli.load_experiment(experiment)
    run.open_run(config, workdir, log=cli.log)
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.save(workdir / "tokenizer")
    cfg = GPTConfig.from_depth(config.model, tokenizer.vocab_size)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))
    checkpoints = Checkpointer(workdir / "base" / "checkpoints", 1)
    checkpoints.save(3, {"params": params}, {})
    checkpoints.wait()
    return workdir


def expect_error(capsys, argv: list, status: int, *parts: str) -> None:
    """`argv` ends with `status` and a last line on stderr that starts with "error:" and names `parts`."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == status
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert errors == captured.err.splitlines()[-1:], captured.err
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in errors[0]


def parquet(folder: Path, name: str, column: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({column: TEXTS}), folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["nonsense"], ["unknown command 'nonsense'", "download tokenizer pretrain mid sft rl eval chat serve report"]),
        (["convert"], ["from-nanochat", "to-hf"]),
        (["pretrain", "--model.depht", "3"], ["--model.depht", "perhaps you meant --model.depth"]),
        (["pretrain", "--model.depth", "deep"], ["--model.depth", "'deep'"]),
        (["pretrain", "--model.depth"], ["--model.depth"]),
        (["pretrain", "--data.packing", "tight"], ["--data.packing", "'tight'", "bestfit"]),
        (["pretrain", "extra"], ["extra"]),
        (["chat", "--source", "tokenizer"], ["--source", "'tokenizer'"]),
        (["chat", "--json"], ["--json needs a prompt"]),
        (["chat", "-p", " "], ["--prompt is empty"]),
        (["eval", "--max-examples", "0"], ["--max-examples 0", "at least 1"]),
        (["eval", "--tasks", ","], ["--tasks names nothing"]),
        (["pretrain", "--workdir"], ["--workdir"]),
    ],
)
def test_usage_errors(capsys, experiment, tmp_path, argv, parts):
    name, *rest = argv
    expect_error(capsys, [name, "--experiment", experiment, "--workdir", tmp_path / "w", *rest], 2, *parts)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_frames_in_errors(capsys, monkeypatch, encoding):
    """tyro looks at stdout's encoding to choose what it draws frames with."""
    with open(os.devnull, "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["bench", "train", "--repeat", "x", "--experiment", "experiments/smoke.py"]) == 2
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "--repeat" in error and "'x'" in error
    assert not {"─", "│", "╭"} & set(error) and "----" not in error


def test_mistakes_in_an_experiment_file(capsys, tmp_path):
    path = tmp_path / "mine.py"
    expect_error(capsys, ["pretrain", "--experiment", path], 2, "mine.py", "no such file")
    path.write_text("config = 3\n")
    expect_error(capsys, ["pretrain", "--experiment", path], 2, "mine.py", "must define `config`")
    path.write_text("import nowhere_to_be_found\n")
    expect_error(capsys, ["pretrain", "--experiment", path], 2, "mine.py", "nowhere_to_be_found")
    path.write_text("raise SystemExit('bye')\n")
    expect_error(capsys, ["pretrain", "--experiment", path], 2, "mine.py", "bye")
    for mistake, words in (
        ("mesh=8", "--mesh 8 is not of type str"),
        ('model=replace(c.model, depth="4")', "--model.depth '4' is not of type int"),
        ("base=replace(c.base, num_iterations=2.5)", "--base.num-iterations 2.5 is not of type int | None"),
        ('sft=replace(c.sft, mixture=("gsm8k"))', "--sft.mixture 'gsm8k' is not of type tuple[str, ...]"),
        ('eval=replace(c.eval, chat=("gsm8k", 5))', "--eval.chat ('gsm8k', 5) is not of type tuple[str, ...]"),
    ):
        path.write_text(f"{EXPERIMENT}\nconfig = replace(config, {mistake})\n")
        expect_error(capsys, ["pretrain", "--experiment", path], 2, "mine.py", words)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--sft.mixture", "arithmetic:5", "nosuch"], "unknown task 'nosuch'"),
        (["--mid.mixture", "bpb"], "--mid.mixture: unknown task 'bpb'"),
        (["--sft.mixture", "chats.json"], "gsm8k, files named *.jsonl"),
        (["--eval.chat", "arithmetic", "foo"], "--eval.chat: unknown task 'foo'"),
        (["--rl.task", "bar"], "--rl.task: unknown task 'bar'"),
        (["--rl.task", "choice"], "--rl.task: 'choice' cannot be used here"),
        (["--sft.mixture", "mmlu:100"], "--sft.mixture: 'mmlu' cannot be used here"),
        (["--eval.chat", "smoltalk"], "--eval.chat: 'smoltalk' cannot be used here"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_of_later_stages_are_found_before_anything_is_done(capsys, experiment, tmp_path, options, part):
    for more in ([], ["--plan"]):
        argv = ["pretrain", "--experiment", experiment, "--workdir", tmp_path / "w", *options, *more]
        expect_error(capsys, argv, 2, part)
    assert not (tmp_path / "w").exists()


def test_two_processes_do_not_train_in_one_folder(capsys, experiment, trained):
    argv = ["pretrain", "--experiment", experiment, "--workdir", trained]
    with run.locked(trained):
        expect_error(capsys, argv, 1, f"being trained in by process {os.getpid()}", "another --workdir")
    with run.locked(trained):
        pass  # it is free again


@pytest.mark.parametrize("name", ["a[1]", "a\\b", "a*", "a?"])
def test_paths_that_checkpoints_could_not_be_read_from(capsys, experiment, tmp_path, name):
    argv = ["pretrain", "--experiment", experiment, "--workdir", tmp_path / name / "w"]
    expect_error(capsys, argv, 1, f"{name}/w: no checkpoint could be read", "name one without")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("~nobody-of-this-name/w", ["~nobody-of-this-name/w: ~nobody-of-this-name is no home", "write the path out"]),
        ("a" * 300, ["File name too long"]),
    ],
)
def test_paths_that_can_be_none(capsys, experiment, trained, tmp_path, monkeypatch, path, parts):
    monkeypatch.chdir(tmp_path)
    begin = ["pretrain", "--experiment", experiment, "--workdir"]
    expect_error(capsys, [*begin, path], 1, *parts)
    expect_error(capsys, [*begin, "w", "--data.dir", path], 1, *parts)
    expect_error(capsys, ["eval", "--workdir", path], 1, *parts)
    expect_error(capsys, ["report", "--workdir", trained, "--against", path], 1, *parts)
    expect_error(capsys, ["sft", *begin[1:], "w", "--plan", "--sft.mixture", f"{path}.jsonl"], 1, path)
    assert not list(tmp_path.glob("w/*/"))


def test_a_mirror_that_can_be_none():
    with pytest.raises(UserError, match="~nobody-of-this-name is no home"):
        load_rows(DataConfig(mirror="~nobody-of-this-name"), "openai/gsm8k", "main", "test", [])


def test_bad_training_data(capsys, experiment, tmp_path):
    argv = ["pretrain", "--experiment", experiment, "--workdir", tmp_path / "run", "--data.dir"]
    expect_error(capsys, [*argv, tmp_path / "nowhere"], 1, "nowhere")
    parquet(tmp_path / "columns", "a.parquet")
    parquet(tmp_path / "columns", "b.parquet", column="body")
    expect_error(capsys, [*argv, tmp_path / "columns"], 1, "b.parquet", "text")
    parquet(tmp_path / "corrupt", "a.parquet")
    shard = parquet(tmp_path / "corrupt", "b.parquet")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    expect_error(capsys, [*argv, tmp_path / "corrupt"], 1, "b.parquet")


@pytest.mark.parametrize(
    ("options", "status", "parts"),
    [
        (["--mesh", "tensor=3"], 1, ["tensor=3", "does not divide"]),
        (["--mesh", "4"], 1, ["total-batch-size", "4"]),
        (["--mesh", "99"], 1, ["99", "8 found", "xla_force_host_platform_device_count=99"]),
        (["--mesh", "many"], 2, ["--mesh 'many'"]),
        (["--attention", "cudnn"], 1, ["cudnn", "--attention auto"]),
        (["--native", "on", "--compute-dtype", "bfloat16"], 1, ["--native on", "bfloat16", "leave it at auto"]),
        (["--native", "yes"], 2, ["--native", "yes"]),
        (["--model.depth", "0", "--force"], 2, ["--model.depth 0"]),
        (["--model.window-pattern", "XYZ"], 2, ["--model.window-pattern 'XYZ'"]),
    ],
)
def test_what_cannot_run(capsys, experiment, trained, tmp_path, options, status, parts):
    """Anywhere: status 2, as for an unknown option; here: 1."""
    Tokenizer.load(trained / "tokenizer").save(tmp_path / "tokenizer")
    expect_error(capsys, ["pretrain", "--experiment", experiment, "--workdir", tmp_path, *options], status, *parts)


def test_no_model_to_load(capsys, experiment, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_error(capsys, ["chat", "-p", "hi"], 1, "no model under runs/", "run_speedrun.py")
    expect_error(capsys, ["eval", "--workdir", "nowhere"], 1, "nowhere", "config.json")
    expect_error(capsys, ["serve", "--workdir", trained, "--source", "sft", "--port", 0], 1, "sft", "there: base")
    expect_error(capsys, ["sft", "--workdir", "fresh", "--experiment", experiment], 1, "tokenizer")


def test_overview_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ")] == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_options_and_defaults(capsys, name):
    assert cli.main([name, "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert cli.main([name, "--help"]) == 0
    own = capsys.readouterr().out
    for option in ("--workdir", "--experiment", "--mesh", "--seed"):
        assert option in whole and option in own
    about = {"pretrain": "base"}.get(name, name)
    for section, option in {"model": "aspect-ratio", "base": "target-flops", "eval": "max-new-tokens"}.items():
        assert f"--{section}.{option}" in whole
        assert (f"--{section}.{option}" in own) == (section == about) != (f"--{section}.* " in own)
    for text in (whole, own):
        assert "(default: 42)" in text and "speedrun.py" in text
    assert f"{name} --help-all" in own


def test_options_of_the_contract(experiment):
    def parsed(name, *words):
        kind = cli.COMMANDS[name][0]
        return cli.parse(kind, cli.load_experiment(experiment), words, name, "")

    options = parsed("eval", "--source", "rl", "--tasks", "bpb,core", "--max-examples", "5")
    assert (options.source, options.tasks, options.max_examples) == ("rl", "bpb,core", 5)
    options = parsed(
        "chat", "-p", "hi", "--raw", "--temperature", "0", "--top-k", "3", "--top-p", "0.5", "--min-p", "0.1"
    )
    assert (options.prompt, options.raw, options.top_k, options.min_p) == ("hi", True, 3, 0.1)
    options = parsed("serve", "--host", "::1", "--port", "1", "--token", "t")
    assert (options.host, options.port, options.token) == ("::1", 1, "t")
    options = parsed(
        "sft", "--plan", "--sft.init-from", "runs/a/base", "--sft.mixture", "gsm8k", "a.jsonl*2", "--data.streams", "4"
    )
    assert options.plan and options.config.sft.mixture == ("gsm8k", "a.jsonl*2") and options.config.data.streams == 4
    assert options.config.base.num_iterations == 3, "what is not given stays as the experiment has it"


def test_a_file_where_a_folder_is_to_be(capsys, experiment, tmp_path):
    (tmp_path / "climbmix").touch()
    argv = ["download", "--experiment", experiment, "--data.source", "climbmix", "--data.cache"]
    expect_error(capsys, [*argv, tmp_path], 1, "File exists", "climbmix")
    expect_error(capsys, [*argv, tmp_path / "climbmix"], 1, "Not a directory", "climbmix")


def test_a_port_that_is_taken_is_noticed_before_the_model_is_read(capsys, trained, monkeypatch):
    monkeypatch.setattr(cli, "_engine", lambda *_, **__: pytest.fail("the model is read"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expect_error(capsys, ["serve", "--workdir", trained, "--port", port], 1, f"--port {port}: cannot listen there")


def test_default_experiment_where_there_is_no_gpu(capsys):
    assert cli.main(["download"]) == 0
    assert "tiny_cpu.py (JAX sees no GPU or TPU)" in capsys.readouterr().err


def test_a_run_remembers_its_configuration(capsys, trained, tmp_path, monkeypatch):
    config, _, origin = cli._defaults(["--workdir", str(trained)], starts_run=False)
    assert config == run.read_config(trained) and origin == f"{trained}/config.json"
    monkeypatch.chdir(trained.parent.parent)
    trained.parent.rename("runs")
    try:
        assert cli._defaults([], starts_run=False)[1] == Path("runs/mini")
    finally:
        Path("runs").rename(trained.parent)


def test_fields_that_may_not_change(tmp_path):
    config = Config()
    run.open_run(config, tmp_path)
    other = replace(config, model=replace(config.model, depth=3), base=replace(config.base, num_iterations=7))
    run.open_run(other, tmp_path)  # nothing has begun
    assert run.read_config(tmp_path) == other
    (tmp_path / "base" / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(run.UserError, match=r"base\.num_iterations was 7, now None; model\.depth was 3, now 12"):
        run.open_run(config, tmp_path)
    free = replace(
        other,
        mesh="8",
        attention="reference",
        data=replace(other.data, dir="/elsewhere"),
        base=replace(other.base, device_batch_size=1, stop_after=3, eval_every=1),
        sft=replace(other.sft, num_iterations=9),  # sft has not begun
        eval=replace(other.eval, batch_size=1),
    )
    run.open_run(free, tmp_path)
    # Where to end is asked of one start: the next one, of the folder alone, goes on.
    assert run.read_config(tmp_path) == replace(free, base=replace(free.base, stop_after=None))
    said = []
    run.open_run(config, tmp_path, force=True, log=said.append)
    assert run.read_config(tmp_path) == config and len(said) == 2


def test_how_answers_are_computed_is_asked_for_anew_where_a_model_is_used(experiment, tmp_path):
    run.open_run(replace(cli.load_experiment(experiment), native="on", mesh="2"), tmp_path)
    for uses, expected in ((False, ("on", "2")), (True, ("auto", "1"))):
        config, *_ = cli._defaults(["--workdir", str(tmp_path)], starts_run=not uses)
        assert (config.native, config.mesh) == expected
    record = json.loads((tmp_path / "config.json").read_text())
    for was, now in ((True, "on"), (False, "auto")):  # a flag, before it was three words
        record["config"]["native"] = was
        (tmp_path / "config.json").write_text(json.dumps(record))
        assert run.read_config(tmp_path).native == now


def test_a_start_that_fails_leaves_no_values_behind(capsys, experiment, tmp_path, monkeypatch):
    """Neither the first start of a run nor a later one; but one that has made something does."""
    workdir, begin = tmp_path / "w", ["pretrain", "--experiment", experiment, "--workdir", tmp_path / "w"]
    expect_error(capsys, [*begin, "--mesh", "64", "--data.dir", tmp_path / "no"], 1, "no")
    assert not (workdir / "config.json").exists()
    config = cli.load_experiment(experiment)
    run.open_run(config, workdir)
    again = ["pretrain", "--workdir", workdir]
    expect_error(capsys, [*again, "--mesh", "64"], 1, "no tokenizer")
    assert run.read_config(workdir) == config

    def half_done(stage, options, workdir):
        (workdir / "base" / "checkpoints" / "step_00000001").mkdir(parents=True)
        raise cli.UserError("the disk is full")

    monkeypatch.setitem(cli.COMMANDS, "pretrain", (cli.TrainOptions, partial(half_done, "base"), ""))
    expect_error(capsys, [*again, "--mesh", "2"], 1, "full")
    assert run.read_config(workdir) == replace(config, mesh="2")


def test_values_forced_on_a_finished_stage_are_not_kept(capsys, experiment, trained, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    (workdir / "base" / "done.json").write_text("{}")
    config = run.read_config(workdir)
    assert cli.main(["pretrain", "--workdir", str(workdir), "--force", "--model.depth", "3", "--base.keep", "9"]) == 0
    said = capsys.readouterr().err
    assert "forced: model.depth was 1, now 3" in said and "finished before, skipped" in said
    assert "the values of this start are not kept" in said and run.read_config(workdir) == config
    assert cli.main(["pretrain", "--workdir", str(workdir), "--force", "--base.keep", "9"]) == 0  # free to change
    assert run.read_config(workdir) == replace(config, base=replace(config.base, keep=9))


def test_values_forced_on_a_finished_stage_stay_out_where_another_is_trained(trained, tmp_path):
    workdir, said = tmp_path / "w", []
    shutil.copytree(trained, workdir)
    (workdir / "base" / "done.json").write_text('{"stage": "base"}')
    config = run.read_config(workdir)
    changed = replace(config, base=replace(config.base, matrix_lr=0.5), mid=replace(config.mid, matrix_lr=0.5), seed=7)
    run.open_run(changed, workdir, force=True, log=said.append)
    assert run.read_config(workdir) == replace(changed, base=config.base)
    assert f"base is finished: base.matrix_lr stays {config.base.matrix_lr} in config.json" in said


def test_a_disk_that_is_full_where_no_checkpoint_is_written(capsys, experiment, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as the system says it, without a name

    monkeypatch.setattr(os, "fsync", full)
    argv = ["pretrain", "--experiment", experiment, "--workdir", tmp_path / "w"]
    expect_error(capsys, argv, 1, "the disk is full", str(tmp_path / "w" / "config.json"), "free some space")
    assert not list((tmp_path / "w").glob("*.part"))


def test_data_files_of_a_run(tmp_path):
    run.open_run(Config(), tmp_path / "run")
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    a.write_bytes(b"123")
    b.write_bytes(b"4567")
    run.record_data(tmp_path / "run", [a, b])
    run.record_data(tmp_path / "run", [b, a])
    b.write_bytes(b"45")
    with pytest.raises(run.UserError, match=r"bytes of b\.parquet was 4, now 2"):
        run.record_data(tmp_path / "run", [a, b])
    with pytest.raises(run.UserError, match=r"bytes of a\.parquet was 3, now None"):
        run.record_data(tmp_path / "run", [b])
    run.record_data(tmp_path / "run", [a, b], force=True)
    run.record_data(tmp_path / "run", [a, b])


def test_config_json_is_checked(tmp_path, capsys):
    run.open_run(Config(), tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    assert record["versions"]["jax"] == jax.__version__
    record["config"]["model"]["depth"] = "2"
    path.write_text(json.dumps(record))
    expect_error(capsys, ["eval", "--workdir", tmp_path], 1, "config.json: model.depth '2' is not of type int")
    record["config"]["model"]["depth"] = 2
    record["config"]["base"]["future"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(run.UserError, match=r"unknown field base\.future"):
        run.read_config(tmp_path)
    for odd, words in (
        ({"config": []}, r"config is \[\], not"),
        ({"config": {"base": None}}, "base is None, not an obj"),
    ):
        path.write_text(json.dumps(odd))
        with pytest.raises(run.UserError, match=rf"config\.json: {words}"):
            run.read_config(tmp_path)
    path.write_text("{")
    with pytest.raises(run.UserError, match="damaged"):
        run.read_config(tmp_path)


def test_newest_model(tmp_path):
    for stage in ("base", "sft"):
        checkpoints = Checkpointer(tmp_path / "runs" / "a" / stage / "checkpoints", 1)
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(2)}}, {})
        checkpoints.wait()
    (tmp_path / "runs" / "b" / "base" / "checkpoints").mkdir(parents=True)
    pruned = tmp_path / "runs" / "b" / "base" / "checkpoints" / "step_00000001"
    pruned.symlink_to(tmp_path / "gone")  # listed, and gone when it is looked at
    assert run.newest_run(tmp_path / "runs") == tmp_path / "runs" / "a"
    assert run.newest_model(tmp_path / "runs" / "a") == "sft"
    assert run.newest_model(tmp_path / "runs" / "a", "base") == "base"


@pytest.mark.parametrize("name", ["smoltalk", "identity", "foo"])
def test_what_cannot_be_evaluated_is_said_before_anything_is_measured(capsys, trained, monkeypatch, name):
    monkeypatch.setattr("nanochat_jax.stages.evaluate.load_model", None)
    said = f"{name!r} cannot be used here" if name in LOADERS else f"unknown task {name!r}"
    expect_error(
        capsys, ["eval", "--workdir", trained, "--tasks", f"choice, {name}"], 2, f"--tasks: {said}", "bpb, core"
    )


def test_chat_answers_once(capsys, trained):
    sampling = ["--max-tokens", "6", "--seed", "1"]
    answers = []
    for _ in range(2):
        assert cli.main(["chat", "--workdir", str(trained), "-p", "the cat", "--raw", "--json", *sampling]) == 0
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1
        answers.append(json.loads(out))
    assert answers[0] == answers[1]
    assert answers[0]["model"] == "mini/base" and answers[0]["usage"]["completion_tokens"] <= 6
    assert cli.main(["chat", "--workdir", str(trained), "-p", "the cat", "--raw", *sampling]) == 0
    assert capsys.readouterr().out == answers[0]["text"] + "\n"
    assert cli.main(["chat", "--workdir", str(trained), "-p", "the cat", "--raw", "--step", "3", *sampling]) == 0
    assert capsys.readouterr().out == answers[0]["text"] + "\n"
    expect_error(capsys, ["chat", "--workdir", trained, "-p", "a", "--step", "4"], 1, "no checkpoint of step 4", ": 3")
    expect_error(capsys, ["chat", "--workdir", trained, "-p", "a", "--step", "best"], 1, "validation")
    expect_error(capsys, ["chat", "--workdir", trained, "--raw", "-p", "dog " * 200], 1, "1 to 63 fit")
    expect_error(capsys, ["chat", "--workdir", trained, "-p", "a", "--top-p", "2"], 2, "top_p 2")


def test_chat_of_several_turns(capsys, trained, monkeypatch):
    lines = iter(
        ["the cat", "", "dog " * 200, "and then", "/help", "/reset", "/tmp/x is a path", "/quit", "never read"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    lengths, seeds, stream = [], [], Engine.stream

    def stream_and_note(engine, ids, sampling):
        seeds.append(sampling.seed)
        return stream(engine, ids, sampling)

    def fit_and_count(messages, *rest):
        lengths.append(len(messages))
        return fit(messages, *rest)

    monkeypatch.setattr(chat, "fit", fit_and_count)
    monkeypatch.setattr(Engine, "stream", stream_and_note)
    assert cli.main(["chat", "--workdir", str(trained), "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert next(lines) == "never read"
    assert "the context holds 64" in captured.err and "new conversation" in captured.err
    assert "/help is no command: /reset starts over, /quit leaves\n" in captured.err
    assert captured.out.count("\n") >= 3
    assert lengths == [1, 3, 3, 1]
    assert len(seeds) == 3 and seeds[0] != seeds[1], "one question asked twice is not one sample"


def test_chat_goes_on_past_bytes_that_are_no_text(trained, monkeypatch):
    asked = io.TextIOWrapper(io.BytesIO(b"the \xff cat\nthe dog\nquit\nnever read\n"), "utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdin", asked)
    monkeypatch.setattr("sys.stdout", shown)
    events = [{"type": "text", "text": "caf\u00e9"}, {"type": "done", "finish_reason": "stop", "usage": {}}]
    prompts = []

    def stream(engine, ids, sampling):
        prompts.append(engine.tokenizer.decode(ids))
        yield from events

    monkeypatch.setattr(Engine, "stream", stream)
    assert cli.main(["chat", "--workdir", str(trained)]) == 0
    shown.flush()
    assert shown.buffer.getvalue() == b"caf?\ncaf?\n"
    assert "the \ufffd cat" in prompts[0] and "the dog" in prompts[1] and asked.read() == "never read\n"


def test_a_question_without_an_answer_is_left_out(capsys, monkeypatch):
    """Ctrl-C before the first word, and a model that ends at once."""
    lines, seen = iter(["one", "two", "three", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    done = {"type": "done", "finish_reason": "stop", "usage": {}}

    def stream(ids, sampling):
        seen.append(ids)
        if ids == ["one"]:
            raise KeyboardInterrupt
        yield from [done] if ids == ["two"] else [{"type": "text", "text": "yes"}, done]

    tokenizer = SimpleNamespace(render_for_completion=lambda asked: [turn["content"] for turn in asked["messages"]])
    chat.talk(SimpleNamespace(max_len=64, stream=stream), tokenizer, SamplingParams())
    assert seen == [["one"], ["two"], ["three"]]
    assert capsys.readouterr().err.count("the question is left out") == 2


TALK = """
from types import SimpleNamespace
from nanochat_jax import chat
from nanochat_jax.inference.requests import SamplingParams

def stream(ids, sampling):
    yield {"type": "text", "text": f"you said {ids[-1]}"}
    yield {"type": "done", "finish_reason": "stop", "usage": {}}

tokenizer = SimpleNamespace(render_for_completion=lambda conversation: [conversation["messages"][-1]["content"]])
chat.talk(SimpleNamespace(max_len=64, stream=stream), tokenizer, SamplingParams())
"""


def test_a_line_can_be_edited_and_several_pasted_in_a_terminal():
    readline = pytest.importorskip("readline")
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", TALK], stdin=theirs, stdout=theirs, stderr=theirs, env=env):
        os.close(theirs)
        shown = ""
        while "> " not in shown:
            shown += os.read(ours, 1000).decode()
        os.write(ours, b"ac\x1b[Db\n")  # b, after the arrow to the left
        while "you said" not in shown or "> " not in shown.rpartition("you said")[2]:
            shown += os.read(ours, 1000).decode()
        os.write(ours, b"\x1b[200~one\ntwo\x1b[201~\n")  # as terminals mark what is pasted, where they are asked to
        while shown.count("you said") < 2 or "> " not in shown.rpartition("you said")[2]:
            shown += os.read(ours, 1000).decode()
        os.write(ours, b"/quit\n")
    os.close(ours)
    assert "you said abc\r\n" in shown
    assert ("\x1b[?2004h" in shown and "you said one\r\ntwo\r\n" in shown) or "libedit" in readline.__doc__


def test_interrupt_is_quiet(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.guarded(interrupted) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("record", [None, "{", '{"config": {"newfield": 1}}'])
def test_a_report_needs_no_whole_config(capsys, tmp_path, record):
    (tmp_path / "base").mkdir()
    if record is not None:
        (tmp_path / "config.json").write_text(record)
    assert cli.main(["report", "--workdir", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists() and capsys.readouterr().out.strip().endswith("report.md")


def test_a_full_device_is_one_line_with_ways_out(capsys):
    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nat one place")

    assert cli.guarded(full) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the device's memory is full (RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.)"
    )
    assert "device-batch-size" in line and "--remat" in line and "--plan" in line

    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.guarded(broken)


LATE = """
import atexit, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["nanochat_jax", "sleep"]
runpy.run_module("nanochat_jax", run_name="__main__")
"""


def test_a_second_ctrl_c_is_quiet_too():
    """It comes while Python ends, which takes JAX a moment."""
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == 1 and done.returncode == -signal.SIGINT


SWALLOWING = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    raise ImportError("not what it looks like") from None
"""


@pytest.mark.parametrize("words", [["-m", "nanochat_jax", "report"], ["run_speedrun.py"]], ids=["command", "speedrun"])
def test_ctrl_c_while_libraries_are_imported_ends_quietly(words, tmp_path):
    (tmp_path / "tyro.py").write_text(SWALLOWING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


HEEDING = """
import os, signal, sys, time
from nanochat_jax import process
process.set_up()
from nanochat_jax import chat, cli
from nanochat_jax.server import app

def interrupted(*args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        print("heeded")

chat.talk = app.serve = interrupted
process.leave(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["chat", "serve --port 0"])
def test_ctrl_c_is_an_exception_again_where_it_has_a_meaning(command, trained):
    words = [sys.executable, "-c", HEEDING, *command.split(), "--workdir", str(trained)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heeded\n"), done.stderr


def test_as_programs():
    for words in (["-m", "nanochat_jax", "sft", "--sft.nope", "1"], ["run_speedrun.py", "--stages", "base,sleep"]):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
        assert words[-2] in done.stderr
