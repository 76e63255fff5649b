"""The documents of parquet shards as tokens, slice by slice, from a position that can be saved and restored."""

from __future__ import annotations

from collections import defaultdict
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
    """The documents of row groups stream, stream + streams, ... of each file, files in order, over and over.

    Raises UserError where there is none. The state is the position alone.
    """

    def __init__(
        self, files: Sequence[Path], stream: int, streams: int, tokenizer: Tokenizer, threads: int | None
    ) -> None:
        self._files = files
        self._stream, self._streams = stream, streams
        self._tokenizer = tokenizer
        self._threads = threads
        self._shard = Shard(files[0])
        self._texts: list[str] | None = None
        self.epoch, self._file, self._row_group, self._row = 1, 0, stream, 0
        self.first_pass_tokens = 0
        """Tokens read in the first epoch so far, since this reader was made."""
        if not any(sum(Shard(file).rows[stream::streams]) for file in files):
            raise UserError(
                f"--data.streams {streams}: stream {stream} has no row group in the {len(files)} files of "
                f"{files[0].parent}; use fewer streams or smaller row groups"
            )
        self._skip_empty()

    def read_slice(self) -> list[Document]:
        """The next 128 documents, or what is left of their row group."""
        if self._texts is None:
            self._texts = self._shard.texts(self._row_group)
        texts = self._texts[self._row : self._row + SLICE_DOCS]
        places = [(self._file, self._row_group, self._row + i) for i in range(len(texts))]
        documents = self._tokenize(texts, places)
        if self.epoch == 1:
            self.first_pass_tokens += sum(len(document.tokens) for document in documents)
        self._row += len(texts)
        if self._row == len(self._texts):
            self._go_to(self._row_group + self._streams)
            self._skip_empty()
        return documents

    def read_again(self, places: Sequence[Place]) -> list[Document]:
        """The documents at these places, in this order; each row group is read once. The position stays."""
        rows: dict[tuple[int, int], list[int]] = defaultdict(list)
        for file, row_group, row in places:
            rows[file, row_group].append(row)
        texts: dict[Place, str] = {}
        shard = self._shard
        for file, row_group in sorted(rows):
            if shard.path != self._files[file]:
                shard = Shard(self._files[file])
            wanted = rows[file, row_group]
            for row, text in zip(wanted, shard.texts(row_group, wanted), strict=True):
                texts[file, row_group, row] = text
        return self._tokenize([texts[place] for place in places], places)

    def get_state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "file": self._file, "row_group": self._row_group, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        self.epoch, self._file, self._row = state["epoch"], state["file"], state["row"]
        self._row_group = state["row_group"]
        self._shard = Shard(self._files[self._file])
        self._texts = None

    def _tokenize(self, texts: list[str], places: Sequence[Place]) -> list[Document]:
        documents = []
        for ids, place in zip(self._tokenizer.encode_batch(texts, self._threads), places, strict=True):
            tokens = np.empty(len(ids) + 1, np.int32)
            tokens[0] = self._tokenizer.bos_id
            tokens[1:] = ids
            documents.append(Document(tokens, place))
        return documents

    def _go_to(self, row_group: int) -> None:
        self._row_group, self._row, self._texts = row_group, 0, None

    def _skip_empty(self) -> None:
        """Moves on to a row group that has documents."""
        while True:
            if self._row_group >= len(self._shard.rows):
                self._file += 1
                if self._file == len(self._files):
                    self._file = 0
                    self.epoch += 1
                self._shard = Shard(self._files[self._file])
                self._go_to(self._stream)
            elif not self._shard.rows[self._row_group]:
                self._go_to(self._row_group + self._streams)
            else:
                return
