"""Packing of pretraining text, compared with a slow transcription of the rule, and resume to the exact batch."""

import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.config import DataConfig
from nanochat_jax.data import pretrain
from nanochat_jax.data.packing import BestFitBuffer
from nanochat_jax.data.pretrain import merge_states
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import SPECIALS, Tokenizer


def packed(batches):
    def call(files, tokenizer, *, packing, streams=1, buffer_docs=1000, **options):
        data = DataConfig(packing=packing, streams=streams, buffer_docs=buffer_docs)
        return batches(files, tokenizer, data, **options)

    return call


pretrain_batches, validation_batches = packed(pretrain.pretrain_batches), packed(pretrain.validation_batches)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


def write_shards(folder, seed, sizes, longest=40):
    """Parquet files; `sizes` holds the rows of each row group of each file. Every character tells its document apart."""
    rng = random.Random(seed)
    files = []
    for number, groups in enumerate(sizes):
        path = folder / f"shard_{number:05d}.parquet"
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for rows in groups:
                texts = [
                    "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(longest))) for _ in range(rows)
                ]
                writer.write_table(pa.table({"text": pa.array(texts, pa.string())}), row_group_size=max(rows, 1))
        files.append(path)
    return files


def slices_for_ever(files, stream, streams):
    """Lists of at most 128 texts, as the rule has them."""
    while True:
        for path in files:
            file = pq.ParquetFile(path)
            for group in range(stream, file.num_row_groups, streams):
                texts = file.read_row_group(group).column("text").to_pylist()
                for start in range(0, len(texts), 128):
                    yield texts[start : start + 128]


def slow_bestfit_rows(files, stream, streams, tokenizer, size, buffer_docs):
    """The packing rule word for word: look at every buffered document for every placement."""
    slices = slices_for_ever(files, stream, streams)
    buffer = []
    while True:
        row = []
        while len(row) < size:
            while len(buffer) < buffer_docs:
                buffer.extend([tokenizer.bos_id, *tokenizer.encode(text)] for text in next(slices))
            rest = size - len(row)
            fitting = [i for i, document in enumerate(buffer) if len(document) <= rest]
            if fitting:
                chosen = max(fitting, key=lambda i: (len(buffer[i]), -i))
            else:
                chosen = min(range(len(buffer)), key=lambda i: (len(buffer[i]), i))
            row += buffer.pop(chosen)[:rest]
        yield row


def slow_stream_rows(files, stream, streams, tokenizer, size):
    tokens = (
        token
        for texts in slices_for_ever(files, stream, streams)
        for text in texts
        for token in [tokenizer.bos_id, *tokenizer.encode(text)]
    )
    last = next(tokens)
    while True:
        row = [last, *itertools.islice(tokens, size - 1)]
        yield row
        last = row[-1]


def rows_of(batches, count):
    """Rows of T+1 tokens, put together again from inputs and targets."""
    rows = []
    for batch in itertools.islice(batches, count):
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        rows += np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1).tolist()
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_bestfit_is_the_rule(tmp_path, tokenizer, seed):
    rng = random.Random(seed)
    streams = rng.choice([1, 2, 3])
    sizes = [[rng.choice([0, 1, 5, 127, 128, 129, 300]) for _ in range(rng.randrange(3, 6))] for _ in range(2)]
    files = write_shards(tmp_path, seed, sizes, longest=rng.choice([20, 60]))
    sequence_len, buffer_docs = rng.choice([31, 50]), rng.choice([1, 40, 200])
    batches = pretrain_batches(
        files,
        tokenizer,
        rows=4,
        sequence_len=sequence_len,
        packing="bestfit",
        streams=streams,
        buffer_docs=buffer_docs,
    )
    slow = [slow_bestfit_rows(files, s, streams, tokenizer, sequence_len + 1, buffer_docs) for s in range(streams)]
    expected = [next(slow[i % streams]) for i in range(4 * 250)]
    assert rows_of(batches, 250) == expected
    batches.close()


@pytest.mark.parametrize("streams", [1, 2])
def test_stream_joins_documents_and_overlaps_by_one(tmp_path, tokenizer, streams):
    files = write_shards(tmp_path, 3, [[130, 20], [7, 0, 40]])
    batches = pretrain_batches(files, tokenizer, rows=3, sequence_len=64, packing="stream", streams=streams)
    slow = [slow_stream_rows(files, s, streams, tokenizer, 65) for s in range(streams)]
    assert rows_of(batches, 60) == [next(slow[i % streams]) for i in range(180)]
    batches.close()


def test_every_bestfit_row_begins_with_bos(tmp_path, tokenizer):
    files = write_shards(tmp_path, 5, [[200, 100]])
    batches = pretrain_batches(files, tokenizer, rows=8, sequence_len=48, packing="bestfit", buffer_docs=50)
    for batch in itertools.islice(batches, 20):
        assert (batch["inputs"][:, 0] == tokenizer.bos_id).all()
        assert (batch["targets"] >= 0).all()
    batches.close()


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_resume_gives_the_batches_that_would_have_come(tmp_path, tokenizer, packing):
    files = write_shards(tmp_path, 7, [[200, 90], [150, 1, 140]])
    options = dict(sequence_len=37, packing=packing, streams=2, buffer_docs=60)
    whole = pretrain_batches(files, tokenizer, rows=3, **options)
    expected, states = [], [whole.get_state()]
    for _ in range(80):
        expected += rows_of(whole, 1)
        states.append(whole.get_state())
    used = pretrain_batches(files, tokenizer, rows=3, **options)
    rows_of(used, 9)
    for at in (0, 1, 2, 17, 50, 70):
        state = json.loads(json.dumps(states[at]))
        for batches in (used, pretrain_batches(files, tokenizer, rows=3, **options)):
            batches.set_state(state)
            assert batches.get_state() == state
            assert rows_of(batches, 10) == expected[at * 3 : at * 3 + 30]
            assert batches.get_state() == states[at + 10]
    # Another number of rows a batch goes on at the same row.
    wider = pretrain_batches(files, tokenizer, rows=5, **options)
    wider.set_state(states[20])
    assert rows_of(wider, 6) == expected[60:90]
    for batches in (whole, used, wider):
        batches.close()


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes(tmp_path, tokenizer, packing):
    files = write_shards(tmp_path, 7, [[60, 90, 50, 70, 40], [80, 30, 140, 20]])
    options = dict(rows=8, sequence_len=37, packing=packing, streams=4, buffer_docs=20)

    def processes(count, state=None):
        parts = [
            pretrain_batches(files, tokenizer, process_index=i, process_count=count, **options) for i in range(count)
        ]
        for part in parts if state else []:
            part.set_state(state)
        return parts

    def step(parts):
        rows = [rows_of(part, 1) for part in parts]
        assert {len(of_one) for of_one in rows} == {8 // len(parts)}
        return sorted(row for of_one in rows for row in of_one)

    def position(parts):
        return merge_states([json.loads(json.dumps(part.get_state())) for part in parts])

    alone = processes(1)
    expected = [step(alone) for _ in range(40)]
    parts, given = processes(2), []
    for count in (2, 1, 4, 2, 4):
        parts = processes(count, position(parts))
        given += [step(parts) for _ in range(8)]
    assert given == expected
    assert position(parts) == alone[0].get_state()


def test_what_cannot_be_dealt_to_processes_is_said(tmp_path, tokenizer):
    files = write_shards(tmp_path, 7, [[60, 90, 50, 70]])
    options = dict(sequence_len=16, packing="stream")
    with pytest.raises(UserError, match=r"--data.streams 3 cannot be dealt to 2 processes .* a multiple of 2"):
        pretrain_batches(files, tokenizer, rows=6, streams=3, process_count=2, **options)
    with pytest.raises(UserError, match=r"6 rows of a step are no multiple of --data.streams 4"):
        pretrain_batches(files, tokenizer, rows=6, streams=4, process_count=2, **options)
    alone = pretrain_batches(files, tokenizer, rows=3, streams=2, **options)
    next(alone)
    with pytest.raises(UserError, match="between two rounds of the 2 data streams"):
        pretrain_batches(files, tokenizer, rows=4, streams=2, process_count=2, **options).set_state(alone.get_state())


def test_state_is_small(tmp_path, tokenizer):
    files = write_shards(tmp_path, 8, [[1000, 1000]])
    batches = pretrain_batches(files, tokenizer, rows=2, sequence_len=64, packing="bestfit")
    next(batches)
    assert len(json.dumps(batches.get_state())) < 15_000
    batches.close()


def test_a_position_of_other_data_is_refused(tmp_path, tokenizer):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files, others = write_shards(tmp_path / "a", 1, [[50], [50]]), write_shards(tmp_path / "b", 2, [[50], [60]])
    options = dict(rows=1, sequence_len=16, packing="stream")
    state = pretrain_batches(files, tokenizer, **options).get_state()
    pretrain_batches(files, tokenizer, **options).set_state(state)
    with pytest.raises(UserError, match="training files was"):
        pretrain_batches(others, tokenizer, **options).set_state(state)
    with pytest.raises(UserError, match="packing was stream, now bestfit"):
        pretrain_batches(files, tokenizer, **(options | {"packing": "bestfit"})).set_state(state)
    with pytest.raises(UserError, match="tokenizer was"):
        longer = Tokenizer([*(bytes([i]) for i in range(256)), b"aa"])
        pretrain_batches(files, longer, **options).set_state(state)


def test_a_stream_without_row_groups_is_an_error(tmp_path, tokenizer):
    files = write_shards(tmp_path, 1, [[5, 5], [5, 5, 5]])
    options = dict(rows=1, sequence_len=16, packing="stream")
    next(pretrain_batches(files, tokenizer, streams=3, **options))
    with pytest.raises(UserError, match=r"--data.streams 4: stream 3 has no row group"):
        pretrain_batches(files, tokenizer, streams=4, **options)


def test_damage_found_by_the_thread_reaches_the_caller(tmp_path, tokenizer):
    (path,) = write_shards(tmp_path, 1, [[50]])
    batches = pretrain_batches([path], tokenizer, rows=1, sequence_len=16, packing="stream")
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"row group 0 cannot be read"):
        next(batches)
    batches.close()


def test_validation_by_document_counts_every_token_once(tmp_path, tokenizer):
    (path,) = write_shards(tmp_path, 4, [[40, 30]], longest=100)
    texts = pq.read_table(path).column("text").to_pylist()
    batches = list(validation_batches(path, tokenizer, rows=8, sequence_len=32, packing="stream", eval_tokens=10**6))
    seen, previous = [], None
    for batch in batches:
        assert batch["inputs"].shape == batch["targets"].shape == (8, 32)
        for inputs, targets in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
            n = sum(target >= 0 for target in targets)
            assert targets[n:] == [-1] * (32 - n) and inputs[n:] == [tokenizer.bos_id] * (32 - n)
            assert inputs[1:n] == targets[: max(n - 1, 0)]
            if n and inputs[0] == tokenizer.bos_id:
                seen.append("")
            elif n:
                assert inputs[0] == previous
            if n:
                seen[-1] += tokenizer.decode(targets[:n])
                previous = targets[n - 1]
    assert seen == [text for text in texts if text]


def test_validation_stops_at_its_tokens(tmp_path, tokenizer):
    (path,) = write_shards(tmp_path, 4, [[200]], longest=100)
    for packing in ("stream", "bestfit"):
        options = dict(rows=4, sequence_len=32, packing=packing, eval_tokens=1000, buffer_docs=20)
        batches = list(validation_batches(path, tokenizer, **options))
        count = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
        assert 1000 - 32 < count <= 1000
        assert all(batch["inputs"].shape == (4, 32) for batch in batches)
        again = list(validation_batches(path, tokenizer, **options))
        assert all((a["targets"] == b["targets"]).all() for a, b in zip(batches, again, strict=True))


def test_validation_loses_no_row_to_an_exact_limit(tmp_path, tokenizer):
    (path,) = write_shards(tmp_path, 4, [[200]], longest=100)

    def targets(packing, limit):
        options = dict(rows=1, sequence_len=32, packing=packing, eval_tokens=limit, buffer_docs=20)
        return sum(int((batch["targets"] >= 0).sum()) for batch in validation_batches(path, tokenizer, **options))

    assert targets("bestfit", 64) == 64 and targets("bestfit", 63) == 32
    exact = targets("stream", 500)
    assert targets("stream", exact) == exact > targets("stream", exact - 1)


def test_bestfit_validation_packs_as_training_and_ends_with_a_small_file(tmp_path, tokenizer):
    (path,) = write_shards(tmp_path, 6, [[15] * 8], longest=30)
    options = dict(sequence_len=32, packing="bestfit", streams=2, buffer_docs=10)
    batches = list(validation_batches(path, tokenizer, rows=1, eval_tokens=10**7, **options))
    training = pretrain_batches([path], tokenizer, rows=1, **options)
    assert rows_of(iter(batches), None) == rows_of(training, len(batches))
    tokens = sum(len(text) + 1 for text in pq.read_table(path).column("text").to_pylist())
    assert tokens - 32 < len(batches) * 32 <= tokens
    with pytest.raises(UserError, match="eval-tokens 20"):
        next(validation_batches(path, tokenizer, rows=1, eval_tokens=20, **options))


def test_buffer_takes_what_a_scan_would_take():
    rng = random.Random(0)
    buffer, scanned = BestFitBuffer(), []
    for step in range(3000):
        if not scanned or (rng.random() < 0.5 and len(scanned) < 40):
            item = (rng.randrange(1, 12), step)
            buffer.add(item[0], item)
            scanned.append(item)
        elif rng.random() < 0.3:
            item = min(scanned)
            assert buffer.take_shortest() == item
            scanned.remove(item)
        else:
            room = rng.randrange(0, 14)
            item = max((i for i in scanned if i[0] <= room), key=lambda i: (i[0], -i[1]), default=None)
            assert buffer.take(room) == item
            if item:
                scanned.remove(item)
        assert buffer.items() == scanned and len(buffer) == len(scanned)


def test_special_tokens_are_not_made_from_text(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [SPECIALS[0] * 3]}), path)
    batch = next(pretrain_batches([path], tokenizer, rows=1, sequence_len=20, packing="stream"))
    assert (batch["inputs"] == tokenizer.bos_id).sum() == 1
