"""Runs side by side: what differs, what each stage reached, the mean over seeds, and the record for pandas."""

import dataclasses
import json

import pytest
from test_report import CONFIG, md_rows, write_json, write_stage

from nanochat_jax import cli
from nanochat_jax.compare import write_comparison
from nanochat_jax.errors import UserError


def trained(root, bpb, *, seed=42, depth=2, stages=("base",), flops=4e12):
    config = dataclasses.replace(CONFIG, seed=seed, model=dataclasses.replace(CONFIG.model, depth=depth))
    write_json(root / "config.json", {"config": dataclasses.asdict(config), "versions": {"jax": "1"}, "git": "abc"})
    val = [{"kind": "val", "step": s, "bpb": bpb + 1 / s, "flops": flops * s / 100} for s in (50, 100)]
    for stage in stages:
        tasks = {"arc_easy": {"accuracy": bpb / 4, "n": 100, "interval": [0.25, 0.5]}} if stage == "sft" else {}
        write_stage(root, stage, val, {"bpb": {"val": bpb}, "tasks": tasks}, flops=flops)
    return root


@pytest.fixture
def runs(tmp_path):
    return [
        trained(tmp_path / "a", 1.0),
        trained(tmp_path / "b", 1.5, seed=1, stages=("base", "sft")),
        trained(tmp_path / "c", 1.25, depth=4, flops=8e12),
    ]


def section(text, name):
    return text.split(f"## {name}\n", 1)[1].split("\n## ", 1)[0]


def test_only_what_differs_is_shown(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "out").read_text()
    header, *rows = md_rows(section(text, "What differs"))
    assert header == ["run", "model.depth", "seed"]
    assert [row[1:] for row in rows] == [["2", "42"], ["2", "1"], ["4", "42"]]


def test_runs_of_other_seeds_are_averaged_and_no_others(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "out").read_text()
    header, *rows = md_rows(section(text, "base"))
    column = header.index("bits per byte")
    figures = {row[0]: row[column] for row in rows}
    assert [figures[str(run)] for run in runs] == ["1.0000", "1.5000", "1.2500"]
    (mean,) = (figure for name, figure in figures.items() if name.startswith("mean of 2 seeds"))
    assert mean == "1.2500 ± 0.3536"
    assert "mean of" not in section(text, "sft")  # only one of the two got there


def test_stages_show_the_runs_that_finished_them_with_intervals(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "out").read_text()
    header, row = md_rows(section(text, "sft"))
    assert dict(zip(header, row, strict=True))["ARC-Easy"] == "0.3750 [0.250, 0.500]"
    assert "## mid" not in text and "not started" not in text


def test_figures_are_flat_records(runs, tmp_path):
    write_comparison(runs, tmp_path / "out")
    first, second, third = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (third["run"], third["model.depth"], third["base.FLOPs"]) == (str(runs[2]), 4, 8e12)
    assert (first["base.bits per byte"], second["sft.ARC-Easy"]) == (1.0, 0.375)
    assert "sft.ARC-Easy" not in first


def test_curves_are_drawn_over_flops(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "out").read_text()
    assert "![Validation](plots/base.png)" in text
    assert (tmp_path / "out" / "plots" / "base.png").read_bytes().startswith(b"\x89PNG")
    for run in runs:
        (run / "base" / "metrics.jsonl").write_text(json.dumps({"kind": "val", "step": 1, "bpb": 1.0}) + "\n")
    assert "![Validation](plots/base.png)" not in write_comparison(runs, tmp_path / "older").read_text()


def test_equal_and_damaged_runs(tmp_path):
    runs = [trained(tmp_path / name, 1.0) for name in "ab"]
    assert "these runs were asked the same" in write_comparison(runs, tmp_path / "out").read_text()
    (runs[1] / "base" / "eval.json").write_text("[1")
    (runs[1] / "config.json").write_text('"nothing"')
    text = write_comparison(runs, tmp_path / "out").read_text()
    assert "config.json: damaged" in text
    assert [row[0] for row in md_rows(section(text, "base"))] == ["run", *map(str, runs)]


def test_a_run_named_twice_counts_once_and_a_folder_that_is_none_is_refused(runs, tmp_path):
    again = [runs[0], runs[1], runs[0] / ".." / "a"]
    write_comparison(again, tmp_path / "out")
    names = [record["run"] for record in json.loads((tmp_path / "out" / "figures.json").read_text())]
    assert names == [str(runs[0]), str(runs[1])]
    with pytest.raises(UserError, match="is not the folder of a run"):
        write_comparison([runs[0], tmp_path], tmp_path / "out")


def test_the_command_writes_both(runs, capsys):
    assert cli.main(["report", "--workdir", str(runs[0]), "--against", *map(str, runs[1:])]) == 0
    assert capsys.readouterr().out.split() == [f"{runs[0]}/report.md", f"{runs[0]}/comparison/report.md"]
    assert all(str(run) in (runs[0] / "comparison" / "report.html").read_text() for run in runs)
