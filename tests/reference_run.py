"""How a run of bench/nanochat_reference.py is repeated here: the same data, weights, tokenizer and options."""

import shutil
from pathlib import Path

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "nanochat_july.py"
OURS = {  # option of nanochat's base_train -> ours
    "depth": "model.depth",
    "aspect_ratio": "model.aspect-ratio",
    "head_dim": "model.head-dim",
    "max_seq_len": "model.sequence-len",
    "window_pattern": "model.window-pattern",
    "num_iterations": "base.num-iterations",
    "target_param_data_ratio": "base.target-param-data-ratio",
    "device_batch_size": "base.device-batch-size",
    "total_batch_size": "base.total-batch-size",
    "embedding_lr": "base.embedding-lr",
    "unembedding_lr": "base.unembedding-lr",
    "weight_decay": "base.weight-decay",
    "matrix_lr": "base.matrix-lr",
    "scalar_lr": "base.scalar-lr",
    "warmup_steps": "base.warmup-steps",
    "warmdown_ratio": "base.warmdown-ratio",
    "final_lr_frac": "base.final-lr-frac",
    "eval_every": "base.eval-every",
    "eval_tokens": "base.eval-tokens",
}


def convert_command(checkpoint, tokenizer, workdir, step):
    """Words of the command line that take a checkpoint over."""
    words = ["convert", "from-nanochat", "--checkpoint", checkpoint, "--tokenizer", tokenizer, "--step", step]
    return list(map(str, [*words, "--workdir", workdir]))


def pretrain_command(arguments, data, workdir, init_from=None, seed=42):
    """Words of the command line that repeat a run of base_train with these `arguments`."""
    words = ["pretrain", "--experiment", EXPERIMENT, "--workdir", workdir, "--data.dir", data, "--seed", seed]
    words += ["--data.packing", "bestfit", "--compute-dtype", "float32", "--mesh", "1", "--base.save-every", 0]
    for theirs, ours in OURS.items():
        words += [f"--{ours}", arguments[theirs]]
    return list(map(str, words + (["--base.init-from", init_from] if init_from else [])))


def take_tokenizer(source, workdir):
    """The tokenizer of run `source` becomes that of `workdir`."""
    shutil.copytree(source / "tokenizer", workdir / "tokenizer")
