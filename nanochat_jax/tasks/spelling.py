"""Spelling words and counting their letters: what a model that sees tokens instead of letters has to learn.

`simple_spelling` spells a word. `spelling_bee` counts by hand, letter by letter, and then checks itself with the tool.
Row i is made when asked for; the words of train, val and test are disjoint.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nanochat_jax.data.shards import read_texts, shard_files
from nanochat_jax.tasks.task import Task, dialogue, is_final_answer, row_rng, split_of

WORD = re.compile(r"\b[a-z]{3,12}\b")
MIN_COUNT = 3
"""Rarer words are mostly slips of the print and foreign names."""
TRAIN_ROWS = 200_000
EVAL_ROWS = 1_000

SPELL_WORDINGS = (
    "Spell the word: {word}",
    "Spell {word}.",
    "How do you spell {word}?",
    "Spell the word {word} letter by letter.",
    "Write {word} one letter at a time.",
)
COUNT_WORDINGS = (
    "How many {letter} are in {word}?",
    "How many {letter} are in the word {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter} does {word} have?",
    "How many times does {letter} occur in {word}?",
    "How many times does {letter} appear in the word {word}?",
    "How often is {letter} in {word}?",
    "How often does the letter {letter} come up in {word}?",
    "Count the {letter} in {word}.",
    "Count the letter {letter} in the word {word}.",
    "Count how many {letter} {word} contains.",
    "Tell me the number of {letter} in {word}.",
    "What is the number of {letter} in {word}?",
    "In {word}, how many {letter} are there?",
    "In the word {word}, how often does {letter} appear?",
    "{word}: how many {letter}?",
    "Can you count the {letter} in {word}?",
    "Do you know how many {letter} are in {word}?",
)
QUOTES = ("{}", "{}", "'{}'", '"{}"')


def load(name: str, split: str, seed: int) -> Task:
    """One of the two spelling tasks."""
    words = list(word_list(split))
    row_rng(name, split, seed, "order").shuffle(words)
    builder, grader = TASKS[name]

    def make(row: int) -> dict:
        # Walking through shuffled words uses each before any comes again.
        return builder(words[row % len(words)], row_rng(name, split, seed, row))

    return Task(name, "generative", range(TRAIN_ROWS if split == "train" else EVAL_ROWS), make, grader)


@functools.cache
def word_list(split: str) -> tuple[str, ...]:
    """Lower-case words of 3 to 12 letters of one split, in alphabetical order. A word is in one split only."""
    counts: Counter[str] = Counter()
    train_files, _ = shard_files(Path(__file__).parent.parent / "corpus")
    for text in read_texts(train_files):
        counts.update(WORD.findall(text))
    return tuple(sorted(word for word, n in counts.items() if n >= MIN_COUNT and split_of(f"word {word}") == split))


def simple_spelling(word: str, rng: random.Random) -> dict:
    """`apple` -> `apple: a, p, p, l, e`."""
    return dialogue(rng.choice(SPELL_WORDINGS).format(word=word), f"{word}: {', '.join(word)}")


def is_spelling(conversation: dict, completion: str) -> bool:
    """Grader of simple_spelling: the same letters after the colon."""
    reference = conversation["messages"][-1]["content"]
    return completion.partition(":")[2].split() == reference.partition(":")[2].split()


def spelling_bee(word: str, rng: random.Random) -> dict:
    """Spell, count by hand, check with the tool, end with `#### n`."""
    # Now and then any letter, so that the answer can be 0.
    letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
    question = rng.choice(COUNT_WORDINGS).format(
        letter=rng.choice(QUOTES).format(letter), word=rng.choice(QUOTES).format(word)
    )
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip("?.")
    seen = 0
    lines = []
    for place, c in enumerate(word, 1):
        seen += c == letter
        lines.append(f"{place}: {c}" + (f" - that makes {seen}" if c == letter else ""))
    by_hand = f"{word} is spelled {', '.join(word)}. Counting '{letter}':\n" + "\n".join(lines)
    parts = [
        {"type": "text", "text": f"{by_hand}\nThat gives {seen}. Checking with Python: "},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(seen)},
        {"type": "text", "text": f"\nPython also says {seen}.\n\n#### {seen}"},
    ]
    return dialogue(question, parts, answer=str(seen))


TASKS: dict[str, tuple[Callable[[str, random.Random], dict], Callable[[dict, str], bool]]] = {
    "simple_spelling": (simple_spelling, is_spelling),
    "spelling_bee": (spelling_bee, is_final_answer),
}
