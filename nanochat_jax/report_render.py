"""A report as a list of blocks, and the blocks as Markdown or as one self-contained HTML page. Text is plain text."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title of the report."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list without order."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; all columns but the first are aligned to the right where `numeric`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Code:
    """Text shown as it is, folded behind `summary` where there is one."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file; Markdown refers to it by its path below the report's folder, HTML embeds it."""

    path: Path
    alt: str


Block = Heading | Paragraph | Bullets | Table | Code | Picture


def to_markdown(blocks: Iterable[Block], folder: Path) -> str:
    """Markdown with pictures relative to `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_md(text)}"
        case Paragraph(text):
            return _md(text)
        case Bullets(items):
            return "\n".join(f"- {_md(item)}" for item in items)
        case Table(header, rows, numeric):
            rule = ["---"] + ["--:" if numeric else "---"] * (len(header) - 1)
            lines = [[_md(cell) for cell in header], rule, *([_md(cell) for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Code(text, summary):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            code = f"{fence}\n{text.rstrip()}\n{fence}"
            return f"<details><summary>{escape(summary)}</summary>\n\n{code}\n\n</details>" if summary else code
        case Picture(path, alt):
            return f"![{_md(alt)}]({path.relative_to(folder).as_posix()})"


def _md(text: str) -> str:
    """Plain text with what Markdown would take for markup escaped, on one line."""
    return re.sub(r"([\\`*<|]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def to_html(blocks: Sequence[Block], title: str) -> str:
    """One page with pictures inside, light or dark as the reader's system is."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Table(header, rows, numeric):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            kind = ' class="numeric"' if numeric else ""
            return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Code(text, summary):
            code = f"<pre>{escape(text.rstrip())}</pre>"
            return f"<details><summary>{escape(summary)}</summary>{code}</details>" if summary else code
        case Picture(path, alt):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


STYLE = """
:root { color-scheme: light dark; --page: light-dark(#fbfaf8, #16171a); --text: light-dark(#23211d, #e8e6e1);
  --soft: light-dark(#6b665c, #a19d94); --line: light-dark(#dedad2, #363a41); --panel: light-dark(#f2f0ec, #1f2226);
  --accent: light-dark(#a34a1f, #f0a070); }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 30px; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 21px; margin: 44px 0 12px; padding-bottom: 4px; border-bottom: 2px solid var(--accent); }
h3 { font-size: 17px; margin: 28px 0 8px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14.5px; width: 100%; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.numeric td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.numeric th:not(:first-child), .numeric td:not(:first-child) { text-align: right; }
tbody tr:hover { background: var(--panel); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; }
@media print { details { display: block; } body { font-size: 12px; } }
"""
