"""Runs programs that a model wrote, isolated by the kernel.

Each program runs in new user, mount, pid and network namespaces, made by sandbox_launcher.py: no network, a read-only
system without /home and /proc, an empty /tmp in memory as the only writable place, limits on memory, CPU, processes,
files, output and time. Where the kernel denies that, nothing runs. Left out: a filter of system calls, and a limit on
the memory of all the program's processes together.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.errors import UserError

FILE_BYTES = 16 * 2**20
"""Of a file, of stdout, of stderr, and of everything in /tmp."""
PROCESSES = 16
SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended. ok: status 0 within all limits."""

    ok: bool
    stdout: str
    stderr: str


def run_program(source: str, *, timeout: float = 5.0, memory_mb: int = 256, unsafe: bool = False) -> ProgramResult:
    """Runs Python source. timeout: seconds of wall time; memory_mb: address space of one process, MiB.

    unsafe runs it as an ordinary process of this user, with limits but without isolation. Raises UserError where the
    kernel denies isolation. Safe to call from several threads.
    """
    file = tempfile.TemporaryFile
    with tempfile.TemporaryDirectory() as folder, file() as stdin, file() as stdout, file() as stderr:
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
                process.wait(timeout)
            finally:
                # Everything that is left of it. A process namespace dies with the first process in it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        # The position in a file is shared with the processes that it was handed to: the runner has read the program.
        started = os.lseek(stdin.fileno(), 0, os.SEEK_CUR) > 0
        output, errors = (
            os.pread(stream.fileno(), FILE_BYTES, 0).decode(errors="replace") for stream in (stdout, stderr)
        )
    if not started and process.returncode > 0:
        raise UserError(denial(errors))
    return ProgramResult(process.returncode == 0, output, errors)


def require_isolation() -> None:
    """Raises UserError, saying how to allow it, where programs cannot be isolated here."""
    run_program("")


def denial(stderr: str) -> str:
    """One line about what is missing and the way out."""
    detail = (stderr.strip().splitlines() or ["no reason given"])[-1]
    return (
        f"the kernel denies the isolation that a model's programs need ({detail}); allow unprivileged user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0; in a container: "
        "--privileged), or accept the risk with --unsafe-sandbox"
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
    return [python, "-I", "-S", "-B", launcher, str(FILE_BYTES), ":".join(paths), "--", *inner]
