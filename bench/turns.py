"""Two programs that work in turns: what a child says after its steps, and how a parent asks for more.

A child that trains does one step unasked and says, as a line of JSON, {"seconds": [...], "cpu_seconds",
"losses": [...], "peak_bytes", "uncounted_seconds", "facts"}; then, for each line with a number N that it reads, N more
steps and the same of those. One that answers says its facts, and then, for each line with options, what it made of them
(`answer`).
A child stops at the end of its input. Between turns it waits, so that the other has the machine. Standard
library only: the child of the reference has an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


class Turns:
    """The child's side. Whatever else it prints goes to stderr."""

    def __init__(self, peak_bytes: Callable[[], int]) -> None:
        self.facts: dict[str, Any] = {}
        self._peak_bytes = peak_bytes
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._seconds, self._losses = 1, [], []
        self._uncounted = 0.0
        self._clock, self._turn = time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around what only the comparison needs, before the first step."""
        start = time.perf_counter()
        yield
        self._uncounted += time.perf_counter() - start

    def step_done(self, loss: float) -> None:
        """After each step; returns when the next one may begin. SystemExit where no more are wanted."""
        self._seconds.append(time.perf_counter() - self._clock)
        self._losses.append(loss)
        self._left -= 1
        if not self._left:
            report = {
                "seconds": self._seconds,
                "cpu_seconds": time.process_time() - self._turn,
                "losses": self._losses,
                "peak_bytes": self._peak_bytes(),
                "uncounted_seconds": self._uncounted,
                "facts": self.facts,
            }
            print(json.dumps(report), file=self._replies, flush=True)
            self._left, self._seconds, self._losses = int(sys.stdin.readline() or sys.exit()), [], []
            self._turn = time.process_time()
        self._clock = time.perf_counter()


def answer(work: Callable[..., Any], facts: dict[str, Any]) -> None:
    """The child's side where each turn is a work of its own: JSON options in, JSON results out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(facts), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(**json.loads(line))), file=replies, flush=True)


def held_to(threads: int) -> None:
    """Keeps this process and its threads to so many of its CPUs, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every comparison has; `rounds` unless told otherwise."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nanochat", type=Path, required=True, help="checkout of karpathy/nanochat")
    options.add_argument("--python", type=Path, default=Path(sys.executable), help="python of its environment")
    options.add_argument("--depth", type=int, default=4, help="layers; width is 64 for each, in heads of 128 (4)")
    options.add_argument("--vocab-size", type=int, default=8192, help="tokens in the vocabulary (8192)")
    options.add_argument("--rounds", type=int, default=rounds, help=f"times that each has its turn ({rounds})")
    options.add_argument("--json", action="store_true", help="print every figure as a line of JSON on stdout")
    return options


def check(options: argparse.Namespace, file: str) -> None:
    """Makes --nanochat and --python absolute. Exits with one line where the checkout has no `file`, where python is no
    program, or where a number is below 1.
    """
    options.nanochat, options.python = options.nanochat.resolve(), options.python.absolute()
    if not (options.nanochat / file).is_file():
        sys.exit(f"error: --nanochat {options.nanochat}: no {file} there; name a checkout of nanochat")
    if not os.access(options.python, os.X_OK):
        sys.exit(f"error: --python {options.python}: no such program; name the python of the reference's environment")
    for name, value in vars(options).items():
        if type(value) is int and value < 1:
            sys.exit(f"error: --{name.replace('_', '-')} {value}: at least 1 is needed")


def environments(
    folder: Path, reference: dict[str, str], ours: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Those of the reference, which writes below `folder`, and of ours, each with what is its own."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.append(root)
    from nanochat_jax.process import environment  # needs no JAX, which this process never imports

    left_out = ("PYTHONPATH", "TORCHDYNAMO_DISABLE", "RANK", "XLA_FLAGS")
    common = {name: value for name, value in os.environ.items() if name not in left_out}
    ours = common | {"PYTHONPATH": root, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")} | ours
    return common | {"NANOCHAT_BASE_DIR": str(folder / "reference" / "base")} | reference, ours | environment(ours)


class Child:
    """The parent's side of one child, started at once."""

    def __init__(self, name: str, command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> None:
        """`folder`: its working directory, where it writes `log`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self._log = name, folder / "log"
        self._started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                list(map(str, command)),
                cwd=folder,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def first(self) -> dict[str, Any]:
        """Its first step, with "first_step_seconds" from the start of the process, what is not counted taken off."""
        report = self._reply()
        return report | {"first_step_seconds": time.perf_counter() - self._started - report["uncounted_seconds"]}

    def steps(self, count: int) -> dict[str, Any]:
        """`count` more steps."""
        return self._ask(str(count))

    def facts(self) -> dict[str, Any]:
        """What a child that answers says first."""
        return self._reply()

    def work(self, **options: Any) -> Any:
        """What a child that answers makes of a piece of work."""
        return self._ask(json.dumps(options))

    def end(self) -> None:
        """Lets it stop."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> Any:
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> Any:
        """Exits with one line where there is none."""
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").split("\n")
            last = next((text for text in reversed(said) if text.strip()), "it said nothing")
            sys.exit(f"error: {self.name} ended with status {self._process.wait()}: {last.strip()}")
        return json.loads(line)
