"""A run killed without warning in every stage, each time started again, ends like one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nanochat_jax.metrics import MetricsLog

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds


def begin(workdir: Path, log: Path) -> subprocess.Popen:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=str(workdir.parent / "xla"))
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "run_speedrun.py", "--experiment", "tests/tiny.py", "--workdir", str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log.open("w"), stdout=subprocess.DEVNULL)


def test_killed_in_every_stage(tmp_path):
    workdir = tmp_path / "run"
    for stage in ("base", "mid", "sft", "rl"):
        log = tmp_path / f"{stage}.log"
        process = begin(workdir, log)
        deadline = time.monotonic() + PATIENCE
        while not list((workdir / stage / "checkpoints").glob("step_*")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (workdir / stage / "done.json").exists()
    log = tmp_path / "last.log"
    assert begin(workdir, log).wait(PATIENCE) == 0, log.read_text()
    text = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    for stage, following in (("base", "mid"), ("mid", "sft"), ("sft", "rl"), ("rl", "last")):
        assert f"{stage}: going on from step" in text[following]
        assert f"{stage}: finished before" not in text[following]
    for stage in ("base", "mid", "sft"):
        rows = MetricsLog.read(workdir / stage / "metrics.jsonl")
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(12))
    rows = MetricsLog.read(workdir / "rl" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "rl"] == list(range(12))
    assert (workdir / "report.md").exists()
    again = begin(workdir, tmp_path / "again.log")
    assert again.wait(PATIENCE) == 0
    assert "going on" not in (tmp_path / "again.log").read_text()
