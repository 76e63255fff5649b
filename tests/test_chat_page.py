"""The chat page: its own scripts on its own template, asked and answered by the server's own routes, as a person sees it.

The browser is tests/dom.js, the engine a script. `Tab.look` and the like say what is seen: [button], (disabled one),
{text field}, … while an answer comes.
"""

import json
import re
from collections import deque
from html.parser import HTMLParser
from pathlib import Path

import py_mini_racer
import pytest
from test_server import TOOL, ScriptedEngine, WordTokenizer, done, text

from nanochat_jax.errors import UserError
from nanochat_jax.server import app

STATIC = Path(app.__file__).parent / "static"
STAND_IN = Path(__file__).with_name("dom.js")
VOID = {"meta", "link", "input", "br"}
UNSENT = "The message you are editing was not sent. Discard the change?"
LATER = "The later messages of this conversation will be removed. Continue?"
FULL = "This browser's storage is full: delete old conversations to keep new ones."
NOTHING = "This browser lets the page store nothing: conversations are gone when it is closed."
LOST = "The server cannot be reached. Is it still running?"
BROKEN = "The connection broke before the answer was complete."


class Template(HTMLParser):
    """A page as nested lists: [tag, attributes, *children]."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open = [[]]
        self.feed(html)
        (self.root,) = (child for child in self.open[0] if isinstance(child, list))

    def handle_starttag(self, tag, attrs):
        node = [tag, dict(attrs)]
        self.open[-1].append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.open[-1].append(data)


class Engine(ScriptedEngine):
    """Plays what is sent while it plays."""

    max_len = 512

    def __init__(self):
        super().__init__()
        self.queue = deque()

    def stream(self, prompt_ids, sampling):
        self.calls.append((prompt_ids, sampling))
        while (event := self.queue.popleft()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event


class Browser:
    """Tabs with one storage, and the server they talk to."""

    def __init__(self, context):
        self.context = context
        self.engine = Engine()
        self.serve()
        page = self.client.get("/").text
        markdown, chat = ((STATIC / name).read_text(encoding="utf-8") for name in ("markdown.js", "chat.js"))
        imported = 'import { renderMarkdown } from "./markdown.js";'
        assert imported in chat and "import" not in chat.replace(imported, "")
        source = markdown.replace("export function", "function") + chat.replace(imported, "")
        self.call("start", Template(page).root, source)

    def serve(self, **options):
        self.client = app.create_app(self.engine, WordTokenizer(), model_name="tiny/sft", **options).test_client()

    def call(self, name, *args):
        found = self.context.eval(f"JSON.stringify({name}(...{json.dumps(args)}) ?? null)")
        return json.loads(found)

    def set(self, name, value):
        self.context.eval(f"world.{name} = {json.dumps(value)}")

    def open(self):
        number = self.context.eval("world.tabs.push(new Tab())") - 1
        return Tab(self, f"world.tabs[{number}]")

    @property
    def storage(self):
        return dict(json.loads(self.context.eval("JSON.stringify([...world.storage])")))

    def store(self, **values):
        for key, value in values.items():
            value = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            self.call("world.storage.set.bind(world.storage)", "nanochat." + key.replace("__", "."), value)


class Tab:
    def __init__(self, browser, name):
        self.browser, self.name = browser, name
        self.chunks = None

    def do(self, method, *args):
        """Calls a method of the stand-in's tab, or of what is found from there."""
        return self.browser.call(f"((...args) => {self.name}.{method}(...args))", *args)

    def get(self, field):
        return json.loads(self.browser.context.eval(f"JSON.stringify({self.name}.{field})"))

    def set(self, field, value):
        self.browser.context.eval(f"{self.name}.{field} = {json.dumps(value)}")

    # What a person does.

    def wait(self, milliseconds):
        until = self.browser.context.eval("world.clock") + milliseconds
        while self.do("step", until):
            pass

    def click(self, label, where="body", agree=None):
        return self._asked(agree, "click", label, where)

    def press(self, key, agree=None, **modifiers):
        return self._asked(agree, "press", key, modifiers)

    def reload(self, agree):
        return self._asked(agree, "reload")

    def _asked(self, agree, *action):
        """Does it; the question that is then asked, answered by `agree`; without that it must not come."""
        self.set("asked", [])
        self.set("agree", agree)
        self.do(*action)
        self.set("agree", None)
        questions = self.get("asked")
        assert len(questions) == (agree is not None), questions
        return questions[0] if questions else None

    def type(self, text, where=None):
        self.do("type", text, where)

    def ask(self, text):
        self.type(text, "#input")
        self.press("Enter")

    # What a person sees, once the next frame is drawn.

    @property
    def messages(self):
        self.wait(20)
        return self.do("items", "#messages")

    @property
    def history(self):
        self.wait(20)
        return self.do("items", "#history")

    def look(self, where):
        self.wait(20)
        (seen,) = self.do("look", where)
        return seen

    @property
    def focus(self):
        return self.do("focused")

    # What the server does.

    @property
    def sent(self):
        """The body of the last request."""
        return json.loads(self.do("request")["body"])

    def begin(self, *events, cut=None):
        """The server's answer to the last request, and these events of it, in pieces of `cut` bytes."""
        request = self.do("request")
        self.wait(100)
        self.browser.engine.queue.clear()
        response = self.browser.client.open(
            request["path"], method=request["method"], headers=request["headers"], data=request["body"]
        )
        if response.status_code != 200:
            self.do("respond", response.status_code, response.text)
            return
        self.chunks = response.iter_encoded()
        self.do("respond", 200)
        self.push(next(self.chunks), cut)
        self.more(*events, cut=cut)

    def more(self, *events, cut=None):
        for event in events:
            self.browser.engine.queue.append(event)
            self.push(next(self.chunks), cut)

    def finish(self, *events, cut=None):
        self.more(*events, cut=cut)
        self.browser.engine.queue.append(None)
        self.push(b"".join(self.chunks), cut)
        self.do("push", None)

    def push(self, data, cut=None):
        cut = cut or len(data)
        self.do("push", *(list(data[i : i + cut]) for i in range(0, len(data), cut)))

    def answer(self, *events, cut=None):
        self.begin(cut=cut)
        self.finish(*events, cut=cut)

    def talk(self, *pairs):
        for question, answer in pairs:
            self.ask(question)
            self.answer(text(answer), done(tokens=2))
            self.wait(20)


@pytest.fixture(scope="module")
def context():
    context = py_mini_racer.MiniRacer()
    context.eval(STAND_IN.read_text(encoding="utf-8"))
    return context


@pytest.fixture
def browser(context):
    browser = Browser(context)
    yield browser
    assert json.loads(context.eval("JSON.stringify(world.missing)")) == []


@pytest.fixture
def tab(browser):
    return browser.open()


def said(words, tokens=2, speed=20):
    """A whole answer as it is seen."""
    return f"Model: {words} [Copy] [Regenerate] {tokens} tokens, {speed} tok/s"


def asked(words):
    return f"You: {words} [Copy] [Edit]"


def test_a_question_is_answered(tab):
    assert tab.look("#empty").startswith("What would you like to talk about?") and tab.messages == []
    assert tab.focus == "Message" and tab.history == []
    tab.ask("What is 12 + 7?")
    assert tab.messages == ["You: What is 12 + 7? [Copy] (Edit)", "Model: …"]
    assert tab.look("#empty") == "" and tab.look("#composer").startswith("{} [Stop]")
    assert tab.get("document.getElementById('messages').getAttribute('aria-busy')") == "true"
    tab.begin(text("It is "))
    assert tab.messages[1] == "Model: It is …"
    tab.more(text("**19**"))
    assert tab.messages[1] == "Model: It is 19 …"
    tab.finish(done(tokens=3))
    assert tab.get("document.getElementById('messages').getAttribute('aria-busy')") == "false"
    assert re.fullmatch(r"Model: It is 19 \[Copy\] \[Regenerate\] 3 tokens, \d+ tok/s", tab.messages[1])
    assert tab.messages[0] == asked("What is 12 + 7?") and tab.look("#composer").startswith("{} [Send]")
    assert tab.look("#model") == "tiny/sft" and tab.history == ["[What is 12 + 7?] [Delete What is 12 + 7?]"]


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 100])
def test_a_stream_may_be_cut_anywhere(tab, cut):
    tab.ask("Grüße")
    raw = (
        'data: {"choices": [{"delta": {"content": "é€\U0001f600ß"}}]}\n\n'.encode()
    )  # ours escapes them, others' may not
    tab.begin(text("Naïve 😀: "), cut=cut)
    tab.push(raw, cut)
    tab.finish(TOOL, text("\u2028end"), done(), cut=cut)
    assert tab.messages[1].startswith("Model: Naïve 😀: é€😀ß Tool 12+7 → 19 end [Copy]")


def test_each_piece_is_shown_before_the_next_comes(tab):
    tab.ask("Count")
    tab.begin()
    for i in range(1, 4):
        tab.more(text(f"{i} "))
        assert tab.messages[1] == f"Model: {' '.join(str(j) for j in range(1, i + 1))} …"


def test_the_whole_conversation_and_the_settings_are_sent(tab):
    tab.talk(("one", "two"))
    assert tab.messages == [asked("one"), said("two")]
    tab.ask("three")
    tab.answer(text("a "), TOOL, {"type": "tool", "expression": "1/0", "result": None}, text(" b"), done())
    tab.click("Sampling settings")
    for name, value in (("temperature", "0.333"), ("top_k", "0"), ("max_tokens", "9999")):
        tab.type(value, f"#{name}")
    assert [tab.look(f"#{name}-value") for name in ("temperature", "top_k", "max_tokens")] == ["0.35", "0", "512"]
    tab.ask("  four\n\n")
    request = tab.do("request")
    assert (request["path"], request["method"]) == ("/v1/chat/completions", "POST")
    assert request["headers"] == {"Content-Type": "application/json"}
    call = (
        {"type": "python", "text": "12+7"},
        {"type": "python_output", "text": "19"},
        {"type": "python", "text": "1/0"},
    )
    assert tab.sent == {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": "three"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "a "}, *call, {"type": "text", "text": " b"}],
            },
            {"role": "user", "content": "four"},
        ],
        "stream": True,
        "temperature": 0.35,
        "top_k": 0,
        "max_tokens": 512,
    }
    tab.answer(text("fine"), done())
    assert "fine" in tab.messages[-1]  # the server took it
    tab.do("reload")
    tab.ask("five")
    assert tab.sent["temperature"] == 0.35 and tab.sent["max_tokens"] == 512


def test_old_messages_that_were_left_out_are_counted(browser, tab):
    words = "w " * 100
    tab.talk(("one " + words, "two"), ("three " + words, "four"))
    tab.ask("five " + words)
    tab.answer(text("six"), done())
    note = "The oldest 2 messages no longer fit the model's context and were left out."
    assert note in tab.messages[-1] and all("left out" not in seen for seen in tab.messages[:-1])
    browser.engine.max_len = 10**6
    browser.serve()
    tab.talk(("x" * 30_000, "a"), ("y" * 30_000, "b"))
    tab.ask("z" * 30_000)
    assert [message["content"][0] for message in tab.sent["messages"]][::2] == ["y", "z"]
    tab.answer(text("c"), done())
    assert note.replace("2", "8") in tab.messages[-1]
    tab.do("reload")
    assert note.replace("2", "8") in tab.messages[-1]


@pytest.mark.parametrize("how", ["Stop", "Escape"])
def test_stopping_keeps_what_has_come(browser, tab, how):
    tab.ask("Why?")
    tab.begin(text("Because"))
    tab.type("next", "#input")
    tab.press("Enter")  # waits until the answer is there
    assert tab.do("request")["number"] == 1 and tab.look("#input") == "{next}"
    tab.click("Stop") if how == "Stop" else tab.press("Escape")
    assert tab.do("request")["aborted"]
    assert tab.messages == [asked("Why?"), "Model: Because Stopped. [Copy] [Regenerate]"]
    tab.press("Enter")
    if how == "Stop":
        assert tab.do("request")["number"] == 2, "the focus is in the input"
    assert [message["role"] for message in tab.sent["messages"]] == ["user", "assistant", "user"]
    tab.press("Escape")  # before anything came
    assert tab.messages[2:] == [asked("next"), "Model: Stopped. [Copy] [Regenerate]"]
    tab.ask("again")
    assert [message["content"] for message in tab.sent["messages"]][::2] == ["Why?", "again"]


def fail_busy(browser, tab):
    browser.serve(max_requests=0)
    tab.begin()


def fail_proxy(browser, tab):
    tab.do("respond", 502, "<h1>Bad gateway</h1>")


def fail_engine(browser, tab):
    tab.begin()
    tab.finish(RuntimeError("device lost"))


def fail_user_error(browser, tab):
    tab.begin()
    tab.finish(UserError("<b>too</b> long"))


def fail_unreachable(browser, tab):
    tab.do("lose")


def fail_lost(browser, tab):
    tab.begin()
    tab.do("lose")


def fail_short(browser, tab):
    tab.begin()
    tab.do("push", None)


FAILURES = {
    fail_busy: "0 requests are waiting already; try again soon",
    fail_proxy: "The server answered 502.",
    fail_engine: "generation failed; the server log says why",
    fail_user_error: "<b>too</b> long",
    fail_unreachable: LOST,
    fail_lost: LOST,
    fail_short: BROKEN,
}
failures = pytest.mark.parametrize(("fail", "words"), FAILURES.items(), ids=[fail.__name__ for fail in FAILURES])


@failures
def test_an_error_is_shown_and_the_question_kept(browser, tab, fail, words):
    tab.ask("Why?")
    fail(browser, tab)
    failed = [asked("Why?"), f"Model: {words} [Copy] [Try again]"]
    assert tab.messages == failed
    tab.do("reload")
    assert tab.messages == failed
    browser.serve()
    tab.click("Try again")
    assert tab.sent["messages"] == [{"role": "user", "content": "Why?"}]
    tab.answer(text("So."), done(tokens=1))
    assert tab.messages[1].startswith("Model: So. [Copy] [Regenerate] 1 token, ")


def test_an_error_in_the_middle_keeps_what_has_come(tab):
    tab.ask("Why?")
    tab.begin(text("Be"))
    tab.do("lose")
    assert tab.messages == [asked("Why?"), f"Model: Be {LOST} [Copy] [Try again]"]


@failures
def test_what_was_to_be_replaced_comes_back_after_an_error(browser, tab, fail, words):
    tab.talk(("one", "two"), ("three", "four"))
    before, stored = tab.messages, browser.storage
    tab.click("Regenerate", "#messages 3")
    assert browser.storage == stored
    fail(browser, tab)
    assert tab.messages == [*before, words]
    assert tab.click("Regenerate", "#messages 1", agree=True) == LATER
    fail(browser, tab)
    assert tab.messages == [*before[:2], words, *before[2:]]
    assert browser.storage == stored


@failures
def test_an_edited_question_is_not_lost_by_an_error(browser, tab, fail, words):
    tab.talk(("one", "two"), ("three", "four"))
    before, stored = tab.messages, browser.storage
    for number, agree in ((2, None), (0, True)):
        tab.click("Edit", f"#messages {number}")
        tab.type("other")
        tab.click("Send", f"#messages {number}", agree=agree)
        fail(browser, tab)
        editor = "{other} [Cancel] [Send]"
        assert tab.messages == [*before[:number], editor, words, *before[number + 1 :]]
        assert tab.focus == "Edit message" and browser.storage == stored
        tab.press("Escape")
        assert tab.messages == before


def test_stopping_before_anything_came_brings_back_what_was_to_be_replaced(browser, tab):
    tab.talk(("one", "two"))
    before = tab.messages
    tab.click("Regenerate")
    tab.begin()
    tab.press("Escape")
    assert tab.messages == before
    tab.click("Edit")
    tab.type("other")
    tab.press("Enter")
    tab.press("Escape")
    assert tab.messages == ["{other} [Cancel] [Send]", before[1]]
    tab.reload(agree=True)
    assert tab.messages == before


def test_regenerating_asks_before_later_messages_are_lost(tab):
    tab.talk(("one", "two"), ("three", "four"))
    before = tab.messages
    assert tab.click("Regenerate", "#messages 1", agree=False) == LATER
    assert tab.messages == before and tab.do("request")["number"] == 2
    assert tab.click("Regenerate", "#messages 1", agree=True) == LATER
    assert tab.sent["messages"] == [{"role": "user", "content": "one"}]
    assert tab.messages == ["You: one [Copy] (Edit)", "Model: …"]
    tab.answer(text("2"), done())
    assert tab.messages[1].startswith("Model: 2 [Copy] [Regenerate]")
    tab.click("Regenerate")  # the last answer: no question
    tab.answer(text("II"), done())
    tab.do("reload")
    assert tab.messages[1].startswith("Model: II [Copy] [Regenerate]")


def test_editing(tab):
    tab.talk(("one", "two"), ("three", "four"))
    before = tab.messages
    tab.click("Edit", "#messages 0")
    assert tab.messages == ["{one} [Cancel] [Send]", *before[1:]] and tab.focus == "Edit message"
    tab.type("other")
    tab.press("Escape")
    assert tab.messages == before and tab.focus == "Edit"
    tab.click("Edit", "#messages 0")
    tab.click("Cancel")
    assert tab.messages == before
    tab.click("Edit", "#messages 0")
    tab.type("  ")
    tab.press("Enter")  # says nothing
    tab.type("other")
    tab.press("Enter", shiftKey=True)
    assert tab.messages[0] == "{other\n} [Cancel] [Send]"
    assert tab.press("Enter", agree=False) == LATER
    assert tab.messages[0] == "{other\n} [Cancel] [Send]" and tab.do("request")["number"] == 2
    assert tab.press("Enter", agree=True) == LATER
    assert tab.sent["messages"] == [{"role": "user", "content": "other"}]
    tab.answer(text("new"), done(tokens=4))
    assert tab.messages == [asked("other"), said("new", 4, 40)]
    assert tab.history == ["[other] [Delete other]"]
    tab.click("Edit")
    tab.type("last")
    tab.click("Send", "#messages 0")  # the last question: not asked
    assert tab.sent["messages"] == [{"role": "user", "content": "last"}]


def test_what_is_being_edited_is_not_lost_unasked(browser, tab):
    tab.talk(("other", "0"))
    tab.click("+ New chat")
    tab.talk(("one", "1"), ("two", "2"))
    actions = [
        lambda agree: tab.press("Enter", agree=agree),
        lambda agree: tab.click("Regenerate", "#messages 3", agree=agree),
        lambda agree: tab.click("Edit", "#messages 2", agree=agree),
        lambda agree: tab.click("other", agree=agree),
        lambda agree: tab.click("+ New chat", agree=agree),
        lambda agree: tab.press("O", agree=agree, ctrlKey=True, shiftKey=True),
    ]
    tab.type("three", "#input")
    for act in actions:
        tab.click("Edit", "#messages 0")
        tab.type("  one\n")  # says the same: nothing to lose
        tab.type("changed")
        if act is actions[0]:
            tab.do("all('#input')[0].focus")
        before = tab.messages
        assert before[0] == "{changed} [Cancel] [Send]" and act(False) == UNSENT
        assert tab.messages == before and tab.do("request")["number"] == 3 and tab.look("#input").startswith("{three}")
        tab.click("Cancel", "#messages 0")
    assert tab.reload(agree=False) == "Leave?" and len(tab.messages) == 4, "of what is in the input"
    tab.type("", "#input")
    for act in (lambda agree: tab.click("other", agree=agree), lambda agree: tab.reload(agree=agree)):
        tab.click("Edit", "#messages 0")
        tab.type("one ")
        tab.do("reload")
        tab.click("Edit", "#messages 0")
        tab.type("changed")
        assert act(True)
        assert "{changed}" not in tab.messages[0]
        if len(tab.messages) == 2:
            tab.click("one")
    tab.click("Edit", "#messages 0")
    tab.type("changed")
    assert tab.click("Delete one", agree=True) == "Delete “one”?"  # the whole conversation: not asked twice


def test_what_is_being_edited_outlives_what_another_tab_does(browser, tab):
    other = browser.open()
    tab.talk(("one", "1"), ("two", "2"))
    other.wait(20)
    other.click("one")
    other.click("Edit", "#messages 2")
    other.type("changed")
    tab.talk(("three", "3"))
    assert other.messages[2:5] == ["{changed} [Cancel] [Send]", said("2"), asked("three")]
    assert tab.click("Regenerate", "#messages 1", agree=True) == LATER
    tab.answer(text("I"), done(tokens=2))
    assert other.messages == [asked("one"), said("I")]  # it is a message no more


def test_a_key_that_an_input_method_takes_does_nothing_else(tab):
    tab.talk(("one", "two"))
    tab.type("にほん", "#input")
    tab.press("Enter", isComposing=True)
    assert tab.look("#input") == "{にほん}" and tab.do("request")["number"] == 1
    tab.press("Enter")
    tab.begin(text("は"))
    tab.press("Escape", isComposing=True)
    assert tab.messages[3] == "Model: は …"
    tab.press("Escape")
    tab.click("Edit", "#messages 0")
    tab.type("いち")
    for key in ("Enter", "Escape"):
        tab.press(key, isComposing=True)
        assert tab.messages[0] == "{いち} [Cancel] [Send]"


def test_keyboard(tab):
    tab.type("one", "#input")
    tab.press("Enter", shiftKey=True)
    assert tab.look("#input") == "{one\n}" and tab.messages == []
    tab.type("  \n ")
    tab.press("Enter")
    assert tab.messages == []
    tab.talk(("one", "two"))
    tab.press("O", ctrlKey=True, shiftKey=True)
    assert tab.messages == [] and tab.focus == "Message"


def test_the_menu_of_narrow_screens(tab):
    def is_open():
        expanded = tab.get("document.getElementById('menu').getAttribute('aria-expanded')")
        shade = not tab.get("document.getElementById('shade').hidden")
        assert (expanded == "true") == shade == (tab.get("document.body.className") == "menu-open")
        return shade

    tab.talk(("one", "two"))
    closings = [
        lambda: tab.press("Escape"),
        lambda: tab.do("all('#shade')[0].click"),
        lambda: tab.click("one"),
        lambda: tab.click("+ New chat"),
    ]
    for close in closings:
        assert not is_open()
        tab.click("Conversations", "header")
        assert is_open() and tab.focus == "+ New chat"
        tab.do("all('#input')[0].focus")  # what the menu covers
        assert tab.focus == "+ New chat"
        close()
        assert not is_open()
        if close is closings[0]:
            assert tab.focus == "Conversations"


def test_the_focus_goes_where_one_writes_next_but_not_on_touch_screens(browser, tab):
    tab.talk(("one", "1"))
    for act in (lambda: tab.click("Regenerate"), lambda: tab.click("+ New chat"), lambda: tab.click("one")):
        act()
        assert tab.focus == "Message"
    browser.set("touch", True)
    tab.click("+ New chat")
    assert tab.focus == "+ New chat"


def test_notes_say_how_an_answer_ended(tab):
    ends = [
        (
            ([text("a"), done("length", 256)]),
            "a The answer reached its length limit; raise Max tokens to let it go on.",
        ),
        (([text("a"), done("length", 9)]), "a The answer filled the model's context."),
        (([done("stop", 1)]), "The model said nothing."),
        (([TOOL, done()]), "Tool 12+7 → 19"),
        (([{**TOOL, "result": None}, done()]), "Tool 12+7 → failed"),
    ]
    for events, seen in ends:
        tab.ask("Go")
        tab.answer(*events)
        assert tab.messages[-1].startswith(f"Model: {seen} [Copy] [Regenerate] ")


def test_suggestions_ask(tab):
    tab.click("Why is the sky blue?")
    assert tab.sent["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]


def test_conversations_are_kept(browser, tab):
    tab.talk(("first " + "😀" * 70, "1"))
    tab.click("+ New chat")
    assert tab.messages == []
    tab.talk(("second", "2"))
    title = "first " + "😀" * 54
    listed = ["[second] [Delete second]", f"[{title}] [Delete {title}]"]
    assert tab.history == listed
    tab.do("reload")
    assert tab.messages == [asked("second"), said("2")] and tab.history == listed
    tab.click(title)
    assert tab.messages == [asked("first " + "😀" * 70), said("1")]
    assert [node[1].get("class") for node in tab.do("elements", "#history") if node[0] == "li"] == ["", "current"]
    tab.talk(("third", "3"))
    assert [message["content"] for message in tab.sent["messages"]][::2] == ["first " + "😀" * 70, "third"]
    tab.do("reload")
    assert len(tab.messages) == 4 and tab.history == listed
    other = browser.open()  # begins anew
    assert other.messages == [] and other.history == listed


def test_deleting_asks(browser, tab):
    tab.talk(("one", "1"))
    tab.click("+ New chat")
    tab.talk(("two", "2"))
    stored = browser.storage
    assert tab.click("Delete one", agree=False) == "Delete “one”?"
    assert len(tab.history) == 2 and browser.storage == stored
    tab.click("Delete one", agree=True)
    assert tab.history == ["[two] [Delete two]"] and tab.messages[0] == asked("two")
    tab.ask("more")
    tab.begin(text("a"))
    tab.click("Delete two", agree=True)  # while it is answered
    assert tab.do("request")["aborted"]
    assert tab.history == tab.messages == [] and "[Send]" in tab.look("#composer")
    tab.do("reload")
    assert tab.history == tab.messages == [] and browser.storage == {}


def test_an_answer_to_a_conversation_that_was_left(tab):
    tab.talk(("one", "1"))
    tab.click("+ New chat")
    tab.ask("two")
    tab.begin(text("a "))
    tab.more(text("b"))
    tab.click("one")
    assert tab.do("request")["aborted"] and "[Send]" in tab.look("#composer")
    assert tab.messages == [asked("one"), said("1")]
    tab.ask("three")
    assert tab.messages[2:] == ["You: three [Copy] (Edit)", "Model: …"]
    tab.answer(text("3"), done())
    assert len(tab.messages) == 4
    tab.click("two")
    two = [asked("two"), "Model: a b Stopped. [Copy] [Regenerate]"]
    assert tab.messages == two
    tab.click("Edit")
    tab.type("other")
    tab.press("Enter")  # nothing comes in its place
    tab.click("one")
    assert len(tab.messages) == 4 and tab.messages[0] == asked("one")
    tab.click("two")
    assert tab.messages == two


def test_reloading_while_an_answer_comes(browser, tab):
    tab.ask("one")
    tab.do("reload")
    assert tab.messages == [asked("one"), "Model: Not finished. [Copy] [Regenerate]"]
    tab.click("Regenerate")
    tab.begin(text("a"))
    tab.do("reload")
    unfinished = [asked("one"), "Model: a Not finished. [Copy] [Regenerate]"]
    assert tab.messages == unfinished
    tab.click("Regenerate")
    tab.begin()  # nothing of it has come
    tab.do("reload")
    assert tab.messages == unfinished
    tab.click("Regenerate")
    tab.begin(text("a"))
    tab.do("fire", "pagehide")
    tab.do("lose")  # as it is left
    assert LOST not in "".join(tab.messages)
    tab.do("reload")
    assert tab.messages == unfinished
    tab.ask("two")
    tab.do("fire", "pagehide")
    tab.do("fire", "pageshow")  # it was not left
    tab.do("lose")
    assert tab.messages[3] == f"Model: {LOST} [Copy] [Try again]"


def test_two_tabs(browser, tab):
    other = browser.open()
    tab.talk(("one", "1"))
    assert other.history == ["[one] [Delete one]"] and other.messages == []
    other.click("one")
    assert other.messages == [asked("one"), said("1")]
    tab.talk(("two", "2"))
    assert other.messages == tab.messages and len(other.messages) == 4
    other.ask("three")
    other.begin(text("a"))
    tab.talk(("four", "4"))
    assert other.messages[4:] == ["You: three [Copy] (Edit)", "Model: a …"]  # not disturbed
    tab.click("Delete one", agree=True)
    assert other.messages == other.history == [] and other.do("request")["aborted"]
    other.do("reload")
    assert other.history == [] and browser.storage == {}


@pytest.mark.parametrize("damage", ["", "{", "null", '{"id": "x", "mess'])
def test_what_is_damaged_in_storage_is_left_aside(browser, damage):
    messages = [{"role": "user", "text": "one"}, {"role": "assistant", "parts": [], "note": "Stopped."}]
    browser.store(conversation__a={"id": "a", "title": "one", "started": 1, "messages": messages})
    browser.store(conversation__b=damage, conversation__c='{"id": "c"}', conversation__d="5")
    browser.store(settings=damage, theme=damage, token=damage, conversations=damage)
    tab = browser.open()
    assert tab.history == ["[one] [Delete one]"] and tab.look("#theme") == "[Theme: auto]"
    tab.ask("two")
    assert {name: tab.sent[name] for name in ("temperature", "top_k", "max_tokens")} == {
        "temperature": 0.8,
        "top_k": 50,
        "max_tokens": 256,
    }
    tab.click("one")
    assert tab.messages == [asked("one"), "Model: Stopped. [Copy] [Regenerate]"]


def test_a_full_storage_is_said_and_loses_nothing(browser, tab):
    tab.talk(("one " + "x" * 1000, "1"))
    browser.set("room", 1600)
    tab.click("+ New chat")
    tab.ask("two " + "y" * 1000)
    tab.begin(text("2"))
    assert tab.messages[1:] == ["Model: 2 …", FULL]
    tab.finish(done())
    assert len(tab.messages) == 3 and tab.messages[2] == FULL
    one, two = (f"{name} " + letter * 56 for name, letter in (("one", "x"), ("two", "y")))
    tab.click(one)
    tab.click(two)
    assert "Model: 2 [Copy]" in tab.messages[1]
    tab.click(f"Delete {one}", agree=True)
    tab.do("reload")
    assert tab.history == [f"[{two}] [Delete {two}]"] and "Model: 2 [Copy]" in tab.messages[1]


def test_a_forbidden_storage_is_said(browser):
    browser.set("forbidden", True)
    tab = browser.open()
    tab.ask("one")
    tab.begin(text("1"))
    assert tab.messages == ["You: one [Copy] (Edit)", "Model: 1 …", NOTHING]
    tab.finish(done())
    tab.click("+ New chat")
    tab.click("one")
    assert tab.messages[0] == asked("one") and "Model: 1 [Copy]" in tab.messages[1]


def test_stored_settings_are_held_to_their_ranges(browser):
    browser.store(settings={"temperature": -1, "top_k": "x", "max_tokens": 9999})  # of a server with a longer context
    tab = browser.open()
    tab.ask("one")
    assert (tab.sent["temperature"], tab.sent["top_k"], tab.sent["max_tokens"]) == (0, 100, 512)


def old(name):
    return {"id": name, "title": name, "messages": [{"role": "user", "text": name}, {"role": "assistant", "parts": []}]}


def test_the_list_of_earlier_versions_is_taken_over(browser):
    browser.store(conversations=[old("new"), old("old")])
    tab = browser.open()
    assert tab.history == ["[new] [Delete new]", "[old] [Delete old]"]
    tab.click("Delete new", agree=True)
    tab.do("reload")
    assert tab.history == ["[old] [Delete old]"]
    assert set(browser.storage) == {"nanochat.conversation.old", "nanochat.conversations"}


def test_a_list_of_earlier_versions_that_does_not_fit_stays(browser):
    browser.store(conversations=[old("new"), old("old")])
    stored = browser.storage
    browser.set("room", len("".join(key + value for key, value in stored.items())) + 5)
    tab = browser.open()
    assert tab.messages == [FULL] and browser.storage == stored
    browser.set("room", 10**6)
    tab.do("reload")
    assert len(tab.history) == 2


def test_a_server_with_a_token(browser, tab):
    browser.serve(token="s3cret")
    tab.ask("one")
    tab.begin()
    assert "Whoever started it has it." in tab.look("#token-dialog") and tab.focus == "Token"
    tab.press("Escape")
    assert tab.look("#token-dialog") == ""
    assert tab.messages == [asked("one"), "Model: This server needs its token. [Copy] [Try again]"]
    tab.click("Try again")
    tab.begin()
    for wrong in ("", "two words"):
        tab.type(wrong, "#token")
        tab.click("Continue")
        assert tab.look("#token-dialog") != ""
    tab.type("wrong")
    tab.click("Continue")
    tab.wait(20)
    assert tab.do("request")["headers"]["Authorization"] == "Bearer wrong"
    tab.begin()
    assert "That was not the one." in tab.look("#token-dialog") and tab.look("#token") == "{}"
    tab.type("s3cret")
    tab.press("Enter")
    tab.wait(20)
    tab.answer(text("1"), done())
    assert "Model: 1 [Copy]" in tab.messages[1]
    tab.do("reload")
    tab.talk(("two", "2"))
    assert "Model: 2 [Copy]" in tab.messages[3]


def test_copying(tab):
    tab.ask("a *b*")
    tab.answer(text("See:\n```py\n<b>1</b>\n```\n**So** "), TOOL, done())
    tab.click("Copy", "#messages 0")
    tab.click("Copy", "pre")
    tab.click("Copy", ".assistant > .actions")
    assert tab.get("copied") == ["a *b*", "<b>1</b>", "See:\n```py\n<b>1</b>\n```\n**So** [12+7 = 19]"]
    tab.wait(2000)
    tab.set("copied", None)
    tab.click("Copy", "#messages 0")
    assert tab.messages[0] == "You: a *b* [Not allowed] [Edit]"


def test_copied_is_said_for_as_long_while_an_answer_comes(tab):
    tab.ask("Code")
    tab.begin(text("```\none"))
    tab.wait(20)
    tab.click("Copy", "pre")
    for words, shown in ((" more", "Copied"), ("\n```\nend", "Copied"), (".", "Copy")):
        tab.more(text(words))
        tab.wait(700)
        assert f"[{shown}]" in tab.messages[1]
    assert tab.get("copied") == ["one"]


def test_what_does_not_change_while_an_answer_comes_is_left_alone(tab):
    tab.ask("Code")
    tab.begin(text("```\none\n```\ntwo"))
    tab.wait(20)
    tab.do("find('Copy', 'pre').focus")
    tab.more(text(" three\n\nfour"))
    assert tab.messages[1] == "Model: one [Copy] two three four …"
    assert tab.focus == "Copy"


def test_the_page_follows_an_answer_unless_one_has_scrolled_up(tab):
    tab.ask("Go")
    tab.begin(text("a"))
    scroller = "document.getElementById('scroller')"
    for height, top, then in ((1000, 830, 1000), (1000, 800, 800)):
        for name, value in (("scrollHeight", height), ("scrollTop", top), ("clientHeight", 100)):
            tab.set(f"{scroller}.{name}", value)
        tab.more(text("b"))
        tab.wait(20)
        assert tab.get(f"{scroller}.scrollTop") == then


def test_settings_and_theme(tab):
    tab.click("Sampling settings")
    assert tab.look("#settings").startswith("Temperature 0.8 {0.8} Top-k 50 {50} Max tokens 256 {256}")
    tab.click("Sampling settings")
    assert tab.look("#settings") == ""
    for theme in ("light", "dark", "auto", "light"):
        tab.click(tab.look("#theme")[1:-1])
        assert (
            tab.look("#theme") == f"[Theme: {theme}]"
            and tab.get("document.documentElement.getAttribute('data-theme')") == theme
        )
    tab.do("reload")
    assert tab.look("#theme") == "[Theme: light]"


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    '"><svg onload="x">',
    "</span></li><b>",
    "&lt;i&gt;&#60;",
    "[a](javascript:alert(1))",
    '```"><b>\n</code><i>\n```',
    '[a](https://b.c/"onclick="x)',
    "$& $1 ${x} \\",
]
TAGS = {"li", "span", "div", "button", "p", "pre", "code", "br", "a"}
SAFE = "https://b.c/"
ATTRIBUTES = {
    "class",
    "type",
    "title",
    "tabindex",
    "aria-label",
    "aria-current",
    "data-language",
    "href",
    "target",
    "rel",
}


@pytest.mark.parametrize("words", HOSTILE)
def test_what_anyone_writes_is_text(browser, tab, words):
    tab.talk((words, "1"))
    plain = words.replace("\n", " ")
    assert words in tab.do("all('.user > .body')[0].textContent.trim")
    assert tab.history[0].startswith(f"[{words[:60]}] [Delete {words[:60]}]")
    tab.ask("two")
    tab.answer(text(words + "\n\n"), {**TOOL, "expression": words, "result": words}, text("."), done())
    assert f"Tool {plain} → {plain} ." in tab.messages[3].replace("\n", " ")
    tab.ask("three")
    tab.begin()
    tab.finish(UserError(words))
    assert words in tab.messages[5]
    tab.click("Try again")
    tab.push(f"data: {json.dumps({'model': words, 'choices': [{'delta': {}}]})}\n\n".encode())
    tab.do("respond", 200)
    tab.wait(20)
    assert tab.do("all('#model')[0].textContent.trim") == words
    tab.do("reload")
    assert words in tab.do("all('.user > .body')[0].textContent.trim")
    for where in ("#messages", "#history", "#model"):
        for tag, attributes in tab.do("elements", where):
            assert tag in TAGS and set(attributes) <= ATTRIBUTES and attributes.get("href", SAFE).startswith(SAFE)
