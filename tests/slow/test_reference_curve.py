"""160 steps of pretraining at depth 4 beside the reference's own code, run on this machine: 15 minutes on two cores.

    NANOCHAT_CHECKOUT=~/nanochat NANOCHAT_PYTHON=~/nanochat/.venv/bin/python NANOCHAT_DATA=FOLDER make test-slow ARGS=-s

NANOCHAT_PYTHON has what bench/nanochat_reference.py asks for; FOLDER holds parquet files, a few tens of MB of text.
Prints the figures of docs/NUMERICS.md, which says why the warm-up is long.
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
ARGUMENTS = (
    "--depth 4 --max-seq-len 256 --device-batch-size 8 --total-batch-size 2048 --num-iterations 160 --warmup-steps 400 "
    "--matrix-lr 0.2 --embedding-lr 3 --unembedding-lr 0.08 --scalar-lr 5 --eval-every 20 --eval-tokens 20480"
)

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


@pytest.fixture(scope="module")
def data():
    return Path(os.environ["NANOCHAT_DATA"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """The reference's run in nanochat/, its initial weights and tokenizer converted into start/."""
    folder = tmp_path_factory.mktemp("reference")
    driver = [os.environ["NANOCHAT_PYTHON"], ROOT / "bench" / "nanochat_reference.py", "--out", folder / "nanochat"]
    where = ["--nanochat", os.environ["NANOCHAT_CHECKOUT"], "--data", data]
    tokenizer = ["--vocab-size", "4096", "--tokenizer-chars", "20000000", "--batches", "20"]
    subprocess.run([*driver, *where, *tokenizer, "--", *ARGUMENTS.split()], check=True)
    made = folder / "nanochat"
    ours(convert_command(made / "base_checkpoints" / "run", made / "tokenizer", folder / "start", 0))
    return folder


def figures(folder):
    return json.loads((folder / "nanochat" / "reference.json").read_text())


def compared(folder, data, name, **options):
    """The run in `folder` once more, by us: gaps to the reference in the loss of each step and in bits per byte."""
    take_tokenizer(folder / "start", folder / name)
    theirs = figures(folder)
    ours(pretrain_command(theirs["arguments"], data, folder / name, **options))
    rows = MetricsLog.read(folder / name / "base" / "metrics.jsonl")
    losses = np.array([row["loss"] - theirs["losses"][row["step"]] for row in rows if row["kind"] == "train"])
    bpb = {row["step"]: row["bpb"] for row in rows if row["kind"] == "val"}
    print(f"\n{name}: largest gap in loss: first 40 steps {np.abs(losses[:40]).max():.1e}, all", end=" ")
    print(f"{np.abs(losses).max():.1e}; bits per byte:")
    for step, value in bpb.items():
        expected = theirs["bpb"][str(step)]
        print(f"| {step} | {expected:.6f} | {value:.6f} | {value - expected:+.6f} |")
    return losses, {step: value - theirs["bpb"][str(step)] for step, value in bpb.items()}


def test_the_first_batches_are_equal(folder, data):
    expected = np.load(folder / "nanochat" / "batches.npy")
    tokenizer = Tokenizer.load(folder / "start" / "tokenizer")
    rows, size = expected.shape[1:]
    batches = pretrain_batches(shard_files(data)[0], tokenizer, rows=rows, sequence_len=size - 1, packing="bestfit")
    for row_tokens in expected:
        batch = next(batches)
        np.testing.assert_array_equal(batch["inputs"], row_tokens[:, :-1])
        np.testing.assert_array_equal(batch["targets"], row_tokens[:, 1:])


def test_from_the_references_weights(folder, data):
    losses, bpb = compared(folder, data, "same", init_from=folder / "start" / "base")
    assert np.abs(losses).max() < 1e-3
    assert list(bpb) == list(range(20, 180, 20)) and max(map(abs, bpb.values())) < 1e-4


def test_from_own_weights(folder, data):
    _, bpb = compared(folder, data, "own", seed=1)
    assert abs(bpb[160]) < 0.012
