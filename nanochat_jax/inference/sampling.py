"""The jitted steps of generation: prefill prompts into the cache, decode several tokens of some rows or all, sample.

Every row has its own length, sampling parameters and seed. A row's random key comes from its seed and the position of
the token drawn, so what a row says does not depend on its neighbours, on when it joined or on how many tokens are
decoded at once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import GPTConfig
from nanochat_jax.inference.decoding import (
    Cache,
    Weights,
    logits_of,
    part_of,
    read,
    ring_positions,
    squeezed,
    step,
    unsqueezed,
    with_part,
)

FEW = 50
"""Candidates kept where every row with a top-k restricts itself to at most so many: sorting the vocabulary is slow."""
MANY = 2**15
"""Logits of which the best are found in two stages."""
BLOCK = 16
"""Tokens that the first stage takes together."""
CHUNK = 16
"""Tokens of a row decoded at once, at most."""
FORCED = 64
"""Tokens that can be forced into a row at once."""

Knobs = dict
"""Per row: "temperature", "top_p", "min_p", "penalty" float32 [B], "top_k", "seed" int32 [B]."""


class Method(NamedTuple):
    """What the rows at hand need of `sample`; compiled for each combination in use.

    `plain`: some row draws from the whole vocabulary. `candidates`: how many of the best tokens are looked at for rows
    with top-k or top-p, at least every row's top_k, 0 where there is no such row. `penalized`: some row's words count
    against their repetition. `logprobs`: log-probabilities are wanted.
    """

    plain: bool = False
    candidates: int = 0
    penalized: bool = False
    logprobs: bool = False


METHODS = 12
"""Methods that one engine can come to need: plain or not, candidates none, few or all, penalized or not."""


def best(logits_VB: jax.Array, count: int, native: bool = False) -> tuple[jax.Array, jax.Array]:
    """The largest `count` <= V logits of each column, descending, and their tokens: [B, count] each. Of equal ones the
    first tokens come first, as in `jax.lax.top_k`.

    Among many they are found in two stages: the best blocks of BLOCK tokens by their largest logit hold them all. A CPU
    then sorts, and turns, a fraction of the vocabulary.
    """

    if native:
        from kernels.native import top as native_top

        return native_top(logits_VB, count)

    def top(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Unfenced, a slice of what comes out merges with top_k's own and a CPU sorts the whole vocabulary. One fence
        # for both makes XLA abort where the vocabulary is cut over `tensor`.
        values, places = jax.lax.top_k(x_BV, count)
        return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)

    blocks = -(-len(logits_VB) // BLOCK)
    if logits_VB.size < MANY or blocks < 4 * count:  # of fewer blocks the second stage would sort a large part
        return top(logits_VB.T)
    spare = blocks * BLOCK - len(logits_VB)
    padded_VB = jnp.pad(logits_VB, ((0, spare), (0, 0)), constant_values=-jnp.inf)
    _, blocks_BN = top(jnp.max(padded_VB.reshape(blocks, BLOCK, -1), axis=1).T)
    # In the order of the vocabulary, so that equal logits stay in theirs.
    tokens_BNX = jnp.sort(blocks_BN, axis=1)[:, :, None] * BLOCK + jnp.arange(BLOCK)[None, None]
    tokens_BM = tokens_BNX.reshape(len(blocks_BN), -1)
    values_BC, places_BC = top(padded_VB[tokens_BM, jnp.arange(len(tokens_BM))[:, None]])
    return values_BC, jnp.take_along_axis(tokens_BM, places_BC, axis=1)


def sample(
    logits_VB: jax.Array,
    seen_BV: jax.Array,
    knobs: Knobs,
    positions_B: jax.Array,
    method: Method,
    native: bool = False,
) -> jax.Array:
    """One token a row, int32 [B]: repetition penalty (CTRL, arXiv 1909.05858), then top-k, then top-p (arXiv
    1904.09751), then min-p (arXiv 2407.01082), then a draw; temperature 0 takes the most likely token.
    """
    if method.penalized:
        penalty_1B = knobs["penalty"][None]
        discouraged_VB = jnp.where(logits_VB > 0, logits_VB / penalty_1B, logits_VB * penalty_1B)
        logits_VB = jnp.where(seen_BV.T, discouraged_VB, logits_VB)
    if method.candidates:
        best_BC, tokens_BC = best(logits_VB, min(method.candidates, len(logits_VB)), native)
        token_B = tokens_BC[:, 0].astype(jnp.int32)
    else:
        token_B = jnp.argmax(logits_VB, axis=0).astype(jnp.int32)
    impl = None
    if native:
        from kernels.native import random

        impl = random()
    keys_B = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed, impl=impl), at))(
        knobs["seed"], positions_B
    )
    temperature_B = jnp.maximum(knobs["temperature"], 1e-6)
    restricted_B = (knobs["top_k"] > 0) | (knobs["top_p"] < 1)
    drawn = knobs["temperature"] > 0

    def noise(count: int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.gumbel(key, (count,)))(keys_B)

    if method.plain:
        scaled_VB = logits_VB / temperature_B[None]
        least_B = jnp.max(scaled_VB, axis=0) + jnp.log(jnp.maximum(knobs["min_p"], 1e-30))
        noisy_VB = jnp.where(scaled_VB >= least_B[None], scaled_VB + noise(len(logits_VB)).T, -jnp.inf)
        token_B = jnp.where(drawn & ~restricted_B, jnp.argmax(noisy_VB, axis=0).astype(jnp.int32), token_B)
    if method.candidates:
        scaled_BC = best_BC / temperature_B[:, None]
        rank_1C = jnp.arange(best_BC.shape[1])[None]
        keep_BC = rank_1C < jnp.where(knobs["top_k"] > 0, knobs["top_k"], len(logits_VB))[:, None]
        probs_BC = jax.nn.softmax(jnp.where(keep_BC, scaled_BC, -jnp.inf), axis=-1)
        before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
        keep_BC &= before_BC < knobs["top_p"][:, None]
        keep_BC &= probs_BC >= knobs["min_p"][:, None] * probs_BC[:, :1]
        keep_BC |= rank_1C == 0
        noisy_BC = jnp.where(keep_BC, scaled_BC + noise(best_BC.shape[1]), -jnp.inf)
        choice_B1 = jnp.argmax(noisy_BC, axis=-1)[:, None]
        ranked_B = jnp.take_along_axis(tokens_BC, choice_B1, axis=-1)[:, 0].astype(jnp.int32)
        token_B = jnp.where(drawn & restricted_B, ranked_B, token_B)
    return token_B


@functools.partial(jax.jit, static_argnames=("cfg", "shared"), donate_argnames="cache")
def prefill(
    weights: Weights,
    cache: Cache,
    tokens_PT: jax.Array,
    counts_P: jax.Array,
    last_P: jax.Array,
    source_R: jax.Array,
    slot_R: jax.Array,
    place_P: jax.Array,
    *,
    cfg: GPTConfig,
    shared: bool,
) -> Cache:
    """Run P prompts once, all but their last token, and put them into R rows, several of which may share a prompt.

    tokens_PT is padded on the right, counts_P >= 0 are the true lengths, last_P the tokens that the rows begin with.
    Row slot_R[i] takes prompt source_R[i]; a slot past the end is dropped: padding. `shared`: keys and values go to the
    shared prompt place_P[j] instead of into each row.
    """
    prompts = read(weights, cfg, tokens_PT, counts_P)
    (length,) = tokens_PT.shape[1:]
    newest_P = counts_P - 1

    def ring(new_PTKH: jax.Array, slots: int) -> jax.Array:
        """The newest `slots` positions of each prompt where a ring has them: [P, K, S, H]."""
        index_PS = jnp.clip(ring_positions(newest_P, slots), 0, length - 1)
        return jnp.take_along_axis(new_PTKH, index_PS[:, :, None, None], axis=1).swapaxes(1, 2)

    def filled(panels: dict[str, jax.Array], i: int) -> dict[str, jax.Array]:
        new = {"k": prompts.keys[i], "v": prompts.values[i]}
        at, order = (place_P, slice(None)) if shared else (slot_R, source_R)
        if cfg.native:
            from kernels.native import filled as native_filled

            source = jnp.arange(len(counts_P), dtype=jnp.int32)[order]
            # Turned as they were when they came from there, so nothing is.
            return {
                name: native_filled(panel, new[name].swapaxes(1, 2), counts_P, source, at)
                for name, panel in panels.items()
            }
        return {
            name: panel.at[at].set(ring(new[name], panel.shape[2])[order], mode="drop")
            for name, panel in panels.items()
        }

    into = "shared" if shared else "own"
    prev_PD = prompts.embedding_PTD[jnp.arange(len(counts_P)), jnp.maximum(newest_P, 0)]
    real_PT = jnp.arange(length)[None] < counts_P[:, None]
    held_PT = jnp.where(real_PT, tokens_PT, cfg.vocab_size)
    seen_PV = jnp.zeros((len(counts_P), cfg.vocab_size), bool)
    for held in (held_PT, last_P[:, None]):
        seen_PV = seen_PV.at[jnp.arange(len(counts_P))[:, None], held].set(True, mode="drop")
    return cache | {
        into: [filled(panels, i) for i, panels in enumerate(cache[into])],
        "prev": cache["prev"].at[slot_R].set(prev_PD[source_R].astype(cache["prev"].dtype), mode="drop"),
        "seen": cache["seen"].at[slot_R].set(seen_PV[source_R], mode="drop"),
    }


class Rows(NamedTuple):
    """The rows that are decoded, in few arrays, as each takes its time to get to the device; see `by_name`.
    ints [B, len(INTS) + FORCED] int32, floats [B, len(FLOATS)] float32.
    """

    ints: jax.Array
    floats: jax.Array

    def by_name(self) -> dict:
        """[B] each: "slot" in the cache (without C++ row i in slot i, where it is all); "token" to be fed at
        "position", "first" (see `decoding.step`), "budget" tokens it may still write, whether it is "active", and
        "waits" until the host has looked at it; "forced" [B, FORCED] of which [taken, owed) are still to be written;
        and `Knobs`. Of numpy arrays these are views.
        """
        ints, floats = ({name: x[:, i] for i, name in enumerate(n)} for x, n in zip(self, (INTS, FLOATS), strict=True))
        return ints | floats | {"forced": self.ints[:, len(INTS) :]}


INTS = ("slot", "token", "position", "first", "budget", "taken", "owed", "active", "waits", "top_k", "seed")
FLOATS = ("temperature", "top_p", "min_p", "penalty")


def nobodys_rows(slots_B: np.ndarray) -> Rows:
    """Rows in these slots, none of them active, as numpy arrays."""
    batch = len(slots_B)
    rows = Rows(np.zeros((batch, len(INTS) + FORCED), np.int32), np.zeros((batch, len(FLOATS)), np.float32))
    named = rows.by_name()
    named["slot"][:], named["top_p"][:], named["penalty"][:] = slots_B, 1, 1
    return rows


class Written(NamedTuple):
    """What `decode` wrote: how many tokens at most, and of each [CHUNK, B]: the token (-1: nothing), whether the model
    drew it, and its log-probability (0 where not asked for, or not drawn); [B]: whether the row goes on, as the rows
    may be another decode's already.
    """

    count: jax.Array
    tokens: jax.Array
    drawn: jax.Array
    logprobs: jax.Array
    active: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "method", "reach"), donate_argnames=("cache", "rows"))
def decode(
    weights: Weights,
    cache: Cache,
    rows: Rows,
    limit: jax.Array,
    enough: jax.Array,
    ends: jax.Array,
    marker: jax.Array,
    *,
    cfg: GPTConfig,
    method: Method,
    reach: int,
) -> tuple[Written, Rows, Cache]:
    """Up to `limit` <= CHUNK tokens in every one of `rows`, which may be fewer than the cache has, and none of which
    gets to more than `reach` tokens of its own: what is beyond in the cache is not read.

    A row stops after one of the tokens `ends` or when its budget is spent, and pauses after the token `marker`, which
    the host has to look at. All stop early when an eighth of the running rows wait for that, or when `enough` rows have
    ended in it.
    """
    given, rows = rows, rows.by_name()
    rows |= {name: rows[name] != 0 for name in ("active", "waits")}
    batch = len(rows["token"])
    running = jnp.sum(rows["active"] | rows["waits"])
    blank = jnp.full((CHUNK, batch), -1, jnp.int32)
    flags, numbers = jnp.zeros((CHUNK, batch), bool), jnp.zeros((CHUNK, batch), jnp.float32)
    written = Written(jnp.int32(0), blank, flags, numbers, rows["active"])

    def proceed(carry: tuple) -> jax.Array:
        written, rows, _, paused, ended = carry
        waits = (paused > 0) & (8 * paused >= running - ended)
        return (written.count < limit) & jnp.any(rows["active"]) & ~waits & (ended < enough)

    def one(carry: tuple) -> tuple:
        written, rows, cache, paused, ended = carry
        active = rows["active"]
        fed = (rows[name] for name in ("token", "position", "first", "active"))
        logits_VB, cache = step(weights, cache, *fed, cfg, slots if cfg.native else None)
        drawn = rows["taken"] >= rows["owed"]
        seen_BV = cache["seen"][slots] if cfg.native else cache["seen"]
        chosen = sample(logits_VB, seen_BV, rows, rows["position"] + 1, method, cfg.native)
        token = jnp.where(drawn, chosen, rows["forced"][jnp.arange(batch), jnp.minimum(rows["taken"], FORCED - 1)])
        logprob = jnp.zeros(batch, jnp.float32)
        if method.logprobs:
            logprob = logits_VB[token, jnp.arange(batch)] - jax.nn.logsumexp(logits_VB, axis=0)
        over = active & drawn & jnp.isin(token, ends)
        wrote = active & ~over
        waits = wrote & drawn & (token == marker)
        budget = rows["budget"] - wrote
        if method.penalized:
            at = slots if cfg.native else jnp.arange(batch)
            cache = cache | {"seen": cache["seen"].at[at, token].max(wrote)}
        now, goes_on = written.count, wrote & ~waits & (budget > 0)
        return (
            Written(
                now + 1,
                written.tokens.at[now].set(jnp.where(active, token, -1)),
                written.drawn.at[now].set(active & drawn),
                written.logprobs.at[now].set(jnp.where(wrote & drawn, logprob, 0.0)),
                goes_on,
            ),
            rows
            | {
                "token": jnp.where(wrote, token, rows["token"]),
                "position": rows["position"] + wrote,
                "budget": budget,
                "taken": rows["taken"] + (wrote & ~drawn),
                "active": goes_on,
                "waits": rows["waits"] | waits,
            },
            cache,
            paused + jnp.sum(waits),
            ended + jnp.sum(over | (wrote & (budget <= 0))),
        )

    slots = rows["slot"]
    # The kernels in C++ find keys and values in the whole cache.
    part = cache | {"prev": cache["prev"][slots]} if cfg.native else part_of(cache, slots, reach)
    alone = batch == 1 and "shared" not in cache and not cfg.native
    # Behind a decode that stopped for rows that wait, this one stops at once.
    waiting = jnp.sum(rows["waits"], dtype=jnp.int32)
    carry = (written, rows, squeezed(part) if alone else part, waiting, jnp.int32(0))
    written, rows, part, _, _ = jax.lax.while_loop(proceed, one, carry)
    part = unsqueezed(part) if alone else part
    ints = jnp.stack([rows[name].astype(jnp.int32) for name in INTS], axis=1)
    rows = given._replace(ints=jnp.concatenate([ints, rows["forced"]], axis=1))
    if cfg.native:
        return written, rows, part | {"prev": cache["prev"].at[slots].set(part["prev"])}
    return written, rows, with_part(cache, part, slots)


@functools.partial(jax.jit, static_argnames="cfg")
def last_logits(weights: Weights, tokens_PT: jax.Array, counts_P: jax.Array, *, cfg: GPTConfig) -> jax.Array:
    """Logits float32 [P, vocabulary] after the last true token of each right-padded prompt."""
    hidden_DPT = read(weights, cfg, tokens_PT, counts_P).hidden_DPT
    return logits_of(weights, cfg, hidden_DPT[:, jnp.arange(tokens_PT.shape[0]), counts_P - 1]).T


@functools.partial(jax.jit, static_argnames="cfg")
def token_nats(weights: Weights, inputs_PT: jax.Array, targets_PT: jax.Array, *, cfg: GPTConfig) -> jax.Array:
    """What `train.eval_losses` gives, by the weights of generation: nats float32 [P, T], 0 where the target is -1."""
    logits_VPT = logits_of(weights, cfg, read(weights, cfg, inputs_PT).hidden_DPT)
    chosen_PT = jnp.take_along_axis(logits_VPT, jnp.maximum(targets_PT, 0)[None], axis=0)[0]
    return jnp.where(targets_PT >= 0, jax.nn.logsumexp(logits_VPT, axis=0) - chosen_PT, 0.0)
