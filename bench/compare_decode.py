"""Generates with the same model, karpathy/nanochat's Engine and this project's, in turns, and compares.

    python bench/compare_decode.py --nanochat CHECKOUT --python PYTHON --depth 4 [--what batch-1 greedy] [--json]

PYTHON is that of the reference's own environment (torch and what bench/nanochat_reference.py names). Both compute in
float32 on the same CPUs, each in a process of its own that waits while the other runs, or (`--device cuda`) in bfloat16
on one GPU. The weights are random, those the reference begins to train with, but with nothing zero; no token ends an
answer. T is --seq-len, 512 unless told otherwise.

batch-1, batch-16   decoding: one prompt of T / 2 tokens, 128 more tokens of every row after the first, top-k 50
prefill             a prompt of 25/32 T (400) tokens, up to its first token
rollouts            16 answers of 64 tokens to each of 16 questions of 40 to 120 tokens, prompts included: the
                    reference 8 answers at a time, which is what its chat_rl does unless told otherwise
rollouts-16         the same, the reference with all 16 answers to a question at a time
greedy              the likeliest 128 tokens after four prompts, compared; no times

Ours is measured with several engines: "plain"; "int8" weights; "shared": the samples of a prompt share its keys and
values; "xla": without the kernels in C++ that it else has in float32 on a CPU.
Printed (stderr; --json: one line on stdout): how many times as fast ours was, the median of the rounds with the lowest
and highest, and milliseconds of both. A first round does not count. Compilation is not counted anywhere. Exit status 1
where, both in float32, a greedy answer of an engine without int8 parts from the reference's within its first 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from turns import Child, check, environments, parser

HERE = Path(__file__).resolve().parent
SAMPLING = {"temperature": 1.0, "top_k": 50}
SAMPLES, QUESTIONS, ROLLOUT_TOKENS = 16, 16, 64
REFERENCE_AT_ONCE = 8
"""Rows of the reference's rollouts: --device-batch-size of its chat_rl."""
GREEDY_TOKENS, MUST_AGREE = 128, 64


class Measure(NamedTuple):
    """What is asked of both: `work` and its options; which engines of ours do it; which figure of the reply, and for
    how many steps it stands.
    """

    work: str
    options: dict[str, Any]
    variants: tuple[str, ...]
    figure: str = "seconds"
    steps: int = 1


def main() -> None:
    """Runs both and prints."""
    options = parse(sys.argv[1:])
    on_cpu = (options.device, options.dtype) == ("cpu", "float32")
    asked = measures(options.vocab_size, options.seq_len, on_cpu)
    with tempfile.TemporaryDirectory(prefix="compare_decode_") as folder:
        running: list[Child] = []
        try:
            facts = {}
            for side in children(options, Path(folder)):
                running.append(Child(*side))
                facts[side[0]] = running[-1].facts()
            timed = {name: asked[name] for name in options.what if name != "greedy"}
            figures = {"speeds": compare(options.rounds, timed, *running)}
            if "greedy" in options.what:
                prompts = prompts_of(options.vocab_size, (256, 40, 120, 300))
                figures["greedy"] = agreement(prompts, *running, on_cpu)
        finally:
            for child in running:
                child.end()
    figures = {"options": {name: str(value) for name, value in vars(options).items()}, "facts": facts} | figures
    print(summary(figures), file=sys.stderr)
    if options.json:
        print(json.dumps(figures))
    for record in figures.get("greedy", ()):
        if options.dtype == "float32" and record["ours"] != "int8" and min(record["part_at"]) < MUST_AGREE:
            sys.exit(f"error: greedy answers part after {min(record['part_at'])} tokens; {MUST_AGREE} should be equal")


def parse(words: list[str]) -> argparse.Namespace:
    """The options. Exits with one line where one cannot be."""
    what = [*measures(1, 512), "greedy"]
    known = parser(__doc__, rounds=5)
    known.add_argument("--seq-len", type=int, default=512, help="context, tokens (512, the least)")
    known.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both generate (cpu)")
    known.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision (float32 on cpu, else bfloat16)")
    known.add_argument("--threads", type=int, default=2, help="CPUs of each, on cpu (2)")
    known.add_argument("--what", nargs="+", choices=what, default=what)
    options = known.parse_args(words)
    check(options, "nanochat/engine.py")
    if options.seq_len < 512:
        sys.exit(f"error: --seq-len {options.seq_len}: the rollouts and greedy answers need 512 at least")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def measures(vocab_size: int, length: int, on_cpu: bool = False) -> dict[str, Measure]:
    """Everything that is timed, by name, in a context of `length` tokens; `on_cpu`: also without the kernels in C++."""
    (prompt,) = prompts_of(vocab_size, (length // 2,))
    (long,) = prompts_of(vocab_size, (25 * length // 32,))
    lengths = tuple(int(tokens) for tokens in np.linspace(40, 120, QUESTIONS))
    asked = {"prompts": prompts_of(vocab_size, lengths), "samples": SAMPLES, "tokens": ROLLOUT_TOKENS}
    decoding = {"prompt": prompt, "steps": 128}
    one, rows = ("plain", "int8"), ("plain", "int8", "shared", "int8, shared")
    ways = ("plain", "shared", "one batch", "one batch, shared")
    if on_cpu:
        one, rows, ways = (*one, "xla"), (*rows, "xla", "shared, xla"), (*ways, "one batch, shared, xla")
    return {
        "batch-1": Measure("decode", {"rows": 1, **decoding}, one, steps=128),
        "batch-16": Measure("decode", {"rows": 16, **decoding}, rows, steps=128),
        "prefill": Measure("decode", {"rows": 1, "prompt": long, "steps": 1}, one, figure="first"),
        "rollouts": Measure("rollouts", asked | {"at_once": REFERENCE_AT_ONCE}, ways),
        "rollouts-16": Measure("rollouts", asked | {"at_once": SAMPLES}, ways[3:4]),
    }


def prompts_of(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random tokens, the same each time."""
    random = np.random.default_rng(len(lengths))
    return [random.integers(vocab_size, size=length).tolist() for length in lengths]


def children(options: argparse.Namespace, folder: Path) -> tuple[list[Any], ...]:
    """(name, command, folder, environment) of the reference and of ours, to be started one after the other."""
    width, spec = max(128, -(-64 * options.depth // 128) * 128), folder / "spec.json"
    model = {"n_layer": options.depth, "n_embd": width, "n_head": width // 128, "n_kv_head": width // 128}
    model |= {"sequence_len": options.seq_len, "vocab_size": options.vocab_size, "window_pattern": "SSSL"}
    paths = {"nanochat": str(options.nanochat), "checkpoint": str(folder / "checkpoint")}
    how = {"device": options.device, "dtype": options.dtype, "threads": options.threads}
    spec.write_text(json.dumps(paths | how | {"model": model, "sampling": SAMPLING, "samples": SAMPLES}))
    reference, ours = environments(
        folder,
        {"NANOCHAT_DTYPE": options.dtype} | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}),
        {"JAX_PLATFORMS": options.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    return (
        ["reference", [options.python, HERE / "decode_reference.py", spec], folder / "reference", reference],
        ["ours", [sys.executable, HERE / "decode_ours.py", spec], folder / "ours", ours],
    )


def compare(rounds: int, asked: dict[str, Measure], reference: Child, ours: Child) -> list[dict[str, Any]]:
    """A record for each measure and engine of ours; who is first changes from round to round."""
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, measure in asked.items():
            turns = [(reference, "reference"), *((ours, variant) for variant in measure.variants)]
            for child, variant in turns if number % 2 == 0 else reversed(turns):
                reply = child.work(work=measure.work, variant=variant, **measure.options)
                times.setdefault((name, variant), []).append(1000 * reply[measure.figure] / measure.steps)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return [
        record(name, variant, times[name, "reference"][1:], times[name, variant][1:])
        for name, measure in asked.items()
        for variant in measure.variants
    ]


def record(name: str, variant: str, reference_ms: Sequence[float], ours_ms: Sequence[float]) -> dict[str, Any]:
    """Milliseconds (of a step, of a prefill, of all rollouts), medians; ratios round by round."""
    ratios = sorted(theirs / own for theirs, own in zip(reference_ms, ours_ms, strict=True))
    return {
        "measure": name,
        "ours": variant,
        "reference_ms": statistics.median(reference_ms),
        "ours_ms": statistics.median(ours_ms),
        "ratio": statistics.median(ratios),
        "lowest_ratio": ratios[0],
        "highest_ratio": ratios[-1],
    }


def agreement(prompts: list[list[int]], reference: Child, ours: Child, on_cpu: bool = False) -> list[dict[str, Any]]:
    """Of each greedy answer: how many tokens come before the first that differs, and the share of equal tokens."""
    asked = {"prompts": prompts, "tokens": GREEDY_TOKENS}
    right = reference.work(work="greedy", variant="reference", **asked)
    records = []
    for variant in ("plain", "int8", "xla")[: 2 + on_cpu]:
        pairs = [
            list(zip(*both, strict=True))
            for both in zip(right, ours.work(work="greedy", variant=variant, **asked), strict=True)
        ]
        part_at = [next((i for i, (a, b) in enumerate(pair) if a != b), len(pair)) for pair in pairs]
        equal = [sum(a == b for a, b in pair) / len(pair) for pair in pairs]
        different = [len({a for a, _ in pair}) for pair in pairs]
        records.append({"ours": variant, "part_at": part_at, "equal": equal, "different_tokens": different})
    return records


def summary(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{one['measure']}, {one['ours']}: reference {one['reference_ms']:,.2f} ms, ours {one['ours_ms']:,.2f} ms, "
        f"ratio {one['ratio']:.2f} (rounds {one['lowest_ratio']:.2f} to {one['highest_ratio']:.2f})"
        for one in figures["speeds"]
    ]
    for one in figures.get("greedy", ()):
        share = statistics.mean(one["equal"])
        lines.append(f"greedy, {one['ours']}: {share:.3f} of the tokens equal; equal up to {one['part_at']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
