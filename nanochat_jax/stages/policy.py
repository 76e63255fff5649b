"""The objective of reinforcement learning as rows of tokens with weights, for the step that all stages share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig
from nanochat_jax.inference.buckets import bucket
from nanochat_jax.inference.requests import Completion
from nanochat_jax.loss import token_losses
from nanochat_jax.model import Params
from nanochat_jax.sharding import BATCH, shard

SHORTEST = 32
"""Rows are padded to this many tokens times a power of two, so that few shapes are compiled."""


def policy_batch(
    prompts: Sequence[Sequence[int]], answers: Sequence[Completion], rewards: np.ndarray, microbatch: int, pad: int
) -> dict[str, np.ndarray]:
    """The update's rows: "inputs", "targets" int32 [n, T] and "weights" float32 [n, T], loss = sum(weights * nats).

    "logprobs" float32 [n, T] are the sampler's of the tokens that the model drew, 0 elsewhere; 0 if it gives none.
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
    length = bucket(longest, SHORTEST)
    inputs = np.full((len(rows), length), pad, np.int32)
    targets = np.full((len(rows), length), -1, np.int32)
    weights, logprobs = (np.zeros((len(rows), length), np.float32) for _ in range(2))
    for i, (prompt, answer, weight) in enumerate(rows):
        tokens = [*prompt, *answer.ids]
        start, stop = len(prompt) - 1, len(tokens) - 1
        inputs[i, :stop] = tokens[:-1]
        drawn = np.asarray(answer.mask, bool)
        targets[i, start:stop] = np.where(drawn, answer.ids, -1)
        weights[i, start:stop] = np.where(drawn, weight, 0.0)
        logprobs[i, start:stop] = np.where(drawn, answer.logprobs or 0.0, 0.0)
    return {"inputs": inputs, "targets": targets, "weights": weights, "logprobs": logprobs}


@functools.partial(jax.jit, static_argnames="cfg")
def clipped(
    params: Params, batch: dict[str, jax.Array], clip: float, *, cfg: GPTConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weights [A, rows, T] that give `train_step` the gradient of PPO's clipped objective (arXiv 1707.06347).

    With ratio = exp(log-probability now - the sampler's) a drawn token of weight w adds min(ratio * w, clip(ratio,
    1 - clip, 1 + clip) * w) to the objective. Its gradient is ratio * w times that of the log-probability, and 0 where
    the clipped term is the smaller one. A pass of its own over `batch`, [A, rows, T] as `policy_batch` has it, so that
    the step stays that of all stages.

    Besides, over the drawn tokens: "loss", the objective negated; the mean "ratio"; "clip_fraction", the share without
    a gradient; "logprob_gap" and "logprob_gap_max", mean and largest |log ratio|, which before the first update is how
    far sampler and trainer differ.
    """
    nats = jax.lax.map(lambda rows: token_losses(params, cfg, *rows), (batch["inputs"], batch["targets"]))
    drawn, weights = batch["targets"] >= 0, batch["weights"]
    gaps = -nats - batch["logprobs"]
    ratio = jnp.exp(gaps)
    objective = jnp.minimum(ratio * weights, jnp.clip(ratio, 1 - clip, 1 + clip) * weights)
    is_clipped = objective < ratio * weights
    stats = {
        "loss": -jnp.sum(objective),
        "ratio": jnp.mean(ratio, where=drawn),
        "clip_fraction": jnp.mean(is_clipped, where=drawn),
        "logprob_gap": jnp.mean(jnp.abs(gaps), where=drawn),
        "logprob_gap_max": jnp.max(jnp.abs(gaps)),
    }
    return shard(jnp.where(is_clipped, 0.0, ratio * weights), None, *BATCH), stats
