"""Pretraining at depth 4 beside the reference's own code, run on this machine: half an hour on two cores.

    NANOCHAT_CHECKOUT=~/nanochat NANOCHAT_PYTHON=~/nanochat/.venv/bin/python NANOCHAT_DATA=FOLDER make test-slow ARGS=-s

NANOCHAT_PYTHON has what bench/nanochat_reference.py asks for; FOLDER holds parquet files, a few tens of MB of text.
Prints the table of docs/NUMERICS.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference_run import convert_command, pretrain_command, take_tokenizer

from nanochat_jax.data.pretrain import pretrain_batches
from nanochat_jax.data.shards import shard_files
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("NANOCHAT_CHECKOUT", "NANOCHAT_PYTHON", "NANOCHAT_DATA")
OPTIONS = (
    "--depth 4 --max-seq-len 256 --device-batch-size 16 --total-batch-size 4096 "
    "--num-iterations 160 --eval-every 20 --eval-tokens 65536"
)
SEEDS = (1, 2)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(os.environ.get(name) for name in NEEDED), reason=f"{', '.join(NEEDED)} say where nanochat and data are"
    ),
]


def ours(words):
    """Our command line as a user runs it: without the flags that make tests compile faster."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-m", "nanochat_jax", *words], cwd=ROOT, env=environment, check=True)


def recorded(run, kind, key):
    return {row["step"]: row[key] for row in MetricsLog.read(run / "base" / "metrics.jsonl") if row["kind"] == kind}


@pytest.fixture(scope="module")
def data():
    return Path(os.environ["NANOCHAT_DATA"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """The folder that the reference's run left, its initial weights and tokenizer converted beside it."""
    folder = tmp_path_factory.mktemp("reference") / "nanochat"
    driver = [os.environ["NANOCHAT_PYTHON"], ROOT / "bench" / "nanochat_reference.py"]
    where = ["--nanochat", os.environ["NANOCHAT_CHECKOUT"], "--data", data, "--out", folder]
    sizes = ["--vocab-size", "4096", "--tokenizer-chars", "20000000", "--batches", "20"]
    subprocess.run([*driver, *where, *sizes, "--", *OPTIONS.split()], check=True)
    checkpoints = folder / "base_checkpoints" / "run"
    ours(convert_command(checkpoints, folder / "tokenizer", folder.parent / "start", 0))
    return folder


def figures(folder):
    return json.loads((folder / "reference.json").read_text())


def again(reference, data, name, **options):
    """The reference's run here."""
    run = reference.parent / name
    take_tokenizer(reference.parent / "start", run)
    ours(pretrain_command(figures(reference)["arguments"], data, run, **options))
    return run


def test_the_first_batches_are_equal(reference, data):
    expected = np.load(reference / "batches.npy")
    tokenizer = Tokenizer.load(reference.parent / "start" / "tokenizer")
    rows, size = expected.shape[1:]
    batches = pretrain_batches(shard_files(data)[0], tokenizer, rows=rows, sequence_len=size - 1, packing="bestfit")
    for row_tokens in expected:
        batch = next(batches)
        np.testing.assert_array_equal(batch["inputs"], row_tokens[:, :-1])
        np.testing.assert_array_equal(batch["targets"], row_tokens[:, 1:])


def test_from_the_references_weights(reference, data):
    run = again(reference, data, "same", init_from=reference.parent / "start" / "base")
    theirs = figures(reference)
    loss, bpb = recorded(run, "train", "loss"), recorded(run, "val", "bpb")
    gaps = np.abs(np.array(list(loss.values())) - theirs["losses"])
    print(
        f"\nloss, largest gap: first 10 steps {gaps[:10].max():.1e}, first 40 {gaps[:40].max():.1e}, all {gaps.max():.1e}"
    )
    for step, value in bpb.items():
        expected = theirs["bpb"][str(step)]
        print(f"step {step:3}: reference {expected:.6f}  ours {value:.6f}  ours - reference {value - expected:+.6f}")
    for step in (20, 40):
        assert bpb[step] == pytest.approx(theirs["bpb"][str(step)], abs=0.003), step


@pytest.mark.parametrize("seed", SEEDS)
def test_from_own_weights(reference, data, seed):
    last = recorded(again(reference, data, f"own{seed}", seed=seed), "val", "bpb")[160]
    expected = figures(reference)["bpb"]["160"]
    print(f"\nown weights, seed {seed}: reference {expected:.6f}  ours {last:.6f}  {last - expected:+.6f}")
    assert last == pytest.approx(expected, abs=0.012)
