"""The documents of parquet shards as tokens, slice by slice, from a position that can be saved and restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_jax.data.shards import Shard
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer

SLICE_DOCS = 128  # documents tokenized at once; a part of the packing rule
Place = tuple[int, int, int]
"""Where a document stands: file, row group and row."""


@dataclass(frozen=True, slots=True)
class Document:
    """BOS and the tokens of a text, int32, and where it stands."""

    tokens: np.ndarray
    place: Place


class DocumentReader:
    """The documents of the row groups `groups`, (number of the file, row group) each, over and over.

    The state is the position alone.
    """

    def __init__(self, files: Sequence[Path], groups: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> None:
        self._files, self._groups, self._tokenizer = files, groups, tokenizer
        self._shard: Shard | None = None
        self._texts: list[str] | None = None
        self.epoch, self._at, self._row = 1, 0, 0
        self.first_pass_tokens = 0
        """Tokens read in the first epoch so far, since this reader was made."""

    def read_slice(self) -> list[Document]:
        """The next 128 documents, or what is left of their row group."""
        file, row_group = self._groups[self._at]
        if self._texts is None:
            self._texts = self._open(file).texts(row_group)
        texts = self._texts[self._row : self._row + SLICE_DOCS]
        documents = self._tokenize(texts, [(file, row_group, self._row + i) for i in range(len(texts))])
        if self.epoch == 1:
            self.first_pass_tokens += sum(len(document.tokens) for document in documents)
        self._row += len(texts)
        if self._row == len(self._texts):
            self._at, self._row, self._texts = (self._at + 1) % len(self._groups), 0, None
            self.epoch += self._at == 0
        return documents

    def read_again(self, places: Sequence[Place]) -> list[Document]:
        """The documents at these places, in this order; each row group is read once. The position stays."""
        found: dict[Place, str] = {}
        for file, row_group in sorted({place[:2] for place in places}):
            texts = self._open(file).texts(row_group)
            found |= {place: texts[place[2]] for place in places if place[:2] == (file, row_group)}
        return self._tokenize([found[place] for place in places], places)

    def get_state(self) -> dict[str, int]:
        file, row_group = self._groups[self._at]
        return {"epoch": self.epoch, "file": file, "row_group": row_group, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        self.epoch, self._row, self._texts = state["epoch"], state["row"], None
        self._at = self._groups.index((state["file"], state["row_group"]))

    def _open(self, file: int) -> Shard:
        if self._shard is None or self._shard.path != self._files[file]:
            self._shard = Shard(self._files[file])
        return self._shard

    def _tokenize(self, texts: list[str], places: Sequence[Place]) -> list[Document]:
        bos = self._tokenizer.bos_id
        encoded = self._tokenizer.encode_batch(texts)
        return [Document(np.array([bos, *ids], np.int32), place) for ids, place in zip(encoded, places, strict=True)]


def open_readers(
    files: Sequence[Path], tokenizer: Tokenizer, streams: int, numbers: Sequence[int]
) -> list[DocumentReader]:
    """Readers of the streams `numbers`: stream s has the row groups s, s + streams, ... of each file, files in order.

    Raises UserError where one of them has none.
    """
    groups = [(i, group) for i, file in enumerate(files) for group, rows in enumerate(Shard(file).rows) if rows]
    readers = []
    for stream in numbers:
        mine = [(file, group) for file, group in groups if group % streams == stream]
        if not mine:
            where = files[0] if len(files) == 1 else f"the {len(files)} files of {files[0].parent}"
            raise UserError(
                f"--data.streams {streams}: stream {stream} has no row group in {where}; use fewer streams or smaller "
                "row groups"
            )
        readers.append(DocumentReader(files, mine, tokenizer))
    return readers
