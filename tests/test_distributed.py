"""Several processes: who they are, how they agree, how they end, and that they train what one process trains."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax import cli, distributed
from nanochat_jax.distributed import Link, Membership, membership
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.run import load_model
from nanochat_jax.sharding import data_part

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds, on a busy machine


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_who_a_process_is():
    assert membership(None, None, None, {}) is None
    assert membership("a:5", 1, 0, {}) is None
    environ = {"COORDINATOR_ADDRESS": "host:12", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
    assert membership(None, None, None, environ) == Membership("host", 12, 4, 3)
    assert membership("other:13", None, 0, environ) == Membership("other", 13, 4, 0)
    assert membership("[::1]:13", 2, 0, {}) == Membership("::1", 13, 2, 0)


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("node[003-5,9],b", "node003"), ("n-[7,9]", "n-7")]
)
def test_a_step_of_slurm_says_who_a_process_is(nodes, first):
    environ = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_ID": "123456"}
    assert membership(None, None, None, environ) == Membership(first, 23456, 4, 2)
    assert membership(None, None, None, environ | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    # A shell inside an allocation, not a step.
    assert membership(None, None, None, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "--process-id is not given"),
        ((None, 2, None), "--coordinator and --process-id are not given"),
        (("host:1", 2, 2), "--process-id 2 of --num-processes 2: ids go from 0 to 1"),
        (("host:1", 2, -1), "ids go from 0 to 1"),
        (("host", 2, 0), "HOST:PORT of process 0"),
        (("host:port", 2, 0), "HOST:PORT of process 0"),
    ],
)
def test_a_process_that_is_said_wrongly(given, message):
    with pytest.raises(UserError, match=message):
        membership(*given, {})


def meet(count, port, patience=30.0, said_count=None, indices=None):
    """What each of `count` threads gets from the rendezvous: connections, names and port, or its UserError."""
    results = [None] * count

    def come(place, index):
        member = Membership("127.0.0.1", port, count if said_count is None or not index else said_count, index)
        try:
            results[place] = (distributed._report if index else distributed._welcome)(member, patience)
        except UserError as error:
            results[place] = error

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(indices or range(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_values_are_gathered_in_order(tmp_path):
    results = meet(3, free_port())
    links = [Link(i, names, sockets, tmp_path) for i, (sockets, names, _) in enumerate(results)]
    assert f"pid {os.getpid()}" in links[0].names[2] and links[0].names == links[2].names
    gathered = {}

    def work(link, name):
        # Two threads of each process gather at the same time, each under its name.
        gathered[link.index, name] = [link.gather([name, i, link.index], name) for i in range(50)]

    threads = [threading.Thread(target=work, args=(link, name)) for link in links for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, name), values in gathered.items():
        assert values == [[[name, i, index] for index in range(3)] for i in range(50)]
    leaving = [threading.Thread(target=link.leave) for link in links]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()


def test_a_rendezvous_that_fails_is_said_in_time():
    with pytest.raises(UserError, match=r"process 0 does not answer at --coordinator 127.0.0.1:\d+ in 0.3 s"):
        distributed._report(Membership("127.0.0.1", free_port(), 2, 1), 0.3)
    with pytest.raises(UserError, match=r"of 3 processes these did not come in 0.3 s: 1, 2"):
        distributed._welcome(Membership("127.0.0.1", free_port(), 3, 0), 0.3)
    for result in meet(2, free_port(), said_count=3):
        assert "--num-processes 2 here, but process 1 says 3" in str(result)
    for result in meet(3, free_port(), indices=(0, 1, 1)):
        assert isinstance(result, UserError)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"cannot listen there .* name another"),
    ):
        distributed._welcome(Membership("127.0.0.1", taken.getsockname()[1], 2, 0), 1)


def test_which_rows_a_process_holds(monkeypatch):
    def mesh(data, tensor, owners):
        devices = np.array([SimpleNamespace(process_index=p) for p in owners]).reshape(data, 1, tensor)
        return SimpleNamespace(devices=devices, shape={"data": data, "fsdp": 1, "tensor": tensor})

    def parts(*args):
        found = []
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            found.append(data_part(mesh(*args)))
        return found

    count = 2
    monkeypatch.setattr(jax, "process_count", lambda: count)
    assert parts(8, 1, [0, 0, 0, 0, 1, 1, 1, 1]) == [(0, 2), (1, 2)]
    assert parts(8, 1, [1, 0, 1, 0, 1, 0, 1, 0]) == [(1, 2), (0, 2)]
    assert parts(4, 2, [0, 0, 0, 0, 1, 1, 1, 1]) == [(0, 2), (1, 2)]
    assert parts(1, 8, [0, 0, 0, 0, 1, 1, 1, 1]) == [(0, 1), (0, 1)]
    count = 4
    assert parts(2, 4, [0, 0, 1, 1, 2, 2, 3, 3]) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    count = 2
    with pytest.raises(UserError, match="tensor=4 cuts across"):
        parts(3, 4, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])


@pytest.fixture
def start(tmp_path):
    """Starts a command as several processes of one run; none outlives the test."""
    port, processes = free_port(), []

    def children(*command, devices=4, count=2):
        environment = dict(
            os.environ,
            PYTHONPATH=str(ROOT),
            XLA_FLAGS=os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "xla"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            COORDINATOR_ADDRESS=f"localhost:{port}",
            NUM_PROCESSES=str(count),
        )
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment | {"PROCESS_ID": str(index)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        processes.extend(started)
        return started

    yield children
    for process in processes:
        process.kill()
        process.communicate()


def ended(processes):
    """(status, stderr) of each."""
    texts = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


WORK = """
import os, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from nanochat_jax import cli, distributed, process
from nanochat_jax.errors import UserError
from nanochat_jax.sharding import data_part, make_mesh, put_batch

def work():
    workdir = Path(sys.argv[1])
    distributed.initialize(distributed.membership(None, None, None, os.environ), workdir)
    mesh = make_mesh("4")
    assert data_part(mesh) == (jax.process_index(), 2)
    table = np.arange(2 * 8 * 3.0).reshape(2, 8, 3)  # microbatches, rows, tokens
    whole = put_batch({"x": table}, mesh, leading=1)["x"]
    mine = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    dealt = put_batch({"x": table[:, mine]}, mesh, leading=1, local=True)["x"]
    weighed = jax.jit(lambda x: (x * x).sum(axis=1))
    for step in range(10**6):
        for x in (whole, dealt):
            assert x.sharding.spec == P(None, ("data", "fsdp")) and x.shape == table.shape
            np.testing.assert_array_equal(weighed(x), (table * table).sum(axis=1))
        if step == 5 and distributed.is_leader():
            (workdir / "at work").touch()
        if step == 10 and not distributed.is_leader() and sys.argv[2] != "wait":
            raise UserError("the disk is full") if sys.argv[2] == "mistake" else ZeroDivisionError("a bug")
        if distributed.should_stop(step, (workdir / f"stop {jax.process_index()}").exists()):
            return

process.set_up()
sys.exit(cli.guarded(work))
"""


def at_work(processes, folder):
    deadline = time.monotonic() + PATIENCE
    while not (folder / "at work").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_with_one_line_that_names_it(tmp_path, start, victim):
    (tmp_path / "base" / "checkpoints" / "step_00000040").mkdir(parents=True)
    processes = start("-c", WORK, tmp_path, "wait", devices=2)
    at_work(processes, tmp_path)
    processes[victim].send_signal(signal.SIGKILL)
    status, text = ended(processes)[1 - victim]
    assert status == 1
    lines = [line for line in text.splitlines() if not line.startswith("[Gloo]")]
    (line,) = lines
    assert line.startswith(
        f"error: process {victim} (host {socket.gethostname()}, pid {processes[victim].pid}) is gone"
    )
    assert line.endswith("newest checkpoint of base: step 40: start all processes again to go on")


@pytest.mark.parametrize(("kind", "said"), [("mistake", "the disk is full"), ("bug", "ZeroDivisionError: a bug")])
def test_an_error_of_one_process_ends_the_other(tmp_path, start, kind, said):
    processes = start("-c", WORK, tmp_path, kind, devices=2)
    (leader, leader_text), (other, text) = ended(processes)
    assert leader == other == 1
    assert f"pid {processes[1].pid}) stopped: {said}; there is no checkpoint yet" in leader_text
    assert "Traceback" not in leader_text
    assert text.count("error: process 1: the disk is full") == (kind == "mistake")
    assert text.count("Traceback") == (kind == "bug")


def test_one_process_that_is_asked_stops_all_at_the_same_step(tmp_path, start):
    processes = start("-c", WORK, tmp_path, "wait", devices=2)
    at_work(processes, tmp_path)
    (tmp_path / "stop 1").touch()
    assert [status for status, _ in ended(processes)] == [0, 0]


OPTIONS = """
import os, sys
from nanochat_jax import cli, process
process.set_up()
more = {"0": ["--stages", "tokenizer"], "1": ["--workdir", sys.argv[1] + "/other", "--stages", "base"]}
words = ["--experiment", "tests/tiny.py", "--workdir", sys.argv[1], "--mesh", "4", "--data.streams", "2"]
sys.argv = ["run_speedrun.py", *words, *more[os.environ["PROCESS_ID"]]]
exec(open("run_speedrun.py").read())
"""


def test_other_options_than_the_others_have_are_refused_at_the_start(tmp_path, start):
    for status, text in ended(start("-c", OPTIONS, tmp_path, devices=2)):
        assert status == 1 and "started with different options (workdir, stages): give all of them the same" in text
    assert not list(tmp_path.glob("*/tokenizer.json"))


def pretrain(*more):
    options = ["--experiment", "tests/tiny.py", "--mesh", "8", "--data.streams", "2", "--base.eval-every", "3"]
    return ["pretrain", *options, *map(str, more)]


def losses(workdir):
    records = MetricsLog.read(workdir / "base" / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.fixture
def new_run(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "new" / "tokenizer")
    return tmp_path / "new"


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path, start, new_run, monkeypatch):
    monkeypatch.chdir(ROOT)
    two, one = (Path(shutil.copytree(new_run, tmp_path / name)) for name in ("two", "one"))
    command = ["-m", "nanochat_jax", *pretrain("--base.stop-after", 4, "--workdir", two, "--track", "tensorboard")]
    results = ended(start(*command))
    assert [status for status, _ in results] == [0, 0], results
    # The leader alone speaks, and sends.
    assert "base  4/12" in results[0][1] and "/12" not in results[1][1]
    assert len(list((two / "base" / "tensorboard").iterdir())) == 1
    assert len(losses(two)) == 4
    assert cli.main(pretrain("--base.stop-after", 6, "--workdir", one)) == 0
    # One process goes on from what two have saved.
    assert cli.main(pretrain("--base.stop-after", 6, "--workdir", two)) == 0
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    ours, theirs = (load_model(folder, "base")[0] for folder in (two, one))
    # While the blocks add nothing yet, the norm hides this factor: its gradient is rounding, which Adam makes whole steps.
    assert ours.pop("backout_lambda").shape == theirs.pop("backout_lambda").shape
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_signals_and_deaths_of_a_real_run(start, new_run):
    command = ["-m", "nanochat_jax", *pretrain("--workdir", new_run)]

    def saved():
        return sorted(int(path.name[5:]) for path in (new_run / "base" / "checkpoints").glob("step_*"))

    def interrupt(index, number, step):
        processes = start(*command)
        deadline = time.monotonic() + PATIENCE
        while step not in saved():
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[index].send_signal(number)
        return ended(processes)

    killed = interrupt(0, signal.SIGKILL, 2)
    assert killed[1][0] == 1 and "error: process 0 (host" in killed[1][1]
    assert "newest checkpoint of base: step" in killed[1][1]
    asked = interrupt(1, signal.SIGTERM, 6)
    assert [status for status, _ in asked] == [0, 0], asked
    assert "going on from step" in asked[0][1] and "a signal to another process" in asked[0][1]
    step = len(losses(new_run))
    assert saved()[-1] == step < 12
    done = ended(start(*command))
    assert [status for status, _ in done] == [0, 0], done
    assert f"going on from step {step}" in done[0][1] and len(losses(new_run)) == 12


@pytest.mark.slow
def test_all_stages_in_two_processes(tmp_path, start):
    tiny = ["--experiment", "tests/tiny.py", "--mesh", "8", "--data.streams", "2"]
    results = ended(start("run_speedrun.py", *tiny, "--workdir", tmp_path / "run"))
    assert [status for status, _ in results] == [0, 0], results
    for stage in ("base", "mid", "sft", "rl", "sft_continued"):
        assert (tmp_path / "run" / stage / "done.json").exists()
        assert (tmp_path / "run" / stage / "samples.md").read_text().count("> ") >= 4
    assert (tmp_path / "run" / "report.md").exists()


ANSWERS = """
import os, sys
from pathlib import Path
import jax, numpy as np
from nanochat_jax import cli, distributed
from nanochat_jax.config import GPTConfig
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.inference.shared import make_engine, own_copy
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import born_params
from tests.tiny import config

def work():
    distributed.initialize(distributed.membership(None, None, None, os.environ), Path("."))
    tokenizer = Tokenizer.load(Path(sys.argv[1]) / "tokenizer")
    cfg, mesh = gpt_config(config, tokenizer.vocab_size), make_mesh("fsdp=4")
    params = born_params(cfg, mesh, 0)
    shared = make_engine(params, cfg, tokenizer, max_rows=4, mesh=mesh)
    copy, own = own_copy(params, mesh)
    alone = Engine(copy, cfg, tokenizer, max_rows=4, mesh=own)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("one", "two two", "three")]
    drawn = [SamplingParams(temperature=1.0, max_tokens=6, seed=i) for i in range(3)]
    assert [a.ids for a in shared.generate(prompts, drawn, 2)] == [a.ids for a in alone.generate(prompts, drawn, 2)]
    np.testing.assert_allclose(shared.logits_at(prompts), alone.logits_at(prompts), atol=1e-5)
    shared.use(jax.tree.map(lambda x: x * 0, params))
    assert not shared.logits_at(prompts).any()

sys.exit(cli.guarded(work))
"""


@pytest.mark.slow
def test_processes_answer_as_one_engine(start, new_run):
    results = ended(start("-c", ANSWERS, new_run, devices=2))
    assert [status for status, _ in results] == [0, 0], results
