"""The folder of a run: its config.json, what is finished in it, and the model to load from it.

    config.json  tokenizer/  base/ mid/ sft/ rl/ {checkpoints/ metrics.jsonl eval.json samples.md done.json}  report.*

config.json is written when the run starts: the configuration, versions, git revision and the data files. A later start
is compared with it, because a schedule or a model that changes halfway gives a run that nothing describes. Fields of a
stage are fixed once that stage has begun; paths, devices, logging, evaluation and microbatch size stay free. A start
that fails before it has made anything leaves no values behind, and those that are forced on finished stages stay out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_jax.config import MODEL_STAGES, PACKING, STAGES, Config, DataConfig, GPTConfig
from nanochat_jax.data.files import read_json, write_json
from nanochat_jax.distributed import is_leader
from nanochat_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from nanochat_jax.checkpoint import Step
    from nanochat_jax.tokenizer import Tokenizer

RUNS = Path("runs")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "rustbpe", "tiktoken")
PATTERN_CHARACTERS = frozenset("*?[\\")
"""orbax takes the path of a checkpoint for a pattern: with these it finds no files, or those of another folder."""
MADE = ("done.json", "tokenizer.json", "checkpoints/step_*")
FREE_IN_STAGE = (
    "device_batch_size",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep",
    "stop_after",
    "sample_tokens",
    "sample_every",
    "core_every",
    "tasks_every",
    "tasks_rows",
    "eval_examples",
    "pass_k",
    "control",
)


def open_run(config: Config, workdir: Path, *, force: bool = False, log: Callable[[str], None] = print) -> bool:
    """Creates the folder with its config.json, or checks `config` against the one there and records what changed.

    Raises UserError naming the fields that differ though a stage that depends on them has begun; with `force` they are
    accepted, and said. Whether there were any.
    """
    forced = False
    _make_folder(workdir)
    environment = _environment()
    record = {"config": dataclasses.asdict(config), "data": None} | environment
    for stage in MODEL_STAGES:
        record["config"][stage]["stop_after"] = None  # asked of one start only
    if (workdir / "config.json").exists():
        old = _read_record(workdir)
        begun = {stage for stage in STAGES if _begun(workdir, stage)}
        # Fields that are newer than the run have had their default in it.
        both = dataclasses.asdict(read_config(workdir)), record["config"]
        before, now = (_fixed(json.loads(json.dumps(fields)), begun) for fields in both)
        refuse_changes(str(workdir), before, now, force, log)
        forced = before != now
        for name in before:
            stage, _, field = name.rpartition(".")
            if before[name] != now[name] and stage in STAGES and finished(workdir, stage):
                record["config"][stage][field] = before[name]
                log(f"{stage} is finished: {name} stays {before[name]} in config.json")
        record = old | {"config": record["config"], "later_starts": [*old.get("later_starts", []), environment]}
    _write_record(workdir, record)
    return forced


@contextlib.contextmanager
def opened(config: Config, workdir: Path, *, force: bool, log: Callable[[str], None]) -> Iterator[None]:
    """`open_run` for what is done inside; where that makes nothing and fails, or values were forced, config.json is as
    before.

    Otherwise a mistaken option would be that of every later start, which takes what it is not told from there, and the
    values of finished stages others than those they were trained with.
    """
    path = workdir / "config.json"
    before, made = _read_record(workdir) if path.exists() else None, _made(workdir)
    forced = open_run(config, workdir, force=force, log=log)

    def forget() -> None:
        if _made(workdir) == made:
            log(f"{path}: the values of this start are not kept")
            if before is None:
                path.unlink()
            else:
                _write_record(workdir, before)

    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):  # what failed is to be said, not this
            forget()
        raise
    if forced:
        forget()


@contextlib.contextmanager
def locked(workdir: Path, log: Callable[[str], None] = print) -> Iterator[None]:
    """While this process alone trains in the folder of a run. UserError where another one does."""
    _make_folder(workdir)
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"process {file.read()}".strip()
            raise UserError(
                f"{workdir} is being trained in by {holder}: wait for it, or name another --workdir"
            ) from None
        except OSError:
            log(f"{workdir}: this file system has no locks; see to it that no other process trains there")
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def record_data(workdir: Path, files: Sequence[Path], force: bool = False) -> None:
    """Notes names and sizes of the data files at the first start; UserError where they differ at a later one."""
    record = _read_record(workdir)
    found = {path.name: path.stat().st_size for path in files}
    if record["data"] is not None:
        before, now = ({f"bytes of {name}": size for name, size in sizes.items()} for sizes in (record["data"], found))
        refuse_changes(str(workdir), before, now, force)
    _write_record(workdir, record | {"data": found})


def recorded_files(workdir: Path, data: DataConfig) -> list[str] | None:
    """Names of the run's data files, the validation file last; None where none are noted or `data` is elsewhere."""
    record = _read_record(workdir)
    of_run = record["config"]["data"]
    here = (of_run.get("dir") or of_run.get("source")) == (data.dir or data.source)
    return list(record["data"]) if record["data"] and here else None


def record_used(workdir: Path, cfg: GPTConfig, tokenizer: Tokenizer, force: bool = False) -> None:
    """Notes what `auto` meant and which tokenizer it was; UserError where a model here was trained with another."""
    record = _read_record(workdir)
    now = {"compute_dtype": cfg.compute_dtype, "tokenizer": tokenizer.fingerprint()}
    if any(_begun(workdir, stage) for stage in MODEL_STAGES):
        before = record.get("used", {})
        refuse_changes(str(workdir), {name: before.get(name, now[name]) for name in now}, now, force)
    _write_record(workdir, record | {"used": now | {"attention": cfg.attention}})


def refuse_changes(
    what: str, before: dict[str, Any], now: dict[str, Any], force: bool, log: Callable[[str], None] | None = None
) -> None:
    """UserError naming the values of `what`, a run or stage, that differ; with `force` `log` is told of them."""
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    changed = [f"{name} was {before.get(name)}, now {now.get(name)}" for name in names]
    if changed and not force:
        raise UserError(
            f"{what} was started with other values: {'; '.join(changed)}. Use the old ones, another --workdir, "
            "or --force to go on with the new ones"
        )
    for line in changed if log else ():
        log(f"forced: {line}")


def read_config(workdir: Path) -> Config:
    """The configuration in `workdir`/config.json. UserError where it is missing, damaged or of another version."""
    fields = _read_record(workdir)["config"]
    if isinstance(fields, dict) and isinstance(fields.get("native"), bool):  # as it was written when it began
        fields = fields | {"native": "on" if fields["native"] else "auto"}
    return config_from_dict(fields, f"{workdir}/config.json")


def config_from_dict(fields: dict[str, Any], where: str) -> Config:
    """The inverse of `asdict`; absent fields keep their default. UserError names an unknown one and `where`."""

    def build(kind: type, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise UserError(f"{where}: {prefix.rstrip('.') or 'config'} is {values!r:.40}, not an object of values")
        defaults = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}
        if unknown := values.keys() - defaults.keys():
            raise UserError(f"{where}: unknown field {prefix}{min(unknown)}; it was written by another version")
        built = {}
        for name, value in values.items():
            if dataclasses.is_dataclass(defaults[name]):
                value = build(type(defaults[name]), value, f"{prefix}{name}.")
            built[name] = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(kind(), **built)

    return build(Config, fields, "")


def gpt_config(config: Config, vocab_size: int, platform: str | None = None) -> GPTConfig:
    """The architecture, `auto` resolved for the devices JAX sees. UserError where the attention cannot run there.

    `platform`: another one; a "gpu" that is not here is an H100.
    """
    import jax

    from kernels.attention import AMPERE, MOSAIC_CUDA, compute_capability, generation, resolve

    here = jax.default_backend()
    platform = platform or here
    capability, cuda = (compute_capability(), None) if platform == here else ("9.0", MOSAIC_CUDA)
    # NVIDIA's GPUs have no products in bfloat16 before Ampere.
    automatic = "float32" if platform == "cpu" or 0 < generation(capability) < AMPERE else "bfloat16"
    dtype = automatic if config.compute_dtype == "auto" else config.compute_dtype
    try:
        impl = resolve(config.attention, platform, dtype, capability, config.model.head_dim, cuda)
    except ValueError as error:
        raise UserError(str(error)) from None
    resolved = {"compute_dtype": dtype, "attention": impl, "fp8": config.fp8, "remat": config.remat}
    resolved["native"] = {"auto": None, "on": True, "off": False}[config.native]
    return GPTConfig.from_depth(config.model, vocab_size, **resolved)


def finished(workdir: Path, stage: str) -> dict[str, Any] | None:
    """What done.json of a stage says, or None where the stage is not complete."""
    path = workdir / stage / "done.json"
    return read_json(path) if path.exists() else None


def outdated(workdir: Path, facts: dict[str, Any] | None) -> str | None:
    """What is to be said where the stage that one of `workdir` began from, as its done.json or its checkpoints' meta
    tell, was trained anew or on since; None where nothing is known of that.
    """
    try:
        start = facts["start"]
        source = workdir / start["stage"]
        now, how = finished(source.parent, source.name)["finished"], "anew" if start["finished"] else "on"
        line = f"it began from step {start['step']} of {source.name}, which was trained {how} since"
        return line if now != start["finished"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def newest_run(root: Path = RUNS) -> Path:
    """The run under `root` with the newest checkpoint. Raises UserError where there is none."""
    saved: list[tuple[float, Path]] = []
    for path in root.glob("*/*/checkpoints/step_*"):
        with contextlib.suppress(OSError):  # pruned meanwhile
            saved.append((path.stat().st_mtime, path.parents[2]))
    if not saved:
        raise UserError(f"no model under {root}/: train one with `python run_speedrun.py`, or say --workdir")
    return max(saved)[1]


def newest_model(workdir: Path, source: str | None = None) -> str:
    """The last stage in order that has a checkpoint, finished or not; `source` asks for one. UserError without one."""
    have = [path.parents[1].name for path in workdir.glob("*/checkpoints/step_*")]
    stages = [stage for stage in MODEL_STAGES if stage in have]
    if source is None and stages:
        return stages[-1]
    if source in have:
        return source
    wanted = f"{source} model" if source else "model"
    raise UserError(f"no checkpoint of a {wanted} in {workdir} (there: {', '.join(stages) or 'none'}): train it first")


def load_model(
    workdir: Path,
    source: str | None = None,
    config: Config | None = None,
    mesh: Mesh | None = None,
    step: Step = None,
) -> tuple[dict[str, Any], GPTConfig, Tokenizer, str, int]:
    """(params, architecture, tokenizer, stage, step) of a run's model, the newest unless `source` names a stage and
    `step` one of its checkpoints.

    Parameters are placed on `mesh`, or on the first device. `config`, the run's own by default, may differ from it in
    precision and attention. Raises UserError where there is no model, or one of another shape.
    """
    from nanochat_jax.checkpoint import restore_params
    from nanochat_jax.sharding import make_mesh
    from nanochat_jax.tokenizer import Tokenizer

    stage = newest_model(workdir, source)
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    cfg = gpt_config(config or read_config(workdir), tokenizer.vocab_size)
    params, _, step = restore_params(workdir / stage / "checkpoints", params_target(cfg, mesh or make_mesh("1")), step)
    return params, cfg, tokenizer, stage, step


def params_target(cfg: GPTConfig, mesh: Mesh) -> dict[str, Any]:
    """Shapes and shardings to restore parameters to, on `mesh`. UserError where it cannot hold this architecture."""
    from nanochat_jax.model import param_shapes
    from nanochat_jax.sharding import check_mesh, param_specs, placed

    check_mesh(mesh, cfg)
    shapes = param_shapes(cfg)
    return placed(shapes, param_specs(shapes), mesh)


def _make_folder(workdir: Path) -> None:
    if odd := sorted(PATTERN_CHARACTERS.intersection(str(workdir.absolute()))):
        raise UserError(
            f"--workdir {workdir.absolute()}: no checkpoint could be read from a path with {' '.join(odd)} in it; "
            "name one without"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be made a folder ({error.strerror}); name another") from None


def _begun(workdir: Path, stage: str) -> bool:
    """Whether a stage has made something that later starts must fit."""
    return any(any((workdir / stage).glob(pattern)) for pattern in MADE)


def _made(workdir: Path) -> set[tuple[Path, int]]:
    """What the stages have made so far, and when."""
    paths = [path for pattern in (*MADE, "eval.json") for path in workdir.glob(f"*/{pattern}")]
    return {(path, path.stat().st_mtime_ns) for path in paths}


def _fixed(fields: dict[str, Any], begun: set[str]) -> dict[str, Any]:
    """Dotted name -> value of the fields that what has `begun` depends on."""
    model_begun = bool(begun & set(MODEL_STAGES))
    fixed = {"seed": fields["seed"]} if begun else {}
    if "tokenizer" in begun:
        fixed |= {f"tokenizer.{name}": value for name, value in fields["tokenizer"].items()}
    if model_begun:
        fixed |= {name: fields[name] for name in ("compute_dtype", "fp8")}
        fixed |= {f"model.{name}": value for name, value in fields["model"].items()}
        fixed |= {f"data.{name}": fields["data"].get(name) for name in PACKING}
    for stage in begun & set(MODEL_STAGES):
        fixed |= {f"{stage}.{name}": value for name, value in fields[stage].items() if name not in FREE_IN_STAGE}
    return fixed


def _environment() -> dict[str, Any]:
    """What a run should know about where it was started."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None  # an installed copy, not a checkout
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": versions, "git": revision, "started": started, "command": sys.argv}


def _write_record(workdir: Path, record: dict[str, Any]) -> None:
    if is_leader():
        write_json(workdir / "config.json", record)


def _read_record(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        record = read_json(path)
        return {"config": record["config"], "data": record.get("data")} | record
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} is not the folder of a run: there is no config.json in it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): start the run in another --workdir") from None
