"""Conversations for fine-tuning: what one must look like, and how they become rows with masked targets.

Rows hold whole conversations: with `bestfit` as many as best fit from a buffer finds, with `pad` one; the rest of the
row is BOS without targets. A conversation longer than T tokens is cut to T, one that then has nothing to learn is
dropped; both are counted. An epoch gives each conversation once: the buffer is emptied before the next begins. The
first epoch keeps the given order (mixtures come shuffled), later ones have a new one each.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from nanochat_jax.data.packing import BestFitBuffer
from nanochat_jax.data.position import check_origin, digest
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
"""inputs, targets: int32 [rows, T]; a target of -1 is not counted."""
Packing = Literal["bestfit", "pad"]
LossOn = Literal["all", "assistant"]

PART_TYPES = ("text", "python", "python_output")
RENDER_AHEAD = 64  # conversations tokenized together


def validate(conversation: object, where: str) -> None:
    """Raises UserError, beginning with `where`, unless this is {"messages": [{"role", "content"}, ...]}.

    An optional system message, then user and assistant in turn, at least one answer. Content is text; the assistant's
    may also be a list of {"type": "text" | "python" | "python_output", "text"}. Other keys are left alone.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{where}: not an object with a list "messages"')
    first = 1 if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system" else 0
    if len(messages) < first + 2:
        raise UserError(
            f"{where}: {len(messages)} messages; it takes one of the user and one of the assistant at least"
        )
    for i, message in enumerate(messages):
        at = f"{where}, message {i + 1}"
        if not isinstance(message, dict):
            raise UserError(f"{at}: not an object")
        expected = "system" if i < first else ("assistant" if (i - first) % 2 else "user")
        if message.get("role") != expected:
            raise UserError(f'{at}: role {message.get("role")!r} where "{expected}" is due')
        content = message.get("content")
        if isinstance(content, list) and expected == "assistant":
            _validate_parts(content, at)
        elif not isinstance(content, str):
            raise UserError(f"{at}: content of the {expected} must be text, not {type(content).__name__}")


def _validate_parts(parts: list, at: str) -> None:
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES or not isinstance(part.get("text"), str):
            raise UserError(f'{at}, part {i + 1}: must be {{"type": {" | ".join(PART_TYPES)}, "text": text}}')


def read_jsonl(path: Path) -> list[dict]:
    """Conversations from a file with one a line, also as a bare list of messages. UserError names the line at fault."""
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    conversations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            conversation = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        if isinstance(conversation, list):
            conversation = {"messages": conversation}
        validate(conversation, where)
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"{path} holds no conversation")
    return conversations


def conversation_batches(
    conversations: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    rows: int,
    sequence_len: int,
    packing: Packing,
    loss_on: LossOn,
    seed: int,
    buffer: int = 100,
    prefetch: int = 2,
    threads: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches of [rows, sequence_len] without end; every row has at least one target.

    `loss_on` "assistant": targets are what the assistant writes; "all": every token but the padding. `get_state` and
    `set_state` save and restore the position exactly, as in pretraining; the state also counts the conversations
    `truncated` and `dropped` so far. Raises UserError where no conversation has a target.
    """
    packer = RowPacker(
        conversations,
        tokenizer,
        sequence_len=sequence_len,
        packing=packing,
        loss_on=loss_on,
        seed=seed,
        buffer=buffer,
        threads=threads,
    )
    return grain.experimental.ThreadPrefetchDatasetIterator(ConversationBatches(packer, rows), prefetch)


def epoch_rows(
    conversations: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    sequence_len: int,
    packing: Packing,
    loss_on: LossOn,
    seed: int,
    buffer: int = 100,
    threads: int | None = None,
    log: Callable[[str], None] | None = None,
) -> int:
    """Rows of the first epoch; tokenizes all of it, and tells `log` how many conversations were cut or dropped."""
    packer = RowPacker(
        conversations,
        tokenizer,
        sequence_len=sequence_len,
        packing=packing,
        loss_on=loss_on,
        seed=seed,
        buffer=buffer,
        threads=threads,
    )
    count = sum(1 for _ in iter(packer.next_row, None))
    if log is not None:
        log(
            f"{len(conversations):,} conversations in {count:,} rows of {sequence_len} tokens; "
            f"{packer.truncated:,} longer ones cut, {packer.dropped:,} without a target dropped"
        )
    return count


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation of at most T tokens."""

    tokens: np.ndarray
    """int32 [length]."""
    learned: np.ndarray
    """bool [length]: whether the token is a target."""
    number: int
    """Its number in the epoch's order."""
    cut: bool


class RowPacker:
    """Conversations in rows of at most T+1 tokens, epoch after epoch."""

    def __init__(
        self,
        conversations: Sequence[dict],
        tokenizer: Tokenizer,
        *,
        sequence_len: int,
        packing: Packing,
        loss_on: LossOn,
        seed: int,
        buffer: int,
        threads: int | None,
    ) -> None:
        if buffer < 1:
            raise UserError(f"the packing buffer of {buffer} conversations must hold at least 1")
        self.sequence_len = sequence_len
        self.bos_id = tokenizer.bos_id
        self.truncated = self.dropped = 0
        self._conversations = conversations
        self._tokenizer = tokenizer
        self._packing, self._loss_on, self._seed = packing, loss_on, seed
        self._buffer_size, self._threads = buffer, threads
        self._origin = {
            "packing": packing,
            "loss_on": loss_on,
            "sequence_len": sequence_len,
            "seed": seed,
            "buffer": buffer,
            "number of conversations": len(conversations),
            "some of their text": digest(conversations),
            "tokenizer": tokenizer.fingerprint()[:16],
        }
        self._go_to(epoch=1, cursor=0)

    def next_row(self) -> list[Rendered] | None:
        """The conversations of a row, at least one; None where the epoch is over, until `next_epoch`."""
        if self._packing == "pad":
            only = self._read()
            return only and [only]
        row: list[Rendered] = []
        room = self.sequence_len + 1
        while True:
            while len(self._buffer) < self._buffer_size and (read := self._read()):
                self._buffer.add(len(read.tokens), read)
            best = self._buffer.take(room)
            if best is None:
                return row or None
            row.append(best)
            room -= len(best.tokens)

    def next_epoch(self) -> None:
        """Begins anew, in another order."""
        self._go_to(self._epoch + 1, cursor=0)

    def get_state(self) -> dict[str, Any]:
        return {
            "origin": self._origin,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "waiting": " ".join(str(item.number) for item in self._buffer.items()),
            "truncated": self.truncated,
            "dropped": self.dropped,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        check_origin(state["origin"], self._origin)
        self._go_to(state["epoch"], state["cursor"])
        self.truncated, self.dropped = state["truncated"], state["dropped"]
        for item in self._render([int(number) for number in state["waiting"].split()]):
            self._buffer.add(len(item.tokens), item)

    def _go_to(self, epoch: int, cursor: int) -> None:
        count = len(self._conversations)
        rng = np.random.default_rng([self._seed, epoch])
        self._order = np.arange(count) if epoch == 1 else rng.permutation(count)
        self._epoch, self._cursor = epoch, cursor
        self._ahead: deque[Rendered] = deque()
        self._buffer: BestFitBuffer[Rendered] = BestFitBuffer()

    def _read(self) -> Rendered | None:
        """The next conversation of the epoch that has a target."""
        while self._cursor < len(self._order):
            if not self._ahead:
                end = min(self._cursor + RENDER_AHEAD, len(self._order))
                self._ahead.extend(self._render(range(self._cursor, end)))
            item = self._ahead.popleft()
            self._cursor += 1
            if item.learned[1:].any():
                self.truncated += item.cut
                return item
            self.dropped += 1
        return None

    def _render(self, numbers: Sequence[int]) -> list[Rendered]:
        conversations = [self._conversations[int(self._order[number])] for number in numbers]
        rendered = []
        pairs = self._tokenizer.render_batch(conversations, num_threads=self._threads)
        for number, (ids, mask) in zip(numbers, pairs, strict=True):
            tokens = np.array(ids[: self.sequence_len], np.int32)
            learned = np.array(mask[: self.sequence_len], bool) | (self._loss_on == "all")
            rendered.append(Rendered(tokens, learned, number, cut=len(ids) > self.sequence_len))
        return rendered


class ConversationBatches(grain.DatasetIterator[Batch]):
    """Batches of packed rows; `conversation_batches` puts a prefetching thread in front."""

    def __init__(self, packer: RowPacker, rows: int) -> None:
        super().__init__()
        self._packer = packer
        self._rows = rows

    def __next__(self) -> Batch:
        size = self._packer.sequence_len + 1
        tokens = np.full((self._rows, size), self._packer.bos_id, np.int32)
        learned = np.zeros((self._rows, size), bool)
        for i in range(self._rows):
            at = 0
            for item in self._row():
                end = at + len(item.tokens)
                tokens[i, at:end] = item.tokens
                learned[i, at:end] = item.learned
                at = end
        return {"inputs": tokens[:, :-1].copy(), "targets": np.where(learned[:, 1:], tokens[:, 1:], -1)}

    def get_state(self) -> dict[str, Any]:
        return self._packer.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.set_state(state)

    def _row(self) -> list[Rendered]:
        row = self._packer.next_row()
        if row is None:
            self._packer.next_epoch()
            row = self._packer.next_row()
        if row is None:
            raise UserError(
                f"none of the conversations has a target within {self._packer.sequence_len} tokens; "
                "raise --model.sequence-len or give others"
            )
        return row
