"""Rows of the public task sets: from a mirror folder (`--data.mirror`), else from Hugging Face through `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.config import DataConfig
from nanochat_jax.errors import UserError

ORDER_SEED = 42
"""Seed of the row order, the reference's; never the run's seed, since held-out rows are told by their place."""


@dataclass(frozen=True)
class Rows(Sequence[dict]):
    """Rows of a table in a given order, made into dicts one at a time."""

    table: pa.Table
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        return self.table.slice(int(self.order[i]), 1).to_pylist()[0]

    def part(self, start: int, stop: int) -> Rows:
        """Rows start to stop of the order."""
        return Rows(self.table, self.order[start:stop])


def load_rows(data: DataConfig, repo: str, config: str, split: str, columns: Sequence[str]) -> Rows:
    """A split, shuffled. Raises UserError where the mirror or the network does not give it, or a column is missing."""
    table = read_mirror(data.mirror, repo, config, split) if data.mirror else download(data.cache, repo, config, split)
    if table.column_names == ["train"]:
        # The layout of cais/mmlu auxiliary_train: every column inside one struct.
        table = pa.Table.from_struct_array(table["train"])
    missing = set(columns) - set(table.column_names)
    if missing:
        where = f"{repo} {config} {split}"
        raise UserError(
            f"{where} lacks the columns {sorted(missing)} (it has {table.column_names}); is it another set?"
        )
    return Rows(table, np.random.default_rng(ORDER_SEED).permutation(table.num_rows))


def read_mirror(mirror: str, repo: str, config: str, split: str) -> pa.Table:
    """<mirror>/<org>/<name>/<config>/<split>.parquet."""
    path = Path(mirror).expanduser() / repo / config / f"{split}.parquet"
    if not path.is_file():
        raise UserError(f"no file {path}; put {repo} there or unset --data.mirror to take it from Hugging Face")
    try:
        return pq.read_table(path)
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)}); copy it again") from error


def download(cache: str, repo: str, config: str, split: str) -> pa.Table:
    """Through `datasets`, which keeps a copy in the cache folder."""
    import datasets

    try:
        folder = str(Path(cache).expanduser() / "datasets")
        return datasets.load_dataset(repo, config, split=split, cache_dir=folder).with_format("arrow")[:]
    except Exception as error:  # the library raises many kinds, and they all mean: not to be had from here
        raise UserError(
            f"cannot get {repo} {config} {split} from Hugging Face ({first_line(error)}); "
            "check the network, or give a local copy with --data.mirror"
        ) from error


def first_line(error: Exception) -> str:
    """The kind and first line of another library's error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
