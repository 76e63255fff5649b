"""What has to be said before JAX is imported, in one place: the compiler's flags, memory, the compilation cache.

Flags of XLA come and go, and one that a version does not know ends the process: every flag here is known to JAX 0.10.2
and 0.12 (tests/test_process.py tries them). What the user has set in the environment wins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

NVIDIA = Path("/proc/driver/nvidia/version")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

GPU_FLAGS = {
    # Each product on its own by cuBLAS: else XLA does not see which are in fp8, and drops their rounding (fp8.py).
    "xla_gpu_enable_triton_gemm": "false",
    "xla_gpu_dot_merger_threshold_mb": "0",
    # Communication behind computation, in few large pieces.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_all_gather_combine_threshold_bytes": str(128 * 2**20),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(128 * 2**20),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(128 * 2**20),
    "xla_gpu_enable_pipelined_all_gather": "true",
}
CPU_FLAGS = {
    # LLVM by itself uses half of the width of AVX-512; without it, this changes nothing (docs/DECODING.md).
    "xla_cpu_prefer_vector_width": "512",
}
GPU_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "NCCL_NVLS_ENABLE": "1"}
"""JAX by itself takes three quarters of a GPU's memory. NVLink's own sums where there is a switch that makes them."""
HUGE_PAGE_TUNABLE = "glibc.malloc.hugetlb=1"
CACHE_BYTES = 10 * 2**30
"""The most that our own compilation cache holds when a process begins, without what XLA keeps in folders there."""


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment `given` of a process that imports JAX."""
    cache = Path(given.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat_jax" / "xla"
    wanted = {"JAX_COMPILATION_CACHE_DIR": str(cache), "TF_CPP_MIN_LOG_LEVEL": "2"}
    if uses_gpu(given):
        wanted |= GPU_ENVIRONMENT
    elif HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text():
        wanted["GLIBC_TUNABLES"] = HUGE_PAGE_TUNABLE
    added = {name: value for name, value in wanted.items() if name not in given}
    flags = given.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("--"):
        return added  # the name of a file that holds them
    for name, value in (GPU_FLAGS if uses_gpu(given) else CPU_FLAGS).items():
        if f"--{name}=" not in flags:
            flags += f" --{name}={value}"
    return added | {"XLA_FLAGS": flags.strip()}


def uses_gpu(given: Mapping[str, str]) -> bool:
    """Whether JAX will use an NVIDIA GPU, as far as can be said without importing it."""
    platforms = given.get("JAX_PLATFORMS", "")
    return NVIDIA.exists() and (not platforms or "cuda" in platforms or "gpu" in platforms)


def prune(cache: Path, limit: int = CACHE_BYTES) -> None:
    """Deletes the compiled programs that were not used for longest, until `limit` bytes are left. Left to JAX they stay
    for ever, or every file is looked at whenever one is added.
    """
    entries = []
    for path in cache.glob("*"):
        with contextlib.suppress(OSError):  # other processes delete too
            if path.is_file():
                entries.append((path.stat(), path))
    excess = sum(stat.st_size for stat, _ in entries) - limit
    for stat, path in sorted(entries, key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime)):
        if excess > 0:
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= stat.st_size


def without_echoes(caught: sys.UnraisableHookArgs) -> None:
    """`sys.unraisablehook`: when a disk is full, or a checkpoint is pruned while it is read, writes and reads still on
    their way find orbax's event loop closed, each with a traceback that says nothing; what ends the program is said
    elsewhere.
    """
    if not str(caught.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index")):
        sys.__unraisablehook__(caught)


def leave(status: int) -> NoReturn:
    """Ends the program. From here on one more Ctrl-C ends it at once: Python would show a traceback for it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def raise_on_ctrl_c() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, where since `set_up` it would end the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def set_up() -> None:
    """Sets the environment and quietens libraries; call it before anything that takes long to import. On a CPU the
    process begins anew, once.

    Until a command has its own ways with Ctrl-C, one ends the process at once: as an exception it would come out of
    an import as another one, or not at all.

    A step on a CPU maps and unmaps hundreds of megabytes, which huge pages make much cheaper. glibc asks for them only
    when told so before a process begins.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it is ignored, and stays so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they print what is raised anyway
    sys.unraisablehook = without_echoes
    added = environment(os.environ)
    os.environ.update(added)
    if cache := added.get("JAX_COMPILATION_CACHE_DIR"):
        prune(Path(cache))
    if "GLIBC_TUNABLES" in added:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
