"""The base stage: next-token prediction on raw text, horizon and schedules from `depth`.

python -m nanochat_jax pretrain --experiment experiments/tiny_cpu.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.config import Config
from nanochat_jax.data.download import fetch_eval_bundle, prepare_shards
from nanochat_jax.data.pretrain import pretrain_batches
from nanochat_jax.data.shards import Shard
from nanochat_jax.evals.core import checked_tasks
from nanochat_jax.model import flops_per_token
from nanochat_jax.optim import base_schedule, check_horizon
from nanochat_jax.run import record_data, recorded_files
from nanochat_jax.sharding import data_part
from nanochat_jax.stages.evaluate import core_metric, validation_bpb, validation_set
from nanochat_jax.stages.samples import write_samples
from nanochat_jax.stages.session import Log, is_done, open_session, step_batch


def run(config: Config, workdir: Path, log: Log, force: bool = False) -> None:
    """Train the base model in `workdir`/base, from its newest checkpoint on; a complete stage is left alone.

    `force`: go on with other data, horizon or precision than it was begun with.
    """
    if is_done(workdir, "base", log):
        return
    train_files, val_file = prepare_shards(config.data, log, None if force else recorded_files(workdir, config.data))
    record_data(workdir, [*train_files, val_file], force)
    session = open_session(config, workdir, "base", config.base, log, force)
    schedule, horizon = base_schedule(config, session.cfg)
    check_horizon(config, horizon)
    microbatches, rows = session.rows(horizon.batch_tokens)
    cfg, mesh, stage = session.cfg, session.mesh, config.base
    part, parts = data_part(mesh)
    batches = pretrain_batches(
        train_files,
        session.tokenizer,
        config.data,
        rows=microbatches * rows,
        sequence_len=cfg.sequence_len,
        process_index=part,
        process_count=parts,
    )
    wanted = config.data.buffer_docs * config.data.streams
    there = sum(sum(Shard(file).rows) for file in train_files)
    if config.data.packing == "bestfit" and there < wanted:
        log(
            f"base: best fit chooses among {wanted:,} documents, here are {there:,}: they are read again and "
            "again, most of a long one is dropped; --data.packing stream is for few documents"
        )
    # What is missing should be missed now, not after hours; the evaluation reads the first training shard, too.
    for file in (val_file, train_files[0])[: 2 if "bpb" in config.eval.base else 1]:
        next(validation_set(file, session.tokenizer, config, cfg, rows=1))
    if stage.core_every:
        checked_tasks(cfg, session.tokenizer, fetch_eval_bundle(config.data, log), config.eval.max_examples)
    pace = session.begin(schedule, batches, tokens_a_step=horizon.batch_tokens)
    step_flops = horizon.batch_tokens * flops_per_token(cfg)
    first, pending = session.step, None

    def record(step: int, metrics: dict, waited: float, place: str) -> None:
        """Read a step's loss only after the next one was dispatched, so that the devices never wait for the host."""
        values = session.checked(step, metrics, place)
        values |= {"lr_mult": schedule.lr_multiplier(step), "data_seconds": waited, **pace.lap(step + 1)}
        session.meta["step_seconds"] += values["step_seconds"] if step > first else 0.0
        session.metrics.write("train", step=step, **values)
        session.console.step(step + 1, **values)

    def measure() -> None:
        """Validation and CORE, where they are due."""
        model = session.state.params, cfg, mesh, session.tokenizer
        if session.owes("val", stage.eval_every):
            bpb = validation_bpb(model, val_file, config, rows)
            session.validated(bpb)
            session.metrics.write("val", step=session.step, bpb=bpb, **session.spent())
            session.console.step(session.step, bpb=bpb)
        if stage.core_every and session.step % stage.core_every == 0 and session.owes("core", stage.core_every):
            value = core_metric(model, config, log, config.eval.max_examples)["core_metric"]
            session.metrics.write("core", step=session.step, core_metric=value, **session.spent())
            session.log(f"base {session.step}: CORE {value:.4f}")
        if stage.sample_every and session.step % stage.sample_every == 0 and 0 < session.step < session.last:
            write_samples(session, raw=True)

    with session.loop() as stop:
        stop.measure(measure)
        while not stop.now(session.step) and session.step < session.last:
            step = session.step
            batch, waited = step_batch(batches, microbatches, mesh, local=True)
            hyper = schedule.hyper(step)
            session.state, metrics = session.compiled(batch, hyper)(session.state, batch, hyper)
            if pending:
                record(*pending)
            pending = (step, metrics, waited, reading_at(batches.get_state(), train_files))
            session.step += 1
            session.meta["tokens"] += horizon.batch_tokens
            session.meta["flops"] += step_flops
            if session.due(stage.save_every, stage.eval_every, stage.core_every, stage.sample_every):
                record(*pending)
                pending = None
                if session.due(stage.save_every):
                    session.save(batches)  # before anything that can fail
                stop.measure(measure)
                pace.skip()
        if pending:
            record(*pending)
        complete = session.leave(stop, schedule.steps, batches)
    if not complete:
        return
    write_samples(session, raw=True)
    session.finish(horizon_tokens=horizon.tokens, batch_tokens=horizon.batch_tokens)


def reading_at(position: dict, files: Sequence[Path]) -> str:
    """Where reading stands, for a person: the first of the streams that this process reads."""
    stream = next(stream for stream in position["streams"] if stream is not None)
    return (
        f"epoch {stream['epoch']}, read up to {files[stream['file']].name}, row group {stream['row_group']}, "
        f"row {stream['row']}"
    )
