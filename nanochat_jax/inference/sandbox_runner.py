"""The process that runs a program inside the sandbox: takes its limits, then runs what stdin holds.

Started as `python -I -S -c TEXT MEMORY CPU_SECONDS FILE_BYTES PROCESSES`, TEXT being this file, because nothing of this
package is visible inside. Standard library only. PROCESSES 0: no limit; outside a namespace it would count all
processes of the user.
"""

import resource
import sys
import types


def main(memory: int, cpu_seconds: int, file_bytes: int, processes: int) -> None:
    """Limits cannot be raised again by a process without rights."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    source = sys.stdin.read()
    sys.stdin.close()
    sys.argv = ["program.py"]
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    exec(compile(source, "program.py", "exec"), program.__dict__)


main(*map(int, sys.argv[1:]))
