"""What a task is: rows, how a row becomes a conversation, and how a completion is graded.

Tasks are built by functions, one file a family, and share helpers here: the fixed split of what code makes, the
multiple-choice wording, and the graders that several families need. Nothing here knows of models.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanochat_jax.errors import UserError

SPLITS = ("train", "val", "test")
EVAL_SEED = 42
"""Seed of the rows of val and test, whatever the run's seed, so that runs are compared on the same questions."""

LETTERS = ("A", "B", "C", "D")
"""Of the choices, where a set has none of its own."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


@dataclass(frozen=True)
class Task:
    """A sequence of conversations, each ending with the reference answer, and their grader."""

    name: str
    kind: Literal["categorical", "generative"]
    """categorical: the letters' probabilities are compared; generative: an answer is sampled."""
    rows: Sequence[Any]
    make: Callable[[Any], dict]
    """Row -> {"messages": [...]}, with "letters" in categorical tasks and what the grader needs besides."""
    grade: Callable[[dict, str], bool]
    """Conversation and completion text (special tokens by name, without assistant_end) -> right or wrong."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.make(self.rows[index])


def split_of(key: str) -> str:
    """The split that a thing made by code belongs to, for ever: about 80% train, 10% val, 10% test."""
    bucket = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return {0: "test", 1: "val"}.get(int.from_bytes(bucket, "big") % 10, "train")


def row_rng(name: str, split: str, seed: int, row: int | str) -> random.Random:
    """Randomness of one row, the same on every machine; only the training rows depend on the run's seed."""
    return random.Random(f"{name} {split} {seed if split == 'train' else EVAL_SEED} {row}")


def dialogue(question: str, reply: str | list[dict], **extra: Any) -> dict:
    """A conversation of one question and its reference answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **extra}


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **extra: Any) -> dict:
    """A multiple-choice conversation.

    The letter follows its choice without a space, so that its token in the question is that of the answer.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    text = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return dialogue(text, answer, letters=tuple(letters), **extra)


def is_letter(conversation: dict, completion: str) -> bool:
    """Grader of multiple choice: the completion is the reference letter."""
    return completion.strip() == conversation["messages"][-1]["content"]


def is_number(conversation: dict, completion: str) -> bool:
    """Grader of numbers: the last one of a completion, after the last tool output where there is one, is "answer"."""
    numbers = NUMBER.findall(completion.rpartition("<|output_end|>")[2])
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(conversation["answer"])


def is_final_answer(conversation: dict, completion: str) -> bool:
    """Grader of answers with `#### n` (GSM8K's rule): the first such number, commas removed, compared as a string."""
    match = FINAL_ANSWER.search(completion)
    return match is not None and match.group(1).replace(",", "") == conversation["answer"]


def ungraded(conversation: dict, completion: str) -> bool:
    """Grader of sets to learn from only. Always raises UserError."""
    raise UserError("this set holds conversations without a right answer; it can be learned from but not evaluated")
