"""Two-operand sums, differences and products of numbers below 100, answered through the calculator tool.

Pairs of operands are in one split only, in either order and with any sign. In other tasks' stories a running total may
meet an operand with which it makes a test pair.
"""

from __future__ import annotations

import operator

from nanochat_jax.tasks.task import Task, dialogue, is_number, row_rng, split_of

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
WORDINGS = (
    "What is {a} {sign} {b}?",
    "What is {a} {sign} {b}?",
    "What is {a} {word} {b}?",
    "How much is {a} {sign} {b}?",
    "Calculate {a} {sign} {b}.",
    "{a} {sign} {b} = ?",
)
WORDS = {"+": "plus", "-": "minus", "*": "times"}


def load(split: str, seed: int) -> Task:
    """Every pair of the split, in both orders, with each sign, shuffled."""
    rows = [(a, b, sign) for a in range(100) for b in range(100) if split_of_pair(a, b) == split for sign in OPERATIONS]
    rng = row_rng("arithmetic", split, seed, "order")
    rng.shuffle(rows)
    rows = [(*row, rng.choice(WORDINGS)) for row in rows]
    return Task("arithmetic", "generative", rows, conversation, is_number)


def split_of_pair(a: int, b: int) -> str:
    """The split that a pair of operands belongs to, in any order and task."""
    return split_of(f"arithmetic {min(a, b)} {max(a, b)}")


def conversation(row: tuple[int, int, str, str]) -> dict:
    """One question, the tool call and the answer."""
    a, b, sign, wording = row
    result = str(OPERATIONS[sign](a, b))
    parts = [
        {"type": "python", "text": f"{a}{sign}{b}"},
        {"type": "python_output", "text": result},
        {"type": "text", "text": f"The answer is {result}."},
    ]
    return dialogue(wording.format(a=a, b=b, sign=sign, word=WORDS[sign]), parts, answer=result)
