"""What a program in the sandbox can and cannot do. Where the kernel denies isolation, every test sees the refusal instead."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nanochat_jax
from nanochat_jax.errors import UserError
from nanochat_jax.inference import sandbox
from nanochat_jax.inference.sandbox import require_isolation, run_program


def isolation_denied():
    """Asked of the kernel without the sandbox's own code."""
    flags = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--fork"]
    return subprocess.run(["unshare", *flags, "mount", "-t", "tmpfs", "x", "/sys"], capture_output=True).returncode != 0


DENIED = isolation_denied()


def run(source, **limits):
    """The result, or None after checking the refusal."""
    if not DENIED:
        return run_program(source, **limits)
    with pytest.raises(UserError, match="--unsafe-sandbox"):
        run_program(source, **limits)
    return None


def outcome(source, ok, **limits):
    """Checks how it ended and returns the result (None where isolation is denied)."""
    result = run(source, **limits)
    assert result is None or result.ok == ok, result
    return result


def test_output_and_status():
    result = outcome("import sys\nprint('out')\nprint('err', file=sys.stderr)", True)
    if result:
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
    result = outcome("1/0", False)
    if result:
        assert "ZeroDivisionError" in result.stderr
    outcome("import sys; sys.exit(3)", False)
    outcome("def broken(:", False)
    outcome("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False)


def test_program_is_a_main_module_with_the_standard_library():
    outcome(
        "import collections, hashlib, math, re, typing, dataclasses\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n"
        "assert __name__ == '__main__' and A(1).x == 1",
        True,
    )


def test_time_memory_and_output_are_limited():
    started = time.monotonic()
    outcome("import time; time.sleep(60)", False, timeout=1.5)
    outcome("while True: pass", False, timeout=1.5)
    assert time.monotonic() - started < 10
    for result in (
        outcome("x = bytearray(10**9)", False),
        outcome("x = bytearray(150 * 2**20)", False, memory_mb=128),
    ):
        assert result is None or "MemoryError" in result.stderr
    outcome("x = bytearray(150 * 2**20)", True, memory_mb=512)
    for stream in ("stdout", "stderr"):
        flood = f"import sys\nwhile True: print('x' * 10**6, file=sys.{stream}, flush=True)"
        result = outcome(flood, False, timeout=30)
        if result:
            assert sandbox.FILE_BYTES - 10**6 < len(getattr(result, stream)) <= sandbox.FILE_BYTES


def test_files_only_in_an_empty_tmp_of_limited_size(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outcome(
        "import os\n"
        "assert os.getcwd() == '/tmp' and os.listdir('/tmp') == []\n"
        "open('/tmp/x', 'w').write('kept')\nassert open('x').read() == 'kept'",
        True,
    )
    hidden = [
        str(secret),
        str(Path(nanochat_jax.__file__)),
        "/etc/passwd",
        "/proc/1/environ",
        "/dev/kmsg",
        "/sys/kernel",
    ]
    outcome(f"import os\nassert not [p for p in {hidden!r} if os.path.exists(p)]", True)
    refused = (
        "for path in ('/x', '/usr/x', '/etc/x', '/dev/x'):\n"
        "    try: open(path, 'w')\n"
        "    except OSError: continue\n"
        "    raise SystemExit(path)"
    )
    outcome(refused, True)
    flood = "for i in range(20):\n    open(f'/tmp/{i}', 'wb').write(bytes(4 * 10**6))"
    result = outcome(flood, False)
    if result:
        assert "No space left" in result.stderr
    assert not (Path("/tmp") / "x").exists() or not Path("/tmp/x").read_text().startswith("kept")


def test_no_network_no_rights_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    outcome(
        "import socket\n"
        "assert [name for _, name in socket.if_nameindex()] == ['lo']\n"
        "try: socket.create_connection(('192.0.2.1', 80), timeout=2)\n"
        "except OSError: pass\n"
        "else: raise SystemExit('connected')",
        True,
    )
    outcome(
        "import os\n"
        "assert 'SECRET_TOKEN' not in os.environ and os.getuid() != 0\n"
        "for attempt in (lambda: os.setuid(0), lambda: os.chroot('/tmp'), lambda: os.sethostname('x') if hasattr(os, 'sethostname') else os.chroot('/')):\n"
        "    try: attempt()\n"
        "    except OSError: continue\n"
        "    raise SystemExit('allowed')",
        True,
    )


def test_processes_are_counted_hidden_and_die_with_the_program(tmp_path):
    outcome(
        "import os, time\n"
        "children = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        children += 1\n"
        "except OSError: pass\n"
        f"assert 0 < children < {sandbox.PROCESSES}, children",
        True,
    )
    marker = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    outcome(
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}], start_new_session=True,\n"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"try: os.kill({os.getpid()}, 0)\n"
        "except ProcessLookupError: pass\n"
        "else: raise SystemExit('sees the host')",
        True,
    )
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert not [line for line in commands if marker.encode() in line]


def readable(path):
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_runs_from_several_threads():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run(f"print({i})"), range(8)))
    if not DENIED:
        assert [result.stdout for result in results] == [f"{i}\n" for i in range(8)]


def test_unsafe_runs_without_isolation_but_with_limits():
    result = run_program("import os; print(os.getppid())", unsafe=True)
    assert result.ok and result.stdout == f"{os.getpid()}\n"
    assert not run_program("import time; time.sleep(60)", timeout=1.0, unsafe=True).ok
    # A process left behind holds stdout; the program's end is seen all the same.
    left_behind = "import os, time\nif os.fork() == 0: time.sleep(30)\nprint('end', flush=True)"
    started = time.monotonic()
    assert run_program(left_behind, timeout=20.0, unsafe=True).ok
    assert time.monotonic() - started < 15


def test_refuses_where_the_kernel_denies_isolation():
    if DENIED:
        with pytest.raises(UserError, match="--unsafe-sandbox"):
            require_isolation()
        return
    require_isolation()
    # A user namespace that allows no further ones stands for a kernel that denies them.
    denied = as_root_of_a_namespace("echo 0 > /proc/sys/user/max_user_namespaces")
    last = denied.stderr.strip().splitlines()[-1]
    assert denied.returncode != 0 and "UserError" in last and "--unsafe-sandbox" in last and "unshare" in last
    allowed = as_root_of_a_namespace("true")
    assert "read-only" in allowed.stdout and "ok=True" in allowed.stdout, allowed


def as_root_of_a_namespace(preparation):
    """Runs a program where there is root but no other user, after a shell command."""
    code = (
        "import os; from nanochat_jax.inference.sandbox import run_program; print(run_program(os.environ['PROGRAM']))"
    )
    program = "try: open('/x', 'w')\nexcept OSError: print('read-only')"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", f'{preparation} && exec {sys.executable} -c "{code}"'],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nanochat_jax.__file__).parent.parent), "PROGRAM": program},
    )
