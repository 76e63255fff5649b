"""SmolTalk, the smaller version: general conversations with an assistant. Set: HuggingFaceTB/smol-smoltalk."""

from __future__ import annotations

from nanochat_jax.config import DataConfig
from nanochat_jax.tasks.hub import load_rows
from nanochat_jax.tasks.task import Task, ungraded


def load(split: str, data: DataConfig) -> Task:
    """Conversations to learn from; nothing in them can be graded."""
    rows = load_rows(data, "HuggingFaceTB/smol-smoltalk", "default", split, ("messages",))
    return Task("smoltalk", "generative", rows, conversation, ungraded)


def conversation(row: dict) -> dict:
    """The messages as they are."""
    return {"messages": row["messages"]}
