"""Tasks: what rows become, that answers are right and splits disjoint, how completions are graded, where rows come from."""

import json
import random
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.config import DataConfig
from nanochat_jax.data.conversations import validate
from nanochat_jax.errors import UserError
from nanochat_jax.inference.sandbox import require_isolation
from nanochat_jax.inference.tools import evaluate_tool
from nanochat_jax.tasks import LOADERS, NOT_TO_GRADE, TO_REINFORCE, Mixture, gsm8k, load
from nanochat_jax.tasks.humaneval import code, imports
from nanochat_jax.tasks.task import SPLITS

OFFLINE = ("arithmetic", "simple_spelling", "spelling_bee", "choice")
DATA = DataConfig()


def question(conversation):
    return conversation["messages"][0]["content"]


def answer(conversation):
    """The reference answer as the engine would decode it, tool calls visible."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    marks = {
        "text": ("", ""),
        "python": ("<|python_start|>", "<|python_end|>"),
        "python_output": ("<|output_start|>", "<|output_end|>"),
    }
    return "".join(part["text"].join(marks[part["type"]]) for part in content)


# Offline tasks


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_reference_answers_are_valid_and_right(name, split):
    task = load(name, split, DATA)
    assert len(task) >= 1000
    for i in range(0, 1000, 20):
        conversation = task[i]
        validate(conversation, name)
        assert task.grade(conversation, answer(conversation))
        assert not task.grade(conversation, "") and not task.grade(conversation, "no idea")


@pytest.mark.parametrize("name", OFFLINE)
def test_rows_depend_on_the_seed_in_training_only(name):
    def rows(split, seed):
        task = load(name, split, DATA, seed)
        return [task[i] for i in range(30)]

    assert rows("train", 1) == rows("train", 1) != rows("train", 2)
    assert rows("test", 1) == rows("test", 2)


def arithmetic_rows(split):
    """(a, b, sign, question, parts) of a whole split, read from the tool call."""
    for conversation in load("arithmetic", split, DATA):
        parts = conversation["messages"][-1]["content"]
        a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", parts[0]["text"]).groups()
        yield int(a), int(b), sign, question(conversation), parts


def test_arithmetic_calls_the_tool_with_the_numbers_asked_for():
    wordings = set()
    for a, b, sign, text, parts in arithmetic_rows("val"):
        assert [int(n) for n in re.findall(r"\d+", text)] == [a, b] and a < 100 and b < 100
        assert parts[1]["text"] == evaluate_tool(parts[0]["text"])
        assert parts[2]["text"] == f"The answer is {parts[1]['text']}."
        wordings.add(text.replace(sign, "?").replace(str(a), "a", 1)[:9])
        if text == f"What is {a} + {b}?":
            wordings.add("sum")
    assert "sum" in wordings and len(wordings) > 3


def test_arithmetic_pairs_are_in_one_split():
    pairs = {s: {(min(a, b), max(a, b)) for a, b, *_ in arithmetic_rows(s)} for s in ("train", "val", "test")}
    assert len(pairs["train"] | pairs["val"] | pairs["test"]) == sum(map(len, pairs.values())) == 100 * 101 // 2
    assert min(map(len, pairs.values())) > 300


def test_number_graders_take_the_last_number_after_the_tool():
    task = load("arithmetic", "test", DATA)
    conversation = {"messages": [], "answer": "-25"}
    call = "<|python_start|>46-71<|python_end|><|output_start|>-25<|output_end|>"
    assert task.grade(conversation, f"{call}The answer is -25.")
    assert task.grade(conversation, "First 46, then 71, so -25.")
    assert not task.grade(conversation, call)
    assert not task.grade(conversation, f"{call}The answer is 25.")
    assert not task.grade(conversation, f"-25{call}The answer is -25, not 25")
    assert task.grade({"messages": [], "answer": "9801"}, "It is 9,801.0")


def words_of(name, split):
    task = load(name, split, DATA)
    return {answer(task[i]).partition(":")[0] for i in range(min(len(task), 8000))}


def test_words_are_in_one_split():
    words = {split: words_of("simple_spelling", split) for split in ("train", "val", "test")}
    assert min(map(len, words.values())) > 500
    assert sum(map(len, words.values())) == len(set.union(*words.values()))


def test_spelling_bee_checks_itself_with_the_tool():
    task = load("spelling_bee", "test", DATA)
    questions = set()
    for i in range(200):
        parts = {part["type"]: part["text"] for part in task[i]["messages"][-1]["content"]}
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", parts["python"]).groups()
        assert evaluate_tool(parts["python"]) == parts["python_output"] == task[i]["answer"]
        assert parts["text"].endswith(f"#### {word.count(letter)}")
        assert re.search(rf"\b{word}\b", question(task[i])) and re.search(rf"\b{letter}\b", question(task[i]))
        questions.add(question(task[i]).replace(word, "w").replace(f"'{letter}'", letter)[:14])
    assert len(questions) > 10
    assert not task.grade(task[0], answer(task[0]).replace("####", "So"))


def test_choice_has_one_right_letter_and_disjoint_questions():
    seen = {}
    for split in ("train", "test"):
        task, seen[split] = load("choice", split, DATA), set()
        assert task.kind == "categorical"
        for i in range(300):
            text, letter = question(task[i]), answer(task[i])
            assert text.startswith("Multiple Choice question: Which ") and text.endswith(
                "\n\nRespond only with the letter of the correct answer."
            )
            choices = dict(reversed(line[2:].rsplit("=", 1)) for line in text.splitlines() if line.startswith("- "))
            assert list(choices) == list("ABCD") == list(task[i]["letters"]) and len(set(choices.values())) == 4
            if "largest" in text or "smallest" in text:
                values = sorted(map(int, choices.values()))
                assert int(choices[letter]) == values[-1 if "largest" in text else 0]
                seen[split].add(tuple(values))
            elif "next" in text:
                series = [int(n) for n in re.findall(r"\d+", text.partition("?")[0])]
                assert int(choices[letter]) == 2 * series[-1] - series[-2]
                seen[split].add(tuple(series))
            else:
                seen[split].add(frozenset((text.partition("?")[0].split()[-1], choices[letter])))
    assert seen["train"].isdisjoint(seen["test"])


def test_identity_has_hundreds_of_variations():
    task = load("identity", "train", DATA)
    for i in range(0, len(task), 10):
        validate(task[i], "identity")
    texts = {json.dumps(task[i]) for i in range(len(task))}
    assert len(texts) > 500 and sum("nanochat-jax" in text for text in texts) > 200
    with pytest.raises(UserError, match="right answer"):
        task.grade(task[0], "hello")


# Mixtures


def test_mixture_takes_rows_and_epochs_and_shuffles(tmp_path):
    own = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(4)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, own)))
    mixture = Mixture(("arithmetic:5*2", "choice:3", f"{path}:3*2", "identity:1000000"), "train", DATA, seed=42)
    assert len(mixture) == 10 + 3 + 6 + 1000
    arithmetic, choice = load("arithmetic", "train", DATA), load("choice", "train", DATA)
    expected = [arithmetic[i] for i in range(5)] * 2 + [choice[i] for i in range(3)] + own[:3] * 2
    expected += list(load("identity", "train", DATA))
    random.Random(42).shuffle(expected)
    assert list(mixture) == expected
    assert mixture[-1] == expected[-1]


@pytest.mark.parametrize("spec", ["", "nothing", "arithmetic:many", "arithmetic*2:3", ":5", "nothing.jsonl"])
def test_bad_mixture_entries(spec):
    with pytest.raises(UserError) as error:
        Mixture((spec,), "train", DATA)
    assert "\n" not in str(error.value)


def test_unknown_names_and_splits():
    with pytest.raises(UserError, match=r"unknown task 'mmul'.*mmlu"):
        load("mmul", "test", DATA)
    for name, split in [
        ("arithmetic", "dev"),
        ("mmlu", "train"),
        ("mmlu_aux", "test"),
        ("humaneval", "train"),
        ("identity", "test"),
    ]:
        with pytest.raises(UserError, match=f"{name} has no split '{split}'"):
            load(name, split, DATA)


# Sets from a mirror or Hugging Face


def mirrored(tmp_path, place, rows):
    """A mirror folder with one file of rows."""
    path = tmp_path / f"{place}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return DataConfig(mirror=str(tmp_path), cache=str(tmp_path / "cache"))


def mmlu_rows(n):
    return [{"question": f"q{i}", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": i % 4} for i in range(n)]


def gsm8k_rows(n):
    return [
        {
            "question": f"q{i}",
            "answer": f"It is 60/12 = $<<60/12=5>>5.\nSo 5*{i} = <<5*{i}={5 * i}>>{5 * i},000.\n#### {5 * i},000",
        }
        for i in range(n)
    ]


def test_rows_come_in_the_fixed_permutation(tmp_path):
    data = mirrored(tmp_path, "cais/mmlu/all/test", mmlu_rows(50))
    order = np.random.default_rng(42).permutation(50)
    for seed in (1, 2):
        task = load("mmlu", "test", data, seed)
        assert [question(c).splitlines()[0] for c in task] == [f"Multiple Choice question: q{i}" for i in order]
    assert task[0]["subject"] == "s"  # without it the positions that runs have saved are of other data
    assert question(task[0]).splitlines()[1:] == [
        "- w=A",
        "- x=B",
        "- y=C",
        "- z=D",
        "",
        "Respond only with the letter of the correct answer.",
    ]
    assert answer(task[0]) == "ABCD"[order[0] % 4] and task.kind == "categorical"


@pytest.mark.parametrize("nested", [False, True])
def test_mmlu_auxiliary_in_both_layouts(tmp_path, nested):
    rows = mmlu_rows(8)
    place = "cais/mmlu/auxiliary_train/train" if nested else "cais/mmlu/all/auxiliary_train"
    data = mirrored(tmp_path, place, [{"train": row} for row in rows] if nested else rows)
    task = load("mmlu_aux", "train", data)
    assert len(task) == 8 and {answer(c) for c in task} == set("ABCD")


@pytest.mark.parametrize(
    ("name", "place", "row", "words"),
    [
        ("mmlu", "cais/mmlu/all/test", {"question": None}, "1 of 5 rows have no question"),
        ("mmlu", "cais/mmlu/all/test", {"answer": -1}, "mmlu: 4 choices and answer -1"),
        ("mmlu", "cais/mmlu/all/test", {"choices": ["x", "y", "z"]}, "mmlu: 3 choices"),
        ("gsm8k", "openai/gsm8k/main/test", {"answer": None}, "1 of 5 rows have no answer"),
        ("gsm8k", "openai/gsm8k/main/test", {"answer": "It is five."}, "an answer without '#### NUMBER', to 'q2'"),
    ],
)
def test_rows_that_cannot_be_are_one_clear_line(tmp_path, name, place, row, words):
    rows = mmlu_rows(5) if name == "mmlu" else gsm8k_rows(5)
    rows[2] |= row
    with pytest.raises(UserError, match=words):
        list(load(name, "test", mirrored(tmp_path, place, rows)))


def test_own_conversations_repeated_are_held_out_once(tmp_path):
    lines = [
        json.dumps([{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]) for i in range(50)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(lines))
    train, held_out = Mixture((f"{file}*10",), "train", DataConfig()).split(256)
    assert len(held_out) == 5 and len(train) == 450
    assert not {question(c) for c in train} & {question(c) for c in held_out}


def test_gsm8k_holds_out_the_end_of_the_training_rows(tmp_path):
    data = mirrored(tmp_path, "openai/gsm8k/main/train", gsm8k_rows(4500))
    mirrored(tmp_path, "openai/gsm8k/main/test", gsm8k_rows(3))
    order = [f"q{i}" for i in np.random.default_rng(42).permutation(4500)]
    assert [question(c) for c in load("gsm8k", "train", data, 7)] == order[:-400]
    assert [question(c) for c in load("gsm8k", "val", data, 8)] == order[-400:]
    assert len(load("gsm8k", "test", data)) == 3
    few = mirrored(tmp_path / "few", "openai/gsm8k/main/train", gsm8k_rows(9))
    assert len(load("gsm8k", "train", few)) == 9
    with pytest.raises(UserError, match="gsm8k: 9 training rows, too few"):
        load("gsm8k", "val", few)


def test_gsm8k_answers_become_tool_calls_and_are_graded(tmp_path):
    task = load("gsm8k", "test", mirrored(tmp_path, "openai/gsm8k/main/test", gsm8k_rows(8)[7:]))
    conversation = task[0]
    validate(conversation, "gsm8k")
    assert [(p["type"], p["text"]) for p in conversation["messages"][-1]["content"]] == [
        ("text", "It is 60/12 = $"),
        ("python", "60/12"),
        ("python_output", "5"),
        ("text", "5.\nSo 5*7 = "),
        ("python", "5*7"),
        ("python_output", "35"),
        ("text", "35,000.\n#### 35,000"),
    ]
    assert task.grade(conversation, answer(conversation)) and task.grade(conversation, "#### 35000 #### 1")
    assert not any(
        task.grade(conversation, text)
        for text in ("35000", "#### 35000.0", "#### 1 #### 35000", "####35000", "#### 3500", "#### 350001")
    )


def test_gsm8k_brackets_that_are_no_whole_call_lose_no_text():
    row = {"question": "q", "answer": "<<5+5>>10, <<>>, <<2>1\n#### 12"}
    conversation = gsm8k.conversation(row)
    assert conversation["answer"] == "12"
    assert [(p["type"], p["text"]) for p in conversation["messages"][-1]["content"]] == [
        ("python", "5+5"),
        ("python_output", ""),
        ("text", "10, <<>>, <<2>1\n#### 12"),
    ]
    (text,) = gsm8k.conversation(row | {"answer": "<<1+1=2\n#### 2"})["messages"][-1]["content"]
    assert text == {"type": "text", "text": "<<1+1=2\n#### 2"}


def test_arc_keeps_the_labels_of_its_rows(tmp_path):
    rows = [
        {"id": "a", "question": "qa", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"id": "b", "question": "qb", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
    ]
    data = mirrored(tmp_path, "allenai/ai2_arc/ARC-Challenge/validation", rows)
    by_question = {question(c).splitlines()[0][-2:]: c for c in load("arc_challenge", "val", data)}
    assert by_question["qa"]["letters"] == ("1", "2", "3") and answer(by_question["qa"]) == "3"
    assert "- z=3\n\nRespond" in question(by_question["qa"]) and "- z=E\n\nRespond" in question(by_question["qb"])
    with pytest.raises(UserError, match=r"ARC-Easy.*test\.parquet"):
        load("arc_easy", "test", data)


def test_smoltalk_passes_conversations_on(tmp_path):
    messages = [{"content": "hi", "role": "user"}, {"content": "hello", "role": "assistant"}]
    data = mirrored(tmp_path, "HuggingFaceTB/smol-smoltalk/default/train", [{"messages": messages, "source": "s"}])
    assert list(load("smoltalk", "train", data)) == [{"messages": messages}]


def test_mirror_mistakes_are_one_line(tmp_path):
    data = mirrored(tmp_path, "cais/mmlu/all/test", [{"question": "q"}])
    (tmp_path / "cais/mmlu/all/validation.parquet").write_bytes(b"PAR1 not really")
    for name, split, words in [
        ("mmlu", "test", "answer"),
        ("mmlu", "val", r"Parquet magic bytes .*validation\.parquet"),
        ("gsm8k", "train", r"FileNotFoundError.*train\.parquet"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            load(name, split, data)
        assert "\n" not in str(error.value)


def test_without_a_mirror_sets_come_through_datasets(monkeypatch, tmp_path):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(gsm8k_rows(5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig(cache=str(tmp_path))
    assert len(load("gsm8k", "test", data)) == 5
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "cache_dir": str(tmp_path / "datasets")})]

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"no route to host\).*--data\.mirror") as error:
        load("gsm8k", "test", data)
    assert "\n" not in str(error.value)


# HumanEval

PROMPT = 'from math import sqrt\n\n\ndef root(x):\n    """The root of x.\n    >>> root(4)\n    2\n    """\n'
TEST = "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(16) == 4\n"
PROBLEM = {
    "task_id": "t/0",
    "prompt": PROMPT,
    "canonical_solution": "    return sqrt(x)\n",
    "test": TEST,
    "entry_point": "root",
}


@pytest.mark.parametrize("name", LOADERS)
def test_what_a_task_can_be_used_for_is_what_its_splits_allow(name, tmp_path):
    """The tables by which options are checked before any set is loaded."""

    def lacks(split):
        try:
            load(name, split, DataConfig(mirror=str(tmp_path), cache=str(tmp_path)), unsafe_sandbox=True)
        except UserError as error:
            return "has no split" in str(error)
        return False

    assert lacks("train") == (name in ("mmlu", "humaneval"))
    assert lacks("test") == (name in NOT_TO_GRADE and name != "smoltalk")  # which has a test set, but no answers
    if name in TO_REINFORCE:
        assert not any(map(lacks, SPLITS))


def test_humaneval_takes_imports_and_the_last_block_of_python():
    assert imports(PROMPT + "import_this = 1\n") == "from math import sqrt"
    for completion, block in (
        ("So:\n```python\na\n```\nor\n```\nb\n```\ndone", "b"),
        ("```bash\nls\n```\nNow the function:\n```Python\r\ndef f(x):\r\n  pass\r\n```", "def f(x):\r\n  pass"),
        ("```py\ndef f(x): 1\n```\nIt prints\n```text\n1\n```\nRun it: ```sh\n./f\n```", "def f(x): 1"),
        ("```python\ndef f(x):\n    return '```' + x\n```\ndone", "def f(x):\n    return '```' + x"),
        ("```python\ndef f(x): 1```", "def f(x): 1"),
        (" def f(x): 1", "def f(x): 1"),
    ):
        assert code(completion) == block


def test_humaneval_runs_the_tests_to_the_end(tmp_path):
    data = mirrored(tmp_path, "openai/openai_humaneval/openai_humaneval/test", [PROBLEM])
    outside = load("humaneval", "test", data, unsafe_sandbox=True)
    assert outside.grade(outside[0], answer(outside[0])) and not outside.grade(outside[0], "raise SystemExit(0)")
    try:
        require_isolation()
    except UserError:
        with pytest.raises(UserError, match="--unsafe-sandbox"):
            load("humaneval", "test", data)
        return
    task = load("humaneval", "test", data)
    conversation = task[0]
    assert question(conversation) == PROMPT and task.grade(conversation, answer(conversation))
    right = "def root(x):\n    return sqrt(x)\n"
    assert task.grade(conversation, right) and task.grade(conversation, f"Here:\n```python\n{right}```")
    wrong = [
        "def root(x):\n    return 3",
        "def root(x):\n    raise SystemExit(0)",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        f"```python\n{right}```\n```\nno program\n```",
        "",
    ]
    assert not any(task.grade(conversation, completion) for completion in wrong)


def test_every_name_of_the_documented_tasks_is_there():
    names = "arithmetic multistep simple_spelling spelling_bee choice smoltalk mmlu mmlu_aux gsm8k arc_easy"
    assert set(LOADERS) == {*names.split(), "arc_challenge", "humaneval", "identity"}
