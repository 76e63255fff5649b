"""Reinforcement learning: the reference's simplified GRPO on a task with a reward.

    python -m nanochat_jax rl --workdir runs/tiny_cpu

Each step samples several answers to several questions in one batch through the engine, over all devices; an answer's
advantage is its reward minus the mean over its question. The objective is sum(log-probability * advantage) over the
tokens the model itself wrote, divided by their number in a microbatch, averaged over microbatches: no KL term, no
ratio, one update a step. With --rl.clip 0.2 it is PPO's clipped ratio times the advantage, normalized alike, and
--rl.updates-per-batch may be more than one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from nanochat_jax.config import Config, RLConfig
from nanochat_jax.data.position import digest
from nanochat_jax.distributed import gather_json, leaders
from nanochat_jax.errors import UsageError, UserError
from nanochat_jax.inference.buckets import bucket
from nanochat_jax.inference.decoding import empty_cache, prepare
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import Completion, SamplingParams
from nanochat_jax.inference.shared import make_engine
from nanochat_jax.memory import train_rows, with_loss_chunk
from nanochat_jax.model import flops_per_token, param_shapes
from nanochat_jax.optim import Schedule
from nanochat_jax.run import finished
from nanochat_jax.sharding import data_shards, put_batch
from nanochat_jax.stages.finetune import continued
from nanochat_jax.stages.policy import SHORTEST, clipped, policy_batch
from nanochat_jax.stages.samples import write_samples
from nanochat_jax.stages.session import Log, Session, is_done, open_session
from nanochat_jax.tasks import Task, load
from nanochat_jax.tokenizer import Tokenizer


def run(config: Config, workdir: Path, log: Log, force: bool = False) -> None:
    """Train the rl model in `workdir`/rl, from its newest checkpoint on; a complete stage is left alone.

    `force`: go on with other data, horizon or precision than it was begun with.
    """
    if is_done(workdir, "rl", log):
        return
    settings = config.rl
    check_settings(settings)
    session = open_session(config, workdir, "rl", settings, log, force)
    train_task = load(settings.task, "train", config.data, config.seed)
    held_out = load(settings.task, "val", config.data, config.seed)
    steps = steps_of(settings, train_task)
    schedule = Schedule(settings, steps, session.cfg.n_embd, weight_decay=settings.weight_decay)
    samples = settings.questions_per_step * settings.samples_per_question
    longest = longest_asked(config, train_task, held_out, session.tokenizer)
    max_len = min(session.cfg.sequence_len, longest + settings.max_new_tokens + 1)
    fit_update(session, samples, max_len)
    session.begin(schedule, samples_a_step=samples, questions=f"{len(train_task):,} ({digest(train_task)})")
    # The samples of a question share their prompt in the cache, where such groups divide over the mesh.
    together = math.gcd(settings.samples_per_question, settings.pass_k)
    engine = make_engine(
        session.state.params,
        session.cfg,
        session.tokenizer,
        max_rows=samples,
        max_len=max_len,
        mesh=session.mesh,
        samples=1 if samples % (together * data_shards(session.mesh)) else together,
        max_new=settings.max_new_tokens,
        logprobs=settings.clip > 0,
    )
    log(engine.describe())

    def measure() -> None:
        if session.owes("pass_at_k", settings.eval_every, at_first=True):
            engine.use(session.state.params)
            rates = pass_at_k(held_out, engine, session.tokenizer, settings, config.seed)
            session.validated(rates["1"], higher_is_better=True)
            session.metrics.write("pass_at_k", step=session.step, **{"pass": rates})
            session.console.step(session.step, **{"pass": rates})

    with session.loop() as stop:
        stop.measure(measure)
        while not stop.now(session.step) and session.step < session.last:
            step, clock = session.step, time.perf_counter()
            engine.use(session.state.params)
            order = (step * settings.questions_per_step + np.arange(settings.questions_per_step)) % len(train_task)
            questions = [train_task[int(i)] for i in order]
            prompts = [session.tokenizer.render_for_completion(question) for question in questions]
            answers = engine.generate(prompts, sampling(settings, config.seed, step), settings.samples_per_question)
            rewards = graded(train_task, questions, answers)
            sampled = time.perf_counter()
            batch = policy_batch(prompts, answers, rewards, settings.normalize_over, session.tokenizer.bos_id)
            metrics, compared, tokens = update(session, batch, schedule, step)
            place = f"questions {order[0]} to {order[-1]} of {len(train_task)}"
            checked = session.checked(step, metrics, place)
            done = time.perf_counter()
            session.step += 1
            written = sum(len(answer.ids) for answer in answers)
            prompted = sum(len(prompt) for prompt in prompts)
            session.meta["tokens"] += tokens
            # A sampled token costs a forward pass, a third of a trained one; so does a ratio.
            forward = written + prompted + (tokens if settings.clip else 0)
            session.meta["flops"] += flops_per_token(session.cfg) * (tokens + forward / 3)
            calls = [call for answer in answers for call in answer.tool_calls]
            values = {
                **checked,
                **{name: float(value) for name, value in compared.items()},
                "reward": float(rewards.mean()),
                "response_tokens": written / len(answers),
                "tool_valid": sum(call["result"] is not None for call in calls) / max(len(calls), 1),
                "rollout_seconds": sampled - clock,
                "update_seconds": done - sampled,
                "lr_mult": schedule.lr_multiplier(step),
                "eta_seconds": (done - clock) * (steps - session.step),
            }
            session.metrics.write("rl", step=step, **values)
            session.console.step(session.step, **values)
            if session.due(settings.save_every):
                session.save()  # before anything that can fail
            stop.measure(measure)
        complete = session.leave(stop, steps)
    if not complete:
        return
    seconds = session.meta["seconds"]
    write_samples(session, raw=False)
    if settings.control:
        continued(config, workdir, session.meta["flops"], session.meta.get("start"), log, force)
        if leaders(finished(workdir, "sft_continued")) is None:
            return
    session.finish(task=settings.task, seconds=seconds)


def check_settings(settings: RLConfig) -> None:
    """UsageError where clipping, the number of updates or the sampling cannot be meant."""
    clip, updates = settings.clip, settings.updates_per_batch
    if not 0 <= clip < 1:
        raise UsageError(f"--rl.clip {clip} is outside 0 (off) to below 1; PPO's usual value is 0.2")
    if updates < 1:
        raise UsageError(f"--rl.updates-per-batch {updates} is below 1, one update a step")
    if settings.samples_per_question < 2 or settings.temperature <= 0:
        raise UsageError(
            f"--rl.samples-per-question {settings.samples_per_question} --rl.temperature {settings.temperature}: only "
            "answers that differ teach anything; 2 samples or more and a temperature above 0 are needed"
        )
    sampling(settings, 0, 0)  # refuses what cannot be sampled with
    if updates > 1 and not clip:
        raise UsageError(
            f"--rl.updates-per-batch {updates} needs --rl.clip, such as 0.2: after the first update the answers are "
            "those of another policy"
        )


def steps_of(settings: RLConfig, task: Task) -> int:
    """Optimizer steps of a run on the training split of `task`."""
    return settings.num_iterations or max(1, len(task) // settings.questions_per_step)


def longest_asked(config: Config, train_task: Task, held_out: Task, tokenizer: Tokenizer) -> int:
    """Tokens of the longest prompt that a run asks. UserError where the context does not hold it and an answer."""
    asked = steps_of(config.rl, train_task) * config.rl.questions_per_step
    longest = max(
        longest_prompt(train_task, asked, tokenizer), longest_prompt(held_out, config.rl.eval_examples, tokenizer)
    )
    if longest >= config.model.sequence_len:
        raise UserError(
            f"--rl.task {config.rl.task} has a prompt of {longest} tokens, the context is {config.model.sequence_len}: "
            "name another task or raise --model.sequence-len"
        )
    return longest


def sampling(settings: RLConfig, seed: int, step: int) -> list[SamplingParams]:
    """Sampling parameters of each question of a step; every sample of the run draws with a seed of its own."""
    first = (seed * 1_000_003 + step * settings.questions_per_step * settings.samples_per_question) % 2**31
    return [
        SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_tokens=settings.max_new_tokens,
            seed=first + i * settings.samples_per_question,
        )
        for i in range(settings.questions_per_step)
    ]


def graded(task: Task, questions: Sequence[dict], answers: Sequence[Completion]) -> np.ndarray:
    """Rewards float32 [questions, samples]: 1 for a right answer, else 0."""
    samples = len(answers) // len(questions)
    rewards = [task.grade(questions[i // samples], answer.text) for i, answer in enumerate(answers)]
    # One grader's word for all processes: a time limit may cut one program here and not there.
    rewards = gather_json(rewards, "rewards")[0]
    return np.asarray(rewards, np.float32).reshape(len(questions), samples)


def fit_update(session: Session, samples: int, max_len: int) -> None:
    """Settle the samples in a microbatch and the chunk of the loss, beside the engine's weights and cache."""
    shards = data_shards(session.mesh)
    each = -(-samples // shards)
    weights = jax.eval_shape(functools.partial(prepare, cfg=session.cfg), param_shapes(session.cfg))
    cache = jax.eval_shape(functools.partial(empty_cache, session.cfg, each, max_len))
    rows = train_rows(
        session.config,
        session.stage,
        "rl",
        session.cfg,
        session.mesh,
        each,
        session.log,
        length=bucket(max_len, SHORTEST),
        weights=True,
        taken=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights, cache))),
    )
    session.stage = dataclasses.replace(session.stage, device_batch_size=rows)
    session.cfg = with_loss_chunk(session.config, session.cfg, rows, session.mesh)


def update(session: Session, batch: dict[str, np.ndarray], schedule: Schedule, step: int) -> tuple[dict, dict, int]:
    """The optimizer steps on a policy batch, whatever its number of rows: one, or with clipping `updates_per_batch`.

    All have the rates of `step`. Returns the metrics ("loss" before the first, "grad_norm" of the last); with clipping
    what `clipped` found (the gaps before the first, the rest before the last), else {}; and the tokens trained on.
    """
    rows, length = batch["inputs"].shape
    if rows == 0:
        return {"loss": 0.0, "grad_norm": 0.0}, {}, 0
    settings = session.stage
    here = settings.device_batch_size * data_shards(session.mesh)
    microbatches = bucket(-(-rows // here))
    padding = microbatches * here - rows
    fill = {"inputs": 0, "targets": -1, "weights": 0.0} | ({"logprobs": 0.0} if settings.clip else {})
    whole = {
        name: np.pad(batch[name], ((0, padding), (0, 0)), constant_values=nothing).reshape(microbatches, here, length)
        for name, nothing in fill.items()
    }
    first = {}
    with jax.set_mesh(session.mesh):
        policy = put_batch(whole, session.mesh, leading=1)
        targets = {name: policy[name] for name in ("inputs", "targets", "weights")}
        for _ in range(settings.updates_per_batch):
            if settings.clip:
                targets["weights"], last = clipped(session.state.params, policy, settings.clip, cfg=session.cfg)
                first = first or last
            hyper = schedule.hyper(step)
            session.state, metrics = session.compiled(targets, hyper)(session.state, targets, hyper)
    compared = {}
    if settings.clip:
        # A checkpoint is judged by the loss of the parameters it holds; what a later update spoils shows in the norm.
        metrics["loss"] = first["loss"]
        compared = {name: last[name] for name in ("ratio", "clip_fraction")}
        compared |= {name: first[name] for name in ("logprob_gap", "logprob_gap_max")}
    return metrics, compared, settings.updates_per_batch * microbatches * here * length


def pass_at_k(task: Task, engine: Engine, tokenizer: Tokenizer, settings: RLConfig, seed: int) -> dict[str, float]:
    """Share of held-out questions with a right answer among the first k of `pass_k` samples, for k = 1, 2, 4, ..."""
    questions = [task[i] for i in range(min(settings.eval_examples, len(task)))]
    prompts = [tokenizer.render_for_completion(question) for question in questions]
    how = [
        SamplingParams(settings.temperature, settings.top_k, max_tokens=settings.max_new_tokens, seed=seed + 1000 * i)
        for i in range(len(questions))
    ]
    rewards = graded(task, questions, engine.generate(prompts, how, settings.pass_k))
    ks = [2**i for i in range(settings.pass_k.bit_length()) if 2**i <= settings.pass_k]
    return {str(k): float((rewards[:, :k].max(axis=1) > 0).mean()) for k in ks}


def longest_prompt(task: Task, rows: int, tokenizer: Tokenizer) -> int:
    """Tokens of the longest prompt among the first `rows` questions, those a run will ask."""
    return max(len(tokenizer.render_for_completion(task[i])) for i in range(min(rows, len(task))))
