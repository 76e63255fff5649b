"""What `bench server` measures: the same requests through the real server and without, whole answers, nothing left."""

import json
import socket
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from flask import Flask, request
from tqdm import tqdm

from nanochat_jax import cli
from nanochat_jax.bench import server
from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.server import app as served
from nanochat_jax.server.app import create_app

TINY = Path(__file__).parent / "tiny.py"


@pytest.fixture
def ports(monkeypatch):
    """Where servers listened; afterwards nobody does, and no thread is left."""
    ports, before, listening = [], set(threading.enumerate()), server.listening

    def noting(*where):
        listens = listening(*where)
        ports.append(listens.port)
        return listens

    monkeypatch.setattr(server, "listening", noting)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # a thread that stays, whoever shows a bar
    yield ports
    assert ports and not set(threading.enumerate()) - before
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.fixture
def bench(capsys, ports):
    """Runs `bench server` and gives its status, its figures and stderr."""

    def run(*words):
        small = ("--experiment", TINY, "--model.depth", 1, "--json")
        status = cli.main(["bench", "server", *map(str, [*words, *small])])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return run


def test_the_server_and_the_engine_answer_the_same_requests_whole(bench, monkeypatch):
    asked, usages, warm = [], [], []
    stream, whole_answer, warm_up = Engine.stream, server.whole_answer, served.warm_up

    def asking(engine, prompt, sampling):
        asked.append((tuple(prompt), sampling))
        return stream(engine, prompt, sampling)

    def answered(times, usage, tokens):
        usages.append((usage["prompt_tokens"], usage["completion_tokens"]))
        return whole_answer(times, usage, tokens)

    def warming(engine):
        warm_up(engine)
        warm.append(len(engine.compiled))

    monkeypatch.setattr(Engine, "stream", asking)
    monkeypatch.setattr(server, "whole_answer", answered)
    monkeypatch.setattr(served, "warm_up", warming)
    few = ("--tokenizer.vocab-size", 12)  # nine of them special, two of which would end an answer
    status, figures, err = bench("--rows", 1, 3, "--repeat", 2, *few)
    assert status == 0 and "first_token_p90_ms" in err
    assert (figures["prompt_tokens"], figures["answer_tokens"], figures["repeat"]) == (32, 16, 2)
    assert figures["engine"].startswith("engine: 3 rows of 64 tokens") and [figures["compilations"]] == warm
    # A round that does not count and two that do, in each of which 1 and 3 ask the server, then the engine.
    assert usages == [(32, 16)] * 24 and sorted(Counter(asked).values()) == [6, 6, 12]
    records = figures["speeds"]
    whose = [(record["of"], record["clients"], record["requests"]) for record in records]
    assert whose == [("server", 1, 2), ("engine", 1, 2), ("server", 3, 6), ("engine", 3, 6)]
    for record in records:
        seconds = record["answered_median_ms"] / 1000
        assert record["tok_per_sec"] == pytest.approx(16 * record["clients"] / seconds)
        assert record["requests_per_sec"] == pytest.approx(record["clients"] / seconds)
        for name in ("answered", "first_token", "token"):
            assert 0 <= record[f"{name}_p10_ms"] <= record[f"{name}_median_ms"] <= record[f"{name}_p90_ms"]
        assert 0 < record["first_token_p10_ms"] < record["answered_p90_ms"]
    for record in records[::2]:
        assert 0 < record["lowest_ratio"] <= record["ratio"] <= record["highest_ratio"]


def test_a_ratio_is_of_the_same_round(bench, monkeypatch):
    """The machine is slower in every round than in the one before; the server takes twice as long as the engine."""
    seconds, answer = iter([9, 9, 2, 1, 20, 10, 800, 400]), server.Answer(0.5, 0.1)
    monkeypatch.setattr(server, "at_once", lambda ask, count: server.Round(next(seconds), [answer] * count))
    monkeypatch.setattr(served, "warm_up", lambda engine: None)
    _, figures, _ = bench("--rows", 2, "--repeat", 3)
    slow, fast = figures["speeds"]
    assert (slow["ratio"], slow["lowest_ratio"], slow["highest_ratio"]) == (0.5, 0.5, 0.5)
    assert (slow["answered_median_ms"], fast["answered_median_ms"], fast["tok_per_sec"]) == (20_000, 10_000, 3.2)


def test_a_server_that_refuses_is_one_line(bench, monkeypatch):
    monkeypatch.setattr(server, "create_app", partial(create_app, max_requests=0))
    monkeypatch.setattr(served, "warm_up", lambda engine: None)
    status, figures, err = bench("--rows", 2)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and figures is None and len(errors) == 1 and "Traceback" not in err
    assert "the server answered 503" in errors[0] and "requests are waiting already" in errors[0]


DELTA = 'data: {"choices": [{"delta": %s}]}\n\n'
TEXT, END = DELTA % '{"content": "So"}', 'data: {"choices": [{"delta": {}}], "usage": {"completion_tokens": 2}}\n\n'


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([TEXT, 'data: {"error": {"message": "no more"}}\n\n', "data: [DONE]\n\n"], "within an answer: no more"),
        ([TEXT, TEXT.replace("]}", '], "usage": {"completion_tokens": 1}}'), "data: [DONE]\n\n"], "answer of 1 tokens"),
        ([TEXT, TEXT, "data: [DONE]\n\n"], "an unknown number of tokens"),
        ([END, "data: [DONE]\n\n"], "in 0 pieces"),
        ([], "in 0 pieces"),
        ([TEXT, OSError("gone"), END], "the server broke off a request|an unknown number of tokens"),
    ],
)
def test_what_is_not_a_whole_answer_is_an_error(events, says, monkeypatch, ports):
    monkeypatch.setattr(served, "warm_up", lambda engine: None)
    app = Flask(__name__)
    app.config["ENGINE"] = None

    @app.post("/v1/chat/completions")
    def chat():
        request.get_data()  # Werkzeug waits for a client that still sends

        def saying():
            for event in events:
                if isinstance(event, Exception):
                    raise event
                yield event

        response = app.response_class(saying(), mimetype="text/event-stream")
        response.call_on_close(partial(time.sleep, 0.1))  # a thread that is there when the client has gone
        return response

    with server.serving(app) as port, pytest.raises(UserError, match=says):
        server.streamed(port, {"max_tokens": 2})


def test_nobody_there_is_an_error(ports):
    listener = socket.create_server(("127.0.0.1", 0))
    ports.append(listener.getsockname()[1])
    listener.close()
    with pytest.raises(UserError, match="the server broke off a request"):
        server.streamed(ports[0], {"max_tokens": 2})


def test_the_clients_are_as_many_as_serve_answers_at_once():
    assert (1, cli.ServeOptions.rows) == server.CLIENTS


@pytest.mark.parametrize("size", [1, 20, 512, 65_536])
def test_a_prompt_has_as_many_tokens_as_words(size):
    tokenizer = server.worded(size)
    words = [0, (tokenizer.vocab_size - 10) // 2, tokenizer.vocab_size - 10]
    assert tokenizer.vocab_size == max(size, 10)
    assert tokenizer.encode(tokenizer.decode(words)) == words
    ids = tokenizer.render_for_completion({"messages": [{"role": "user", "content": tokenizer.decode(words)}]})
    assert len(ids) == server.CHAT_TOKENS + len(words)
