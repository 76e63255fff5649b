"""Conversations about who the model is, drawn from identity.toml: a thousand variations on a few facts.

Write your own as a JSONL file of conversations and name the file in the mixture.
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

from nanochat_jax.tasks.task import Task, row_rng, ungraded

ROWS = 1_000


def load(seed: int) -> Task:
    """Conversations of one to three turns."""
    texts = tomllib.loads(Path(__file__).with_name("identity.toml").read_text(encoding="utf-8"))
    return Task("identity", "generative", range(ROWS), lambda row: conversation(texts, seed, row), ungraded)


def conversation(texts: dict, seed: int, row: int) -> dict:
    """Row -> conversation: now and then a greeting first, then one to three topics."""
    rng = row_rng("identity", "train", seed, row)
    turns = rng.sample(texts["topics"], rng.choice((1, 1, 1, 2, 2, 3)))
    greeting = rng.choice(texts["greetings"])
    if not greeting and rng.random() < 0.5:
        turns.insert(0, rng.choice(texts["openings"]))
    messages = []
    for turn in turns:
        question = vary(rng.choice(turn["questions"]), rng)
        if not messages:
            question = greeting + question
        answer = rng.choice(turn["answers"])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def vary(question: str, rng: random.Random) -> str:
    """As people type: sometimes without capitals or without the mark at the end."""
    if rng.random() < 0.2:
        question = question.lower()
    return question.rstrip("?.") if rng.random() < 0.2 else question
