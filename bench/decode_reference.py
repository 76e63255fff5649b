"""The reference's side of compare_decode.py: its own Engine, in turns. Runs in an environment of the reference."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare_reference import check_packages, uses_fa3
from nanochat_reference import HIDDEN, commit, save_initial
from turns import answer, held_to


class NoSpecials:
    """In place of a tokenizer: no token ends an answer or calls a tool."""

    def encode_special(self, name: str) -> int:
        """An id that no model draws."""
        return -1

    def get_bos_token_id(self) -> int:
        """The same."""
        return -1


def main() -> None:
    """Makes the model that the file named by the only argument describes, saves it for the other side, and serves."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    sys.path[0] = spec["nanochat"]
    cuda = spec["device"] == "cuda"
    if cuda:
        check_packages()
    else:
        held_to(spec["threads"])
        sys.modules.update({name: None for name in HIDDEN})

    import torch

    if not cuda:
        torch.set_num_threads(spec["threads"])
    from nanochat.engine import Engine

    model = weights(spec["model"]).to(spec["device"])
    save_initial(model, spec["checkpoint"])
    engine, sampling = Engine(model.eval(), NoSpecials()), spec["sampling"]

    def decode(rows: int, prompt: list[int], steps: int) -> dict[str, float]:
        """Seconds from the first token of all rows to the last, `steps` forward passes, and up to the first."""
        start = time.perf_counter()
        tokens = engine.generate(prompt, num_samples=rows, max_tokens=steps + 1, **sampling)
        next(tokens)
        first = time.perf_counter()
        for _ in range(steps):
            next(tokens)
        end = time.perf_counter()
        tokens.close()
        return {"seconds": end - first, "first": first - start}

    def rollouts(prompts: list[list[int]], samples: int, tokens: int, at_once: int) -> dict[str, float]:
        """Seconds of all questions, one after the other, `at_once` samples at a time, as its chat_rl asks them."""
        start = time.perf_counter()
        for prompt in prompts:
            for seed in range(samples // at_once):
                asked = {"num_samples": at_once, "max_tokens": tokens, "seed": seed}
                sequences, _ = engine.generate_batch(prompt, **asked, **sampling)
                assert all(len(sequence) == len(prompt) + tokens for sequence in sequences)
        return {"seconds": time.perf_counter() - start}

    def greedy(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """The likeliest tokens after each prompt."""
        return [
            [column[0] for column, _ in engine.generate(prompt, max_tokens=tokens, temperature=0.0)]
            for prompt in prompts
        ]

    works: dict[str, Callable[..., Any]] = {"decode": decode, "rollouts": rollouts, "greedy": greedy}
    facts = {"commit": commit(Path(spec["nanochat"])), "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["USE_FA3"] = uses_fa3()
    answer(lambda work, variant, **options: works[work](**options), facts)


def weights(shape: dict[str, Any]) -> Any:
    """The reference's initial weights, but nothing zero that would take attention or smear out of the answer, and
    logits far enough apart for rounding not to choose the token.
    """
    import torch
    from nanochat import gpt

    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**shape))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.lm_head.weight.normal_(std=2 * shape["n_embd"] ** -0.5)
        model.smear_lambda.fill_(0.5)
    return model


if __name__ == "__main__":
    main()
