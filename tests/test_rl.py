"""Masks, advantages, weights and clipped ratios of reinforcement learning against what was worked out by hand."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from stage_runs import last_state, numbers, quiet, records, reinforce, start_after

from nanochat_jax.config import GPTConfig, ModelConfig, RLConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference import engine as engine_module
from nanochat_jax.inference.requests import Completion, SamplingParams
from nanochat_jax.inference.shared import make_engine
from nanochat_jax.loss import token_losses, weighted_loss
from nanochat_jax.model import flops_per_token, forward, init_params
from nanochat_jax.optim import Schedule
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages import rl
from nanochat_jax.stages.policy import clipped, policy_batch
from nanochat_jax.stages.rl import pass_at_k, sampling, update
from nanochat_jax.stages.session import Session
from nanochat_jax.tasks import gsm8k, load
from nanochat_jax.tasks.task import Task, dialogue
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import born_params, with_optimizer

CFG = GPTConfig.from_depth(ModelConfig(1, 32, 16, None, 64), 64)


def noisy(cfg):
    """Parameters of which none is 0, so that all have a gradient."""
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    fresh = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.15 * jax.random.normal(next(keys), p.shape), fresh)


def test_policy_batch_by_hand():
    """Two questions of two samples, microbatches of two; the second question was always right and drops out."""
    prompts = [[1, 2, 3], [4, 5]]
    answers = [
        Completion(ids=[10, 11, 12], mask=[1, 0, 1], logprobs=[-1.0, -2.0, -3.0]),  # a tool wrote 11
        Completion(ids=[13], mask=[1], logprobs=[-2.0]),
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
    np.testing.assert_array_equal(batch["logprobs"][:, 2:5], [[-1, 0, -3], [-2, 0, 0]])
    assert (batch["weights"][batch["targets"] < 0] == 0).all()
    assert (batch["targets"][:, 5:] == -1).all() and (batch["inputs"][:, 5:] == 0).all()


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


def test_pass_at_k_is_the_share_with_a_right_answer_among_the_first_k(tokenizer):
    task = Task("t", "generative", range(2), lambda row: dialogue(str(row), "y"), lambda _, text: text == "y")
    asked = []

    def generate(prompts, how, samples):
        assert prompts == [tokenizer.render_for_completion(task[i]) for i in range(2)] and samples == 4
        asked.extend(how)
        return [Completion(text=text) for text in "nnynynnn"]

    settings = RLConfig(pass_k=4, temperature=0.7, top_k=9, max_new_tokens=5)
    rates = pass_at_k(task, SimpleNamespace(generate=generate), tokenizer, settings, 3)
    assert rates == {"1": 0.5, "2": 0.5, "4": 1.0}
    assert {(how.temperature, how.top_k, how.max_tokens) for how in asked} == {(0.7, 9, 5)}
    assert len({how.seed + j for how in asked for j in range(4)}) == 2 * 4


def test_the_clipped_objective_and_its_gradient_are_those_of_the_formula():
    """Ratios given by hand, for answers better and worse than the mean; a tool's token, padding, a padded microbatch."""
    prompts, rewards = [[1, 2, 3], [4, 5]], np.asarray([[1, 0], [1, 1]], np.float32)
    ids, mask = [[10, 11, 12, 13], [14, 15, 16], [17], [18]], [[1, 0, 1, 1], [1, 1, 1], [1], [1]]
    params, total = noisy(CFG), 6 * 2  # drawn tokens of the first question's microbatch, two microbatches
    tokens, advantages = jnp.asarray([prompts[0] + ids[0], prompts[0] + ids[1] + [0]]), jnp.asarray([[0.5], [-0.5]])
    ratios, drawn = np.asarray([[1, 9, 1.5, 0.5], [0.5, 1.5, 1.1, 9]]), jnp.asarray([mask[0], mask[1] + [0]])

    def log_probs(params):
        table = jax.nn.log_softmax(forward(params, CFG, tokens[:, :-1]))[:, 2:]
        return jnp.take_along_axis(table, tokens[:, 3:, None], axis=-1)[..., 0]

    sampled = jax.jit(log_probs)(params) - np.log(ratios)

    def formula(params):
        ratio = jnp.exp(log_probs(params) - sampled)
        return -jnp.sum(jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages) * drawn) / total

    logprobs = [*np.asarray(sampled * drawn).tolist(), [0.0], [0.0]]
    answers = [Completion(ids=a, mask=b, logprobs=c[: len(a)]) for a, b, c in zip(ids, mask, logprobs, strict=True)]
    batch = policy_batch(prompts, answers, rewards, microbatch=2, pad=0)
    fill = {"inputs": 0, "targets": -1, "weights": 0, "logprobs": 0}
    batch = {
        name: np.pad(x, ((0, 2), (0, 0)), constant_values=fill[name]).reshape(4, 1, 32) for name, x in batch.items()
    }
    weights, stats = clipped(params, batch, 0.2, cfg=CFG)
    # Clipped: 1.5 of what is to become likelier, 0.5 of what is to become less likely.
    np.testing.assert_allclose(weights[0, 0, 2:7], np.asarray([1.0, 0, 0, 0.5, 0]) * 0.5 / total, rtol=1e-4)
    np.testing.assert_allclose(weights[1, 0, 2:6], np.asarray([0, 1.5, 1.1, 0]) * -0.5 / total, rtol=1e-4)
    assert not np.asarray(weights[2:]).any()
    assert stats["ratio"] == pytest.approx(6.1 / 6, rel=1e-5) and stats["clip_fraction"] == pytest.approx(2 / 6)
    gaps = np.abs(np.log([1, 1.5, 0.5, 0.5, 1.5, 1.1]))
    assert stats["logprob_gap"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert stats["logprob_gap_max"] == pytest.approx(np.log(2), rel=1e-4)

    def trained(params):
        rows = (x.reshape(4, 32) for x in (batch["inputs"], batch["targets"], weights))
        return weighted_loss(params, CFG, *rows)

    value, expected = jax.jit(jax.value_and_grad(formula))(params)
    assert stats["loss"] == pytest.approx(float(value), rel=1e-4)
    got = jax.jit(jax.grad(trained))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, expected)


def opened(spec, settings, params=None):
    """As much of a session as an update needs."""
    mesh = make_mesh(spec)
    state = with_optimizer(CFG, mesh, born_params(CFG, mesh, 0) if params is None else params)
    session = SimpleNamespace(stage=settings, mesh=mesh, cfg=CFG, state=state, programs={}, log=quiet, name="rl")
    session.compiled = partial(Session.compiled, session)
    return session


@pytest.mark.parametrize("spec", ["1", "4"])
def test_updates_make_the_rewarded_answer_likelier(spec):
    """Also where three microbatches of rows, of which the last is not full, are spread over devices."""
    settings = RLConfig(init_lr_frac=0.5, device_batch_size=1)
    session = opened(spec, settings)
    prompts = [[1, 2, 3]]
    answers = [Completion(ids=[10 + i, 20 + i], mask=[1, 1]) for i in range(3)]
    rewards = np.asarray([[1, 0, 0]], np.float32)

    def nats():
        inputs = np.asarray([[1, 2, 3, 10 + i] for i in range(4)], np.int32)
        targets = np.asarray([[-1, -1, 10 + i, 20 + i] for i in range(4)], np.int32)
        losses = jax.jit(token_losses, static_argnums=1)(jax.device_get(session.state.params), CFG, inputs, targets)
        return np.asarray(losses).sum(axis=1)

    before = nats()
    schedule = Schedule(settings, 10, CFG.n_embd)
    for step in range(3):
        metrics, compared, tokens = update(session, policy_batch(prompts, answers, rewards, 8, 0), schedule, step)
        assert np.isfinite(metrics["loss"]) and tokens >= 3 * 32 and not compared
    change = nats() - before
    assert change[0] < -0.1 and change[1] > 0.01 and change[2] > 0.01


def test_several_updates_are_alike_on_one_device_and_on_four():
    """Each update sees the ratio that those before it made; the gap is that before the first."""
    settings = RLConfig(init_lr_frac=0.5, device_batch_size=1, clip=0.2, updates_per_batch=3)
    params, schedule = jax.device_get(noisy(CFG)), Schedule(settings, 10, CFG.n_embd)
    inputs = np.asarray([[1, 2, 3, 10 + i] for i in range(3)], np.int32)
    targets = np.asarray([[-1, -1, 10 + i, 20 + i] for i in range(3)], np.int32)
    nats = np.asarray(jax.jit(token_losses, static_argnums=1)(params, CFG, inputs, targets))[:, 2:]
    answers = [Completion([10 + i, 20 + i], [1, 1], logprobs=(-nats[i]).tolist()) for i in range(3)]
    batch = policy_batch([[1, 2, 3]], answers, np.asarray([[1, 0, 0]], np.float32), 8, 0)

    def ends(spec, settings):
        session = opened(spec, settings, params)
        metrics, compared, tokens = update(session, batch, schedule, 0)
        return {**compared, "loss": metrics["loss"], "tokens": tokens}, jax.device_get(session.state.params)

    (one, alone), (four, together) = (ends(spec, settings) for spec in ("1", "4"))
    assert one["logprob_gap_max"] < 1e-5 and abs(one["ratio"] - 1) > 0.01 and one["clip_fraction"] > 0
    assert one["tokens"] == four["tokens"] == 3 * 4 * 32
    for name in one.keys() - {"logprob_gap", "logprob_gap_max"}:
        assert float(one[name]) == pytest.approx(float(four[name]), rel=1e-3, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), alone, together)
    first = ends("1", replace(settings, updates_per_batch=1))[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["clip_fraction"] == 0
    assert first["loss"] == one["loss"]


def test_the_sampler_and_the_trainer_agree_on_log_probabilities(tokenizer, monkeypatch):
    """Whatever the temperature and top-k it drew with, tools writing into the rows."""
    monkeypatch.setattr(engine_module, "evaluate_tool", lambda expression: "42")
    cfg = GPTConfig.from_depth(ModelConfig(2, 32, 16, None, 96, "SL"), tokenizer.vocab_size)
    params, mesh = noisy(cfg), make_mesh("4")
    often = [tokenizer.special_id(f"<|python_{side}|>") for side in ("start", "end")]
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, jnp.asarray(often)].mul(6)
    engine = make_engine(params, cfg, tokenizer, max_rows=8, mesh=mesh, logprobs=True)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("The ship", "Congress shall assemble")]
    answers = engine.generate(prompts, SamplingParams(0.7, top_k=50, max_tokens=30), 8)
    assert sum(len(answer.mask) - sum(answer.mask) for answer in answers) > 10
    batch = policy_batch(prompts, answers, np.tile(np.asarray([1, 0], np.float32), (2, 4)), 8, tokenizer.bos_id)
    _, stats = clipped(params, {name: x[None] for name, x in batch.items()}, 0.2, cfg=cfg)
    assert 0 < stats["logprob_gap_max"] < 1e-4 and stats["clip_fraction"] == 0


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    for values, said in (
        ({"updates_per_batch": 2}, r"--rl.updates-per-batch 2 needs --rl.clip"),
        ({"updates_per_batch": 0}, r"--rl.updates-per-batch 0 is below 1"),
        ({"clip": 1.0}, r"--rl.clip 1.0 is outside 0 \(off\) to below 1"),
    ):
        with pytest.raises(UserError, match=said):
            rl.run(replace(tiny.config, rl=replace(tiny.config.rl, **values)), tmp_path, quiet)


def test_a_stage_with_several_updates_goes_on_exactly(run, tmp_path):
    settings = replace(tiny.config.rl, control=False, num_iterations=4, clip=0.2, updates_per_batch=2)
    config = replace(tiny.config, rl=settings)
    ends = []
    for name, stops in (("whole", [None]), ("parts", [1, 3, None])):
        folder = start_after(run, tmp_path / name, "rl", config)
        for stop in stops:
            reinforce(replace(config, rl=replace(settings, stop_after=stop)), folder, quiet)
        ends.append(folder)
    whole, parts = ends
    every, again = ([row for row in numbers(folder, "rl") if row["kind"] == "rl"] for folder in ends)
    assert every == again
    jax.tree.map(np.testing.assert_array_equal, last_state(whole, "rl"), last_state(parts, "rl"))
    compared = [row for row in every if "ratio" in row]
    assert max(row["logprob_gap_max"] for row in compared) < 1e-4
    assert any(abs(row["ratio"] - 1) > 1e-3 for row in compared)


def test_gsm8k_goes_the_way_of_the_offline_task(run, tmp_path, monkeypatch):
    """A mirror of a few questions. A model this small is never right: an answer's length is graded for its number."""
    monkeypatch.setattr(gsm8k, "is_final_answer", lambda row, text: (len(text) - int(row["answer"])) % 2 == 0)
    questions = [f"Tom has {i} apples and eats one. How many?" for i in range(1, 41)]
    answers = [f"He has {i}-1=<<{i}-1={i - 1}>>{i - 1} left.\n#### {i - 1}" for i in range(1, 41)]
    rows = datasets.Dataset.from_dict({"question": questions, "answer": answers})
    rows.to_parquet(tmp_path / "hub" / "openai" / "gsm8k" / "main" / "train.parquet")
    config = replace(
        tiny.config,
        data=replace(tiny.config.data, mirror=str(tmp_path / "hub"), cache=str(tmp_path / "cache")),
        rl=replace(tiny.config.rl, task="gsm8k", num_iterations=2, control=False),
    )
    asked, written = [], []

    def noted(prompts, answers, *rest):
        asked.extend(prompts)
        written.extend(token for answer in answers for token in answer.ids)
        return policy_batch(prompts, answers, *rest)

    monkeypatch.setattr(rl, "policy_batch", noted)
    folder = start_after(run, tmp_path / "run", "rl", config)
    rl.run(config, folder, quiet)
    tokenizer, task = Tokenizer.load(folder / "tokenizer"), load("gsm8k", "train", config.data, config.seed)
    assert asked == [tokenizer.render_for_completion(task[i]) for i in range(2 * config.rl.questions_per_step)]
    done = json.loads((folder / "rl" / "done.json").read_text())
    passes = done["tokens"] + (len(written) + sum(map(len, asked))) / 3
    assert done["flops"] == pytest.approx(flops_per_token(gpt_config(config, tokenizer.vocab_size)) * passes)
    logged = records(folder, "rl")
    assert [(row["kind"], row["step"]) for row in logged] == [("pass_at_k", 0), ("rl", 0), ("rl", 1), ("pass_at_k", 2)]
    assert {"reward", "response_tokens", "tool_valid", "rollout_seconds", "update_seconds"} <= logged[1].keys()
    assert any(row["grad_norm"] > 0 for row in logged[1:3]) and set(logged[-1]["pass"]) == {"1", "2"}
