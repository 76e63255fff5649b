"""What every training stage opens and closes in the same way: devices, tokenizer, state, checkpoints, logs.

The loops themselves stay in the stages. A stage is complete when its done.json is there; until then it goes on from its
newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grain
import jax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Checkpointer, restore_params
from nanochat_jax.config import Config, GPTConfig, StageConfig
from nanochat_jax.data.files import write_json
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import MetricsLog, Pace, banner, peak_memory_bytes
from nanochat_jax.model import count_params, flops_per_token
from nanochat_jax.optim import Schedule
from nanochat_jax.run import finished, gpt_config, params_target, record_precision
from nanochat_jax.sharding import check_mesh, data_shards, make_mesh, put_batch
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import TrainState, born_params, restored_state, saved_shapes, saved_tree, with_optimizer

Log = Callable[[str], None]
HEAD_TOKENS = 256
"""Positions a device puts through the output head at once on a CPU, where large temporaries are slow."""


@dataclass
class Session:
    """One stage at work."""

    name: str
    config: Config
    stage: StageConfig
    folder: Path
    mesh: Mesh
    cfg: GPTConfig
    tokenizer: Tokenizer
    log: Log
    checkpoints: Checkpointer
    metrics: MetricsLog
    state: TrainState | None = None
    step: int = 0
    meta: dict = field(default_factory=lambda: {"seconds": 0.0, "tokens": 0, "flops": 0.0})
    started: float = field(default_factory=time.perf_counter)

    def rows(self, batch_tokens: int) -> tuple[int, int]:
        """(microbatches, rows in each) of a step of `batch_tokens`; UserError where it does not divide."""
        length, shards = self.cfg.sequence_len, data_shards(self.mesh)
        rows, left = divmod(batch_tokens, length)
        if left or rows < 1 or rows % shards:
            raise UserError(
                f"--{self.name}.total-batch-size {batch_tokens} is {batch_tokens / length:g} rows of {length} tokens; "
                f"the mesh needs a multiple of {shards} rows: use a multiple of {shards * length}"
            )
        here = min(self.stage.device_batch_size * shards, rows)
        if rows % here:
            raise UserError(
                f"--{self.name}.device-batch-size {self.stage.device_batch_size} on {shards} data shards does not "
                f"divide the {rows} rows of a step; use a divisor of {rows // shards}"
            )
        self.cfg = dataclasses.replace(self.cfg, loss_chunk=loss_chunk(self.cfg, here // shards, self.mesh))
        return rows // here, here

    def begin(
        self,
        schedule: Schedule,
        start: Callable[[], dict],
        data: object = None,
        tokens_a_step: int | None = None,
        **facts: object,
    ) -> Pace:
        """Take the state from the newest checkpoint, or parameters from `start()`; restore `data`'s position.

        `facts` go to the banner.
        """
        if self.checkpoints.latest() is not None:
            tree, self.meta, self.step = self.checkpoints.restore(None, saved_shapes(self.cfg, self.mesh))
            self.state = restored_state(self.cfg, self.mesh, tree)
            if isinstance(data, grain.DatasetIterator):
                data.set_state(self.meta["data"])
            self.log(f"{self.name}: going on from step {self.step}")
        else:
            self.state = with_optimizer(self.cfg, self.mesh, start())
        self.metrics.drop_after(self.step)
        counts = count_params(self.cfg)
        banner(
            self.name,
            devices=f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            mesh=", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()),
            precision=self.cfg.compute_dtype,
            attention=self.cfg.attention,
            parameters=counts["total"],
            steps=schedule.steps,
            tokens_a_step=tokens_a_step,
            tokens=tokens_a_step and schedule.steps * tokens_a_step,
            **facts,
            memory_bytes=peak_memory_bytes(),
        )
        self.started = time.perf_counter() - self.meta["seconds"]
        return Pace(schedule.steps, tokens_a_step or 0, flops_per_token(self.cfg), self.mesh.size)

    def save(self, data: object = None) -> None:
        """Checkpoint parameters, optimizer state, the position in the data and the counters."""
        self.meta["seconds"] = time.perf_counter() - self.started
        if isinstance(data, grain.DatasetIterator):
            self.meta["data"] = data.get_state()
        with jax.set_mesh(self.mesh):
            tree = saved_tree(self.state, cfg=self.cfg)
        self.checkpoints.save(self.step, tree, self.meta)

    def check_finite(self, step: int, loss: float) -> None:
        """UserError where the loss is not a number: nothing after it could be used."""
        if not math.isfinite(loss):
            raise UserError(
                f"{self.name}: loss is {loss} at step {step}; the last good checkpoint is step "
                f"{self.checkpoints.latest()}: lower --{self.name}.init-lr-frac (with --force) and start again"
            )

    def finish(self, **facts: object) -> None:
        """Mark the stage complete."""
        device = self.mesh.devices.flat[0]
        done = {
            "stage": self.name,
            "steps": self.step,
            "tokens": self.meta["tokens"],
            "flops": self.meta["flops"],
            "seconds": time.perf_counter() - self.started,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.device_kind,
            "devices": self.mesh.size,
            "params": count_params(self.cfg)["total"],
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(self.folder / "done.json", done | facts)
        self.metrics.close()


def open_session(config: Config, workdir: Path, name: str, stage: StageConfig, log: Log) -> Session:
    """Devices, tokenizer, architecture, checkpoints and log of one stage."""
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    cfg = gpt_config(config, tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, cfg)
    record_precision(workdir, cfg)
    folder = workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpointer(folder / "checkpoints", stage.keep)
    return Session(name, config, stage, folder, mesh, cfg, tokenizer, log, checkpoints, MetricsLog(folder))


def is_done(workdir: Path, name: str, log: Log) -> bool:
    """Whether a stage is complete; says so."""
    if finished(workdir, name) is None:
        return False
    log(f"{name}: finished before, skipped")
    return True


def params_from(session: Session, workdir: Path, previous: str) -> dict:
    """The newest parameters of the stage before, or of `init_from` WORKDIR/STAGE, on the session's mesh."""
    source = Path(session.stage.init_from) if session.stage.init_from else workdir / previous
    if not (source / "checkpoints").is_dir():
        raise UserError(f"{session.name} starts from {source}, which has no checkpoint: train {source.name} first")
    if finished(source.parent, source.name) is None:
        session.log(f"{session.name}: {source} is not finished; starting from it as it is")
    return restore_params(source / "checkpoints", params_target(session.cfg, session.mesh))[0]


def initial_params(session: Session, seed: int) -> dict:
    """New parameters from the run's seed, or those of `init_from`."""
    if session.stage.init_from:
        return params_from(session, Path(), "")
    return born_params(session.cfg, session.mesh, seed)


def loss_chunk(cfg: GPTConfig, rows: int, mesh: Mesh) -> int:
    """Positions of a row that go through the head at once: few on a CPU, all of them elsewhere."""
    if mesh.devices.flat[0].platform != "cpu":
        return 0
    chunk = max(1, HEAD_TOKENS // rows)
    while cfg.sequence_len % chunk:
        chunk -= 1
    return chunk


def step_batch(batches: Iterator[dict], microbatches: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The next step's batch on the mesh, [A, rows, T], from an iterator of [A * rows, T]."""
    batch = next(batches)
    split = {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}
    return put_batch(split, mesh, leading=1)


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps, 0 meaning only at the end, happens after `step` steps."""
    return step == total or (every > 0 and step % every == 0)
