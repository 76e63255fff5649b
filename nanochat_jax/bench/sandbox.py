"""The sandbox: programs a second, with as many at once as there are cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from nanochat_jax.bench import Settings
from nanochat_jax.bench.measure import timed
from nanochat_jax.config import Config
from nanochat_jax.inference.sandbox import ProgramResult, require_isolation, run_program, run_tests

PROGRAMS = 32
"""Of a sample."""
SOURCE = "from typing import List\n\n\ndef largest(xs: List[int]) -> int:\n    return max(xs)\n"
TESTS = "def check(candidate):\n    assert candidate([3, 9, 2]) == 9\n"
WORK: dict[str, Callable[[], ProgramResult]] = {
    "a program": lambda: run_program(f"{SOURCE}assert largest([3, 9, 2]) == 9"),
    "a function and its tests": lambda: run_tests(SOURCE, TESTS, "largest"),
}


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Programs a second, started, run and cleaned away. UserError where the kernel denies isolation."""
    require_isolation()
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        records = [measured(pool, name, run, settings.repeat) for name, run in WORK.items()]
    return {"threads": threads, "programs": PROGRAMS, "speeds": records}


def measured(pool: Executor, name: str, run: Callable[[], ProgramResult], repeat: int) -> dict[str, Any]:
    """The figures of one kind of work. right: all programs ended as they should."""
    ended_well: list[bool] = []

    def sample() -> None:
        ended_well.extend(result.ok for result in pool.map(lambda _: run(), range(PROGRAMS)))

    timing = timed(sample, repeat, warmup=1)
    rate = {"programs_per_sec": PROGRAMS / timing.median}
    return {"work": name} | timing.ms() | rate | {"right": all(ended_well)}
