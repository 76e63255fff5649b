"""Spelling words and counting their letters: what a model that sees tokens instead of letters has to learn.

`simple_spelling` spells a word. `letter_count` spells it with a running count of one letter, short enough for a tiny
model.
`spelling_bee` counts by hand, letter by letter, and then checks itself with the tool. Row i is made when asked for; the
words of train, val and test are disjoint.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from nanochat_jax.tasks.task import SPLITS, Task, dialogue, is_number, one_of, row_rng
from nanochat_jax.tasks.words import word_list

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
SHORT_WORDINGS = COUNT_WORDINGS[:2]
QUOTES = ("{}", "{}", "'{}'", '"{}"')
FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def load(name: str, split: str, seed: int) -> Task:
    """One of the three spelling tasks."""
    one_of(name, split, SPLITS)
    words = list(word_list(split))
    row_rng(name, split, seed, "order").shuffle(words)
    builder, grader = TASKS[name]

    def make(row: int) -> dict:
        # Walking through shuffled words uses each before any comes again.
        return builder(words[row % len(words)], row_rng(name, split, seed, row))

    return Task(name, "generative", range(TRAIN_ROWS if split == "train" else EVAL_ROWS), make, grader)


def pick_letter(word: str, rng: random.Random) -> str:
    """A letter of the word, or now and then any letter, so that the answer can be 0."""
    return rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")


def simple_spelling(word: str, rng: random.Random) -> dict:
    """`apple` -> `apple: a, p, p, l, e`."""
    return dialogue(rng.choice(SPELL_WORDINGS).format(word=word), f"{word}: {', '.join(word)}")


def is_spelling(conversation: dict, completion: str) -> bool:
    """Grader of simple_spelling: the same letters after the colon."""
    reference = conversation["messages"][-1]["content"]
    return completion.partition(":")[2].split() == reference.partition(":")[2].split()


def letter_count(word: str, rng: random.Random) -> dict:
    """`e` in `wheel` -> `w h e1 e2 l. The answer is 2.`"""
    letter = pick_letter(word, rng)
    spelled = " ".join(c if c != letter else f"{c}{word[: i + 1].count(c)}" for i, c in enumerate(word))
    count = str(word.count(letter))
    question = rng.choice(SHORT_WORDINGS).format(letter=letter, word=word)
    return dialogue(question, f"{spelled}. The answer is {count}.", answer=count)


def spelling_bee(word: str, rng: random.Random) -> dict:
    """Spell, count by hand, check with the tool, end with `#### n`."""
    letter = pick_letter(word, rng)
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


def is_final_answer(conversation: dict, completion: str) -> bool:
    """Grader of answers with `#### n` (GSM8K's rule): the first such number, commas removed, compared as a string."""
    match = FINAL_ANSWER.search(completion)
    return match is not None and match.group(1).replace(",", "") == conversation["answer"]


TASKS: dict[str, tuple[Callable[[str, random.Random], dict], Callable[[dict, str], bool]]] = {
    "simple_spelling": (simple_spelling, is_spelling),
    "letter_count": (letter_count, is_number),
    "spelling_bee": (spelling_bee, is_final_answer),
}
