"""Runs of the stages as functions, and what is compared between two of them."""

from unittest import mock

import numpy as np

from nanochat_jax.checkpoint import restore
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.run import load_model, open_run
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages import finetune, pretrain, rl
from nanochat_jax.stages import tokenizer as tokenizer_stage
from nanochat_jax.train import saved_shapes


def reinforce(config, folder, log):
    """A model this small is never right, so that nothing would be learned: here an even number of tokens is."""

    def graded(task, questions, answers):
        rewards = [len(answer.ids) % 2 == 0 for answer in answers]
        return np.asarray(rewards, np.float32).reshape(len(questions), -1)

    with mock.patch.object(rl, "graded", graded):
        rl.run(config, folder, log)


WORK = {
    "base": pretrain.run,
    "mid": lambda config, folder, log: finetune.run(config, folder, "mid", log),
    "sft": lambda config, folder, log: finetune.run(config, folder, "sft", log),
    "rl": reinforce,
}
BEFORE = {"base": None, "mid": "base", "sft": "mid", "rl": "sft"}


def quiet(_):
    pass


def start(folder, config):
    """A run with a tokenizer."""
    open_run(config, folder, log=quiet)
    tokenizer_stage.run(config, folder, quiet)
    return folder


def start_after(run, folder, stage, config):
    """A run in which the stages before `stage` are those of `run`."""
    start(folder, config)
    if BEFORE[stage]:
        (folder / BEFORE[stage]).symlink_to(run / BEFORE[stage])
    return folder


def records(folder, stage="base"):
    return MetricsLog.read(folder / stage / "metrics.jsonl")


def losses(folder, stage="base"):
    return [row["loss"] for row in records(folder, stage) if row["kind"] == "train"]


def numbers(folder, stage):
    """What was logged, clocks left out."""
    clocks = {"step_seconds", "tok_per_sec", "mfu", "eta_seconds", "data_seconds", "rollout_seconds", "update_seconds"}
    return [{key: value for key, value in row.items() if key not in clocks} for row in records(folder, stage)]


def last_state(folder, stage):
    """Parameters and optimizer state of the newest checkpoint, and its step."""
    _, cfg, *_ = load_model(folder, stage)
    tree, _, step = restore(folder / stage / "checkpoints", None, saved_shapes(cfg, make_mesh("1")))
    return tree, step
