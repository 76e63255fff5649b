"""What a program in the sandbox can and cannot do. Where the kernel denies isolation, every test sees the refusal instead."""

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nanochat_jax
from nanochat_jax.bench import Settings
from nanochat_jax.bench import sandbox as measured
from nanochat_jax.config import Config
from nanochat_jax.errors import UserError
from nanochat_jax.inference import sandbox, sandbox_filter
from nanochat_jax.inference.sandbox import require_isolation, run_program


def isolation_denied(*prefix):
    """Asked of the kernel without the sandbox's own code."""
    flags = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--fork"]
    command = [*prefix, "unshare", *flags, "mount", "-t", "tmpfs", "x", "/sys"]
    return subprocess.run(command, capture_output=True).returncode != 0


DENIED = isolation_denied()


def outcome(source, reason, **limits):
    """Checks how it ended and returns the result (None where isolation is denied, after checking the refusal)."""
    if DENIED:
        with pytest.raises(UserError, match="--unsafe-sandbox"):
            run_program(source, **limits)
        return None
    result = run_program(source, **limits)
    assert (result.reason, result.ok) == (reason, reason == "ok"), result
    return result


def test_output_and_status():
    result = outcome("import sys\nprint('out')\nprint('err', file=sys.stderr)", "ok")
    if result:
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
    result = outcome("1/0", "error")
    if result:
        assert "ZeroDivisionError" in result.stderr
    outcome("def broken(:", "error")
    outcome("input()", "error")
    outcome("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed")


@pytest.mark.parametrize("status", [1, 3, 10, 11, 12, 13, 127, 255])
def test_no_status_of_a_program_means_anything_but_an_error(status):
    outcome(f"import os; os._exit({status})", "error")


def test_program_is_a_main_module_with_the_standard_library():
    outcome(
        "import collections, hashlib, math, re, typing, dataclasses, ctypes, asyncio, subprocess, sys, threading\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n"
        "assert __name__ == '__main__' and A(1).x == 1\n"
        "assert asyncio.run(asyncio.sleep(0, 2)) == 2\n"
        "assert subprocess.run([sys.executable, '-c', 'print(3)'], capture_output=True).stdout == b'3\\n'\n"
        "thread = threading.Thread(target=print); thread.start(); thread.join()",
        "ok",
    )


def test_limits_are_those_that_are_given():
    outcome("x = bytearray(150 * 2**20)", "memory", memory_mb=128)
    outcome("x = bytearray(150 * 2**20)", "ok", memory_mb=512)
    outcome("import time; time.sleep(1)", "timeout", timeout=0.5)
    outcome("import time; time.sleep(1)", "ok")
    # Pages that processes share count once: 100 MiB in seven processes.
    shared = (
        "import os, time\nx = bytearray(100 * 2**20)\nfor _ in range(6):\n    if os.fork() == 0: break\ntime.sleep(0.5)"
    )
    outcome(shared, "ok", timeout=20.0)
    # On several processors their time runs out before the wall time does.
    outcome("import signal; signal.raise_signal(signal.SIGXCPU)", "timeout")
    outcome("import resource; assert resource.getrlimit(resource.RLIMIT_CPU) == (4, 5)", "ok", timeout=2.5)
    result = outcome("import resource as r; print(*map(r.getrlimit, (r.RLIMIT_NOFILE, r.RLIMIT_CORE)))", "ok")
    assert result is None or result.stdout == "(64, 64) (1, 1)\n"


def test_lower_limits_of_the_host_stay():
    code = (
        "import resource as r; from nanochat_jax.inference.sandbox import run_program\n"
        "r.setrlimit(r.RLIMIT_CORE, (0, 0)); r.setrlimit(r.RLIMIT_NOFILE, (40, 40))\n"
        "program = 'import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE))'\n"
        "print(run_program(program, unsafe=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(40, 40) (0, 0)"


# Hostile programs: (source, how they end, what proves that they met what they should have met).

ALLOWED = "\nelse: raise SystemExit('allowed')\n"
ATTEMPTS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments, error=errno.EPERM):
    ctypes.set_errno(0)
    result = libc.syscall(NUMBERS[call], *arguments)
    assert result == -1 and ctypes.get_errno() == error, (call, result, ctypes.get_errno())
"""
MANY = "import os, time\nfor _ in range({count}):\n    if os.fork() == 0:\n        {does}\n        time.sleep(60)\ntime.sleep(60)"
HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout", ""),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "timeout",
        "can't start new thread",
    ),
    "processes are few": (
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(60)\n        n += 1\n"
        f"except OSError: assert 0 < n < {sandbox.PROCESSES}, n",
        "ok",
        "",
    ),
    "memory": ("x = []\nwhile True: x.append(bytearray(10**6))", "memory", "MemoryError"),
    "memory, held by a function": (
        "def fill():\n    x = []\n    while True: x.append(bytearray(10**6))\nfill()",
        "memory",
        "MemoryError",
    ),
    "memory, refused and tried again": (
        "x = []\nwhile True:\n    try: x.append(bytearray(10**6))\n    except MemoryError: pass",
        "timeout",
        "",
    ),
    "memory of many processes": (MANY.format(count=6, does="x = bytearray(100 * 2**20)"), "memory", ""),
    "memory of many orphans": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        if os.fork(): os._exit(0)\n"
        "        os.setsid()\n        x = bytearray(100 * 2**20)\n        time.sleep(60)\ntime.sleep(60)",
        "memory",
        "",
    ),
    "memory outside the address space": (
        ATTEMPTS
        + "refused('memfd_create', b'x', 0)\nrefused('shmget', 0, 2**20, 0o1600)\nrefused('mq_open', b'/x', 66)",
        "ok",
        "",
    ),
    "a full disk": ("for i in range(20): open(f'/tmp/{i}', 'wb').write(bytes(4 * 10**6))", "error", "No space left"),
    "a large file": ("open('/tmp/x', 'wb').truncate(2**30)", "error", "File too large"),
    "many files": ("for i in range(10**5): open(f'/tmp/{i}', 'w').close()", "error", "No space left"),
    "the host's disk, behind the end of stdout": (
        ATTEMPTS
        + "refused('fallocate', 1, 1, ctypes.c_long(0), ctypes.c_long(2**28))\nassert not os.fstat(1).st_blocks",
        "ok",
        "",
    ),
    "a flood on stdout": ("while True: print('x' * 10**6, flush=True)", "output", "File too large"),
    "a flood on stderr": ("import sys\nwhile True: print('x' * 10**6, file=sys.stderr)", "output", ""),
    "a flood that ends well": (
        "import os\ntry:\n    while True: os.write(1, bytes(10**6))\nexcept OSError: os._exit(0)",
        "output",
        "",
    ),
    "sleeping for ever": ("import time\nwhile True: time.sleep(60)", "timeout", ""),
    "stopping itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout", ""),
    "deaf to signals": (
        "import signal\nfor number in {*signal.valid_signals()} - {9, 19, 32, 33}: signal.signal(number, signal.SIG_IGN)\n"
        "while True: pass",
        "timeout",
        "",
    ),
    "children that outlive it": (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)\n"
        "        os.closerange(0, 64)\n        time.sleep(60)",
        "ok",
        "",
    ),
    "killing its parents": (
        "import os, signal\nassert os.getppid() == 1\n"
        "for pid in (1, -1, HOST):\n    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGSTOP):\n"
        "        try: os.kill(pid, number)\n        except OSError: pass\nprint('alive')",
        "ok",
        "",
    ),
    "stopping its process group": ("import os, signal\nos.killpg(0, signal.SIGSTOP)", "timeout", ""),
    "killing its process group": ("import os, signal\nos.killpg(0, signal.SIGKILL)", "killed", ""),
    "running a wild pointer": ("import ctypes\nctypes.string_at(1)", "killed", ""),
    "the host's network": (
        "import socket\ntry: socket.create_connection(('127.0.0.1', PORT), timeout=2)\nexcept OSError: pass" + ALLOWED,
        "ok",
        "",
    ),
    "the host's sockets": (
        "import socket\ntry: socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)\nexcept OSError: pass" + ALLOWED,
        "ok",
        "",
    ),
    "sockets of other kinds": (
        "import socket\nfor family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):\n"
        "    try: socket.socket(family, socket.SOCK_RAW)\n    except OSError: continue\n    raise SystemExit('allowed')",
        "ok",
        "",
    ),
    "the user's files and environment": (
        "import os\nprint(os.environ, os.listdir('/'))\n"
        "for path in (SECRET, PACKAGE, '/etc/passwd', '/proc/self', '/proc/1/environ', '/dev/kmsg', '/sys/kernel', '/home'):\n"
        "    if os.path.exists(path): raise SystemExit(path)",
        "ok",
        "",
    ),
    "files through links": (
        "import os\nfor target in (SECRET, '../..' + SECRET, '/proc/self/root' + SECRET):\n"
        "    os.symlink(target, '/tmp/link')\n"
        "    for mode in ('r', 'w'):\n        try: print(open('/tmp/link', mode).read())\n        except OSError: pass\n"
        "    os.unlink('/tmp/link')",
        "ok",
        "",
    ),
    "writing to the system": (
        "import os, sys\nassert os.getcwd() == '/tmp' and os.listdir('/tmp') == []\n"
        "open('x', 'w').write('kept')\nassert open('/tmp/x').read() == 'kept'\n"
        "for path in ('/x', '/usr/x', '/etc/x', '/dev/x', '/dev/null/x', os.__file__, sys.executable):\n"
        "    try: open(path, 'w')\n    except OSError: continue\n    raise SystemExit(path)",
        "ok",
        "",
    ),
    "running what it wrote": (
        "import os\nopen('/tmp/x', 'w').write('#!/bin/sh')\nos.chmod('/tmp/x', 0o4777)\n"
        "try: os.execv('/tmp/x', ['x'])\nexcept PermissionError: raise SystemExit('refused')",
        "error",
        "refused",
    ),
    "more rights": (
        "import os, resource\nassert os.getuid() != 0\n"
        "for attempt in (lambda: os.setuid(0), lambda: os.chroot('/tmp'), lambda: os.mknod('/tmp/d', 0o60666, 0x800),\n"
        "    lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))):\n"
        "    try: attempt()\n    except (OSError, ValueError): continue\n    raise SystemExit('allowed')",
        "ok",
        "",
    ),
    "other processes": (
        ATTEMPTS + "refused('ptrace', 16, 1, 0, 0)\nrefused('ptrace', 0, 0, 0, 0)\n"
        "refused('process_vm_readv', 1, 0, 0, 0, 0, 0)\nrefused('pidfd_getfd', os.pidfd_open(os.getpid()), 0, 0)",
        "ok",
        "",
    ),
    "namespaces of its own": (
        ATTEMPTS + "refused('unshare', 0x10000000)\nrefused('setns', 0, 0)\nrefused('clone', 0x10000011, 0, 0, 0, 0)\n"
        "refused('clone3', 0, 0, error=errno.ENOSYS)\nrefused('mount', b'p', b'/tmp', b'proc', 0, 0)\n"
        "refused('fsopen', b'tmpfs', 0)",
        "ok",
        "",
    ),
    "the kernel's larger doors": (
        ATTEMPTS + "refused('bpf', 0, 0, 0)\nrefused('perf_event_open', 0, 0, 0, 0, 0)\nrefused('userfaultfd', 1)\n"
        "refused('io_uring_setup', 1, 0)\nrefused('add_key', b'user', b'x', b'x', 1, -4)\nrefused('keyctl', 0, 0, 0)",
        "ok",
        "",
    ),
    "its own beginning": (
        "import os\nos.lseek(0, 0, 0)\nseen = os.read(0, 9)\nos.lseek(0, 0, 0)\nos._exit(not seen)",
        "error",
        "",
    ),
}


def numbers():
    """The system calls of this machine by name."""
    _, column = sandbox_filter.ARCHITECTURES[os.uname().machine]
    calls = sandbox_filter.DENIED | {"clone": sandbox_filter.CLONE, "clone3": sandbox_filter.CLONE3}
    return {name: both[column] for name, both in calls.items()}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What a program could do harm to, with the marks that show it."""
    token = uuid.uuid4().hex
    monkeypatch.setenv("SECRET_TOKEN", token)
    secret = tmp_path / "secret.txt"
    secret.write_text(token)
    command = sandbox.command
    # In the command line of every process that the launcher and the program fork.
    monkeypatch.setattr(sandbox, "command", lambda *args: [word for part in command(*args) for word in marked(part)])

    def marked(word):
        return (word, "-X", f"mark={token}") if word == "-B" else (word,)

    def survivors():
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if token.encode() in content(path)]

    with socket.create_server(("127.0.0.1", 0)) as network, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{token}")
        abstract.listen()
        names = {
            "HOST": os.getpid(),
            "PORT": network.getsockname()[1],
            "ABSTRACT": token,
            "SECRET": str(secret),
            "PACKAGE": str(Path(nanochat_jax.__file__)),
            "NUMBERS": numbers(),
        }
        yield "".join(f"{name} = {value!r}\n" for name, value in names.items()), token, survivors
        for listener in (network, abstract):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert secret.read_text() == token and os.listdir(tmp_path) == ["secret.txt"]


def content(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name, host):
    source, reason, says = HOSTILE[name]
    names, token, survivors = host
    result = outcome(names + source, reason, timeout=1.5 if reason == "timeout" else 20.0)
    assert not survivors()
    if result:
        # The abstract socket's name is the token too: where the program knows it, it does not print it.
        assert token not in result.stdout and says in result.stderr


ORDINARY = 61234
"""A user that nobody is."""
AS_ORDINARY = """
import json, os, sys
from nanochat_jax.inference.sandbox import run_program
for names, source, timeout in json.load(sys.stdin):
    result = run_program(f"{names}HOST = {os.getpid()}\\n{source}", timeout=timeout)
    print(json.dumps([result.reason, result.stdout[:10**4], result.stderr[-10**4:]]))
"""


def test_an_ordinary_user_contains_them_too(host):
    """Without root there are other users, limits and rights in the namespaces."""
    if os.geteuid() != 0:
        pytest.skip("the tests above ran as an ordinary user")
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not installed")
    become = ["setpriv", "--reuid", str(ORDINARY), "--regid", str(ORDINARY), "--clear-groups"]
    if isolation_denied(*become):
        pytest.skip("the kernel denies isolation to an ordinary user")
    package = {**os.environ, "PYTHONPATH": str(Path(nanochat_jax.__file__).parent.parent)}
    runs = "import os, sys, nanochat_jax.inference.sandbox; os.execv(os.path.realpath(sys.executable), ['-', '-c', ''])"
    for python in (sys.executable, "/usr/bin/python3"):
        if not subprocess.run([*become, python, "-B", "-c", runs], env=package, capture_output=True).returncode:
            break
    else:
        pytest.skip("this package or every Python is out of an ordinary user's reach")
    names, token, _ = host
    chosen = {name: case for name, case in HOSTILE.items() if case[1] != "timeout" or name == "fork bomb"}
    cases = [(names, source, 1.5 if reason == "timeout" else 20.0) for source, reason, _ in chosen.values()]
    done = subprocess.run(
        [*become, python, "-B", "-c", AS_ORDINARY], input=json.dumps(cases), env=package, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    assert not [path for path in Path("/proc").glob("[0-9]*") if owner(path) == ORDINARY]
    for (name, (_, reason, says)), line in zip(chosen.items(), done.stdout.splitlines(), strict=True):
        ended, output, errors = json.loads(line)
        assert ended == reason and token not in output and says in errors, (name, ended, output, errors)


def owner(path):
    try:
        return path.stat().st_uid
    except OSError:
        return None


def test_a_program_is_in_namespaces_of_its_own():
    """All of them, though some differ in nothing that it may call."""
    if DENIED:
        pytest.skip("the kernel denies isolation")
    process = subprocess.Popen(sandbox.command(30.0, 256, False), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"import time; print(1, flush=True); time.sleep(60)")
    process.stdin.close()
    try:
        assert process.stdout.readline() == b"1\n"
        pid = process.pid
        while children := content(Path(f"/proc/{pid}/task/{pid}/children")).split():
            (pid,) = map(int, children)
        kinds = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
        ours, its = ({kind: os.readlink(f"/proc/{who}/ns/{kind}") for kind in kinds} for who in ("self", pid))
        assert not ours.items() & its.items()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_is_shown_of_the_system_is_read_only_whatever_its_mode(monkeypatch):
    # Not below /tmp, which is the program's own.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o777)
        monkeypatch.setattr(sandbox, "SYSTEM_PATHS", (*sandbox.SYSTEM_PATHS, folder))
        attempt = (
            f"try: open({folder + '/x'!r}, 'w')\nexcept OSError as error: assert error.errno == {errno.EROFS}, error"
        )
        outcome(attempt + ALLOWED, "ok")
        assert os.listdir(folder) == []


def test_a_survivor_would_be_seen(host):
    """The proof of the tests above can fail."""
    _, token, survivors = host
    command = [sys.executable, "-c", "print(1, flush=True); input()", token]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() and len(survivors()) == 1
    process.communicate(b"\n")
    assert not survivors()


def test_runs_from_several_threads():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: outcome(f"print({i})", "ok"), range(8)))
    if not DENIED:
        assert [result.stdout for result in results] == [f"{i}\n" for i in range(8)]


def test_unsafe_runs_without_isolation_but_with_limits():
    result = run_program("import os; print(os.getppid())", unsafe=True)
    assert result.ok and result.stdout == f"{os.getpid()}\n"
    endings = {
        "import time; time.sleep(60)": "timeout",
        "x = bytearray(10**9)": "memory",
        "import os; os.abort()": "killed",
        "1/0": "error",
        "while True: print('x' * 10**6)": "output",
    }
    started = time.monotonic()
    for source, reason in endings.items():
        assert run_program(source, timeout=1.0 if reason == "timeout" else 20.0, unsafe=True).reason == reason
    # A process left behind holds stdout; the program's end is seen all the same.
    left_behind = "import os, time\nif os.fork() == 0: time.sleep(30)\nprint('end', flush=True)"
    assert run_program(left_behind, timeout=20.0, unsafe=True).ok
    assert time.monotonic() - started < 30


LEFT_WRITING = """
import os, time
if os.fork() == 0:
    os.setsid()  # out of the group that is ended
    for i in range(20_000):
        try:
            os.makedirs(f"{i % 50}/sub", exist_ok=True)
            open(f"{i % 50}/sub/{i}", "w").close()
        except OSError:
            pass
    os._exit(0)
while not os.path.exists("49"):
    time.sleep(0.01)
"""


def test_what_an_unsafe_program_leaves_writing_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_program(LEFT_WRITING, timeout=20.0, unsafe=True).ok


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


def test_a_program_that_python_cannot_even_start_for_is_no_wrong_program(monkeypatch):
    if not DENIED:
        monkeypatch.setattr(sandbox, "SYSTEM_PATHS", ("/etc/ld.so.cache",))
        with pytest.raises(UserError, match="--unsafe-sandbox"):
            run_program("print(1)")


# The filter, for both machines, by a machine that runs it.


def verdict(machine, number, first=0, architecture=None):
    """What the filter answers: 0 to allow, an errno to refuse, None to kill."""
    program = list(struct.iter_unpack("=HBBI", sandbox_filter.assemble(machine)))
    data = {0: number, 4: architecture or sandbox_filter.ARCHITECTURES[machine][0], 16: first}
    at, value = 0, None
    while True:
        operation, yes, no, operand = program[at]
        at += 1
        if operation == 0x20:
            value = data[operand]
        elif operation == 0x06:
            return {0x7FFF0000: 0, 0x00050000: operand & 0xFFFF}.get(operand & 0xFFFF0000)
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
            at += yes if holds else no


@pytest.mark.parametrize(("machine", "other"), [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_filter_refuses_what_it_lists(machine, other):
    column = sandbox_filter.ARCHITECTURES[machine][1]
    listed = {both[column] for both in sandbox_filter.DENIED.values()}
    assert all(verdict(machine, number) == errno.EPERM for number in listed)
    clone, clone3, socket_ = (
        both[column] for both in (sandbox_filter.CLONE, sandbox_filter.CLONE3, sandbox_filter.SOCKET)
    )
    fork, thread, namespace = 0x1200011, 0x3D0F00, 0x10000011
    assert [verdict(machine, clone, flags) for flags in (fork, thread, namespace)] == [0, 0, errno.EPERM]
    assert verdict(machine, clone3) == errno.ENOSYS
    assert [verdict(machine, socket_, family) for family in (1, 2, 16)] == [
        0,
        errno.EAFNOSUPPORT,
        errno.EAFNOSUPPORT,
    ]
    rest = set(range(470)) - listed - {clone, clone3, socket_}
    assert all(verdict(machine, number) == 0 for number in rest)
    assert verdict(machine, 0, architecture=sandbox_filter.ARCHITECTURES[other][0]) is None
    assert verdict(machine, 0, architecture=0x40000003) is None  # 32 bits
    x32 = 0x40000000
    assert verdict("x86_64", x32) == verdict("x86_64", x32 + 101) == errno.EPERM


def test_no_filter_no_program(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "sparc64")
    with pytest.raises(UserError, match="sparc64; see --unsafe-sandbox"):
        run_program("print(1)")


def test_filter_knows_the_numbers_of_this_kernel():
    """Against the kernel's own headers, where they are installed."""
    header = Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("linux-libc-dev is not installed")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR")]
    known = {words[1].removeprefix("__NR_").removeprefix("__NR3264_"): words[2] for words in lines if len(words) > 2}
    calls = sandbox_filter.DENIED | {
        "clone": sandbox_filter.CLONE,
        "clone3": sandbox_filter.CLONE3,
        "socket": sandbox_filter.SOCKET,
    }
    assert {name: known[name] for name in calls if name in known} == {
        name: str(both[1]) for name, both in calls.items() if name in known
    }
    assert len(calls.keys() & known.keys()) > 30


def test_the_measured_rate_follows_from_the_time():
    if DENIED:
        pytest.skip("the kernel denies isolation")
    figures = measured.figures(Config(), Settings(repeat=1), print)
    for record in figures["speeds"]:
        assert record["right"]
        assert record["programs_per_sec"] == pytest.approx(1000 * figures["programs"] / record["median_ms"])
