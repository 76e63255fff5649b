"""`--track wandb`, `--track tensorboard`: what goes to metrics.jsonl is sent there as well, while a stage trains.

metrics.jsonl stays the record: a tracker that fails is said once and left out for the rest of the stage, and training
goes on. The packages are imported only where they are asked for; of several processes the leader alone needs them.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanochat_jax.config import Config
from nanochat_jax.data.files import read_json, write_json
from nanochat_jax.distributed import barrier, is_leader
from nanochat_jax.errors import UserError

if TYPE_CHECKING:
    from nanochat_jax.metrics import MetricsLog

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX"}
WANDB = {"console": "off", "finish_timeout": 60}
"""Only numbers go there, not what the console shows; without a network the end of a stage waits no longer than this."""
FLUSH_SECONDS = 10
"""So much of an event file may be lost with the process: a flush waits for the disk, and so does training."""

Sink = tuple[Callable[[dict], None], Callable[[bool], None]]
"""What sends a record, and what closes the tracker, told whether the stage has failed."""


def check(names: Collection[str]) -> None:
    """UserError where a tracker cannot work: its package is missing, or wandb has neither login nor terminal to ask."""
    for name in names:
        try:
            package = importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise UserError(f"--track {name}: {error}: pip install {PACKAGES[name]}, or leave {name} out") from None
        try:
            if name == "wandb":
                package.Settings(**WANDB)  # an old version knows less of them
                if os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
                    package.login(verify=False)
        except Exception as error:
            ways = "WANDB_MODE=offline needs no account, an old wandb pip install --upgrade wandb"
            raise UserError(f"--track wandb: {str(error).rstrip('.')}; {ways}") from None


@contextmanager
def tracked(log: MetricsLog, config: Config, step: int, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `config.track` gets what is written to the log of a stage that goes on after `step` steps."""
    sinks: dict[str, Sink] = {}

    def attempt(name: str, action: Callable, *values: object) -> Sink | None:
        try:
            return action(*values)
        except Exception as error:
            if sink := sinks.pop(name, None):
                with suppress(Exception):
                    sink[1](True)
            why = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{log.path.parent.name}: --track {name} failed and is left out, metrics.jsonl goes on: {why}")

    def send(record: dict) -> None:
        for name, (sink, _) in list(sinks.items()):
            attempt(name, sink, record)

    for name in dict.fromkeys(config.track) if is_leader() else ():
        if sink := attempt(name, OPEN[name], log, config, step):
            sinks[name] = sink
    log.listener, failed = send if sinks else None, True
    barrier("trackers opened")  # a network takes minutes to fail, and collectives do not wait for ever
    try:
        yield
        failed = False
    finally:
        log.listener = None
        for name, (_, close) in list(sinks.items()):
            attempt(name, close, failed)
    barrier("trackers closed")


def numbers(record: dict) -> dict[str, float]:
    """The numbers of a record by name: "rl/pass/1" of {"kind": "rl", "step": 3, "loss": None, "pass": {"1": 0.5}}."""
    from flax.traverse_util import flatten_dict

    values = {name: value for name, value in record.items() if name not in ("kind", "step")}
    flat = flatten_dict({record["kind"]: values}, sep="/")
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def _wandb(log: MetricsLog, config: Config, step: int) -> Sink:
    """One run a stage, found again by its id. It takes no row back: steps done again stand there twice."""
    import wandb

    folder, kept = log.path.parent, log.path.with_name("wandb.json")
    known = read_json(kept)["id"] if kept.exists() else None
    group = folder.parent.resolve().name
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "nanochat-jax"),
        group=group,
        name=f"{group}/{folder.name}",
        id=known,
        resume="allow",
        reinit="create_new",
        dir=str(folder),
        config=asdict(config),
        allow_val_change=True,
        settings=wandb.Settings(**WANDB),
    )
    write_json(kept, {"id": run.id})
    # By wandb's own step, which never goes back, a step trained after the validation of that step would be dropped.
    run.define_metric("*", step_metric="step")

    def send(record: dict) -> None:
        run.log({"step": record["step"], **numbers(record)})

    return send, lambda failed: run.finish(exit_code=int(failed))


def _tensorboard(log: MetricsLog, config: Config, step: int) -> Sink:
    """An event file a start; it hides what those before it have from `step` on.

    Not by SummaryWriter: its thread ends at the first error, and then its full queue would block training for ever.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = log.path.with_name("tensorboard")
    folder.mkdir(exist_ok=True)
    # By itself the name counts whole seconds, and a second file of one name would overwrite the first.
    writer, flushed = EventsWriter(str(folder / "events"), f".{time.time_ns()}"), time.monotonic()

    def write(step: int, **content: object) -> None:
        nonlocal flushed
        writer.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() > flushed + FLUSH_SECONDS:
            writer.flush()
            flushed = time.monotonic()

    def send(record: dict) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
        write(record["step"], summary=Summary(value=values))

    write(step, session_log=SessionLog(status=SessionLog.START))
    for record in log.read(log.path):
        if record.get("step", -1) >= step:  # a measurement made after `step` steps, which is not made again
            send(record)
    return send, lambda failed: writer.close()


OPEN: dict[str, Callable[[MetricsLog, Config, int], Sink]] = {"wandb": _wandb, "tensorboard": _tensorboard}
