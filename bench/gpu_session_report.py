"""The parts of a session of bench/gpu_session.sh as one JSON file and one page of tables.

    python -m bench.gpu_session_report PIECES FOLDER

PIECES holds NAME.out, whose last line is JSON, and NAME.status, "exit-status seconds". Exit status 1 where a part
failed or found something wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.bench.tables import columns


def main() -> None:
    """Reads, checks, writes."""
    pieces, folder = map(Path, sys.argv[1:])
    parts = {
        path.stem: read(path) for path in sorted(pieces.glob("*.status"), key=lambda path: path.stat().st_mtime_ns)
    }
    wrong = [f"{name}: {fault}" for name, part in parts.items() for fault in faults(part)]
    (folder / "gpu_session.json").write_text(json.dumps({"wrong": wrong, "parts": parts}, indent=1))
    (folder / "gpu_session.md").write_text(page(parts, wrong))
    print((folder / "gpu_session.md").read_text(), file=sys.stderr)
    sys.exit(1 if wrong or not parts else 0)


def read(path: Path) -> dict[str, Any]:
    """{"status", "seconds", "figures"} of a part; no figures where it printed none."""
    status, seconds = path.read_text().split()
    out = path.with_suffix(".out")
    lines = out.read_text().splitlines() if out.exists() else []
    try:
        figures = json.loads(lines[-1])
    except (IndexError, ValueError):
        figures = {}
    return {"status": status, "seconds": int(seconds), "figures": figures}


def faults(part: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a part."""
    if part["status"] != "0":
        said = {"124": "took too long", "missing": "there was no time for it"}
        yield said.get(part["status"], f"ended with status {part['status']}")
    elif not part["figures"]:
        yield "printed no figures"
    for record in (*part["figures"].get("attention", ()), *part["figures"].get("over_cache", ())):
        if not record["right"]:
            yield f"{record['impl']}, window {record['window']}: {record.get('error', 'differs from the reference')}"


def page(parts: dict[str, dict], wrong: Sequence[str]) -> str:
    """Markdown: what is wrong, where it ran, and a table of each kind of measurement."""
    figures = {name: part["figures"] for name, part in parts.items()}
    attention = [
        {"part": name, **{key: value for key, value in record.items() if not key.endswith(("p10_ms", "p90_ms"))}}
        for name, one in figures.items()
        for record in one.get("attention", ())
    ]
    steps = [{"part": name, **step_row(one)} for name, one in figures.items() if one.get("bench") == "train"]
    compared = figures.get("compare", {})
    names = ("tok_per_sec", "peak_bytes", "first_step_seconds")
    tables = {
        "Attention": attention,
        "Training step": steps,
        **{f"{name}: where the time of a step goes": one.get("parts") for name, one in figures.items()},
        **{name: one.get("speeds") for name, one in figures.items()},
        **{f"{name}: attention over the cache": one.get("over_cache") for name, one in figures.items()},
        "Against the reference": [{"figure": name, **compared[name]} for name in names if compared],
        "Parts": [{"part": name, **{key: part[key] for key in ("status", "seconds")}} for name, part in parts.items()],
    }
    where = next((one["environment"] for one in figures.values() if "environment" in one), {})
    said = [f"WRONG: {fault}" for fault in wrong] or ["Every check passed."]
    shown = [f"\n## {title}\n\n{columns(records)}" for title, records in tables.items() if records]
    return "\n".join([*said, "", *(f"- {key}: {value}" for key, value in where.items()), *shown]) + "\n"


def step_row(figures: dict[str, Any]) -> dict[str, Any]:
    """What a table says of a training step."""
    return {
        "attention": figures["architecture"]["attention"],
        "rows": figures["rows"],
        **figures["step"],
        **{name: figures[name] for name in ("tok_per_sec", "mfu")},
        "peak_gib": figures["peak_bytes"] / 2**30,
        **{name: figures["program"][name] for name in ("compile_seconds", "compiled_before", "fp8_products")},
        "xla_flags": figures["environment"]["xla_flags"],
    }


if __name__ == "__main__":
    main()
