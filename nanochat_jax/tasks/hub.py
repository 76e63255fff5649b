"""Rows of the public task sets: from a mirror folder (`--data.mirror`), else from Hugging Face through `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nanochat_jax.config import DataConfig
from nanochat_jax.data.files import expanded
from nanochat_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ORDER_SEED = 42
"""Seed of the row order, the reference's; never the run's seed, since held-out rows are told by their place."""


def load_rows(data: DataConfig, repo: str, config: str, split: str, columns: Sequence[str]) -> Dataset:
    """A split, shuffled; the mirror's is <mirror>/<org>/<name>/<config>/<split>.parquet.

    Raises UserError where the mirror or the network does not give it, or a column is missing.
    """
    import datasets  # takes seconds

    where, cache = f"{repo} {config} {split}", str(expanded(data.cache) / "datasets")
    path = expanded(data.mirror or "") / repo / config / f"{split}.parquet"
    try:
        if data.mirror:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache)
        else:
            rows = datasets.load_dataset(repo, config, split=split, cache_dir=cache)
    except Exception as error:  # the library raises many kinds, and they all mean: not to be had from here
        place = path if data.mirror else "Hugging Face: check the network, or give a local copy with --data.mirror"
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise UserError(f"cannot get {where} ({reason}) from {place}") from error
    if rows.column_names == ["train"]:
        # The layout of cais/mmlu auxiliary_train: every column inside one struct.
        rows = rows.flatten()
        rows = rows.rename_columns({name: name.removeprefix("train.") for name in rows.column_names})
    if missing := set(columns) - set(rows.column_names):
        raise UserError(f"{where} lacks the columns {sorted(missing)} (it has {rows.column_names}); is it another set?")
    for name in columns:
        if empty := rows.data.column(name).null_count:
            raise UserError(f"{where}: {empty} of {len(rows)} rows have no {name}; mend the file or take another")
    return rows.select(np.random.default_rng(ORDER_SEED).permutation(len(rows)))
