"""Runs side by side: what differs, what each stage reached, the mean over seeds, and the record for pandas."""

import dataclasses
import html
import json

import matplotlib.colors
import pytest
from matplotlib.figure import Figure
from test_report import CONFIG, md_rows, write_json, write_stage

from nanochat_jax import cli, plots
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


def test_long_values_keep_both_ends(runs, tmp_path):
    record = json.loads((runs[0] / "config.json").read_text())
    for run, dirty in zip(runs, ("", "-dirty"), strict=False):
        write_json(run / "config.json", record | {"git": "0123456789" * 4 + dirty})
    rows = md_rows(section(write_comparison(runs[:2], tmp_path / "out").read_text(), "What differs"))
    assert [row[1] for row in rows] == ["git", "0123456789" * 4, "012345678901234567...890123456789-dirty"]


def test_more_options_than_runs_go_down(tmp_path):
    runs = [trained(tmp_path / "a", 1.0), trained(tmp_path / "b", 1.0, seed=1, depth=4)]
    config = json.loads((runs[1] / "config.json").read_text())
    config["config"]["base"]["matrix_lr"] = 0.5
    write_json(runs[1] / "config.json", config)
    rows = md_rows(section(write_comparison(runs, tmp_path / "out").read_text(), "What differs"))
    assert rows[0] == ["run", *map(str, runs)]
    assert {row[0]: row[2] for row in rows[1:]} == {"model.depth": "4", "base.matrix_lr": "0.5", "seed": "1"}


def test_runs_of_other_seeds_are_averaged_and_no_others(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "out").read_text()
    header, *rows = md_rows(section(text, "base"))
    column = header.index("bits per byte")
    figures = {row[0]: row[column] for row in rows}
    assert [figures[str(run)] for run in runs] == ["1.0000", "1.5000", "1.2500"]
    assert figures["mean of these 2, ± s.d."] == "1.2500 ± 0.3536"
    assert "mean of" not in section(text, "sft")  # only one of the two got there


def test_sft_after_mid_and_after_base_are_not_averaged(tmp_path):
    runs = [trained(tmp_path / name, 1.0, seed=i, stages=("base", "sft")) for i, name in enumerate("abc")]
    for run, start in zip(runs, ("mid", "mid", "base"), strict=True):
        done = json.loads((run / "sft" / "done.json").read_text())
        write_json(run / "sft" / "done.json", done | {"start": {"stage": start, "step": 9, "finished": "then"}})
    text = write_comparison([*runs, trained(tmp_path / "d", 1.0, seed=4)], tmp_path / "out").read_text()
    header, *rows = md_rows(section(text, "What differs"))
    assert [row[header.index("sft.start")] for row in rows] == ["mid", "mid", "base", "-"]
    early = write_comparison([runs[0], tmp_path / "d"], tmp_path / "out").read_text()
    assert "sft.start" not in section(early, "What differs")  # it may come to be the same
    assert "mean of these 4" in section(text, "base") and "mean of these 2" in section(text, "sft")


def test_each_mean_is_below_its_runs(tmp_path):
    runs = [trained(tmp_path / f"{d}-{s}", d + s / 4, depth=d, seed=s) for s in (1, 3) for d in (2, 4)]
    rows = md_rows(section(write_comparison(runs, tmp_path / "out").read_text(), "base"))[1:]
    mean = "mean of these 2, ± s.d."
    assert [row[0].split("/")[-1] for row in rows] == ["2-1", "2-3", mean, "4-1", "4-3", mean]
    assert [row[5] for row in rows if row[0] == mean] == ["2.5000 ± 0.3536", "4.5000 ± 0.3536"]


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
    assert "sft.ARC-Easy" not in first and "base.CORE" not in first  # what was not measured is left out


def test_curves_are_drawn_over_flops(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "out").read_text()
    assert "![Validation](plots/base.png)" in text
    assert (tmp_path / "out" / "plots" / "base.png").read_bytes().startswith(b"\x89PNG")
    for run in runs:
        (run / "base" / "metrics.jsonl").write_text(json.dumps({"kind": "val", "step": 1, "bpb": 1.0}) + "\n")
    assert "![Validation](plots/base.png)" not in write_comparison(runs, tmp_path / "older").read_text()
    only = [{"kind": "val", "step": 1, "bpb": 1.0, "flops": flops} for flops in (-1e12, 0, "1e12", None)]
    (runs[0] / "base" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in only))
    assert "![Validation](plots/base.png)" not in write_comparison(runs, tmp_path / "odd").read_text()


def test_a_run_that_goes_on_is_drawn_and_differs_in_nothing_by_that(runs, tmp_path):
    (runs[1] / "base" / "done.json").unlink()
    (runs[0] / "base" / "metrics.jsonl").unlink()
    text = write_comparison(runs[:2], tmp_path / "out").read_text()
    assert f"{runs[1]}: base: not finished, last logged step 100" in text
    assert md_rows(section(text, "What differs"))[0] == ["run", "seed"]
    assert "![Validation](plots/base.png)" in text
    assert [row[0] for row in md_rows(section(text, "base"))] == ["run", str(runs[0])]


def test_many_runs_have_a_color_each_and_a_legend_beside_the_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    lines = {f"runs/laws/2.15e18-d{i}": [(1e9, 1.0), (1e10, 0.9)] for i in range(30)}
    plots.plot_runs(lines, tmp_path / "many.png")
    (figure,) = drawn
    (axis,), (legend,) = figure.axes, figure.legends
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in axis.lines}) == 30
    assert axis.get_window_extent().height > 300 and legend.get_window_extent().y1 < axis.get_window_extent().y0


@pytest.mark.filterwarnings("error::UserWarning")
def test_names_are_no_markup(tmp_path):
    runs = [trained(tmp_path / name, 1.0) for name in ("a | *b* [x](y) <i>", r"$\frac$", "c")]
    page = write_comparison(runs, tmp_path / "out").with_suffix(".html").read_text()
    assert all(f"<td>{html.escape(str(run))}</td>" in page for run in runs)
    plots.plot_runs({"_hidden": [(1.0, 1.0)]}, tmp_path / "hidden.png")


def test_equal_and_damaged_runs(tmp_path):
    runs = [trained(tmp_path / name, 1.0) for name in "ab"]
    assert "Nothing, as far as their config.json says" in write_comparison(runs, tmp_path / "out").read_text()
    (runs[1] / "base" / "eval.json").write_text("[1")
    (runs[1] / "config.json").write_text('"nothing"')
    text = write_comparison(runs, tmp_path / "out").read_text()
    assert "config.json: damaged" in text
    assert [row[0] for row in md_rows(section(text, "base"))] == ["run", *map(str, runs)]


def test_what_a_missing_config_said_is_unknown(runs, tmp_path):
    runs += [trained(tmp_path / name, 1.0) for name in "de"]
    for run in runs[3:]:
        (run / "config.json").unlink()
    text = write_comparison(runs, tmp_path / "out").read_text()
    header, *rows = md_rows(section(text, "What differs"))
    assert header == ["run", "model.depth", "seed"] and rows[-1] == [str(runs[-1]), "-", "-"]
    assert text.count("mean of these 2") == 1 and f"{runs[-1]}: config.json: missing" in text


def test_options_newer_than_a_run_had_their_default(runs, tmp_path):
    record = json.loads((runs[1] / "config.json").read_text())
    del record["config"]["model"]["smear"], record["config"]["rl"]
    write_json(runs[1] / "config.json", record)
    text = write_comparison(runs[:2], tmp_path / "out").read_text()
    assert md_rows(section(text, "What differs"))[0] == ["run", "seed"] and "mean of these 2" in text


def test_figures_json_is_json_whatever_a_config_holds(runs, tmp_path):
    record = json.loads((runs[1] / "config.json").read_text())
    record["config"]["base"]["matrix_lr"] = float("nan")
    write_json(runs[1] / "config.json", record)
    write_comparison(runs, tmp_path / "out")
    text = (tmp_path / "out" / "figures.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)[1]["base.matrix_lr"] == "NaN"


def test_a_run_named_twice_counts_once_and_a_folder_that_is_none_is_refused(runs, tmp_path):
    again = [runs[0], runs[1], runs[0] / ".." / "a"]
    write_comparison(again, tmp_path / "out")
    names = [record["run"] for record in json.loads((tmp_path / "out" / "figures.json").read_text())]
    assert names == [str(runs[0]), str(runs[1])]
    (tmp_path / "loop").symlink_to("loop")
    for none in (tmp_path, tmp_path / "loop"):
        with pytest.raises(UserError, match="is not the folder of a run"):
            write_comparison([runs[0], none], tmp_path / "out")


def test_the_command_writes_both(runs, capsys):
    assert cli.main(["report", "--workdir", str(runs[0]), "--against", *map(str, runs[1:])]) == 0
    assert capsys.readouterr().out.split() == [f"{runs[0]}/report.md", f"{runs[0]}/comparison/report.md"]
    assert all(str(run) in (runs[0] / "comparison" / "report.html").read_text() for run in runs)
