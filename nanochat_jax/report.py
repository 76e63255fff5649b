"""`report.md` and `report.html` of a run, from the files its stages left, complete or not.

    python -m nanochat_jax report --workdir runs/tiny_cpu

Results by stage, what they cost, curves, samples, and all that is needed to do it again. What is missing or damaged is
said, never fatal. `report_page.py` and `plots.py` show what is gathered here.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.config import MODEL_STAGES, GPTConfig
from nanochat_jax.data.files import read_json
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import MetricsLog, duration, gib, si
from nanochat_jax.model import count_params, flops_per_token, scaling_params
from nanochat_jax.plots import plot
from nanochat_jax.report_page import bullets, code, plain, table, to_html
from nanochat_jax.run import config_from_dict, outdated

# Row of the results -> where its figure is in eval.json, and what karpathy/nanochat's $100 run of October 2025 reached
# after base, mid, sft and rl.
METRICS = {
    "CORE": (("core",), "0.2219 - - -"),
    "ARC-Challenge": (("tasks", "arc_challenge"), "- 0.2875 0.2807 -"),
    "ARC-Easy": (("tasks", "arc_easy"), "- 0.3561 0.3876 -"),
    "GSM8K": (("tasks", "gsm8k"), "- 0.0250 0.0455 0.0758"),
    "HumanEval": (("tasks", "humaneval"), "- 0.0671 0.0854 -"),
    "MMLU": (("tasks", "mmlu"), "- 0.3111 0.3151 -"),
    "ChatCORE": (("chatcore",), "- 0.0730 0.0884 -"),
}
HEADER = ("metric", *map(str.upper, MODEL_STAGES))


@dataclass(frozen=True)
class Stage:
    """What one stage left behind; empty where a file is missing or damaged."""

    name: str
    done: dict
    eval: dict
    metrics: list[dict]
    samples: str


@dataclass(frozen=True)
class Run:
    """What a run left behind, and what of it is missing or damaged."""

    record: dict
    tokenizer: dict
    stages: list[Stage]
    others: list[Stage]
    """The tokenizer, and sft continued, where that was done."""
    problems: list[str]


def gather(workdir: Path) -> Run:
    """Reads the folder of a run, complete or not. Raises UserError where it holds nothing of one."""
    if not any((workdir / name).exists() for name in ("config.json", "tokenizer", *MODEL_STAGES)):
        raise UserError(f"{workdir} is not the folder of a run: there is no config.json and no stage in it")
    problems: list[str] = []

    def read(name: str, empty: Any, parse: Callable[[Path], Any] = read_json, needed: bool = True) -> Any:
        """What is in a file; `empty` and a sentence in `problems` where it is damaged, or missing though `needed`."""
        try:
            value = parse(workdir / name)
            if isinstance(value, type(empty)):
                return value
            problems.append(f"{name}: damaged, it holds a {type(value).__name__}")
        except FileNotFoundError:
            if needed:
                problems.append(f"{name}: missing")
        except (ValueError, OSError, UserError) as error:
            problems.append(f"{name}: damaged or unreadable ({error})")
        return empty

    def read_stage(name: str) -> Stage:
        done = read(f"{name}/done.json", {}, needed=False)
        trained = bool(done) and "converted_from" not in done
        metrics = read(f"{name}/metrics.jsonl", [], MetricsLog.read, needed=trained)
        if not done:
            steps = [record["step"] for record in metrics if "step" in record]
            problems.append(f"{name}: not finished, last logged step {max(steps)}" if steps else f"{name}: not started")
        if line := outdated(workdir, done):
            problems.append(f"{name}: {line}")
        # sft continued is measured in rl's eval.json, beside what it is compared with.
        wanted = bool(done) and name in MODEL_STAGES
        evaluation = read(f"{name}/eval.json", {}, needed=wanted)
        last = done.get("steps")
        if wanted and (step := evaluation.get("step", last)) != last:
            problems.append(f"{name}/eval.json: of step {step}, the stage ended at {last}")
        samples = read(f"{name}/samples.md", "", lambda path: path.read_text(encoding="utf-8"), needed=trained)
        return Stage(name, done, evaluation, metrics, samples)

    record = read("config.json", {})
    first = Stage("tokenizer", read("tokenizer/done.json", {}, needed=False), {}, [], "")
    tokenizer = read("tokenizer/eval.json", {}, needed="converted_from" not in first.done)
    stages = [read_stage(name) for name in MODEL_STAGES]
    control = [read_stage("sft_continued")] if (workdir / "sft_continued").is_dir() else []
    return Run(record, tokenizer, stages, [first, *control], problems)


def write_report(workdir: Path, price: float = 0) -> Path:
    """Writes report.md, report.html and plots/ in the run's folder; returns the path of report.md.

    `price`: dollars of a device for an hour; 0: as the run was told. Raises UserError where the folder holds nothing of
    a run.
    """
    run = gather(workdir)
    record, stages, (tokenizer_stage, *control) = run.record, run.stages, run.others
    price = price or number(dig(record, "config", "device_hour_cost")) or 0
    pictures = {stage.name: f"plots/{stage.name}.png" for stage in stages}
    drawn = [
        pictures[stage.name] for stage in stages if plot(stage.metrics, stage.name, workdir / pictures[stage.name])
    ]
    title = f"nanochat-jax: {workdir.resolve().name}"
    sections = {
        "Missing or damaged": bullets(run.problems),
        "Results": _results(stages),
        "Reinforcement learning against more fine-tuning": _comparison(stages[-1]),
        "Stages": _costs([tokenizer_stage, *stages, *control], price),
        "Curves": "\n\n".join(f"![Curves]({name})" for name in drawn),
        "Model": _model(record),
        "Tokenizer": _tokenizer(run.tokenizer),
        "CORE tasks": "\n\n".join(_core(stage) for stage in stages if entries(stage.eval, "core")),
        "Samples": "\n\n".join(f"### {stage.name}\n\n{code(stage.samples)}" for stage in stages if stage.samples),
        "Hardware and software": _environment(record, stages),
        "Configuration": code(json.dumps(record["config"], indent=1)) if "config" in record else "",
    }
    return write_pages(workdir, title, _summary(stages), sections)


def write_pages(folder: Path, title: str, summary: str, sections: dict[str, str]) -> Path:
    """Writes report.md and report.html, those sections that have a text; returns the path of report.md."""
    parts = [f"# {plain(title)}", plain(summary)]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    markdown = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "report.html").write_text(to_html(markdown, folder, title), encoding="utf-8")
    return folder / "report.md"


def _summary(stages: list[Stage]) -> str:
    done = [stage for stage in stages if stage.done]
    if not done:
        return "No training stage of this run is finished."
    last = done[-1].done
    seconds = sum(number(stage.done.get("seconds")) or 0 for stage in done)
    return (
        f"{show(last.get('params'), si)} parameters; {', '.join(stage.name for stage in done)} finished in "
        f"{duration(seconds)} of training on {last.get('devices', '?')} x "
        f"{last.get('device', 'unknown device')}."
    )


def measures(stages: list[Stage]) -> dict[str, tuple[str, ...]]:
    """What is measured in any of these -> where it is in eval.json: METRICS, bits per byte, then other tasks."""
    places = {label: keys for label, (keys, _) in METRICS.items()}
    places |= {"bits per byte": ("bpb", "val"), "bits per byte, training": ("bpb", "train")}
    tasks = {name: ("tasks", name) for stage in stages for name in entries(stage.eval, "tasks")}
    return places | {name.replace("_", " "): keys for name, keys in tasks.items() if keys not in places.values()}


def _results(stages: list[Stage]) -> str:
    rows = []
    for label, keys in measures(stages).items():
        found = [measured(stage, keys) for stage in stages]
        counts = dict.fromkeys(show(dig(value, "n"), "{:,}") for value in found if dig(value, "n"))
        rows.append((label, *map(figure, found), " / ".join(counts) or "-"))
    drawn: dict[str, list[str]] = {}
    for stage in stages:
        if how := entries(stage.eval, "tasks") and entries(stage.eval, "drawn"):
            drawn.setdefault(", ".join(f"{name} {value}" for name, value in how.items()), []).append(stage.name)
    return "\n\n".join(
        [
            table((*HEADER, "n"), rows),
            "Accuracies with their 95% interval in brackets; n: examples. '-': not measured at that stage. CORE and "
            "ChatCORE are mean centred accuracies: 0 is chance, 1 is perfect; fewer bits per byte are better.",
            *(
                f"Written answers of {', '.join(names)} are drawn, not greedy, and one right answer to a question is "
                f"enough: {plain(how)}."
                for how, names in drawn.items()
            ),
            "### For scale: karpathy/nanochat's $100 run",
            table(HEADER, [(label, *reference.split()) for label, (_, reference) in METRICS.items()]),
            "8 x H100, 3h51m, October 2025. Its best since: CORE 0.2626 after 1.65 h on the same machine.",
        ]
    )


def _comparison(rl: Stage) -> str:
    """Did reinforcement learning pay? sft, rl, and sft continued for rl's compute, on the same questions."""
    found, begun = entries(rl.eval, "comparison"), entries(rl.done, "start")
    if not found:
        return ""
    rows = [
        (
            name.replace("_", " "),
            show(found.get(name), "{:.4f}"),
            _difference(found.get(f"{name}_minus_sft")),
            _difference(found.get(f"{name}_minus_sft_continued")),
            show(found.get(f"{name}_flops"), "{:.3g}"),
            "-" if name == "sft" else show(dig(found, "seconds", name), duration),
        )
        for name in ("sft", "rl", "sft_continued")
    ]
    header = ("model", "accuracy", "minus sft", "minus sft continued", "FLOPs after sft", "time after sft")
    started = (
        f" sft is what rl started from: step {begun.get('step')} of {plain(str(begun.get('stage')))}." if begun else ""
    )
    return (
        f"{show(found.get('n'), '{:,}')} questions of {plain(str(found.get('task')))} held out from training, the same "
        f"for all, answered alike; differences are paired, with 95% intervals.{started}\n\n{table(header, rows)}"
    )


def _costs(stages: list[Stage], price: float) -> str:
    """What each stage took, and all of them; `price`: dollars of a device for an hour."""
    rows = []
    for stage in stages:
        steps, tokens, flops, seconds, memory, devices = (
            number(stage.done.get(name))
            for name in ("steps", "tokens", "flops", "seconds", "peak_memory_bytes", "devices")
        )
        speed, mfu = (_median(stage.metrics, name) for name in ("tok_per_sec", "mfu"))
        cost = price * (devices or 1) * seconds / 3600 if price and seconds else None
        name = stage.name if stage.done else f"{stage.name} (unfinished)"
        rows.append((name, steps, tokens, flops, seconds, speed, mfu, memory, cost))
    _, _, tokens, flops, seconds, *_, cost = (
        sum(value for value in column if number(value) is not None) for column in zip(*rows, strict=True)
    )
    rows.append(("total", None, tokens, flops, seconds, None, None, None, cost or None))
    forms = ("{:,}", si, "{:.3g}", duration, si, "{:.1%}", gib, "${:,.2f}")
    return table(
        ("stage", "steps", "tokens", "FLOPs", "wall time", "tokens/s", "MFU", "peak memory", "cost"),
        [(name, *map(show, values, forms)) for name, *values in rows],
    )


def _median(records: list[dict], name: str) -> float | None:
    values = [record[name] for record in records if number(record.get(name)) is not None]
    return statistics.median(values) if values else None


def _model(record: dict) -> str:
    """Sizes that follow from the configuration; nothing where this version cannot read it."""
    try:
        config = config_from_dict(record["config"], "config.json")
        cfg = GPTConfig.from_depth(config.model, config.tokenizer.vocab_size)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, UserError):
        return ""
    facts = [
        f"{cfg.n_layer} layers of width {cfg.n_embd}",
        f"{cfg.n_head} query heads and {cfg.n_kv_head} key/value heads of width {cfg.head_dim}",
        f"context {cfg.sequence_len} tokens, windows {config.model.window_pattern}, vocabulary {cfg.vocab_size:,}",
        f"{flops_per_token(cfg):,} training FLOPs per token, {scaling_params(cfg):,} scaling parameters",
    ]
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in count_params(cfg).items()]
    return f"{bullets(facts)}\n\n{table(('parameters', 'number'), rows)}"


def _tokenizer(figures: dict) -> str:
    """Bytes per token on several kinds of text, beside other tokenizers."""
    sizes = entries(figures, "vocab_size")
    if not sizes:
        return ""
    header = ("bytes per token", *(f"{name}, {show(size, '{:,}')} tokens" for name, size in sizes.items()))
    found = entries(figures, "bytes_per_token")
    rows = [(kind, *(show(dig(row, name), "{:.2f}") for name in sizes)) for kind, row in found.items()]
    absent = figures.get("not_compared")
    return table(header, rows) + (f"\n\nNot compared with {plain(str(absent))}." if absent else "")


def _core(stage: Stage) -> str:
    keys = ("results", "centered_results", "intervals", "n")
    accuracy, centred, intervals, counts = (entries(stage.eval, "core", key) for key in keys)
    rows = [
        (
            task,
            figure({"accuracy": value, "interval": dig(intervals, task)}),
            figure(centred.get(task)),
            show(dig(counts, task), "{:,}"),
        )
        for task, value in accuracy.items()
    ]
    return table((f"{stage.name}: task", "accuracy", "centred", "n"), rows)


def _environment(record: dict, stages: list[Stage]) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = dict.fromkeys(f"{s.done.get('devices')} x {s.done.get('device')}" for s in stages if s.done)
    files = {name: size for name, size in entries(record, "data").items() if number(size) is not None}
    command = record.get("command")
    facts = {
        "devices": ", ".join(devices),
        "this machine": f"{platform.platform()}, {os.cpu_count()} CPU cores, {gib(memory)} memory",
        "started": record.get("started"),
        "git": record.get("git"),
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "versions": ", ".join(f"{name} {version}" for name, version in entries(record, "versions").items()),
        "data": files and f"{len(files)} files, {gib(sum(files.values()))}, {min(files)} to {max(files)}",
    }
    return bullets(f"{name}: {fact}" for name, fact in facts.items() if fact)


def measured(stage: Stage, keys: tuple[str, ...]) -> Any:
    """A figure of eval.json, those of CORE and ChatCORE in the shape of a task's; None where it was not measured."""
    value = dig(stage.eval, *keys)
    if keys == ("chatcore",):
        return {"accuracy": value, "interval": stage.eval.get("chatcore_interval")}
    if dig(value, "core_metric") is None:
        return value
    counts = [number(count) or 0 for count in entries(value, "n").values()]
    return {"accuracy": value["core_metric"], "interval": value.get("interval"), "n": sum(counts) or None}


def figure(value: Any) -> str:
    """'0.3561 [0.337, 0.376]' of a task's figures, '0.3561' of a number, '-' where there is none."""
    interval = numbers(dig(value, "interval"), 2)
    text = show(dig(value, "accuracy") if isinstance(value, dict) else value, "{:.4f}")
    return text + (" [{:.3f}, {:.3f}]".format(*interval) if interval else "")


def _difference(found: Any) -> str:
    triple = numbers(found, 3)
    return "{:+.4f} [{:+.3f}, {:+.3f}]".format(*triple) if triple else "-"


def show(value: Any, form: str | Callable[[float], str]) -> str:
    """A number as text, '-' where there is none."""
    if number(value) is None:
        return "-"
    return form.format(value) if isinstance(form, str) else form(value)


def number(value: Any) -> int | float | None:
    """`value` where it is a number that can be shown and computed with."""
    # False for NaN as well; what is larger overflows as soon as it is multiplied.
    return value if isinstance(value, int | float) and abs(value) < 1e100 else None


def numbers(value: Any, count: int) -> list | None:
    """`value` where it is a list of `count` numbers."""
    whole = isinstance(value, list) and len(value) == count and all(number(inner) is not None for inner in value)
    return value if whole else None


def entries(value: Any, *keys: str) -> dict:
    """value[key][key]..., empty where there is no dictionary."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def dig(value: Any, *keys: str) -> Any:
    """value[key][key]..., None where that leads nowhere."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
