"""What would end a later stage when it begins, found before the first: rather than after hours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nanochat_jax.config import DEFAULT_ROWS, MODEL_STAGES, Config
from nanochat_jax.data.conversations import read_jsonl
from nanochat_jax.errors import UserError
from nanochat_jax.fp8 import precision
from nanochat_jax.optim import horizon
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import check_mesh, data_shards, make_mesh, rows_of_microbatch, rows_of_step
from nanochat_jax.stages.finetune import check_mixture
from nanochat_jax.stages.rl import check_settings
from nanochat_jax.tasks import parse


def check_ahead(config: Config, stages: Collection[str], workdir: Path) -> None:
    """UserError for what would end one of these stages, to be run in `workdir`: mesh, batch, conversations, start,
    rl's settings.
    """
    cfg, mesh = gpt_config(config, config.tokenizer.vocab_size), make_mesh(config.mesh)
    shards = data_shards(mesh)
    check_mesh(mesh, cfg)
    precision(cfg, mesh.devices.flat[0])
    continued = ["sft"] if "rl" in stages and config.rl.control else []
    for name in [name for name in ("base", "mid", "sft") if name in (*stages, *continued)]:
        stage = getattr(config, name)
        made = horizon(config, cfg).batch_tokens if name == "base" else DEFAULT_ROWS * cfg.sequence_len
        rows = rows_of_step(name, stage.total_batch_size or made, cfg.sequence_len, shards)
        if stage.device_batch_size != "auto":
            rows_of_microbatch(name, rows, stage.device_batch_size, shards)
        if name != "base":
            check_mixture(name, stage)
            for file, *_ in map(parse, stage.mixture):
                if file.endswith(".jsonl"):
                    read_jsonl(Path(file))
    if "rl" in stages:
        check_settings(config.rl)
    for name in [name for name in MODEL_STAGES if name in stages]:
        if getattr(config, name).init_from is None:
            continue
        source = Path(getattr(config, name).init_from).expanduser()
        made_here = source.name in stages and source.parent.resolve() == workdir.resolve()
        if not made_here and not (source / "checkpoints").is_dir():
            raise UserError(f"--{name}.init-from {source} has no checkpoint: train {source.name} first")
