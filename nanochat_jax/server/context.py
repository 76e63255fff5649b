"""A conversation cut to what the model's context holds, whole turns at a time, the oldest first."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from nanochat_jax.errors import UserError
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Token ids to complete, how (with the tokens left for the answer), and how many old messages were left out."""

    ids: list[int]
    sampling: SamplingParams
    dropped: int


def fit(messages: list[dict], tokenizer: Tokenizer, max_len: int, sampling: SamplingParams) -> Prompt:
    """Renders `messages` (the last one the user's) for an answer by `sampling` in a context of `max_len` tokens.

    Question-answer pairs are left out from the start until the answer fits, or half of the context is free; a system
    message stays. Raises UserError when the last message alone fills the context.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    room = max_len - min(sampling.max_tokens, max_len // 2)

    def render(pairs_dropped: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": system + turns[2 * pairs_dropped :]})

    # The prompt only gets shorter with each pair dropped, so a handful of renderings finds the first that fits.
    most = len(turns) // 2
    dropped = min(bisect_left(range(most + 1), True, key=lambda pairs: len(render(pairs)) <= room), most)
    ids = render(dropped)
    if len(ids) >= max_len:
        raise UserError(f"the message takes {len(ids)} tokens, the context holds {max_len}: shorten it")
    return Prompt(ids, replace(sampling, max_tokens=min(sampling.max_tokens, max_len - len(ids))), 2 * dropped)
