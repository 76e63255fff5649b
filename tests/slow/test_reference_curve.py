"""160 steps of pretraining at depth 4 beside the reference's own code, run on this machine: 15 minutes on two cores.

    NANOCHAT_CHECKOUT=~/nanochat NANOCHAT_PYTHON=~/nanochat/.venv/bin/python NANOCHAT_DATA=FOLDER make test-slow ARGS=-s

NANOCHAT_PYTHON has what bench/nanochat_reference.py asks for; FOLDER holds parquet files, a few tens of MB of text.
Prints the figures of docs/NUMERICS.md, which says why the warm-up is long, and why the strict comparison starts where
the blocks' outputs are not zero.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference_run import convert_command, pretrain_command, take_tokenizer

from nanochat_jax.config import DataConfig
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
    """The reference's run from the weights it begins with in nanochat/, from others in spread/; what each begins with
    converted into start_nanochat/ and start_spread/.
    """
    folder = tmp_path_factory.mktemp("reference")
    program = [os.environ["NANOCHAT_PYTHON"], ROOT / "bench" / "nanochat_reference.py"]
    program += ["--nanochat", os.environ["NANOCHAT_CHECKOUT"], "--data", data]
    tokenizer = ["--vocab-size", "4096", "--tokenizer-chars", "20000000", "--batches", "20"]
    spread = ["--tokenizer", folder / "nanochat" / "tokenizer", "--spread", "0.02"]
    for name, options in (("nanochat", tokenizer), ("spread", spread)):
        made = folder / name
        subprocess.run([*program, "--out", made, *options, "--", *ARGUMENTS.split()], check=True)
        ours(convert_command(made / "base_checkpoints" / "run", made / "tokenizer", folder / f"start_{name}", 0))
    return folder


def compared(folder, data, theirs, seed=None):
    """The reference's run `theirs` once more, by us, from its weights or from our own of `seed`: gaps in the loss of
    each step and in bits per byte.
    """
    start, name = folder / f"start_{theirs}", f"ours_{theirs}_{seed}"
    options = {"init_from": start / "base"} if seed is None else {"seed": seed}
    take_tokenizer(start, folder / name)
    figures = json.loads((folder / theirs / "reference.json").read_text())
    ours(pretrain_command(figures["arguments"], data, folder / name, **options))
    rows = MetricsLog.read(folder / name / "base" / "metrics.jsonl")
    losses = np.array([row["loss"] - figures["losses"][row["step"]] for row in rows if row["kind"] == "train"])
    bpb = {row["step"]: row["bpb"] for row in rows if row["kind"] == "val"}
    print(f"\n{name}: largest gap in loss: first 40 steps {np.abs(losses[:40]).max():.1e}, all", end=" ")
    print(f"{np.abs(losses).max():.1e}; bits per byte:")
    for step, value in bpb.items():
        expected = figures["bpb"][str(step)]
        print(f"| {step} | {expected:.6f} | {value:.6f} | {value - expected:+.7f} |")
    return losses, {step: value - figures["bpb"][str(step)] for step, value in bpb.items()}


def test_the_first_batches_are_equal(folder, data):
    expected = np.load(folder / "nanochat" / "batches.npy")
    tokenizer = Tokenizer.load(folder / "start_nanochat" / "tokenizer")
    rows, size = expected.shape[1:]
    batches = pretrain_batches(shard_files(data)[0], tokenizer, DataConfig(), rows=rows, sequence_len=size - 1)
    for row_tokens in expected:
        batch = next(batches)
        np.testing.assert_array_equal(batch["inputs"], row_tokens[:, :-1])
        np.testing.assert_array_equal(batch["targets"], row_tokens[:, 1:])


def test_from_the_same_weights_with_nothing_zero(folder, data):
    losses, bpb = compared(folder, data, "spread")
    assert np.abs(losses).max() < 1e-5
    assert list(bpb) == list(range(20, 180, 20)) and max(map(abs, bpb.values())) < 5e-6


def test_from_the_references_weights(folder, data):
    """Rounding grows a thousandfold in between and falls again."""
    losses, bpb = compared(folder, data, "nanochat")
    assert np.abs(losses[:20]).max() < 1e-5 and abs(bpb[20]) < 5e-6 and abs(bpb[160]) < 1e-4


def test_from_own_weights(folder, data):
    _, bpb = compared(folder, data, "nanochat", seed=1)
    assert abs(bpb[160]) < 0.012
