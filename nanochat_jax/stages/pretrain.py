"""The base stage: next-token prediction on raw text, horizon and schedules from `depth`.

python -m nanochat_jax pretrain --experiment experiments/tiny_cpu.py
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

import jax

from nanochat_jax.config import Config
from nanochat_jax.data.download import prepare_shards
from nanochat_jax.data.pretrain import pretrain_batches
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import Console
from nanochat_jax.model import flops_per_token
from nanochat_jax.optim import base_schedule
from nanochat_jax.run import record_data
from nanochat_jax.stages.evaluate import core_bundle, core_metric, validation_bpb
from nanochat_jax.stages.samples import write_samples
from nanochat_jax.stages.session import Log, due, initial_params, is_done, open_session, step_batch
from nanochat_jax.train import train_step


def run(config: Config, workdir: Path, log: Log) -> None:
    """Train the base model in `workdir`/base, from its newest checkpoint on; a complete stage is left alone."""
    if is_done(workdir, "base", log):
        return
    train_files, val_file = prepare_shards(config.data, log)
    record_data(workdir, [*train_files, val_file])
    session = open_session(config, workdir, "base", config.base, log)
    schedule, horizon = base_schedule(config, session.cfg)
    if schedule.steps < 1:
        raise UserError(f"a horizon of {horizon.tokens} tokens is less than one step of {horizon.batch_tokens}")
    microbatches, rows = session.rows(horizon.batch_tokens)
    cfg, mesh, stage = session.cfg, session.mesh, config.base
    batches = pretrain_batches(
        train_files,
        session.tokenizer,
        rows=microbatches * rows,
        sequence_len=cfg.sequence_len,
        packing=config.data.packing,
        streams=config.data.streams,
        buffer_docs=config.data.buffer_docs,
    )
    if stage.core_every:
        core_bundle(config, log)  # what is missing should be missed now, not after hours
    start = functools.partial(initial_params, session, config.seed)
    pace = session.begin(schedule, start, batches, tokens_a_step=horizon.batch_tokens)
    console = Console("base", schedule.steps)
    last = schedule.steps if stage.stop_after is None else min(schedule.steps, stage.stop_after)
    step_flops = horizon.batch_tokens * flops_per_token(cfg)
    pending = None

    def record(step: int, metrics: dict, waited: float) -> None:
        """Read a step's loss only after the next one was dispatched, so that the devices never wait for the host."""
        loss = float(metrics["loss"])
        session.check_finite(step, loss)
        values = {"loss": loss, "lr_mult": schedule.lr_multiplier(step), "data_seconds": waited, **pace.lap(step + 1)}
        session.metrics.write("train", step=step, **values)
        console.step(step + 1, **values)

    while session.step < last:
        step = session.step
        clock = time.perf_counter()
        batch = step_batch(batches, microbatches, mesh)
        waited = time.perf_counter() - clock
        with jax.set_mesh(mesh):
            session.state, metrics = train_step(session.state, batch, schedule.hyper(step), cfg=cfg)
        if pending:
            record(*pending)
        pending = (step, metrics, waited)
        session.step += 1
        session.meta["tokens"] += horizon.batch_tokens
        session.meta["flops"] += step_flops
        validate, save = due(session.step, stage.eval_every, last), due(session.step, stage.save_every, last)
        core = stage.core_every > 0 and session.step % stage.core_every == 0
        if validate or save or core:
            record(*pending)
            pending = None
        if save:
            session.save(batches)  # before anything that can fail
        if validate:
            bpb = validation_bpb(session.state.params, cfg, mesh, session.tokenizer, val_file, config)
            session.metrics.write("val", step=session.step, bpb=bpb)
            console.step(session.step, bpb=bpb)
        if core:
            value = core_metric(session.state.params, cfg, mesh, session.tokenizer, config, log)["core_metric"]
            session.metrics.write("core", step=session.step, core_metric=value)
            console.note(f"base {session.step}: CORE {value:.4f}")
        if validate or save or core:
            pace.skip()
    if session.step < schedule.steps:
        log(f"base: stopped after step {session.step} of {schedule.steps} as asked; start again to go on")
        return
    write_samples(session, session.state.params, raw=True)
    session.finish(horizon_tokens=horizon.tokens, batch_tokens=horizon.batch_tokens)
