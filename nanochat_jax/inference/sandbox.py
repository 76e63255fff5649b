"""Runs programs that a model wrote, isolated by the kernel.

Each program runs in new user, mount, pid and network namespaces, made by sandbox_launcher.py or, for ordinary users
who have it, by bubblewrap: no network, a read-only system without /home and /proc, an empty /tmp in memory as the only
writable place, limits on memory, CPU, processes, files, output and time. Where the kernel denies that, nothing runs.
Left out: a filter of system calls, and a limit on the memory of all the program's processes together.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_jax.errors import UserError

TMP_BYTES = 16 * 2**20
OUTPUT_BYTES = 64 * 2**10
"""Of stdout and stderr each."""
PROCESSES = 16
SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")

Reason = Literal["ok", "error", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended. ok: status 0 within all limits."""

    ok: bool
    stdout: str
    stderr: str
    reason: Reason


def run_program(source: str, *, timeout: float = 5.0, memory_mb: int = 256, unsafe: bool = False) -> ProgramResult:
    """Runs Python source. timeout: seconds of wall time; memory_mb: address space of one process, MiB.

    unsafe runs it as an ordinary process of this user, with limits but without isolation. Raises UserError where the
    kernel denies isolation. Safe to call from several threads.
    """
    status_read, status_write = os.pipe()
    try:
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryDirectory() as folder:
            stdin.write(source.encode(errors="replace"))
            stdin.seek(0)
            process = subprocess.Popen(
                command(status_write, timeout, memory_mb, unsafe),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"HOME": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} if unsafe else {},
                pass_fds=(status_write,),
                start_new_session=True,
            )
            with process:
                try:
                    output, cut = watch(process, time.monotonic() + timeout)
                finally:
                    kill_group(process)
            os.close(status_write)
            status_write = -1
            started = os.read(status_read, 1) == b"x"
    finally:
        os.close(status_read)
        if status_write >= 0:
            os.close(status_write)
    stdout, stderr = (text.decode(errors="replace") for text in output)
    if not started and cut is None:
        raise UserError(denial(stderr))
    reason = cut or verdict(process.returncode, stderr)
    return ProgramResult(reason == "ok", stdout, stderr, reason)


def require_isolation() -> None:
    """Raises UserError, saying how to allow it, where programs cannot be isolated here."""
    run_program("")


def denial(stderr: str) -> str:
    """One line about what is missing and the way out."""
    detail = (stderr.strip().splitlines() or ["no reason given"])[-1]
    return (
        f"the kernel denies the isolation that a model's programs need ({detail}); allow unprivileged user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0; in a container: "
        "--privileged), install bubblewrap, or accept the risk with --unsafe-sandbox"
    )


def command(status: int, timeout: float, memory_mb: int, unsafe: bool) -> list[str]:
    """The command line: the runner, inside whatever isolates it."""
    # The interpreter behind a virtual environment, so that only one folder has to be visible.
    python = os.path.realpath(sys.executable)
    runner = Path(__file__).with_name("sandbox_runner.py").read_text()
    limits = [memory_mb * 2**20, math.ceil(timeout) + 1, TMP_BYTES, 0 if unsafe else PROCESSES]
    inner = [python, "-I", "-S", "-B", "-X", "utf8", "-c", runner, *map(str, [status, *limits])]
    if unsafe:
        return inner
    if sys.platform != "linux":
        raise UserError(f"programs can be isolated on Linux only, not on {sys.platform}; see --unsafe-sandbox")
    paths = [path for path in SYSTEM_PATHS if os.path.lexists(path)]
    paths += [path for path in {sys.base_prefix, str(Path(python).parent)} if not path.startswith(tuple(SYSTEM_PATHS))]
    bubblewrap = shutil.which("bwrap")
    # Root's limit on processes is not enforced; the launcher can run the program as another user, bubblewrap cannot.
    if bubblewrap and os.geteuid() != 0:
        return [bubblewrap, *bubblewrap_options(paths), "--", *inner]
    launcher = str(Path(__file__).with_name("sandbox_launcher.py"))
    return [python, "-I", "-S", "-B", launcher, str(TMP_BYTES), ":".join(paths), "--", *inner]


def bubblewrap_options(paths: list[str]) -> list[str]:
    """The same isolation as sandbox_launcher.py, in bubblewrap's words."""
    options = [
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--uid",
        "1000",
        "--gid",
        "1000",
        "--cap-drop",
        "ALL",
    ]
    options += ["--setenv", "HOME", "/tmp", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "LANG", "C.UTF-8"]
    for path in paths:
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        options += ["--dev-bind", device, device]
    return [*options, "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


def watch(process: subprocess.Popen, deadline: float) -> tuple[list[bytes], Reason | None]:
    """Reads stdout and stderr until the process ends. The second value: why it has to be ended instead."""
    output = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as selector:
        for stream, buffer in zip((process.stdout, process.stderr), output, strict=True):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, buffer)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return output, "timeout"
            # A process left behind may hold the pipes open after the program has ended: look up now and then.
            events = selector.select(min(left, 0.1))
            if not events and process.poll() is not None:
                break
            for key, _ in events:
                data = os.read(key.fd, 65536)
                key.data.extend(data)
                if not data:
                    selector.unregister(key.fileobj)
                if len(key.data) > OUTPUT_BYTES:
                    del key.data[OUTPUT_BYTES:]
                    return output, "output"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return output, "timeout"
    return output, None


def kill_group(process: subprocess.Popen) -> None:
    """Ends everything that is left of a program. Its process namespace dies with the first process in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def verdict(status: int, stderr: str) -> Reason:
    """The reason that an exit status means. A signal is -N from this process's child, 128 + N from within."""
    number = -status if status < 0 else status - 128
    if status == 0:
        return "ok"
    if number == signal.SIGXCPU:
        return "timeout"
    if number == signal.SIGKILL:
        return "killed"
    last = (stderr.strip().splitlines() or [""])[-1]
    return "memory" if last.startswith("MemoryError") else "error"
