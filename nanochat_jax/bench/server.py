"""What people see of `serve`: chat completions streamed over HTTP, beside the same requests to the engine itself.

A number of clients ask at once, each for an answer of a known length, and wait until all have theirs; then the same
requests go to the engine, each in a thread of its own as in the server. Such rounds are compared one by one, so that
other work on the machine disturbs both alike. Clients and server share this process: what the clients need to read
their answers is counted as the server's.
"""

from __future__ import annotations

import http.client
import itertools
import json
import statistics
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np
from flask import Flask

from nanochat_jax.bench import Settings
from nanochat_jax.bench.decode import ANSWER_TOKENS, NoSpecials, random_model
from nanochat_jax.bench.measure import Timing
from nanochat_jax.config import Config
from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.server.app import bound, create_app, listening
from nanochat_jax.server.context import Prompt, fit
from nanochat_jax.server.request import parse_request
from nanochat_jax.tokenizer import SPECIALS, Tokenizer

CLIENTS = (1, 8)
"""At once: one alone, and as many as `serve` answers at the same time unless told otherwise."""
MODEL = "random"
"""What the server calls its model."""
CHAT_TOKENS = 4
"""Special tokens of a prompt that is one message."""
TIMEOUT = 600
"""Seconds without a word from the server, after which a request has failed."""


class Answer(NamedTuple):
    """Seconds of one request: until its first text came, and for each token after the first."""

    first: float
    token: float


class Round(NamedTuple):
    """Seconds until every client had its answer, and the answers."""

    seconds: float
    answers: list[Answer]


class Words(NoSpecials):
    """The engine's tokenizer, to which every token is text: no answer ends early, and the first token shows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode_bytes = tokenizer.decode_bytes


def worded(vocab_size: int) -> Tokenizer:
    """A tokenizer that knows made-up words of four letters, each with the space before it a token, and nothing else.

    Whatever its size, nothing has to be fetched or learned for it, and a prompt is as long as it has words.
    """
    words = (" " + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    return Tokenizer([word.encode() for word in itertools.islice(words, max(1, vocab_size - len(SPECIALS)))])


def figures(config: Config, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """For each number of clients a record of the server and one of the engine. UserError where a request fails."""
    tokenizer = worded(config.tokenizer.vocab_size)
    params, cfg, mesh = random_model(config, tokenizer.vocab_size)
    clients = settings.rows or CLIENTS
    engine = Engine(params, cfg, Words(tokenizer), max_rows=max(clients), mesh=mesh, lone_prompts=True)
    answer_tokens = max(2, min(ANSWER_TOKENS, cfg.sequence_len // 4))
    size = (max(clients), max(1, cfg.sequence_len // 2 - CHAT_TOKENS))
    words = np.random.default_rng(config.seed).integers(tokenizer.vocab_size - len(SPECIALS), size=size).tolist()
    bodies = [
        {"messages": [{"role": "user", "content": tokenizer.decode(ids)}], "max_tokens": answer_tokens, "seed": seed}
        for seed, ids in enumerate(words)
    ]
    asked = [parse_request(body, MODEL) for body in bodies]
    prompts = [fit(request.messages, tokenizer, engine.max_len, request.sampling) for request in asked]
    records = []
    with serving(create_app(engine, tokenizer, model_name=MODEL)) as port:
        for count in clients:
            log(f"bench server: {count} client{'s' if count > 1 else ''}")

            def turn(count: int = count) -> tuple[Round, Round]:
                over_http = at_once(lambda i: streamed(port, bodies[i]), count)
                return over_http, at_once(lambda i: alone(engine, prompts[i]), count)

            turn()  # what is slow once only
            served, unserved = zip(*(turn() for _ in range(settings.repeat)), strict=True)
            ratios = sorted(e.seconds / s.seconds for s, e in zip(served, unserved, strict=True))
            shares = {"ratio": statistics.median(ratios), "lowest_ratio": ratios[0], "highest_ratio": ratios[-1]}
            records += [record("server", served, answer_tokens) | shares, record("engine", unserved, answer_tokens)]
    return {
        "prompt_tokens": len(prompts[0].ids),
        "answer_tokens": answer_tokens,
        "compute_dtype": cfg.compute_dtype,
        "engine": engine.describe(),
        "compilations": len(engine.compiled),
        "speeds": records,
    }


def record(of: str, rounds: Sequence[Round], answer_tokens: int) -> dict[str, Any]:
    """The figures of rounds with equally many clients: times until all were answered, of first texts, of tokens."""
    clients, answers = len(rounds[0].answers), [answer for done in rounds for answer in done.answers]
    times = {
        "answered": Timing.of([done.seconds for done in rounds]),
        "first_token": Timing.of([answer.first for answer in answers]),
        "token": Timing.of([answer.token for answer in answers]),
    }
    requests_per_sec = clients / times["answered"].median
    return {
        "of": of,
        "clients": clients,
        "requests": len(answers),
        "tok_per_sec": answer_tokens * requests_per_sec,
        "requests_per_sec": requests_per_sec,
        **{f"{name}_{key}": value for name, timing in times.items() for key, value in timing.ms().items()},
    }


@contextmanager
def serving(app: Flask) -> Iterator[int]:
    """The port where `app` is served meanwhile, as `serve` does it; afterwards none of its threads is left."""
    server = listening(app, bound("127.0.0.1", 0))
    server.daemon_threads = False  # of requests: closing the server waits for them
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()


def at_once(ask: Callable[[int], Answer], count: int) -> Round:
    """`ask` of 0 to `count` - 1, each in a thread."""
    with ThreadPoolExecutor(count) as threads:
        start = time.perf_counter()
        answers = list(threads.map(ask, range(count)))
        return Round(time.perf_counter() - start, answers)


def streamed(port: int, body: dict[str, Any]) -> Answer:
    """A chat completion, streamed. UserError where it is not all that was asked for."""
    path, kind = "/v1/chat/completions", {"Content-Type": "application/json"}
    start = time.perf_counter()
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
            connection.request("POST", path, json.dumps(body | {"stream": True}), kind)
            response = connection.getresponse()
            lines = [(line, time.perf_counter() - start) for line in response]
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"the server broke off a request ({type(error).__name__}: {error})") from None
    if response.status != 200:
        raise UserError(f"the server answered {response.status}: {b''.join(line for line, _ in lines).decode()}")
    chunks = [(json.loads(line[len("data: ") :]), at) for line, at in lines if line.startswith(b"data: {")]
    if errors := [chunk["error"]["message"] for chunk, _ in chunks if "error" in chunk]:
        raise UserError(f"the server failed within an answer: {errors[0]}")
    times = [at for chunk, at in chunks if chunk["choices"][0]["delta"].get("content")]
    usage = chunks[-1][0].get("usage", {}) if chunks else {}
    return whole_answer(times, usage, body["max_tokens"])


def alone(engine: Engine, prompt: Prompt) -> Answer:
    """The same of the engine without a server."""
    start = time.perf_counter()
    times, usage = [], {}
    for event in engine.stream(prompt.ids, prompt.sampling):
        times += [time.perf_counter() - start] * (event["type"] == "text")
        usage = event.get("usage", {})
    return whole_answer(times, usage, prompt.sampling.max_tokens)


def whole_answer(times: Sequence[float], usage: dict[str, int], asked: int) -> Answer:
    """An answer whose text came at `times`. UserError where it has not as many tokens as were asked for."""
    tokens = usage.get("completion_tokens", "an unknown number of")
    if tokens != asked or not times:
        raise UserError(f"an answer of {tokens} tokens, in {len(times)} pieces of text, where {asked} were asked for")
    return Answer(times[0], (times[-1] - times[0]) / (asked - 1))
