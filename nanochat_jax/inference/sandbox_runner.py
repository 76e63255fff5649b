"""The process that runs a program inside the sandbox: takes its limits, then runs what stdin holds.

Started as `python -I -S -c TEXT MEMORY CPU_SECONDS FILE_BYTES PROCESSES`, TEXT being this file, because nothing of this
package is visible inside. Standard library only. PROCESSES 0: no limit; outside a namespace it would count all
processes of the user.
"""

import os
import resource
import sys
import types


def main(memory: int, cpu_seconds: int, file_bytes: int, processes: int) -> None:
    """Limits cannot be raised again by a process without rights."""
    source = sys.stdin.read()
    # The position in the file tells sandbox.py that the program was reached. Closing sys.stdin would leave it open.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limits = {
        resource.RLIMIT_AS: (memory, memory),
        # SIGXCPU, which says what it was, comes at the first; SIGKILL at the second.
        resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),
        resource.RLIMIT_FSIZE: (file_bytes, file_bytes),
        resource.RLIMIT_NOFILE: (64, 64),
        # Not 0: where the kernel hands core dumps to a program of the host, only 1 stops it, see core(5).
        resource.RLIMIT_CORE: (1, 1),
    }
    if processes:
        limits[resource.RLIMIT_NPROC] = (processes, processes)
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]  # nobody may go above the host's own
        resource.setrlimit(kind, limit if hard == resource.RLIM_INFINITY else tuple(min(n, hard) for n in limit))
    sys.argv = ["program.py"]
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    try:
        exec(compile(source, "program.py", "exec"), program.__dict__)
    except MemoryError as error:
        # What the program holds is let go of: from Python 3.13 on printing the traceback takes memory.
        program.__dict__.clear()
        at = error.__traceback__.tb_next
        while at:
            at.tb_frame.clear()
            at = at.tb_next
        raise


main(*map(int, sys.argv[1:]))
