"""MMLU (arXiv 2009.03300): four choices over 57 subjects, and auxiliary questions to train on. Set: cais/mmlu."""

from __future__ import annotations

from nanochat_jax.config import DataConfig
from nanochat_jax.data.files import expanded
from nanochat_jax.errors import UserError
from nanochat_jax.tasks.hub import load_rows
from nanochat_jax.tasks.task import LETTERS, Task, is_letter, multiple_choice

REPO = "cais/mmlu"
COLUMNS = ("question", "subject", "choices", "answer")


def load(split: str, data: DataConfig) -> Task:
    """The benchmark: splits val and test, nothing to train on."""
    rows = load_rows(data, REPO, "all", "validation" if split == "val" else split, COLUMNS)
    return Task("mmlu", "categorical", rows, conversation, is_letter)


def load_auxiliary(data: DataConfig) -> Task:
    """The training questions, from either place where the repository keeps them."""
    flat = not data.mirror or (expanded(data.mirror) / REPO / "all" / "auxiliary_train.parquet").is_file()
    config, name = ("all", "auxiliary_train") if flat else ("auxiliary_train", "train")
    rows = load_rows(data, REPO, config, name, COLUMNS)
    return Task("mmlu_aux", "categorical", rows, conversation, is_letter)


def conversation(row: dict) -> dict:
    """Row with `answer` 0 to 3 -> multiple choice."""
    choices, answer = row["choices"], row["answer"]
    if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
        raise UserError(
            f"mmlu: {len(choices)} choices and answer {answer!r}, 4 and 0 to 3 are needed, at {row['question'][:60]!r}"
        )
    # Nothing reads the subject, but it is part of what the saved position of a run was begun with.
    return multiple_choice(row["question"], LETTERS, choices, LETTERS[answer], subject=row["subject"])
