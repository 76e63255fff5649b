"""Word problems of several steps, each step a call of the calculator: the offline task that reinforcement learning
has something to do on.

"Emma has 34 letters. She buys 12 more. She loses 7. How many letters has Emma?" A story is a start and two to five
changes. A result has to be carried from one call into the next, so one slip anywhere makes the answer wrong. The
demonstrations have a habit that people have, too: most of the shortest stories are done in the head, without the tool.
A small model that imitates this gets them wrong, and only a reward can tell it so. Every pair of neighbouring operands
belongs to one split only, the one it has in `arithmetic`; pairs of a running total and an operand are in any.
"""

from __future__ import annotations

import random

from nanochat_jax.tasks.arithmetic import split_of_pair
from nanochat_jax.tasks.task import Task, dialogue, is_final_answer, row_rng

ROWS = {"train": 100_000, "val": 1_000, "test": 1_000}
STEPS = (2, 3, 4, 5)
IN_THE_HEAD = 0.75
"""Share of the stories of two changes whose demonstration answers at once."""
WOMEN = ("Emma", "Jane", "Harriet", "Elizabeth", "Lydia", "Mary")
MEN = ("Frank", "Starbuck", "Charles", "Peter", "George", "Henry")
THINGS = ("letters", "books", "horses", "ships", "stones", "trees", "fish", "coins")
GAINS = ("{who} buys {n} more.", "{who} finds {n} more.", "{who} is given {n}.", "Then come {n} more.")
LOSSES = ("{who} loses {n}.", "{who} sells {n}.", "{who} gives away {n}.", "Then {n} are gone.")
DOUBLES = ("Then the number doubles.",)


def load(split: str, seed: int) -> Task:
    """The stories of one split, made row by row from fixed seeds."""

    def make(row: int) -> dict:
        return conversation(split, row_rng("multistep", split, seed, row))

    return Task("multistep", "generative", range(ROWS[split]), make, is_final_answer)


def conversation(split: str, rng: random.Random) -> dict:
    """One story, its tool calls and the final answer after ####."""
    women = rng.random() < 0.5
    name, who, thing = rng.choice(WOMEN if women else MEN), "She" if women else "He", rng.choice(THINGS)
    operand = rng.randrange(1, 100)
    total = operand
    sentences, parts = [f"{name} has {total} {thing}."], []
    steps = rng.choice(STEPS)
    for _ in range(steps):
        kind = rng.choice((GAINS, GAINS, LOSSES, LOSSES, DOUBLES))
        if kind is DOUBLES and total < 500:
            sentences.append(rng.choice(DOUBLES))
            expression, total = f"{total}*2", total * 2
        else:
            operand = neighbour(split, operand, rng)
            gain = kind is GAINS or operand > total
            sentences.append(rng.choice(GAINS if gain else LOSSES).format(who=who, n=operand))
            expression = f"{total}{'+' if gain else '-'}{operand}"
            total += operand if gain else -operand
        parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": str(total)}]
    if steps == min(STEPS) and rng.random() < IN_THE_HEAD:
        parts.clear()
    sentences.append(f"How many {thing} has {name}?")
    parts.append({"type": "text", "text": f"#### {total}"})
    return dialogue(" ".join(sentences), parts, answer=str(total))


def neighbour(split: str, operand: int, rng: random.Random) -> int:
    """An operand below 100 whose pair with `operand` belongs to the split."""
    while True:
        other = rng.randrange(1, 100)
        if split_of_pair(operand, other) == split:
            return other
