"""A saved position means something only over the data it was saved over."""

from __future__ import annotations

from typing import Any

from nanochat_jax.errors import UserError


def check_origin(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError, naming the first difference, where a position was saved over other data or settings."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise UserError(
                f"the saved position belongs to other data: {name} was {saved.get(name)}, now {value}; "
                "restore it as it was or start a new run"
            )
