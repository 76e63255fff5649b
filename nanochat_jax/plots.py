"""The pictures of a report, drawn from metrics.jsonl records: loss and validation curves, rewards and pass@k."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, COLORS = "#3a3732", ("#a34a1f", "#2f6f8f", "#5b7f3b", "#8a5a9e", "#b58a1b", "#555555")

Series = list[tuple[float, float]]


def training_plot(records: list[dict], stage: str, path: Path) -> bool:
    """Training loss a step and, where there is one, the validation curve below it. False: there is nothing to draw."""
    loss = series(records, "train", "loss")
    validations = {name: series(records, "val", name) for name in ("bpb", "loss")}
    validations = {name: points for name, points in validations.items() if points}
    if not loss and not validations:
        return False
    title = f"{stage}: training loss (faint: every step)"
    if loss:
        # A single measurement makes no curve.
        single = [name for name, points in validations.items() if len(points) == 1]
        title += "".join(f"; validation {name} {validations.pop(name)[0][1]:.4f}" for name in single)
    figure, axes = _figure(1 + len(validations) if loss else len(validations))
    if loss:
        axis = axes.pop(0)
        axis.plot(*zip(*loss, strict=True), color=COLORS[0], alpha=0.3, linewidth=0.8)
        axis.plot(*zip(*smoothed(loss), strict=True), color=COLORS[0], linewidth=1.8)
        _label(axis, title, "nats per token")
    for axis, (name, points) in zip(axes, validations.items(), strict=True):
        axis.plot(*zip(*points, strict=True), color=COLORS[1], marker="o", markersize=3)
        unit = "bits per byte" if name == "bpb" else "nats per token"
        _label(axis, f"{stage}: validation, {points[-1][1]:.4f} at the end", unit)
    _save(figure, path)
    return True


def reward_plot(records: list[dict], stage: str, path: Path) -> bool:
    """Mean reward of the rollouts a step, and pass@k on held-out questions. False: there is nothing to draw."""
    rewards = series(records, "rl", "reward")
    passes: dict[int, Series] = {}
    for record in records:
        if record.get("kind") == "pass_at_k" and isinstance(record.get("pass"), dict):
            for k, value in record["pass"].items():
                passes.setdefault(int(k), []).append((record["step"], value))
    if not rewards and not passes:
        return False
    figure, axes = _figure(bool(rewards) + bool(passes))
    if rewards:
        axis = axes.pop(0)
        axis.plot(*zip(*rewards, strict=True), color=COLORS[2], alpha=0.3, linewidth=0.8)
        axis.plot(*zip(*smoothed(rewards), strict=True), color=COLORS[2], linewidth=1.8)
        _label(axis, f"{stage}: reward of the rollouts (faint: every step)", "mean reward")
    if passes:
        for i, (k, points) in enumerate(sorted(passes.items())):
            points = sorted(points)
            axes[0].plot(*zip(*points, strict=True), color=COLORS[i % len(COLORS)], marker="o", label=f"pass@{k}")
        axes[0].legend(frameon=False, ncols=4)
        _label(axes[0], f"{stage}: held-out questions", "share solved")
    _save(figure, path)
    return True


def series(records: list[dict], kind: str, name: str) -> Series:
    """(step, value) of the records of `kind` that have a number called `name`."""
    return [
        (record["step"], record[name])
        for record in records
        if record.get("kind") == kind and isinstance(record.get(name), int | float) and "step" in record
    ]


def smoothed(points: Series) -> Series:
    """Exponential moving average over about a fortieth of the points, without bias at the start."""
    keep = 1 - 1 / max(1, len(points) / 40)
    average, weight, out = 0.0, 0.0, []
    for step, value in points:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append((step, average / weight))
    return out


def _figure(rows: int) -> tuple[Figure, list[Axes]]:
    # Not pyplot, which keeps global state and looks for a display.
    figure = Figure(figsize=(8, 2.7 * rows), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _label(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_ylabel(unit, color=INK)
    axis.set_xlabel("step", color=INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    axis.label_outer()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
