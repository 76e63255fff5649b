"""Equal to karpathy/nanochat: what its own code computed (tests/golden, made by bench/nanochat_reference.py), again here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_run import EXPERIMENT, convert_command, pretrain_command, take_tokenizer

from nanochat_jax import cli
from nanochat_jax.data.pretrain import pretrain_batches
from nanochat_jax.data.shards import shard_files
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.model import forward
from nanochat_jax.optim import base_schedule
from nanochat_jax.run import gpt_config, load_model, read_config
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages import pretrain
from nanochat_jax.stages.evaluate import validation_bpb

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CORPUS = ROOT / "nanochat_jax" / "corpus"
REFERENCE = json.loads((GOLDEN / "reference.json").read_text())
BATCHES = np.load(GOLDEN / "batches.npy")
VOCABULARY = json.loads((GOLDEN / "meta_000000.json").read_text())["model_config"]["vocab_size"]
GROUPS = ("lm_head", "wte", "value_embeds", "resid", "x0", "smear", "muon", "muon", "muon", "muon")
"""The reference's parameter groups in its order; Muon has one for each shape of matrix."""


def converted(folder, step):
    assert cli.main(convert_command(GOLDEN, GOLDEN, folder, step)) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The reference's run again, from its step-0 weights through the command line."""
    folder = tmp_path_factory.mktemp("reference")
    start, run = converted(folder / "start", 0), folder / "run"
    take_tokenizer(start, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_samples", lambda *args, **kwargs: None)  # seconds of compilation, not compared
        assert cli.main(pretrain_command(REFERENCE["arguments"], CORPUS, run, init_from=start / "base")) == 0
    return run


def recorded(run, kind, key):
    return {row["step"]: row[key] for row in MetricsLog.read(run / "base" / "metrics.jsonl") if row["kind"] == kind}


@pytest.fixture(scope="module")
def end(tmp_path_factory):
    """(parameters, architecture, tokenizer) at the end of the reference's own run."""
    folder = tmp_path_factory.mktemp("reference") / "end"
    return load_model(converted(folder, REFERENCE["arguments"]["num_iterations"]), mesh=make_mesh("1"))[:3]


def test_trained_weights_give_the_references_logits(end):
    params, cfg, _ = end
    logits = jax.jit(forward, static_argnums=1)(params, cfg, jnp.asarray(BATCHES[0, :1, :-1]))[0]
    expected = np.load(GOLDEN / "logits.npy")
    assert np.abs(expected).max() > 2.5
    np.testing.assert_allclose(logits[:: cfg.sequence_len // len(expected)], expected, rtol=0, atol=1e-5)


def test_trained_weights_give_the_references_bits_per_byte(end, trained):
    params, cfg, tokenizer = end
    bpb = validation_bpb((params, cfg, make_mesh("1"), tokenizer), shard_files(CORPUS)[1], read_config(trained))
    assert bpb == pytest.approx(REFERENCE["bpb"]["40"], rel=1e-6)


def test_the_first_batches_are_the_references(trained):
    config, tokenizer = read_config(trained), load_model(trained)[2]
    rows, size = BATCHES.shape[1:]
    batches = pretrain_batches(shard_files(CORPUS)[0], tokenizer, config.data, rows=rows, sequence_len=size - 1)
    for expected in BATCHES:
        batch = next(batches)
        np.testing.assert_array_equal(batch["inputs"], expected[:, :-1])
        np.testing.assert_array_equal(batch["targets"], expected[:, 1:])


@pytest.mark.parametrize("name", ["reference", "schedule"])
def test_rates_momentum_and_decay_are_the_references(name, tmp_path):
    reference = json.loads((GOLDEN / f"{name}.json").read_text())
    experiment = cli.load_experiment(EXPERIMENT)
    words = pretrain_command(reference["arguments"], CORPUS, tmp_path)[1:]
    config = cli.parse(cli.TrainOptions, experiment, words, "pretrain", "").config
    schedule, _ = base_schedule(config, gpt_config(config, VOCABULARY))
    rates = reference["rates"] if name == "schedule" else dict(enumerate(reference["rates"]))
    for step, expected in rates.items():
        hyper = schedule.hyper(int(step))
        ours = [hyper["lr"][group] for group in GROUPS] + [hyper["momentum"], hyper["weight_decay"]]
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=f"step {step}")


def test_the_loss_curve_is_the_references(trained):
    """Equal but for rounding: 5e-6 was measured; the reference itself, its initial weights multiplied by 1 + 3e-7 n with
    n ~ N(0, 1), differs by 1e-5.
    """
    losses = recorded(trained, "train", "loss")
    assert list(losses) == list(range(REFERENCE["arguments"]["num_iterations"]))
    np.testing.assert_allclose(list(losses.values()), REFERENCE["losses"], rtol=0, atol=3e-5)


def test_bits_per_byte_on_the_way_are_the_references(trained):
    bpb = recorded(trained, "val", "bpb")
    assert list(bpb) == [20, 40]
    for step, value in bpb.items():
        assert value == pytest.approx(REFERENCE["bpb"][str(step)], abs=3e-5), step


def run_driver(*words):
    """Exit status and stderr of the driver, started where our packages are the first that Python finds."""
    driver = [sys.executable, ROOT / "bench" / "nanochat_reference.py", *words]
    result = subprocess.run(
        driver, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    return result.returncode, result.stderr


@pytest.fixture
def checkout(tmp_path):
    """The outline of a checkout, of which nothing runs."""
    for name in ("nanochat/__init__.py", "scripts/base_train.py", "torch.py"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import kernels" if name.startswith("nanochat") else "")
    return tmp_path / "checkout"


def test_the_driver_never_takes_our_kernels_for_those_that_nanochat_imports(checkout, tmp_path):
    status, message = run_driver(
        "--nanochat", checkout, "--data", CORPUS, "--out", tmp_path / "out", "--vocab-size", "300"
    )
    assert status == 1 and "import of kernels halted" in message and message.count("\n") == 1


def test_the_driver_names_what_is_wrong_in_one_line(checkout, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    right = {"--nanochat": checkout, "--data": CORPUS, "--out": tmp_path / "out", "--vocab-size": "300"}
    for option, value, says in (
        ("--nanochat", tmp_path, "no scripts/base_train.py"),
        ("--data", checkout, "at least two parquet files"),
        ("--out", tmp_path / "full", "not empty"),
        ("--tokenizer", tmp_path, "either --vocab-size N or --tokenizer FOLDER"),
    ):
        status, message = run_driver(*(word for pair in (right | {option: value}).items() for word in pair))
        assert status == 1 and says in message and message.count("\n") == 1
