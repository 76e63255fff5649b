"""What the messages of a conversation must look like, in training files as in requests to the server."""

from __future__ import annotations

from nanochat_jax.errors import UserError

PART_TYPES = ("text", "python", "python_output")


def check_turns(messages: list, where: str) -> None:
    """Raises UserError, beginning with `where`, unless every message is {"role", "content"} and its role is due.

    An optional system message, then user and assistant in turn. Content is text; the assistant's may also be a list of
    {"type": "text" | "python" | "python_output", "text"}. Other keys are left alone.
    """
    first = 1 if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system" else 0
    for i, message in enumerate(messages):
        at = f"{where}, message {i + 1}"
        if not isinstance(message, dict):
            raise UserError(f"{at}: not an object")
        expected = "system" if i < first else ("assistant" if (i - first) % 2 else "user")
        if message.get("role") != expected:
            raise UserError(f'{at}: role {message.get("role")!r:.40} where "{expected}" is due')
        content = message.get("content")
        if isinstance(content, list) and expected == "assistant":
            for j, part in enumerate(content):
                if not is_part(part):
                    types = " | ".join(PART_TYPES)
                    raise UserError(f'{at}, part {j + 1}: must be {{"type": {types}, "text": text}}')
        elif not isinstance(content, str):
            raise UserError(f"{at}: content of the {expected} must be text, not {type(content).__name__}")


def is_part(part: object) -> bool:
    """Whether this is a part of an assistant's message."""
    return isinstance(part, dict) and part.get("type") in PART_TYPES and isinstance(part.get("text"), str)
