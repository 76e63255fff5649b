"""The chat page and an OpenAI-compatible API on one engine, in Flask.

Routes: `/` the page, `/health`, `/v1/models` and `/v1/models/NAME`, `/v1/chat/completions` (streamed as server-sent
events, or whole). The page uses the same API as everyone else. Left out: accounts, rate limits and TLS, which belong to
a proxy in front.

    python -m nanochat_jax serve            # http://127.0.0.1:8000
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import queue
import re
import socket
import sys
import time
import weakref
from dataclasses import replace

from flask import Flask, Response, jsonify, render_template, request
from tqdm import tqdm
from werkzeug.exceptions import HTTPException, NotFound, RequestEntityTooLarge
from werkzeug.serving import BaseWSGIServer, make_server

from nanochat_jax.errors import UsageError, UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.server.answer import completion, error_body, sse_chunks
from nanochat_jax.server.context import fit
from nanochat_jax.server.request import ApiError, check_model, parse_request
from nanochat_jax.tokenizer import Tokenizer

# The page loads nothing from elsewhere and runs no inline script, so even a hole in its Markdown could do little.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

MAX_BYTES = 2**18
"""Of a request. Most of it is left out to fit the context; the tokenizer breaks down at a million spaces."""


def create_app(
    engine: Engine, tokenizer: Tokenizer, *, model_name: str, token: str | None = None, max_requests: int | None = None
) -> Flask:
    """The web application. With `token`, /v1 asks for `Authorization: Bearer TOKEN`; without, for `Host: localhost`.

    The engine takes calls from several threads and batches them as it can; at most `max_requests` (unset: 32, or
    twice its rows) wait or run at once, the next one is told to come back (503).
    """
    if max_requests is None:
        max_requests = max(32, 2 * engine.max_rows)
    app = Flask(__name__)
    app.config.update(TOKEN=token, ENGINE=engine, MAX_CONTENT_LENGTH=MAX_BYTES)
    app.json.sort_keys = False
    started = int(time.time())
    places: queue.SimpleQueue[None] = queue.SimpleQueue()  # unlike a semaphore it may be given back to by a finalizer
    for _ in range(max_requests):
        places.put(None)

    @app.before_request
    def check_caller() -> None:
        if not request.path.startswith("/v1/"):
            return
        if token:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
                raise ApiError("this server asks for a token: send 'Authorization: Bearer TOKEN'", status=401)
        # A web site that leads its name to this machine (DNS rebinding) is of our own origin to the browser.
        elif not is_loopback(re.sub(r":\d*$", "", request.host).strip("[]")):
            named = f"without --token this server answers as localhost, not as {request.host!r:.80}"
            raise ApiError(f"{named}: give it a token, or let the proxy say Host: localhost", status=403)

    @app.get("/")
    def page() -> Response:
        response = Response(render_template("chat.html", model_name=model_name, context_length=engine.max_len))
        response.headers["Content-Security-Policy"] = PAGE_POLICY
        return response

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok", "model": model_name, "token_required": bool(token)}

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model(model_name)]}

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> dict:
        check_model(name, model_name)
        own = {"id": name, "object": "model", "created": started, "owned_by": "nanochat-jax"}
        return {**own, "context_length": engine.max_len}

    @app.post("/v1/chat/completions")
    def chat() -> Response | dict:
        # Asking for the JSON content type also keeps other web sites out: browsers will not send it across origins.
        try:
            body = request.get_json(silent=True)
        except RecursionError:
            raise ApiError("the body is nested too deeply") from None
        if body is None and request.content_length is None and len(request.get_data()) == MAX_BYTES:
            raise RequestEntityTooLarge  # sent in pieces: Werkzeug has cut it off there
        if body is None and request.is_json:
            raise ApiError("the body is not JSON, or is null: send a JSON object")
        chat_request = parse_request(body, model_name)
        prompt = fit(chat_request.messages, tokenizer, engine.max_len, chat_request.sampling)
        try:
            places.get_nowait()
        except queue.Empty:
            raise ApiError(f"{max_requests} requests are waiting already; try again soon", status=503) from None
        # Closing this generator, as the server does when the client goes away, cancels the generation.
        events = engine.stream(prompt.ids, prompt.sampling)
        if not chat_request.stream:
            try:
                return completion(events, prompt, model_name)
            finally:
                places.put(None)
        chunks = sse_chunks(events, prompt, model_name, chat_request.usage_apart)
        response = Response(chunks, mimetype="text/event-stream")
        response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Once: when closed, or when freed: Werkzeug does not close it where the client's reset comes at the very end.
        response.call_on_close(weakref.finalize(chunks, places.put, None))
        return response

    @app.errorhandler(Exception)
    def show_error(error: Exception) -> tuple[Response, int, dict[str, str]]:
        if isinstance(error, UserError):
            error = ApiError(str(error))
        elif isinstance(error, RequestEntityTooLarge):
            size = request.content_length or f"at least {MAX_BYTES}"
            sizes = f"a body of {size} bytes, where at most {MAX_BYTES} are read"
            error = ApiError(f"{sizes}: shorten it or leave out old messages", status=413)
        elif isinstance(error, NotFound):
            error = ApiError(f"there is no {request.path}; the API is /v1/models and /v1/chat/completions", status=404)
        elif not isinstance(error, HTTPException):
            logging.getLogger(__name__).exception("request failed")
            error = ApiError("the request failed; the server log says why", status=500)
        status = error.code or 500
        body = error_body(error.description or error.name, status, getattr(error, "param", None))
        allowed = [", ".join(sorted(text.split(", "))) for name, text in error.get_headers() if name == "Allow"]
        return jsonify(body), status, {"Allow": allowed[0]} if allowed else {}

    return app


def serve(app: Flask, listener: socket.socket) -> None:
    """Serves until Ctrl-C, then ends the process. Raises UserError as `check_host`."""
    host = listener.getsockname()[0]
    check_host(host, app.config["TOKEN"])
    server = listening(app, listener)
    name = f"[{host}]" if ":" in host else host
    print(f"Chat at http://{name}:{server.port}/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
    server.serve_forever()  # until Ctrl-C, which Werkzeug takes
    print(file=sys.stderr, flush=True)
    os._exit(0)  # Python's own end aborts where a thread is inside JAX, writing an answer


def bound(host: str, port: int) -> socket.socket:
    """A socket for `serve` that has its port (0: any free one), where callers wait from now on. Raises UserError for a
    port it cannot have: Werkzeug would end the process, and only once the model is loaded.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error}); choose another --port or --host"
        ) from None


def listening(app: Flask, listener: socket.socket) -> BaseWSGIServer:
    """A server at this socket, which it takes over, with a warm engine, that waits for `serve_forever`."""
    with listener:
        warm_up(app.config["ENGINE"])
        host, port = listener.getsockname()[:2]
        server = make_server(host, port, app, threaded=True, fd=listener.fileno())
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    return server


def check_host(host: str, token: str | None) -> None:
    """UserError for a public address without a token, or a token that browsers cannot send in a header."""
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise UsageError("--token takes ASCII letters, digits and signs, at least one, without spaces")
    if not is_loopback(host) and not token:
        raise UsageError(f"--host {host} lets others reach this server: give --token TEXT, or use --host 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def warm_up(engine: Engine) -> None:
    """Compiles what most requests need before anyone waits: every length of prompt and every number of rows with top-k,
    as the page asks; the whole vocabulary, top-p, greedy and repetition penalty for a lone short row. Others compile
    when they first happen.
    """
    sampling = SamplingParams(temperature=0.8, top_k=50, max_tokens=2)
    kinds = ({"top_k": 0}, {"top_p": 0.9, "top_k": 0}, {"temperature": 0.0}, {"repetition_penalty": 1.2})
    sizes = [(sampling, rows, reach) for rows in engine.decode_sizes for reach in engine.reaches]
    sizes += [(replace(sampling, **kind), engine.decode_sizes[0], engine.reaches[0]) for kind in kinds]
    with tqdm(total=len(engine.prompt_lengths()) + len(sizes), desc="compiling", disable=None) as bar:
        for length in engine.prompt_lengths():
            engine.generate([[0] * min(length + 1, engine.max_len - 1)], sampling)
            bar.update()
        for size in sizes:
            engine.compile_decode(*size)
            bar.update()
    print(f"{len(engine.compiled)} compilations, {engine.most_compilations()} at most", file=sys.stderr)
