"""Conversations: what is accepted, and that rows hold each of them once with the right targets."""

import itertools
import json
import random

import numpy as np
import pytest

from nanochat_jax.config import DataConfig, FinetuneConfig
from nanochat_jax.data import conversations as module
from nanochat_jax.data.conversations import read_jsonl, validate
from nanochat_jax.data.position import digest
from nanochat_jax.errors import UserError
from nanochat_jax.tasks import Mixture
from nanochat_jax.tokenizer import Tokenizer


def packed(rows_of):
    def call(conversations, tokenizer, *, packing, loss_on, **options):
        settings = FinetuneConfig(packing=packing, loss_on=loss_on)
        return rows_of(conversations, tokenizer, settings=settings, **options)

    return call


conversation_batches, epoch_rows = packed(module.conversation_batches), packed(module.epoch_rows)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


def made_up(seed, count, longest):
    """Conversations that all differ, some longer than others, some with tool calls, some that begin with a long question."""
    rng = random.Random(seed)

    def words(limit):
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(1, limit)))

    conversations = []
    for i in range(count):
        messages = [{"role": "system", "content": "rules"}] if rng.random() < 0.2 else []
        for _ in range(rng.randrange(1, 4)):
            messages.append({"role": "user", "content": f"{i}? {words(longest)}"})
            answer = words(longest // 2)
            if rng.random() < 0.3:
                call = {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}
                answer = [{"type": "text", "text": answer}, *call]
            messages.append({"role": "assistant", "content": answer})
        conversations.append({"messages": messages})
    return conversations


def expected_conversations(conversations, tokenizer, sequence_len, loss_on):
    """(ids, learned) of each conversation that stays, and how many were cut and dropped, by the rule."""
    kept, truncated, dropped = [], 0, 0
    for conversation in conversations:
        ids, mask = tokenizer.render(conversation)
        learned = mask if loss_on == "assistant" else [1] * len(ids)
        if any(learned[1:sequence_len]):
            kept.append((ids[:sequence_len], learned[:sequence_len]))
            truncated += len(ids) > sequence_len
        else:
            dropped += 1
    return kept, truncated, dropped


def split(inputs, targets, bos_id):
    """The conversations of a row as (ids, learned), read off its tokens: each begins with BOS, padding is BOS alone."""
    tokens = [*inputs.tolist(), 0]
    learned = [False, *(targets >= 0).tolist()]
    # The last token stands only among the targets, where it shows only if it is learned.
    tokens[-1] = int(targets[-1]) if targets[-1] >= 0 else bos_id
    starts = [i for i, token in enumerate(tokens) if token == bos_id] + [len(tokens)]
    pieces = [(tokens[a:b], learned[a:b]) for a, b in itertools.pairwise(starts)]
    return [(ids, [bool(x) for x in flags]) for ids, flags in pieces if len(ids) > 1]


@pytest.mark.parametrize("sequence_len", [256, 512])
@pytest.mark.parametrize("packing", ["bestfit", "pad"])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_each_conversation_once_an_epoch_with_its_targets(tokenizer, sequence_len, packing, loss_on):
    conversations = made_up(sequence_len, 230, sequence_len)
    kept, truncated, dropped = expected_conversations(conversations, tokenizer, sequence_len, loss_on)
    assert truncated > 20 and (dropped > 5) == (loss_on == "assistant")
    options = dict(sequence_len=sequence_len, packing=packing, loss_on=loss_on, seed=3)
    lines = []
    count = epoch_rows(conversations, tokenizer, log=lines.append, **options)
    assert f"{truncated} longer ones cut, {dropped} without a target" in lines[0]
    batches = conversation_batches(conversations, tokenizer, rows=1, **options)
    orders = []
    for epoch in (1, 2):
        seen = []
        for batch in itertools.islice(batches, count if epoch == 1 else None):
            inputs, targets = batch["inputs"], batch["targets"]
            assert inputs.shape == targets.shape == (1, sequence_len)
            assert inputs.dtype == targets.dtype == np.int32
            assert (targets >= 0).any()
            counted = targets[0, :-1] >= 0
            assert (targets[0, :-1][counted] == inputs[0, 1:][counted]).all()
            seen += split(inputs[0], targets[0], tokenizer.bos_id)
            if len(seen) == len(kept):
                break
        # BOS is a target where another conversation follows, so that only what comes after it is compared.
        plain = sorted((ids, [bool(x) for x in learned[1:]]) for ids, learned in kept)
        assert sorted((ids, learned[1:]) for ids, learned in seen) == plain
        orders.append([ids for ids, _ in seen])
    assert orders[0] != orders[1]
    state = batches.get_state()
    assert (state["epoch"], state["truncated"], state["dropped"]) == (2, 2 * truncated, 2 * dropped)
    batches.close()


def test_later_epochs_have_orders_of_their_own_by_the_seed(tokenizer):
    conversations = made_up(1, 40, 20)

    def epochs(seed):
        batches = conversation_batches(
            conversations, tokenizer, rows=1, sequence_len=256, packing="pad", loss_on="all", seed=seed
        )
        rows = [next(batches)["inputs"].tobytes() for _ in range(3 * 40)]
        batches.close()
        return rows[:40], rows[40:80], rows[80:]

    first, second, third = epochs(1)
    assert sorted(first) == sorted(second) == sorted(third) and second != third
    assert epochs(2)[0] == first and epochs(2)[1] != second


def test_packing_is_best_fit_from_the_buffer(tokenizer):
    """The rule word for word, with a scan of the buffer."""
    conversations = made_up(11, 250, 60)
    kept, _, _ = expected_conversations(conversations, tokenizer, 256, "assistant")
    waiting, buffer, rows = [ids for ids, _ in kept], [], []
    while waiting or buffer:
        row, fitting = [], True
        while fitting:
            while len(buffer) < 100 and waiting:
                buffer.append(waiting.pop(0))
            fitting = [i for i, ids in enumerate(buffer) if len(ids) <= 257 - len(row)]
            if fitting:
                row += buffer.pop(max(fitting, key=lambda i: (len(buffer[i]), -i)))
        rows.append(row + [tokenizer.bos_id] * (257 - len(row)))
    options = dict(sequence_len=256, packing="bestfit", loss_on="assistant", seed=0)
    assert epoch_rows(conversations, tokenizer, **options) == len(rows)
    batches = conversation_batches(conversations, tokenizer, rows=1, **options)
    assert [next(batches)["inputs"][0].tolist() for _ in rows] == [row[:-1] for row in rows]
    used = sum(len(ids) for ids, _ in kept) / (257 * len(rows))
    assert used > 0.9


def test_batches_deal_the_same_rows(tokenizer):
    conversations = made_up(5, 60, 100)
    options = dict(sequence_len=256, packing="bestfit", loss_on="all", seed=1)
    single = conversation_batches(conversations, tokenizer, rows=1, **options)
    wide = conversation_batches(conversations, tokenizer, rows=7, **options)
    for _ in range(10):
        batch = next(wide)
        for i in range(7):
            row = next(single)
            assert (batch["inputs"][i] == row["inputs"][0]).all() and (batch["targets"][i] == row["targets"][0]).all()
    single.close()
    wide.close()


@pytest.mark.parametrize("packing", ["bestfit", "pad"])
def test_resume_gives_the_batches_that_would_have_come(tokenizer, packing):
    conversations = made_up(8, 150, 200)
    options = dict(rows=3, sequence_len=256, packing=packing, loss_on="assistant", seed=2)
    whole = conversation_batches(conversations, tokenizer, **options)
    states, expected = [whole.get_state()], []
    for _ in range(70):
        expected.append(next(whole))
        states.append(whole.get_state())
    assert states[-1]["epoch"] > 1
    used = conversation_batches(conversations, tokenizer, **options)
    next(used)
    for at in (0, 1, 13, 40, 60):
        state = json.loads(json.dumps(states[at]))
        used.set_state(state)
        assert used.get_state() == state
        for i in range(at, at + 8):
            batch = next(used)
            assert (batch["inputs"] == expected[i]["inputs"]).all()
            assert (batch["targets"] == expected[i]["targets"]).all()
        assert used.get_state() == states[at + 8]
    other = conversation_batches(conversations[:-1], tokenizer, **options)
    with pytest.raises(UserError, match="number of conversations was 150, now 149"):
        other.set_state(states[3])
    for batches in (whole, used, other):
        batches.close()


def test_own_conversations_that_were_edited_are_other_data(tokenizer, tmp_path):
    """Whichever line it was; those that are not taken may change."""
    path, turns = tmp_path / "own.jsonl", [conversation["messages"] for conversation in made_up(8, 150, 200)]

    def batches():
        path.write_text("\n".join(map(json.dumps, turns)))
        rows = Mixture((f"{path}:149",), "train", DataConfig())
        return conversation_batches(rows, tokenizer, rows=3, sequence_len=256, packing="pad", loss_on="all", seed=2)

    state = batches().get_state()
    for line in range(0, 150, 10):
        turns[line][0]["content"] += "!"
        with pytest.raises(UserError, match=r"saved position belongs to other data: .* was .* --force to read"):
            batches().set_state(state)
        turns[line][0]["content"] = turns[line][0]["content"][:-1]
    turns[149][0]["content"] += "!"
    batches().set_state(state)
    del state["origin"]["own conversations"]  # as older positions have none
    batches().set_state(state)


def test_nothing_to_learn_is_an_error(tokenizer):
    long_question = {"messages": [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y"}]}
    options = dict(sequence_len=32, packing="bestfit", loss_on="assistant", seed=0)
    for conversations in ([long_question], []):
        with pytest.raises(UserError, match="has a target within 32 tokens"):
            next(conversation_batches(conversations, tokenizer, rows=1, **options))
        assert epoch_rows(conversations, tokenizer, **options) == 0


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [SYSTEM, USER, ANSWER, USER],
        [USER, {"role": "assistant", "content": [{"type": "python", "text": "1"}, {"type": "text", "text": "x"}]}],
    ],
)
def test_good_conversations_pass(messages, tmp_path):
    good = {"messages": messages, "source": "elsewhere"}
    (tmp_path / "own.jsonl").write_text(json.dumps(good))
    assert read_jsonl(tmp_path / "own.jsonl") == [good]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("text", 'not an object with a list "messages"'),
        ({"messages": "text"}, 'not an object with a list "messages"'),
        ({"messages": []}, "0 messages"),
        ({"messages": [USER]}, "1 messages"),
        ({"messages": [SYSTEM, USER]}, "2 messages"),
        ({"messages": [USER, "text"]}, "message 2: not an object"),
        ({"messages": [ANSWER, USER]}, "message 1: role 'assistant' where \"user\""),
        ({"messages": [USER, USER, ANSWER]}, "message 2: role 'user' where \"assistant\""),
        ({"messages": [USER, SYSTEM]}, "message 2: role 'system'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: content of the assistant must be text, not NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, ANSWER]}, "message 1: content"),
        ({"messages": [USER, {"role": "assistant", "content": ["x"]}]}, "message 2, part 1"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}]}, "message 2, part 1"),
    ],
)
def test_bad_conversations_are_told_what_is_wrong(conversation, message):
    with pytest.raises(UserError) as caught:
        validate(conversation, "here")
    assert str(caught.value).startswith("here") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl_names_the_line(tmp_path):
    path = tmp_path / "own.jsonl"
    good = json.dumps({"messages": [USER, ANSWER]})
    path.write_text(good + "\n\n" + json.dumps([USER, ANSWER]) + "\n")
    assert read_jsonl(path) == [{"messages": [USER, ANSWER]}] * 2
    path.write_text(f"{good}\r\n", encoding="utf-8-sig")  # as editors on Windows leave it
    assert read_jsonl(path) == [{"messages": [USER, ANSWER]}]
    for bad, message in (
        ("{", "line 3: not JSON"),
        ("[" * 100_000, "line 3: not JSON"),
        (json.dumps({"messages": [USER]}), "line 3: 1 messages"),
    ):
        path.write_text(f"{good}\n\n{bad}\n{good}\n")
        with pytest.raises(UserError, match=message):
            read_jsonl(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no conversation"):
        read_jsonl(path)
    path.write_bytes(f"{good}\n".encode() + b'{"messages": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not JSON in UTF-8"):
        read_jsonl(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path / "missing.jsonl")


def test_the_digest_sees_every_row_of_a_small_set():
    rows = [{"n": i} for i in range(10)]
    assert len({digest(rows), *(digest([*rows[:i], {"n": -1}, *rows[i + 1 :]]) for i in range(10))}) == 11
