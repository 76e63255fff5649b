"""Parquet shards -> tokens -> packed rows -> batches: a Grain iterator whose position is saved and restored exactly.

Two ways to pack. `bestfit`: every row begins with BOS and holds whole documents, chosen by best fit from a buffer, the
last one cropped; nothing is padded, what is cropped is dropped. `stream`: documents one after the other, cut into rows
that overlap by one token, so that every token is a target; for small corpora. With several streams, stream s reads the
row groups s, s + streams, ... of each file, and the rows of a batch are dealt from the streams in turn. Of several
processes each reads a contiguous share of the streams and gives its share of every batch's rows, so that the rows of a
step are the same whatever the number of processes.

The saved state names where reading stands and which documents wait in the buffers; their tokens are made again on
restore. Left out: shuffling (the published sets are shuffled) and tokens cached on disk (text is small beside them).
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.config import PACKING, DataConfig
from nanochat_jax.data.documents import Document, DocumentReader, Place, open_readers
from nanochat_jax.data.packing import BestFitBuffer
from nanochat_jax.data.position import check_origin
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""inputs, targets: int32 [rows, T]; a target of -1 is not counted."""
PREFETCH = 2  # batches made ahead


def pretrain_batches(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    rows: int,
    sequence_len: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of [rows, sequence_len] without end, made by a background thread; of `data` only the packing counts.

    With several processes `rows` are those of all, of which this one gives [rows / process_count, sequence_len].
    `get_state` gives the position after the last batch that was handed out, as a small dict for JSON; after `set_state`
    with it, or with what `merge_states` makes of all processes' states, an iterator over the same files with the same
    packing gives the batches that would have come. `rows` and the number of processes may change between the two.
    Raises UserError where a stream has nothing to read, where rows and streams cannot be dealt to the processes, and
    for a state that does not belong.
    """
    check_dealt(rows, data.streams, process_count)
    share = data.streams // process_count
    mine = range(process_index * share, (process_index + 1) * share)
    readers = open_readers(files, tokenizer, data.streams, mine)
    best_fit = data.packing == "bestfit"
    dealt = [BestFitStream(reader, data.buffer_docs) if best_fit else ConcatStream(reader) for reader in readers]
    # What must be the same for a saved position to mean the same.
    names = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    origin = {
        **{name: getattr(data, name) for name in PACKING},
        "tokenizer": tokenizer.fingerprint()[:16],
        "training files": hashlib.sha256(names.encode()).hexdigest()[:16],
    }
    packed = PackedBatches(dealt, mine, rows // process_count, sequence_len + 1, origin)
    return grain.experimental.ThreadPrefetchDatasetIterator(packed, PREFETCH)


def check_dealt(rows: int, streams: int, process_count: int) -> None:
    """UserError where streams and the rows of a batch cannot be dealt to so many processes that read."""
    if streams % process_count:
        raise UserError(
            f"--data.streams {streams} cannot be dealt to {process_count} processes that read data: use a multiple "
            f"of {process_count}, from the start of the run on"
        )
    if process_count > 1 and rows % streams:
        raise UserError(
            f"the {rows} rows of a step are no multiple of --data.streams {streams}, which several processes need: "
            "change one of them"
        )


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One position from those of all processes, at the same step; any number of processes can go on from it.

    Iterators that read everything in every process (conversations) have the same position in all.
    """
    whole = dict(states[0])
    if "streams" in whole:
        parts = zip(*(state["streams"] for state in states), strict=True)
        whole["streams"] = [next((part for part in stream if part is not None), None) for stream in parts]
    return whole


def validation_batches(
    file: Path, tokenizer: Tokenizer, data: DataConfig, *, rows: int, sequence_len: int, eval_tokens: int
) -> Iterator[Batch]:
    """The same batches of the validation file at each call, with `eval_tokens` targets at most.

    `bestfit` packs as in training. `stream` gives each document rows of its own, so that no document is read after
    another. The last batch is filled up with rows that have no target. Raises UserError where there is no row to give.
    """
    if data.packing == "bestfit":
        source = _bestfit_rows(file, tokenizer, data, sequence_len, eval_tokens)
    else:
        source = _document_rows(file, tokenizer, sequence_len, eval_tokens)
    found = False
    while pieces := list(itertools.islice(source, rows)):
        found = True
        inputs = np.full((rows, sequence_len), tokenizer.bos_id, np.int32)
        targets = np.full((rows, sequence_len), -1, np.int32)
        for i, piece in enumerate(pieces):
            inputs[i, : len(piece) - 1], targets[i, : len(piece) - 1] = piece[:-1], piece[1:]
        yield {"inputs": inputs, "targets": targets}
    if not found:
        raise UserError(
            f"{file} gives no row of {sequence_len} tokens within eval-tokens {eval_tokens}; raise it or add text"
        )


def _bestfit_rows(
    file: Path, tokenizer: Tokenizer, data: DataConfig, sequence_len: int, eval_tokens: int
) -> Iterator[np.ndarray]:
    readers = open_readers([file], tokenizer, data.streams, range(data.streams))
    sources = [BestFitStream(reader, data.buffer_docs) for reader in readers]
    limit, given = eval_tokens, 0
    while (given + 1) * sequence_len <= limit:
        yield sources[given % data.streams].next_row(sequence_len + 1)
        given += 1
        if all(reader.epoch > 1 for reader in readers):  # a small file is read again and again: stop at its size
            limit = min(eval_tokens, sum(reader.first_pass_tokens for reader in readers))


def _document_rows(file: Path, tokenizer: Tokenizer, sequence_len: int, eval_tokens: int) -> Iterator[np.ndarray]:
    [reader] = open_readers([file], tokenizer, 1, [0])
    given = 0
    while reader.epoch == 1:
        for document in reader.read_slice():
            for start in range(0, len(document.tokens) - 1, sequence_len):
                piece = document.tokens[start : start + sequence_len + 1]
                given += len(piece) - 1
                if given > eval_tokens:
                    return
                yield piece


class BestFitStream:
    """Rows packed by best fit from the documents of one reader."""

    def __init__(self, reader: DocumentReader, buffer_docs: int) -> None:
        self.reader = reader
        self._buffer_docs = buffer_docs
        self._buffer: BestFitBuffer[Document] = BestFitBuffer()

    def next_row(self, size: int) -> np.ndarray:
        """int32 [size]: whole documents, then one cropped to fill the row."""
        row = np.empty(size, np.int32)
        filled = 0
        while filled < size:
            while len(self._buffer) < self._buffer_docs:
                self._add(self.reader.read_slice())
            room = size - filled
            document = self._buffer.take(room) or self._buffer.take_shortest()
            used = document.tokens[:room]
            row[filled : filled + len(used)] = used
            filled += len(used)
        return row

    def get_state(self) -> dict[str, Any]:
        return self.reader.get_state() | {"waiting": _places(self._buffer.items())}

    def set_state(self, state: dict[str, Any]) -> None:
        self.reader.set_state(state)
        self._buffer = BestFitBuffer()
        self._add(self.reader.read_again(_parse_places(state["waiting"])))

    def _add(self, documents: list[Document]) -> None:
        for document in documents:
            self._buffer.add(len(document.tokens), document)


class ConcatStream:
    """Rows cut from the documents of one reader, joined; the last token of a row is the first of the next."""

    def __init__(self, reader: DocumentReader) -> None:
        self.reader = reader
        self._waiting: deque[Document] = deque()
        self._start = 0  # tokens of the first waiting document that are in earlier rows

    def next_row(self, size: int) -> np.ndarray:
        """int32 [size]."""
        row = np.empty(size, np.int32)
        filled = 0
        while True:
            if not self._waiting:
                self._waiting.extend(self.reader.read_slice())
            tokens = self._waiting[0].tokens
            used = tokens[self._start : self._start + size - filled]
            row[filled : filled + len(used)] = used
            filled += len(used)
            if filled == size:
                self._start += len(used) - 1
                return row
            self._waiting.popleft()
            self._start = 0

    def get_state(self) -> dict[str, Any]:
        return self.reader.get_state() | {"waiting": _places(self._waiting), "start": self._start}

    def set_state(self, state: dict[str, Any]) -> None:
        self.reader.set_state(state)
        self._start = state["start"]
        self._waiting = deque(self.reader.read_again(_parse_places(state["waiting"])))


def _places(documents: Iterable[Document]) -> str:
    """The documents' places as one string: Grain copies the state for every batch, and a string is copied for free."""
    return " ".join("/".join(map(str, document.place)) for document in documents)


def _parse_places(text: str) -> list[Place]:
    return [tuple(map(int, place.split("/"))) for place in text.split()]


class PackedBatches(grain.DatasetIterator[Batch]):
    """Batches of rows dealt from the streams in turn; `pretrain_batches` puts a prefetching thread in front.

    `streams` are those with the numbers `mine`, of origin["streams"] in all processes.
    """

    def __init__(
        self,
        streams: Sequence[BestFitStream | ConcatStream],
        mine: range,
        rows: int,
        size: int,
        origin: dict[str, Any],
    ) -> None:
        super().__init__()
        self._streams, self._mine, self._rows, self._size, self._origin = streams, mine, rows, size, origin
        self._turn = 0

    def __next__(self) -> Batch:
        table = np.empty((self._rows, self._size), np.int32)
        for i in range(self._rows):
            table[i] = self._streams[self._turn].next_row(self._size)
            self._turn = (self._turn + 1) % len(self._streams)
        return {"inputs": table[:, :-1].copy(), "targets": table[:, 1:].copy()}

    def get_state(self) -> dict[str, Any]:
        """The position; None stands for the streams of other processes."""
        streams: list[dict[str, Any] | None] = [None] * self._origin["streams"]
        streams[self._mine.start : self._mine.stop] = [stream.get_state() for stream in self._streams]
        return {"origin": self._origin, "turn": self._turn, "streams": streams}

    def set_state(self, state: dict[str, Any]) -> None:
        check_origin(state["origin"], self._origin)
        if state["turn"] and len(self._mine) < len(state["streams"]):
            raise UserError(
                f"the saved position is between two rounds of the {len(state['streams'])} data streams: go on with one "
                "process"
            )
        self._turn = state["turn"]
        for stream, number in zip(self._streams, self._mine, strict=True):
            stream.set_state(state["streams"][number])
