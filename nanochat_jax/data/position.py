"""A saved position means something only over the data it was saved over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from nanochat_jax.errors import UserError


def digest(rows: Sequence[dict], read: int = 64) -> str:
    """A few hex digits that tell a set of rows from another one: their number, and what is in `read` of them."""
    count = min(read, len(rows))
    some = [rows[len(rows) * i // count] for i in range(count)]
    return hashlib.sha256(json.dumps([len(rows), some], sort_keys=True).encode()).hexdigest()[:12]


def check_origin(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError, naming the first difference, where a position was saved over other data or settings.

    What is newer than the position counts as the same.
    """
    for name, value in now.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"the saved position belongs to other data: {name} was {saved.get(name)}, now {value}; "
                "restore it as it was, start a new run, or --force to read the other data from their beginning"
            )
