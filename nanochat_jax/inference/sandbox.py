"""Runs programs that a model wrote, isolated by the kernel.

Each program runs in new user, mount, pid and network namespaces, made by sandbox_launcher.py: no network, a read-only
system without /home and /proc, an empty /tmp in memory as the only writable place, a filter of system calls, limits on
memory, CPU, processes, files, output and time. Where the kernel denies that, nothing runs. What it promises and what
it does not: docs/SECURITY.md.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_jax.errors import UserError
from nanochat_jax.inference.sandbox_filter import assemble

FILE_BYTES = 16 * 2**20
"""Of a file, of stdout, of stderr, and of everything in /tmp."""
PROCESSES = 16
"""Processes and threads at once."""
SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")

Reason = Literal["ok", "error", "timeout", "memory", "output", "killed"]
# Of the launcher's statuses, -14 being SIGALRM; another one means that it has not come as far as the program.
LAUNCHER_REASONS: dict[int, Reason] = {0: "ok", 10: "error", 11: "killed", 12: "timeout", 13: "memory", -14: "timeout"}


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    ok: bool
    """It ended by itself with status 0, within all limits."""
    stdout: str
    stderr: str
    reason: Reason
    """ok; error: another status; timeout: of wall or CPU time; memory: too much of all processes together, or a
    MemoryError that nothing caught; output: stdout or stderr is full; killed: by a signal."""


def run_program(source: str, *, timeout: float = 5.0, memory_mb: int = 256, unsafe: bool = False) -> ProgramResult:
    """Runs Python source. timeout: seconds of wall time; memory_mb: of each process and of all together, MiB.

    unsafe runs it as an ordinary process of this user, with limits but without isolation; then memory_mb is that of
    each process. Raises UserError where the kernel denies isolation. Safe to call from several threads.
    """
    file = tempfile.TemporaryFile
    home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # what an unsafe program has left may write there
    with home as folder, file() as stdin, file() as stdout, file() as stderr:
        stdin.write(source.encode(errors="replace") or b"\n")
        stdin.seek(0)
        process = subprocess.Popen(
            command(timeout, memory_mb, unsafe),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env={"HOME": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} if unsafe else {},
            start_new_session=True,
        )
        with process, contextlib.suppress(subprocess.TimeoutExpired):
            try:
                # The launcher keeps the time by itself: waiting with a timeout means looking every 50 ms.
                process.wait(timeout if unsafe else None)
            finally:
                late = process.returncode is None
                # Everything that is left of it. A process namespace dies with the first process in it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        # The position in a file is shared with the processes that it was handed to: the runner has read the program.
        started = os.lseek(stdin.fileno(), 0, os.SEEK_CUR) > 0
        written = [os.pread(stream.fileno(), FILE_BYTES, 0) for stream in (stdout, stderr)]
    output, errors = (text.decode(errors="replace") for text in written)
    status = process.returncode
    if late:
        reason = "timeout"
    elif unsafe:
        reason = "error" if status > 0 else {0: "ok", -signal.SIGXCPU: "timeout"}.get(status, "killed")
    else:
        reason = LAUNCHER_REASONS.get(status, "killed" if status < 0 else None)
    if reason is None or (reason == "error" and not started):
        raise UserError(denial(errors))
    if reason in ("ok", "error", "killed") and max(map(len, written)) >= FILE_BYTES:
        reason = "output"
    elif reason == "error" and errors.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        reason = "memory"
    return ProgramResult(reason == "ok", output, errors, reason)


def run_tests(source: str, tests: str, entry_point: str, *, unsafe: bool = False) -> ProgramResult:
    """Runs Python source in one process and `check(entry_point)`, which tests define, in another. ok: the tests pass.

    The tests call the function of that name with values of built-in types and see its answers as such
    (sandbox_judge.py). Limits and errors as of run_program, for both together.
    """
    text = Path(__file__).with_name("sandbox_judge.py").read_text()
    program = f"{text}\njudge({text!r}, {source!r}, {tests!r}, {entry_point!r})"
    return run_program(program, unsafe=unsafe)


def require_isolation() -> None:
    """Raises UserError, saying how to allow it, where programs cannot be isolated here, or do not run so."""
    result = run_program("")
    if not result.ok:
        why = f"{result.reason}, {last_line(result.stderr)}"
        raise UserError(f"a program of no lines does not run in the sandbox: {why}")


def last_line(stderr: str) -> str:
    """What a program said last."""
    return (stderr.strip().splitlines() or ["no reason given"])[-1]


def denial(stderr: str) -> str:
    """One line about what is missing and the way out."""
    return (
        f"the kernel denies the isolation that a model's programs need ({last_line(stderr)}); allow unprivileged user "
        "namespaces (sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0; in a "
        "container: --privileged), or accept the risk with --unsafe-sandbox"
    )


def command(timeout: float, memory_mb: int, unsafe: bool) -> list[str]:
    """The command line: the runner, inside the launcher that isolates it."""
    # The interpreter behind a virtual environment, so that only one folder has to be visible.
    python = os.path.realpath(sys.executable)
    runner = Path(__file__).with_name("sandbox_runner.py").read_text()
    limits = [memory_mb * 2**20, math.ceil(timeout) + 1, FILE_BYTES, 0 if unsafe else PROCESSES]
    inner = [python, "-I", "-S", "-B", "-X", "utf8", "-c", runner, *map(str, limits)]
    if unsafe:
        return inner
    if sys.platform != "linux":
        raise UserError(f"programs can be isolated on Linux only, not on {sys.platform}; see --unsafe-sandbox")
    paths = [path for path in SYSTEM_PATHS if os.path.lexists(path)]
    paths += [path for path in {sys.base_prefix, str(Path(python).parent)} if not path.startswith(tuple(SYSTEM_PATHS))]
    launcher = str(Path(__file__).with_name("sandbox_launcher.py"))
    bounds = [str(timeout), str(memory_mb * 1024), str(FILE_BYTES), assemble(platform.machine()).hex()]
    return [python, "-I", "-S", "-B", launcher, *bounds, ":".join(paths), *inner]
