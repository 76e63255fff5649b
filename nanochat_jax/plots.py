"""The pictures of a report, drawn from metrics.jsonl records: loss and validation curves, rewards and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanochat_jax.metrics import STEP_KINDS

INK, COLORS = "#3a3732", ("#a34a1f", "#2f6f8f", "#5b7f3b", "#8a5a9e", "#b58a1b", "#555555")
# Kind of record, its field, the title, the unit.
CURVES = (
    ("train", "loss", "training loss (faint: every step)", "nats per token"),
    ("val", "bpb", "validation", "bits per byte"),
    ("val", "loss", "validation", "nats per token"),
    ("rl", "reward", "reward of the rollouts (faint: every step)", "mean reward"),
)
# Kind of record, its field of several curves, the title, what stands before each name.
GROUPS = (("pass_at_k", "pass", "held-out questions", "pass@"), ("tasks", "accuracy", "tasks", ""))

Series = list[tuple[float, float]]


def plot(records: list[dict], stage: str, path: Path) -> bool:
    """Draws every curve the records of a stage hold, one below the other. False: there is nothing to draw."""
    panels = []
    for kind, name, title, unit in CURVES:
        if points := series(records, kind, name):
            panels.append((title, unit, {f"{points[-1][1]:.4f} at the end": points}, kind in STEP_KINDS))
    for kind, field, title, label in GROUPS:
        found = [record for record in records if record.get("kind") == kind and isinstance(record.get(field), dict)]
        found = [record | record[field] for record in found]
        lines = {f"{label}{name}": series(found, kind, name) for name in (found[-1][field] if found else ())}
        if any(lines.values()):
            shown = {label: points for label, points in lines.items() if points}
            panels.append((title, "share solved", shown, False))
    if not panels:
        return False
    figure = _figure(2.7 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (title, unit, lines, every_step) in zip(axes, panels, strict=True):
        for color, (label, points) in zip(_colors(len(lines)), lines.items(), strict=True):
            if every_step:
                axis.plot(*zip(*points, strict=True), color=color, alpha=0.3, linewidth=0.8)
                axis.plot(*zip(*smoothed(points), strict=True), color=color, linewidth=1.8)
            else:
                axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)
                axis.legend(frameon=False, ncols=4)
        _dress(axis, f"{stage}: {title}", "step", unit)
        axis.label_outer()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def plot_runs(lines: dict[str, Series], path: Path) -> None:
    """Draws validation in base, one line a run, each (FLOPs, value) above 0, over a logarithmic axis."""
    columns = max(1, 120 // (max(map(len, lines)) + 10))
    figure = _figure(4.5 + 0.17 * math.ceil(len(lines) / columns))
    axis = figure.subplots()
    for color, (name, points) in zip(_colors(len(lines)), lines.items(), strict=True):
        # Between two $ is mathematics, and a label that begins with _ is hidden.
        label = " " + name.replace("$", r"\$")
        axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, linewidth=1.2, label=label)
    axis.set_xscale("log")
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
    _dress(axis, "base: validation", "training FLOPs", "bits per byte")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _figure(height: float) -> Figure:
    # Not pyplot, which keeps global state and looks for a display.
    figure = Figure(figsize=(8, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _colors(count: int) -> Sequence:
    return COLORS[:count] if count <= len(COLORS) else colormaps["turbo"].resampled(count)(range(count))


def _dress(axis: Axes, title: str, over: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_ylabel(unit, color=INK)
    axis.set_xlabel(over, color=INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def series(records: list[dict], kind: str, name: str) -> Series:
    """(step, value) of the records of `kind` that have a step and a number called `name`."""
    return [
        (record["step"], record[name])
        for record in records
        if record.get("kind") == kind and "step" in record and isinstance(record.get(name), int | float)
    ]


def smoothed(points: Series) -> Series:
    """Exponential moving average over about a fortieth of the points, without bias at the start."""
    keep = 1 - 1 / max(1, len(points) / 40)
    average, weight, out = 0.0, 0.0, []
    for step, value in points:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append((step, average / weight))
    return out
