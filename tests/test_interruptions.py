"""Whatever ends a stage, the same command goes on to the same end; what cannot go on says why. On real, small runs."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from stage_runs import WORK, last_state, losses, numbers, quiet, start, start_after

from nanochat_jax import checkpoint
from nanochat_jax.checkpoint import steps
from nanochat_jax.config import Config
from nanochat_jax.errors import UserError
from nanochat_jax.optim import Schedule
from nanochat_jax.run import _fixed, finished, load_model
from nanochat_jax.stages import finetune, pretrain, rl
from nanochat_jax.stages import session as session_module
from nanochat_jax.stages.session import Session
from nanochat_jax.tasks import Mixture

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds
ALONE = replace(tiny.config, rl=replace(tiny.config.rl, control=False))


def changed(stage: str, **values) -> Config:
    return replace(ALONE, **{stage: replace(getattr(ALONE, stage), **values)})


def unfinished(run: Path, folder: Path) -> Path:
    """A copy of the run's base stage that ended before it could say that it was done."""
    start(folder, ALONE)
    shutil.copytree(run / "base", folder / "base", ignore=shutil.ignore_patterns("done.json", "eval.json"))
    return folder


def assert_same_end(folder: Path, run: Path, stage: str) -> None:
    """To the last bit: everything logged, parameters and optimizer state."""
    assert numbers(folder, stage) == numbers(run, stage)
    (expected, last), (got, step) = last_state(run, stage), last_state(folder, stage)
    assert step == last == 12 and (folder / stage / "done.json").exists()
    jax.tree.map(np.testing.assert_array_equal, expected, got)


@pytest.mark.parametrize("stage", list(WORK))
def test_stopping_and_going_on_is_exact(run, tmp_path, monkeypatch, stage):
    """Four steps, as asked; SIGTERM in the seventh, which nothing else would save; the rest."""
    folder, said = start_after(run, tmp_path, stage, ALONE), []
    WORK[stage](changed(stage, stop_after=4), folder, said.append)
    assert f"{stage}: stopped after step 4 of 12 as asked; without --{stage}.stop-after it goes on" in said
    rates, handler = Schedule.hyper, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "hyper", lambda self, it: (it == 6 and signal.raise_signal(15)) or rates(self, it))
        WORK[stage](ALONE, folder, said.append)
    assert said[-1] == f"{stage}: stopped by SIGTERM after step 7, saved; the same command goes on"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert max(steps(folder / stage / "checkpoints")) == 7 and not (folder / stage / "done.json").exists()
    WORK[stage](ALONE, folder, said.append)
    assert f"{stage}: going on from step 7" in said
    assert_same_end(folder, run, stage)


def test_an_epoch_is_counted_once(run, tmp_path):
    """Its rows are known to the checkpoints, unless other data or batches are forced on them."""
    epoch = changed("sft", num_iterations=None, stop_after=1)
    folder, counted = start_after(run, tmp_path, "sft", epoch), "rows of 64 tokens"
    for config, again in ((epoch, True), (epoch, False), (changed("sft", num_iterations=None), False)):
        said = []
        WORK["sft"](config, folder, said.append)
        assert any(counted in line for line in said) == again
    assert finished(folder, "sft")["steps"] == max(steps(folder / "sft" / "checkpoints")) > 1
    (folder / "sft" / "done.json").unlink()
    said = []
    finetune.run(changed("sft", num_iterations=None, total_batch_size=256), folder, "sft", said.append, force=True)
    assert any(counted in line for line in said) and any("forced: steps was" in line for line in said)


def test_a_validation_is_broken_off_and_made_up_for(run, tmp_path, monkeypatch):
    folder, said = start(tmp_path, ALONE), []

    def endless(*_):
        signal.raise_signal(signal.SIGINT)
        while True:
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "validation_bpb", endless)
        pretrain.run(ALONE, folder, said.append)
    assert said[-1] == "base: stopped by SIGINT after step 4, saved; the same command goes on"
    assert [row["kind"] for row in numbers(folder, "base")] == ["train"] * 4
    pretrain.run(ALONE, folder, quiet)
    assert_same_end(folder, run, "base")


def test_a_save_leaves_nothing_on_the_devices(run, tmp_path, monkeypatch):
    """While it is written, a checkpoint takes memory of the host alone."""
    folder, sync, during = start(tmp_path, ALONE), checkpoint._sync, []
    gate, save = threading.Event(), Session.save

    def watched(session, data=None):
        def held():
            return sum(array.nbytes for array in jax.live_arrays())

        gc.collect()
        before = held()
        save(session, data)
        during.append(held() - before)
        gate.set()

    def slow(partial):
        gate.wait(PATIENCE)
        sync(partial)

    monkeypatch.setattr(checkpoint, "_sync", slow)
    monkeypatch.setattr(Session, "save", watched)
    pretrain.run(changed("base", stop_after=4), folder, quiet)
    assert len(during) == 2 and max(during) < 4096


@pytest.mark.slow
def test_fewer_devices_at_each_start(run, tmp_path):
    folder = start(tmp_path, ALONE)
    for mesh, last in (("8", 4), ("4", 8), ("1", None)):
        pretrain.run(replace(changed("base", stop_after=last), mesh=mesh), folder, quiet)
    np.testing.assert_allclose(losses(folder), losses(run), rtol=1e-4)


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run, tmp_path, capsys, how):
    folder = unfinished(run, tmp_path)
    newest = folder / "base" / "checkpoints" / "step_00000012"
    victim = max((path for path in newest.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.unlink()
    if how != "deleted":
        victim.write_bytes(data if how == "flipped" else data[:-1])
    said = []
    pretrain.run(ALONE, folder, said.append)
    assert f"damaged checkpoint: {victim} " in capsys.readouterr().err
    assert "base: going on from step 10" in said
    assert_same_end(folder, run, "base")


def test_a_full_disk(run, tmp_path, monkeypatch):
    folder, sync = start(tmp_path, ALONE), checkpoint._sync

    def full(partial):
        if partial.name.endswith("4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(partial)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
        with pytest.raises(UserError, match=r"the disk is full: checkpoint .*step_00000004 was not written"):
            pretrain.run(ALONE, folder, quiet)
    assert [path.name for path in (folder / "base" / "checkpoints").glob("*step*")] == ["step_00000002"]
    pretrain.run(ALONE, folder, quiet)
    assert_same_end(folder, run, "base")


@pytest.mark.parametrize("stage", ["base", "mid"])
def test_numbers_that_are_none_stop_the_run(run, tmp_path, stage):
    """After four good steps the learning rate is absurd; with the old one the run goes on from there."""
    folder = start_after(run, tmp_path, stage, ALONE)
    WORK[stage](changed(stage, stop_after=4), folder, quiet)
    place = r"conversation \d+ of \d+" if stage == "mid" else r"shard_\d+\.parquet, row group \d+, row \d+"
    broken = rf"{stage}: .*(loss|grad_norm) is (nan|inf).* at step \d+, batch of epoch 1, read up to {place}; "
    with pytest.raises(UserError, match=broken + "the last good checkpoint is step 4: lower"):
        WORK[stage](changed(stage, init_lr_frac=1e30, save_every=1), folder, quiet)
    assert all(row["loss"] is not None for row in numbers(folder, stage) if row["kind"] == "train")
    WORK[stage](ALONE, folder, quiet)
    assert_same_end(folder, run, stage)


def test_numbers_that_are_none_before_the_first_checkpoint(tmp_path):
    config = changed("base", init_lr_frac=1e30, save_every=0)
    with pytest.raises(UserError, match="there is no checkpoint yet: lower"):
        pretrain.run(config, start(tmp_path, config), quiet)


def test_a_reward_that_is_no_number_stops_rl(run, tmp_path, monkeypatch):
    folder = start_after(run, tmp_path, "rl", ALONE)
    monkeypatch.setattr(rl, "graded", lambda *_: np.full((2, 4), np.nan, np.float32))
    with pytest.raises(UserError, match=r"rl: loss is nan.* at step 0, batch of questions 0 to 1 of \d+; there is no"):
        rl.run(ALONE, folder, quiet)


def test_the_best_checkpoint_stays(run):
    rows = [row for row in numbers(run, "base") if row["kind"] == "val"]
    best = min(rows, key=lambda row: row["bpb"])
    record = json.loads((run / "base" / "checkpoints" / "best.json").read_text())
    assert record == {"step": best["step"], "value": best["bpb"]}
    assert load_model(run, "base", step="best")[4] == best["step"]
    assert load_model(run, "base", step=10)[4] == 10
    record = json.loads((run / "rl" / "checkpoints" / "best.json").read_text())
    rates = [row["pass"]["1"] for row in numbers(run, "rl") if row["kind"] == "pass_at_k"]
    assert record["value"] == max(rates)


def test_another_horizon_or_tokenizer_is_refused_unless_forced(run, tmp_path, tokenizer):
    folder, longer = unfinished(run, tmp_path), changed("base", num_iterations=13)
    with pytest.raises(UserError, match=r"base, of which step 12 is done, .*: steps was 12, now 13\. .*--force"):
        pretrain.run(longer, folder, quiet)
    tokenizer.save(folder / "tokenizer")
    with pytest.raises(UserError, match=r"was started with other values: tokenizer was \w+, now \w+"):
        pretrain.run(ALONE, folder, quiet)
    said = []
    pretrain.run(longer, folder, said.append, force=True)
    assert "base: forced: steps was 12, now 13" in said
    assert "base: forced: other data, read from its beginning" in said
    assert json.loads((folder / "base" / "done.json").read_text())["steps"] == 13


def test_force_reads_on_where_positions_did_not_note_own_conversations_yet(run, tmp_path, monkeypatch):
    rows = Mixture(("choice:40",), "train", ALONE.data)
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row["messages"]) for row in rows))
    config = changed("mid", mixture=(f"{tmp_path}/own.jsonl",), num_iterations=4)
    folder, said = start_after(run, tmp_path / "run", "mid", config), []

    def older(*sets):
        mixture = Mixture(*sets)
        mixture.own = []
        return mixture

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Mixture", older)
        WORK["mid"](replace(config, mid=replace(config.mid, stop_after=2)), folder, quiet)
    finetune.run(config, folder, "mid", said.append, force=True)
    assert "mid: going on from step 2" in said and not [line for line in said if "forced" in line]


FREE = {
    "data": {"source", "dir", "cache", "num_shards", "mirror", "eval_bundle"},
    "eval": {field.name for field in fields(Config().eval)},
    "": {
        "mesh",
        "attention",
        "native",
        "unsafe_sandbox",
        "device_hour_cost",
        "device_memory_gb",
        "remat",
        "loss_chunk",
        "track",
    },
}
FREE_IN_STAGE = {"device_batch_size", "eval_every", "save_every", "keep", "stop_after", "sample_tokens"}
FREE |= {
    "base": FREE_IN_STAGE | {"eval_tokens", "core_every", "sample_every"},
    "mid": FREE_IN_STAGE | {"tasks_every", "tasks_rows"},
    "sft": FREE_IN_STAGE | {"tasks_every", "tasks_rows"},
    "rl": FREE_IN_STAGE | {"eval_examples", "pass_k", "control"},
}


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (
            "all_finite",
            lambda params: False,
            "some parameters are no numbers after 1 steps; there is no checkpoint yet",
        ),
        (
            "validation_bpb",
            lambda *_: float("nan"),
            "validation is nan after 1 steps; the only checkpoint, step 1, is of no use: delete .*base",
        ),
    ],
)
def test_a_last_update_that_spoils_the_model_does_not_finish_the_stage(tmp_path, monkeypatch, name, broken, message):
    """No loss comes after it that would tell."""
    config = replace(tiny.config, base=replace(tiny.config.base, num_iterations=1))
    module = session_module if name == "all_finite" else pretrain
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(UserError, match=f"base: {message}: lower --base.init-lr-frac"):
        pretrain.run(config, start(tmp_path, config), quiet)
    assert not finished(tmp_path, "base")


def test_parameters_that_are_numbers_are_told_from_others():
    good = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    assert session_module.all_finite(good)
    for bad in (np.nan, np.inf):
        assert not session_module.all_finite(good | {"b": np.asarray([0, bad, 0, 0], np.float32)})


def test_every_value_is_either_fixed_or_free():
    """A new field is fixed once its stage has begun, unless it is named here: mesh, microbatch, paths, measuring."""
    config = Config()
    fixed = _fixed(asdict(config), {"tokenizer", "base", "mid", "sft", "rl"})
    for field in fields(config):
        value = getattr(config, field.name)
        inner = {f"{field.name}.{part.name}" for part in fields(value)} if is_dataclass(value) else {field.name}
        section = field.name if is_dataclass(value) else ""
        free = {name for name in inner if name not in fixed}
        assert {name.rpartition(".")[2] for name in free} == FREE.get(section, set()) & {
            name.rpartition(".")[2] for name in inner
        }


def begin(workdir: Path, log: Path, *options: str, cache: str = "xla") -> subprocess.Popen:
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(workdir.parent / cache))
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "run_speedrun.py", "--experiment", "tests/tiny.py", "--workdir", str(workdir), *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log.open("w"), stdout=subprocess.DEVNULL)


def wait_for(condition, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert (process.poll() is None or condition()) and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


def test_signals_to_a_real_run(tmp_path):
    """One signal saves and ends with status 0, before what would follow; a second SIGINT ends at once, with 130."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    checkpoints, metrics = workdir / "base" / "checkpoints", workdir / "base" / "metrics.jsonl"
    options = ("--base.num-iterations", "100000", "--base.save-every", "0", "--base.eval-every", "0")
    reached = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = begin(workdir, log, *options)
        enough = reached + 3
        wait_for(lambda n=enough: metrics.exists() and metrics.read_text().count("\n") > n, process, log)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0, log.read_text()
        [reached] = [step for step in steps(checkpoints) if step > reached]
        assert log.read_text().splitlines()[-1] == (
            f"base: stopped by {number.name} after step {reached}, saved; the same command goes on"
        )
        assert metrics.read_text().count("\n") == reached
    for attempt in range(5):  # compiling, which does not return for a signal
        process = begin(workdir, log, *options, cache=f"empty{attempt}")
        wait_for(lambda: "going on from step" in log.read_text() and "memory" in log.read_text(), process, log)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "SIGINT: " in log.read_text(), process, log)
        if "base: SIGINT: saving after this step" in log.read_text():
            break  # else it was still loading, where one signal is enough
        assert process.wait(PATIENCE) == 130
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert load_model(workdir)[-1] == reached
    assert sorted(path.name for path in workdir.iterdir()) == ["base", "config.json", "lock", "tokenizer"]
    assert "Traceback" not in log.read_text()


OUTSIDE_OF_A_LOOP = """
import hashlib, sys, time
from nanochat_jax import cli, stopping
def work():
    with stopping.ending_at_once():
        print("begun", flush=True)
        if sys.argv[1] == "python":
            time.sleep(100)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
sys.exit(cli.guarded(work))
"""


@pytest.mark.parametrize("where", ["python", "C"])
def test_signals_where_nothing_is_saved_in_the_middle(where):
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-c", OUTSIDE_OF_A_LOOP, where]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            process.send_signal(number)
            assert process.wait(PATIENCE) == 128 + number
            assert process.stderr.read() == (
                f"stopped by {number.name}: what was finished stays; the same command goes on from there\n"
            )


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """On a file system of its own, of a few megabytes."""
    folder, log = tmp_path / "small", tmp_path / "log"
    folder.mkdir()
    probe = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system")
    start(tmp_path / "run", ALONE)
    # Only the stage's folder is on the small disk: room for three checkpoints, not for the keeping of twenty.
    run_it = (
        f"mount -t tmpfs -o size=5m tmpfs {folder} && ln -s {folder} {tmp_path}/run/base && "
        f"{sys.executable} -m nanochat_jax pretrain --experiment tests/tiny.py --workdir {tmp_path}/run "
        f"--base.keep 20 --base.save-every 1; echo status $? >&2; cp -r {folder}/checkpoints {tmp_path}/left"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", run_it]
    subprocess.run(command, cwd=ROOT, stderr=log.open("w"), check=True)
    lines = log.read_text().splitlines()
    assert lines[-1] == "status 1" and lines[-2].startswith("error: the disk is full: checkpoint ")
    assert not [line for line in lines if "Traceback" in line]
    saved = steps(tmp_path / "left")
    assert saved and not list((tmp_path / "left").glob("tmp-*"))
    (tmp_path / "left").rename(folder / "checkpoints")
    assert all(load_model(tmp_path / "run", step=step)[-1] == step for step in saved)
