"""The reference's side of compare_nanochat.py: its own scripts/base_train.py, whole, with torch.compile, in turns.

Data and vocabulary are given, so the loader and the tokenizer are replaced; initial weights are saved for the other
side; a step ends with the line that base_train prints about it, from which the loss is read. Runs in an environment of
the reference: nothing of this project can be imported there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_reference import HIDDEN, commit, run_script, save_initial
from turns import Turns

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Trains as the file named by the only argument says."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    sys.path[0] = spec["nanochat"]
    check_packages()
    sys.modules["wandb"] = types.ModuleType("wandb")

    import torch

    cuda = spec["device"] == "cuda"
    rss = resource.getrusage
    turns = Turns(torch.cuda.max_memory_allocated if cuda else lambda: 1024 * rss(resource.RUSAGE_SELF).ru_maxrss)

    from nanochat import common, dataloader, gpt, tokenizer

    turns.facts = {
        "commit": commit(Path(spec["nanochat"])),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "USE_FA3": uses_fa3(),
    }

    def print_and_wait(text: str = "", **kwargs: Any) -> None:
        print(text, **kwargs)
        if step := re.match(r"step \d+/.* loss: ([0-9.]+) ", text):
            turns.step_done(float(step[1]))

    def batches(_: Any, rows: int, length: int, **__: Any) -> Iterator[tuple]:
        import numpy as np

        position = {"epoch": 1, "pq_idx": 0, "rg_idx": 0}
        tokens = np.load(spec["batches"], mmap_mode="r")
        while True:
            for batch in tokens:
                pair = (torch.from_numpy(batch[:, cut].astype(np.int64)) for cut in (slice(-1), slice(1, None)))
                yield *(part.to(spec["device"]) for part in pair), position

    init_weights = gpt.GPT.init_weights

    def init_and_save(model: Any) -> None:
        init_weights(model)
        with turns.uncounted():
            save_initial(model, spec["checkpoint"])

    vocabulary = types.SimpleNamespace(get_vocab_size=lambda: spec["vocab_size"])
    common.print0 = print_and_wait
    dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit = batches
    tokenizer.get_tokenizer, tokenizer.get_token_bytes = lambda: vocabulary, lambda device: None
    gpt.GPT.init_weights = init_and_save
    run_script("base_train", [f"--device-type={spec['device']}", *spec["arguments"]])


def check_packages() -> None:
    """Exits with one line where a package of this project would be taken for one of the reference."""
    for name in HIDDEN:
        found = importlib.util.find_spec(name)
        if found and found.origin and HERE.parent in Path(found.origin).parents:
            sys.exit(f"{name} is this project's here ({found.origin}): take it out of the reference's environment")


def uses_fa3() -> bool:
    """Whether the reference uses its FlashAttention 3. Exits with one line where it would and cannot."""
    import torch
    from nanochat import flash_attention

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if hopper and os.environ.get("NANOCHAT_DTYPE") == "bfloat16" and not flash_attention.USE_FA3:
        sys.exit("USE_FA3 is false on Hopper: the reference would run without its FlashAttention 3; install `kernels`")
    return flash_attention.USE_FA3


if __name__ == "__main__":
    main()
