"""Small multiple-choice questions made by code, rendered and graded exactly like ARC and MMLU.

A question (the set of its numbers, its series, its pair of opposites) is in one split only.
"""

from __future__ import annotations

import random

from nanochat_jax.tasks.task import LETTERS, Task, is_letter, multiple_choice, row_rng, split_of

TRAIN_ROWS = 20_000
EVAL_ROWS = 1_000
OPPOSITES = (
    "hot cold,big small,fast slow,high low,light dark,young old,hard soft,wet dry,full empty,early late,rich poor,"
    "strong weak,happy sad,clean dirty,open closed,near far,long short,loud quiet,true false,first last,day night,"
    "summer winter,left right,up down,in out,black white,good bad,begin end,push pull,buy sell,win lose,give take,"
    "come go,love hate,laugh cry,deep shallow,wide narrow,thick thin,sharp blunt,sweet bitter,rough smooth,brave timid,"
    "peace war,friend enemy,north south,east west,front back,inside outside,above below,before after"
)
Question = tuple[str, str, str, list[str]]
"""What decides the split, the question, the right answer, the wrong answers."""


def load(split: str, seed: int) -> Task:
    """Rows made when asked for."""
    rows = range(TRAIN_ROWS if split == "train" else EVAL_ROWS)
    return Task("choice", "categorical", rows, lambda row: conversation(split, seed, row), is_letter)


def conversation(split: str, seed: int, row: int) -> dict:
    """The row's first question that belongs to the split."""
    rng = row_rng("choice", split, seed, row)
    make = rng.choice((largest, smallest, next_number, opposite))
    while True:
        key, question, right, wrong = make(rng)
        if split_of(key) == split:
            break
    choices = [right, *wrong]
    rng.shuffle(choices)
    return multiple_choice(question, LETTERS, choices, LETTERS[choices.index(right)])


def largest(rng: random.Random) -> Question:
    """The largest of four different numbers below 100."""
    numbers = sorted(rng.sample(range(100), 4))
    *wrong, right = map(str, numbers)
    return f"numbers {numbers}", "Which number is the largest?", right, wrong


def smallest(rng: random.Random) -> Question:
    """The smallest of four different numbers below 100."""
    numbers = sorted(rng.sample(range(100), 4))
    right, *wrong = map(str, numbers)
    return f"numbers {numbers}", "Which number is the smallest?", right, wrong


def next_number(rng: random.Random) -> Question:
    """The next number of a series with a constant step."""
    start, step = rng.randrange(50), rng.randrange(1, 11)
    series = [start + step * i for i in range(4)]
    right = start + step * 4
    wrong = [str(right + d) for d in rng.sample((-2, -1, 1, 2, 3), 3)]
    return f"series {series}", f"Which number comes next: {', '.join(map(str, series))}?", str(right), wrong


def opposite(rng: random.Random) -> Question:
    """The opposite of a word, among words of other pairs."""
    pairs = [pair.split() for pair in OPPOSITES.split(",")]
    pair = rng.choice(pairs)
    word, right = pair if rng.random() < 0.5 else pair[::-1]
    wrong = [rng.choice(p) for p in rng.sample([p for p in pairs if p is not pair], 3)]
    return f"opposites {pair}", f"Which word is the opposite of {word}?", right, wrong
