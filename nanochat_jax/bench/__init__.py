"""Measurements of single parts on this machine: `python -m nanochat_jax bench PART`.

Each part is a module with `figures(config, settings, log)`, a dict for JSON whose rates follow from the times beside
them. What compares this program with another, or runs many measurements in a row, is in bench/ beside the package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nanochat_jax.bench.tables import table
from nanochat_jax.config import Config


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    repeat: int = 10
    """Repetitions that count, after warm-up."""
    rows: tuple[int, ...] = ()
    """Rows or clients at once; unset: 16 on a GPU, 2 on a CPU (attention), 1 and 16 (decode), 1 and 8 (server)."""
    impls: tuple[Literal["reference", "xla_blocked", "cudnn", "pallas", "pallas_interpreted", "mosaic"], ...] = ()
    """Implementations of attention to measure; unset: all that run here."""
    quantize: Literal["none", "int8"] = "none"
    """Weights of the engine (decode)."""
    step_only: bool = False
    """Leave out what takes long: the parts of a training step, the requests that arrive at random (decode)."""


def measured(what: str, config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """The figures of a part, and where and with what they were measured; shows them as tables on stderr."""
    from nanochat_jax.bench.measure import environment  # imports JAX

    part = importlib.import_module(f"nanochat_jax.bench.{what}")
    figures = {"bench": what, "repeat": settings.repeat, **part.figures(config, settings, log)}
    print(table(figures), file=sys.stderr, flush=True)
    return figures | {"environment": environment()}
