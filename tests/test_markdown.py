"""The chat page's Markdown, run as browsers run it: what it makes of a text, and that no text becomes markup."""

import random
from html.parser import HTMLParser
from pathlib import Path

import py_mini_racer
import pytest

from nanochat_jax.server import app

SOURCE = Path(app.__file__).parent / "static" / "markdown.js"
TAGS = {"p", "br", "strong", "em", "code", "pre", "a", "ul", "ol", "li", "blockquote", "h3", "h4", "h5", "h6"}
ATTRIBUTES = {"a": {"href", "target", "rel"}, "pre": {"data-language"}, "ol": {"start"}}
MARKUP = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</code></pre>",
    "<!--",
    "&lt;b&gt;",
    "&#60;",
    "]]>",
]
LINKS = ["javascript:alert(1)", "[a](javascript:alert(1))", '[a](https://b.c/" onclick="x)', "[a](https://b.c/'x)"]
LINKS += ["[<i>](https://b.c/(d)?e=<f>)", "![a](https://b.c)", "https://b.c", "[", "](", "(https://", ")"]
MARKS = [
    "*",
    "**",
    "`",
    "``",
    "```",
    "```html\n",
    '```"><b>\n',
    "\n",
    "\n\n",
    "- ",
    "1. ",
    "\n  - ",
    "\n\t2. ",
    "> ",
    "# ",
    "    ",
    " ",
]
OTHERS = ["\0", "\x000\x00", "word", '"', "'", "<", ">", "&", "\u2028", "\u202e", "e\u0301", "\U0001f600"]
PIECES = MARKUP + LINKS + MARKS + OTHERS


@pytest.fixture(scope="module")
def render():
    context = py_mini_racer.MiniRacer()
    context.eval(SOURCE.read_text(encoding="utf-8").replace("export function", "function"))
    return lambda text: context.call("renderMarkdown", text)


class Page(HTMLParser):
    """Elements with their attributes, whether each is closed in turn, and the text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.others, self.text = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.open.remove(tag)

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.others.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# Head\n##### no head", "<h3>Head</h3><p>##### no head</p>"),
        ("a **bold** and *light* 2*3*4", "<p>a <strong>bold</strong> and <em>light</em> 2*3*4</p>"),
        ("***both*** **a *b***", "<p><strong><em>both</em></strong> <strong>a <em>b</em></strong></p>"),
        ("`a < b` **`c`**", "<p><code>a &lt; b</code> <strong><code>c</code></strong></p>"),
        ("- one\n  more\n- two", "<ul><li>one<br>more</li><li>two</li></ul>"),
        (
            "1. one\n   - a\n     more\n   - b\n       1) c\n2. two\n\t- d",
            '<ol start="1"><li>one<ul><li>a<br>more</li><li>b<ol start="1"><li>c</li></ol></li></ul></li>'
            "<li>two<ul><li>d</li></ul></li></ol>",
        ),
        ("  - a\n- b\n   * c", "<ul><li>a</li><li>b</li><li>c</li></ul>"),
        (
            "- a\n  - ```\n    x\n    ```\n  ```\n  y\n  ```\n- b",
            '<ul><li>a<ul><li><pre data-language=""><code>x</code></pre><pre data-language=""><code>y</code></pre>'
            "</li></ul></li><li>b</li></ul>",
        ),
        ("3. three\n4. four", '<ol start="3"><li>three</li><li>four</li></ol>'),
        ("> said\n> twice", "<blockquote>said<br>twice</blockquote>"),
        ("```py\nif a < b:\n    *c*\n```", '<pre data-language="py"><code>if a &lt; b:\n    *c*</code></pre>'),
        ("```\nstill being writ", '<pre data-language=""><code>still being writ</code></pre>'),
        ("- ```\n  x\n  ```\n- y", '<ul><li><pre data-language=""><code>x</code></pre></li><li>y</li></ul>'),
        (
            "[see *it*](https://a.b/c_(d))",
            '<p><a href="https://a.b/c_(d)" target="_blank" rel="noopener noreferrer">see <em>it</em></a></p>',
        ),
        ("[no](ftp://a.b) [no](javascript:a)", "<p>[no](ftp://a.b) [no](javascript:a)</p>"),
        ("a \x000\x00 b", "<p>a 0 b</p>"),
        ("", ""),
    ],
)
def test_what_it_makes_of_a_text(render, text, html):
    assert render(text) == html


def check(render, text):
    page = Page(render(text))
    for tag, attributes in page.elements:
        assert tag in TAGS and set(attributes) <= ATTRIBUTES.get(tag, set()), text
        if tag == "a":
            assert attributes["href"].startswith(("http://", "https://")) and "noopener" in attributes["rel"], text
    assert not page.open and not page.others, text
    return page


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_becomes_markup(render, piece):
    for around in ("{}", "`{}`", "**{}**", "[{}](https://a.b)", "[a](https://a.b/{})", "```{}\ncode", "- {}\n> {}"):
        check(render, around.format(piece, piece))


def test_no_mixture_of_texts_becomes_markup(render):
    generator = random.Random(0)
    for _ in range(3000):
        check(render, "".join(generator.choices(PIECES, k=generator.randrange(1, 12))))


def test_no_letter_is_lost(render):
    generator = random.Random(1)
    pieces = [piece for piece in PIECES if not piece.startswith("```") and "\0" not in piece and "](" not in piece]
    for _ in range(1000):
        text = "".join(f"{generator.choice(pieces)}w{i}" for i in range(8))
        shown = check(render, text).text
        assert all(f"w{i}" in shown for i in range(8)), text
