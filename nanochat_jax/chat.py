"""The terminal chat: one answer for a script, or a conversation of several turns, streamed as it is written.

python -m nanochat_jax chat                          # /reset starts over, /quit leaves, Ctrl-C stops an answer
python -m nanochat_jax chat -p "Why is the sky blue?"
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams, collected
from nanochat_jax.server.context import fit
from nanochat_jax.tokenizer import Tokenizer

COMMANDS = "/reset starts over, /quit leaves"


def answer_once(
    engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, prompt: str, *, raw: bool, show: bool
) -> dict[str, Any]:
    """The answer to one user message, or with `raw` the continuation of a text; streamed to stdout where `show` is set.

    Returns {"text", "tool_calls", "finish_reason", "usage"}. UserError where the prompt fills the context.
    """
    if raw:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    else:
        fitted = fit([{"role": "user", "content": prompt}], tokenizer, engine.max_len, sampling)
        ids, sampling = fitted.ids, fitted.sampling
    events = engine.stream(ids, sampling)
    return collected(_shown(events) if show else events)


def talk(engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
    """Reads messages from stdin and answers each, until /quit or the end of the input."""
    print(COMMANDS, file=sys.stderr)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # some Pythons are built without it
            import readline  # with it `input` has arrow keys and a history

            readline.parse_and_bind("set enable-bracketed-paste on")  # several lines pasted are one message
    messages: list[dict[str, Any]] = []
    while (text := _read_line()) not in (None, "/quit", "/exit", "quit", "exit"):
        if text == "/reset":
            messages.clear()
            print("(a new conversation)", file=sys.stderr)
        elif re.fullmatch(r"/\w*", text):
            print(f"{text} is no command: {COMMANDS}", file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                prompt = fit(messages, tokenizer, engine.max_len, sampling)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                continue
            if prompt.dropped:
                print(f"({prompt.dropped} old messages no longer fit the context)", file=sys.stderr)
            # The same question asked twice should not get the same sample.
            turn = dataclasses.replace(prompt.sampling, seed=sampling.seed + len(messages) // 2)
            parts = _parts(engine.stream(prompt.ids, turn))
            if any(part["text"] for part in parts):
                messages.append({"role": "assistant", "content": parts})
            else:  # no model was trained on turns of which nothing was said
                messages.pop()
                print("(no answer; the question is left out of the conversation)", file=sys.stderr)


def _read_line() -> str | None:
    """One line from the person, stripped; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _parts(events: Iterator[dict]) -> list[dict[str, str]]:
    """Shows an answer and returns it as message parts; Ctrl-C ends it where it is."""
    parts: list[dict[str, str]] = [{"type": "text", "text": ""}]
    try:
        for event in _shown(events):
            if event["type"] == "text":
                parts[-1]["text"] += event["text"]
            elif event["type"] == "tool":
                parts.append({"type": "python", "text": event["expression"]})
                if event["result"] is not None:
                    parts.append({"type": "python_output", "text": event["result"]})
                parts.append({"type": "text", "text": ""})
    except KeyboardInterrupt:
        print()
    return parts


def _shown(events: Iterator[dict]) -> Iterator[dict]:
    """Passes the engine's events on, printing them; stopping early cancels the generation."""
    try:
        for event in events:
            if event["type"] == "text":
                print(event["text"], end="", flush=True)
            elif event["type"] == "tool":
                print(f"[{event['expression']} = {event['result'] or '?'}]", end="", flush=True)
            else:
                print(flush=True)
            yield event
    finally:
        events.close()
