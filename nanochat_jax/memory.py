"""What a program needs of a device's memory, by the compiler's own account, and the microbatch that fits.

`--base.device-batch-size auto` compiles the training step for a few numbers of rows and keeps the largest that fits.
Nothing is allocated for that, and the program that is chosen comes out of the compilation cache when training begins.
What a step needs is its arguments, outputs and temporaries less what is aliased: the peak that XLA reports on a CPU
leaves temporaries out.
"""

from __future__ import annotations

import dataclasses
import math
import os
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import Config, GPTConfig, StageConfig
from nanochat_jax.distributed import gather_json
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import gib
from nanochat_jax.optim import Schedule
from nanochat_jax.sharding import BATCH, data_shards
from nanochat_jax.train import compiler_options, state_shapes, train_step

HEAD_TOKENS = 512
"""Positions a device puts through the output head at once on a CPU, where large temporaries are slow."""
RESERVE = 0.1
"""Share of what is free that a step leaves alone: fragmentation, communication buffers, the host program on a CPU."""


def with_loss_chunk(config: Config, cfg: GPTConfig, rows: int, mesh: Mesh) -> GPTConfig:
    """`cfg` with the positions of a row that go through the head at once, for `rows` per data shard."""
    return dataclasses.replace(cfg, loss_chunk=loss_chunk(config, rows, mesh.devices.flat[0].platform))


def loss_chunk(config: Config, rows: int, platform: str) -> int:
    """Positions of a row that go through the head at once, 0 for all: as configured; "auto": few on a CPU, else all."""
    if config.loss_chunk != "auto":
        return config.loss_chunk
    return max(1, HEAD_TOKENS // rows) if platform == "cpu" else 0


def train_rows(
    config: Config,
    stage: StageConfig,
    name: str,
    cfg: GPTConfig,
    mesh: Mesh,
    step_rows: int,
    log: Callable[[str], None],
    *,
    length: int | None = None,
    weights: bool = False,
    taken: int = 0,
) -> int:
    """Rows per data shard in a microbatch of a step in which each data shard has `step_rows` of `length` tokens.

    `device_batch_size` as it is, or for "auto" the largest divisor of `step_rows` that fits beside `taken` bytes; says
    what it is and why. `weights`: the batch holds weights, as in rl. UserError where not even one row fits.
    """
    if stage.device_batch_size != "auto":
        return stage.device_batch_size
    length = length or cfg.sequence_len
    limit = device_limit(config, mesh) - taken

    needs: dict[int, float] = {}

    def need(rows: int, cfg: GPTConfig = cfg) -> float:
        cfg = with_loss_chunk(config, cfg, rows, mesh)
        needs[rows] = train_bytes(cfg, mesh, step_rows // rows, rows, length, weights)
        return needs[rows]

    choices = [rows for rows in range(1, step_rows + 1) if step_rows % rows == 0]
    # More rows need more, so that halving looks at few of them.
    fitting = bisect_right(choices, limit, key=need)
    if not fitting:
        least = needs[1]
        ways = "lower --model.sequence-len or --model.depth, or cut the parameters with --mesh fsdp=N"
        if not with_loss_chunk(config, cfg, 1, mesh).loss_chunk:
            ways = f"set --loss-chunk, {ways}"
        if not cfg.remat:
            ways = f"--remat would need {gib(need(1, dataclasses.replace(cfg, remat=True)))}; else {ways}"
        had = gib(limit)
        if taken:
            had = f"{gib(limit + taken)} less the {gib(taken)} of sampling"
            ways = f"lower --{name}.questions-per-step or --{name}.max-new-tokens; {ways}"
        raise UserError(
            f"{name}: a step with one row of {length} tokens needs {gib(least)} a device, {had} can be had: {ways}"
        )
    rows = choices[fitting - 1]
    too_many = min((other for other in needs if other > rows), default=None)
    why = "all rows of a step" if too_many is None else f"{too_many} would need {gib(needs[too_many])}"
    size = f"{rows} row{'s' * (rows > 1)} a device"
    log(f"{name}: device-batch-size auto: {size} ({gib(needs[rows])} of {gib(limit)}; {why})")
    return rows


def train_bytes(cfg: GPTConfig, mesh: Mesh, microbatches: int, rows: int, length: int, weights: bool = False) -> float:
    """Bytes a device needs for `train_step` on `microbatches` of `rows` per data shard, state included."""
    with jax.set_mesh(mesh):
        lowered = lowered_step(cfg, mesh, microbatches, rows, length, weights)
        return program_bytes(lowered, compiler_options(cfg, mesh))


def lowered_step(
    cfg: GPTConfig, mesh: Mesh, microbatches: int, rows: int, length: int, weights: bool = False
) -> jax.stages.Lowered:
    """`train_step` for such a batch, to be compiled; wants the mesh in use."""
    shape, sharding = (microbatches, rows * data_shards(mesh), length), NamedSharding(mesh, P(None, *BATCH))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in ("inputs", "targets")}
    if weights:
        batch["weights"] = batch["inputs"].update(dtype=jnp.float32)
    hyper = Schedule(StageConfig(), 1, cfg.n_embd).hyper(0)
    return train_step.lower(state_shapes(cfg, mesh), batch, hyper, cfg=cfg)


def program_bytes(lowered: jax.stages.Lowered, options: dict[str, bool]) -> float:
    """Bytes a device needs for a program; infinite where the compiler itself says that it cannot fit."""
    try:
        return account(lowered.compile(options))["bytes"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def account(program: jax.stages.Compiled) -> dict[str, float | None]:
    """What the compiler says of a program: bytes on each device, FLOPs on each (those of a loop's body once)."""
    memory, cost = program.memory_analysis(), program.cost_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "bytes": kept + memory.temp_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": (cost or {}).get("flops"),
    }


def device_limit(config: Config, mesh: Mesh) -> int:
    """Bytes a program may use on each device of the mesh: as stated, or what is free now less a reserve.

    Devices of a CPU share what is free of the machine. Several processes take the least that any of them finds.
    """
    if config.device_memory_gb is not None:
        return int(config.device_memory_gb * 2**30)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if local[0].platform == "cpu":
        free = free_host_memory() // len(local)
    else:
        stats = [device.memory_stats() or {} for device in local]
        if not all("bytes_limit" in entry for entry in stats):
            raise UserError(
                f"a {local[0].device_kind} does not tell how much memory it has, which device-batch-size auto needs: "
                "say --device-memory-gb"
            )
        free = min(entry["bytes_limit"] - entry["bytes_in_use"] for entry in stats)
    return min(gather_json(int(free * (1 - RESERVE))))


def free_host_memory() -> int:
    """Bytes that programs can still get on this machine; a container's own limit is to be said."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
