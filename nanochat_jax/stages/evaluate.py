"""Evaluation of a stage's model: bits per byte, CORE, and the chat tasks, into eval.json.

python -m nanochat_jax eval --workdir runs/tiny_cpu --source sft --tasks arithmetic,multistep
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Step, steps
from nanochat_jax.config import Config, GPTConfig
from nanochat_jax.data.download import ensure_shards, fetch_eval_bundle, prepare_shards
from nanochat_jax.data.files import read_json, write_json
from nanochat_jax.data.pretrain import Batch, validation_batches
from nanochat_jax.data.shards import shard_files
from nanochat_jax.distributed import is_leader, leaders
from nanochat_jax.evals.bpb import bits_per_byte
from nanochat_jax.evals.chat import chatcore, evaluate_task
from nanochat_jax.evals.core import evaluate_core
from nanochat_jax.evals.intervals import paired_interval
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import token_nats
from nanochat_jax.inference.shared import make_engine, own_copy
from nanochat_jax.memory import with_loss_chunk
from nanochat_jax.metrics import jsonable
from nanochat_jax.model import Params
from nanochat_jax.optim import horizon
from nanochat_jax.run import finished, load_model, read_config, recorded_files
from nanochat_jax.sharding import data_shards, make_mesh, put_batch
from nanochat_jax.stages.session import Log, start_of
from nanochat_jax.tasks import Task, load
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import eval_losses

QUANTIZATION_TOKENS = 4096
"""Targets on which quantized weights are compared with exact ones, at most."""
Model = tuple[Params, GPTConfig, Mesh, Tokenizer]
"""Parameters on a mesh, and what they are of."""


def run(
    config: Config,
    workdir: Path,
    source: str,
    tasks: tuple[str, ...] | None,
    max_examples: int | None,
    log: Log,
    step: Step = None,
) -> dict:
    """Measure the model of stage `source` on `tasks` ("bpb", "core", task names; None: the configured ones).

    Returns {"bpb": {"val", "train"}, "core": {...}, "tasks": {name: {"accuracy", "n", "interval"}}, "chatcore",
    "chatcore_interval"}. A whole evaluation as the run has it configured, of the newest checkpoint, is also written to
    the stage's eval.json. Where that cannot be written, the figures are returned all the same, and it is said.
    """
    names = tasks if tasks is not None else config.eval.base if source == "base" else config.eval.chat
    mesh = make_mesh(config.mesh)
    params, cfg, tokenizer, _, found = load_model(workdir, source, config, mesh, step)
    model = params, cfg, mesh, tokenizer
    limit = max_examples if max_examples is not None else config.eval.max_examples
    loaded = load_tasks(names, config)
    figures: dict = {"source": source, "step": found, "tasks": {}, "chatcore": None}
    if config.eval.temperature > 0:
        drawn = ("temperature", "top_k", "num_samples")
        figures["drawn"] = {name: getattr(config.eval, name) for name in drawn}
    if "bpb" in names:
        train_files, val_file = prepare_shards(config.data, log, recorded_files(workdir, config.data))
        # What was trained on is better known where it was read several times.
        files = {"val": val_file, "train": train_files[0]}
        figures["bpb"] = bpb = {name: validation_bpb(model, file, config) for name, file in files.items()}
        log(f"{source}: {bpb['val']:.4f} bits per byte in validation, {bpb['train']:.4f} in training")
    if "core" in names:
        figures["core"] = core_metric(model, config, log, limit)
    correct = {}
    if loaded:
        figures["tasks"] = measure(model, loaded.values(), config, limit, log)
        correct = {name: result.pop("correct") for name, result in figures["tasks"].items()}
        figures |= chatcore(figures["tasks"])
    in_pairs = len(correct.get(config.rl.task, ())) > 1  # one has no interval
    if source == "rl" and in_pairs and leaders(finished(workdir, "sft_continued")):
        task = loaded[config.rl.task]
        if found_out := compare(config, workdir, mesh, task, correct[task.name], limit, log):
            figures["comparison"] = found_out
    figures = jsonable(figures, source, log)
    settings, configured = decides(config, source, limit), read_config(workdir)
    as_configured = settings == decides(configured, source, configured.eval.max_examples)
    if tasks is None and step is None and as_configured and is_leader():
        # Row by row, so that stages can be compared in pairs without running them again.
        rows = {"step": found, "settings": settings, "correct": correct}
        try:
            write_json(workdir / source / "eval.json", figures)
            write_json(workdir / source / "correct.json", rows)
        except OSError as error:
            # The figures may have taken hours: they are returned, written or not.
            log(f"{workdir / source}: the evaluation cannot be written there ({error.strerror}); it is only shown")
    return figures


def is_current(config: Config, workdir: Path, stage: str) -> bool:
    """Whether eval.json of a complete stage is of its last step and of what is configured: none that was made on the
    way, or before other tasks or rows were asked for. Of a run that began before those were noted it is taken as it is.
    """
    folder = workdir / stage
    try:
        figures, settings = read_json(folder / "eval.json"), read_json(folder / "correct.json")["settings"]
        same = "names" not in settings or settings == decides(config, stage, config.eval.max_examples)
        return same and figures["step"] == finished(workdir, stage)["steps"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def validation_bpb(
    model: Model, val_file: Path, config: Config, rows: int | None = None, nats: Callable[..., jax.Array] = eval_losses
) -> float:
    """Bits per byte of the validation shard, up to base.eval_tokens; `rows` of a batch, unset: those of training, which
    for "auto" may be as few as one on each data shard. `nats`: as `eval_losses`, of whatever the parameters are.
    """
    params, cfg, mesh, tokenizer = model
    shards = data_shards(mesh)
    wanted = 1 if config.base.device_batch_size == "auto" else config.base.device_batch_size
    # A microbatch of training has no more rows than its step, whatever is asked for.
    step = horizon(config, cfg).batch_tokens // (cfg.sequence_len * shards)
    rows = rows or max(1, min(wanted, step)) * shards
    cfg = with_loss_chunk(config, cfg, rows // shards, mesh)

    def losses(inputs: object, targets: object) -> jax.Array:
        batch = put_batch({"inputs": inputs, "targets": targets}, mesh)
        with jax.set_mesh(mesh):
            return nats(params, batch["inputs"], batch["targets"], cfg=cfg)

    return bits_per_byte(losses, validation_set(val_file, tokenizer, config, cfg, rows), tokenizer.token_bytes)


def validation_set(file: Path, tokenizer: Tokenizer, config: Config, cfg: GPTConfig, rows: int) -> Iterator[Batch]:
    """See `validation_batches`, with the run's own settings."""
    limits = {"sequence_len": cfg.sequence_len, "eval_tokens": config.base.eval_tokens}
    return validation_batches(file, tokenizer, config.data, rows=rows, **limits)


def quantization_error(
    params: Params, engine: Engine, mesh: Mesh, tokenizer: Tokenizer, config: Config, log: Log
) -> None:
    """Logs bits per byte of parameters and of the engine's weights made from them, on the corpus in the package."""
    data = replace(config.data, dir=None, source="embedded", packing="stream")
    base = replace(config.base, eval_tokens=QUANTIZATION_TOKENS)
    _, file = shard_files(ensure_shards(data, log))
    on, how = (engine.cfg, mesh, tokenizer), (file, replace(config, data=data, base=base), data_shards(mesh))
    exact, rounded = validation_bpb((params, *on), *how), validation_bpb((engine.weights, *on), *how, token_nats)
    log(
        f"int8 weights: {exact:.4f} -> {rounded:.4f} bits per byte ({rounded - exact:+.4f}), up to "
        f"{QUANTIZATION_TOKENS:,} tokens of the embedded validation text"
    )


def core_metric(model: Model, config: Config, log: Log, max_examples: int | None = None) -> dict:
    """CORE (arXiv 2406.11794) of the model: {"core_metric", "results", "centered_results", "n"}."""
    params, cfg, mesh, tokenizer = model
    params, mesh = own_copy(params, mesh)
    bundle = fetch_eval_bundle(config.data, log)
    return evaluate_core(params, cfg, tokenizer, bundle, mesh, config.eval.batch_size, max_examples, log)


def load_tasks(names: Iterable[str], config: Config) -> dict[str, Task]:
    """The test sets among these evaluations, by name."""
    return {
        name: load(name, "test", config.data, config.seed, config.unsafe_sandbox)
        for name in names
        if name not in ("bpb", "core")
    }


def measure(
    model: Model, tasks: Iterable[Task], config: Config, limit: int | None, log: Log, written: int | None = None
) -> dict[str, dict]:
    """{"accuracy", "n", "interval", "correct"} by task, of its first `limit` rows; `written`: of a generative task's.

    None: all.
    """
    params, cfg, mesh, tokenizer = model
    settings = config.eval
    engine = make_engine(params, cfg, tokenizer, max_rows=settings.batch_size, max_len=cfg.sequence_len, mesh=mesh)
    log(engine.describe())
    found = {}
    for task in tasks:
        limits = [most for most in (limit, written if task.kind == "generative" else None) if most is not None]
        most = min(limits, default=None)
        found[task.name] = evaluate_task(task, engine, tokenizer, settings, most, log, config.seed)
    return found


def decides(config: Config, source: str, limit: int | None) -> dict:
    """What the figures of a stage, of `limit` rows a task, follow from, as JSON has it: not where the same sets lie,
    nor how many rows go through the model at once.
    """
    data = replace(config.data, cache="", num_shards=1, mirror=None, eval_bundle=None)
    names = config.eval.base if source == "base" else config.eval.chat
    found = {"names": names, "limit": limit, "data": asdict(data), "model": asdict(config.model)}
    found |= {"seed": config.seed, "compute_dtype": config.compute_dtype}
    if "bpb" in names:
        found["eval_tokens"] = config.base.eval_tokens
    if not {"bpb", "core"}.issuperset(names):
        settings = ("max_new_tokens", "temperature", "num_samples", *(["top_k"] if config.eval.temperature > 0 else []))
        found |= {name: getattr(config.eval, name) for name in settings}
    if source == "rl":
        found["compared_on"] = config.rl.task
    return json.loads(json.dumps(found))


def compare(
    config: Config, workdir: Path, mesh: Mesh, task: Task, rl: list[int], limit: int | None, log: Log
) -> dict | None:
    """rl beside sft, and beside sft continued for rl's compute, on the same questions, with paired 95% intervals.

    sft is the model that rl started from, wherever it is. None where one that is to be measured is deleted.
    """
    folders = {"rl": workdir / "rl", "sft": start_of("rl", config.rl, workdir)}
    folders["sft_continued"] = workdir / "sft_continued"
    done = {source: leaders(finished(path.parent, path.name)) or {} for source, path in folders.items()}
    right = {"rl": rl}
    for source in ("sft", "sft_continued"):
        folder, step = folders[source], config.rl.init_step if source == "sft" else None
        saved = folder / "correct.json"
        before = leaders(read_json(saved) if saved.exists() else {})
        newest = before.get("step") == done[source].get("steps") and step is None
        same = newest and before.get("settings") == decides(config, folder.name, limit)
        if same and task.name in before["correct"]:
            right[source] = before["correct"][task.name]
            continue
        if not leaders(steps(folder / "checkpoints")):
            log(f"rl: not compared, as there is no checkpoint in {folder}")
            return None
        log(f"{source}: {task.name}, for the comparison with rl")
        params, cfg, tokenizer, *_ = load_model(folder.parent, folder.name, config, mesh, step)
        model = params, cfg, mesh, tokenizer
        right[source] = measure(model, [task], config, limit, log)[task.name]["correct"]
    return {
        "task": task.name,
        "n": len(rl),
        **{source: sum(rows) / max(len(rows), 1) for source, rows in right.items()},
        "rl_minus_sft": paired_interval(right["sft"], right["rl"]),
        "sft_continued_minus_sft": paired_interval(right["sft"], right["sft_continued"]),
        "rl_minus_sft_continued": paired_interval(right["sft_continued"], right["rl"]),
        "rl_flops": done["rl"].get("flops"),
        "sft_continued_flops": done["sft_continued"].get("flops"),
        "seconds": {source: facts.get("seconds") for source, facts in done.items()},
    }
