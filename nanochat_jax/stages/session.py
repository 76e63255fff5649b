"""What every training stage opens and closes in the same way: devices, tokenizer, state, checkpoints, logs.

The loops themselves stay in the stages. A stage is complete when its done.json is there; until then it goes on from its
newest checkpoint. SIGTERM and SIGINT end a loop after the step it is in, with a checkpoint; a validation is broken off
and made by the next start, as after a kill between a save and the validation that belongs to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Checkpointer, restore, restore_params, steps
from nanochat_jax.config import ARCHITECTURE, Config, GPTConfig, StageConfig
from nanochat_jax.data.files import expanded, write_json
from nanochat_jax.data.position import check_origin
from nanochat_jax.data.pretrain import merge_states
from nanochat_jax.distributed import barrier, gather_json, is_leader, leaders
from nanochat_jax.errors import UserError
from nanochat_jax.fp8 import check_compiled, precision
from nanochat_jax.inference.native import with_native
from nanochat_jax.memory import account, train_rows, with_loss_chunk
from nanochat_jax.metrics import Console, MetricsLog, Pace, banner, duration, gib, peak_flops, peak_memory_bytes, si
from nanochat_jax.model import count_params, flops_per_token
from nanochat_jax.optim import Hyper, Schedule
from nanochat_jax.replicas import parted
from nanochat_jax.run import finished, gpt_config, outdated, params_target, read_config, record_used, refuse_changes
from nanochat_jax.sharding import check_mesh, data_shards, make_mesh, put_batch, rows_of_microbatch, rows_of_step
from nanochat_jax.stopping import Stop, stoppable
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.track import tracked
from nanochat_jax.train import (
    TrainState,
    born_params,
    compiler_options,
    restored_state,
    saved_shapes,
    saved_tree,
    train_step,
    with_optimizer,
)

Log = Callable[[str], None]
PREVIOUS = {"mid": "base", "sft": "mid", "sft_continued": "sft", "rl": "sft"}
"""Whose model a stage begins with, unless `init_from` names another one."""


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
    force: bool
    state: TrainState | None = None
    step: int = 0
    saved: int = 0
    """The newest step of which there is a checkpoint, or one being written."""
    measured: set[tuple[str, int]] = field(default_factory=set)
    """(kind, step) of the measurements in the log that earlier starts made."""
    meta: dict = field(default_factory=lambda: {"seconds": 0.0, "step_seconds": 0.0, "tokens": 0, "flops": 0.0})
    started: float = field(default_factory=time.perf_counter)
    console: Console | None = None
    last: int = 0
    """The step after which this start ends."""
    programs: dict[tuple, jax.stages.Compiled] = field(default_factory=dict)
    """The compiled training steps, by architecture and the shapes of their batches."""

    def rows(self, batch_tokens: int) -> tuple[int, int]:
        """(microbatches, rows in each) of a step of `batch_tokens`; UserError where it does not divide."""
        shards = data_shards(self.mesh)
        rows = rows_of_step(self.name, batch_tokens, self.cfg.sequence_len, shards)
        microbatch = train_rows(self.config, self.stage, self.name, self.cfg, self.mesh, rows // shards, self.log)
        here = rows_of_microbatch(self.name, rows, microbatch, shards)
        self.cfg = with_loss_chunk(self.config, self.cfg, here // shards, self.mesh)
        return rows // here, here

    def horizon_before(self) -> int | None:
        """The steps that the newest checkpoint was planned for: counting an epoch's rows again takes minutes. None
        where it has to be done, as other data or batches may be forced; without force `begin` refuses those.
        """
        meta = self.checkpoints.newest_meta() or {}
        return None if self.force else leaders(meta.get("fixed", {}).get("steps"))

    def begin(
        self,
        schedule: Schedule,
        data: grain.DatasetIterator | None = None,
        tokens_a_step: int | None = None,
        **facts: object,
    ) -> Pace:
        """Take the state from the newest checkpoint, or from `start_state`; restore `data`'s position.

        `facts` go to the banner. UserError where they, or the horizon, are not those of the checkpoint.
        """
        self.console = Console(self.name, schedule.steps)
        self.last = min(schedule.steps, self.stage.stop_after or schedule.steps)
        fixed = {"steps": schedule.steps, "tokens_a_step": tokens_a_step, **facts}
        if leaders(self.checkpoints.latest()) is not None:
            tree, meta, self.step = restore(self.checkpoints.directory, None, saved_shapes(self.cfg, self.mesh))
            self.meta |= meta
            self.saved = self.step
            before = fixed | {name: was for name, was in meta.get("fixed", {}).items() if name in fixed}
            name = f"{self.name}, of which step {self.step} is done,"
            refuse_changes(name, before, fixed, self.force, lambda text: self.log(f"{self.name}: {text}"))
            self.state = restored_state(self.cfg, self.mesh, tree)
            if data is not None:
                self._go_on_reading(data)
            self.log(f"{self.name}: going on from step {self.step}")
            if line := outdated(self.folder.parent, self.meta):
                self.log(f"{self.name}: {line}; delete {self.folder} to begin from that")
        else:
            self.state = start_state(self)
        self.meta["fixed"] = fixed
        self.metrics.drop_after(self.step)
        records = MetricsLog.read(self.metrics.path) if is_leader() else []
        self.measured = {(kind, step) for kind, step in leaders([[r["kind"], r.get("step")] for r in records])}
        counts, device = count_params(self.cfg), self.mesh.devices.flat[0]
        banner(
            self.name,
            devices=f"{self.mesh.size} x {device.device_kind}",
            mesh=", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()),
            precision=precision(self.cfg, device),
            attention=self.cfg.attention,
            parameters=counts["total"],
            seed=self.config.seed,
            steps=schedule.steps,
            tokens_a_step=tokens_a_step,
            tokens=tokens_a_step and schedule.steps * tokens_a_step,
            **facts,
            memory_bytes=peak_memory_bytes(),
        )
        if device.platform != "cpu" and peak_flops(device) is None:
            self.log(f"{self.name}: no peak FLOP/s is known of {device.device_kind}: no MFU")
        self.started = time.perf_counter() - self.meta["seconds"]
        return Pace(schedule.steps, tokens_a_step or 0, flops_per_token(self.cfg), self.mesh.size)

    def compiled(self, batch: dict[str, jax.Array], hyper: Hyper) -> jax.stages.Compiled:
        """The training step for batches like this one; when it is new says what it needs, by the compiler's account."""
        key = self.cfg, *((name, x.shape) for name, x in batch.items())
        if key in self.programs:
            return self.programs[key]
        device, start = self.mesh.devices.flat[0], time.perf_counter()
        with jax.set_mesh(self.mesh):
            lowered = train_step.lower(self.state, batch, hyper, cfg=self.cfg)
            program = self.programs[key] = lowered.compile(compiler_options(self.cfg, self.mesh))
        check_compiled(self.cfg, device, program.as_text())
        needs = account(program)
        flops = f", {needs['flops']:.3g} FLOPs a device" if needs["flops"] else ""
        self.log(
            f"{self.name}: step compiled in {time.perf_counter() - start:.1f} s: {gib(needs['bytes'])} a device, "
            f"{gib(needs['temporary_bytes'])} of it temporary{flops} (a loop's body counted once)"
        )
        return program

    def _go_on_reading(self, data: grain.DatasetIterator) -> None:
        try:
            check_origin(self.meta["data"]["origin"], data.get_state()["origin"])
        except UserError:
            if not self.force:
                raise
            self.log(f"{self.name}: forced: other data, read from its beginning")
        else:
            data.set_state(self.meta["data"])

    @contextmanager
    def loop(self) -> Iterator[Stop]:
        """Around the steps: signals end them as the module says; an error leaves no checkpoint half written.

        What they measure is sent to the trackers, which are closed when all is saved.
        """
        sent = tracked(self.metrics, self.config, self.step, self.log)
        with stoppable(self.name, self.log) as stop, sent:
            try:
                yield stop
            except BaseException:
                with suppress(Exception):
                    self.checkpoints.settle()
                raise

    def leave(self, stop: Stop, steps: int, data: grain.DatasetIterator | None = None) -> bool:
        """The end of the loop: save what is not saved. Whether all `steps` are done; says why where they are not."""
        if self.saved < self.step:
            self.save(data)
        self.checkpoints.wait()
        if stop.now(self.step):
            why = stop.signal.name if stop.signal else "a signal to another process"
            self.log(f"{self.name}: stopped by {why} after step {self.step}, saved; the same command goes on")
        elif self.step < steps:
            self.log(
                f"{self.name}: stopped after step {self.step} of {steps} as asked; without --{self.name}.stop-after it "
                "goes on"
            )
        return self.step >= steps and not stop.agreed

    def save(self, data: grain.DatasetIterator | None = None) -> None:
        """Begin to write a checkpoint: parameters, optimizer state, the position in the data and the counters."""
        self.meta["seconds"] = time.perf_counter() - self.started
        if data is not None:
            self.meta["data"] = merge_states(gather_json(data.get_state()))
        with jax.set_mesh(self.mesh):
            if self.mesh.size > 1 and (differ := parted(self.state)):
                raise UserError(
                    f"{self.name}: devices hold different copies of {differ[0]} and {len(differ) - 1} other arrays at "
                    f"step {self.step}: a faulty device or kernel; nothing was saved, and a new start goes on from "
                    f"step {self.saved}"
                )
            if not all_finite(self.state.params):
                # The loss would show it a step later, and of the last update never.
                self._end(f"some parameters are no numbers after {self.step} steps")
            tree = saved_tree(self.state, cfg=self.cfg)
        self.checkpoints.save(self.step, tree, self.meta)
        self.saved = self.step
        # The writer keeps hold of the arrays, though it works on its copy: a second state on the devices meanwhile.
        for copied in jax.tree.leaves(tree):
            if all(copied is not own for own in jax.tree.leaves(self.state)):
                copied.delete()

    def due(self, *every: int) -> bool:
        """Whether something that happens every so many steps, 0 meaning only at the end, happens after this one."""
        return self.step == self.last or any(steps > 0 and self.step % steps == 0 for steps in every)

    def owes(self, kind: str, every: int, *, at_first: bool = False) -> bool:
        """Whether a measurement is due after this step, or before the first one, that no earlier start has made."""
        due = self.due(every) if self.step > 0 else at_first and every > 0
        return due and (kind, self.step) not in self.measured

    def spent(self) -> dict[str, float]:
        """What the steps so far took, for a measurement's record; seconds: without each start's first step."""
        return {name: self.meta[name] for name in ("tokens", "flops", "step_seconds")}

    def validated(self, value: float, *, higher_is_better: bool = False) -> None:
        """Keep the checkpoint of this step, where there is one, if none has a better `value`. UserError for NaN."""
        if not math.isfinite(value):
            self._end(f"validation is {value} after {self.step} steps", self.step)
        if 0 < self.saved == self.step:
            self.checkpoints.note_validation(self.step, value, higher_is_better=higher_is_better)

    def checked(self, step: int, metrics: dict, batch: str) -> dict[str, float]:
        """Loss and gradient norm of a step, waited for. UserError where one is no number, which spoils all after it.

        `batch` says where in the data the step's batch is from.
        """
        self.checkpoints.check()
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        broken = " and ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
        if broken:
            # Parameters that give such a loss were spoiled by the update before, and so is a checkpoint of them.
            spoiled = step if not math.isfinite(values["loss"]) else None
            self._end(f"{broken} at step {step}, batch of {batch}", spoiled)
        return values

    def _end(self, what: str, spoiled: int | None = None) -> None:
        """UserError for training that has gone wrong; `spoiled`: the step whose checkpoint is none to go on from."""
        self.checkpoints.settle()
        if spoiled is not None and self.checkpoints.latest() == spoiled:
            self.checkpoints.drop(spoiled)
        barrier(f"{self.name} is broken")  # before an error here or there ends the process that writes
        good = self.checkpoints.latest()
        last_good = f"the last good checkpoint is step {good}" if good is not None else "there is no checkpoint yet"
        if good is not None and good == spoiled:  # the only one is never dropped
            last_good = f"the only checkpoint, step {good}, is of no use: delete {self.folder}"
        raise UserError(
            f"{self.name}: {what}; {last_good}: lower --{self.name}.init-lr-frac (with --force) and start again"
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
            "start": self.meta.get("start"),
            **facts,
        }
        if is_leader():
            write_json(self.folder / "done.json", done)
        self.log(
            f"{self.name}: finished: {self.step:,} steps, {si(done['tokens'])} tokens, {done['flops']:.3g} FLOPs in "
            f"{duration(done['seconds'])}; at most {gib(done['peak_memory_bytes'])} of memory so far"
        )
        barrier(f"{self.name} finished")
        self.metrics.close()


@jax.jit
def all_finite(params: dict) -> jax.Array:
    """Whether all parameters are numbers: bool []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))


def open_session(
    config: Config, workdir: Path, name: str, stage: StageConfig, log: Log, force: bool = False
) -> Session:
    """Devices, tokenizer, architecture, checkpoints and log of one stage; `force`: whatever the run was begun with."""
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    cfg = gpt_config(config, tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, cfg)
    precision(cfg, mesh.devices.flat[0])  # a device that cannot is an error before anything is compiled
    if cfg.native:
        with_native(cfg, mesh)
    record_used(workdir, cfg, tokenizer, force)
    folder = workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpointer(folder / "checkpoints", stage.keep)
    return Session(name, config, stage, folder, mesh, cfg, tokenizer, log, checkpoints, MetricsLog(folder), force)


def is_done(workdir: Path, name: str, log: Log) -> bool:
    """Whether a stage is complete; says so."""
    if leaders(finished(workdir, name)) is None:
        return False
    line = outdated(workdir, finished(workdir, name))
    log(
        f"{name}: finished before, skipped"
        + (f"; {line}: delete {workdir / name} to train it from that" if line else "")
    )
    return True


def start_of(name: str, stage: StageConfig, workdir: Path, coming: Collection[str] = ()) -> Path | None:
    """WORKDIR/STAGE whose model a stage begins with: `init_from`, else the stage before it; None: new parameters.

    A run that has no mid stage, nor has it `coming`, goes from base to sft.
    """
    if stage.init_from:
        return expanded(stage.init_from)
    if name == "sft" and "mid" not in coming and not leaders((workdir / "mid").is_dir()):
        return workdir / "base"
    return workdir / PREVIOUS[name] if name in PREVIOUS else None


def start_state(session: Session) -> TrainState:
    """What a stage begins with, on its mesh: the newest model of `start_of`, or its `init_step`, or new parameters from
    the run's seed. Moments are fresh, or with `init_optimizer` those of that stage.
    """
    source = start_of(session.name, session.stage, session.folder.parent)
    if source is None:
        params = born_params(session.cfg, session.mesh, session.config.seed)
        return with_optimizer(session.cfg, session.mesh, params)
    check_start(session.name, session.stage, source)
    check_origin_of(session.name, session.cfg, session.tokenizer, session.folder.parent, source, session.log)
    if finished(source.parent, source.name) is None:
        session.log(f"{session.name}: {source} is not finished; starting from it as it is")
    cfg, mesh, step = session.cfg, session.mesh, session.stage.init_step
    if session.stage.init_optimizer:
        tree, _, found = restore(source / "checkpoints", step, saved_shapes(cfg, mesh))
        state = restored_state(cfg, mesh, tree)
    else:
        params, _, found = restore_params(source / "checkpoints", params_target(cfg, mesh), step)
        state = with_optimizer(cfg, mesh, params)
    own = source.parent.resolve() == session.folder.parent.resolve()
    at = (finished(source.parent, source.name) or {}).get("finished")
    session.meta["start"] = {"stage": source.name if own else str(source.absolute()), "step": found, "finished": at}
    session.log(f"{session.name}: starting from step {found} of {source}")
    return state


def check_start(name: str, stage: StageConfig, source: Path) -> None:
    """UserError where the stage at `source`, WORKDIR/STAGE, has not what this one is to start from."""
    checkpoints = source / "checkpoints"
    if (source / "config.json").exists():
        raise UserError(f"--{name}.init-from {source} is a run: name the stage of it, such as {source / 'base'}")
    if not steps(checkpoints):
        way_out = f"train {source.name} first"
        if finished(source.parent, source.name):
            way_out = f"it is finished, but they were deleted; bring them back, or delete {source} to train it again"
        raise UserError(f"{name} starts from {source}, which has no checkpoint: {way_out}")
    if isinstance(stage.init_step, int) and stage.init_step not in (there := steps(checkpoints)):
        raise UserError(f"--{name}.init-step {stage.init_step}: {source} has {', '.join(map(str, there)) or 'none'}")
    if stage.init_optimizer and "converted_from" in (finished(source.parent, source.name) or {}):
        raise UserError(f"--{name}.init-optimizer: {source} was converted and holds no moments: leave the option out")


def check_origin_of(stage: str, cfg: GPTConfig, tokenizer: Tokenizer, workdir: Path, source: Path, log: Log) -> None:
    """UserError where the model at `source`, WORKDIR/STAGE of another run, reads other tokens than one of `workdir`, or
    computes something else.
    """
    if source.parent.resolve() == workdir.resolve():
        return
    if Tokenizer.load(source.parent / "tokenizer").fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"{source} was trained with another tokenizer than that of this run: copy {source.parent / 'tokenizer'} to "
            f"{workdir / 'tokenizer'} before anything is trained there"
        )
    was = gpt_config(read_config(source.parent), tokenizer.vocab_size)
    for name in ("n_head", "n_kv_head", *ARCHITECTURE):
        before, now = getattr(was, name), getattr(cfg, name)
        if before != now:
            raise UserError(
                f"{source} has {name} {before}, this run {now}: give --model.* the values of {source.parent}"
            )
    if was.windows != cfg.windows:
        log(f"{stage}: {source} had the windows {was.windows}, from now on {cfg.windows}")


def step_batch(
    batches: Iterator[dict], microbatches: int, mesh: Mesh, *, local: bool = False
) -> tuple[dict[str, jax.Array], float]:
    """The next step's batch on the mesh, [A, rows, T], from an iterator of [A * rows, T]; seconds waited for it.

    Called while the devices are at work on the step before, so that it is there when they are done. `local`: the
    iterator gives this process's part of the rows alone, see `put_batch`.
    """
    start = time.perf_counter()
    batch = next(batches)
    split = {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}
    return put_batch(split, mesh, leading=1, local=local), time.perf_counter() - start
