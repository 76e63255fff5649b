"""From raw text to a model that chats: all stages in order, each measured when it is done, then the report.

    python run_speedrun.py                  # experiments/speedrun.py on a GPU or TPU, experiments/tiny_cpu.py without
    python run_speedrun.py --mesh 8         # eight devices
    python run_speedrun.py --stages base,mid

What is finished is skipped and what was cut is resumed, so the same command continues a run that was stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import process

if __name__ == "__main__":
    process.set_up()  # which begins the process anew, so before what takes long to import

from nanochat_jax import cli, distributed, run
from nanochat_jax.config import MODEL_STAGES, STAGES


@dataclass(frozen=True)
class SpeedrunOptions(cli.TrainOptions):
    """Options of the speedrun."""

    stages: str = ",".join(STAGES)
    """Stages to run, separated by commas."""

    def check(self) -> None:
        if unknown := [name for name in self.chosen() if name not in STAGES]:
            raise cli.UsageError(f"--stages {self.stages}: unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}")

    def chosen(self) -> list[str]:
        """The names in `stages`."""
        return [name.strip() for name in self.stages.split(",")]


def speedrun(options: SpeedrunOptions, workdir: Path) -> None:
    """Run all stages in order, evaluate each model and write the report."""
    from nanochat_jax.report import write_report
    from nanochat_jax.stages import evaluate
    from nanochat_jax.stages.ahead import check_ahead, check_with_tokenizer
    from nanochat_jax.stages.session import is_done

    stages = [name for name in STAGES if name in options.chosen()]
    models = [name for name in stages if name in MODEL_STAGES]
    if todo := [name for name in models if not distributed.leaders(run.finished(workdir, name))]:
        check_ahead(options.config, todo, workdir, cli.log)
    for stage in stages:
        if not is_done(workdir, stage, cli.log):
            cli.train(stage, options, workdir)
            if not distributed.leaders(run.finished(workdir, stage)):
                return  # stopped, as the stage has said
            if stage == "tokenizer":
                check_with_tokenizer(options.config, todo, workdir, cli.log)
        if stage in MODEL_STAGES and not distributed.leaders(evaluate.is_current(options.config, workdir, stage)):
            evaluate.run(options.config, workdir, stage, None, None, cli.log)
    if distributed.is_leader():
        cli.log(f"report: {write_report(workdir)}")


if __name__ == "__main__":
    command = Path(sys.argv[0]).name
    words = f"python {command}", SpeedrunOptions, speedrun, speedrun.__doc__, sys.argv[1:]
    process.leave(cli.guarded(lambda: cli.run_command(*words)))
