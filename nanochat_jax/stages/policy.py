"""The objective of reinforcement learning as rows of tokens with weights, for the step that all stages share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanochat_jax.inference.engine import Completion, bucket

SHORTEST = 32
"""Rows are padded to this many tokens times a power of two, so that few shapes are compiled."""


def policy_batch(
    prompts: Sequence[Sequence[int]], answers: Sequence[Completion], rewards: np.ndarray, microbatch: int, pad: int
) -> dict[str, np.ndarray]:
    """The update's rows: "inputs", "targets" int32 [n, T] and "weights" float32 [n, T], loss = sum(weights * nats).

    A token that the model drew has weight advantage / (drawn tokens of its microbatch) / microbatches, every other one
    0: prompts, what a tool wrote, padding. Microbatches are `microbatch` samples of one question in order (all of its
    samples where there are fewer). Rows of a question whose samples were all right or all wrong have weight 0
    throughout and are left out; n may be 0.
    """
    count, samples = rewards.shape
    size = min(microbatch, samples)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    groups = count * -(-samples // size)
    rows = []
    for question in range(count):
        if not advantages[question].any():
            continue
        for first in range(0, samples, size):
            members = range(first, min(first + size, samples))
            drawn = sum(sum(answers[question * samples + j].mask) for j in members)
            for j in members:
                answer = answers[question * samples + j]
                weight = advantages[question, j] / max(drawn, 1) / groups
                rows.append((prompts[question], answer, weight))
    longest = max((len(prompt) + len(answer.ids) for prompt, answer, _ in rows), default=2) - 1
    length = bucket(longest, 2**30, SHORTEST)
    inputs = np.full((len(rows), length), pad, np.int32)
    targets = np.full((len(rows), length), -1, np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, (prompt, answer, weight) in enumerate(rows):
        tokens = [*prompt, *answer.ids]
        start, stop = len(prompt) - 1, len(tokens) - 1
        inputs[i, :stop] = tokens[:-1]
        drawn = np.asarray(answer.mask, bool)
        targets[i, start:stop] = np.where(drawn, answer.ids, -1)
        weights[i, start:stop] = np.where(drawn, weight, 0.0)
    return {"inputs": inputs, "targets": targets, "weights": weights}
