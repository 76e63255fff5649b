"""Small multiple-choice questions made by code, rendered and graded exactly like ARC and MMLU.

A question (the set of its numbers, its series, its pair of opposites) is in one split only.
"""

from __future__ import annotations

import itertools
import random

from nanochat_jax.tasks.task import SPLITS, Task, is_letter, multiple_choice, one_of, row_rng, split_of

LETTERS = ("A", "B", "C", "D")
TRAIN_ROWS = 20_000
EVAL_ROWS = 1_000
OPPOSITES = (
    "hot cold,big small,fast slow,high low,light dark,young old,hard soft,wet dry,full empty,early late,rich poor,"
    "strong weak,happy sad,clean dirty,open closed,near far,long short,loud quiet,true false,first last,day night,"
    "summer winter,left right,up down,in out,black white,good bad,begin end,push pull,buy sell,win lose,give take,"
    "come go,love hate,laugh cry,deep shallow,wide narrow,thick thin,sharp blunt,sweet bitter,rough smooth,brave timid,"
    "peace war,friend enemy,north south,east west,front back,inside outside,above below,before after"
)


def load(split: str, seed: int) -> Task:
    """Rows made when asked for."""
    one_of("choice", split, SPLITS)
    rows = range(TRAIN_ROWS if split == "train" else EVAL_ROWS)
    return Task("choice", "categorical", rows, lambda row: conversation(split, seed, row), is_letter, baseline=0.25)


def conversation(split: str, seed: int, row: int) -> dict:
    """The row's first question that belongs to the split."""
    rng = row_rng("choice", split, seed, row)
    kind = rng.choice((largest, smallest, next_number, opposite))
    while True:
        question, right, wrong = kind(rng)
        key = (
            f"{kind.__name__} {question} {' '.join(sorted([right, *wrong]))}"
            if kind in (largest, smallest)
            else question
        )
        if split_of(key) == split:
            break
    choices = [right, *wrong]
    rng.shuffle(choices)
    return multiple_choice(question, LETTERS, choices, LETTERS[choices.index(right)])


def numbers(rng: random.Random) -> list[int]:
    """Four different numbers below 100, in order."""
    return sorted(rng.sample(range(100), 4))


def largest(rng: random.Random) -> tuple[str, str, list[str]]:
    """Question, right answer, wrong answers."""
    *wrong, right = map(str, numbers(rng))
    return "Which number is the largest?", right, wrong


def smallest(rng: random.Random) -> tuple[str, str, list[str]]:
    """Question, right answer, wrong answers."""
    right, *wrong = map(str, numbers(rng))
    return "Which number is the smallest?", right, wrong


def next_number(rng: random.Random) -> tuple[str, str, list[str]]:
    """A series with a constant step."""
    start, step = rng.randrange(50), rng.randrange(1, 11)
    series = list(itertools.islice(itertools.count(start, step), 5))
    right = series[-1]
    wrong = rng.sample([right + d for d in (-2, -1, 1, 2, 3)], 3)
    return f"Which number comes next: {', '.join(map(str, series[:-1]))}?", str(right), list(map(str, wrong))


def opposite(rng: random.Random) -> tuple[str, str, list[str]]:
    """A word, its opposite, and words of other pairs."""
    pairs = [pair.split() for pair in OPPOSITES.split(",")]
    pair = rng.choice(pairs)
    word, right = pair if rng.random() < 0.5 else pair[::-1]
    others = rng.sample([rng.choice(p) for p in pairs if p is not pair], 3)
    return f"Which word is the opposite of {word}?", right, others
