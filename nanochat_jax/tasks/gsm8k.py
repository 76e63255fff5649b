"""GSM8K (arXiv 2110.14168): grade-school word problems whose answers call a calculator. Set: openai/gsm8k."""

from __future__ import annotations

import re

from nanochat_jax.config import DataConfig
from nanochat_jax.errors import UserError
from nanochat_jax.tasks.hub import load_rows
from nanochat_jax.tasks.task import FINAL_ANSWER, Task, dialogue, is_final_answer

HELD_OUT = 400
"""Rows at the end of the shuffled training split that only validation sees; a tenth of it where that is less."""


def load(split: str, data: DataConfig) -> Task:
    """train and val share the training split without overlap; test is the benchmark."""
    rows = load_rows(data, "openai/gsm8k", "main", "test" if split == "test" else "train", ("question", "answer"))
    cut = len(rows) - min(HELD_OUT, len(rows) // 10)
    if split == "val" and cut == len(rows):
        raise UserError(f"gsm8k: {len(rows)} training rows, too few to hold one out; a file of at least 10 is needed")
    if split == "train":
        rows = rows.select(range(cut))
    elif split == "val":
        rows = rows.select(range(cut, len(rows)))
    return Task("gsm8k", "generative", rows, conversation, is_final_answer)


def conversation(row: dict) -> dict:
    """`<<12/60=0.2>>` in the answer becomes the tool call `12/60` and its output `0.2`."""
    parts = []
    for i, piece in enumerate(re.split(r"<<([^>]+)>>", row["answer"])):
        if i % 2:  # what stood between the brackets
            expression, _, result = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    found = FINAL_ANSWER.search(row["answer"])
    if found is None:
        raise UserError(f"gsm8k: an answer without '#### NUMBER', to {row['question'][:60]!r}; is it another set?")
    return dialogue(row["question"], parts, answer=found.group(1).replace(",", ""))
