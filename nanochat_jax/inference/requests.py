"""What is asked of the engine and what comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.errors import UserError
from nanochat_jax.inference.text import TextStream


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. temperature 0: greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1: off; max_tokens in
    tokens. `stop`: texts that end the answer, before them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 1e-6, 1),
            ("min_p", 0, 1),
            ("max_tokens", 1, 2**31 - 1),
            ("repetition_penalty", 0.01, 100),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} {getattr(self, name)} is outside {low} to {high}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop {self.stop!r} is not a list of texts, none of them empty")


@dataclass
class Completion:
    """What the model answered: its ids (end marker left out), mask 0 where a tool wrote, and the calls it made.

    logprobs, of an engine that was asked for them: natural logarithm of the probability of each token under the model
    itself (temperature 1, nothing left out), 0 where a tool wrote.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """One request inside the engine."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    text: TextStream | None = None
    completion: Completion = field(default_factory=Completion)
    forced: list[int] = field(default_factory=list)
    expression: list[int] | None = None
    events: deque = field(default_factory=deque)
    slot: int = -1

    @property
    def done(self) -> bool:
        return bool(self.completion.finish_reason)

    @property
    def position(self) -> int:
        """Of the newest token, which is to be fed next."""
        return len(self.prompt) + len(self.completion.ids) - 1

    def next_event(self) -> dict[str, Any]:
        """Takes the first event; texts in a row as one, because whoever passes events on pays for each."""
        event = self.events.popleft()
        while event["type"] == "text" and self.events and self.events[0]["type"] == "text":
            event = {"type": "text", "text": event["text"] + self.events.popleft()["text"]}
        return event


def collected(events: Iterable[dict]) -> dict[str, Any]:
    """The events of `Engine.stream` as one: {"text", "tool_calls", "finish_reason", "usage"}."""
    answer: dict[str, Any] = {"text": "", "tool_calls": []}
    for event in events:
        if event["type"] == "text":
            answer["text"] += event["text"]
        elif event["type"] == "tool":
            answer["tool_calls"].append({"expression": event["expression"], "result": event["result"]})
        else:
            answer |= {"finish_reason": event["finish_reason"], "usage": event["usage"]}
    return answer
