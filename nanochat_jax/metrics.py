"""What a run tells about itself while it runs: `metrics.jsonl`, lines on the console, MFU and memory.

The log is the record that the report reads: one JSON object a line, flushed at once, so that a killed run keeps all but
perhaps its last line. Nothing here keeps state between stages, and nothing needs an account anywhere.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.distributed import is_leader
from nanochat_jax.errors import UserError

# Peaks of one chip, dense bfloat16 FLOP/s and bytes/s of memory (A100: that of 80 GB), by a part of JAX's
# `device_kind`; the first match wins. Vendors' data sheets.
PEAKS = (
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100 NVL", 835e12, 3.9e12),
    ("H100", 989e12, 3.35e12),
    ("H200 NVL", 836e12, 4.8e12),
    ("H200", 989e12, 4.8e12),
    ("H800 PCIe", 756e12, 2.0e12),
    ("H800", 989e12, 3.35e12),
    ("H20", 148e12, 4.0e12),
    ("GB200", 2500e12, 8.0e12),
    ("B200", 2250e12, 8.0e12),
    ("B100", 1800e12, 8.0e12),
    ("A100", 312e12, 2.0e12),
    ("A800", 312e12, 2.0e12),
    ("L40S", 362e12, 0.864e12),
    ("L40", 181e12, 0.864e12),
    ("L4", 121e12, 0.3e12),
    ("A10G", 70e12, 0.6e12),
    ("A10", 125e12, 0.6e12),
    ("A30", 165e12, 0.933e12),
    ("A40", 150e12, 0.696e12),
    ("RTX 5090", 209e12, 1.79e12),
    ("RTX 4090", 165e12, 1.01e12),
    ("RTX 3090", 71e12, 0.936e12),
    ("TPU v6", 918e12, 1.64e12),
    ("TPU v5 lite", 197e12, 0.819e12),
    ("TPU v5e", 197e12, 0.819e12),
    ("TPU v5", 459e12, 2.765e12),
    ("TPU v4", 275e12, 1.228e12),
)


STEP_KINDS = ("train", "rl")
"""Records of one optimizer step each."""


class MetricsLog:
    """`metrics.jsonl` of one stage. Opened for appending: a resumed run goes on in the same file.

    Of several processes the leader alone writes.
    """

    def __init__(self, stage_dir: Path | str) -> None:
        self.path = Path(stage_dir) / "metrics.jsonl"
        if is_leader():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (self.path if is_leader() else Path(os.devnull)).open("a", encoding="utf-8")
        self.listener: Callable[[dict], None] | None = None
        """Gets each record after it is in the file."""

    def write(self, kind: str, **values: Any) -> None:
        """Appends {"kind": kind, **values}. NumPy and JAX scalars become numbers, NaN and infinities become null."""
        record = jsonable({"kind": kind, **values})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self.listener:
            self.listener(record)

    def drop_after(self, step: int) -> None:
        """Forgets what a run resumed with `step` steps done writes again, and a last line torn by a crash. Atomic.

        Steps are logged by their index, from 0; measurements (val, pass_at_k, ...) by the number of steps done.
        """
        if not is_leader():
            return
        records = self.read(self.path)
        kept = [r for r in records if r.get("step", -1) < step + (r["kind"] not in STEP_KINDS)]
        self._file.close()
        fresh = self.path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file; the log cannot be written afterwards."""
        self._file.close()

    @staticmethod
    def read(path: Path | str) -> list[dict]:
        """Records in order; a last line torn by a crash is left out. Raises UserError where another line is damaged."""
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}): remove that line") from None
            whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
            if not whole or not isinstance(record.get("step", 0), int | float):
                raise UserError(f"{path} line {number} is no record, an object with kind and step: remove that line")
            records.append(record)
        return records


def jsonable(value: Any, name: str = "", log: Callable[[str], None] | None = None) -> Any:
    """A scalar, or a dict or list of them, as JSON has it: null for NaN and infinities, which `log` is told of."""
    if isinstance(value, dict):
        return {str(key): jsonable(inner, f"{name} {key}", log) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner, name, log) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if log is not None:
        log(f"{name}: {value}, written as null; has the model diverged?")
    return None


class Pace:
    """Speed of a training loop: call `lap` once a step. The first lap, which compiles, is kept out of the ETA."""

    def __init__(self, total_steps: int, tokens_per_step: int, flops_per_token: float, n_devices: int) -> None:
        """`n_devices` share the work."""
        self.total_steps, self.tokens_per_step, self.flops_per_token = total_steps, tokens_per_step, flops_per_token
        self.n_devices = n_devices
        self._recent: deque[float] = deque(maxlen=20)
        self._laps = 0
        self._last = time.perf_counter()

    def skip(self) -> None:
        """Starts the clock anew, after work that is no step: a validation, a save."""
        self._last = time.perf_counter()

    def lap(self, steps_done: int) -> dict[str, float | None]:
        """step_seconds, tok_per_sec, mfu (None without a known peak), eta_seconds, of the step that just ended."""
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        self._laps += 1
        if self._laps == 2:
            self._recent.clear()
        self._recent.append(seconds)
        tokens_per_second = self.tokens_per_step / seconds
        return {
            "step_seconds": seconds,
            "tok_per_sec": tokens_per_second,
            "mfu": mfu(tokens_per_second, self.flops_per_token, self.n_devices),
            "eta_seconds": statistics.median(self._recent) * (self.total_steps - steps_done),
        }


class Console:
    """One line a logged step on stderr. It takes the values that go to `MetricsLog.write`, so one dict serves both."""

    def __init__(self, stage: str, total_steps: int) -> None:
        self.stage, self.total_steps = stage, total_steps

    def step(self, step: int, **values: Any) -> None:
        """Prints the values it knows, in a fixed order: loss or reward, lr, tok/s, MFU, step time, ETA."""
        width = len(str(self.total_steps))
        parts = [f"{self.stage} {step:>{width}}/{self.total_steps}"]
        parts += [show(values[name]) for name, show in _COLUMNS.items() if values.get(name) is not None]
        if is_leader():
            print(" | ".join(parts), file=sys.stderr, flush=True)


_COLUMNS: dict[str, Callable[[Any], str]] = {
    "loss": "loss {:.4f}".format,
    "bpb": "val bpb {:.4f}".format,
    "reward": "reward {:.3f}".format,
    "pass": lambda v: " ".join(f"pass@{k} {share:.3f}" for k, share in v.items()),
    "response_tokens": "answer {:.0f} tok".format,
    "lr_mult": "lr x{:.3f}".format,
    "tok_per_sec": lambda v: f"{si(v)} tok/s",
    "mfu": "MFU {:.1%}".format,
    "step_seconds": lambda v: f"{1000 * v:.0f} ms",
    "rollout_seconds": "rollout {:.1f} s".format,
    "update_seconds": "update {:.1f} s".format,
    "eta_seconds": lambda v: f"ETA {duration(v)}",
}


def banner(title: str, **rows: Any) -> None:
    """What a stage is about to do, aligned, on stderr: banner("base", mesh="data=8", precision=..., parameters=...).

    Large integers get an SI suffix as well, a name that ends in `_bytes` is shown as GiB, None is left out.
    """
    lines = [f"== {title} " + "=" * max(0, 56 - len(title))]
    for name, value in rows.items():
        if name.endswith("_bytes"):
            value = gib(value)
        elif isinstance(value, int):
            value = f"{value:,}" if value < 1_000_000 else f"{value:,} ({si(value)})"
        if value is not None:
            lines.append(f"   {name.removesuffix('_bytes').replace('_', ' '):<14} {value}")
    if is_leader():
        print("\n".join(lines), file=sys.stderr, flush=True)


def si(value: float) -> str:
    """1234567 -> '1.23M'; for counts, tokens and FLOPs."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}" if abs(value) < 999.5 * size else f"{value / size:.0f}{suffix}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def gib(size: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """3725 -> '1h02m'; 65 -> '1m05s'; 5 -> '5s'."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 peak of one device, FLOP/s; None where it is not known, as on CPUs."""
    return _peaks(device)[0]


def peak_bandwidth(device: jax.Device) -> float | None:
    """Peak of one device's memory, bytes/s; None where it is not known, as on CPUs."""
    return _peaks(device)[1]


def _peaks(device: jax.Device) -> tuple[float | None, float | None]:
    kind = device.device_kind.lower() if device.platform != "cpu" else ""
    return next(((flops, bandwidth) for name, flops, bandwidth in PEAKS if name.lower() in kind), (None, None))


def mfu(tokens_per_second: float, flops_per_token: float, n_devices: int) -> float | None:
    """Share of the peak of `n_devices` devices like the first one that training uses; None without a known peak."""
    peak = peak_flops(jax.devices()[0])
    return None if peak is None else tokens_per_second * flops_per_token / (peak * n_devices)


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the fullest local device where it counts, else of this process (resident set)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
