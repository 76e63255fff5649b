"""Runs a command in namespaces of its own: what bubblewrap does, with system calls.

Started as a script by sandbox.py, `python -I -S sandbox_launcher.py TMP_BYTES PATHS -- COMMAND...`, never imported,
so that the forking happens in a small process with one thread. Standard library only. The command sees PATHS (joined
by colons), read-only, three devices, and one writable folder, /tmp; no network, no /proc, no other process. It runs
as a user without rights, and everything in its process namespace dies with it.

Exit status: the command's; 128 + the signal that ended it. What the kernel denies is said on stderr.
See user_namespaces(7), pid_namespaces(7), mount_setattr(2) (Linux 5.12), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
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
    """mount(2)."""
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
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def finish(pid: int) -> None:
    """Waits for a child and ends with its status. Orphans that the namespace's first process inherits are reaped."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def spawn() -> int:
    """fork; the child dies with its parent."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
    return pid


def main(tmp_bytes: int, paths: list[str], command: list[str]) -> None:
    """Three processes: one outside that names the users, the first one of the namespaces, and the command."""
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
        finish(pid)
    os.close(outside[0])
    os.close(inside[1])
    check(libc.unshare(sum(NEW_NAMESPACES.values())), "unshare")
    os.write(outside[1], b"x")
    if not os.read(inside[0], 1):
        os._exit(1)
    change_root(paths, tmp_bytes)
    pid = spawn()
    if pid:
        finish(pid)
    pid = spawn()
    if pid:
        finish(pid)
    if privileged:
        os.setresgid(INNER_ID, INNER_ID, INNER_ID)
        os.setresuid(INNER_ID, INNER_ID, INNER_ID)
        die_with_parent()
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    os.execve(command[0], command, {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2].split(":"), sys.argv[4:])
    except OSError as error:
        print(error.strerror or error, file=sys.stderr, flush=True)
        os._exit(1)
