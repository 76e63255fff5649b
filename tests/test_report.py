"""The report of a whole run, of a partial one and of a damaged one; the same figures in Markdown and HTML."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import matplotlib.colors
import pytest
from matplotlib.figure import Figure

from nanochat_jax import cli, plots, report
from nanochat_jax.config import Config, ModelConfig, TokenizerConfig
from nanochat_jax.errors import UserError
from nanochat_jax.report import write_report
from nanochat_jax.report_page import bullets, code, plain, table, to_html

CONFIG = dataclasses.replace(
    Config(),
    model=ModelConfig(depth=2, head_dim=32, sequence_len=64),
    tokenizer=TokenizerConfig(vocab_size=300),
    device_hour_cost=3.0,
)
COMPARISON = {
    "task": "multistep",
    "n": 1000,
    "sft": 0.5,
    "rl": 0.62,
    "sft_continued": 0.51,
    "rl_minus_sft": [0.12, 0.09, 0.15],
    "sft_continued_minus_sft": [0.01, -0.02, 0.04],
    "rl_flops": 2.0e13,
    "sft_continued_flops": 2.1e13,
    "seconds": {"rl": 90, "sft_continued": 80},
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_stage(root, name, records, figures, **done):
    write_json(root / name / "eval.json", figures)
    (root / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (root / name / "samples.md").write_text(f"# Samples of {name}\n> Hello <b>you</b>\n\n```\n1 | 2\n```\n")
    facts = {"steps": 100, "tokens": 2_000_000, "flops": 4e12, "seconds": 1800.0, "device": "cpu", "devices": 2}
    write_json(root / name / "done.json", {"stage": name, "params": 1_234_567, **facts, **done})


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "tiny_run"
    write_json(
        root / "config.json",
        {
            "config": dataclasses.asdict(CONFIG),
            "versions": {"jax": "0.10.2"},
            "git": "abc123",
            "command": ["run.py", "--x"],
        },
    )
    write_json(root / "tokenizer" / "done.json", {"seconds": 12.0})
    write_json(
        root / "tokenizer" / "eval.json", {"vocab_size": {"ours": 300}, "bytes_per_token": {"news": {"ours": 3.21}}}
    )
    train = [{"kind": "train", "step": i, "loss": 5 - i / 50, "tok_per_sec": 1000.0, "mfu": None} for i in range(100)]
    val = [{"kind": "val", "step": 50, "bpb": 2.0}, {"kind": "val", "step": 100, "bpb": 1.65}]
    core = {"core_metric": 0.2219, "results": {"hellaswag": 0.4}, "centered_results": {"hellaswag": 0.2}}
    core |= {"interval": [0.201, 0.243], "intervals": {"hellaswag": [0.39, 0.41]}, "n": {"hellaswag": 9000, "piqa": 42}}
    write_stage(
        root, "base", train + val, {"bpb": {"val": 1.6543, "train": 1.5}, "core": core, "tasks": {}, "chatcore": None}
    )
    accuracy = {"accuracy": 0.3561, "n": 2376, "interval": [0.337, 0.376]}
    chat = {
        "tasks": {"arc_easy": accuracy, "spelling_bee": accuracy | {"n": 1000}},
        "chatcore": 0.0731,
        "chatcore_interval": [0.05, 0.09],
    }
    write_stage(root, "mid", train, {"bpb": {"val": 1.7}, **chat})
    write_stage(root, "sft", [*train, {"kind": "val", "step": 100, "loss": 1.0}], chat)
    write_json(root / "sft_continued" / "done.json", {"steps": 7, "seconds": 36.0})
    (root / "sft_continued" / "metrics.jsonl").write_text("")
    (root / "sft_continued" / "samples.md").write_text("")
    rl = [{"kind": "rl", "step": i, "reward": i / 100} for i in range(30)]
    rl += [{"kind": "pass_at_k", "step": s, "pass": {"1": 0.2 + s / 100, "8": 0.5}} for s in (0, 30)]
    write_stage(root, "rl", rl, {**chat, "comparison": COMPARISON})
    return root


class Cells(HTMLParser):
    """Table rows, pictures and all text of a page."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.images, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and self.rows[-1] and self.lasttag in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")


def md_rows(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set(row[0]) <= {"-"}]


def row(text, label):
    (found,) = [r for r in md_rows(text)[:20] if r[0] == label]
    return found[1:]


def test_whole_run(run):
    text = write_report(run).read_text()
    assert "Missing or damaged" not in text and (run / "report.md").read_text() == text
    interval = "0.3561 [0.337, 0.376]"
    assert md_rows(text)[0] == ["metric", "BASE", "MID", "SFT", "RL", "n"]
    assert row(text.split("For scale")[0], "CORE") == ["0.2219 [0.201, 0.243]", "-", "-", "-", "9,042"]
    assert row(text.split("For scale")[0], "ARC-Easy") == ["-", interval, interval, interval, "2,376"]
    assert row(text.split("For scale")[0], "MMLU") == ["-"] * 5
    assert row(text.split("For scale")[0], "ChatCORE") == ["-", *["0.0731 [0.050, 0.090]"] * 3, "-"]
    assert row(text, "spelling bee")[-1] == "1,000"
    assert row(text, "bits per byte") == ["1.6543", "1.7000", "-", "-", "-"]
    assert row(text, "bits per byte, training") == ["1.5000", "-", "-", "-", "-"]
    base = next(r for r in md_rows(text) if r[0] == "base")
    assert base == ["base", "100", "2M", "4e+12", "30m00s", "1k", "-", "-", "$3.00"]
    total = next(r for r in md_rows(text) if r[0] == "total")
    assert total[1:5] == ["-", "8M", "1.6e+13", "2h00m"] and total[-1] == "$12.04"
    assert next(r for r in md_rows(text) if r[0] == "sft_continued")[1] == "7"
    for wanted in (
        "0.2219",
        "3h51m",
        "hellaswag | 0.4000 [0.390, 0.410] | 0.2000 | 9,000",
        "jax 0.10.2",
        "abc123",
        "run.py --x",
        "news",
        "3.21",
        "ours, 300 tokens",
        "context 64",
    ):
        assert wanted in text
    rl = next(r for r in md_rows(text.split("against more fine-tuning")[1]) if r[0] == "rl")
    assert rl == ["rl", "0.6200", "+0.1200 [+0.090, +0.150]", "-", "2e+13", "1m30s"]


def test_pictures_are_there_and_embedded(run):
    text = write_report(run).read_text()
    page = Cells((run / "report.html").read_text())
    linked = [run / path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    assert [path.stem for path in linked] == ["base", "mid", "sft", "rl"]
    for path, source in zip(linked, page.images, strict=True):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == data


def test_html_says_the_same_and_escapes(run):
    text = write_report(run).read_text()
    html = (run / "report.html").read_text()
    assert "<b>you</b>" not in html and "&lt;b&gt;you" in html and "http" not in html.split("<body>")[0]
    assert [[cell.replace("\\", "") for cell in r] for r in md_rows(text) if len(r) > 2] == [
        r for r in Cells(html).rows if len(r) > 2
    ]


def test_a_page_holds_no_file_but_its_plots(run, tmp_path):
    (tmp_path / "secret.png").write_text("secret")
    text = "![a](../secret.png)"
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"command": ["x", text]})
    odd = run.rename(tmp_path / "run ![a](b)")
    write_report(odd)
    page = Cells((odd / "report.html").read_text())
    assert len(page.images) == 4 and all(source.startswith("data:image/png") for source in page.images)
    assert text in "".join(page.words) and "run ![a](b)" in "".join(page.words)
    # Nor where a text got through as markup.
    (odd / "plots" / "link.png").symlink_to(tmp_path / "secret.png")
    html = to_html(f"{text} ![a](plots/link.png) ![a](/etc/hostname) ![a](gone.png) ![a](https://x.y/z)", odd, "t")
    assert Cells(html).images == [""] * 5


def test_partial_run_says_what_is_missing(run):
    for stage in ("mid", "rl"):
        for path in (run / stage).iterdir():
            path.unlink()
        (run / stage).rmdir()
    (run / "sft" / "done.json").unlink()
    (run / "sft" / "eval.json").unlink()
    (run / "base" / "samples.md").unlink()
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    text = write_report(run).read_text()
    missing = text.split("## Missing or damaged")[1].split("##")[0]
    assert "- mid: not started" in missing and "- rl: not started" in missing
    assert "- sft: not finished, last logged step 100" in missing and "- base/samples.md: missing" in missing
    assert any(r[0] == "sft (unfinished)" for r in md_rows(text)) and (run / "plots" / "sft.png").exists()
    assert "Reinforcement learning against" not in text


def test_damaged_files_are_named_and_the_rest_is_shown(run):
    (run / "config.json").write_text('{"config": {"model"')
    (run / "base" / "eval.json").write_text("[1, 2]")
    (run / "mid" / "done.json").write_text("\x00\x01")
    (run / "tokenizer" / "eval.json").unlink()
    (run / "sft" / "metrics.jsonl").write_text('{"kind": "train", "step": 0, "loss": 3}\nxx\n{"kind": "train"}\n')
    write_json(run / "rl" / "eval.json", {"bpb": 3, "comparison": {"n": None}})
    text = write_report(run).read_text()
    missing = text.split("## Missing or damaged")[1].split("##")[0]
    for name in ("config.json", "base/eval.json", "mid/done.json", "sft/metrics.jsonl", "tokenizer/eval.json"):
        assert f"- {name}: " in missing, name
    assert "line 2" in missing
    assert row(text.split("For scale")[0], "ARC-Easy")[2].startswith("0.3561")


ODD = (None, 5, "x", [], [1], ["x", 2], {}, {"val": "x"}, {"n": [1]}, float("nan"), 10**400)


def variants(value):
    """`value` with each of its parts, one at a time, replaced by something else."""
    yield from ODD
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from (value | {key: odd} for odd in variants(inner))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer/eval.json", "base/done.json", "base/eval.json", "mid/eval.json", "rl/eval.json"]
)
def test_no_shape_of_a_file_ends_the_report(run, monkeypatch, name):
    monkeypatch.setattr(report, "plot", lambda *_: False)
    monkeypatch.setattr(report, "to_html", lambda *_: "")
    whole = json.loads((run / name).read_text())
    if name == "config.json":
        whole["config"] = {"model": {"depth": 2, "head_dim": 32}, "device_hour_cost": 3.0}
    for value in variants(whole):
        write_json(run / name, value)
        assert "0.3561 [0.337, 0.376]" in write_report(run).read_text()


def test_records_without_what_is_drawn_are_left_out(run):
    lines = ['{"kind": "train", "loss": 3}', '{"kind": "pass_at_k", "step": 1}', '{"kind": "train", "tok_per_sec": []}']
    lines += ['{"kind": "pass_at_k", "step": 1, "pass": {"1": "x"}}']
    (run / "rl" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = write_report(run).read_text()
    assert "plots/rl.png" not in text and "plots/sft.png" in text


def test_every_task_measured_on_the_way_is_a_line(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    names = [f"task_{i}" for i in range(8)]
    rows = [{"kind": "tasks", "step": s, "accuracy": dict.fromkeys(names, s / 90), "chatcore": None} for s in (2, 4)]
    assert plots.plot(rows, "sft", tmp_path / "sft.png")
    (axis,) = drawn[0].axes
    assert [line.get_label() for line in axis.lines] == names
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in axis.lines}) == 8
    assert list(axis.lines[0].get_ydata()) == [2 / 90, 4 / 90]


def test_an_evaluation_on_the_way_is_said(run):
    write_json(run / "sft" / "eval.json", json.loads((run / "sft" / "eval.json").read_text()) | {"step": 5})
    assert "sft/eval.json: of step 5, the stage ended at 100" in write_report(run).read_text()


def test_drawn_answers_are_not_shown_as_greedy_ones(run):
    write_report(run)
    assert "drawn" not in (run / "report.md").read_text()
    for stage in ("base", "sft", "rl"):  # base has no written answers
        figures = json.loads((run / stage / "eval.json").read_text())
        write_json(run / stage / "eval.json", figures | {"drawn": {"temperature": 0.8, "top_k": 50, "num_samples": 4}})
    write_report(run)
    [line] = [line for line in (run / "report.md").read_text().splitlines() if "drawn" in line]
    assert "of sft, rl" in line
    assert "temperature 0.8, top_k 50, num_samples 4" in line


def test_what_a_conversion_does_not_make_is_not_missing(run):
    for stage in ("tokenizer", "base"):
        done = json.loads((run / stage / "done.json").read_text())
        write_json(run / stage / "done.json", done | {"converted_from": "model_000100.pt"})
    for path in ("tokenizer/eval.json", "base/metrics.jsonl", "base/samples.md", "sft/samples.md"):
        (run / path).unlink()
    write_report(run)
    text = (run / "report.md").read_text()
    assert "sft/samples.md: missing" in text
    assert text.count(": missing") == 1


def test_what_a_device_costs_can_be_said_afterwards(run):
    def cost(*words):
        assert cli.main(["report", "--workdir", str(run), *words]) == 0
        return next(row for row in md_rows((run / "report.md").read_text()) if row[:2] == ["base", "100"])[-1]

    assert cost() == "$3.00"
    assert cost("--device-hour-cost", "5") == "$5.00"


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path)


def test_rendering(tmp_path):
    assert plain("x_y _z_ <i> `c` |\nd *b*") == "x_y \\_z\\_ \\<i> \\`c\\` \\| d \\*b\\*"
    assert plain("![a](b) [c][d] [e]: f [1, 2] &lt; & x") == "![a\\](b) [c\\][d] [e\\]: f [1, 2] \\&lt; & x"
    assert bullets(["one", "*two*"]) == "- one\n- \\*two\\*"
    assert table(("k", "v"), [("a|b", "1")]) == "| k | v |\n| --- | --: |\n| a\\|b | 1 |"
    assert code("a\n```\nb") == "````\na\n```\nb\n````"
    html = to_html(f"<script>\n\n{code('</code><i>')}", tmp_path, "t<")
    assert "<title>t&lt;</title>" in html and "<script>" not in html and "&lt;i&gt;" in html


def test_smoothing_has_no_bias_at_the_start():
    assert plots.smoothed([(i, 3.0) for i in range(500)]) == [(i, pytest.approx(3.0)) for i in range(500)]
