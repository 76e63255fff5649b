"""The process that runs a program inside the sandbox: takes its limits, says that it got there, runs what stdin holds.

Started as `python -I -S -c TEXT STATUS_FD MEMORY CPU_SECONDS FILE_BYTES PROCESSES`, TEXT being this file, because
nothing of this package is visible inside. Standard library only. PROCESSES 0: no limit; outside a namespace it would
count all processes of the user.
"""

import os
import resource
import sys
import types


def main(status: int, memory: int, cpu_seconds: int, file_bytes: int, processes: int) -> None:
    """Limits cannot be raised again by a process without rights."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    # SIGXCPU at the first value tells a timeout from other ends; the second is for programs that ignore it.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    source = sys.stdin.read()
    sys.stdin.close()
    os.write(status, b"x")
    os.close(status)
    sys.argv = ["program.py"]
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    exec(compile(source, "program.py", "exec"), program.__dict__)


main(*map(int, sys.argv[1:]))
