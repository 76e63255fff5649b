"""What a chat request may say: the fields of OpenAI's chat completions that this server knows, checked one by one.

Unknown fields are ignored, as clients send many; a known field with a bad value, or one that would change the answer in
a way the server cannot honour, is an error that names the field and its limits.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from nanochat_jax.inference.engine import SamplingParams

MAX_MESSAGES = 200
MAX_MESSAGE_CHARS = 32_000
MAX_TOTAL_CHARS = 200_000
MAX_STOPS = 4
MAX_STOP_CHARS = 100
UNSUPPORTED = ("tools", "functions", "logprobs", "logit_bias", "response_format")
PART_TYPES = ("text", "python", "python_output")


class ApiError(Exception):
    """An error for the client: HTTP status, a sentence, and the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


@dataclass(frozen=True)
class ChatRequest:
    """One checked request; `messages` has the form of the training conversations and ends with the user's."""

    messages: list[dict]
    sampling: SamplingParams
    stop: tuple[str, ...]
    stream: bool


def parse_request(body: Any, model_name: str, max_len: int) -> ChatRequest:
    """Checks a decoded JSON body. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object, sent with Content-Type: application/json")
    if body.get("model") not in (None, model_name):
        raise ApiError(f"model {body['model']!r:.80} is not here; this server has {model_name!r}", "model", 404)
    for field in UNSUPPORTED:
        if body.get(field):
            raise ApiError(f"{field} is not supported; leave it out", field)
    if body.get("n") not in (None, 1):
        raise ApiError("n must be 1: ask again for another answer", "n")
    if body.get("stream") not in (None, True, False):
        raise ApiError("stream must be true or false", "stream")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    sampling = SamplingParams(
        temperature=_number(body, "temperature", float, 0, 5, 0.8),
        top_k=_number(body, "top_k", int, 0, 1_000_000, 50),
        top_p=_number(body, "top_p", float, 1e-6, 1, 1.0),
        min_p=_number(body, "min_p", float, 0, 1, 0.0),
        max_tokens=_number(body, limit, int, 1, max_len, min(512, max_len)),
        seed=_number(body, "seed", int, 0, 2**31 - 1, secrets.randbelow(2**31)),
    )
    return ChatRequest(_messages(body.get("messages")), sampling, _stop(body.get("stop")), bool(body.get("stream")))


def _number(body: dict, name: str, kind: type, low: float, high: float, default: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    right_kind = isinstance(value, int) if kind is int else isinstance(value, int | float)
    if not right_kind or isinstance(value, bool) or not low <= value <= high:
        noun = "an integer" if kind is int else "a number"
        raise ApiError(f"{name} must be {noun} from {low} to {high}, not {value!r:.40}", name)
    return kind(value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops)
    if not good or len(stops) > MAX_STOPS:
        raise ApiError(f"stop must be a text or up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters", "stop")
    return tuple(stops)


def _messages(messages: Any) -> list[dict]:
    """An optional system message, then user and assistant in turn, the user first and last."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list with at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(f"{len(messages)} messages; at most {MAX_MESSAGES} are taken", "messages")
    checked = [_message(message, i) for i, message in enumerate(messages)]
    total = sum(len(part["text"]) for message in checked for part in _parts(message["content"]))
    if total > MAX_TOTAL_CHARS:
        raise ApiError(f"the messages hold {total} characters; at most {MAX_TOTAL_CHARS} are taken", "messages")
    first = 1 if checked[0]["role"] == "system" else 0
    for i, message in enumerate(checked[first:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise ApiError(
                f"messages[{i + first}] has role {message['role']!r} where {expected!r} is due: "
                "after a system message, if any, user and assistant alternate",
                "messages",
            )
    if checked[-1]["role"] != "user":
        raise ApiError("the last message must be the user's", "messages")
    return checked


def _message(message: Any, i: int) -> dict:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant"):
        raise ApiError(f"messages[{i}] needs a role: system, user or assistant", "messages")
    content = message.get("content")
    if isinstance(content, list):
        types = PART_TYPES if role == "assistant" else PART_TYPES[:1]
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in types or not isinstance(part.get("text"), str):
                raise ApiError(f"messages[{i}]: a part needs a type ({', '.join(types)}) and a text", "messages")
        content = [{"type": part["type"], "text": part["text"]} for part in content]
        if role != "assistant":
            content = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise ApiError(f"messages[{i}]: content must be a text or a list of parts", "messages")
    length = sum(len(part["text"]) for part in _parts(content))
    if length > MAX_MESSAGE_CHARS:
        raise ApiError(f"messages[{i}] has {length} characters; at most {MAX_MESSAGE_CHARS} are taken", "messages")
    if not length and role == "user":
        raise ApiError(f"messages[{i}] is empty", "messages")
    return {"role": role, "content": content}


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
