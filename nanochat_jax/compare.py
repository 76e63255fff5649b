"""Several runs side by side: what differs between them, what their stages reached, and for how much computation.

    python -m nanochat_jax report --workdir runs/a --against runs/b runs/c

Runs that differ in their seed alone are averaged too: what one run gains over another means little where two seeds
are further apart. figures.json has a flat record of each run, for pandas or a plot of one's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from nanochat_jax.config import MODEL_STAGES, Config
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
LATER = ("devices", "sft.start")
"""What is known of a run once it has finished a stage: devices, and whether sft began from mid or, without, base."""


def write_comparison(workdirs: Sequence[Path], out: Path) -> Path:
    """Writes report.md, report.html, plots/ and figures.json in `out`; returns the path of report.md.

    Raises UserError where a folder holds nothing of a run. One that is named twice counts once.
    """
    folders: dict[str, Path] = {}
    for path in workdirs:
        folders.setdefault(os.path.realpath(path), path)
    runs = {str(path): gather(path) for path in folders.values()}
    options = {name: _options(run) for name, run in runs.items()}
    known = [found for found in options.values() if found]
    names = dict.fromkeys(option for found in known for option in found)
    values = {
        name: {json.dumps(found.get(name)) for found in known if name not in LATER or found[name]} for name in names
    }
    differing = [name for name in names if len(values[name]) > 1]
    lines = [(name, *(_short(found.get(option)) for option in differing)) for name, found in options.items()]
    lines = [("run", *differing), *lines]
    header, *rows = lines if len(differing) <= len(runs) else zip(*lines, strict=True)  # what is longer goes down
    problems = [f"{name}: {problem}" for name, run in runs.items() for problem in run.problems]
    sections = {
        "Missing or damaged": bullets(problem for problem in problems if not problem.endswith("not started")),
        "What differs": table(header, rows) if differing else "Nothing, as far as their config.json says.",
    }
    records = {
        name: {"run": name} | {option: found.get(option) for option in differing} for name, found in options.items()
    }
    for i, stage in enumerate(MODEL_STAGES):
        stages = {name: run.stages[i] for name, run in runs.items() if run.stages[i].done}
        if stages:
            sections[stage] = _results(stages, options, ("seed",) if stage in ("sft", "rl") else ("seed", "sft.start"))
        for name, found in stages.items():
            records[name] |= {f"{stage}.{label}": value for label, value in _figures(found).items()}
    if curves := {name: points for name, run in runs.items() if (points := _curve(run.stages[0]))}:
        plot_runs(curves, out / "plots" / "base.png")
        sections["Curves"] = "![Validation](plots/base.png)"
    # NaN, which a damaged config.json may hold, is no JSON.
    write_json(out / "figures.json", json.loads(json.dumps(list(records.values())), parse_constant=str))
    return write_pages(out, "nanochat-jax: runs compared", f"{len(runs)} runs.", sections)


def _options(run: Run) -> dict[str, Any]:
    """All options of a run by their dotted names, and what else may tell it from another; empty where unknown."""
    config = entries(run.record, "config")
    if not config:
        return {}
    # Fields that are newer than the run have had their default in it.
    options = flatten_dict(dataclasses.asdict(Config()), sep=".") | flatten_dict(config, sep=".")
    done = next((stage.done for stage in run.stages if stage.done), {})
    facts = {"git": run.record.get("git"), "jax": dig(run.record, "versions", "jax")}
    facts["sft.start"] = dig(run.stages[MODEL_STAGES.index("sft")].done, "start", "stage")
    return options | facts | {"devices": f"{done.get('devices')} x {done.get('device')}" if done else None}


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    # Paths differ at their end, and so does a git revision with changes that are in no commit.
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def _results(stages: dict[str, Stage], options: dict[str, dict], alone: tuple[str, ...]) -> str:
    """One line a run, those that differ in these options alone together and their mean below them."""
    found = list(stages.values())
    places = {name: keys for name, keys in measures(found).items() if any(_value(s, keys) is not None for s in found)}
    alike: dict[str, list[str]] = {}
    for run in stages:
        asked = json.dumps(options[run] | dict.fromkeys(alone), sort_keys=True) if options[run] else run
        alike.setdefault(asked, []).append(run)
    rows = []
    for group in alike.values():
        for run in group:
            costs = (show(stages[run].done.get(key), form) for key, form in COSTS.values())
            rows.append((run, *costs, *(figure(measured(stages[run], keys)) for keys in places.values())))
        if len(group) > 1:
            spread = (_spread([_value(stages[run], keys) for run in group]) for keys in places.values())
            rows.append((f"mean of these {len(group)}, ± s.d.", *["-"] * len(COSTS), *spread))
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


def _figures(stage: Stage) -> dict[str, float]:
    costs = {label: number(stage.done.get(key)) for label, (key, _) in COSTS.items()}
    found = costs | {label: _value(stage, keys) for label, keys in measures([stage]).items()}
    return {label: value for label, value in found.items() if value is not None}


def _curve(stage: Stage) -> Series:
    """Bits per byte in validation over the FLOPs spent so far, which only base notes."""
    points = [(record.get("flops"), record.get("bpb")) for record in stage.metrics if record["kind"] == "val"]
    return [(x, y) for x, y in points if (number(x) or 0) > 0 and number(y) is not None]
