"""The server with an engine that plays a script: API, streaming, cancelling, tokens, limits, and the page's Markdown."""

import gc
import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from werkzeug.serving import make_server
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

import nanochat_jax.server
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.model import param_shapes
from nanochat_jax.server.app import bound, create_app, serve, warm_up
from nanochat_jax.server.context import fit
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import Tokenizer

STATIC = Path(nanochat_jax.server.__file__).parent / "static"


class WordTokenizer:
    """One token a word, one a turn."""

    def encode(self, text):
        return text.split()

    def render_for_completion(self, conversation):
        assert conversation["messages"][-1]["role"] == "user"
        ids = ["<bos>"]
        for message in conversation["messages"]:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            ids += [message["role"], *" ".join(texts).split()]
        return ids


class ScriptedEngine:
    """Plays `events`; remembers what it was asked and whether each generation was closed."""

    max_len, max_rows = 64, 8

    def __init__(self, *events):
        self.events = events
        self.calls = []
        self.open = 0

    def stream(self, prompt_ids, sampling):
        self.calls.append((prompt_ids, sampling))
        self.open += 1
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.open -= 1


def text(value):
    return {"type": "text", "text": value}


def done(reason="stop", tokens=3):
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    return {"type": "done", "finish_reason": reason, "usage": usage}


TOOL = {"type": "tool", "expression": "12+7", "result": "19"}
SCRIPT = (text("The sum "), TOOL, text("is 19."), done())


def client_of(engine, **options):
    return create_app(engine, WordTokenizer(), model_name="tiny/sft", **options).test_client()


def user(content="What is 12 + 7?"):
    return {"messages": [{"role": "user", "content": content}]}


def ask(client, **body):
    return client.post("/v1/chat/completions", json=user() | body)


def chunks_of(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else "DONE" for line in lines]


def test_whole_answer_as_openai_gives_it():
    engine = ScriptedEngine(*SCRIPT)
    answer = ask(client_of(engine), temperature=0, top_k=5, top_p=0.5, min_p=0.1, max_tokens=7, seed=3).get_json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny/sft" and answer["id"]
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "The sum is 19.",
        "tools": [{"expression": "12+7", "result": "19"}],
    }
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    ids, sampling = engine.calls[0]
    assert ids == ["<bos>", "user", "What", "is", "12", "+", "7?"]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 5, 0.5, 0.1)
    assert (sampling.max_tokens, sampling.seed) == (7, 3) and engine.open == 0


def test_content_in_parts_as_openai_takes_it():
    engine = ScriptedEngine(*SCRIPT)
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 7?"}]
    assert ask(client_of(engine), messages=[turn("user", parts)]).status_code == 200
    assert engine.calls[0][0] == ["<bos>", "user", "What", "is", "12", "+", "7?"]


def test_streamed_answer_with_a_tool_call():
    response = ask(client_of(ScriptedEngine(*SCRIPT)), stream=True)
    assert response.mimetype == "text/event-stream"
    *chunks, end = chunks_of(response)
    assert end == "DONE" and all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and chunks[0]["truncated_messages"] == 0
    assert deltas[1:] == [
        {"content": "The sum "},
        {"tool": {"expression": "12+7", "result": "19"}},
        {"content": "is 19."},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["completion_tokens"] == 3


def test_usage_in_a_chunk_of_its_own_where_it_is_asked_for():
    *chunks, end = chunks_of(
        ask(client_of(ScriptedEngine(*SCRIPT)), stream=True, stream_options={"include_usage": True})
    )
    *said, last = chunks
    assert end == "DONE" and said[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in said), "who adds up what comes must not count it twice"
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert (last["id"], last["object"]) == (said[0]["id"], "chat.completion.chunk")
    for options in (None, {}, {"include_usage": False}):
        chunks = chunks_of(ask(client_of(ScriptedEngine(*SCRIPT)), stream=True, stream_options=options))
        assert chunks[-2]["choices"] and chunks[-2]["usage"]["total_tokens"] == 10


def test_stop_strings_reach_the_engine():
    engine = ScriptedEngine(*SCRIPT)
    ask(client_of(engine), stop=["STOP", "two"], repetition_penalty=1.5)
    sampling = engine.calls[0][1]
    assert sampling.stop == ("STOP", "two") and sampling.repetition_penalty == 1.5


def test_a_reader_who_leaves_cancels_the_generation():
    engine = ScriptedEngine(*[text("word ")] * 1000, done())
    response = client_of(engine).post("/v1/chat/completions", json={**user(), "stream": True}, buffered=False)
    reader = iter(response.response)
    for _ in range(3):
        next(reader)
    assert engine.open == 1
    response.close()
    assert engine.open == 0


def test_a_broken_connection_cancels_the_generation():
    class Endless(ScriptedEngine):
        def stream(self, prompt_ids, sampling):
            self.open += 1
            try:
                while True:
                    time.sleep(0.005)
                    yield text("word " * 200)
            finally:
                self.open -= 1

    engine = Endless()
    app = create_app(engine, WordTokenizer(), model_name="m", max_requests=1)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        body = json.dumps({**user(), "stream": True})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.read(3000) and engine.open == 1
        assert ask(app.test_client()).status_code == 503, "one place only, and it is taken"
        response.close()
        connection.close()
        deadline = time.monotonic() + 10
        while engine.open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.open == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_places_are_given_back():
    engine = ScriptedEngine(*SCRIPT)
    client = client_of(engine, max_requests=1)
    for stream in (True, False, True, False):
        response = ask(client, stream=stream)
        assert response.status_code == 200 and response.text
        response.close()
    failing = client_of(ScriptedEngine(RuntimeError("boom")), max_requests=1)
    assert [ask(failing).status_code for _ in range(3)] == [500, 500, 500]
    # A response that is closed before anyone reads it has not even started its generator.
    for _ in range(3):
        response = client.post("/v1/chat/completions", json={**user(), "stream": True}, buffered=False)
        assert response.status_code == 200
        response.close()


@pytest.mark.parametrize(("rows", "places"), [(8, 32), (20, 40)])
def test_more_rows_have_more_places(rows, places):
    engine = ScriptedEngine(*SCRIPT)
    engine.max_rows = rows
    client, body = client_of(engine), {**user(), "stream": True}
    held = [client.post("/v1/chat/completions", json=body, buffered=False) for _ in range(places)]
    assert {response.status_code for response in held} == {200}
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 503 and f"{places} requests are waiting" in refused.text
    for response in held:
        response.close()


def test_a_response_that_nobody_closes_gives_its_place_back():
    engine = ScriptedEngine(*[text("word ")] * 100, done())
    app = create_app(engine, WordTokenizer(), model_name="m", max_requests=1)
    builder = EnvironBuilder(method="POST", path="/v1/chat/completions", json={**user(), "stream": True})
    chunks = app.wsgi_app(builder.get_environ(), lambda *_: None)
    assert b"assistant" in next(iter(chunks)) and ask(app.test_client()).status_code == 503
    del chunks
    gc.collect()
    assert engine.open == 0 and ask(app.test_client()).status_code == 200


def test_token():
    client = client_of(ScriptedEngine(*SCRIPT), token="geheim")
    assert client.get("/health").get_json() == {"status": "ok", "model": "tiny/sft", "token_required": True}
    assert client.get("/").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer gehéim"},
        {"Authorization": "Basic geheim"},
    ):
        response = client.post("/v1/chat/completions", json=user(), headers=headers)
        assert response.status_code == 401 and "token" in response.get_json()["error"]["message"]
        assert client.get("/v1/models", headers=headers).status_code == 401
    for scheme in ("Bearer", "bearer"):  # whose case does not matter, RFC 9110
        response = client.post("/v1/chat/completions", json=user(), headers={"Authorization": f"{scheme} geheim"})
        assert response.status_code == 200


@pytest.mark.parametrize("token", [None, "geheim"])
def test_without_a_token_only_this_machine_by_its_own_name_is_answered(token):
    client = client_of(ScriptedEngine(*SCRIPT), token=token)
    headers = {"Authorization": "Bearer geheim"}
    for host in ("localhost", "LocalHost:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "[::1]"):
        assert client.get("/v1/models", headers={**headers, "Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "10.0.0.1", "127.0.0.1.evil.example"):
        response = client.post("/v1/chat/completions", json=user(), headers={**headers, "Host": host})
        assert response.status_code == (200 if token else 403)
        assert token or f"not as '{host}': give it a token" in response.get_json()["error"]["message"]


def test_models_and_page():
    client = client_of(ScriptedEngine())
    (model,) = client.get("/v1/models").get_json()["data"]
    assert model["id"] == "tiny/sft" and model["object"] == "model" and model["context_length"] == 64
    assert client.get("/v1/models/tiny/sft").get_json() == model
    assert "has 'tiny/sft'" in client.get("/v1/models/gpt-9").get_json()["error"]["message"]
    page = client.get("/")
    assert "tiny/sft" in page.text and "default-src 'none'" in page.headers["Content-Security-Policy"]
    for rule in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in page.headers["Content-Security-Policy"]
    for name in ("chat.js", "chat.css", "markdown.js"):
        assert client.get(f"/static/{name}").status_code == 200


def turn(role, content="hi"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"messages": None}, "messages must be a list"),
        ({"messages": []}, "at least one"),
        ({"messages": ["hi"]}, "messages, message 1: not an object"),
        ({"messages": [turn("robot")]}, "message 1: role 'robot'"),
        ({"messages": [turn("user", 5)]}, "message 1: content of the user must be text, not int"),
        ({"messages": [turn("user", "")]}, "not empty"),
        ({"messages": [turn("user", [{"type": "image_url"}])]}, "message 1: content of the user must be text"),
        ({"messages": [turn("user"), turn("assistant", ["x"]), turn("user")]}, "message 2, part 1: must be"),
        ({"messages": [turn("user"), turn("user")]}, "message 2: role 'user' where \"assistant\" is due"),
        ({"messages": [turn("assistant"), turn("user")]}, "message 1: role 'assistant'"),
        ({"messages": [turn("system")]}, "must be the user's"),
        ({"messages": [turn("user"), turn("assistant")]}, "must be the user's"),
        ({"temperature": -1}, "temperature must be a number from 0 to 5, not -1"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 to 2147483647"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens must be an integer from 1 to 2147483647"),
        ({"seed": 2**63}, "seed"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"stop": ["a"] * 5}, "stop must be"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": 3}, "stop must be"),
        ({"n": 2}, "n must be 1"),
        ({"n": True}, "n must be 1"),
        ({"stream": "yes"}, "stream must be"),
        ({"stream": 1}, "stream must be"),
        ({"stream_options": "all"}, "stream_options must be"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options must be"),
        ({"stream_options": {"include_usage": 0}}, "stream_options must be"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"messages": [turn("user", "word " * 100)]}, "takes 102 tokens, the context holds 64"),
    ],
)
def test_bad_requests_say_what_is_wrong(change, words):
    engine = ScriptedEngine(*SCRIPT)
    response = ask(client_of(engine), **change)
    assert response.status_code == 400 and not engine.calls
    error = response.get_json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error" and error["code"] == 400


def test_what_openai_allows_is_taken():
    engine = ScriptedEngine(*SCRIPT)
    body = {"response_format": {"type": "text"}, "top_p": 0, "seed": -1, "logprobs": False, "logit_bias": {}}
    assert ask(client_of(engine), **body).status_code == 200
    ((_, sampling),) = engine.calls
    assert (sampling.top_p, sampling.seed) == (1e-6, 2**31 - 1)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_fit_may_be_asked_for(limit):
    engine = ScriptedEngine(*SCRIPT)
    assert ask(client_of(engine), **{limit: 4096}).status_code == 200
    ((ids, sampling),) = engine.calls
    assert sampling.max_tokens == 64 - len(ids)


def test_a_developer_speaks_as_the_system():
    engine = ScriptedEngine(*SCRIPT)
    client = client_of(engine)
    assert ask(client, messages=[turn("developer", "be brief"), turn("user")]).status_code == 200
    assert engine.calls[0][0] == ["<bos>", "system", "be", "brief", "user", "hi"]
    later = ask(client, messages=[turn("system"), turn("developer"), turn("user")])
    assert later.status_code == 400 and "message 2: role 'developer'" in later.get_json()["error"]["message"]


def test_without_a_seed_answers_differ():
    engine = ScriptedEngine(*SCRIPT)
    for _ in range(3):
        ask(client_of(engine))
    assert len({sampling.seed for _, sampling in engine.calls}) == 3


def test_other_errors_are_json_too():
    client = client_of(ScriptedEngine(*SCRIPT))
    path, as_json = "/v1/chat/completions", {"content_type": "application/json"}
    for response, status in (
        (ask(client, model="gpt-9"), 404),
        (client.post(path, data=json.dumps(user()), content_type="text/plain"), 400),
        (client.post(path, data="{", **as_json), 400),
        (client.post(path, json=[1]), 400),
        (client.post(path, data="[" * 100_000, **as_json), 400),
        (client.get(path), 405),
        (client.get("/nowhere"), 404),
    ):
        error = response.get_json()["error"]
        assert response.status_code == error["code"] == status and error["message"]
        assert response.headers.get("Allow") == ("OPTIONS, POST" if status == 405 else None)


def test_a_body_that_is_no_json_and_one_of_another_type_are_told_apart():
    client = client_of(ScriptedEngine(*SCRIPT))
    for body, kind, says in (
        ("{", "application/json", "the body is not JSON"),
        (json.dumps(user()), "text/plain", "sent with Content-Type: application/json"),
        ("[1]", "application/json", "the body must be a JSON object"),
    ):
        response = client.post("/v1/chat/completions", data=body, content_type=kind)
        assert response.status_code == 400 and says in response.get_json()["error"]["message"]


def test_a_body_that_is_too_long_says_so():
    client = client_of(ScriptedEngine(*SCRIPT))
    assert ask(client, junk="x" * 2**17).status_code == 200
    response = ask(client, junk="x" * 2**18)
    error = response.get_json()["error"]
    assert response.status_code == error["code"] == 413 and error["type"] == "invalid_request_error"
    size = response.request.content_length
    assert f"a body of {size} bytes, where at most 262144 are read: shorten it" in error["message"] and size > 2**18


def test_a_body_sent_in_pieces_is_held_to_the_same_limit():
    client = client_of(ScriptedEngine(*SCRIPT))

    def send(**body):
        environ = EnvironBuilder(method="POST", path="/v1/chat/completions", json=user() | body).get_environ()
        del environ["CONTENT_LENGTH"]
        return client.open(Request(environ | {"wsgi.input_terminated": True}))  # as Werkzeug's server hands it over

    assert send().status_code == 200
    response = send(junk="x" * 2**18)
    assert response.status_code == 413 and "at least 262144 bytes" in response.get_json()["error"]["message"]


def test_a_path_that_is_not_there_is_told_which_are():
    error = client_of(ScriptedEngine()).post("/v1/completions", json={}).get_json()["error"]
    assert error["message"] == "there is no /v1/completions; the API is /v1/models and /v1/chat/completions"


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:5/"), ("::1", "http://[::1]:5/")])
def test_the_address_that_is_said_can_be_opened(monkeypatch, capsys, host, url):
    class Server:
        port = 5

        def serve_forever(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("nanochat_jax.server.app.listening", lambda *_: Server())
    with pytest.raises(KeyboardInterrupt), bound(host, 0) as listener:
        serve(create_app(ScriptedEngine(), WordTokenizer(), model_name="m"), listener)
    assert f"Chat at {url} " in capsys.readouterr().err


def test_an_engine_that_fails_is_reported_in_the_stream():
    engine = ScriptedEngine(text("So "), RuntimeError("secret detail"))
    chunks = chunks_of(ask(client_of(engine), stream=True))
    assert "server log" in chunks[-2]["error"]["message"] and chunks[-1] == "DONE" and engine.open == 0
    assert "secret" not in json.dumps(chunks)
    chunks = chunks_of(ask(client_of(ScriptedEngine(UserError("too long: do this"))), stream=True))
    assert chunks[-2]["error"]["message"] == "too long: do this"


def test_old_turns_are_left_out_and_said_to_be():
    messages = [{"role": "system", "content": "be brief"}]
    for i in range(6):
        messages += [
            turn("user", f"question {i} of some more words"),
            turn("assistant", [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]),
        ]
    messages.append(turn("user", "the last one"))
    engine = ScriptedEngine(*SCRIPT)
    answer = ask(client_of(engine), messages=messages, max_tokens=30).get_json()
    ids, sampling = engine.calls[0]
    assert answer["truncated_messages"] == 8 and "question 3" not in " ".join(ids)
    assert ids[:3] == ["<bos>", "system", "be"] and ids[-3:] == ["the", "last", "one"]
    assert ids[4:7] == ["user", "question", "4"] and len(ids) + 30 <= 64 and sampling.max_tokens == 30


def test_fit_leaves_as_much_as_there_is():
    only = [turn("user", "word " * 50)]
    prompt = fit(only, WordTokenizer(), 64, SamplingParams(max_tokens=60))
    assert len(prompt.ids) == 52 and prompt.sampling.max_tokens == 12 and prompt.dropped == 0


def test_a_long_answer_does_not_drive_out_what_leaves_half_of_the_context():
    messages = [turn("user", "a b c"), turn("assistant", "d"), turn("user", "e")]
    assert fit(messages, WordTokenizer(), 64, SamplingParams(max_tokens=64)).dropped == 0


def test_serve_refuses_what_is_unsafe_or_impossible(monkeypatch):
    def never(*args, **options):
        raise AssertionError("it would have served")

    monkeypatch.setattr("nanochat_jax.server.app.make_server", never)
    app = create_app(ScriptedEngine(), WordTokenizer(), model_name="m")
    with pytest.raises(UserError, match="--token"), bound("0.0.0.0", 0) as listener:
        serve(app, listener)
    with pytest.raises(UserError, match="another --port"):
        bound("127.0.0.1", 99999)
    with bound("127.0.0.1", 0) as taken:
        for token in ("", "two words", "пароль", "line\n"):
            with pytest.raises(UserError, match="--token takes"):
                serve(create_app(ScriptedEngine(), WordTokenizer(), model_name="m", token=token), taken)
        with pytest.raises(UserError, match="another --port"):
            bound("127.0.0.1", taken.getsockname()[1])


BUSY = """
import os, signal, threading, urllib.request
import jax, jax.numpy as jnp
from nanochat_jax.server import app

class Engine:
    max_len, max_rows, compiled = 64, 8, ()
    answers = 0

    def stream(self, prompt_ids, sampling):
        while True:
            jnp.dot(ones, ones).block_until_ready()
            yield {"type": "text", "text": "word"}
            self.answers += 1
            if self.answers == 40:
                os.kill(os.getpid(), signal.SIGINT)

class Tokenizer:
    def render_for_completion(self, conversation):
        return [1]

def ask():
    body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}'
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers)).read()

ones = jnp.ones((512, 512))
signal.signal(signal.SIGINT, signal.default_int_handler)
app.warm_up = lambda engine: None
listening = app.listening

def and_ask(*args):
    global url
    server = listening(*args)
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    for _ in range(4):
        threading.Thread(target=ask, daemon=True).start()
    return server

app.listening = and_ask
app.serve(app.create_app(Engine(), Tokenizer(), model_name="m"), app.bound("127.0.0.1", 0))
"""


def test_ctrl_c_while_answers_are_written_ends_it_quietly():
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said, *rest = done.stderr.splitlines()
    assert "Ctrl-C ends it" in said and not any(rest)


def test_with_a_real_engine(compilations):
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 20], 290)
    cfg = GPTConfig.from_depth(ModelConfig(depth=1, aspect_ratio=16, head_dim=16, sequence_len=64), 290)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), param_shapes(cfg))
    engine = Engine(params, cfg, tokenizer, max_rows=3, mesh=make_mesh("1"), max_len=64, lone_prompts=True)
    client = create_app(engine, tokenizer, model_name="m").test_client()
    warm_up(engine)
    assert len(compilations) > 5
    compilations.clear()
    assert ask(client, max_tokens=4).status_code == 200 and ask(client, **user("the quick " * 4)).status_code == 200
    for count in range(1, 4):
        engine.generate([[count] * 40, [1] * 3, [2] * 3][:count], SamplingParams(top_k=50, max_tokens=20))
        engine.generate([[1] * 40] * count, SamplingParams(top_k=50, max_tokens=2))
    for kind in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        engine.generate([[1] * 3], SamplingParams(max_tokens=4, **kind))
    assert not compilations
    whole = ask(client, max_tokens=4, seed=1, **user("the quick")).get_json()
    assert whole["usage"]["prompt_tokens"] == len(tokenizer.encode("the quick")) + 4
    assert whole["choices"][0]["finish_reason"] in ("stop", "length")
    chunks = chunks_of(ask(client, max_tokens=4, seed=1, stream=True, **user("the quick")))[:-1]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]


MARKDOWN = [
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("```<b>\n<script>\n", '<pre data-language="&lt;b&gt;"><code>&lt;script&gt;\n</code></pre>'),
    ('[a](https://x.org/"onx=") [b](javascript:alert(1))', None),
    (
        "a **bold** *word* and `<x> **no**`",
        "<p>a <strong>bold</strong> <em>word</em> and <code>&lt;x&gt; **no**</code></p>",
    ),
    ("- one\n- two\n\n3. three", '<ul><li>one</li><li>two</li></ul><ol start="3"><li>three</li></ol>'),
    ("# Top\ntext\nmore", "<h3>Top</h3><p>text<br>more</p>"),
    ("2 * 3 * 4 = 24", "<p>2 * 3 * 4 = 24</p>"),
]


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's Markdown renderer in Node.js")
def test_markdown_is_escaped_before_it_is_rendered(tmp_path):
    shutil.copy(STATIC / "markdown.js", tmp_path / "markdown.mjs")
    script = f"import {{renderMarkdown}} from '{tmp_path}/markdown.mjs';"
    script += "console.log(JSON.stringify(JSON.parse(process.argv[1]).map(renderMarkdown)))"
    sources = json.dumps([source for source, _ in MARKDOWN])
    command = ["node", "--input-type=module", "-e", script, sources]
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for (source, expected), html in zip(MARKDOWN, shown, strict=True):
        if expected:
            assert html == expected, source
    assert 'href="https://x.org/&quot;onx=&quot;"' in shown[2] and 'href="javascript' not in shown[2]
