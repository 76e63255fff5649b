"""Tasks: what the model is taught and measured on after pretraining. One file a family; `load` finds them by name."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat_jax.config import Config, DataConfig
from nanochat_jax.data.conversations import read_jsonl
from nanochat_jax.data.position import digest
from nanochat_jax.errors import UserError
from nanochat_jax.tasks import arc, arithmetic, choice, gsm8k, humaneval, identity, mmlu, multistep, smoltalk, spelling
from nanochat_jax.tasks.task import SPLITS, Task

LOADERS: dict[str, Callable[[str, DataConfig, int, bool], Task]] = {
    "arithmetic": lambda split, data, seed, unsafe: arithmetic.load(split, seed),
    "multistep": lambda split, data, seed, unsafe: multistep.load(split, seed),
    "simple_spelling": lambda split, data, seed, unsafe: spelling.load("simple_spelling", split, seed),
    "spelling_bee": lambda split, data, seed, unsafe: spelling.load("spelling_bee", split, seed),
    "choice": lambda split, data, seed, unsafe: choice.load(split, seed),
    "identity": lambda split, data, seed, unsafe: identity.load(seed),
    "smoltalk": lambda split, data, seed, unsafe: smoltalk.load(split, data),
    "mmlu": lambda split, data, seed, unsafe: mmlu.load(split, data),
    "mmlu_aux": lambda split, data, seed, unsafe: mmlu.load_auxiliary(data),
    "arc_easy": lambda split, data, seed, unsafe: arc.load("arc_easy", "ARC-Easy", split, data),
    "arc_challenge": lambda split, data, seed, unsafe: arc.load("arc_challenge", "ARC-Challenge", split, data),
    "gsm8k": lambda split, data, seed, unsafe: gsm8k.load(split, data),
    "humaneval": lambda split, data, seed, unsafe: humaneval.load(data, unsafe),
}
SPLITS_OF = {
    "identity": ("train",),
    "smoltalk": ("train", "test"),
    "mmlu": ("val", "test"),
    "mmlu_aux": ("train",),
    "humaneval": ("test",),
}
"""Of the sets that have not all of SPLITS."""


def load(name: str, split: str, data: DataConfig, seed: int = 42, unsafe_sandbox: bool = False) -> Task:
    """A task by name, split train, val or test. Raises UserError for an unknown name or split or a missing set.

    unsafe_sandbox: let the programs of humaneval run without isolation.
    """
    if name not in LOADERS:
        raise UserError(f"unknown task {name!r}; there are {', '.join(LOADERS)}")
    splits = SPLITS_OF.get(name, SPLITS)
    if split not in splits:
        raise UserError(f"task {name} has no split {split!r}; it has {', '.join(splits)}")
    return LOADERS[name](split, data, seed, unsafe_sandbox)


NOT_TO_GRADE = ("identity", "smoltalk", "mmlu_aux")
"""Conversations without a right answer, or without a test."""
TO_REINFORCE = ("arithmetic", "multistep", "simple_spelling", "spelling_bee", "gsm8k")
"""Sets with rows to train on and to hold out whose answers are written, not chosen, and graded."""


def check_names(config: Config, asked: Sequence[str] = ()) -> None:
    """UserError for a task of a stage or an evaluation that does not exist or cannot be used so, or is `asked` for by
    `eval --tasks`. Reads no file.
    """
    mixtures = {
        f"--{stage}.mixture": [name for name, *_ in map(parse, mixture) if not name.endswith(".jsonl")]
        for stage, mixture in (("mid", config.mid.mixture), ("sft", config.sft.mixture))
    }
    evaluations = {"--eval.base": config.eval.base, "--eval.chat": config.eval.chat, "--tasks": asked}
    for option, names in (mixtures | {"--rl.task": [config.rl.task]} | evaluations).items():
        if option in evaluations:
            there = [name for name in (*LOADERS, "bpb", "core") if name not in NOT_TO_GRADE]
        else:
            learnt = [*(name for name in LOADERS if "train" in SPLITS_OF.get(name, SPLITS)), "files named *.jsonl"]
            there = TO_REINFORCE if option == "--rl.task" else learnt
        for name in names:
            if name not in there:
                what = f"{name!r} cannot be used here" if name in LOADERS else f"unknown task {name!r}"
                raise UserError(f"{option}: {what}; there are {', '.join(there)}")


class Mixture(Sequence[dict]):
    """Conversations of several sets, shuffled once.

    specs: NAME[:ROWS][*EPOCHS] or FILE.jsonl[:ROWS][*EPOCHS]; the first ROWS rows (all where there are fewer), EPOCHS
    times. `own`: the digest of what was taken from each file, whole, as people edit theirs.
    """

    def __init__(self, specs: Sequence[str], split: str, data: DataConfig, seed: int = 42) -> None:
        self.sources: list[Sequence[dict]] = []
        self.own: list[str] = []
        self.index: list[tuple[int, int]] = []
        for spec in specs:
            name, rows, epochs = parse(spec)
            source = read_jsonl(Path(name)) if name.endswith(".jsonl") else load(name, split, data, seed)
            count = len(source) if rows is None else min(rows, len(source))
            if name.endswith(".jsonl"):
                self.own.append(digest(source[:count], count))
            self.index += [(len(self.sources), row) for row in range(count)] * epochs
            self.sources.append(source)
        random.Random(seed).shuffle(self.index)

    def split(self, held_out: int) -> tuple[Mixture, Mixture]:
        """(the rest, the first `held_out` different rows, a tenth of them at most); no row stands in both."""
        kept = dict.fromkeys(self.index)
        first = set(list(kept)[: min(held_out, len(kept) // 10)])
        rest, validation = copy.copy(self), copy.copy(self)
        rest.index = [entry for entry in self.index if entry not in first]
        validation.index = [entry for entry in kept if entry in first]
        return rest, validation

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        source, row = self.index[i]
        return self.sources[source][row]


def parse(spec: str) -> tuple[str, int | None, int]:
    """NAME[:ROWS][*EPOCHS] -> name, rows or None, epochs."""
    match = re.fullmatch(r"(.+?)(?::(\d+))?(?:\*(\d+))?", spec)
    if match is None:
        raise UserError(f"mixture entry {spec!r} is not NAME[:ROWS][*EPOCHS] or FILE.jsonl[:ROWS][*EPOCHS]")
    name, rows, epochs = match.groups()
    return name, None if rows is None else int(rows), 1 if epochs is None else int(epochs)
