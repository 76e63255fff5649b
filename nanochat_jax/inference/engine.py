"""The engine: requests of different lengths share a running batch, join and leave between decode steps, and use tools.

It holds a KV cache of `max_rows` rows. Whoever waits for tokens drives it: `generate` and every open `stream` call
`step` under one lock, and a step serves all rows, so that several threads share each decode without a scheduler thread.
When the model closes a python block, the expression in it is evaluated (`tools.py`) and the result is forced into the
row, as the reference does; forced tokens carry mask 0.
"""

from __future__ import annotations

import codecs
import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.sampling import FEW, decode, last_logits, prefill
from nanochat_jax.inference.tools import evaluate_tool
from nanochat_jax.model import Params, empty_cache
from nanochat_jax.sharding import data_shards
from nanochat_jax.tokenizer import Tokenizer

PREFILL_TOKENS = 16384
"""Padded prompt tokens of one prefill, at most; bounds its memory."""


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. temperature 0: greedy; top_k 0, top_p 1, min_p 0: off; the rest in tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 1e-6, 1),
            ("min_p", 0, 1),
            ("max_tokens", 1, 2**31 - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} {getattr(self, name)} is outside {low} to {high}")


@dataclass
class Completion:
    """What the model answered: its ids (end marker left out), mask 0 where a tool wrote, and the calls it made."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    tool_calls: list[dict] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """One request inside the engine."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    completion: Completion = field(default_factory=Completion)
    forced: deque = field(default_factory=deque)
    expression: list[int] | None = None
    events: deque = field(default_factory=deque)
    slot: int | None = None
    next_token: int = 0
    position: int = 0

    @property
    def done(self) -> bool:
        return bool(self.completion.finish_reason)


class Engine:
    """Generation for one set of parameters; safe to call from several threads."""

    def __init__(
        self,
        params: Params,
        cfg: GPTConfig,
        tokenizer: Tokenizer,
        *,
        max_rows: int,
        max_len: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """A cache of `max_rows` rows (rounded up to the mesh's data shards) of `max_len` tokens, prompt included."""
        shards = 1 if mesh is None else data_shards(mesh)
        self.params, self.cfg, self.tokenizer, self.mesh = params, cfg, tokenizer, mesh
        self.max_rows = -(-max_rows // shards) * shards
        self.max_len = min(max_len or cfg.sequence_len, cfg.max_positions)
        self._shards = shards
        self._lock = threading.RLock()
        self._waiting: deque[Row] = deque()
        self._rows: dict[int, Row] = {}
        self._cache = self._place(empty_cache(cfg, self.max_rows, self.max_len))
        names = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
        self._token = {name: tokenizer.special_id(f"<|{name}|>") for name in names}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams], samples: int = 1
    ) -> list[Completion]:
        """`samples` completions of each prompt, prompt by prompt; a prompt's samples share its prefill.

        Sample j of a prompt draws with seed + j. Prompts must leave room for at least one token in `max_len`.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        rows = [
            self._row(prompt, replace(how, seed=how.seed + j))
            for prompt, how in zip(prompts, each, strict=True)
            for j in range(samples)
        ]
        with self._lock:
            self._waiting.extend(rows)
            while not all(row.done for row in rows):
                self.step()
        for row in rows:
            row.completion.text = self.tokenizer.decode(row.completion.ids)
        return [row.completion for row in rows]

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[dict]:
        """Events of one completion as they come; closing the iterator cancels it and frees its row.

        {"type": "text", "text"} with whole characters only, {"type": "tool", "expression", "result"} (result None: it
        failed), and last {"type": "done", "finish_reason", "usage": {"prompt_tokens", "completion_tokens"}}.
        """
        row = self._row(prompt, sampling)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with self._lock:
            self._waiting.append(row)
        try:
            while True:
                with self._lock:
                    if not row.done and not row.events:
                        self.step()
                    events = [row.events.popleft() for _ in range(len(row.events))]
                    done = row.done
                for kind, value in events:
                    if kind == "tool":
                        yield {"type": "tool", **value}
                    elif text := decoder.decode(self.tokenizer.decode_bytes([value])):
                        yield {"type": "text", "text": text}
                if done:
                    break
            if text := decoder.decode(b"", final=True):
                yield {"type": "text", "text": text}
            usage = {"prompt_tokens": len(row.prompt), "completion_tokens": len(row.completion.ids)}
            yield {"type": "done", "finish_reason": row.completion.finish_reason, "usage": usage}
        finally:
            self._cancel(row)

    def logits_at(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits float32 [n, V] of the token after each prompt."""
        longest = bucket(max(map(len, prompts)), self.cfg.max_positions, 32)
        rows = self._round(bucket(len(prompts), len(prompts) * 4, 1))
        tokens, counts = padded(prompts, rows, longest)
        with self._context():
            out = last_logits(self.params, self._place(tokens), self._place(counts), cfg=self.cfg)
        return np.asarray(out)[: len(prompts)]

    def step(self) -> None:
        """Let waiting requests join where rows are free, then decode one token in every running row."""
        with self._lock:
            # A prefill costs about as much for one row as for a few: wait until several rows are free or none runs.
            free = self.max_rows - len(self._rows)
            if self._waiting and (free >= max(1, self.max_rows // 4) or free >= len(self._waiting)):
                self._join()
            if self._rows:
                self._decode()

    def _row(self, prompt: Sequence[int], sampling: SamplingParams) -> Row:
        if not prompt or len(prompt) >= self.max_len:
            raise UserError(f"a prompt of {len(prompt)} tokens; 1 to {self.max_len - 1} fit: shorten it")
        return Row(tuple(prompt), sampling)

    def _join(self) -> None:
        slots = [slot for slot in range(self.max_rows) if slot not in self._rows]
        rows: list[Row] = []
        prompts: dict[tuple[int, ...], int] = {}
        longest = 0
        while self._waiting and len(rows) < len(slots):
            prompt = self._waiting[0].prompt
            length = bucket(max(longest, len(prompt)), self.max_len, 32)
            distinct = len(prompts) + (prompt not in prompts)
            if rows and self._round(bucket(distinct, self.max_rows, 1)) * length > PREFILL_TOKENS:
                break
            longest = length
            prompts.setdefault(prompt, len(prompts))
            rows.append(self._waiting.popleft())
        tokens, counts = padded(list(prompts), self._round(bucket(len(prompts), self.max_rows, 1)), longest)
        size = self._round(bucket(len(rows), self.max_rows, 1))
        source, slot = np.zeros(size, np.int32), np.full(size, self.max_rows, np.int32)
        for i, row in enumerate(rows):
            row.slot, row.position = slots[i], len(row.prompt)
            source[i], slot[i] = prompts[row.prompt], row.slot
            self._rows[row.slot] = row
        knobs, candidates = self._knobs(rows, size)
        with self._context():
            drawn, self._cache = prefill(
                self.params,
                self._cache,
                self._place(tokens),
                self._place(counts),
                source,
                slot,
                knobs,
                cfg=self.cfg,
                candidates=candidates,
            )
        for row, token in zip(rows, np.asarray(drawn), strict=False):
            self._advance(row, int(token))

    def _decode(self) -> None:
        tokens, positions = np.zeros(self.max_rows, np.int32), np.zeros(self.max_rows, np.int32)
        for slot, row in self._rows.items():
            tokens[slot], positions[slot] = row.next_token, row.position
        knobs, candidates = self._knobs(self._rows, self.max_rows)
        with self._context():
            drawn, self._cache = decode(
                self.params,
                self._cache,
                self._place(tokens),
                self._place(positions),
                self._place(knobs),
                cfg=self.cfg,
                candidates=candidates,
            )
        drawn = np.asarray(drawn)
        for slot, row in list(self._rows.items()):
            row.position += 1
            self._advance(row, int(drawn[slot]))

    def _advance(self, row: Row, drawn: int) -> None:
        """Take a row's next token, forced or drawn, and see what follows from it: a tool call, the end."""
        completion = row.completion
        token, mask = (row.forced.popleft(), 0) if row.forced else (drawn, 1)
        if mask and token in (self._token["assistant_end"], self._token["bos"]):
            self._finish(row, "stop")
            return
        completion.ids.append(token)
        completion.mask.append(mask)
        row.next_token = token
        if mask and token == self._token["python_start"]:
            row.expression = []
        elif mask and token == self._token["python_end"] and row.expression is not None:
            self._call_tool(row)
        elif row.expression is not None:
            row.expression.append(token)
        elif mask and token not in self.tokenizer.special_ids:
            row.events.append(("token", token))
        if len(completion.ids) >= row.sampling.max_tokens or row.position >= self.max_len:
            self._finish(row, "length")

    def _call_tool(self, row: Row) -> None:
        expression = self.tokenizer.decode(row.expression)
        row.expression = None
        result = evaluate_tool(expression)
        call = {"expression": expression, "result": result}
        row.completion.tool_calls.append(call)
        row.events.append(("tool", call))
        if result is not None:
            row.forced.extend([self._token["output_start"], *self.tokenizer.encode(result), self._token["output_end"]])

    def _finish(self, row: Row, reason: str) -> None:
        row.completion.finish_reason = reason
        if row.slot is not None:
            self._rows.pop(row.slot, None)

    def _cancel(self, row: Row) -> None:
        with self._lock:
            if not row.done:
                if row in self._waiting:
                    self._waiting.remove(row)
                self._finish(row, "cancelled")

    def _knobs(self, rows: Sequence[Row] | dict[int, Row], size: int) -> tuple[dict[str, np.ndarray], int]:
        knobs = {
            "temperature": np.zeros(size, np.float32),
            "top_k": np.ones(size, np.int32),
            "top_p": np.ones(size, np.float32),
            "min_p": np.zeros(size, np.float32),
            "seed": np.zeros(size, np.int32),
        }
        candidates = 1
        for i, row in rows.items() if isinstance(rows, dict) else enumerate(rows):
            how = row.sampling
            for name in ("temperature", "top_p", "min_p"):
                knobs[name][i] = getattr(how, name)
            knobs["top_k"][i] = min(how.top_k, self.cfg.vocab_size)
            knobs["seed"][i] = how.seed & 0x7FFFFFFF
            if how.temperature > 0:
                candidates = max(candidates, FEW if 0 < how.top_k <= FEW else self.cfg.vocab_size)
        return knobs, candidates

    def _round(self, rows: int) -> int:
        return -(-rows // self._shards) * self._shards

    def _context(self) -> object:
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _place(self, tree: object) -> object:
        """Arrays whose first axis is rows, cut over the mesh's data shards."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.mesh, P(("data", "fsdp")))), tree)


def bucket(size: int, limit: int, smallest: int) -> int:
    """`size` rounded up to smallest * 2^i, at most `limit`: few different shapes, so few compilations."""
    rounded = smallest
    while rounded < size:
        rounded *= 2
    return max(size, min(rounded, limit))


def padded(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [rows, length], padded on the right with 0, and their lengths [rows]; missing rows have 1."""
    tokens, counts = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], counts[i] = prompt, len(prompt)
    return tokens, counts
