"""What a report says: results by stage, what they cost, curves, samples, and all that is needed to do it again."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator
from typing import Any

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import duration, gib, si
from nanochat_jax.model import count_params, flops_per_token, scaling_params
from nanochat_jax.report_records import RunRecord, StageRecord
from nanochat_jax.report_render import Block, Bullets, Code, Heading, Paragraph, Table
from nanochat_jax.run import config_from_dict

TASK_NAMES = {
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "mmlu": "MMLU",
}
# karpathy/nanochat's $100 run of October 2025, 8xH100 for 3h51m, and its best CORE since; base, mid, sft, rl.
REFERENCE = (
    ("CORE", "0.2219", "-", "-", "-"),
    ("ARC-Challenge", "-", "0.2875", "0.2807", "-"),
    ("ARC-Easy", "-", "0.3561", "0.3876", "-"),
    ("GSM8K", "-", "0.0250", "0.0455", "0.0758"),
    ("HumanEval", "-", "0.0671", "0.0854", "-"),
    ("MMLU", "-", "0.3111", "0.3151", "-"),
    ("ChatCORE", "-", "0.0730", "0.0884", "-"),
)
STAGE_HEADER = ("BASE", "MID", "SFT", "RL")


def contents(run: RunRecord) -> list[Block]:
    """The blocks of the report."""
    blocks: list[Block] = [Heading(f"nanochat-jax: {run.name}", 1), Paragraph(_summary(run))]
    if run.problems:
        blocks += [Heading("Missing or damaged"), Bullets(run.problems)]
    blocks += _results(run)
    blocks += _comparison(run.stages["rl"].eval.get("comparison"))
    blocks += [Heading("Stages"), _stage_table(run)]
    pictures = [stage.picture for stage in run.stages.values() if stage.picture]
    blocks += [Heading("Curves"), *pictures] if pictures else []
    blocks += _model(run)
    blocks += _tokenizer(run)
    blocks += _core(run)
    samples = [stage for stage in run.stages.values() if stage.samples.strip()]
    if samples:
        blocks.append(Heading("Samples"))
        for stage in samples:
            blocks += [Heading(stage.name, 3), Code(stage.samples)]
    blocks += _environment(run)
    if "config" in run.record:
        blocks += [Heading("Configuration"), Code(json.dumps(run.record["config"], indent=1), "every value of the run")]
    return blocks


def _summary(run: RunRecord) -> str:
    done = [stage for stage in run.stages.values() if stage.done]
    if not done:
        return "No training stage of this run is finished."
    last = done[-1].done
    seconds = sum(number(stage.done.get("seconds")) or 0 for stage in done)
    facts = [
        f"{si(number(last.get('params')) or 0)} parameters",
        f"{', '.join(stage.name for stage in done)} finished in {duration(seconds)} of training",
        f"{last.get('devices', '?')} x {last.get('device', 'unknown device')}",
    ]
    bpb = number(dig(run.stages["base"].eval, "bpb", "val"))
    return ", ".join(facts) + (f"; base model {bpb:.4f} bits per byte on validation text." if bpb is not None else ".")


def _results(run: RunRecord) -> list[Block]:
    evals = {name: stage.eval for name, stage in run.stages.items()}
    rows = [("CORE", *(_figure(dig(e, "core", "core_metric")) for e in evals.values()), "-")]
    rows += [_task_row(label, name, evals) for name, label in TASK_NAMES.items()]
    rows.append(("ChatCORE", *(_figure(e.get("chatcore")) for e in evals.values()), "-"))
    for text in sorted({text for e in evals.values() for text in mapping(e.get("bpb"))}) or ["val"]:
        rows.append((f"bits per byte, {text}", *(_figure(dig(e, "bpb", text)) for e in evals.values()), "-"))
    others = {name: None for e in evals.values() for name in mapping(e.get("tasks")) if name not in TASK_NAMES}
    rows += [_task_row(name.replace("_", " "), name, evals) for name in others]
    return [
        Heading("Results"),
        Table(("metric", *STAGE_HEADER, "n"), rows),
        Paragraph(
            "Accuracies with their 95% interval in brackets; n: examples. '-': not measured at that stage. "
            "CORE and ChatCORE are mean centred accuracies: 0 is chance, 1 is perfect; fewer bits per byte are better."
        ),
        Heading("For scale: karpathy/nanochat's $100 run", 3),
        Table(("metric", *STAGE_HEADER), REFERENCE),
        Paragraph("8 x H100, 3h51m, October 2025. Its best since: CORE 0.2626 after 1.65 h on the same machine."),
    ]


def _task_row(label: str, name: str, evals: dict[str, dict]) -> tuple[str, ...]:
    results = [mapping(dig(e, "tasks", name)) for e in evals.values()]
    counts = list(dict.fromkeys(f"{int(n):,}" for r in results if (n := number(r.get("n"))) is not None))
    return label, *(_figure(r.get("accuracy"), r.get("interval")) for r in results), " / ".join(counts) or "-"


def _comparison(found: Any) -> list[Block]:
    """Did reinforcement learning pay? sft, rl, and sft continued for rl's compute, on the same questions."""
    found = mapping(found)
    if not found:
        return []
    rows = []
    for name, label in (("sft", "sft"), ("rl", "rl"), ("sft_continued", "sft continued")):
        difference = found.get(f"{name}_minus_sft")
        seconds = number(dig(found, "seconds", name)) if name != "sft" else None
        flops = number(found.get(f"{name}_flops"))
        rows.append(
            (
                label,
                _figure(found.get(name)),
                _difference(difference),
                f"{flops:.3g}" if flops is not None else "-",
                duration(seconds) if seconds is not None else "-",
            )
        )
    n = number(found.get("n"))
    verdicts = [
        f"{label} minus {other} is {_difference(found.get(key))}: the interval {_side(found.get(key))}."
        for key, label, other in (
            ("rl_minus_sft", "rl", "sft"),
            ("sft_continued_minus_sft", "sft continued", "sft"),
            ("rl_minus_sft_continued", "rl", "sft continued"),
        )
        if _triple(found.get(key))
    ]
    return [
        Heading(f"Reinforcement learning against more fine-tuning: {found.get('task', 'unknown task')}"),
        Table(("model", "accuracy", "minus sft", "FLOPs after sft", "time after sft"), rows),
        Paragraph(
            f"{f'{int(n):,}' if n is not None else 'Unknown number of'} questions held out from training, the same for "
            f"all, answered greedily; paired differences with 95% intervals. {' '.join(verdicts)}"
        ),
    ]


def _side(value: Any) -> str:
    _, low, high = _triple(value)
    return "excludes 0, a gain" if low > 0 else "excludes 0, a loss" if high < 0 else "includes 0, no clear difference"


def _stage_table(run: RunRecord) -> Table:
    price = number(dig(run.record, "config", "device_hour_cost")) or 0
    totals = {"tokens": 0.0, "flops": 0.0, "seconds": 0.0, "cost": 0.0}
    rows = []
    tokenizer_seconds = number(run.tokenizer_done.get("seconds"))
    if tokenizer_seconds is not None:
        totals["seconds"] += tokenizer_seconds
        rows.append(("tokenizer", *["-"] * 3, duration(tokenizer_seconds), *["-"] * 4))
    for stage in [*run.stages.values(), *([run.control] if run.control else [])]:
        figures = {name: number(stage.done.get(name)) for name in ("steps", "tokens", "flops", "seconds", "devices")}
        cost = None
        if price and figures["seconds"] is not None:
            cost = price * (figures["devices"] or 1) * figures["seconds"] / 3600
        for name, value in (*figures.items(), ("cost", cost)):
            if name in totals:
                totals[name] += value or 0
        rows.append((stage.name if stage.done else f"{stage.name} (unfinished)", *_stage_cells(stage, figures, cost)))
    total = (si(totals["tokens"]), f"{totals['flops']:.3g}", duration(totals["seconds"]))
    rows.append(("total", "-", *total, *["-"] * 3, f"${totals['cost']:,.2f}" if price else "-"))
    return Table(("stage", "steps", "tokens", "FLOPs", "wall time", "tokens/s", "MFU", "peak memory", "cost"), rows)


def _stage_cells(stage: StageRecord, figures: dict[str, float | None], cost: float | None) -> Iterator[str]:
    steps, tokens, flops, seconds = (figures[name] for name in ("steps", "tokens", "flops", "seconds"))
    yield f"{int(steps):,}" if steps is not None else "-"
    yield si(tokens) if tokens is not None else "-"
    yield f"{flops:.3g}" if flops is not None else "-"
    yield duration(seconds) if seconds is not None else "-"
    for name, show in (("tok_per_sec", si), ("mfu", lambda share: f"{100 * share:.1f}%")):
        values = [v for record in stage.metrics if (v := number(record.get(name))) is not None]
        yield show(statistics.median(values)) if values else "-"
    peak = number(stage.done.get("peak_memory_bytes"))
    yield gib(peak) if peak is not None else "-"
    yield f"${cost:,.2f}" if cost is not None else "-"


def _model(run: RunRecord) -> list[Block]:
    """Sizes that follow from the configuration; nothing where the configuration cannot be read."""
    try:
        config = config_from_dict(run.record["config"], "config.json")
        cfg = GPTConfig.from_depth(config.model, config.tokenizer.vocab_size)
    except (KeyError, TypeError, AttributeError, UserError):
        return []
    counts = count_params(cfg)
    facts = [
        f"{cfg.n_layer} layers of width {cfg.n_embd}",
        f"{cfg.n_head} query heads and {cfg.n_kv_head} key/value heads of width {cfg.head_dim}",
        f"context {cfg.sequence_len} tokens, windows {config.model.window_pattern}, vocabulary {cfg.vocab_size:,}",
        f"{flops_per_token(cfg):,} training FLOPs per token, {scaling_params(cfg):,} scaling parameters",
    ]
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
    return [Heading("Model"), Bullets(facts), Table(("parameters", "number"), rows)]


def _tokenizer(run: RunRecord) -> list[Block]:
    """Bytes per token on several kinds of text, beside other tokenizers; other figures as they are."""
    found = run.tokenizer_eval.items()
    tables = {name: value for name, value in found if value and all(map(mapping, mapping(value).values() or [0]))}
    facts = [f"{name.replace('_', ' ')}: {_value(value)}" for name, value in found if name not in tables]
    blocks: list[Block] = [Heading("Tokenizer")] if tables or facts else []
    blocks += [Bullets(facts)] if facts else []
    for name, table in tables.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        rows = [(kind, *(_value(row.get(column)) for column in columns)) for kind, row in table.items()]
        blocks.append(Table((name.replace("_", " "), *(column.replace("_", " ") for column in columns)), rows))
    return blocks


def _core(run: RunRecord) -> list[Block]:
    """CORE task by task."""
    blocks: list[Block] = []
    for stage in run.stages.values():
        accuracy, centred = (mapping(dig(stage.eval, "core", key)) for key in ("results", "centered_results"))
        if accuracy:
            rows = [(task, _figure(value), _figure(centred.get(task))) for task, value in accuracy.items()]
            blocks += [Heading(f"CORE tasks, {stage.name}"), Table(("task", "accuracy", "centred"), rows)]
    return blocks


def _environment(run: RunRecord) -> list[Block]:
    devices = dict.fromkeys(f"{s.done.get('devices')} x {s.done.get('device')}" for s in run.stages.values() if s.done)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = [f"devices: {', '.join(devices)}"] if devices else []
    facts.append(f"this machine: {platform.platform()}, {os.cpu_count()} CPU cores, {gib(memory)} memory")
    for key in ("started", "git", "mesh"):
        if run.record.get(key):
            facts.append(f"{key}: {run.record[key]}")
    if isinstance(run.record.get("command"), list):
        facts.append("command: " + " ".join(map(str, run.record["command"])))
    versions = mapping(run.record.get("versions"))
    if versions:
        facts.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    files = mapping(run.record.get("data"))
    if files:
        sizes = sum(number(size) or 0 for size in files.values())
        facts.append(f"data: {len(files)} files, {gib(sizes)}, {min(files)} to {max(files)}")
    return [Heading("Hardware and software"), Bullets(facts)]


def _figure(value: Any, interval: Any = None) -> str:
    """'0.3561 [0.337, 0.376]', or '-' where there is no number."""
    if isinstance(value, dict):
        value, interval = value.get("accuracy"), value.get("interval")
    value = number(value)
    if value is None:
        return "-"
    bounds = [number(bound) for bound in interval] if isinstance(interval, list) else []
    return f"{value:.4f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if len(bounds) == 2 and None not in bounds else "")


def _difference(value: Any) -> str:
    triple = _triple(value)
    return "{:+.4f} [{:+.3f}, {:+.3f}]".format(*triple) if triple else "-"


def _triple(value: Any) -> list[float] | None:
    numbers = [number(item) for item in value] if isinstance(value, list) else []
    return numbers if len(numbers) == 3 and None not in numbers else None


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def number(value: Any) -> float | None:
    """The value where it is a number, which a damaged or foreign file may not hold."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def mapping(value: Any) -> dict:
    """The value where it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def dig(value: Any, *keys: str) -> Any:
    """value[key][key]..., None where that leads nowhere."""
    for key in keys:
        value = mapping(value).get(key)
    return value
