"""Folders of parquet files with a `text` column: which files there are, and their documents.

The last file by name is the validation shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.errors import UserError

PATTERN = "[!.]*.[pP][aA][rR][qQ][uU][eE][tT]"
"""Names of the files that count; Python's glob takes no notice of case from 3.12 on."""


class Shard:
    """One parquet file, opened. Raises UserError where it is damaged or has no `text` column of strings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        schema = self._file.schema_arrow
        if "text" not in schema.names:
            raise UserError(f"{path} has no column `text`, only {', '.join(schema.names) or 'none'}")
        if schema.names.count("text") > 1:
            raise UserError(f"{path} has {schema.names.count('text')} columns `text`: leave one of them")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column `text` is of type {kind}, not string")
        metadata = self._file.metadata
        self.rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        """Documents in each row group."""
        column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("text")
        for i in range(metadata.num_row_groups):
            counted = metadata.row_group(i).column(column).statistics
            self._check_nulls(i, (counted and counted.null_count) or 0)

    def texts(self, row_group: int) -> list[str]:
        """The documents of a row group."""
        try:
            column = self._file.read_row_group(row_group, columns=["text"]).column("text")
            texts = column.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._damaged(error, f", row group {row_group}") from error
        self._check_nulls(row_group, column.null_count)  # a file need not have counted them
        return texts

    def _check_nulls(self, row_group: int, count: int) -> None:
        if count:
            raise UserError(f"{self.path}, row group {row_group}: {count} rows have no text; remove them")

    def _damaged(self, error: Exception, where: str = "") -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"{self.path}{where} cannot be read as parquet ({reason}); replace the file")


def shard_files(folder: Path | str, names: Sequence[str] | None = None) -> tuple[list[Path], Path]:
    """The training files in order, and the validation file, which is the last.

    Files are those of `names`, else all that are there, by name. Raises UserError for a missing folder or file, fewer
    than two files, and a file that is damaged or without `text`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data.dir must name a folder of parquet files")
    if names is None:
        names = sorted(path.name for path in folder.glob(PATTERN))
    if len(names) < 2:
        raise UserError(
            f"{folder} holds {len(names)} files named *.parquet; at least 2 are needed: the last by name is for "
            "validation"
        )
    files = [folder / name for name in names]
    if missing := [path.name for path in files if not path.exists()]:
        raise UserError(
            f"{folder} lacks {missing[0]}, {len(missing)} of the {len(files)} files of its set or run: bring them back "
            "(a published set: run the download command again)"
        )
    for path in files:
        Shard(path)
    return files[:-1], files[-1]


def read_texts(files: Sequence[Path]) -> Iterator[str]:
    """Every document of the files, in order."""
    for path in files:
        shard = Shard(path)
        for row_group in range(len(shard.rows)):
            yield from shard.texts(row_group)
