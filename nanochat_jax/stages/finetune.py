"""Mid-training and supervised fine-tuning: conversations packed into rows, the loss on what is to be learned.

    python -m nanochat_jax mid --workdir runs/tiny_cpu
    python -m nanochat_jax sft --workdir runs/tiny_cpu

Both start from the stage before, with fresh optimizer moments unless --sft.init-optimizer asks for those of that stage.
`continued` trains sft further, for as much compute as reinforcement learning used: the comparison without which a gain
of rl says little.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from nanochat_jax.config import DEFAULT_ROWS, Config, FinetuneConfig
from nanochat_jax.data.conversations import conversation_batches, epoch_rows
from nanochat_jax.distributed import barrier, is_leader, leaders
from nanochat_jax.errors import UserError
from nanochat_jax.evals.chat import chatcore
from nanochat_jax.model import flops_per_token
from nanochat_jax.optim import Schedule
from nanochat_jax.run import finished
from nanochat_jax.sharding import put_batch
from nanochat_jax.stages.evaluate import load_tasks, measure
from nanochat_jax.stages.samples import write_samples
from nanochat_jax.stages.session import Log, Session, is_done, open_session, start_of, step_batch
from nanochat_jax.tasks import Mixture, Task, parse
from nanochat_jax.train import eval_losses


def run(config: Config, workdir: Path, stage: str, log: Log, force: bool = False) -> None:
    """Train "mid" or "sft" in its folder of `workdir`; nothing to do where it is complete.

    `force`: go on with other data, horizon or precision than it was begun with.
    """
    settings: FinetuneConfig = getattr(config, stage)
    if stage == "sft" and not settings.init_from and start_of(stage, settings, workdir) == workdir / "base":
        log("sft: there is no mid stage in this run, so it starts from base")
    train(config, settings, workdir, stage, log, force)


def continued(config: Config, workdir: Path, flops: float, start: dict | None, log: Log, force: bool = False) -> None:
    """Train the model that rl started from on as sft does, in `workdir`/sft_continued, for `flops` FLOPs.

    `start`: what rl's checkpoints note of that model; None where they are older than such notes.
    """
    before = leaders(finished(workdir, "sft_continued"))
    same_start = leaders(start is None or before is None or before.get("start") == start)
    if before is not None and not (same_start and 0.9 < before["flops"] / flops < 1.1):
        was = f"made for {before['flops']:.3g} FLOPs, now {flops:.3g}" if same_start else "not begun where rl was"
        log(f"sft_continued: {was}: made anew")
        if is_leader():
            shutil.rmtree(workdir / "sft_continued")
        barrier("sft_continued removed")
    same = {"init_from": config.rl.init_from, "init_step": config.rl.init_step, "init_optimizer": False}
    settings = dataclasses.replace(config.sft, **same, stop_after=None, tasks_every=0)
    train(config, settings, workdir, "sft_continued", log, force, flops)


def train(
    config: Config,
    settings: FinetuneConfig,
    workdir: Path,
    name: str,
    log: Log,
    force: bool = False,
    flops: float | None = None,
) -> None:
    """The loop of every supervised stage."""
    if is_done(workdir, name, log):
        return
    session = open_session(config, workdir, name, settings, log, force)
    cfg, mesh = session.cfg, session.mesh
    check_mixture(name, settings)
    conversations = Mixture(settings.mixture, "train", config.data, config.seed)
    train_set, val_set = conversations.split(settings.val_rows)
    batch_tokens = settings.total_batch_size or DEFAULT_ROWS * cfg.sequence_len
    microbatches, rows = session.rows(batch_tokens)
    cfg = session.cfg
    packed = {"settings": settings, "sequence_len": cfg.sequence_len, "seed": config.seed}
    batches = conversation_batches(train_set, session.tokenizer, rows=microbatches * rows, **packed)
    step_flops = batch_tokens * flops_per_token(cfg)
    if flops is not None:
        steps = max(1, round(flops / step_flops))
    elif settings.num_iterations is not None:
        steps = settings.num_iterations
    elif (steps := session.horizon_before()) is None:
        there = epoch_rows(train_set, session.tokenizer, log=log, **packed)
        steps = max(1, math.ceil(there / (microbatches * rows)))  # where there is none, the first batch says so
    schedule = Schedule(settings, steps, cfg.n_embd, weight_decay=settings.weight_decay)
    tasks = load_tasks(config.eval.chat, config).values() if settings.tasks_every > 0 else ()
    pace = session.begin(schedule, batches, tokens_a_step=batch_tokens)
    pending = None

    def record(step: int, metrics: dict, waited: float, place: str) -> None:
        values = session.checked(step, metrics, place)
        values |= {"lr_mult": schedule.lr_multiplier(step), "data_seconds": waited, **pace.lap(step + 1)}
        session.metrics.write("train", step=step, targets=int(metrics["targets"]), **values)
        session.console.step(step + 1, **values)

    def validate() -> None:
        """The validation loss and the tasks, where they are due."""
        if len(val_set) and session.owes("val", settings.eval_every):
            loss = validation_loss(session, val_set, rows, packed)
            if loss is None:
                session.log(
                    f"{name} {session.step}: no held-out conversation has a target within {cfg.sequence_len} tokens"
                )
            else:
                session.validated(loss)
                session.metrics.write("val", step=session.step, loss=loss)
                session.log(f"{name} {session.step}: validation loss {loss:.4f}")
        if tasks and session.step % settings.tasks_every == 0 and session.owes("tasks", settings.tasks_every):
            session.metrics.write("tasks", step=session.step, **task_figures(session, tasks, settings.tasks_rows))

    with session.loop() as stop:
        stop.measure(validate)
        while not stop.now(session.step) and session.step < session.last:
            step = session.step
            batch, waited = step_batch(batches, microbatches, mesh)
            hyper = schedule.hyper(step)
            session.state, metrics = session.compiled(batch, hyper)(session.state, batch, hyper)
            if pending:
                record(*pending)
            position = batches.get_state()
            place = f"epoch {position['epoch']}, read up to conversation {position['cursor']} of {len(train_set)}"
            pending = (step, metrics, waited, place)
            session.step += 1
            session.meta["tokens"] += batch_tokens
            session.meta["flops"] += step_flops
            if session.due(settings.save_every, settings.eval_every, settings.tasks_every):
                record(*pending)
                pending = None
                if session.due(settings.save_every):
                    session.save(batches)  # before anything that can fail
                stop.measure(validate)
                pace.skip()
        if pending:
            record(*pending)
        complete = session.leave(stop, steps, batches)
    if not complete:
        return
    write_samples(session, raw=False)
    position = batches.get_state()
    session.finish(
        conversations=len(train_set),
        batch_tokens=batch_tokens,
        truncated=position["truncated"],
        dropped=position["dropped"],
    )


def check_mixture(name: str, settings: FinetuneConfig) -> None:
    """UserError where there is nothing to learn from."""
    if not any(rows != 0 and epochs for _, rows, epochs in map(parse, settings.mixture)):
        raise UserError(f"--{name}.mixture is empty: name the sets to learn from, such as smoltalk:10000")


def task_figures(session: Session, tasks: Iterable[Task], rows: int) -> dict:
    """{"accuracy": {task: share}, "chatcore"} of the model as it is, `rows` questions of each generative task."""
    config, model = session.config, (session.state.params, session.cfg, session.mesh, session.tokenizer)
    found = measure(model, tasks, config, config.eval.max_examples, session.log, written=rows)
    value = chatcore(found)["chatcore"]
    if value is not None:
        session.log(f"{session.name} {session.step}: ChatCORE {value:.4f}")
    return {"accuracy": {name: result["accuracy"] for name, result in found.items()}, "chatcore": value}


def validation_loss(session: Session, held_out: Sequence[dict], rows: int, packed: dict) -> float | None:
    """Mean loss over the targets of the held-out conversations, each once, nats; None where there is no target."""
    total, counted = 0.0, 0
    left = epoch_rows(held_out, session.tokenizer, **packed)
    batches = conversation_batches(held_out, session.tokenizer, rows=rows, **packed)
    while left > 0:
        batch = next(batches)
        batch["targets"][left:] = -1  # the iterator goes on with the next epoch
        left -= rows
        counted += int((batch["targets"] >= 0).sum())
        placed = put_batch(batch, session.mesh)
        with jax.set_mesh(session.mesh):
            losses = eval_losses(session.state.params, placed["inputs"], placed["targets"], cfg=session.cfg)
        total += float(losses.sum())
    return total / counted if counted else None
