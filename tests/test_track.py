"""What goes to metrics.jsonl also goes to wandb and TensorBoard, where asked for; neither can end a run or hide a step."""

import errno
import importlib
import json
import os
import signal
import struct
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import tiny
from stage_runs import quiet, records, start
from tensorboardX.proto.event_pb2 import Event, SessionLog

from nanochat_jax import cli, track
from nanochat_jax.checkpoint import steps
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.optim import Schedule
from nanochat_jax.stages import pretrain
from nanochat_jax.track import numbers, tracked

TRACKED = replace(tiny.config, track=("wandb", "tensorboard"), base=replace(tiny.config.base, save_every=4))


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that writes down what it is told: `runs`, one a call of init, and how often it was asked for a login."""
    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.runs, fake.logins = [], []

    def init(**given):
        run = SimpleNamespace(given=given, id=given["id"] or f"id{len(fake.runs)}", rows=[], ends=[], axes=[])
        run.log = run.rows.append
        run.finish = lambda exit_code: run.ends.append(exit_code)
        run.define_metric = lambda name, step_metric: run.axes.append((name, step_metric))
        fake.runs.append(run)
        return run

    fake.init, fake.Settings, fake.login = init, SimpleNamespace, lambda **given: fake.logins.append(given)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def events(folder):
    """All events of a folder, in the order in which TensorBoard reads them."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            [size] = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def shown(folder):
    """(name, step) -> value as TensorBoard shows it: the start of a session takes back what is not before its step."""
    points = []
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            points = [point for point in points if point[0][1] < event.step]
        points += [((value.tag, event.step), value.simple_value) for value in event.summary.value]
    assert len({place for place, _ in points}) == len(points), "a step shows twice"
    return dict(points)


def expected(rows):
    return {(name, row["step"]): value for row in rows for name, value in numbers(row).items()}


def opened(folder, config, step=0, said=None):
    """The log of a stage at work, and the context in which it is tracked."""
    log = MetricsLog(folder / "run" / "base")
    log.drop_after(step)
    return log, tracked(log, config, step, quiet if said is None else said.append)


def test_names_of_numbers():
    record = {"kind": "rl", "step": 3, "loss": 1.5, "mfu": None, "pass": {"1": 0.5, "by": {"2": 1}}, "note": "text"}
    assert numbers(record) == {"rl/loss": 1.5, "rl/pass/1": 0.5, "rl/pass/by/2": 1}


def test_a_stage_that_was_stopped_and_broken_is_whole_in_both(tmp_path, wandb, monkeypatch):
    """SIGTERM in the third step, an error in the eighth that costs the steps from 4 on, then the rest."""
    folder, rates = start(tmp_path / "mine", TRACKED), Schedule.hyper

    def once(step, action):
        monkeypatch.setattr(Schedule, "hyper", lambda self, it: (it == step and action()) or rates(self, it))

    def broken():
        raise RuntimeError("broken")

    once(2, lambda: signal.raise_signal(signal.SIGTERM))
    pretrain.run(TRACKED, folder, quiet)
    assert max(steps(folder / "base" / "checkpoints")) == 3
    once(7, broken)
    with pytest.raises(RuntimeError, match="broken"):
        pretrain.run(TRACKED, folder, quiet)
    written = [(row["kind"], row["step"]) for row in records(folder)]
    assert max(steps(folder / "base" / "checkpoints")) == 4 and ("train", 5) in written and ("val", 4) in written
    once(None, None)
    pretrain.run(TRACKED, folder, quiet)

    assert shown(folder / "base") == pytest.approx(expected(records(folder)), rel=1e-6)
    steps_sent = [
        event.step for event in events(folder / "base") if any(v.tag == "train/loss" for v in event.summary.value)
    ]
    assert steps_sent == [*range(6), *range(4, 12)], "two steps were really done again"

    first, *later = wandb.runs
    assert [run.ends for run in wandb.runs] == [[0], [1], [0]]
    assert [run.given["id"] for run in wandb.runs] == [None, first.id, first.id] and first.given["resume"] == "allow"
    steps_sent = [row["step"] for run in wandb.runs for row in run.rows if "train/loss" in row]
    assert steps_sent == [*range(6), *range(4, 12)], "at its own step each"
    sent = {
        (name, row["step"]): value
        for run in wandb.runs
        for row in run.rows
        for name, value in row.items()
        if name != "step"
    }
    assert sent == expected(records(folder)), "the newest of what stands there twice is the log's"
    assert all(run.axes == [("*", "step")] for run in wandb.runs)
    given = later[-1].given
    assert (given["project"], given["group"], given["name"]) == ("nanochat-jax", "mine", "mine/base")
    assert given["config"] == asdict(TRACKED) and given["dir"] == str(folder / "base")
    assert given["settings"].finish_timeout, "else a lost network would hold up the end of a stage for ever"


def test_project_of_the_environment(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "other")
    with opened(tmp_path, replace(tiny.config, track=("wandb",)))[1]:
        assert wandb.runs[0].given["project"] == "other"


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path, wandb, monkeypatch, when):
    said, start_run = [], wandb.init

    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    def init(**given):
        run = start_run(**given)
        setattr(run, when, fail)
        return run

    monkeypatch.setattr(wandb, "init", fail if when == "init" else init)
    log, inside = opened(tmp_path, TRACKED, said=said)
    with inside:
        for step in range(3):
            log.write("train", step=step, loss=1.0)
    assert said == ["base: --track wandb failed and is left out, metrics.jsonl goes on: ConnectionError: no network"]
    rows = log.read(log.path)
    assert len(rows) == 3 and shown(log.path.parent) == expected(rows), "the other one goes on"
    if when == "log":
        assert wandb.runs[0].ends == [1], "a run that is left open would be found by the next stage"


def test_a_full_disk_under_the_event_file_costs_no_checkpoint(tmp_path, monkeypatch):
    import tensorboardX.record_writer as tensorboard

    config, said = replace(TRACKED, track=("tensorboard",)), []
    folder, write = start(tmp_path, config), tensorboard.RecordWriter.write
    monkeypatch.setattr(track, "FLUSH_SECONDS", 0)

    def full(writer, data):
        if b"train/loss" in data and Event.FromString(data).step == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, data)

    monkeypatch.setattr(tensorboard.RecordWriter, "write", full)
    pretrain.run(config, folder, said.append)
    assert len([line for line in said if "--track tensorboard failed" in line and "No space left" in line]) == 1
    assert max(steps(folder / "base" / "checkpoints")) == 12 and (folder / "base" / "done.json").exists()
    assert [row["step"] for row in records(folder) if row["kind"] == "train"] == list(range(12))
    assert max(step for _, step in shown(folder / "base")) == 4


def test_of_several_processes_the_leader_alone_sends(tmp_path, wandb, monkeypatch):
    met = []
    monkeypatch.setattr(track, "is_leader", lambda: False)
    monkeypatch.setattr(track, "barrier", met.append)
    log, inside = opened(tmp_path, TRACKED)
    with inside:
        assert met == ["trackers opened"], "it waits for the leader's network here, not in a collective"
        log.write("train", step=0, loss=1.0)
    assert met == ["trackers opened", "trackers closed"]
    assert not wandb.runs and not log.path.with_name("tensorboard").exists()


def test_two_starts_in_one_second_have_two_event_files(tmp_path, monkeypatch):
    import tensorboardX.event_file_writer as tensorboard

    close, closed = tensorboard.EventsWriter.close, []
    monkeypatch.setattr(tensorboard, "time", SimpleNamespace(time=lambda: 1e9))
    monkeypatch.setattr(tensorboard.EventsWriter, "close", lambda writer: (close(writer), closed.append(writer)))
    for step in range(3):
        log, inside = opened(tmp_path, replace(tiny.config, track=("tensorboard",)), step)
        with inside:
            log.write("train", step=step, loss=float(step))
        assert len(closed) == step + 1
    assert shown(log.path.parent) == {("train/loss", step): step for step in range(3)}


def run_cli(capsys, *words):
    """(status, lines of stderr) of a command line on the tiny experiment; `words` may name another."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_package_is_one_line_before_anything_is_done(tmp_path, capsys, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    command = ["pretrain", "--experiment", tiny.__file__, "--workdir", tmp_path / "run"]
    status, lines = run_cli(capsys, *command, "--track", name)
    assert status == 1 and lines[-1].startswith(f"error: --track {name}: ") and f"pip install {package}," in lines[-1]
    assert len(lines) == 2 and not (tmp_path / "run").exists()
    # Where it is not asked for, it is not missed.
    importlib.reload(track)
    said = []
    with opened(tmp_path, tiny.config, said=said)[1]:
        assert not said
    status, lines = run_cli(capsys, *command)
    assert status == 1 and "tokenizer" in lines[-1]


def test_wandb_without_a_login_or_too_old(tmp_path, capsys, wandb, monkeypatch):
    def login(verify):
        raise ValueError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", login)
    status, lines = run_cli(
        capsys, "pretrain", "--experiment", tiny.__file__, "--workdir", tmp_path / "run", "--track", "wandb"
    )
    assert status == 1 and len(lines) == 2 and not (tmp_path / "run").exists()
    assert "--track wandb: No API key configured" in lines[-1] and "WANDB_MODE=offline" in lines[-1]
    monkeypatch.setenv("WANDB_MODE", "offline")
    track.check(("wandb",))  # needs none
    monkeypatch.setattr(wandb, "Settings", lambda console: None)
    with pytest.raises(UserError, match=r"finish_timeout.*pip install --upgrade wandb"):
        track.check(("wandb",))


def test_by_the_command_line_and_by_an_experiment(tmp_path, capsys, wandb):
    """Tracked, not tracked, tracked elsewhere: one run goes on, since what it learns from is the same."""
    folder = start(tmp_path / "run", tiny.config)
    path = tmp_path / "mine.py"
    path.write_text("from dataclasses import replace\nimport tiny\nconfig = replace(tiny.config, track=('wandb',))\n")
    for words, last in (
        (["--experiment", tiny.__file__, "--track", "tensorboard", "wandb"], 2),
        (["--experiment", tiny.__file__], 4),
        (["--experiment", path], 6),
    ):
        status, lines = run_cli(capsys, "pretrain", *words, "--workdir", folder, "--base.stop-after", last)
        assert status == 0, lines
    assert [row["step"] for row in records(folder) if row["kind"] == "train"] == list(range(6))
    assert {step for name, step in shown(folder / "base") if name == "train/loss"} == {0, 1}
    assert [[row["step"] for row in run.rows if "train/loss" in row] for run in wandb.runs] == [[0, 1], [4, 5]]
    assert len({run.id for run in wandb.runs}) == 1 and len(wandb.logins) == 2
    assert json.loads((folder / "config.json").read_text())["config"]["track"] == ["wandb"]

    status, lines = run_cli(capsys, "pretrain", "--workdir", folder, "--track", "comet")
    assert status == 2 and "'comet'" in lines[-1] and "tensorboard" in lines[-1]
    path.write_text("from dataclasses import replace\nimport tiny\nconfig = replace(tiny.config, track='wandb')\n")
    status, lines = run_cli(capsys, "pretrain", "--workdir", folder, "--experiment", path)
    assert status == 2 and "--track 'wandb' is not of type tuple" in lines[-1]
