"""From the engine's events (`Engine.stream`) to OpenAI's chat completion objects, whole or in chunks.

Two fields go beyond OpenAI's: `tool` ({"expression", "result"}, a tool call that already ran) in a delta, or `tools` in
a whole message; and `truncated_messages`, how many old messages no longer fit the context, in the first chunk.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator

from nanochat_jax.errors import UserError
from nanochat_jax.inference.requests import collected
from nanochat_jax.server.context import Prompt


def completion(events: Iterator[dict], prompt: Prompt, model_name: str) -> dict:
    """A whole `chat.completion` object."""
    answer = collected(events)
    tools = {"tools": answer["tool_calls"]} if answer["tool_calls"] else {}
    message = {"role": "assistant", "content": answer["text"], **tools}
    choice = {"index": 0, "message": message, "finish_reason": answer["finish_reason"]}
    return {
        **_envelope("chat.completion", model_name),
        "choices": [choice],
        "usage": _usage(prompt, answer["usage"]["completion_tokens"]),
        "truncated_messages": prompt.dropped,
    }


def sse_chunks(events: Iterator[dict], prompt: Prompt, model_name: str, usage_apart: bool = False) -> Iterator[str]:
    """`chat.completion.chunk` objects as server-sent events, ended by [DONE]; a failure is an event with an error.

    The usage is in the last chunk; `usage_apart`: in one more, without choices, as `stream_options` asks for it.
    """
    envelope = _envelope("chat.completion.chunk", model_name)

    def line(delta: dict, finish_reason: str | None = None, **extra: object) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({**envelope, 'choices': [choice], **extra})}\n\n"

    try:
        yield line({"role": "assistant", "content": ""}, truncated_messages=prompt.dropped)
        for event in events:
            if event["type"] == "text":
                yield line({"content": event["text"]})
            elif event["type"] == "tool":
                yield line({"tool": {"expression": event["expression"], "result": event["result"]}})
            else:
                usage = {"usage": _usage(prompt, event["usage"]["completion_tokens"])}
                yield line({}, event["finish_reason"], **({} if usage_apart else usage))
                if usage_apart:
                    yield f"data: {json.dumps({**envelope, 'choices': [], **usage})}\n\n"
    except UserError as error:
        yield f"data: {json.dumps(error_body(str(error), 400))}\n\n"
    except Exception:
        logging.getLogger(__name__).exception("generation failed")
        yield f"data: {json.dumps(error_body('generation failed; the server log says why', 500))}\n\n"
    finally:
        events.close()
    yield "data: [DONE]\n\n"


def error_body(message: str, status: int, param: str | None = None) -> dict:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _envelope(kind: str, model_name: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model_name}


def _usage(prompt: Prompt, completion_tokens: int) -> dict:
    total = len(prompt.ids) + completion_tokens
    return {"prompt_tokens": len(prompt.ids), "completion_tokens": completion_tokens, "total_tokens": total}
