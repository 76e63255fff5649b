"""This project's side of compare_nanochat.py: its training step on the same weights and tokens, in turns."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
from turns import Turns

from nanochat_jax import cli, convert
from nanochat_jax.bench.measure import environment
from nanochat_jax.bench.train import prepared
from nanochat_jax.config import Config
from nanochat_jax.metrics import peak_memory_bytes
from nanochat_jax.sharding import put_batch
from nanochat_jax.train import born_params, compiler_options, train_step, with_optimizer


def main() -> None:
    """Trains as the file named by the first argument says; what follows are options of the command line."""
    spec, words = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:]
    turns = Turns(peak_memory_bytes)
    with turns.uncounted():
        model = convert.model_config(convert.open_checkpoint(Path(spec["checkpoint"]), 0))
    config = configured(spec, model, words)
    cfg, mesh, schedule, microbatches, rows = prepared(config, cli.log)
    state = with_optimizer(cfg, mesh, born_params(cfg, mesh, config.seed))
    with turns.uncounted():
        weights = convert.converted(convert.open_checkpoint(Path(spec["checkpoint"]), 0), cfg)
        places = jax.tree.map(lambda own: own.sharding, state.params)
        state = state._replace(params=jax.block_until_ready(jax.device_put(weights, places, may_alias=False)))
        del weights
    tokens = np.load(spec["batches"], mmap_mode="r")
    turns.facts = {"architecture": asdict(cfg)} | environment()
    step, program = 0, None
    with jax.set_mesh(mesh):
        while True:
            batch = tokens[step % len(tokens)].reshape(microbatches, rows, -1)
            batch = put_batch({"inputs": batch[..., :-1], "targets": batch[..., 1:]}, mesh, leading=1)
            hyper = schedule.hyper(step)
            if program is None:
                program = train_step.lower(state, batch, hyper, cfg=cfg).compile(compiler_options(cfg, mesh))
            state, metrics = program(state, batch, hyper)
            turns.step_done(float(metrics["loss"]))
            step += 1


def configured(spec: dict, model: object, words: list[str]) -> Config:
    """The configuration of the reference's recipe with this model, batch and horizon, and the options."""
    config = cli.load_experiment(cli.EXPERIMENTS / "nanochat_july.py")
    batch = spec["batch"]
    config = replace(
        config,
        model=model,
        tokenizer=replace(config.tokenizer, vocab_size=spec["vocab_size"]),
        base=replace(
            config.base,
            device_batch_size=batch,
            total_batch_size=batch * model.sequence_len,
            **spec["recipe"],
        ),
        compute_dtype=spec["dtype"],
    )
    return cli.parse(cli.Options, config, words, "compare_nanochat.py --", "").config


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
