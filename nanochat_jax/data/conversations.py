"""Conversations for fine-tuning: what one must look like, and how they become rows with masked targets.

Rows hold whole conversations: with `bestfit` as many as best fit from a buffer finds, with `pad` one; the rest of the
row is BOS without targets. A conversation longer than T tokens is cut to T, one that then has nothing to learn is
dropped; both are counted. An epoch gives each conversation once: the buffer is emptied before the next begins. The
first epoch keeps the given order (mixtures come shuffled), later ones have a new one each.
"""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.config import FinetuneConfig
from nanochat_jax.data.files import expanded
from nanochat_jax.data.packing import BestFitBuffer
from nanochat_jax.data.position import check_origin, digest
from nanochat_jax.data.pretrain import PREFETCH, Batch
from nanochat_jax.data.turns import check_turns
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer

BUFFER = 100  # conversations to choose from
RENDER_AHEAD = 64  # conversations tokenized together


def validate(conversation: object, where: str) -> None:
    """Raises UserError, beginning with `where`, unless this is {"messages": [...]} with turns (`check_turns`), a
    question and an answer at least.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{where}: not an object with a list "messages"')
    check_turns(messages, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}: {len(messages)} messages; it takes one of the user and one of the assistant at least"
        )


def read_jsonl(path: Path) -> list[dict]:
    """Conversations from a file with one a line, also as a bare list of messages. UserError names the line at fault."""
    path = expanded(path)
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    conversations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            conversation = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON in UTF-8 ({error})") from error
        if isinstance(conversation, list):
            conversation = {"messages": conversation}
        validate(conversation, where)
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"{path} holds no conversation")
    return conversations


def conversation_batches(
    conversations: Sequence[dict], tokenizer: Tokenizer, **options: Any
) -> grain.DatasetIterator[Batch]:
    """Batches of [rows, sequence_len] without end, made by a background thread, see `PackedConversations`."""
    packed = PackedConversations(conversations, tokenizer, **options)
    return grain.experimental.ThreadPrefetchDatasetIterator(packed, PREFETCH)


def epoch_rows(
    conversations: Sequence[dict], tokenizer: Tokenizer, *, log: Callable[[str], None] | None = None, **options: Any
) -> int:
    """Rows of the first epoch, with the options of `PackedConversations`; tokenizes all of it.

    Tells `log` how many conversations were cut or dropped.
    """
    packed = PackedConversations(conversations, tokenizer, rows=1, **options)
    count = sum(1 for _ in iter(packed.next_row, None))
    if log is not None:
        log(
            f"{len(conversations):,} conversations in {count:,} rows of {options['sequence_len']} tokens; "
            f"{packed.truncated:,} longer ones cut, {packed.dropped:,} without a target dropped"
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


class PackedConversations(grain.DatasetIterator[Batch]):
    """Conversations in rows of at most T+1 tokens, epoch after epoch; every row has at least one target.

    `loss_on` "assistant": targets are what the assistant writes; "all": every token but the padding. `get_state` and
    `set_state` save and restore the position exactly, as in pretraining; the state also counts the conversations
    `truncated` and `dropped` so far. Raises UserError where no conversation has a target.
    """

    def __init__(
        self,
        conversations: Sequence[dict],
        tokenizer: Tokenizer,
        rows: int,
        sequence_len: int,
        settings: FinetuneConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.truncated = self.dropped = 0
        self._conversations, self._tokenizer = conversations, tokenizer
        self._rows, self._sequence_len = rows, sequence_len
        self._settings, self._seed = settings, seed
        self._origin = {
            "packing": settings.packing,
            "loss_on": settings.loss_on,
            "sequence_len": sequence_len,
            "seed": seed,
            "number of conversations": len(conversations),
            "some of their text": digest(conversations),
            "tokenizer": tokenizer.fingerprint()[:16],
        }
        if own := getattr(conversations, "own", ()):
            self._origin["own conversations"] = " ".join(own)
        self._go_to(epoch=1, cursor=0)

    def __next__(self) -> Batch:
        shape = (self._rows, self._sequence_len + 1)
        tokens, learned = np.full(shape, self._tokenizer.bos_id, np.int32), np.zeros(shape, bool)
        for i in range(self._rows):
            row = self.next_row()
            if row is None:
                self._go_to(self._epoch + 1, cursor=0)
                row = self.next_row()
            if row is None:
                raise UserError(
                    f"none of the {len(self._conversations)} conversations of the mixture has a target within "
                    f"{self._sequence_len} tokens: name others or raise --model.sequence-len"
                )
            at = 0
            for item in row:
                end = at + len(item.tokens)
                tokens[i, at:end], learned[i, at:end] = item.tokens, item.learned
                at = end
        return {"inputs": tokens[:, :-1].copy(), "targets": np.where(learned[:, 1:], tokens[:, 1:], -1)}

    def next_row(self) -> list[Rendered] | None:
        """The conversations of a row, at least one; None where the epoch is over."""
        if self._settings.packing == "pad":
            only = self._read()
            return only and [only]
        row: list[Rendered] = []
        room = self._sequence_len + 1
        while True:
            while len(self._buffer) < BUFFER and (read := self._read()):
                self._buffer.add(len(read.tokens), read)
            best = self._buffer.take(room)
            if best is None:
                return row or None
            row.append(best)
            room -= len(best.tokens)

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
        pairs = self._tokenizer.render_batch(conversations)
        for number, (ids, mask) in zip(numbers, pairs, strict=True):
            tokens = np.array(ids[: self._sequence_len], np.int32)
            learned = np.array(mask[: self._sequence_len], bool) | (self._settings.loss_on == "all")
            rendered.append(Rendered(tokens, learned, number, cut=len(ids) > self._sequence_len))
        return rendered
