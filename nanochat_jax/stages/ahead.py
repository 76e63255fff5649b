"""What would end a later stage or its evaluation when it begins, found before the first: rather than after hours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nanochat_jax.checkpoint import steps
from nanochat_jax.config import DEFAULT_ROWS, MODEL_STAGES, Config
from nanochat_jax.data.download import fetch_eval_bundle
from nanochat_jax.data.pretrain import check_dealt
from nanochat_jax.distributed import leaders
from nanochat_jax.evals.core import checked_tasks
from nanochat_jax.fp8 import precision
from nanochat_jax.inference.native import with_native
from nanochat_jax.optim import check_horizon, horizon
from nanochat_jax.run import finished, gpt_config
from nanochat_jax.sharding import check_mesh, data_part, data_shards, make_mesh, rows_of_microbatch, rows_of_step
from nanochat_jax.stages.evaluate import load_tasks
from nanochat_jax.stages.finetune import check_mixture
from nanochat_jax.stages.rl import check_settings, longest_asked
from nanochat_jax.stages.session import Log, check_origin_of, check_start, start_of
from nanochat_jax.tasks import Mixture, load
from nanochat_jax.tokenizer import Tokenizer


def check_ahead(config: Config, stages: Collection[str], workdir: Path, log: Log) -> None:
    """UserError for what would end one of these stages, to be run in `workdir`, or the evaluation after it: mesh,
    batch, start, rl's settings, and see `fetch_sets` and, where there is a tokenizer by now, `check_with_tokenizer`.
    """
    cfg, mesh = gpt_config(config, config.tokenizer.vocab_size), make_mesh(config.mesh)
    shards = data_shards(mesh)
    check_mesh(mesh, cfg)
    precision(cfg, mesh.devices.flat[0])
    if cfg.native:
        with_native(cfg, mesh)
    continued = ["sft"] if "rl" in stages and config.rl.control else []
    for name in [name for name in ("base", "mid", "sft") if name in (*stages, *continued)]:
        stage = getattr(config, name)
        tokens = stage.total_batch_size or DEFAULT_ROWS * cfg.sequence_len
        if name == "base":
            found = horizon(config, cfg)
            check_horizon(config, found)
            tokens = found.batch_tokens
        rows = rows_of_step(name, tokens, cfg.sequence_len, shards)
        rows_of_microbatch(name, rows, stage.device_batch_size, shards)
        if name == "base":
            check_dealt(rows, config.data.streams, data_part(mesh)[1])
        else:
            check_mixture(name, stage)
    if "rl" in stages:
        check_settings(config.rl)
    for name, source in starts(config, stages, workdir).items():
        check_start(name, getattr(config, name), source)
    fetch_sets(config, (*stages, *continued), log)
    if leaders(finished(workdir, "tokenizer")):
        check_with_tokenizer(config, stages, workdir, log)


def starts(config: Config, stages: Collection[str], workdir: Path) -> dict[str, Path]:
    """The WORKDIR/STAGE that each of these stages starts from and that has to be there already; without stages that go
    on from a checkpoint of their own.
    """
    found, chosen = {}, [name for name in MODEL_STAGES if name in stages]
    for i, name in enumerate(chosen):
        source = start_of(name, getattr(config, name), workdir, coming=stages)
        control = name == "rl" and config.rl.control  # sft_continued starts there too
        needed_again = control and not leaders(steps(workdir / "sft_continued" / "checkpoints"))
        begun = leaders(steps(workdir / name / "checkpoints")) and not needed_again
        made_here = source and source.name in chosen[:i] and source.parent.resolve() == workdir.resolve()
        if source and not begun and not made_here:
            found[name] = source
    return found


def check_with_tokenizer(config: Config, stages: Collection[str], workdir: Path, log: Log) -> None:
    """UserError for what shows when there is a tokenizer: starts from other runs whose models these stages cannot take,
    and prompts of rl or of CORE, where these stages ask them, that it makes too long.
    """
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    cfg = gpt_config(config, tokenizer.vocab_size)
    for name, source in starts(config, stages, workdir).items():
        check_origin_of(name, cfg, tokenizer, workdir, source, lambda _: None)  # the stage says it
    if measures_core(config, stages):
        checked_tasks(cfg, tokenizer, fetch_eval_bundle(config.data, log), config.eval.max_examples)
    if "rl" in stages:
        splits = [load(config.rl.task, split, config.data, config.seed) for split in ("train", "val")]
        longest_asked(config, *splits, tokenizer)


def fetch_sets(config: Config, stages: Collection[str], log: Log) -> None:
    """Bring what these stages learn from and are measured on to this machine, where it is not here, pretraining shards
    left out. UserError where it cannot be had, or programs of humaneval could not be run.
    """
    for name in sorted({"mid", "sft"}.intersection(stages)):
        Mixture(getattr(config, name).mixture, "train", config.data, config.seed)
    if "rl" in stages:
        for split in ("train", "val"):
            load(config.rl.task, split, config.data, config.seed)
    if measures_core(config, stages):
        fetch_eval_bundle(config.data, log)
    load_tasks(sorted(measured(config, stages)), config)


def measured(config: Config, stages: Collection[str]) -> set[str]:
    """What these stages are evaluated on when they are done."""
    return {name for stage in stages for name in (config.eval.base if stage == "base" else config.eval.chat)}


def measures_core(config: Config, stages: Collection[str]) -> bool:
    """Whether CORE is measured in one of these stages or after it."""
    return "core" in measured(config, stages) or ("base" in stages and config.base.core_every > 0)
