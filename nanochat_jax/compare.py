"""Several runs side by side: what differs between them, what their stages reached, and for how much computation.

    python -m nanochat_jax report --workdir runs/a --against runs/b runs/c

Runs that differ in their seed alone are averaged too: what one run gains over another means little where two seeds
are further apart. figures.json has it all as a list of flat records, for pandas or a plot of one's own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from nanochat_jax.config import MODEL_STAGES
from nanochat_jax.data.files import write_json
from nanochat_jax.metrics import duration, si
from nanochat_jax.plots import Series, plot_runs
from nanochat_jax.report import Run, Stage, dig, entries, figure, gather, measured, measures, number, show, write_pages
from nanochat_jax.report_page import bullets, table

COSTS = {
    "parameters": ("params", si),
    "tokens": ("tokens", si),
    "FLOPs": ("flops", "{:.3g}"),
    "time": ("seconds", duration),
}


def write_comparison(workdirs: Sequence[Path], out: Path) -> Path:
    """Writes report.md, report.html, plots/ and figures.json in `out`; returns the path of report.md.

    Raises UserError where a folder holds nothing of a run. One that is named twice counts once.
    """
    folders: dict[Path, Path] = {}
    for path in workdirs:
        folders.setdefault(path.resolve(), path)
    runs = {str(path): gather(path) for path in folders.values()}
    options = {name: _options(run) for name, run in runs.items()}
    names = dict.fromkeys(option for found in options.values() for option in found)
    differing = [name for name in names if len({json.dumps(found.get(name)) for found in options.values()}) > 1]
    rows = [(name, *(_short(found.get(option)) for option in differing)) for name, found in options.items()]
    problems = [f"{name}: {problem}" for name, run in runs.items() for problem in run.problems]
    sections = {
        "Missing or damaged": bullets(problem for problem in problems if not problem.endswith("not started")),
        "What differs": table(("run", *differing), rows) if differing else "Nothing: these runs were asked the same.",
    }
    records = [{"run": name} | {option: found.get(option) for option in differing} for name, found in options.items()]
    for i, name in enumerate(MODEL_STAGES):
        stages = {run: found.stages[i] for run, found in runs.items() if found.stages[i].done}
        if not stages:
            continue
        sections[name] = _results(stages, options)
        for record in records:
            if record["run"] in stages:
                record |= {f"{name}.{label}": value for label, value in _figures(stages[record["run"]]).items()}
        lines = {run: points for run, stage in stages.items() if (points := _curve(stage))}
        if lines:
            unit = "bits per byte" if name == "base" else "nats per token"
            plot_runs(lines, f"{name}: validation", unit, out / "plots" / f"{name}.png")
            sections[name] += f"\n\n![Validation](plots/{name}.png)"
    write_json(out / "figures.json", records)
    return write_pages(out, "nanochat-jax: runs compared", ", ".join(runs), sections)


def _options(run: Run) -> dict[str, Any]:
    """All options of a run by their names on the command line, and what else may tell it from another."""
    options = flatten_dict(entries(run.record, "config"), sep=".")
    done = next((stage.done for stage in run.stages if stage.done), {})
    facts = {"git": run.record.get("git"), "jax": dig(run.record, "versions", "jax")}
    return options | facts | {"devices": f"{done.get('devices')} x {done.get('device')}" if done else None}


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _results(stages: dict[str, Stage], options: dict[str, dict]) -> str:
    """One line a run; below, one for all runs that differ in their seed alone."""
    places = measures(list(stages.values()))
    places = {
        label: keys for label, keys in places.items() if any(_value(s, keys) is not None for s in stages.values())
    }
    rows = [
        (
            run,
            *(show(stage.done.get(key), form) for key, form in COSTS.values()),
            *(figure(measured(stage, keys)) for keys in places.values()),
        )
        for run, stage in stages.items()
    ]
    alike: dict[str, list[Stage]] = {}
    for run, stage in stages.items():
        alike.setdefault(json.dumps(options[run] | {"seed": None}, sort_keys=True), []).append(stage)
    for group in alike.values():
        if len(group) > 1:
            spread = (_spread([_value(stage, keys) for stage in group]) for keys in places.values())
            rows.append((f"mean of {len(group)} seeds, ± s.d.", *["-"] * len(COSTS), *spread))
    return table(("run", *COSTS, *places), rows)


def _value(stage: Stage, keys: tuple[str, ...]) -> float | None:
    """A figure of eval.json as a number."""
    found = measured(stage, keys)
    return number(dig(found, "accuracy") if isinstance(found, dict) else found)


def _spread(values: list[float | None]) -> str:
    """Mean and standard deviation over seeds; '-' where one of them was not measured."""
    if any(value is None for value in values):
        return "-"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _figures(stage: Stage) -> dict[str, float | None]:
    costs = {label: number(stage.done.get(key)) for label, (key, _) in COSTS.items()}
    return costs | {label: _value(stage, keys) for label, keys in measures([stage]).items()}


def _curve(stage: Stage) -> Series:
    """Validation over the stage's FLOPs: bits per byte of base, the loss of what is fine-tuned."""
    points = [
        (dig(record, "flops"), record.get("bpb", record.get("loss")))
        for record in stage.metrics
        if record.get("kind") == "val"
    ]
    return [(x, y) for x, y in points if number(x) and number(y) is not None]
