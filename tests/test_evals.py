"""Evaluations with stand-ins for the model: what is asked of it, what counts as right, what is reported."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import EvalConfig, GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.evals import core
from nanochat_jax.evals.bpb import bits_per_byte
from nanochat_jax.evals.chat import chatcore, evaluate_task
from nanochat_jax.evals.core import evaluate_core
from nanochat_jax.evals.intervals import paired_interval, wilson
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tasks.task import Task, dialogue, is_letter, is_number, multiple_choice
from nanochat_jax.tokenizer import Tokenizer

BYTES = Tokenizer.train(["no merges are needed"], 265)


def silent(line):
    pass


# Bits per byte


def test_bpb_counts_nats_of_text_over_its_bytes():
    token_bytes = np.array([1, 3, 2, 0], np.int32)
    targets = np.array([[0, 1, 3, -1], [2, 2, -1, -1]], np.int32)
    losses = np.array([[1.0, 2.0, 50.0, 70.0], [0.5, 0.25, 90.0, 90.0]], np.float32)
    batches = [{"inputs": targets, "targets": targets}, {"inputs": targets[:1], "targets": targets[:1]}]
    result = bits_per_byte(lambda inputs, goal: losses[: len(goal)], batches, token_bytes)
    assert result == pytest.approx((1 + 2 + 0.5 + 0.25 + 1 + 2) / (math.log(2) * (1 + 3 + 2 + 2 + 1 + 3)))


def test_bpb_without_text_is_an_error():
    batch = {"inputs": np.zeros((1, 2), np.int32), "targets": np.array([[3, -1]], np.int32)}
    with pytest.raises(UserError, match="no byte"):
        bits_per_byte(lambda inputs, goal: jnp.zeros(goal.shape), [batch], np.array([1, 1, 1, 0], np.int32))


# Intervals


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert all(wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0 for n in range(1, 200)) and wilson(20, 20)[0] > 0.8
    assert all(0 < low < right / 99 < high < 1 for right in range(1, 99) for low, high in [wilson(right, 99)])
    # Its defining property: the ends are where the observed share is Z standard errors away.
    for end in wilson(30, 200):
        assert abs(30 / 200 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 200))


def test_paired_interval():
    a, b = [1, 0, 0, 0, 1, 0], [1, 1, 0, 1, 1, 0]
    mean, low, high = paired_interval(a, b)
    spread = 1.959964 * np.std(np.subtract(b, a), ddof=1) / math.sqrt(6)
    assert (mean, low, high) == pytest.approx((1 / 3, 1 / 3 - spread, 1 / 3 + spread))
    assert paired_interval(a, a) == (0.0, 0.0, 0.0)
    # Pairing sees what two separate intervals would not: 20 of 1,000 flips, all one way.
    many = [1, 0] * 500
    better = [1] * 40 + many[40:]
    assert paired_interval(many, better)[1] > 0
    assert wilson(sum(many), 1000)[1] > wilson(sum(better), 1000)[0]
    with pytest.raises(ValueError, match="pairs"):
        paired_interval([1], [1, 0])


# Chat tasks


class FakeEngine:
    """Answers by a table from question to answer; records the prompts."""

    def __init__(self, answers, max_len=10_000):
        self.cfg, self.max_len = SimpleNamespace(max_positions=max_len), max_len
        self.answers = {tuple(BYTES.render_for_completion(dialogue(q, ""))): a for q, a in answers.items()}
        self.batches, self.sampling = [], []

    def logits_at(self, prompts):
        self.batches.append(len(prompts))
        logits = np.full((len(prompts), BYTES.vocab_size), -5.0, np.float32)
        for row, prompt in enumerate(prompts):
            # A token that is no letter is likelier than all letters.
            logits[row, ord(" ")] = 9.0
            logits[row, ord(self.answers[tuple(prompt)])] = 1.0
        return logits

    def generate(self, prompts, sampling, samples):
        self.batches.append(len(prompts))
        assert all(how.max_tokens == 7 for how in sampling)
        self.sampling += sampling
        # Of several samples the last one says what the table says.
        return [
            SimpleNamespace(text=self.answers[tuple(prompt)] if j == samples - 1 else "no idea")
            for prompt in prompts
            for j in range(samples)
        ]


def letters_task(n):
    rows = [
        multiple_choice("x" * (i % 7) + str(i), "ABC"[: 2 + i % 2], "pqr"[: 2 + i % 2], "AB"[i % 2]) for i in range(n)
    ]
    return Task("letters", "categorical", rows, lambda row: row, is_letter)


def sums_task(n):
    rows = [dialogue("long " * (n - i) + f"{i}+1", f"{i + 1}", answer=str(i + 1)) for i in range(n)]
    return Task("sums", "generative", rows, lambda row: row, is_number)


def test_categorical_tasks_compare_letters_only():
    task = letters_task(10)
    engine = FakeEngine({task[i]["messages"][0]["content"]: "A" for i in range(10)})
    lines = []
    result = evaluate_task(task, engine, BYTES, EvalConfig(batch_size=4), None, lines.append)
    assert result["correct"] == [1, 0] * 5 and result["accuracy"] == 0.5 and result["n"] == 10
    assert result["interval"] == list(wilson(5, 10)) and engine.batches == [4, 4, 2]
    assert len(lines) == 1 and "0.5000" in lines[0] and "n 10" in lines[0]


def test_generative_tasks_are_graded_in_row_order():
    task = sums_task(12)
    right = {0, 3, 11}
    answers = {task[i]["messages"][0]["content"]: f"it is {i + 1 if i in right else 'unknown'}" for i in range(12)}
    result = evaluate_task(task, FakeEngine(answers), BYTES, EvalConfig(batch_size=1, max_new_tokens=7), None, silent)
    assert [i for i, r in enumerate(result["correct"]) if r] == sorted(right) and result["accuracy"] == 0.25
    engine = FakeEngine(answers)
    cut = evaluate_task(task, engine, BYTES, EvalConfig(max_new_tokens=7), 4, silent)
    assert cut["correct"] == [1, 0, 0, 1] and cut["n"] == 4
    assert {how.temperature for how in engine.sampling} == {0.0}


def test_one_right_answer_of_several_drawn_ones_is_enough():
    task = sums_task(6)
    engine = FakeEngine({task[i]["messages"][0]["content"]: str(i + 1 if i % 2 else "unknown") for i in range(6)})
    settings = EvalConfig(max_new_tokens=7, temperature=0.8, top_k=20, num_samples=3)
    result = evaluate_task(task, engine, BYTES, settings, None, silent)
    assert result["correct"] == [0, 1] * 3 and result["n"] == 6
    assert {(how.temperature, how.top_k) for how in engine.sampling} == {(0.8, 20)}
    seeds = {how.seed + j for how in engine.sampling for j in range(3)}
    assert len(seeds) == 18  # no two answers draw alike
    again = FakeEngine({task[i]["messages"][0]["content"]: "7" for i in range(6)})
    evaluate_task(task, again, BYTES, settings, None, silent, seed=1)
    assert seeds.isdisjoint(how.seed + j for how in again.sampling for j in range(3))


def test_prompts_that_do_not_fit_count_as_wrong():
    task = sums_task(5)
    answers = {task[i]["messages"][0]["content"]: str(i + 1) for i in range(5)}
    lines = []
    result = evaluate_task(
        task, FakeEngine(answers, max_len=30), BYTES, EvalConfig(max_new_tokens=7), None, lines.append
    )
    assert result["correct"] == [0, 1, 1, 1, 1]
    assert "1 of 5 prompts are longer than 29 tokens" in lines[0]


def test_no_examples_is_an_error():
    with pytest.raises(UserError, match="no example"):
        evaluate_task(sums_task(3), FakeEngine({}), BYTES, EvalConfig(), 0, silent)


def test_chatcore_needs_its_five_tasks():
    results = {
        "arc_easy": 0.25,
        "arc_challenge": 0.625,
        "mmlu": 1.0,
        "gsm8k": 0.1,
        "humaneval": 0.2,
        "spelling_bee": 1.0,
    }
    results = {name: {"accuracy": accuracy, "n": 100} for name, accuracy in results.items()}
    found = chatcore(results)
    assert found["chatcore"] == pytest.approx((0 + 0.5 + 1 + 0.1 + 0.2) / 5)
    # Binomial variances 0.1875 and 0.2344, centred, 0, 0.09 and 0.16, over 100 rows and five tasks.
    spread = (((0.1875 + 0.234375) / 0.75**2 + 0.09 + 0.16) / 100) ** 0.5 / 5
    assert found["chatcore_interval"] == pytest.approx([0.36 - 1.959964 * spread, 0.36 + 1.959964 * spread])
    del results["mmlu"]
    assert chatcore(results) == {"chatcore": None}


# CORE

CFG = GPTConfig.from_depth(ModelConfig(depth=1, aspect_ratio=16, head_dim=16, sequence_len=64), BYTES.vocab_size)


def next_byte(params, cfg, tokens):
    """A model that expects each byte to be followed by the next one, and is the surer the more lower-case it sees."""
    logits = 5.0 * jax.nn.one_hot((tokens + 1) % cfg.vocab_size, cfg.vocab_size)
    return logits + params["bias"]


PARAMS = {"bias": jnp.zeros((1, 1, BYTES.vocab_size))}


def bundle(folder, tasks):
    """A bundle of (label, kind, shots, delimiter or None, baseline in percent, rows)."""
    (folder / "eval_data").mkdir()
    entries, metadata = ["icl_tasks:"], ["Eval Task,Task Category,Random baseline"]
    for label, kind, shots, delimiter, baseline, rows in tasks:
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries += [
            f"- label: {label}",
            f"  dataset_uri: {label}.jsonl",
            f"  num_fewshot: [{shots}]",
            f"  icl_task_type: {kind}",
        ]
        entries += [] if delimiter is None else [f"  continuation_delimiter: {json.dumps(delimiter)}"]
        metadata.append(f"{label},x,{baseline}")
    (folder / "core.yaml").write_text("\n".join(entries) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(metadata) + "\n")
    return folder


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """Puts a stand-in into the place of the model's forward pass."""

    def put(forward):
        monkeypatch.setattr(core, "forward", forward)
        core.score_batch.clear_cache()

    put(next_byte)
    yield put
    core.score_batch.clear_cache()


def run_core(folder, max_examples=None):
    return evaluate_core(PARAMS, CFG, BYTES, folder, make_mesh("1"), 3, max_examples, silent)


def choices(n, gold):
    """The model likes runs of the alphabet: the first choice, on the mean over a longer text than the others have."""
    return [{"query": f"row {i}", "choices": ["abcdefgh", "az", "qqqq"], "gold": gold} for i in range(n)]


def test_core_rows_may_hold_any_character_that_json_may(tmp_path):
    rows = [{"context": f"{i} a\u2028\x85b ", "continuation": "cd"} for i in range(3)]
    folder = bundle(tmp_path, [("lm", "language_modeling", 0, "", 0, rows)])
    file = folder / "eval_data" / "lm.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [len(task.rows) for task in core.read_bundle(folder)] == [3]


def test_core_wants_more_rows_than_examples(tmp_path):
    folder = bundle(tmp_path, [("mc", "multiple_choice", 4, None, 25, choices(4, 0))])
    with pytest.raises(UserError, match="mc has 4 rows, too few for 4 examples"):
        core.read_bundle(folder)


def test_core_centres_and_averages(tmp_path):
    rows = choices(4, 0)[:3] + choices(4, 1)[3:]
    schema = [{"context_options": ["x a", "x b"], "continuation": "cde", "gold": 1} for _ in range(2)]
    language = [{"context": f"{i} ab ", "continuation": "cd" if i else "xx"} for i in range(2)]
    folder = bundle(
        tmp_path,
        [
            ("mc", "multiple_choice", 0, None, 25, rows),
            ("schema", "schema", 0, "", 50, schema),
            ("lm", "language_modeling", 1, "", 0, language),
        ],
    )
    result = run_core(folder)
    assert result["results"] == {"mc": 0.75, "schema": 1.0, "lm": 0.5}
    assert result["centered_results"] == pytest.approx({"mc": (0.75 - 0.25) / 0.75, "schema": 1.0, "lm": 0.5})
    assert result["core_metric"] == pytest.approx((2 / 3 + 1 + 0.5) / 3)
    assert result["n"] == {"mc": 4, "schema": 2, "lm": 2} and result["intervals"]["mc"] == list(wilson(3, 4))
    variance = 0.75 * 0.25 / 4 / (1 - 0.25) ** 2 + 0.5 * 0.5 / 2
    half = 1.959964 * math.sqrt(variance) / 3
    assert result["interval"] == pytest.approx([result["core_metric"] - half, result["core_metric"] + half])


def test_multiple_choice_compares_means_after_the_common_prefix(tmp_path):
    # Summed losses would choose "az"; with the shared "abc " counted in, every mean would move.
    one = [{"query": "q", "choices": ["ghijklmnopq z", "z"], "gold": 0}]
    assert run_core(bundle(tmp_path, [("mc", "multiple_choice", 0, None, 0, one)]))["results"]["mc"] == 1.0


def task_of(kind, shots, delimiter, rows):
    return core.CoreTask("t", kind, shots, delimiter, 0.0, rows)


def text_of(candidate):
    return BYTES.decode(candidate.tokens[1:])


def scored(candidate):
    return BYTES.decode(candidate.tokens[candidate.start : candidate.end])


def test_prompts_of_each_type():
    rows = [{"query": f"q{i} ", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(3)]
    found = core.candidates(task_of("multiple_choice", 2, ": ", rows), 0, BYTES)
    shots = random.Random(1234).sample([1, 2], 2)
    before = "".join(f"q{i} : {'ab'[i % 2]}{i}\n\n" for i in shots)
    assert [text_of(c) for c in found] == [f"{before}q0 : a0", f"{before}q0 : b0"]
    assert [scored(c) for c in found] == ["a0", "b0"] and found[0].tokens[0] == BYTES.bos_id

    rows = [{"context_options": [f"the cat {i}", f"dog {i}"], "continuation": f"ran {i}", "gold": 1} for i in range(2)]
    found = core.candidates(task_of("schema", 1, " ", rows), 1, BYTES)
    assert [text_of(c) for c in found] == [f"dog 0 ran 0\n\n{context} ran 1" for context in ("the cat 1", "dog 1")]
    assert [scored(c) for c in found] == [" 1 ran 1", " 1 ran 1"]

    rows = [{"context": f" ctx {i} \n", "continuation": f"end {i} "} for i in range(2)]
    (found,) = core.candidates(task_of("language_modeling", 1, " ", rows), 0, BYTES)
    assert text_of(found) == "ctx 1 end 1 \n\nctx 0 end 0 " and scored(found) == " end 0 "


def test_rows_are_shuffled_and_shots_come_from_all_rows(tmp_path):
    rows = [{"query": f"{i:02d}", "choices": ["a", "b"], "gold": 0} for i in range(30)]
    folder = bundle(tmp_path, [("mc", "multiple_choice", 5, None, 0, rows)])
    (task,) = core.read_bundle(folder)
    order = list(range(30))
    random.Random(1337).shuffle(order)
    assert [int(row["query"]) for row in task.rows] == order and (task.shots, task.delimiter) == (5, " ")
    for i in (0, 7):
        drawn = random.Random(1234 + i).sample([j for j in range(30) if j != i], 5)
        text = text_of(core.candidates(task, i, BYTES)[0])
        assert [int(shot[:2]) for shot in text.split("\n\n")] == [order[j] for j in [*drawn, i]]
    assert run_core(folder, max_examples=3)["n"]["mc"] == 3
    with pytest.raises(UserError, match="CORE mc: no row to score"):
        run_core(folder, max_examples=0)


def bigrams(params, cfg, tokens):
    """A model that looks at one token."""
    return jnp.take(params["table"], tokens, axis=0)


def test_scores_do_not_depend_on_batching_or_mesh(model):
    model(bigrams)
    table = np.random.default_rng(0).normal(size=(BYTES.vocab_size, BYTES.vocab_size)).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(table))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcde ", k=rng.randrange(1, 150))) for _ in range(40)]
    sequences = [core.Candidate([BYTES.bos_id, *BYTES.encode(word)], 1, len(word) + 1) for word in words]
    expected = [-np.mean([log_probs[a, b] for a, b in itertools.pairwise(s.tokens)]) for s in sequences]
    one, two = (
        core.score({"table": table}, CFG, sequences, make_mesh(mesh), rows, BYTES.bos_id, "t")
        for mesh, rows in (("1", 16), ("2", 8))
    )
    losses, exact = (np.array(column) for column in zip(*one, strict=True))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert not exact[np.array([len(s.tokens) > 4 for s in sequences])].any()
    # Lengths from 2 to 150 make batches of 64, 128 and 256 tokens, whatever their number.
    assert core.score_batch._cache_size() == 2 * 3
    np.testing.assert_allclose([loss for loss, _ in two], losses, rtol=1e-5)


def test_half_of_a_pair_of_surrogates_is_scored(tmp_path):
    rows = [{"context": "x \ud83d", "continuation": "y"}]
    assert run_core(bundle(tmp_path, [("lm", "language_modeling", 0, None, 0, rows)]))["n"] == {"lm": 1}


def test_long_prompts_and_broken_bundles_are_one_line_each(tmp_path, monkeypatch):
    rows = [{"context": "x" * 700, "continuation": "y"}]
    folder = bundle(
        tmp_path, [("mc", "multiple_choice", 0, None, 0, choices(3, 0)), ("lm", "language_modeling", 0, None, 0, rows)]
    )
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"lm has a prompt of 703 .* reaches 640"):
        patched.setattr(core, "score", None)  # it is said before anything is scored
        run_core(folder)
    (folder / "eval_data" / "lm.jsonl").unlink()
    with pytest.raises(UserError, match=r"not a complete CORE bundle.*lm\.jsonl"):
        run_core(folder)
    with pytest.raises(UserError, match=r"core\.yaml"):
        run_core(tmp_path / "nowhere")
    for text in ("", "[]", "x", "icl_tasks:", "icl_tasks: []", "icl_tasks: [5]", "icl_tasks: {a: b}", "[: {"):
        (folder / "core.yaml").write_text(text)
        with pytest.raises(UserError, match="not a complete CORE bundle") as error:
            run_core(folder)
        assert "\n" not in str(error.value)
    entry = "{label: lm, dataset_uri: lm.jsonl, icl_task_type: language_modeling, num_fewshot: []}"
    (folder / "core.yaml").write_text(f"icl_tasks: [{entry}]")
    (folder / "eval_data" / "lm.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not a complete CORE bundle"):
        run_core(folder)


def test_unknown_task_types_are_refused(tmp_path):
    folder = bundle(tmp_path, [("odd", "essay", 0, None, 0, [{"query": "q"}])])
    with pytest.raises(UserError, match="odd has the unknown type 'essay'"):
        run_core(folder)
