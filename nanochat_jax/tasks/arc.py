"""The AI2 Reasoning Challenge (arXiv 1803.05457): grade-school science, three to five choices. Set: allenai/ai2_arc."""

from __future__ import annotations

from nanochat_jax.config import DataConfig
from nanochat_jax.tasks.hub import load_rows
from nanochat_jax.tasks.task import Task, is_letter, multiple_choice

COLUMNS = ("question", "choices", "answerKey")


def load(name: str, config: str, split: str, data: DataConfig) -> Task:
    """config: ARC-Easy or ARC-Challenge."""
    rows = load_rows(data, "allenai/ai2_arc", config, "validation" if split == "val" else split, COLUMNS)
    return Task(name, "categorical", rows, conversation, is_letter)


def conversation(row: dict) -> dict:
    """The row's own labels are the letters; in a few rows they are 1 to 4."""
    choices = row["choices"]
    return multiple_choice(row["question"], choices["label"], choices["text"], row["answerKey"])
