"""What a run's stages left behind, read for the report: damaged and missing parts are said, never fatal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax.config import MODEL_STAGES
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.report_render import Picture


@dataclass
class StageRecord:
    """What one stage left behind; empty where a file is missing or damaged."""

    name: str
    done: dict = field(default_factory=dict)
    eval: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    samples: str = ""
    picture: Picture | None = None

    @property
    def begun(self) -> bool:
        return bool(self.done or self.metrics)


@dataclass
class RunRecord:
    """What a run left behind, and a sentence for each part that is missing or damaged."""

    name: str
    record: dict
    tokenizer_done: dict
    tokenizer_eval: dict
    stages: dict[str, StageRecord]
    control: StageRecord | None
    problems: list[str]


def read_run(workdir: Path) -> RunRecord:
    """Everything the report needs. Raises UserError where the folder holds nothing of a run."""
    there = [name for name in ("config.json", "tokenizer", *MODEL_STAGES) if (workdir / name).exists()]
    if not there:
        raise UserError(f"{workdir} is not the folder of a run: there is no config.json and no stage in it")
    problems: list[str] = []
    record = _read_json(workdir / "config.json", workdir, problems, needed=True)
    tokenizer_done = _read_json(workdir / "tokenizer" / "done.json", workdir, problems)
    tokenizer_eval = _read_json(workdir / "tokenizer" / "eval.json", workdir, problems, needed=True)
    stages = {name: _read_stage(workdir, name, problems) for name in MODEL_STAGES}
    control = _read_stage(workdir, "sft_continued", problems) if (workdir / "sft_continued").is_dir() else None
    name = workdir.resolve().name
    return RunRecord(name, record, tokenizer_done, tokenizer_eval, stages, control, problems)


def _read_stage(workdir: Path, name: str, problems: list[str]) -> StageRecord:
    folder = workdir / name
    if not folder.is_dir():
        problems.append(f"{name}: not started")
        return StageRecord(name)
    stage = StageRecord(name, done=_read_json(folder / "done.json", workdir, problems))
    try:
        stage.metrics = [record for record in MetricsLog.read(folder / "metrics.jsonl") if isinstance(record, dict)]
    except (UserError, OSError) as error:
        problems.append(f"{name}/metrics.jsonl: {_reason(error)}")
    if not (folder / "done.json").exists():
        steps = [record["step"] for record in stage.metrics if isinstance(record.get("step"), int)]
        problems.append(f"{name}: not finished{f', last logged step {max(steps)}' if steps else ''}")
    # The control is measured in rl's eval.json, beside what it is compared with.
    stage.eval = _read_json(folder / "eval.json", workdir, problems, needed=bool(stage.done) and name in MODEL_STAGES)
    try:
        stage.samples = (folder / "samples.md").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if stage.done:
            problems.append(f"{name}/samples.md: {_reason(error)}")
    return stage


def _read_json(path: Path, workdir: Path, problems: list[str], needed: bool = False) -> dict:
    """The object in `path`; {} and a sentence in `problems` where it is damaged, or missing though `needed`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except FileNotFoundError:
        if needed:
            problems.append(f"{path.relative_to(workdir)}: missing")
    except (ValueError, OSError) as error:
        problems.append(f"{path.relative_to(workdir)}: damaged or unreadable ({_reason(error)})")
    return {}


def _reason(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)
