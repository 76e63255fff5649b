"""Figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(figures: dict[str, Any]) -> str:
    """Figures as Markdown: a line for each value, a table for each list of records."""
    lines, tables = [], []
    for name, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append(f"\n{name}:\n\n" + columns(value))
        elif isinstance(value, dict):
            lines.append(f"- {name}: " + ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()))
        else:
            lines.append(f"- {name}: {shown(value)}")
    return "\n".join(lines + tables)


def columns(records: Sequence[dict[str, Any]]) -> str:
    """Records as a Markdown table; what a record lacks stays empty."""
    names = list(dict.fromkeys(name for record in records for name in record))
    cells = [[shown(record.get(name, "")) for name in names] for record in records]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    rows = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def shown(value: Any) -> str:
    """A value for people: four digits of a float, thousands of a whole number apart."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
