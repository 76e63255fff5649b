"""What a chat request may say: the fields of OpenAI's chat completions that this server knows, checked one by one.

Unknown fields are ignored, as clients send many; a known field with a bad value, or one that would change the answer in
a way the server cannot honour, is an error that names the field and its limits.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from werkzeug.exceptions import HTTPException

from nanochat_jax.data.turns import check_turns, is_part
from nanochat_jax.errors import UserError
from nanochat_jax.inference.requests import SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARS = 100
UNSUPPORTED = (
    "tools",
    "functions",
    "logprobs",
    "logit_bias",
    "response_format",
    "frequency_penalty",
    "presence_penalty",
)


class ApiError(HTTPException):
    """An error for the client: HTTP status, a sentence, and the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code = param, status


@dataclass(frozen=True)
class ChatRequest:
    """One checked request; `messages` has the form of the training conversations and ends with the user's."""

    messages: list[dict]
    sampling: SamplingParams
    stream: bool
    usage_apart: bool
    """The usage of a streamed answer is asked for in a chunk of its own."""


def parse_request(body: Any, model_name: str) -> ChatRequest:
    """Checks a decoded JSON body. Raises ApiError. More tokens than fit may be asked for: `fit` takes what there is."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object, sent with Content-Type: application/json")
    if body.get("model") is not None:
        check_model(body["model"], model_name)
    for field in UNSUPPORTED:
        if body.get(field) and (field, body[field]) != ("response_format", {"type": "text"}):  # which asks for nothing
            raise ApiError(f"{field} is not supported; leave it out", field)
    if body.get("n") not in (None, 1) or body.get("n") is True:
        raise ApiError("n must be 1: ask again for another answer", "n")
    if not isinstance(body.get("stream"), bool | None):
        raise ApiError("stream must be true or false", "stream")
    options = {} if body.get("stream_options") is None else body["stream_options"]
    if not isinstance(options, dict) or not isinstance(options.get("include_usage"), bool | None):
        raise ApiError('stream_options must be {"include_usage": true or false}', "stream_options")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    sampling = SamplingParams(
        temperature=_number(body, "temperature", float, 0, 5, 0.8),
        top_k=_number(body, "top_k", int, 0, 1_000_000, 50),
        top_p=max(1e-6, _number(body, "top_p", float, 0, 1, 1.0)),
        min_p=_number(body, "min_p", float, 0, 1, 0.0),
        max_tokens=_number(body, limit, int, 1, 2**31 - 1, 512),
        seed=_number(body, "seed", int, -(2**63), 2**63 - 1, secrets.randbelow(2**31)) % 2**31,
        repetition_penalty=_number(body, "repetition_penalty", float, 0.01, 100, 1.0),
        stop=_stop(body.get("stop")),
    )
    streamed = bool(body.get("stream")), bool(options.get("include_usage"))
    return ChatRequest(_messages(body.get("messages")), sampling, *streamed)


def check_model(name: Any, model_name: str) -> None:
    """Raises ApiError, 404, for any other model than this server's."""
    if name != model_name:
        raise ApiError(f"model {name!r:.80} is not here; this server has {model_name!r}", "model", 404)


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
    messages = [_plain(message) for message in messages]
    if isinstance(messages[0], dict) and messages[0].get("role") == "developer":  # OpenAI's newer name for it
        messages[0] = messages[0] | {"role": "system"}
    try:
        check_turns(messages, "messages")
    except UserError as error:
        raise ApiError(str(error), "messages") from None
    if messages[-1]["role"] != "user" or not messages[-1]["content"]:
        raise ApiError("the last message must be the user's, and not empty", "messages")
    return messages


def _plain(message: Any) -> Any:
    """A message with its parts joined where all are text, as OpenAI's clients may send any message."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(is_part(part) and part["type"] == "text" for part in parts):
        return message
    return message | {"content": "".join(part["text"] for part in parts)}
