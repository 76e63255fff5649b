"""Runs a command in namespaces of its own: what bubblewrap does, with system calls.

Started as a script by sandbox.py, `python -I -S sandbox_launcher.py SECONDS KIB TMP_BYTES FILTER PATHS COMMAND...`,
never imported, so that the forking happens in a small process with one thread. Standard library only. The command sees
PATHS (joined by colons), read-only, three devices, and one writable folder, /tmp; no network, no /proc, no other
process. It runs as a user without rights, behind FILTER (in hexadecimal, from sandbox_filter.py), for at most SECONDS,
and with all that it starts in at most so many KIB of memory. Everything in its process namespace dies with it.

The exit status is one of the numbers below, whatever the command's own may be; any other one where the kernel denied
something, which is then said on stderr.
See user_namespaces(7), pid_namespaces(7), mount_setattr(2) (Linux 5.12), pivot_root(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import struct
import sys
import time

# How the command ended; sandbox.py reads these numbers.
SUCCEEDED, FAILED, SIGNALLED, TOO_LONG, TOO_MUCH_MEMORY = 0, 10, 11, 12, 13
TICK = 0.02
"""Seconds between two looks at the memory in use."""
GRACE = 5
"""Seconds after which the kernel ends this process, and with it all others, should it not have ended them in time."""

NEW_NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE, MNT_DETACH, SYS_MOUNT_SETATTR = -100, 0x8000, 2, 442
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
# The same on all machines that have a filter; importing the module `signal` takes a tenth of a whole program's time.
SIGINT, SIGKILL, SIGXCPU = 2, 9, 24
INNER_ID, NOBODY = 1000, 65534
# A folder that every Linux has and the command does not need, to build the new root on.
BUILD = "/sys"

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raises OSError with the call's name where a C call failed."""
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags))
    check(libc.mount(*arguments, options.encode() or None), f"mount {target}")


def restrict(path: str, attributes: int, flags: int = 0) -> None:
    """mount_setattr(2): adds attributes to the mount at a path."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    arguments = (ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, path.encode(), ctypes.c_uint(flags))
    check(libc.syscall(*arguments, wanted, ctypes.c_size_t(32)), f"mount_setattr {path}")


def show(path: str, attributes: int) -> None:
    """Makes a path of the old root visible at the same place of the new one."""
    target = BUILD + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT))
    mount(path, target, None, MS_BIND | MS_REC)
    restrict(target, attributes, AT_RECURSIVE)


def change_root(paths: list[str], tmp_bytes: int) -> None:
    """A new root of the paths, read-only, and /tmp in memory."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("root", BUILD, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in paths:
        show(path, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        show(device, MOUNT_ATTR_NOSUID)
    os.mkdir(BUILD + "/tmp")
    mount("tmp", BUILD + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={tmp_bytes},nr_inodes=1k,mode=1777")
    os.chdir(BUILD)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount")
    restrict("/", MOUNT_ATTR_RDONLY)
    os.chdir("/tmp")


def has_nobody() -> bool:
    """Whether this is root and can hand the command to another user: limits on processes do not bind root."""
    if os.geteuid() != 0:
        return False
    for kind in ("uid", "gid"):
        with open(f"/proc/self/{kind}_map") as file:
            if not any(int(first) <= NOBODY < int(first) + int(count) for first, _, count in map(str.split, file)):
                return False
    return True


def map_ids(pid: int, privileged: bool) -> None:
    """Users of the new namespace: root (for mounting only) and nobody, or the caller under another number."""
    with open(f"/proc/{pid}/setgroups", "w") as file:
        file.write("deny")
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        with open(f"/proc/{pid}/{kind}_map", "w") as file:
            file.write(f"0 {own} 1\n{INNER_ID} {NOBODY} 1" if privileged else f"{INNER_ID} {own} 1")


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends."""
    check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "prctl")


def drop_rights(program: bytes, user: int | None) -> None:
    """Becomes another user, if one is given; no rights are gained ever after, and the filter decides on every call."""
    if user is not None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        die_with_parent()
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    instructions = ctypes.create_string_buffer(program, len(program))
    description = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, description, 0, 0), "seccomp")


def wait_for(pid: int) -> int:
    """The exit status of a child, or minus the signal that ended it. Reaps the orphans of the namespace on the way."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def family(pid: int) -> list[str]:
    """The process and all that descend from it: also orphans, which their namespace's first process adopts."""
    members = [str(pid)]
    for member in members:
        try:
            for thread in os.listdir(f"/proc/{member}/task"):
                members += read(f"/proc/{member}/task/{thread}/children").split()
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return members


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def resident(pid: str) -> int:
    """Memory of a process, KiB. Pages that processes share are counted in each of them."""
    try:
        return int(read(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proportional(pid: str) -> int:
    """The same with shared pages divided among the processes that share them, which takes the kernel longer."""
    try:
        return int(read(f"/proc/{pid}/smaps_rollup").split("Pss:")[1].split()[0])
    except (OSError, IndexError):
        return resident(pid)


def watch(pid: int, end: int, seconds: float, memory: int) -> int:
    """The status of a child, which is ended where it takes too long or its family too much memory (KiB).

    end: a pipe whose other end closes when the child and its first child have ended.
    """
    read(f"/proc/self/task/{os.getpid()}/children")  # where the kernel does not tell them, refuse
    deadline = time.monotonic() + seconds
    while not select.select([end], [], [], TICK)[0]:
        members = family(pid)
        own, command = members[:2], members[2:]
        if time.monotonic() > deadline:
            reason = TOO_LONG
        elif sum(map(resident, command)) > memory and sum(map(proportional, command)) > memory:
            reason = TOO_MUCH_MEMORY
        else:
            continue
        # The first process of the namespace, with which all others end before `pid` learns of it.
        libc.kill(int(own[-1]), SIGKILL)  # fails where it has just ended
        wait_for(pid)
        return reason
    status = wait_for(pid)
    return status if status >= 0 else SIGNALLED


def spawn() -> int:
    """fork; the child dies with its parent."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
    return pid


def main(seconds: float, memory: int, tmp_bytes: int, program: bytes, paths: list[str], command: list[str]) -> int:
    """Three processes: one outside that names the users and watches, two inside that make the namespaces and wait.

    Returns the exit status, in each of them.
    """
    libc.alarm(math.ceil(seconds) + GRACE)
    # Python's handler would let the command interrupt the first process of its namespace.
    libc.signal(SIGINT, None)
    privileged = has_nobody()
    die_with_parent()
    if privileged:
        os.setgroups([])
    outside, inside = os.pipe(), os.pipe()
    pid = spawn()
    if pid:
        os.close(outside[1])
        os.close(inside[0])
        if os.read(outside[0], 1):
            map_ids(pid, privileged)
            os.write(inside[1], b"x")
        os.close(inside[1])
        return watch(pid, outside[0], seconds, memory)
    os.close(outside[0])
    os.close(inside[1])
    check(libc.unshare(sum(NEW_NAMESPACES.values())), "unshare")
    os.write(outside[1], b"x")
    if not os.read(inside[0], 1):
        return 1
    change_root(paths, tmp_bytes)
    pid = spawn()
    if pid:
        status = wait_for(pid)
        return status if status >= 0 else SIGNALLED
    pid = spawn()
    if pid:
        status = wait_for(pid)
        return FAILED if status > 0 else {0: SUCCEEDED, -SIGXCPU: TOO_LONG}.get(status, SIGNALLED)
    # Out of the process group of those that watch it: a signal to a group knows no namespaces.
    os.setsid()
    drop_rights(program, INNER_ID if privileged else None)
    os.execve(command[0], command, {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})


if __name__ == "__main__":
    try:
        seconds, memory, tmp_bytes, program, paths, *command = sys.argv[1:]
        status = main(float(seconds), int(memory), int(tmp_bytes), bytes.fromhex(program), paths.split(":"), command)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr, flush=True)
        status = 1
    os._exit(status)
