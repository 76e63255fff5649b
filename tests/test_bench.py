"""Measurements: their figures follow from their times, what is wrong shows, and programs compared take turns."""

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernels import decode_attention
from kernels.attention import IMPLEMENTATIONS
from nanochat_jax import cli, metrics
from nanochat_jax.bench import Settings, attention, decode, measure
from nanochat_jax.config import GPTConfig
from nanochat_jax.model import flops_per_token

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.py"


@pytest.fixture
def bench(capsys):
    """Runs `bench` and gives its status, its figures and stderr."""

    def run(*words):
        status = cli.main(["bench", *map(str, words), "--experiment", str(TINY)])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return run


def test_a_steps_rates_follow_from_its_time_and_its_parts_are_named(bench, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    options = (
        "--model.depth",
        1,
        "--base.total-batch-size",
        512,
        "--base.device-batch-size",
        2,
        "--mesh",
        2,
        "--repeat",
        2,
    )
    status, figures, err = bench("train", *options)
    assert status == 0 and "head and loss" in err
    seconds, architecture = figures["step"]["median_ms"] / 1000, dict(figures["architecture"])
    assert architecture.pop("parameters") > 0
    cfg = GPTConfig(**architecture | {"windows": tuple(architecture["windows"])})
    assert (figures["tokens"], figures["rows"], figures["microbatches"]) == (512, 4, 2)
    assert figures["tok_per_sec"] == pytest.approx(512 / seconds)
    assert figures["mfu"] == pytest.approx(figures["tok_per_sec"] * flops_per_token(cfg) / 2e12)
    assert figures["step"]["p10_ms"] <= figures["step"]["median_ms"] <= figures["step"]["p90_ms"]
    assert 0 < figures["loss"] < 7 and figures["peak_bytes"] > 0
    assert figures["program"]["bytes"] > figures["program"]["temporary_bytes"] > 0
    parts = {part["part"].strip(): part for part in figures["parts"]}
    assert sum(parts[name]["share"] for name in ("gradients", "optimizer", "rest, by difference")) == pytest.approx(1)
    assert all(part["share"] == pytest.approx(part["ms"] / 1000 / seconds) for part in parts.values())
    assert "attention, window 64, 1 of 1 layers" in parts
    assert figures["environment"]["versions"]["jax"] and figures["environment"]["device"] == "cpu"


def test_attention_is_checked_and_counted_in_visited_tiles(bench):
    shape = ("--model.sequence-len", 512, "--model.n-kv-head", 1, "--rows", 3, "--repeat", 1)
    status, figures, _ = bench("attention", *shape, "--impls", "xla_blocked")
    assert status == 0 and figures["shape"] == {"T": 512, "N": 2, "K": 1, "H": 16, "dtype": "float32"}
    tiles = {128: 7, 512: 10}  # of 16: the diagonal and one to its left, or all on and below it
    assert [(record["impl"], record["window"]) for record in figures["attention"]] == [
        ("xla_blocked", w) for w in tiles
    ]
    for record in figures["attention"]:
        flops = 4 * 3 * 2 * 16 * tiles[record["window"]] * 128**2
        assert record["forward_tflop_per_sec"] == pytest.approx(flops / record["forward_median_ms"] / 1e9)
        assert record["backward_tflop_per_sec"] == pytest.approx(2.5 * flops / record["backward_median_ms"] / 1e9)
        assert record["right"] and 0 < record["dk_error"] < 1e-5


def test_attention_that_is_wrong_or_fails_is_said_and_the_others_go_on(bench, monkeypatch):
    right = attention.attention

    def broken(q, k, v, *, window, impl):
        if impl == "xla_blocked":
            raise NotImplementedError("no such\nkernel")
        return right(q, jax.lax.stop_gradient(k), v, window=window, impl=impl)

    monkeypatch.setattr(attention, "attention", broken)
    status, figures, _ = bench("attention", "--impls", "xla_blocked", "reference", "--repeat", 1, "--rows", 1)
    failed, wrong = figures["attention"]
    assert status == 0 and failed["error"] == "NotImplementedError: no such" and not failed["right"]
    assert (wrong["impl"], wrong["out_error"], wrong["dk_error"]) == ("reference", 0, 1) and not wrong["right"]


def test_the_tokenizers_speeds_follow_from_its_times(bench):
    status, figures, _ = bench("tokenizer", "--repeat", 1)
    assert status == 0 and figures["right"] and figures["train_characters"] == 100_000
    assert figures["bytes_per_token"] == pytest.approx(figures["bytes"] / figures["tokens"]) and figures["tokens"] > 0
    for record in figures["speeds"]:
        assert record["tok_per_sec"] == pytest.approx(1000 * figures["tokens"] / record["median_ms"])
        assert record["mb_per_sec"] == pytest.approx(figures["bytes"] / 1e3 / record["median_ms"])


def test_a_tokenizer_without_text_to_measure_on_is_one_line(bench, tmp_path):
    for name, texts in (("a", ["some words"]), ("b", [])):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"{name}.parquet")
    status, _, err = bench("tokenizer", "--data.dir", tmp_path, "--tokenizer.vocab-size", 265)
    assert status == 1 and "b.parquet, the last shard and so the one to measure on, holds no text" in err


def test_the_loader_is_measured_in_whole_batches(bench):
    status, figures, _ = bench("loader", "--repeat", 1, "--data.packing", "bestfit", "--data.buffer-docs", 20)
    assert status == 0 and figures["batch_tokens"] == 512 and figures["sample_tokens"] % 512 == 0
    assert figures["tok_per_sec"] == pytest.approx(1000 * figures["sample_tokens"] / figures["sample"]["median_ms"])


def test_decoding_is_what_the_answer_takes_longer_than_the_prompt(bench, monkeypatch):
    monkeypatch.setattr(metrics, "_peaks", lambda device: (1e12, 1e10))
    status, figures, _ = bench("decode", "--repeat", 2, "--rows", 3)
    (record,) = figures["speeds"]
    assert status == 0 and (figures["prompt_tokens"], figures["answer_tokens"]) == (32, 16)
    answer = record["answer_median_ms"] - record["prefill_median_ms"]
    assert record["decode_step_ms"] == pytest.approx(answer / 16)
    assert record["decode_tok_per_sec"] == pytest.approx(3 * 16 * 1000 / answer)
    assert record["prefill_tok_per_sec"] == pytest.approx(3 * 32 * 1000 / record["prefill_median_ms"])
    assert record["compilations"] == 2 and figures["engines"][0].startswith("engine: 3 rows of 64 tokens")
    # Two layers of width 32, windows of 64, 40 tokens in a row on average; gates and scalars are the rest.
    blocks, head, visible, prompt = 2 * 12 * 32**2, 512 * 32, 2 * 40, 2 * 32
    assert record["decode_step_mb"] == pytest.approx(4e-6 * (blocks + head + 3 * visible * 2 * 32), rel=0.01)
    assert record["decode_gb_per_sec"] == pytest.approx(record["decode_step_mb"] / record["decode_step_ms"])
    assert record["mbu"] == pytest.approx(record["decode_gb_per_sec"] / 10)
    flops = 3 * (32 * (2 * blocks + 4 * 32 * prompt) + 2 * head)
    assert record["prefill_mfu"] == pytest.approx(flops / (record["prefill_median_ms"] / 1000) / 1e12, rel=0.01)
    short, long = figures["arrivals"]  # answers of up to a quarter of the context, and of up to half
    assert short["prompt_tokens"] == long["prompt_tokens"] and short["answer_tokens"] < long["answer_tokens"]
    for arrived in short, long:
        assert arrived["rows"] == 3 and arrived["lowest_ratio"] <= arrived["ratio"] <= arrived["highest_ratio"]


@pytest.mark.parametrize("broken", ["", "a new key is lost", "another slot changes"])
def test_attention_over_the_cache_is_checked_by_xla_and_by_the_kernel(bench, monkeypatch, broken):
    """Rows on their own, and sixteen that share a prompt."""
    if broken:
        right = decode_attention.decode_attention

        def wrong(*given, setup):
            own = given[5]
            y_BKGH, kept = right(*given, setup=setup)
            lost = kept["k"].at[3].set(own["k"][3])
            return y_BKGH, kept | {"k": lost if broken == "a new key is lost" else kept["k"].at[3, 0, 1, 0].add(1e-3)}

        monkeypatch.setattr(decode_attention, "decode_attention", wrong)
    options = "--attention", "pallas", "--step-only", "--rows", 16, "--repeat", 1
    status, figures, _ = bench("decode", *options)
    records = figures["over_cache"]
    assert status == 0 and all(record["us"] > 0 for record in records)
    assert [(record["impl"], record["prompts"]) for record in records] == [
        (impl, prompts) for prompts in (0, 1) for impl in ("xla", "kernel")
    ]
    assert [record["right"] for record in records] == [True, not broken] * 2


def test_weights_in_8_bits_are_measured_where_asked_for(bench):
    options = "--step-only", "--rows", 1, "--repeat", 1
    whole, rounded = (bench("decode", *options, "--quantize", kind)[1] for kind in ("none", "int8"))
    assert rounded["quantize"] == "int8" and "(int8)" in rounded["engines"][0]
    assert rounded["speeds"][0]["decode_step_mb"] < whole["speeds"][0]["decode_step_mb"]


def test_arrivals_are_answered_whole_and_runs_that_compile_do_not_count():
    started, lengths = [], []

    class Engine:
        """Answers at once; with several rows its first two runs compile."""

        def __init__(self, rows):
            self.max_rows, self.compiled = rows, set()

        def stream(self, prompt, sampling):
            started.append(self.max_rows)
            if self.max_rows > 1 and started.count(self.max_rows) <= 2 * decode.REQUESTS:
                self.compiled.add(len(started))
            lengths.append((len(prompt), sampling.max_tokens))
            yield {}

    several = Engine(4)
    cfg = SimpleNamespace(sequence_len=128, vocab_size=9)
    (record,) = decode.arrivals(Engine(1), [several], cfg, seed=0, longest=32)
    requests = decode.REQUESTS
    # One row takes a first run for the time that the requests arrive in; then both take turns.
    assert [len(list(run)) for _, run in itertools.groupby(started)] == [
        *(2 * requests, 3 * requests),
        *(requests, requests) * (decode.ROUNDS - 1),
    ]
    assert sorted(lengths[:requests]) == sorted(lengths[-requests:])
    assert all(4 <= prompt <= 64 and 4 <= answer <= 32 for prompt, answer in lengths)
    asked = [sum(of_each) for of_each in zip(*lengths[:requests], strict=True)]
    assert [record["prompt_tokens"], record["answer_tokens"]] == asked
    assert record["rows"] == 4 and record["compilations"] == len(several.compiled)


def test_an_arrivals_ratio_is_that_of_its_round(monkeypatch):
    """The machine slows down threefold between two rounds, for all alike."""
    now, speed, lock = [0.0], iter([1, *[1] * 2, *[3] * 2, *[9] * 2]), threading.Lock()

    class Engine:
        compiled = ()

        def __init__(self, rows, seconds):
            self.max_rows, self.seconds, self.left = rows, seconds, 0

        def stream(self, prompt, sampling):
            with lock:
                if not self.left:
                    self.left, self.now_takes = decode.REQUESTS, self.seconds * next(speed)
                self.left -= 1
                now[0] += self.now_takes
            yield {}

    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None))
    cfg = SimpleNamespace(sequence_len=128, vocab_size=9)
    (record,) = decode.arrivals(Engine(1, 5.0), [Engine(4, 1.0)], cfg, seed=0, longest=32)
    assert {record[name] for name in ("ratio", "lowest_ratio", "highest_ratio")} == {5.0}
    assert record["one_row_tok_per_sec"] == pytest.approx(record["answer_tokens"] / (15 * decode.REQUESTS))
    assert record["tok_per_sec"] == pytest.approx(record["answer_tokens"] / (3 * decode.REQUESTS))


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["nothing"], 2, "nothing"),
        (["train", "--repeat", 0], 2, "--repeat 0"),
        (["decode", "--rows", 4, 0], 2, "at least 1"),
        (["attention", "--impls", "magic"], 2, "invalid choice 'magic' for argument '--impls'"),
        (["attention", "--impls", "cudnn"], 1, "cudnn needs an NVIDIA GPU"),
        (["train", "--base.device-batch-size", 3], 1, "--base.device-batch-size 3 on 1 data shards does not divide"),
    ],
)
def test_what_cannot_be_measured_is_one_line(bench, words, status, says):
    got, figures, err = bench(*words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == status and figures is None and len(errors) == 1 and says in errors[0] and "Traceback" not in err


def test_every_implementation_can_be_named():
    """They stand in the options once more, because importing the kernels would import JAX for --help."""
    (names, _) = get_args(get_type_hints(Settings)["impls"])
    assert get_args(names) == IMPLEMENTATIONS


def test_warm_up_does_not_count_and_short_calls_are_timed_together(monkeypatch):
    clock, lasts = [0.0], iter([60.0, 5.0, *[0.001] * 10, 0.003, *[0.001] * 10, *[0.002] * 10])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def action():
        clock[0] += next(lasts)

    timing = measure.timed(action, repeat=3)
    assert timing == pytest.approx((0.0012, 0.001, 0.002)) and next(lasts, None) is None


@pytest.fixture
def scripts(monkeypatch):
    """The programs in bench/, as they find each other."""
    monkeypatch.syspath_prepend(ROOT / "bench")


CHILD = """
import json, sys
from turns import Turns
seconds, losses = json.loads(sys.argv[1])
turns = Turns(lambda: 1000 * len(losses))
turns.facts = {"who": sys.argv[2]}
print("not a reply")
with turns.uncounted():
    pass
if not losses:
    sys.exit("the last word")
real = turns.step_done
for second, loss in zip(seconds, losses):
    turns._clock -= second
    turns.step_done(loss)
"""


@pytest.fixture
def sides(scripts, tmp_path):
    """Children that pretend to have taken so many seconds for each step."""
    (tmp_path / "child.py").write_text(CHILD)

    def child(name, seconds, losses):
        command = [sys.executable, tmp_path / "child.py", json.dumps([seconds, losses]), name]
        return name, command, tmp_path / name, os.environ | {"PYTHONPATH": str(ROOT / "bench")}

    return child


def test_two_programs_are_compared_round_by_round(sides):
    import compare_nanochat

    losses = [4.0, 3.0, 2.0, 1.0, 0.5]
    means = compare_nanochat.running_mean(losses)
    theirs = sides("reference", [9, 900, 200, 200, 600], [*means[:3], means[3] + 0.25, means[4]])
    ours = sides("ours", [9, 1, 100, 400, 400], losses)
    figures = compare_nanochat.compare(3, 1, tokens=100, sides=[theirs, ours])
    speed = figures["tok_per_sec"]
    assert [speed[name] for name in ("ratio", "lowest_ratio", "highest_ratio")] == pytest.approx(
        [1.5, 0.5, 2], rel=1e-2
    )
    assert (speed["reference"], speed["ours"]) == pytest.approx((0.5, 0.25), rel=1e-2)
    assert figures["largest_loss_gap"] == pytest.approx(0.25)
    assert [at["step"] for at in figures["losses"]] == [0, 1, 2, 3, 4]
    assert figures["peak_bytes"] == {"reference": 5000, "ours": 5000, "ratio": 1.0}
    assert 0 < figures["first_step_seconds"]["ours"] < 9
    assert figures["facts"]["ours"] == {"who": "ours"}
    assert "ratio 1.5" in compare_nanochat.summary(figures)


def test_what_moves_between_devices_is_read_from_a_compiled_program(scripts):
    import compile_for_h100

    program = """
  %reduce_scatter.1 = f32[6,250000]{1,0} reduce-scatter(%copy), channel_id=1, replica_groups=[1,8]<=[8]
  %all-gather-start.2 = ((bf16[8]{0}, f32[4]{0}), (bf16[64]{0}, f32[32]{0})) all-gather-start(%a, %b), channel_id=2
  %all-gather-done.2 = (bf16[1000000]{0}, f32[500000]{0}) all-gather-done(%all-gather-start.2)
  %all-reduce.3 = f32[] all-reduce(%norm), channel_id=3, to_apply=%add
  ROOT %fusion = f32[4] fusion(%all-gather-done.2), calls=%all-reduce-like
"""
    assert compile_for_h100.moved(program) == {
        "reduce-scatter": {"count": 1, "mb": 6.0},
        "all-gather": {"count": 1, "mb": 4.0},
        "all-reduce": {"count": 1, "mb": 0.0},
    }


def test_the_running_mean_is_the_one_that_nanochat_prints(scripts):
    from compare_nanochat import running_mean

    assert running_mean([2.0, 4.0]) == pytest.approx([2.0, (0.9 * 0.2 + 0.4) / (1 - 0.81)])


def test_a_program_that_dies_is_named_with_its_last_word(sides):
    import compare_nanochat

    with pytest.raises(SystemExit, match=r"^error: reference ended with status 1: the last word$"):
        compare_nanochat.compare(1, 1, tokens=1, sides=[sides("reference", [], [])])


def test_tokens_can_be_learned_and_fit_the_vocabulary(scripts):
    from compare_nanochat import BATCHES, tokens_of

    tokens = tokens_of(50, rows=4, length=33)
    assert tokens.shape == (BATCHES, 4, 33) and tokens.min() == 0 and tokens.max() == 49
    after = tokens[..., 1:][tokens[..., :-1] == 0]
    assert max((after == token).mean() for token in range(50)) > 0.45


def test_the_comparison_names_wrong_options_in_one_line(scripts, tmp_path):
    import compare_nanochat

    (tmp_path / "scripts").mkdir()
    right = {"--nanochat": tmp_path, "--python": sys.executable, "--depth": 2}

    def parsed(**changed):
        return compare_nanochat.parse([str(x) for pair in (right | changed).items() for x in pair] + ["--", "--fp8"])

    with pytest.raises(SystemExit, match=r"^error: --nanochat .*: no scripts/base_train.py there"):
        parsed()
    (tmp_path / "scripts" / "base_train.py").touch()
    options, words = parsed()
    assert (options.dtype, words) == ("float32", ["--fp8"]) and parsed(**{"--device": "cuda"})[0].dtype == "bfloat16"
    with pytest.raises(SystemExit, match=r"^error: --python .*nothing: no such program"):
        parsed(**{"--python": tmp_path / "nothing"})
    with pytest.raises(SystemExit, match=r"^error: --depth 0: at least 1 is needed$"):
        parsed(**{"--depth": 0})


ANSWERING = """
import json, sys
from turns import answer
factor, greedy = json.loads(sys.argv[1])
calls = [0]
def work(work, variant, **options):
    print("not a reply")
    if work == "greedy":
        return greedy[variant]
    calls[0] += 1
    return {"seconds": factor * calls[0] * (2 if variant == "slow" else 1), "first": 7}
answer(work, {"factor": factor})
"""


def test_generation_is_compared_round_by_round_and_answers_token_by_token(scripts, tmp_path):
    import compare_decode
    from turns import Child

    (tmp_path / "child.py").write_text(ANSWERING)

    def child(name, factor, greedy):
        command = [sys.executable, tmp_path / "child.py", json.dumps([factor, greedy])]
        return Child(name, command, tmp_path / name, os.environ | {"PYTHONPATH": str(ROOT / "bench")})

    theirs = child("reference", 8, {"reference": [[1, 2, 3, 4], [5, 5, 5, 5]]})
    ours = child("ours", 1, {"plain": [[1, 2, 3, 4], [5, 5, 5, 5]], "int8": [[1, 0, 3, 4], [5, 5, 5, 5]]})
    try:
        assert (theirs.facts(), ours.facts()) == ({"factor": 8}, {"factor": 1})
        asked = {"decoding": compare_decode.Measure("decode", {}, ("fast", "slow"), steps=4)}
        fast, slow = compare_decode.compare(2, asked, theirs, ours)
        exact, rounded = compare_decode.agreement([[0], [1]], theirs, ours)
    finally:
        theirs.end()
        ours.end()
    # Ours is asked twice a round, (fast, slow), (slow, fast), (fast, slow), of which the first does not count.
    assert (fast["reference_ms"], fast["ours_ms"]) == (5000, 1125) and (slow["ours_ms"]) == 2250
    assert [fast[name] for name in ("lowest_ratio", "ratio", "highest_ratio")] == pytest.approx(
        [4, (16 / 4 + 24 / 5) / 2, 24 / 5]
    )
    assert exact == {"ours": "plain", "part_at": [4, 4], "equal": [1, 1], "different_tokens": [4, 1]}
    assert (rounded["part_at"], rounded["equal"]) == ([1, 4], [0.75, 1])
    said = compare_decode.summary({"speeds": [fast], "greedy": [rounded]})
    assert "ratio 4.40 (rounds 4.00 to 4.80)" in said and "equal up to [1, 4]" in said


def test_generation_is_compared_on_prompts_that_fit(scripts):
    import compare_decode

    asked = compare_decode.measures(100, 512)
    assert len(asked["batch-16"].options["prompt"]) == 256 and len(asked["prefill"].options["prompt"]) == 400
    questions = asked["rollouts"].options["prompts"]
    assert [len(questions), len(questions[0]), len(questions[-1])] == [16, 40, 120]
    assert max(map(max, questions)) < 100 and compare_decode.measures(100, 512) == asked


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--rounds": 0}, r"^error: --rounds 0: at least 1 is needed$"),
        ({"--seq-len": 256}, r"^error: --seq-len 256: the rollouts and greedy answers need 512 at least$"),
        ({"--python": "/nowhere/python"}, r"^error: --python /nowhere/python: no such program"),
        ({"--nanochat": "/nowhere"}, r"^error: --nanochat /nowhere: no nanochat/engine.py there"),
    ],
)
def test_comparing_generation_names_wrong_options_in_one_line(scripts, tmp_path, changed, says):
    import compare_decode

    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "engine.py").touch()
    options = {"--nanochat": tmp_path, "--python": sys.executable} | changed
    with pytest.raises(SystemExit, match=says):
        compare_decode.parse([str(x) for pair in options.items() for x in pair])


def test_nothing_of_ours_is_found_where_the_reference_imports(scripts, tmp_path):
    """The child of the reference, started where our `kernels` would be found, refuses."""
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"nanochat": str(tmp_path)}))
    child = subprocess.run(
        [sys.executable, ROOT / "bench" / "compare_reference.py", spec],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1 and child.stderr.startswith("kernels is this project's here")


def test_a_session_on_a_gpu_can_be_rehearsed(tmp_path):
    rehearsed = os.environ | {"REHEARSE": "1", "PARTS": "attention-grouped", "PYTHON": sys.executable, "XLA_FLAGS": ""}
    session = subprocess.run(
        ["bash", ROOT / "bench" / "gpu_session.sh", tmp_path / "out"], env=rehearsed, capture_output=True, text=True
    )
    assert session.returncode == 0, session.stderr
    written = json.loads((tmp_path / "out" / "gpu_session.json").read_text())
    assert list(written["parts"]) == ["attention-grouped"] and not written["wrong"]
    figures = written["parts"]["attention-grouped"]["figures"]
    assert figures["shape"] == {"T": 256, "N": 2, "K": 1, "H": 64, "dtype": "bfloat16"}
    assert {record["window"] for record in figures["attention"]} == {128, 256}
    page = (tmp_path / "out" / "gpu_session.md").read_text()
    assert page.startswith("Every check passed.") and "| pallas_interpreted |" in page


def test_a_session_fails_where_a_part_does(tmp_path):
    wrong = {"impl": "pallas", "window": 128, "right": False}
    pieces = {
        "slow": ("124 60", ""),
        "late": ("missing 0", None),
        "broken": ("1 2", "half a li"),
        "silent": ("0 2", ""),
        "kernels": ("0 5", json.dumps({"attention": [wrong, wrong | {"right": True}, wrong | {"error": "no memory"}]})),
        "fine": ("0 1", json.dumps({"speeds": [{"rows": 1, "decode_step_ms": 2.5}]})),
        "decode": ("0 1", json.dumps({"over_cache": [wrong | {"impl": "kernel"}]})),
    }
    for name, (status, out) in pieces.items():
        if out is not None:
            (tmp_path / f"{name}.out").write_text(f"progress\n{out}\n")
        (tmp_path / f"{name}.status").write_text(status)
    report = [sys.executable, "-m", "bench.gpu_session_report", tmp_path, tmp_path]
    assert subprocess.run(report, cwd=ROOT, capture_output=True).returncode == 1
    said = json.loads((tmp_path / "gpu_session.json").read_text())["wrong"]
    assert sorted(said) == [
        "broken: ended with status 1",
        "decode: kernel, window 128: differs from the reference",
        "kernels: pallas, window 128: differs from the reference",
        "kernels: pallas, window 128: no memory",
        "late: there was no time for it",
        "silent: printed no figures",
        "slow: took too long",
    ]
    page = (tmp_path / "gpu_session.md").read_text()
    assert all(f"WRONG: {fault}" in page for fault in said) and "| 2.5 " in page


@pytest.mark.slow
@pytest.mark.skipif("NANOCHAT_CHECKOUT" not in os.environ, reason="set NANOCHAT_CHECKOUT and NANOCHAT_PYTHON")
def test_both_learn_the_same_from_the_same(tmp_path):
    command = [sys.executable, ROOT / "bench" / "compare_nanochat.py", "--nanochat", os.environ["NANOCHAT_CHECKOUT"]]
    command += ["--python", os.environ["NANOCHAT_PYTHON"], "--depth", "2", "--seq-len", "128", "--batch", "2"]
    command += ["--vocab-size", "512", "--rounds", "3", "--steps", "3", "--json"]
    compared = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert compared.returncode == 0, compared.stderr
    figures = json.loads(compared.stdout)
    assert figures["largest_loss_gap"] < 1e-4 and figures["tok_per_sec"]["ratio"] > 0


@pytest.mark.slow
@pytest.mark.skipif("NANOCHAT_CHECKOUT" not in os.environ, reason="set NANOCHAT_CHECKOUT and NANOCHAT_PYTHON")
def test_both_generate_the_same_from_the_same():
    command = [sys.executable, ROOT / "bench" / "compare_decode.py", "--nanochat", os.environ["NANOCHAT_CHECKOUT"]]
    command += ["--python", os.environ["NANOCHAT_PYTHON"], "--depth", "2", "--vocab-size", "512", "--rounds", "1"]
    command += ["--what", "batch-1", "greedy", "--json"]
    compared = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert compared.returncode == 0, compared.stderr
    figures = json.loads(compared.stdout)
    assert figures["greedy"][0]["part_at"] == [128] * 4 and min(figures["greedy"][0]["different_tokens"]) > 8
    assert all(record["ratio"] > 0 for record in figures["speeds"])
