"""Runs a checkout of karpathy/nanochat on the CPU in float32 and records what it computes, for comparison.

    python bench/nanochat_reference.py --nanochat CHECKOUT --data FOLDER --out DIR --vocab-size 4096 -- \\
        --depth 4 --max-seq-len 256 --total-batch-size 4096 --device-batch-size 16 --num-iterations 40 --eval-every 20

What stands after `--` goes to the checkout's own scripts/base_train.py, which runs whole; nothing of it is copied here.
Five functions of it are wrapped to look on: initial weights, model calls, validation, data folder, optimizer steps.
DIR then holds

    reference.json            losses: mean over each whole step; bpb: step -> bits per byte; rates: at each step the
                              learning rates of the optimizer's groups in nanochat's order, Muon's momentum and decay
    batches.npy               int32 [microbatches, rows, T+1]: the first rows trained on, inputs and last target
    logits.npy                float32 [positions, vocab]: final weights, first row, every --logits-every th position
    base_checkpoints/run/     model_ and meta_ of step 0 (which nanochat never saves) and of the last step
    tokenizer/                tokenizer.pkl

Needs its own environment with torch, tiktoken, rustbpe, pyarrow, filelock, requests, pyyaml and jinja2, but not wandb.
Written for commit 92d63d4 of July 2026. torch.compile is off: compiled steps differ from eager ones by rounding alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

HIDDEN = ("kernels", "nanochat_jax")
"""Packages of this project. nanochat imports one called `kernels` too, and would take ours for it."""
TAG = "run"
WRITTEN_FOR = "92d63d4"


def main() -> None:
    """Runs the reference and writes what it computed."""
    options, train_arguments = parse()
    sys.path[0] = str(options.nanochat)
    sys.modules.update({name: None for name in HIDDEN})  # import then raises ImportError
    sys.modules["wandb"] = types.ModuleType("wandb")
    os.environ |= {"NANOCHAT_BASE_DIR": str(options.out), "NANOCHAT_DTYPE": "float32", "TORCHDYNAMO_DISABLE": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    with contextlib.redirect_stdout(sys.stderr):
        summary = run(options, train_arguments)
    print(json.dumps(summary))


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of base_train. Exits with one line where a path is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", type=Path, required=True, help="checkout of karpathy/nanochat")
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files, the last for validation")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new")
    parser.add_argument("--vocab-size", type=int, help="train a tokenizer of this size")
    parser.add_argument("--tokenizer-chars", type=int, default=50_000_000, help="characters to train it on (50M)")
    parser.add_argument("--tokenizer", type=Path, help="or take the tokenizer/ folder of an earlier run")
    parser.add_argument("--seed", type=int, default=42, help="of the initial weights (42, as nanochat has it)")
    parser.add_argument("--spread", type=float, default=0.0, help="start the blocks' outputs at this std instead of 0")
    parser.add_argument("--batches", type=int, default=8, help="microbatches to keep (8)")
    parser.add_argument("--logits-every", type=int, default=16, help="positions between kept logits (16)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    mine, theirs = sys.argv[1:], []
    if "--" in mine:
        at = mine.index("--")
        mine, theirs = mine[:at], mine[at + 1 :]
    options = parser.parse_args(mine)
    for name in ("nanochat", "data", "out", "tokenizer"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    if not (options.nanochat / "scripts" / "base_train.py").is_file():
        sys.exit(f"--nanochat {options.nanochat}: no scripts/base_train.py there; name a checkout of karpathy/nanochat")
    if len(list(options.data.glob("*.parquet"))) < 2:
        sys.exit(f"--data {options.data}: at least two parquet files are needed, one of them for validation")
    if (options.vocab_size is None) == (options.tokenizer is None):
        sys.exit("either --vocab-size N or --tokenizer FOLDER is needed")
    if options.tokenizer and not (options.tokenizer / "token_bytes.pt").is_file():
        sys.exit(f"--tokenizer {options.tokenizer}: no token_bytes.pt there; name the tokenizer folder of a run")
    if options.out.exists() and any(options.out.iterdir()):
        sys.exit(f"--out {options.out}: not empty; name a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    return options, theirs


def run(options: argparse.Namespace, train_arguments: list[str]) -> dict[str, Any]:
    """Tokenizer, training, and the record of both."""
    try:
        import numpy as np
        import torch
        from nanochat import dataset, gpt, loss_eval, optim
    except ImportError as error:
        sys.exit(f"{sys.executable} lacks what nanochat needs ({error}); see the top of {Path(__file__).name}")
    for module, name in ((dataset, "DATA_DIR"), (gpt, "GPT"), (loss_eval, "evaluate_bpb"), (optim, "MuonAdamW")):
        if not hasattr(module, name):
            sys.exit(
                f"--nanochat {options.nanochat}: {module.__name__} has no {name}; check out a commit near {WRITTEN_FOR}"
            )
    torch.set_num_threads(options.threads)
    dataset.DATA_DIR = str(options.data)
    if options.tokenizer:
        shutil.copytree(options.tokenizer, options.out / "tokenizer")
    else:
        sizes = [f"--vocab-size={options.vocab_size}", f"--max-chars={options.tokenizer_chars}"]
        run_script("tok_train", sizes)

    losses: list[list[float]] = [[]]
    bpb: dict[int, float] = {}
    rates: list[list[float]] = []
    batches: list[np.ndarray] = []
    folder = options.out / "base_checkpoints" / TAG
    init_weights, forward = gpt.GPT.init_weights, gpt.GPT.forward
    evaluate, step = loss_eval.evaluate_bpb, optim.MuonAdamW.step

    def init_and_save(model: Any) -> None:
        torch.manual_seed(options.seed)
        init_weights(model)
        for name, weight in model.named_parameters():
            if options.spread and name.endswith("c_proj.weight"):
                torch.nn.init.normal_(weight, std=options.spread)
        save_initial(model, folder)

    def forward_and_note(model: Any, idx: Any, targets: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = forward(model, idx, targets, *args, **kwargs)
        if model.training and targets is not None:
            losses[-1].append(result.item())
            if len(batches) < options.batches:
                batches.append(torch.cat([idx, targets[:, -1:]], dim=1).to(torch.int32).numpy())
        return result

    def evaluate_and_note(*args: Any, **kwargs: Any) -> float:
        bpb[len(losses) - 1] = evaluate(*args, **kwargs)
        return bpb[len(losses) - 1]

    def step_and_note(optimizer: Any) -> None:
        muon = optimizer.param_groups[-1]
        rates.append([group["lr"] for group in optimizer.param_groups] + [muon["momentum"], muon["weight_decay"]])
        step(optimizer)
        losses.append([])

    gpt.GPT.init_weights, gpt.GPT.forward = init_and_save, forward_and_note
    loss_eval.evaluate_bpb, optim.MuonAdamW.step = evaluate_and_note, step_and_note
    started = time.time()
    fixed = ["--device-type=cpu", "--core-metric-every=-1", "--sample-every=-1", f"--model-tag={TAG}"]
    made = run_script("base_train", [*fixed, *train_arguments])
    seconds = time.time() - started

    model = made["orig_model"].eval()
    with torch.no_grad():
        logits = forward(model, torch.from_numpy(batches[0][:1, :-1]).long())[0, :: options.logits_every]
    np.save(options.out / "batches.npy", np.stack(batches))
    np.save(options.out / "logits.npy", logits.numpy())
    summary = {
        "losses": [sum(micro) / len(micro) for micro in losses if micro],
        "bpb": bpb,
        "rates": rates,
        "arguments": made["user_config"],
        "seed": options.seed,
        "commit": commit(options.nanochat),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "seconds": round(seconds, 1),
    }
    (options.out / "reference.json").write_text(json.dumps(summary, indent=1))
    return {"bpb": bpb, "last_loss": summary["losses"][-1], "seconds": summary["seconds"]}


def save_initial(model: Any, folder: Path | str) -> None:
    """The weights of step 0 as a checkpoint of nanochat."""
    from nanochat import checkpoint_manager

    meta = {"step": 0, "model_config": dataclasses.asdict(model.config)}
    checkpoint_manager.save_checkpoint(str(folder), 0, model.state_dict(), None, meta)


def run_script(name: str, arguments: list[str]) -> dict[str, Any]:
    """The globals of a script of the checkout after it has run with these arguments."""
    sys.argv = [name, *arguments]
    return runpy.run_module(f"scripts.{name}", run_name="__main__")


def commit(checkout: Path) -> str:
    """What git calls the checkout, or "unknown" where it is not a clone."""
    git = subprocess.run(["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True)
    return git.stdout.decode().strip() or "unknown"


if __name__ == "__main__":
    main()
