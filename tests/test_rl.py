"""Masks, advantages and weights of reinforcement learning against arrays worked out by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax.config import GPTConfig, ModelConfig, RLConfig
from nanochat_jax.inference.engine import Completion
from nanochat_jax.loss import token_losses
from nanochat_jax.optim import Schedule
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.policy import policy_batch
from nanochat_jax.stages.rl import sampling, update
from nanochat_jax.train import born_params, with_optimizer


def test_policy_batch_by_hand():
    """Two questions of two samples, microbatches of two; the second question was always right and drops out."""
    prompts = [[1, 2, 3], [4, 5]]
    answers = [
        Completion(ids=[10, 11, 12], mask=[1, 0, 1]),  # a tool wrote 11
        Completion(ids=[13], mask=[1]),
        Completion(ids=[14], mask=[1]),
        Completion(ids=[15], mask=[1]),
    ]
    rewards = np.asarray([[1, 0], [1, 1]], np.float32)
    batch = policy_batch(prompts, answers, rewards, microbatch=2, pad=0)
    assert batch["inputs"].shape == (2, 32)
    np.testing.assert_array_equal(batch["inputs"][0, :6], [1, 2, 3, 10, 11, 0])
    np.testing.assert_array_equal(batch["targets"][0, :6], [-1, -1, 10, -1, 12, -1])
    np.testing.assert_array_equal(batch["targets"][1, :4], [-1, -1, 13, -1])
    # advantage +-0.5, three drawn tokens in the microbatch, two microbatches in the step
    np.testing.assert_allclose(batch["weights"][0, :6], [0, 0, 0.5 / 3 / 2, 0, 0.5 / 3 / 2, 0])
    np.testing.assert_allclose(batch["weights"][1, :4], [0, 0, -0.5 / 3 / 2, 0])
    assert (batch["weights"][batch["targets"] < 0] == 0).all()


def test_samples_of_a_question_are_split_into_microbatches():
    answers = [Completion(ids=[7] * n, mask=[1] * n) for n in (1, 2, 3, 4)]
    batch = policy_batch([[1, 2]], answers, np.asarray([[1, 0, 0, 0]], np.float32), microbatch=2, pad=0)
    drawn = [batch["weights"][i][batch["targets"][i] >= 0] for i in range(4)]
    for weights, advantage, tokens in zip(drawn, (0.75, -0.25, -0.25, -0.25), (3, 3, 7, 7), strict=True):
        np.testing.assert_allclose(weights, advantage / tokens / 2)


def test_nothing_to_learn_gives_no_rows():
    answers = [Completion(ids=[7], mask=[1])] * 2
    batch = policy_batch([[1, 2]], answers, np.zeros((1, 2), np.float32), microbatch=8, pad=0)
    assert batch["inputs"].shape[0] == 0


def test_every_sample_of_a_run_has_its_own_seed():
    settings = RLConfig(questions_per_step=3, samples_per_question=4)
    seeds = [how.seed + j for step in range(5) for how in sampling(settings, 42, step) for j in range(4)]
    assert len(set(seeds)) == 5 * 3 * 4


@pytest.mark.parametrize("spec", ["1", "4"])
def test_updates_make_the_rewarded_answer_likelier(spec):
    """Also where three microbatches of rows, of which the last is not full, are spread over devices."""
    cfg = GPTConfig.from_depth(ModelConfig(2, 16, 16, None, 64), 64)
    mesh = make_mesh(spec)
    session = SimpleNamespace(
        stage=SimpleNamespace(device_batch_size=1),
        mesh=mesh,
        cfg=cfg,
        state=with_optimizer(cfg, mesh, born_params(cfg, mesh, 0)),
    )
    prompts = [[1, 2, 3]]
    answers = [Completion(ids=[10 + i, 20 + i], mask=[1, 1]) for i in range(3)]
    rewards = np.asarray([[1, 0, 0]], np.float32)

    def nats():
        inputs = np.asarray([[1, 2, 3, 10 + i] for i in range(4)], np.int32)
        targets = np.asarray([[-1, -1, 10 + i, 20 + i] for i in range(4)], np.int32)
        losses = jax.jit(token_losses, static_argnums=1)(jax.device_get(session.state.params), cfg, inputs, targets)
        return np.asarray(losses).sum(axis=1)

    before = nats()
    schedule = Schedule(RLConfig(init_lr_frac=0.5), 10, cfg.n_embd)
    for step in range(3):
        metrics, tokens = update(session, policy_batch(prompts, answers, rewards, 8, 0), schedule, step)
        assert np.isfinite(metrics["loss"]) and tokens >= 3 * 32
    change = nats() - before
    assert change[0] < -0.1 and change[1] > 0.01 and change[2] > 0.01
