"""Experiments: every file is values only, and describes a run that can start."""

import ast
from pathlib import Path

import pytest

from nanochat_jax.cli import EXPERIMENTS, load_experiment
from nanochat_jax.config import MODEL_STAGES, GPTConfig
from nanochat_jax.tasks import LOADERS, parse

FILES = sorted(EXPERIMENTS.glob("*.py"))
EXPECTED = {"speedrun", "tiny_cpu", "smoke", "d12", "d20", "gpt2_climbmix", "nanochat_july"}
EXPECTED |= {"gpu_8gb", "gpu_12gb", "gpu_24gb", "gpu_80gb"}


def test_all_are_there():
    assert {path.stem for path in FILES} >= EXPECTED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_values_only(path: Path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert all(f"{word}:" in docstring for word in ("Command", "Cost", "Result"))
    logic = ast.If | ast.For | ast.While | ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.comprehension | ast.Try
    assert not [node for node in ast.walk(tree) if isinstance(node, logic)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_run_fits_together(path: Path):
    config = load_experiment(path)
    cfg = GPTConfig.from_depth(config.model, config.tokenizer.vocab_size)
    for name in MODEL_STAGES:
        stage = getattr(config, name)
        assert stage.init_from is None  # a folder of some run: with another --workdir it would be the wrong one
        if tokens := getattr(stage, "total_batch_size", None):
            rows, rest = divmod(tokens, cfg.sequence_len)
            assert rest == 0 and rows % min(stage.device_batch_size, rows) == 0
    for spec in (*config.mid.mixture, *config.sft.mixture):
        assert parse(spec)[0] in LOADERS
    assert {config.rl.task, *config.eval.chat} <= LOADERS.keys()
    assert config.rl.questions_per_step * config.rl.samples_per_question % config.rl.device_batch_size == 0
    assert config.rl.max_new_tokens < cfg.sequence_len


def test_smoke_runs_on_eight_devices_too():
    config = load_experiment(EXPERIMENTS / "smoke.py")
    for stage in (config.base, config.mid, config.sft):
        assert stage.total_batch_size % (8 * stage.device_batch_size * config.model.sequence_len) == 0
