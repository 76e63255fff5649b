"""The command line: `python -m nanochat_jax COMMAND [--workdir DIR] [--experiment FILE] [--FIELD VALUE ...]`.

tyro builds every option from the dataclasses below and in config.py. A mistake of the user is one line on stderr:
status 2 where the command line itself is wrong, 1 where something else is (`UserError`). JAX and the stages are
imported by the commands that need them, so that --help is quick.

Values come from, later ones winning: the experiment file (or config.json of the run), then the options.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typeguard
import tyro

from nanochat_jax import distributed, process, run, track
from nanochat_jax.bench import Settings, measured
from nanochat_jax.config import MODEL_STAGES, Config, check_ranges
from nanochat_jax.data.files import DISK_FULL, expanded
from nanochat_jax.errors import UsageError, UserError
from nanochat_jax.stopping import ending_at_once

if TYPE_CHECKING:
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.tokenizer import Tokenizer

PROGRAM = "python -m nanochat_jax"
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
Flag = tyro.conf.FlagCreatePairsOff[bool]
Source = Literal["base", "mid", "sft", "rl"]
Part = Literal["train", "attention", "loader", "tokenizer", "decode", "server", "sandbox"]
CONVERSATION_TEMPERATURE = 0.6
HELP, HELP_ALL = ("-h", "--help"), "--help-all"
PATHS = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
MENDABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, *DISK_FULL, *PATHS)


@dataclass(frozen=True)
class Options:
    """What every command takes."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    workdir: str | None = None
    """Folder of the run; unset: runs/<experiment> for training, else the run with the newest model."""
    experiment: str | None = None
    """Python file with `config`; unset: the run's config.json, else experiments/speedrun.py (GPU) or tiny_cpu.py."""

    def check(self) -> None:
        """Raises UsageError where options contradict each other; called before anything is done."""


@dataclass(frozen=True)
class SharedOptions(Options):
    """Options of the commands that several processes can work on together."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the run has several processes; unset: $COORDINATOR_ADDRESS, else SLURM's step."""
    num_processes: int | None = None
    """Processes of the run; unset: $NUM_PROCESSES."""
    process_id: int | None = None
    """Which of them this one is, from 0; unset: $PROCESS_ID."""

    def join(self, workdir: Path) -> None:
        """Joins the other processes of the run, where there are any. UserError where that fails."""
        member = distributed.membership(self.coordinator, self.num_processes, self.process_id, os.environ)
        if member is None:
            return
        log(f"process {member.index} of {member.count}: meeting at {member.host}:{member.port}")
        log(distributed.initialize(member, workdir))
        from flax.traverse_util import flatten_dict

        options = flatten_dict(dataclasses.asdict(self), sep=".") | {"workdir": str(workdir.absolute())}
        told = distributed.gather_json({name.removeprefix("config."): value for name, value in options.items()})
        own = ("coordinator", "num_processes", "process_id", "experiment")  # of an experiment its values count
        if differ := [name for name in told[0] if name not in own and any(one[name] != told[0][name] for one in told)]:
            raise UserError(
                f"the processes were started with different options ({', '.join(differ)}): give all of them the same"
            )


@dataclass(frozen=True)
class TrainOptions(SharedOptions):
    """Options of the training commands."""

    plan: Flag = False
    """Print parameters, steps, tokens, FLOPs, memory, disk, hours and dollars, and stop."""
    force: Flag = False
    """Go on with values that differ from those the run was started with."""


@dataclass(frozen=True)
class ModelOptions(Options):
    """Options of the commands that use a trained model."""

    source: Source | None = None
    """Stage whose model it is; unset: the last one that has a checkpoint."""
    step: int | Literal["best"] | None = None
    """Checkpoint of the stage: a step, or `best`, that of the best validation; unset: the newest."""


@dataclass(frozen=True)
class EngineOptions(ModelOptions):
    """Options of the commands that generate for people."""

    quantize: Literal["none", "int8"] = "none"
    """Round the layers' large matrices to 8 bits: a quarter of float32's memory; the loss is measured and said."""


@dataclass(frozen=True)
class EvalOptions(ModelOptions, SharedOptions):
    """Options of `eval`."""

    tasks: str | None = None
    """Evaluations, separated by commas: bpb, core, arc_easy, ...; unset: those of the configuration."""
    max_examples: int | None = None
    """Rows of each task; unset: as configured."""
    json: Flag = False
    """Nothing changes: the line of JSON is always there."""

    def check(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise UsageError(f"--max-examples {self.max_examples}: at least 1 is needed")
        if self.tasks is not None and not self.named():
            raise UsageError("--tasks names nothing: bpb, core, or tasks, separated by commas")

    def named(self) -> tuple[str, ...]:
        """The names in `tasks`."""
        return tuple(name.strip() for name in (self.tasks or "").split(",") if name.strip())


@dataclass(frozen=True)
class ChatOptions(EngineOptions):
    """Options of `chat`. `--seed` is the seed of the sampling here."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this and stop; unset: talk until /quit."""
    raw: Flag = False
    """Continue the prompt as plain text, without chat tokens."""
    temperature: float | None = None
    """Sampling temperature, 0: always the likeliest token; unset: 0 for a single question, otherwise 0.6."""
    top_k: int = 50
    """Sample from this many tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Sample from tokens at least this likely relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that already stand in the row become less likely."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, before them."""
    max_tokens: int = 256
    """Longest answer, tokens."""
    json: Flag = False
    """End stdout with one line of JSON: text, tool calls, usage; needs a prompt."""

    def check(self) -> None:
        if self.prompt is None and (self.json or self.raw):
            raise UsageError(f"{'--json' if self.json else '--raw'} needs a prompt: -p TEXT")
        if self.prompt is not None and not self.prompt.strip() and not self.raw:
            raise UsageError("--prompt is empty: give it what is to be answered, or leave it out to talk")


@dataclass(frozen=True)
class ServeOptions(EngineOptions):
    """Options of `serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but this machine needs a token."""
    port: int = 8000
    """TCP port; 0: any free one."""
    token: str | None = None
    """Bearer token that requests to the API must carry."""
    rows: int = 8
    """Conversations answered at the same time."""

    def check(self) -> None:
        if self.rows < 1:
            raise UsageError(f"--rows {self.rows}: at least 1 is needed")
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port {self.port}: 0 to {2**16 - 1} are ports")


@dataclass(frozen=True)
class ReportOptions(Options):
    """Options of `report`."""

    against: tuple[Path, ...] = ()
    """Folders of other runs: this run and these side by side, in comparison/ of this one's folder."""


@dataclass(frozen=True)
class ConvertOptions(Options):
    """Options of `convert`."""

    what: tyro.conf.Positional[Literal["from-nanochat", "to-hf"]] = tyro.MISSING
    """from-nanochat: a checkpoint of karpathy/nanochat becomes a run; to-hf: a model, a folder for Hugging Face."""
    checkpoint: Path | None = None
    """from-nanochat: folder with model_NNNNNN.pt and meta_NNNNNN.json, such as base_checkpoints/d12."""
    tokenizer: Path | None = None
    """from-nanochat: folder with tokenizer.pkl; unset: tokenizer/ beside base_checkpoints/."""
    out: Path | None = None
    """to-hf: the folder to make."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """to-hf: what the weights are rounded to."""
    step: int | Literal["best"] | None = None
    """Which checkpoint; unset: the newest."""
    stage: Source | None = None
    """from-nanochat: what the model is; unset: by the folder's name. to-hf: whose model; unset: the last stage's."""

    def check(self) -> None:
        if self.workdir is None:
            raise UsageError("convert needs --workdir DIR, the folder of the run")
        if self.what == "to-hf":
            if self.out is None or self.checkpoint or self.tokenizer:
                raise UsageError("convert to-hf needs --out FOLDER, and takes no --checkpoint nor --tokenizer")
        elif self.checkpoint is None or self.out or self.step == "best" or self.dtype != "float32":
            raise UsageError(
                "convert from-nanochat needs --checkpoint FOLDER, and takes no --out, --dtype nor --step best"
            )


@dataclass(frozen=True)
class BenchOptions(Settings, Options):
    """Options of `bench`."""

    what: tyro.conf.Positional[Part] = tyro.MISSING
    """The part to measure."""
    json: Flag = False
    """Nothing changes: the line of JSON that ends stdout is always there."""

    def check(self) -> None:
        if min((self.repeat, *self.rows)) < 1:
            raise UsageError(f"--repeat {self.repeat} --rows {' '.join(map(str, self.rows))}: at least 1 is needed")


Command = Callable[[Any, Path], None]


def main(argv: Sequence[str]) -> int:
    """Runs `argv`, the words after the program's name; returns the exit status."""

    def action() -> None:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
        elif argv[0] not in COMMANDS:
            raise UsageError(f"unknown command {argv[0]!r}; commands: {' '.join(COMMANDS)}")
        else:
            run_command(f"{PROGRAM} {argv[0]}", *COMMANDS[argv[0]], argv[1:])

    return guarded(action)


def guarded(action: Callable[[], None]) -> int:
    """Exit status of `action`, what a user can mend being one line on stderr. Other exceptions are bugs and pass."""
    try:
        action()
        distributed.finish()
        return 0
    except SystemExit as stop:  # tyro, after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except BrokenPipeError:
        # The reader of stdout has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, message = 1, "the reader of its output has gone"
    except Exception as error:
        # The class of the error is not asked for: that would import JAX.
        if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
            error = UserError(
                f"the device's memory is full ({str(error).splitlines()[0]}): --base.device-batch-size (or that of the "
                "stage) auto or smaller, --remat, or fewer --rows; --plan says what a step needs"
            )
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in MENDABLE):
            status, message = 2 if isinstance(error, UsageError) else 1, " ".join(str(error).split())
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                message = f"the disk is full ({message}): free some space and start again"
            print(f"error: {distributed.speaker()}{message}", file=sys.stderr, flush=True)
        elif not distributed.is_shared():
            raise
        else:
            time.sleep(distributed.VERDICT)  # a dead process is the likely reason: its listener names it and exits
            traceback.print_exc()
            status, message = 1, f"{type(error).__name__}: {error}".splitlines()[0]
    distributed.fail(message, status)
    return status


def run_command(prog: str, kind: type[Options], command: Command, about: str, argv: Sequence[str]) -> None:
    """Parses `argv` into `kind` on top of the experiment or the run it names, and calls `command(options, workdir)`."""
    training = issubclass(kind, TrainOptions)
    starts_run = training or command in (download, convert, bench)
    config, workdir, origin = _defaults(argv, starts_run, tolerant=command is report)
    options = parse(kind, config, argv, prog, f"{about}\n\nDefaults shown are those of {origin}.")
    options.check()
    with _usage():
        check_ranges(options.config)
        if command is not report:  # which imports no JAX
            from nanochat_jax.sharding import parse_mesh

            parse_mesh(options.config.mesh)
        if isinstance(options, SharedOptions) or command is download:
            from nanochat_jax.tasks import check_names

            check_names(options.config, options.named() if isinstance(options, EvalOptions) else ())
    if command is convert and options.config.model != config.model:
        raise UsageError("--model options: the shape of the model is that of the checkpoint; leave them out")
    log(f"run {workdir}, configuration from {origin}")
    if training and options.plan:
        from nanochat_jax.plan import format_plan, plan

        # The command of one stage is `train` with its name.
        stages = command.args if isinstance(command, partial) else options.chosen()
        print(format_plan(plan(options.config, stages)))
        return
    if isinstance(options, ChatOptions | ServeOptions):  # they have their own uses for Ctrl-C
        command(options, workdir)
        return
    with ending_at_once(), contextlib.ExitStack() as stack:
        if isinstance(options, SharedOptions):
            options.join(workdir)
        if training and distributed.is_leader():
            track.check(options.config.track)
            stack.enter_context(run.locked(workdir, log))
            stack.enter_context(run.opened(options.config, workdir, force=options.force, log=log))
        distributed.barrier("run opened")
        command(options, workdir)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Around checks of values that were given: what they refuse is a UsageError."""
    try:
        yield
    except UserError as error:
        raise UsageError(str(error)) from None


def parse(kind: type[Options], config: Config, argv: Sequence[str], prog: str, description: str) -> Any:
    """`argv` as an instance of `kind` with `config` as defaults. UsageError with tyro's message in one line."""
    stdout, stderr = io.StringIO(), io.StringIO()
    words = [HELP[1] if word == HELP_ALL else word for word in argv]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=words, default=kind(config), prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            print(stdout.getvalue() if HELP_ALL in argv else _own_help(stdout.getvalue(), config, prog), end="")
            raise
        raise UsageError(f"{_one_line(stderr.getvalue())}; see {prog} --help") from None


def load_experiment(path: Path) -> Config:
    """`config` of an experiment file. UsageError where the file is missing, fails or defines none."""
    if not path.is_file():
        raise UsageError(f"--experiment {path}: there is no such file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        raise UsageError(f"--experiment {path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise UsageError(f"--experiment {path}: it must define `config`, a nanochat_jax.config.Config")
    with _usage():
        check_types(config, f"--experiment {path}: --")
    return config


def check_types(config: Any, prefix: str) -> None:
    """UserError naming, after `prefix`, the first field of `config` or of a section in it whose value is not of the
    declared type.
    """
    hints, every = get_type_hints(type(config)), typeguard.CollectionCheckStrategy.ALL_ITEMS
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name.replace('_', '-')}", getattr(config, field.name)
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, hints[field.name]):
            check_types(value, f"{name}.")
            continue
        try:
            typeguard.check_type(value, hints[field.name], collection_check_strategy=every)
        except typeguard.TypeCheckError:
            raise UserError(f"{name} {value!r} is not of type {field.type}") from None


def log(text: str) -> None:
    """Progress, for people: stderr. Of several processes the leader alone speaks."""
    if distributed.is_leader():
        print(text, file=sys.stderr, flush=True)


# What each command does stands in COMMANDS.


def download(options: Options, workdir: Path) -> None:
    from nanochat_jax.data.download import prepare_shards
    from nanochat_jax.stages.ahead import fetch_sets

    train, validation = prepare_shards(options.config.data, log)
    log(f"{len(train)} training shards and {validation.name} for validation in {validation.parent}")
    # Programs may be run elsewhere.
    fetch_sets(dataclasses.replace(options.config, unsafe_sandbox=True), MODEL_STAGES, log)
    log("the sets of all stages and evaluations are here")


def train(stage: str, options: TrainOptions, workdir: Path) -> None:
    from nanochat_jax.stages import finetune, pretrain, rl, tokenizer

    if stage == "tokenizer":
        tokenizer.run(options.config, workdir, log)
    elif stage == "base":
        pretrain.run(options.config, workdir, log, options.force)
    elif stage == "rl":
        rl.run(options.config, workdir, log, options.force)
    else:
        finetune.run(options.config, workdir, stage, log, options.force)


def evaluate(options: EvalOptions, workdir: Path) -> None:
    from nanochat_jax.stages import evaluate

    source = run.newest_model(workdir, options.source)
    figures = evaluate.run(
        options.config, workdir, source, options.named() or None, options.max_examples, log, options.step
    )
    if distributed.is_leader():
        print(json.dumps(figures), flush=True)


def chat(options: ChatOptions, workdir: Path) -> None:
    from nanochat_jax.chat import answer_once, talk
    from nanochat_jax.inference.requests import SamplingParams

    temperature = options.temperature
    if temperature is None:
        temperature = CONVERSATION_TEMPERATURE if options.prompt is None or options.raw else 0.0
    with _usage():
        sampling = SamplingParams(
            temperature=temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop=options.stop,
            max_tokens=options.max_tokens,
            seed=options.config.seed,
        )
    engine, tokenizer, name = _engine(options, workdir, rows=1)
    process.raise_on_ctrl_c()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what is no text here, or cannot be shown here, ends no conversation
    if options.prompt is None:
        talk(engine, tokenizer, sampling)
        return
    answer = answer_once(engine, tokenizer, sampling, options.prompt, raw=options.raw, show=not options.json)
    if options.json:
        print(json.dumps({"model": name} | answer), flush=True)


def serve(options: ServeOptions, workdir: Path) -> None:
    from nanochat_jax.server.app import bound, check_host, create_app, serve

    check_host(options.host, options.token)
    with bound(options.host, options.port) as listener:
        engine, tokenizer, name = _engine(options, workdir, rows=options.rows)
        process.raise_on_ctrl_c()
        serve(create_app(engine, tokenizer, model_name=name, token=options.token), listener)


def report(options: ReportOptions, workdir: Path) -> None:
    from nanochat_jax.report import write_report

    print(write_report(workdir, options.config.device_hour_cost))
    if options.against:
        from nanochat_jax.compare import write_comparison

        print(write_comparison([workdir, *map(expanded, options.against)], workdir / "comparison"))


def convert(options: ConvertOptions, workdir: Path) -> None:
    if options.what == "to-hf":
        from nanochat_jax.export import to_hf

        # Nothing is computed: what the run was trained with need not run here.
        config = dataclasses.replace(run.read_config(workdir), attention="auto", compute_dtype="float32", fp8=False)
        params, cfg, tokenizer, stage, step = run.load_model(workdir, options.stage, config, step=options.step)
        to_hf(params, cfg, tokenizer, f"{workdir.resolve().name}/{stage}", step, options.out, options.dtype, log)
        return
    from nanochat_jax.convert import from_nanochat

    from_nanochat(options.config, workdir, options.checkpoint, log, options.step, options.tokenizer, options.stage)


def bench(options: BenchOptions, workdir: Path) -> None:
    print(json.dumps(measured(options.what, options.config, options, log)), flush=True)


def _defaults(argv: Sequence[str], starts_run: bool, tolerant: bool = False) -> tuple[Config, Path, str]:
    """(configuration before the options, folder of the run, where the configuration is from); `tolerant`: that of the
    folder is not asked for, as it may be missing or damaged.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--workdir", "--experiment", *distributed.VARIABLES):
        early.add_argument(option)
    try:
        given, _ = early.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    workdir = None if given.workdir is None else expanded(given.workdir)
    if given.experiment is not None:
        path = Path(given.experiment)
        return load_experiment(path), workdir or run.RUNS / path.stem, str(path)
    if not {*HELP, HELP_ALL}.isdisjoint(argv):
        # Looking for devices takes seconds, and memory on a GPU that may be busy.
        path = EXPERIMENTS / "speedrun.py"
        return load_experiment(path), workdir or run.RUNS, f"{path.name}; with --experiment FILE, of that file"
    if workdir is None and not starts_run:
        workdir = run.newest_run()
    if workdir is not None and tolerant:
        return Config(), workdir, "defaults, which a report does not need"
    if workdir is not None and ((workdir / "config.json").exists() or not starts_run):
        config = run.read_config(workdir)
        check_types(config, f"{workdir / 'config.json'}: ")
        if not starts_run:
            # A model is used on other machines than it was trained on: --mesh and --native are asked for anew.
            config = dataclasses.replace(config, mesh="1", native="auto")
        return config, workdir, f"{workdir}/config.json"
    if distributed.membership(given.coordinator, given.num_processes, given.process_id, os.environ):
        raise UsageError("a run of several processes needs --experiment: devices are looked for after they have met")
    import jax

    platform = jax.default_backend()
    path = EXPERIMENTS / ("tiny_cpu.py" if platform == "cpu" else "speedrun.py")
    seen = "no GPU or TPU" if platform == "cpu" else platform.upper()
    return load_experiment(path), workdir or run.RUNS / path.stem, f"{path} (JAX sees {seen})"


def _engine(options: ChatOptions | ServeOptions, workdir: Path, rows: int) -> tuple[Engine, Tokenizer, str]:
    """The engine on the run's model, and the name of that model: run/stage."""
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.sharding import make_mesh
    from nanochat_jax.stages.evaluate import quantization_error

    mesh = make_mesh(options.config.mesh)
    params, cfg, tokenizer, stage, step = run.load_model(workdir, options.source, options.config, mesh, options.step)
    log(f"{stage} model of step {step}")
    if stage == "base" and not getattr(options, "raw", False):
        log("the base model has not learned to chat; `chat --raw -p TEXT` continues a text")
    # Several prompts at once would compile while their requests wait.
    engine = Engine(params, cfg, tokenizer, max_rows=rows, mesh=mesh, quantize=options.quantize, lone_prompts=True)
    log(engine.describe())
    if options.quantize != "none":
        quantization_error(params, engine, mesh, tokenizer, options.config, log)
    return engine, tokenizer, f"{workdir.resolve().name}/{stage}"


def _one_line(box: str) -> str:
    """tyro's boxed message without frame and help text, as one line; in ASCII a rule below the title is the frame."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", line).strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("─-")]
    start = 2 if 1 in rules else 1
    message = " ".join(lines[start : next((i for i in rules if i >= start), None)])
    guess = re.search(r"Perhaps you meant:\s*(--\S+)", "\n".join(lines))
    return message.rstrip(".") + (f"; perhaps you meant {guess[1]}" if guess else "")


def _own_help(text: str, config: Config, prog: str) -> str:
    """tyro's help; of the configuration's sections only that which the command is about, and a line for each other."""
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    about = {name: type(value).__doc__ for name, value in sections.items() if dataclasses.is_dataclass(value)}
    command = prog.split()[-1]
    own, kept, lines = "base" if command == "pretrain" else command, True, []
    for line in text.splitlines():
        section = next((name for name in about if f" {name} options" in line), None)
        kept = kept if section is None else section == own
        lines += [line.rstrip()] * kept
    rest = [f"  --{name + '.*':<13}{' '.join(doc.split())}" for name, doc in about.items() if name != own]
    return "\n".join([*lines, "More, as in --model.depth 12:", *rest, "", f"{prog} {HELP_ALL} lists them.", ""])


def _overview() -> str:
    commands = "\n".join(f"  {name:<10} {about}" for name, (_, _, about) in COMMANDS.items())
    return f"usage: {PROGRAM} COMMAND [OPTIONS]\n\n{commands}\n\n{PROGRAM} COMMAND --help lists its options."


COMMANDS: dict[str, tuple[type[Options], Command, str]] = {
    "download": (Options, download, "Fetch all data of a run: shards, CORE and the task sets."),
    "tokenizer": (TrainOptions, partial(train, "tokenizer"), "Train the tokenizer on the training shards."),
    "pretrain": (TrainOptions, partial(train, "base"), "Train the base model on raw text."),
    "mid": (TrainOptions, partial(train, "mid"), "Teach the base model conversations, tools and multiple choice."),
    "sft": (TrainOptions, partial(train, "sft"), "Fine-tune on the assistant's side of conversations."),
    "rl": (TrainOptions, partial(train, "rl"), "Reinforce right answers on a task with a reward."),
    "eval": (EvalOptions, evaluate, "Measure a model; the last line of stdout is JSON with every figure."),
    "chat": (ChatOptions, chat, "Talk to a model in the terminal, or answer one prompt."),
    "serve": (ServeOptions, serve, "Serve the chat page and the OpenAI-compatible API."),
    "report": (ReportOptions, report, "Write report.md and report.html of a run, and compare it with others."),
    "convert": (ConvertOptions, convert, "Take over a model of karpathy/nanochat, or hand one to Hugging Face."),
    "bench": (BenchOptions, bench, "Measure one part on this machine; tables on stderr, JSON on stdout."),
}
