"""Accuracy of a chat model on tasks, and ChatCORE.

Categorical tasks compare the logits of the answer's letters at the place of the answer; the answers to generative ones
are greedy, or drawn where the settings say so, and graded by the task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from nanochat_jax.config import EvalConfig
from nanochat_jax.errors import UserError
from nanochat_jax.evals.intervals import centred_mean, wilson
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.tasks.task import Task
from nanochat_jax.tokenizer import Tokenizer

Log = Callable[[str], None]

CHATCORE = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0}
"""The five tasks of ChatCORE and the accuracy of guessing."""


def evaluate_task(
    task: Task,
    engine: Engine,
    tokenizer: Tokenizer,
    settings: EvalConfig,
    max_examples: int | None,
    log: Log,
    seed: int = 0,
) -> dict:
    """{"accuracy", "n", "interval": [lo, hi], "correct": 0 or 1 a row} over the first max_examples rows
    (None: all). `seed`: of answers that are drawn.

    A prompt that does not fit the engine counts as wrong; how many did not is logged.
    """
    n = len(task) if max_examples is None else min(max_examples, len(task))
    if n < 1:
        raise UserError(f"task {task.name}: no example to evaluate")
    conversations = [task[i] for i in range(n)]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    limit = engine.cfg.max_positions if task.kind == "categorical" else engine.max_len - 1
    # Prompts of like length together need less padding.
    order = sorted((i for i in range(n) if len(prompts[i]) <= limit), key=lambda i: len(prompts[i]))
    if len(order) < n:
        log(f"{task.name}: {n - len(order)} of {n} prompts are longer than {limit} tokens and count as wrong")
    # The engine refills its rows by itself while it has more prompts than rows.
    step = settings.batch_size * (1 if task.kind == "categorical" else 4)
    samples = settings.num_samples
    sampling = SamplingParams(settings.temperature, settings.top_k, max_tokens=settings.max_new_tokens)
    correct = [0] * n
    with (
        ThreadPoolExecutor(os.cpu_count()) as graders,
        tqdm(total=n, desc=task.name, unit="ex", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(order), step):
            chosen = order[start : start + step]
            batch = [conversations[i] for i in chosen]
            asked = [prompts[i] for i in chosen]
            if task.kind == "categorical":
                answers = most_likely(engine.logits_at(asked), batch, tokenizer)
            else:
                # Seeds of a row's own, whatever the order.
                each = [replace(sampling, seed=(seed * 1_000_003 + i * samples) % 2**31) for i in chosen]
                answers = [completion.text for completion in engine.generate(asked, each, samples)]
                chosen, batch = ([x for x in rows for _ in range(samples)] for rows in (chosen, batch))
            for i, right in zip(chosen, graders.map(task.grade, batch, answers), strict=True):
                correct[i] |= int(right)
            bar.update(len(asked))
    right = sum(correct)
    low, high = wilson(right, n)
    figure = f"pass@{samples}" if samples > 1 and task.kind == "generative" else "accuracy"
    log(f"{task.name}: {figure} {right / n:.4f} (n {n}, 95% {low:.4f} to {high:.4f})")
    return {"accuracy": right / n, "n": n, "interval": [low, high], "correct": correct}


def most_likely(logits: np.ndarray, conversations: list[dict], tokenizer: Tokenizer) -> list[str]:
    """The letter of each conversation with the highest logit; logits [n, V]."""
    answers = []
    for row, conversation in zip(logits, conversations, strict=True):
        letters = conversation["letters"]
        ids = [tokenizer.encode(letter) for letter in letters]
        if any(len(tokens) != 1 for tokens in ids):
            raise UserError(f"the letters {' '.join(letters)} are not single tokens of this tokenizer; train it again")
        answers.append(letters[int(np.argmax([row[token] for (token,) in ids]))])
    return answers


def chatcore(results: Mapping[str, Mapping]) -> dict:
    """{"chatcore", "chatcore_interval"}: the five tasks' mean centred accuracy, guessing 0, perfect 1; {"chatcore":
    None} where one is missing.
    """
    if not set(CHATCORE) <= set(results):
        return {"chatcore": None}
    measured = [(results[name]["accuracy"], results[name]["n"], chance) for name, chance in CHATCORE.items()]
    mean, low, high = centred_mean(measured)
    return {"chatcore": mean, "chatcore_interval": [low, high]}
