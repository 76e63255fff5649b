"""`report.md` and `report.html` of a run, from the files its stages left, complete or not.

    python -m nanochat_jax report --workdir runs/tiny_cpu

`report_records.py` reads, `report_content.py` says what the report holds, `report_render.py` and `plots.py` show it.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanochat_jax.plots import reward_plot, training_plot
from nanochat_jax.report_content import contents
from nanochat_jax.report_records import read_run
from nanochat_jax.report_render import Picture, to_html, to_markdown


def write_report(workdir: Path) -> Path:
    """Writes report.md, report.html and plots/ in the run's folder; returns the path of report.md.

    Raises UserError where the folder holds nothing of a run.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    for stage in run.stages.values():
        path = workdir / "plots" / f"{stage.name}.png"
        draw = reward_plot if stage.name == "rl" else training_plot
        if draw(stage.metrics, stage.name, path):
            stage.picture = Picture(path, f"Curves of {stage.name}")
    blocks = contents(run)
    _replace(workdir / "report.html", to_html(blocks, f"nanochat-jax: {run.name}"))
    return _replace(workdir / "report.md", to_markdown(blocks, workdir))


def _replace(path: Path, text: str) -> Path:
    """Writes the file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
    return path
