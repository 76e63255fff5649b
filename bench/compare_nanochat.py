"""Trains the same model on the same tokens with karpathy/nanochat and with this project, in turns, and compares.

    python bench/compare_nanochat.py --nanochat CHECKOUT --python PYTHON --depth 4 --seq-len 512 --batch 8 \\
        --vocab-size 8192 [--rounds 8] [--steps 4] [--json] [-- --attention xla_blocked ...]

PYTHON is that of the reference's own environment (torch and what bench/nanochat_reference.py names). What stands after
`--` are options of this project's command line. The reference runs its own scripts/base_train.py whole, torch.compile
on; each side is a process of its own that waits while the other runs. Both begin with empty compilation caches, one
after the other, from the same weights; then, round by round, each does a few steps, the first one last in the next
round, so that a change in the machine's speed meets both. Of each round the ratio of median step times is taken.

Printed (stderr; --json: one line on stdout): tokens a second of both and their ratio, the median of the rounds with the
lowest and highest; the same over CPU time, which says more where other programs run; peak memory (on a CPU the resident
set, compilation included; on a GPU the largest allocation); the loss of both after every round, as the reference prints
it, a running mean; the time from the start of the process to the end of the first step. Ratios are ours over the
reference's. A first round does not count. Exit status 1 where the losses part by more than --tolerance.

The tokens are made up, half of each row predictable, with frequencies that fall like those of words: speed and loss
can be compared with them on any vocabulary, and no download is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from turns import Child, check, environments, parser

HERE = Path(__file__).resolve().parent
BATCHES = 64
"""Different batches; then they come again."""
RECIPE = {
    "num_iterations": 2000,
    "target_param_data_ratio": 12.0,
    "warmup_steps": 400,
    "matrix_lr": 0.2,
    "embedding_lr": 3.0,
    "unembedding_lr": 0.08,
    "scalar_lr": 5.0,
}
"""Of both. With the reference's own rates the losses of small models part at about step 18, whoever computes them
(docs/NUMERICS.md).
"""
SHOWN = {
    "tok_per_sec": ("tokens/s", 1, ",.0f"),
    "tok_per_cpu_sec": ("tokens/s of CPU time", 1, ",.0f"),
    "peak_bytes": ("peak MiB", 2**20, ",.0f"),
    "first_step_seconds": ("seconds to first step", 1, ".1f"),
}
"""Figure -> how a person reads it: label, unit, format."""


def main() -> None:
    """Runs both and prints."""
    options, words = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="compare_nanochat_") as folder:
        sides = children(options, words, Path(folder))
        figures = compare(options.rounds, options.steps, options.batch * options.seq_len, sides)
    figures = {"options": {name: str(value) for name, value in vars(options).items()} | {"ours": words}} | figures
    print(summary(figures), file=sys.stderr)
    if options.json:
        print(json.dumps(figures))
    if figures["largest_loss_gap"] > options.tolerance:
        sys.exit(f"error: the losses part by {figures['largest_loss_gap']:.4f}, more than {options.tolerance}")


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of this project's side. Exits with one line where one cannot be."""
    known = parser(__doc__, rounds=8)
    known.add_argument("--seq-len", type=int, default=512, help="context, tokens (512)")
    known.add_argument("--batch", type=int, default=8, help="rows of a step (8)")
    known.add_argument("--window-pattern", default="SSSL", help="windows of the layers (SSSL, the reference's own)")
    known.add_argument("--steps", type=int, default=4, help="steps of a turn (4)")
    known.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both train (cpu)")
    known.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision (float32 on cpu, else bfloat16)")
    known.add_argument("--tolerance", type=float, default=0.02, help="largest gap of the losses, nats (0.02)")
    at = words.index("--") if "--" in words else len(words)
    options = known.parse_args(words[:at])
    check(options, "scripts/base_train.py")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options, words[at + 1 :]


def children(options: argparse.Namespace, words: list[str], folder: Path) -> tuple[list[Any], ...]:
    """(name, command, folder, environment) of the reference and of ours; writes what both read."""
    checkpoint, batches, spec = folder / "checkpoint", folder / "batches.npy", folder / "spec.json"
    np.save(batches, tokens_of(options.vocab_size, options.batch, options.seq_len + 1))
    arguments = {
        "depth": options.depth,
        "max_seq_len": options.seq_len,
        "window_pattern": options.window_pattern,
        "device_batch_size": options.batch,
        "total_batch_size": options.batch * options.seq_len,
        **RECIPE,
        **dict.fromkeys(("eval_every", "core_metric_every", "sample_every"), -1),
    }
    told = {
        "nanochat": str(options.nanochat),
        "arguments": [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()],
        "checkpoint": str(checkpoint),
        "batches": str(batches),
        "vocab_size": options.vocab_size,
        "batch": options.batch,
        "recipe": RECIPE,
        "device": options.device,
        "dtype": options.dtype,
    }
    spec.write_text(json.dumps(told))
    reference, ours = environments(
        folder,
        {
            "NANOCHAT_DTYPE": options.dtype,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        },
        {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PLATFORMS": options.device,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        },
    )
    return (
        ["the reference", [options.python, HERE / "compare_reference.py", spec], folder / "reference", reference],
        ["this project", [sys.executable, HERE / "compare_ours.py", spec, *words], folder / "ours", ours],
    )


def compare(rounds: int, steps: int, tokens: int, sides: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The figures of `rounds` turns of `steps` steps of `tokens` tokens; `sides` are what `children` gives.

    Each starts when the one before has done its first step.
    """
    running: list[Child] = []
    try:
        firsts = []
        for side in sides:
            running.append(Child(*side))
            firsts.append(running[-1].first())
            print(f"{side[0]}: first step after {firsts[-1]['first_step_seconds']:.1f} s", file=sys.stderr, flush=True)
        turns: list[list[dict]] = [[], []]
        for number in range(rounds + 1):
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                turns[i].append(running[i].steps(steps))
            print(f"round {number} of {rounds}: ratio {ratio(turns[0][-1], turns[1][-1]):.3f}", file=sys.stderr)
    finally:
        for child in running:
            child.end()
    return figures_of(firsts, turns, tokens)


def ratio(reference: dict, ours: dict) -> float:
    """How many times as fast ours was in a round."""
    return statistics.median(reference["seconds"]) / statistics.median(ours["seconds"])


def figures_of(firsts: Sequence[dict], turns: Sequence[Sequence[dict]], tokens: int) -> dict[str, Any]:
    """What both sides said, the reference first, as figures; the first turn of each is warm-up."""
    names = ("reference", "ours")
    printed = [loss for turn in (firsts[0], *turns[0]) for loss in turn["losses"]]
    means = running_mean([loss for turn in (firsts[1], *turns[1]) for loss in turn["losses"]])
    at = list(accumulate(len(turn["losses"]) for turn in turns[0]))
    turns = [side[1:] for side in turns]
    ratios = sorted(map(ratio, *turns))
    cpu = [tokens * len(side) * len(side[0]["losses"]) / sum(turn["cpu_seconds"] for turn in side) for side in turns]
    speeds = [tokens / statistics.median(s for turn in side for s in turn["seconds"]) for side in turns]
    peaks = [side[-1]["peak_bytes"] for side in turns]
    starts = [first["first_step_seconds"] for first in firsts]

    def both(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(names, values, strict=True)) | {"ratio": values[1] / values[0]}

    return {
        "facts": {name: first["facts"] for name, first in zip(names, firsts, strict=True)},
        "tok_per_sec": both(speeds)
        | {"ratio": statistics.median(ratios), "lowest_ratio": ratios[0], "highest_ratio": ratios[-1]},
        "tok_per_cpu_sec": both(cpu),
        "peak_bytes": both(peaks),
        "first_step_seconds": both(starts),
        "losses": [{"step": i, "reference": printed[i], "ours": means[i]} for i in (0, *at)],
        "largest_loss_gap": max(abs(a - b) for a, b in zip(printed, means, strict=True)),
    }


def summary(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"losses at step {at['step']}: reference {at['reference']:.6f}, ours {at['ours']:.6f}"
        for at in figures["losses"]
    ]
    for name, (label, unit, form) in SHOWN.items():
        both = figures[name]
        theirs, ours = (format(both[side] / unit, form) for side in ("reference", "ours"))
        rounds = (
            f" (rounds {both['lowest_ratio']:.3f} to {both['highest_ratio']:.3f})" if "lowest_ratio" in both else ""
        )
        lines.append(f"{label}: reference {theirs}, ours {ours}, ratio {both['ratio']:.3f}{rounds}")
    gap, fa3 = figures["largest_loss_gap"], figures["facts"]["reference"].get("USE_FA3")
    return "\n".join([*lines, f"largest gap of losses {gap:.6f}; USE_FA3 of the reference: {fa3}"])


def tokens_of(vocab_size: int, rows: int, length: int) -> np.ndarray:
    """int32 [BATCHES, rows, length]: words as frequent as one over their rank, or what follows the one before."""
    random = np.random.default_rng(0)
    frequency = 1 / (np.arange(vocab_size) + 3.0)
    drawn = random.choice(vocab_size, size=(BATCHES, rows, length), p=frequency / frequency.sum()).astype(np.int32)
    follows = random.permutation(vocab_size).astype(np.int32)
    for i in range(1, length):
        known = random.random((BATCHES, rows)) < 0.5
        drawn[..., i] = np.where(known, follows[drawn[..., i - 1]], drawn[..., i])
    return drawn


def running_mean(losses: list[float]) -> list[float]:
    """What the reference prints of its losses: an exponential mean, its start corrected."""
    means = list(accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss, initial=0.0))[1:]
    return [mean / (1 - 0.9 ** (i + 1)) for i, mean in enumerate(means)]


if __name__ == "__main__":
    main()
