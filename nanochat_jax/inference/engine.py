"""The engine: requests of different lengths share a running batch, join and leave between decode steps, and use tools.

It holds a KV cache of `max_rows` rows. Whoever waits for tokens drives it: `generate` and every open `stream` call
`step` under one lock, and a step serves all rows, so that several threads share each decode without a scheduler thread.
A step decodes up to CHUNK tokens of every row in use on the device; while the host looks at what was written it is
already at the next ones, unless a row has ended, waits for a tool, or somebody wants to join. A GPU is asked for them
before it is done with the ones before, which the host's part of a call would otherwise delay.

When the model closes a python block, the expression in it is evaluated (`tools.py`) and the result is forced into the
row, as the reference does; forced tokens carry mask 0.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.buckets import (
    PADDED_TOGETHER,
    bucket,
    decode_buckets,
    padded,
    prompt_bucket,
    prompts_at_once,
    reach_buckets,
)
from nanochat_jax.inference.decoding import cache_spec, empty_cache, prepare
from nanochat_jax.inference.native import with_native
from nanochat_jax.inference.requests import Completion, Row, SamplingParams
from nanochat_jax.inference.sampling import (
    CHUNK,
    FEW,
    FORCED,
    METHODS,
    Method,
    Rows,
    Written,
    decode,
    last_logits,
    nobodys_rows,
    prefill,
)
from nanochat_jax.inference.text import TextStream
from nanochat_jax.inference.tools import evaluate_tool
from nanochat_jax.model import BATCH_AXES, Params
from nanochat_jax.sharding import data_shards, path_of
from nanochat_jax.tokenizer import Tokenizer


class Flight(NamedTuple):
    """A decode that the device is at: what it writes, where the rows then are, and whose its columns are."""

    written: Written
    rows: Rows
    owners: dict[int, Row]


class Engine:
    """Generation for one set of parameters; safe to call from several threads."""

    def __init__(
        self,
        params: Params,
        cfg: GPTConfig,
        tokenizer: Tokenizer,
        *,
        max_rows: int,
        mesh: Mesh,
        max_len: int | None = None,
        samples: int = 1,
        max_new: int | None = None,
        quantize: str = "none",
        logprobs: bool = False,
        lone_prompts: bool = False,
    ) -> None:
        """A cache of `max_rows` rows (rounded up to the mesh's data shards) of `max_len` tokens, prompt included.

        With `samples` > 1 every so many rows continue one prompt, whose keys and values they share; a row then keeps
        `max_new` tokens of its own. Such rows join and leave together. `quantize`: "none", or "int8" weights.
        `lone_prompts`: prompts are read one by one (one a data shard at once), which needs fewer compilations.
        """
        if quantize not in ("none", "int8"):
            raise UserError(f"quantize {quantize!r} is not known; none and int8 are")
        cfg, self._not_native = with_native(cfg, mesh)
        self._shards = data_shards(mesh)
        unit = self._shards * samples
        self.cfg, self.tokenizer, self.mesh, self.samples = cfg, tokenizer, mesh, samples
        self.max_rows = -(-max_rows // unit) * unit
        self.max_len = min(max_len or cfg.sequence_len, cfg.max_positions)
        self.max_new = min(max_new or self.max_len, self.max_len)
        self.compiled: set[tuple] = set()
        """What generation was compiled for: function and static shapes. `logits_at` is not counted."""
        self._quantize, self._logprobs, self._lone_prompts = quantize, logprobs, lone_prompts
        self._groups = self.max_rows // samples
        # Rounding differs with the number of rows and of slots. Where that shows in what a row says (16 bits, int8,
        # TF32), all are decoded always, which costs a GPU little; also where they are cut over data shards.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        exact = on_cpu and cfg.compute_dtype == "float32" and quantize == "none" and self._shards == 1
        few = decode_buckets(self._groups) if exact else [self._groups]
        self.decode_sizes = [size * samples for size in few]
        """Numbers of rows that are decoded at once."""
        own = self.max_new if samples > 1 else self.max_len
        # The kernels in C++ read no others anyway.
        self.reaches = reach_buckets(own) if exact and not cfg.native else [own]
        """Numbers of slots of a row that a decode reads."""
        # In C++ padding costs what XLA does with it between the kernels, which is less than another prefill.
        self._padded = PADDED_TOGETHER if exact and cfg.native and not lone_prompts else 0
        self._lock = threading.RLock()
        self._waiting: deque[list[Row]] = deque()
        self._drivers: set[int] = set()
        self._rows: dict[int, Row] = {}
        self._flight: Flight | None = None
        self._runs_ahead, self._steady = not on_cpu, True
        shared = (self._groups, self.max_len) if samples > 1 else (0, 0)
        # Not a method of this engine: held by it, it would keep the cache on the device until Python looks for cycles.
        empty = functools.partial(empty_cache, cfg, self.max_rows, self.reaches[-1], *shared)
        shapes = jax.eval_shape(empty)
        self.cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        shardings = jax.tree_util.tree_map_with_path(
            lambda path, _: NamedSharding(mesh, cache_spec(path_of(path))), shapes
        )
        self._new_cache = jax.jit(empty, out_shardings=shardings)
        self._cache = self._new_cache()
        names = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
        self._token = {name: tokenizer.special_id(f"<|{name}|>") for name in names}
        self.use(params)

    def use(self, params: Params) -> None:
        """Generate with these parameters from now on."""
        self.weights = None  # not two copies at a time
        with jax.set_mesh(self.mesh):
            self.weights = prepare(params, self.cfg, self._quantize)

    def describe(self) -> str:
        """One line: rows, lengths, memory."""
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.weights))
        rows = f"{self.max_rows} row{'s' if self.max_rows > 1 else ''} of {self.max_len:,} tokens"
        if self.samples > 1:
            rows += f", {self.samples} samples of a prompt together"
        kind = " (int8)" if self._quantize == "int8" else ""
        mib = f"KV cache {self.cache_bytes / 2**20:,.0f} MiB, weights {weights / 2**20:,.0f} MiB{kind}"
        shares = [size / self.max_rows for size in self.decode_sizes[:-1]]
        shares += [reach / self.reaches[-1] for reach in self.reaches[:-1]]
        if shares and not self.cfg.native:
            mib += f", up to {self.cache_bytes * max(shares) / 2**20:,.0f} MiB while part of it is in use"
        kernels = ", kernels in C++" if self.cfg.native else ""
        if self._not_native:
            kernels = f", slower without kernels in C++: {self._not_native}"
        return f"engine: {rows}, {mib}{kernels}; more wait"

    def most_compilations(self) -> int:
        """How many there can be: prefills by length, prompts and rows of them, decodes by what sampling has to do."""
        most = 1 if self._lone_prompts else self._groups
        counts = len({self._round(bucket(prompts, limit=most)) for prompts in range(1, most + 1)})
        into = 1 if self._lone_prompts and self.samples == 1 else 2
        return len(self.prompt_lengths()) * counts * into + METHODS * len(self.decode_sizes) * len(self.reaches)

    def prompt_lengths(self) -> list[int]:
        """The lengths that prompts without their last token are padded to, ascending."""
        return sorted({self._length(length) for length in range(max(self.max_len - 1, 1))})

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams], samples: int = 1
    ) -> list[Completion]:
        """`samples` completions of each prompt, prompt by prompt; a prompt's samples share its prefill.

        Sample j of a prompt draws with seed + j. Prompts must leave room for at least one token in `max_len`.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        rows = [
            self._row(prompt, replace(how, seed=how.seed + j), TextStream(how.stop) if how.stop else None)
            for prompt, how in zip(prompts, each, strict=True)
            for j in range(samples)
        ]
        units = [
            rows[first + at : first + min(at + self.samples, samples)]
            for first in range(0, len(rows), samples)
            for at in range(0, samples, self.samples)
        ]
        self._waiting.extend(units)
        with self._driving(rows):
            while not all(row.done for row in rows):
                self.step()
                self._hand_over()
        for row in rows:
            row.completion.text = self._whole_text(row)
        return [row.completion for row in rows]

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[dict]:
        """Events of one completion as they come; closing the iterator cancels it and frees its row.

        {"type": "text", "text"} with whole characters only, one for all tokens that came together; {"type": "tool",
        "expression", "result"} (result None: it failed); and last {"type": "done", "finish_reason", "usage":
        {"prompt_tokens", "completion_tokens"}}.
        """
        row = self._row(prompt, sampling, TextStream(sampling.stop))
        self._waiting.append([row])
        with self._driving([row]):
            while not row.done or row.events:
                with self._lock:
                    if not row.done and not row.events:
                        self.step()
                self._hand_over()
                while row.events:
                    yield row.next_event()
        usage = {"prompt_tokens": len(row.prompt), "completion_tokens": len(row.completion.ids)}
        yield {"type": "done", "finish_reason": row.completion.finish_reason, "usage": usage}

    @contextlib.contextmanager
    def _driving(self, rows: Sequence[Row]) -> Iterator[None]:
        """While this thread waits for its rows. At the end whatever of them is still running is cancelled; RuntimeError
        where they broke off because a step failed, whoever drove it.
        """
        me = threading.get_ident()
        self._drivers.add(me)
        try:
            yield
        finally:
            self._drivers.discard(me)
            for row in rows:
                self._cancel(row)
        if any(row.completion.finish_reason == "failed" for row in rows):
            raise RuntimeError("generation broke off: a step of the batch failed")

    def _hand_over(self) -> None:
        """Let another thread have the lock: who releases it and takes it again at once would always win."""
        if len(self._drivers) > 1:
            time.sleep(1e-4)

    def logits_at(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits float32 [n, V] of the token after each prompt."""
        longest = prompt_bucket(max(map(len, prompts)), self.cfg.max_positions)
        rows = self._round(bucket(len(prompts)))
        tokens, counts = padded(prompts, rows, longest)
        with jax.set_mesh(self.mesh):
            out = last_logits(self.weights, self._place(tokens), self._place(np.maximum(counts, 1)), cfg=self.cfg)
        return np.asarray(out)[: len(prompts)]

    def compile_decode(self, sampling: SamplingParams, rows: int, reach: int) -> None:
        """Compile decoding `rows` rows that draw so and reach so far: of `decode_sizes` and `reaches`."""
        nobodys = self._place(nobodys_rows(np.arange(rows, dtype=np.int32)))
        with self._lock:
            self._decode(nobodys, 0, self._method([sampling]), reach)

    def step(self) -> None:
        """Let waiting requests join where rows are free, then take in what all running rows have written.

        Where that fails or is interrupted, all running rows break off, and the engine begins anew with an empty cache.
        """
        with self._lock:
            try:
                self._step()
            except BaseException:
                self._flight, self._cache = None, None
                for row in list(self._rows.values()):
                    self._finish(row, "failed")
                self._cache = self._new_cache()
                raise

    def _step(self) -> None:
        if self._flight is not None and all(row.done for row in self._flight.owners.values()):
            self._flight = None  # it ran ahead for rows that had ended
        if self._flight is None:
            self._join()
            self._flight, self._steady = self._launch(None) if self._rows else None, True
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        nobody_ended = not any(row.done for row in flight.owners.values())  # by a stop string, say
        if self._runs_ahead and self._steady and nobody_ended and not self._waiting:
            self._flight = self._launch(flight, CHUNK)
        written = jax.device_get(flight.written)
        # Where a row has ended or waits for a tool, the host has to say how it goes on.
        self._steady = all(written.active[at] for at in flight.owners)
        if self._flight is None and self._steady and nobody_ended and not self._may_join():
            self._flight = self._launch(flight, int(written.count))
        arrays = (written.tokens, written.drawn, written.logprobs)
        for tokens, drawn, logprobs in zip(*(array[: written.count].tolist() for array in arrays), strict=True):
            for at, row in flight.owners.items():
                if tokens[at] >= 0 and not row.done:
                    self._advance(row, tokens[at], drawn[at], logprobs[at])

    def _row(self, prompt: Sequence[int], sampling: SamplingParams, text: TextStream | None) -> Row:
        if not prompt or len(prompt) >= self.max_len:
            raise UserError(f"a prompt of {len(prompt)} tokens; 1 to {self.max_len - 1} fit: shorten it")
        return Row(tuple(prompt), sampling, text)

    def _groups_by_use(self) -> tuple[list[int], list[int]]:
        """Groups of `samples` rows of which some run, and those in which none does; ascending."""
        running = {slot // self.samples for slot in self._rows}
        return sorted(running), [group for group in range(self._groups) if group not in running]

    def _may_join(self) -> bool:
        """Joining interrupts all rows for a prefill: where many wait, they wait until an eighth of the rows is free."""
        return bool(self._waiting) and not self._missing_groups()

    def _missing_groups(self) -> int:
        """How many groups of rows have yet to become free for those who wait to join."""
        _, free = self._groups_by_use()
        return max(0, min(len(self._waiting), max(1, self._groups // 8)) - len(free))

    def _join(self) -> None:
        """Give free groups of rows to those who wait, in order, and read their prompts."""
        if not self._may_join():
            return
        units = []
        _, free = self._groups_by_use()
        for group in free[: len(self._waiting)]:
            units.append(self._waiting.popleft())
            for j, row in enumerate(units[-1]):
                row.slot = group * self.samples + j
                self._rows[row.slot] = row
        # Equal prompts are read once and copied; those that share a group's cache have a copy there anyway.
        same: dict[object, list[Row]] = {}
        for i, unit in enumerate(units):
            apart = self.samples > 1 or self._lone_prompts
            same.setdefault(i if apart else unit[0].prompt, []).extend(unit)
        of_length: dict[int, list[list[Row]]] = {}
        for rows in sorted(same.values(), key=lambda rows: -len(rows[0].prompt)):
            length = self._length(len(rows[0].prompt) - 1)
            fitting = (longer for longer, those in of_length.items() if longer * (len(those) + 1) <= self._padded)
            of_length.setdefault(next(fitting, length), []).append(rows)
        for length, prompts in of_length.items():
            while prompts:
                most = 1 if self._lone_prompts else len(prompts)
                count = self._round(prompts_at_once(most, length, self._groups))
                self._prefill(prompts[:count], count, length)
                del prompts[:count]

    def _prefill(self, prompts: Sequence[Sequence[Row]], count: int, length: int) -> None:
        """Read the prompt of each of these lists of rows, padded to `count` prompts of `length` tokens."""
        rows = [(at, row) for at, same in enumerate(prompts) for row in same]
        # Two sizes, so that few shapes are compiled: a row for each prompt, or all rows.
        size = count if len(rows) <= count else self.max_rows
        source, slot = np.zeros(size, np.int32), np.full(size, self.max_rows, np.int32)
        for i, (at, row) in enumerate(rows):
            source[i], slot[i] = at, row.slot
        place, last = np.full(count, self.max_rows, np.int32), np.zeros(count, np.int32)
        for at, (row, *_) in enumerate(prompts):
            place[at], last[at] = row.slot // self.samples, row.prompt[-1]
        tokens, counts = padded([row.prompt[:-1] for row, *_ in prompts], count, length)
        self.compiled.add(("prefill", tokens.shape, size))
        with jax.set_mesh(self.mesh):
            self._cache = prefill(
                self.weights,
                self._cache,
                *self._place((tokens, counts, last)),
                source,
                slot,
                place,
                cfg=self.cfg,
                shared=self.samples > 1,
            )

    def _length(self, longest: int) -> int:
        return prompt_bucket(max(longest, 1), max(self.max_len - 1, 1))

    def _launch(self, before: Flight | None, ahead: int = 0) -> Flight:
        """Begin to decode: from where the host has the rows, or from where the device left them, `ahead` tokens on."""
        limit = CHUNK
        if before is None:
            owners, rows = self._host_rows()
            rows = self._place(rows)
            # Whoever waits for the first token of an answer gets it without waiting for more.
            limit = 1 if any(not row.completion.ids for row in owners.values()) else CHUNK
        else:
            owners, rows = before.owners, before.rows
        reach = self._reach(owners.values(), ahead + CHUNK)
        written, rows = self._decode(rows, limit, self._method([row.sampling for row in self._rows.values()]), reach)
        return Flight(written, rows, owners)

    def _decode(self, rows: Rows, limit: int, method: Method, reach: int) -> tuple[Written, Rows]:
        ends = np.asarray([self._token["assistant_end"], self._token["bos"]], np.int32)
        self.compiled.add(("decode", method, reach, len(rows.ints)))
        enough = max(1, self._missing_groups()) * self.samples if self._waiting else len(rows.ints) + 1
        with jax.set_mesh(self.mesh):
            written, rows, self._cache = decode(
                self.weights,
                self._cache,
                rows,
                np.int32(limit),
                np.int32(enough),
                ends,
                np.int32(self._token["python_end"]),
                cfg=self.cfg,
                method=method,
                reach=reach,
            )
        return written, rows

    def _method(self, hows: Sequence[SamplingParams]) -> Method:
        """What sampling has to be able to do for rows that draw so."""
        drawing = [how for how in hows if how.temperature > 0]
        restricted = [how for how in drawing if how.top_k > 0 or np.float32(how.top_p) < 1]  # as the device sees it
        few = all(0 < how.top_k <= FEW for how in restricted)
        return Method(
            plain=len(restricted) < len(drawing),
            candidates=0 if not restricted else FEW if few else self.cfg.vocab_size,
            penalized=any(how.repetition_penalty != 1 for how in hows),
            logprobs=self._logprobs,
        )

    def _reach(self, rows: Iterable[Row], tokens: int) -> int:
        """Slots that hold all that these rows have in the cache as their own, and get with so many tokens more."""
        longest = max(row.position - self._first(row) for row in rows) + tokens
        return next((reach for reach in self.reaches if reach >= longest), self.reaches[-1])

    def _first(self, row: Row) -> int:
        """Where the row's own slots begin."""
        return len(row.prompt) - 1 if self.samples > 1 else 0

    def _slots_to_decode(self) -> np.ndarray:
        """Of the rows in use, with free ones up to a size that is compiled for. In C++ those in use come first, as it
        computes no more than up to the last of them; else whole groups of samples, ascending.
        """
        if self.cfg.native:
            free = (slot for slot in range(self.max_rows) if slot not in self._rows)
            size = next(size for size in self.decode_sizes if size >= len(self._rows))
            return np.asarray([*sorted(self._rows), *free][:size], np.int32)
        running, free = self._groups_by_use()
        size = next(size for size in self.decode_sizes if size >= len(running) * self.samples)
        groups = sorted([*running, *free][: size // self.samples])
        return (np.asarray(groups)[:, None] * self.samples + np.arange(self.samples)).reshape(-1).astype(np.int32)

    def _host_rows(self) -> tuple[dict[int, Row], Rows]:
        """The rows to decode, as numpy arrays, and by column whose they are; those of nobody are not active."""
        slots = self._slots_to_decode()
        rows = nobodys_rows(slots)
        named = rows.by_name()
        owners = {at: self._rows[slot] for at, slot in enumerate(slots.tolist()) if slot in self._rows}
        for at, row in owners.items():
            how, done = row.sampling, row.completion.ids
            values = {
                "token": done[-1] if done else row.prompt[-1],
                "position": row.position,
                "first": self._first(row),
                "budget": self._most(row) - len(done),
                "owed": len(row.forced),
                "top_k": min(how.top_k, self.cfg.vocab_size),
                "seed": how.seed & 0x7FFFFFFF,
                "top_p": how.top_p,
                "penalty": how.repetition_penalty,
                "temperature": how.temperature,
                "min_p": how.min_p,
                "active": True,
            }
            for name, value in values.items():
                named[name][at] = value
            named["forced"][at, : len(row.forced)] = row.forced
        return owners, rows

    def _most(self, row: Row) -> int:
        """Tokens a row may write: as asked, and as its slots in the cache allow (the last one is never fed)."""
        return min(row.sampling.max_tokens, self.max_new, self.max_len - len(row.prompt) + 1)

    def _advance(self, row: Row, token: int, drawn: bool, logprob: float) -> None:
        """Take a row's next token, drawn or forced, and see what follows from it: a tool call, the end."""
        completion = row.completion
        if drawn and token in (self._token["assistant_end"], self._token["bos"]):
            self._finish(row, "stop")
            return
        completion.ids.append(token)
        completion.mask.append(int(drawn))
        if self._logprobs:
            completion.logprobs.append(logprob)
        if not drawn:
            row.forced.pop(0)
        elif token == self._token["python_start"]:
            self._say_unclosed(row)
            row.expression = []
        elif token == self._token["python_end"] and row.expression is not None:
            self._call_tool(row)
        elif row.expression is not None:
            row.expression.append(token)
        elif row.text and token not in self.tokenizer.marker_ids:
            self._say(row, row.text.feed(self.tokenizer.decode_bytes([token])))
        if row.text and row.text.stopped:
            self._finish(row, "stop")
        elif len(completion.ids) >= self._most(row):
            self._finish(row, "length")

    def _say(self, row: Row, text: str) -> None:
        if text:
            row.events.append({"type": "text", "text": text})

    def _say_unclosed(self, row: Row) -> None:
        """What stands in a python block that is open, and that nothing will close, is text like any other."""
        if row.text and row.expression is not None:
            plain = [token for token in row.expression if token not in self.tokenizer.marker_ids]
            self._say(row, row.text.feed(self.tokenizer.decode_bytes(plain)))
        row.expression = None

    def _whole_text(self, row: Row) -> str:
        """Of an answer that has ended: special tokens by name, up to a stop string, which may have some within it."""
        if not (row.text and row.text.stopped):
            return self.tokenizer.decode(row.completion.ids)
        runs = groupby(row.completion.ids, key=self.tokenizer.marker_ids.__contains__)
        texts = [(special, self.tokenizer.decode(list(run))) for special, run in runs]
        dropped = row.text.dropped
        while dropped and texts:
            special, text = texts.pop()
            if not special:
                texts += [(special, text[:-dropped])] if len(text) > dropped else []
                dropped -= min(dropped, len(text))
        return "".join(text for _, text in texts)

    def _call_tool(self, row: Row) -> None:
        expression = self.tokenizer.decode(row.expression)
        row.expression = None
        result = evaluate_tool(expression)
        call = {"expression": expression, "result": result}
        row.completion.tool_calls.append(call)
        if row.text:
            self._say(row, row.text.flush())
        row.events.append({"type": "tool", **call})
        if result is not None:
            forced = [self._token["output_start"], *self.tokenizer.encode(result), self._token["output_end"]]
            row.forced = forced[:FORCED]

    def _finish(self, row: Row, reason: str) -> None:
        self._rows.pop(row.slot, None)
        if row.text:
            self._say_unclosed(row)
            self._say(row, row.text.flush())
            reason = "stop" if row.text.stopped and reason == "length" else reason
        row.completion.finish_reason = reason  # last: whoever reads without the lock then finds all there is to read

    def _cancel(self, row: Row) -> None:
        with self._lock:
            if not row.done:
                # A copy, made at once: others append without the lock.
                for unit in [unit for unit in self._waiting.copy() if row in unit]:
                    self._waiting.remove(unit)
                self._finish(row, "cancelled")

    def _round(self, rows: int) -> int:
        return -(-rows // self._shards) * self._shards

    def _place(self, arrays: Any) -> Any:
        """Arrays whose first axis is rows, cut over the mesh's data shards."""
        return jax.device_put(arrays, NamedSharding(self.mesh, P(BATCH_AXES)))
