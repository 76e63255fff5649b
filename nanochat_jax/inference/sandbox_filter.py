"""The system calls that a program in the sandbox may not make: a seccomp filter, written in classic BPF.

What is refused is what reaches into other processes, makes namespaces and mounts, opens large parts of the kernel that
a program has no use for, or takes room that no limit counts. It fails with EPERM; everything else is allowed. Left
out: a list of what is allowed instead, which would have to follow every version of libc and Python.

See seccomp(2), and BPF_* in linux/bpf_common.h.
"""

from __future__ import annotations

import errno
import struct

from nanochat_jax.errors import UserError

# Machine -> AUDIT_ARCH_* and the column of a call's number below.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

DENIED = {
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "open_by_handle_at": (304, 265),
    # The kernel itself.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    # Room that no limit counts: beyond the end of a file, outside every address space.
    "fallocate": (285, 47),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
NEW_NAMESPACE = 0x7E020000
"""Any CLONE_NEW* flag of clone(2)."""
AF_UNIX = 1
X32 = 0x40000000
"""Added to the numbers of calls by programs of the x32 kind, on x86_64 only."""

# Offsets in struct seccomp_data; of an argument, the lower half (both machines are little-endian).
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000

Instruction = tuple[int, int, int, int]
"""Operation, instructions to skip where the comparison holds, and where it does not, operand."""


def assemble(machine: str) -> bytes:
    """The filter as an array of struct sock_filter. machine: as platform.machine() says. Raises UserError."""
    if machine not in ARCHITECTURES:
        raise UserError(
            f"programs can be isolated on {' and '.join(ARCHITECTURES)} only, not on {machine}; see --unsafe-sandbox"
        )
    architecture, column = ARCHITECTURES[machine]
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, X32), refuse(errno.EPERM)]
    for numbers in DENIED.values():
        program += [(EQUAL, 0, 1, numbers[column]), refuse(errno.EPERM)]
    # Its flags lie in memory, which a filter cannot read; libc falls back to clone.
    program += [(EQUAL, 0, 1, CLONE3[column]), refuse(errno.ENOSYS)]
    program += on_first_argument(CLONE[column], (ANY_BIT, 0, 1, NEW_NAMESPACE), errno.EPERM)
    program += on_first_argument(SOCKET[column], (EQUAL, 1, 0, AF_UNIX), errno.EAFNOSUPPORT)
    program += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def refuse(error: int) -> Instruction:
    """The call fails with this errno."""
    return (RETURN, 0, 0, REFUSE | error)


def on_first_argument(call: int, test: Instruction, error: int) -> list[Instruction]:
    """Refuses a call unless the test of its first argument skips the refusal."""
    return [(EQUAL, 0, 4, call), (LOAD, 0, 0, FIRST_ARGUMENT), test, refuse(error), (RETURN, 0, 0, ALLOW)]
