"""How a time is taken: warm-up, repetitions, median and spread; and what it was taken on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

SAMPLE_SECONDS = 0.01
"""Calls that take less are timed several at once, so that neither the clock nor the dispatch is what is measured."""


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The median of samples, and the samples that a tenth of them lie below and above."""
        low, high = np.percentile(samples, (10, 90), method="nearest").tolist()
        return cls(statistics.median(samples), low, high)

    def ms(self) -> dict[str, float]:
        """In milliseconds, for JSON."""
        return {f"{name}_ms": 1000 * value for name, value in self._asdict().items()}


def timed(action: Callable[[], Any], repeat: int, warmup: int = 2) -> Timing:
    """Time of `action` until the arrays it returns are there, after `warmup` calls that do not count."""
    for _ in range(warmup):
        jax.block_until_ready(action())
    calls = max(1, round(SAMPLE_SECONDS / seconds_of(action)))

    def several() -> Any:
        for _ in range(calls - 1):
            action()
        return action()

    return Timing.of([seconds_of(several) / calls for _ in range(repeat)])


def seconds_of(action: Callable[[], Any]) -> float:
    """Seconds of one call, until the arrays it returns are there."""
    start = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Date, hardware and versions."""
    devices = jax.devices()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "runtime": devices[0].client.platform_version.splitlines()[0],
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
