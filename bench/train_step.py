"""Time of one training step of an experiment's base stage, on random tokens: median and spread, as one line of JSON.

python bench/train_step.py [--experiment FILE] [--mesh SPEC] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from nanochat_jax.cli import EXPERIMENTS, guarded, load_experiment, log
from nanochat_jax.errors import UserError
from nanochat_jax.memory import train_bytes, train_rows, with_loss_chunk
from nanochat_jax.metrics import mfu
from nanochat_jax.model import flops_per_token
from nanochat_jax.optim import base_schedule
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import check_mesh, data_shards, make_mesh, put_batch
from nanochat_jax.train import born_params, train_step, with_optimizer

WARMUP = 3
"""Steps before the clock counts: compilation, and the first ones of a cold machine."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiment", type=Path, default=EXPERIMENTS / "tiny_cpu.py")
    parser.add_argument("--mesh", default="1", help="devices, as for the training commands")
    parser.add_argument("--steps", type=int, default=10, help="steps measured (default: 10)")
    options = parser.parse_args()

    config = load_experiment(options.experiment)
    cfg = gpt_config(config, config.tokenizer.vocab_size)
    mesh = make_mesh(options.mesh)
    check_mesh(mesh, cfg)
    schedule, horizon = base_schedule(config, cfg)
    shards, step_rows = data_shards(mesh), horizon.batch_tokens // cfg.sequence_len
    rows = train_rows(config, config.base, "base", cfg, mesh, step_rows // shards, log)
    rows = min(rows * shards, step_rows)
    microbatches = horizon.batch_tokens // (rows * cfg.sequence_len)
    if microbatches < 1 or rows % shards:
        raise UserError(f"--mesh {options.mesh} does not divide the {rows} rows of a microbatch")
    cfg = with_loss_chunk(config, cfg, rows // shards, mesh)

    shape = (microbatches, rows, cfg.sequence_len)
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=shape, dtype=np.int32)
    batch = put_batch({"inputs": tokens, "targets": np.roll(tokens, -1, axis=-1)}, mesh, leading=1)
    state = with_optimizer(cfg, mesh, born_params(cfg, mesh, seed=0))
    seconds = []
    with jax.set_mesh(mesh):
        for step in range(WARMUP + options.steps):
            start = time.perf_counter()
            state, metrics = train_step(state, batch, schedule.hyper(step), cfg=cfg)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)

    measured = sorted(seconds[WARMUP:])
    median = statistics.median(measured)
    figures = {
        "experiment": options.experiment.stem,
        "device": jax.devices()[0].device_kind,
        "mesh": options.mesh,
        "compute_dtype": cfg.compute_dtype,
        "attention": cfg.attention,
        "tokens": tokens.size,
        "steps": options.steps,
        "step_bytes": train_bytes(cfg, mesh, microbatches, rows // shards, cfg.sequence_len),
        "compile_seconds": round(seconds[0], 2),
        "step_ms": {
            "median": round(1000 * median, 2),
            "p10": round(1000 * measured[len(measured) // 10], 2),
            "p90": round(1000 * measured[len(measured) * 9 // 10], 2),
        },
        "tok_per_sec": round(tokens.size / median),
        "mfu": mfu(tokens.size / median, flops_per_token(cfg), mesh.size),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(guarded(main))
