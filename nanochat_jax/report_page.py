"""The pieces of a report in Markdown, and a report in Markdown as one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt


def plain(text: str) -> str:
    """Plain text with what Markdown would take for markup escaped, on one line."""
    # A "]" is markup where a link or picture goes on behind it; others, as those of intervals, stay readable.
    return re.sub(r"([\\`*<|]|\b_|_\b|\](?=[(\[:])|&(?=#?\w+;))", r"\\\1", " ".join(text.split()))


def bullets(items: Iterable[str]) -> str:
    """A list without order."""
    return "\n".join(f"- {plain(item)}" for item in items)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, all columns but the first aligned to the right."""
    lines = [[plain(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] + ["--:"] * (len(header) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Text shown as it is."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


def to_html(markdown: str, folder: Path, title: str) -> str:
    """One page with the pictures of `folder`/plots inside, light or dark as the reader's system is."""

    def embedded(match: re.Match) -> str:
        # The page may be sent to others: it holds no other file, whatever a text in it asks for.
        path = (folder / match[1]).resolve()
        if path.parent != (folder / "plots").resolve() or not path.is_file():
            return 'src=""'
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    # Without html=False a text that a model wrote could hold a script.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'(?<=<img )src="([^"]+)"', embedded, body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --line: light-dark(#dedad2, #363a41); --accent: light-dark(#a34a1f, #f0a070); }
body { max-width: 900px; margin: 0 auto; padding: 32px 20px 80px; font: 16px/1.6 system-ui, sans-serif;
  background: light-dark(#fbfaf8, #16171a); color: light-dark(#23211d, #e8e6e1); }
h2 { margin-top: 44px; border-bottom: 2px solid var(--accent); }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 14.5px; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
pre { max-height: 30em; overflow: auto; padding: 12px 16px; border: 1px solid var(--line); border-radius: 8px;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; border-radius: 8px; }
"""
