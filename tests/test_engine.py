"""The engine: greedy is exact, rows do not see each other, tools are called, streams cancel, sampling obeys its knobs."""

import gc
import threading
import weakref
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.bench.decode import NoSpecials
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference import engine as engine_module
from nanochat_jax.inference import sampling as steps
from nanochat_jax.inference.buckets import bucket, decode_buckets, prompt_bucket, prompts_at_once, reach_buckets
from nanochat_jax.inference.decoding import prepare
from nanochat_jax.inference.requests import Row, SamplingParams
from nanochat_jax.inference.sampling import FEW, MANY, Method, best, sample
from nanochat_jax.inference.text import TextStream
from nanochat_jax.model import forward, init_params, param_shapes
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import SPECIALS, Tokenizer

Engine = partial(engine_module.Engine, mesh=make_mesh("1"))


@pytest.fixture(scope="module")
def model(tokenizer):
    cfg = GPTConfig.from_depth(ModelConfig(2, 32, 16, None, 96, "SL"), tokenizer.vocab_size)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda p: p + 0.15 * jax.random.normal(next(keys), p.shape), params), cfg


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ("The ship", "Mr. Darcy was not", "It is", "Congress shall assemble at least once in every year", "Whale")
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


@pytest.fixture(params=[False, True], ids=["waits", "runs ahead"])
def ahead(request, monkeypatch):
    """Both ways to launch decodes: as on a CPU, and as on a GPU."""
    made = engine_module.Engine.__init__

    def init(engine, *args, **kwargs):
        made(engine, *args, **kwargs)
        engine._runs_ahead = request.param

    monkeypatch.setattr(engine_module.Engine, "__init__", init)
    return request.param


def one_at_a_time(params, cfg, tokenizer, prompt, count):
    """Greedy continuation by the full forward pass, nothing cached."""
    end = {tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")}
    ids = list(prompt)
    run = jax.jit(forward, static_argnums=1)
    for _ in range(count):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        token = int(jnp.argmax(run(params, cfg, padded)[0, len(ids) - 1]))
        if token in end:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_an_engine_that_is_let_go_of_leaves_the_device_at_once(model, tokenizer, prompts):
    """Not when Python next looks for cycles: training goes on meanwhile, in the memory that is left."""
    gc.collect()
    gc.disable()
    try:
        engine = Engine(*model, tokenizer, max_rows=2)
        engine.generate(prompts, SamplingParams(0.0, max_tokens=4))
        held = weakref.ref(engine)
        del engine
        assert held() is None
    finally:
        gc.enable()


def test_greedy_equals_the_full_forward_with_rows_joining_and_leaving(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=2)
    lengths = (3, 12, 7, 20, 5)
    how = [SamplingParams(0.0, max_tokens=n) for n in lengths]
    answers = engine.generate(prompts, how)
    for prompt, answer, n in zip(prompts, answers, lengths, strict=True):
        assert answer.ids == one_at_a_time(params, cfg, tokenizer, prompt, n)
        assert answer.finish_reason == ("length" if len(answer.ids) == n else "stop")


def test_a_row_depends_only_on_its_prompt_and_seed(model, tokenizer, prompts):
    params, cfg = model
    how = [SamplingParams(1.0, top_k=20, max_tokens=10, seed=100 + i) for i in range(5)]
    together = Engine(params, cfg, tokenizer, max_rows=4).generate(prompts, how)
    for i in (0, 3, 4):
        alone = Engine(params, cfg, tokenizer, max_rows=1).generate([prompts[i]], [how[i]])
        assert alone[0].ids == together[i].ids


def test_samples_of_a_prompt_differ_and_repeat_with_the_seed(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=4)
    how = SamplingParams(1.0, max_tokens=8, seed=7)
    first = [answer.ids for answer in engine.generate(prompts[:1], how, samples=4)]
    assert len({tuple(ids) for ids in first}) == 4
    assert first == [answer.ids for answer in engine.generate(prompts[:1], how, samples=4)]


def knobs_at_random(random, i):
    """Some greedy, some with top-k, top-p, min-p, a repetition penalty, in any combination."""
    return SamplingParams(
        temperature=random.choice([0.0, 0.7, 1.0]),
        top_k=random.choice([0, 0, 20, 90]),
        top_p=random.choice([1.0, 1.0, 0.8]),
        min_p=random.choice([0.0, 0.05]),
        repetition_penalty=random.choice([1.0, 1.0, 1.3]),
        max_tokens=random.randint(1, 40),
        seed=1000 + i,
    )


def test_no_row_depends_on_its_neighbours_with_joins_and_leaves_at_random(model, tokenizer, prompts, ahead):
    """Streams that begin and are broken off at random, whole requests between them: token for token as one at a time."""
    params, cfg = model
    random = Random(5)
    requests = [(random.choice(prompts)[: random.randint(1, 20)], knobs_at_random(random, i)) for i in range(24)]
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    alone = [engine.generate([prompt], how)[0] for prompt, how in requests]
    engine = Engine(params, cfg, tokenizer, max_rows=4)
    rows, got, waiting = {}, {}, list(range(24))
    while len(got) < 24:
        for _ in range(random.randint(0, 3)):
            if waiting:
                i = waiting.pop(0)
                rows[i] = engine._row(*requests[i], None)
                engine._waiting.append([rows[i]])
        if random.random() < 0.2:
            broken = engine.stream(prompts[0], SamplingParams(max_tokens=30, seed=i))
            next(broken)
            broken.close()
        engine.step()
        for i, row in list(rows.items()):
            if row.done:
                got[i] = rows.pop(i).completion
    for i, answer in enumerate(alone):
        assert got[i].ids == answer.ids and got[i].finish_reason == answer.finish_reason, i
    assert sizes_decoded(engine) == {1, 4} or (ahead and sizes_decoded(engine) == {4})


def test_the_next_tokens_are_asked_for_before_the_last_ones_are_there_unless_somebody_waits(
    model, tokenizer, prompts, ahead, monkeypatch
):
    params, cfg = model
    happened = []

    def noting(name, real):
        return lambda *args, **kwargs: (happened.append(name), real(*args, **kwargs))[1]

    monkeypatch.setattr(engine_module, "decode", noting("decode", engine_module.decode))
    monkeypatch.setattr(jax, "device_get", noting("get", jax.device_get))
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    engine._waiting.append([engine._row(prompts[0], SamplingParams(1.0, max_tokens=60), None)])
    engine.step()
    assert happened == (["decode", "decode", "get"] if ahead else ["decode", "get", "decode"])
    happened.clear()
    engine._waiting.append([engine._row(prompts[1], SamplingParams(1.0, max_tokens=60), None)])
    engine.step()
    assert happened == ["get", "decode"]


def test_who_waits_is_let_in_once_an_eighth_of_the_rows_is_free(model, tokenizer, prompts, monkeypatch):
    """Of 16 rows two; for those who wait no more than they are."""
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=16)
    joined, real = [], engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda rows, *a: joined.append(len(rows)) or real(rows, *a))
    how = SamplingParams(1.0, max_tokens=60)
    rows = [engine._row(prompts[0], replace(how, max_tokens=3 + 2 * i, seed=i), None) for i in range(19)]
    engine._waiting.extend([row] for row in rows)
    engine.step()
    assert joined == [1]  # one prompt of 16 rows
    ended = []
    while engine._waiting:
        before = sum(row.done for row in rows)
        engine.step()
        ended.append(sum(row.done for row in rows) - before)
    assert [count for count in ended if count] == [2, 1] and len(joined) == 3  # for two of them, and for the last


def sizes_decoded(engine):
    """Numbers of rows for which decoding was compiled."""
    return {name[-1] for name in engine.compiled if name[0] == "decode"}


def test_rows_that_nobody_uses_are_not_decoded(model, tokenizer, prompts):
    """But where rounding would tell a row how many neighbours it has, and where data shards hold the rows."""
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=8)
    for count, sizes in ((1, {1}), (3, {1, 4}), (4, {1, 4}), (5, {1, 4, 8})):
        engine.generate([prompts[0]] * count, SamplingParams(0.0, max_tokens=3))
        assert sizes_decoded(engine) == sizes
    rounded = replace(cfg, compute_dtype="bfloat16")
    for other, options in ((rounded, {}), (cfg, {"quantize": "int8"}), (cfg, {"mesh": make_mesh("2")})):
        assert Engine(params, other, tokenizer, max_rows=8, **options).decode_sizes == [8]


def test_slots_that_no_row_has_reached_are_not_read(model, tokenizer, prompts):
    """Nothing changes but that: past a window, over the reach of a decode, with joins and leaves, shared prompts."""
    params, cfg = model[0], replace(model[1], sequence_len=384, windows=(128, 384))
    long = [(prompt * 30)[:length] for prompt, length in zip(prompts, (120, 128, 150, 20), strict=False)]
    how = [SamplingParams(1.0, top_k=20, max_tokens=n, seed=n) for n in (40, 2, 10, 150)]
    engine, whole = (Engine(params, cfg, tokenizer, max_rows=2) for _ in range(2))
    assert engine.reaches == [144, 384]
    whole.reaches = [384]
    want = [answer.ids for answer in whole.generate(long, how)]
    assert [answer.ids for answer in engine.generate(long, how)] == want and max(map(len, want)) > 125
    assert reaches_decoded(engine) == {144, 384} and reaches_decoded(whole) == {384}
    together = Engine(params, cfg, tokenizer, max_rows=2, samples=2, max_new=360)
    want = [answer.ids for answer in whole.generate(long[2:], how[2:], samples=2)]
    assert [answer.ids for answer in together.generate(long[2:], how[2:], samples=2)] == want
    assert reaches_decoded(together) == {135, 360}
    rounded = replace(cfg, compute_dtype="bfloat16")  # where rounding would tell a row how far its neighbours are
    assert Engine(params, rounded, tokenizer, max_rows=2).reaches == [384]


def reaches_decoded(engine):
    """Numbers of slots for which decoding was compiled."""
    return {name[2] for name in engine.compiled if name[0] == "decode"}


def test_the_last_row_of_a_full_batch_goes_on_alone(model, tokenizer, prompts):
    """In whatever slot it stands, with the words it has said, and others find their slots unharmed."""
    params, cfg = model
    how = [SamplingParams(1.0, max_tokens=n, seed=n, repetition_penalty=1.5) for n in (2, 3, 60, 2, 4)]
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    want = [engine.generate([prompt], one)[0].ids for prompt, one in zip(prompts, how, strict=True)]
    want_late = engine.generate(prompts[:1], how[2])[0].ids
    engine = Engine(params, cfg, tokenizer, max_rows=8)
    rows = [engine._row(prompt, one, None) for prompt, one in zip(prompts, how, strict=True)]
    engine._waiting.extend([row] for row in rows)
    while len(engine._rows) != 1:
        engine.step()
    late = engine._row(prompts[0], how[2], None)
    engine.step()
    engine._waiting.append([late])
    while not (rows[2].done and late.done):
        engine.step()
    assert [row.completion.ids for row in rows] == want and late.completion.ids == want_late
    assert sizes_decoded(engine) == {1, 4, 8}


@pytest.mark.usefixtures("ahead")
def test_samples_that_share_a_prompt_say_what_rows_of_their_own_say(model, tokenizer, prompts):
    """Also fewer samples than share a prompt, more prompts than fit, and a stream beside them."""
    params, cfg = model
    how = SamplingParams(1.0, top_k=20, max_tokens=25, seed=9)
    alone = Engine(params, cfg, tokenizer, max_rows=4)
    together = Engine(params, cfg, tokenizer, max_rows=6, samples=3, max_new=25)
    assert together.cache_bytes < Engine(params, cfg, tokenizer, max_rows=6).cache_bytes
    for samples in (3, 2, 5):
        want = [a.ids for a in alone.generate(prompts, how, samples)]
        assert [a.ids for a in together.generate(prompts, how, samples)] == want
    apart = [replace(how, max_tokens=2), how]  # the second prompt's samples go on without the first's
    want = [a.ids for a in alone.generate(prompts[:2], apart, 3)]
    assert [a.ids for a in together.generate(prompts[:2], apart, 3)] == want
    assert sizes_decoded(together) == {3, 6}
    text = "".join(event.get("text", "") for event in together.stream(prompts[0], how))
    assert text == "".join(event.get("text", "") for event in alone.stream(prompts[0], how))


@pytest.mark.parametrize(
    "spec",
    [*(pytest.param(spec, marks=pytest.mark.slow) for spec in ("4", "tensor=2")), "data=2,tensor=2", "fsdp=2,tensor=2"],
)
def test_rows_over_a_mesh_say_the_same(model, tokenizer, prompts, spec):
    params, cfg = model
    how = [SamplingParams(0.0, max_tokens=20), *[SamplingParams(1.0, max_tokens=20, seed=i) for i in range(3)]]
    how.append(SamplingParams(1.0, top_k=30, max_tokens=20))
    alone = [a.ids for a in Engine(params, cfg, tokenizer, max_rows=4).generate(prompts, how)]
    engine = Engine(params, cfg, tokenizer, max_rows=4, mesh=make_mesh(spec))
    assert [a.ids for a in engine.generate(prompts, how)] == alone
    shared = Engine(params, cfg, tokenizer, max_rows=8, mesh=make_mesh(spec), samples=2, max_new=20)
    twice = [a.ids for a in Engine(params, cfg, tokenizer, max_rows=8).generate(prompts, how, samples=2)]
    assert [a.ids for a in shared.generate(prompts, how, samples=2)] == twice


def test_int8_rows_do_not_depend_on_their_neighbours(model, tokenizer, prompts):
    params, cfg = model
    how = SamplingParams(0.0, max_tokens=20)
    alone = Engine(params, cfg, tokenizer, max_rows=4, quantize="int8")
    assert "int8" in alone.describe()
    one = Engine(params, cfg, tokenizer, max_rows=1, quantize="int8")
    want = [one.generate([prompt], how)[0].ids for prompt in prompts]
    assert [a.ids for a in alone.generate(prompts, how)] == want


def test_log_probabilities_are_the_models_own(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=4, logprobs=True)
    how = SamplingParams(0.7, top_k=5, max_tokens=10, repetition_penalty=1.4)
    run = jax.jit(forward, static_argnums=1)
    for prompt, answer in zip(prompts, engine.generate(prompts, how), strict=True):
        whole = np.zeros((1, 96), np.int32)
        whole[0, : len(prompt) + len(answer.ids)] = [*prompt, *answer.ids]
        logprobs = jax.nn.log_softmax(run(params, cfg, whole)[0])
        at = len(prompt) - 1 + np.arange(len(answer.ids))
        np.testing.assert_allclose(answer.logprobs, logprobs[at, np.asarray(answer.ids, int)], atol=1e-4)


def test_compilations_are_counted_and_bounded(model, tokenizer, prompts, compilations):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=3, max_len=90)
    random = Random(1)
    for i in range(12):
        chosen = random.choices(prompts, k=random.randint(1, 5))
        engine.generate([(p * 9)[: random.randint(1, 80)] for p in chosen], [knobs_at_random(random, i)] * len(chosen))
    made = compilations.count("jit(prefill)") + compilations.count("jit(decode)")
    assert made == len(engine.compiled) <= engine.most_compilations()


def test_decoding_does_not_sort_the_vocabulary(model, tokenizer, prompts, monkeypatch):
    params, cfg = model
    programs = []

    def spied(*args, **options):
        programs.append(steps.decode.lower(*args, **options).compile().as_text())
        return steps.decode(*args, **options)

    monkeypatch.setattr(engine_module, "decode", spied)
    engine = Engine(params, cfg, tokenizer, max_rows=2, max_len=40)
    engine.generate(prompts[:1], SamplingParams(top_k=50, max_tokens=1))
    assert "TopK" in programs[0] and " sort(" not in programs[0]


def rigged(tokenizer, *chains):
    """A model that goes on after a token with the one behind it in `chains`."""
    cfg = GPTConfig.from_depth(ModelConfig(1, 512, 512, None, 96, "L"), tokenizer.vocab_size)
    params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), param_shapes(cfg))
    wte, head = np.zeros((cfg.padded_vocab_size, 512), np.float32), np.zeros((512, cfg.padded_vocab_size), np.float32)
    wte[np.arange(cfg.vocab_size), np.arange(cfg.vocab_size)] = 1
    for here, there in (pair for chain in chains for pair in pairwise(chain)):
        assert head[here].max() == 0, "a token is followed by one token"
        head[here, there] = 1
    return params | {
        "wte": {"embedding": jnp.asarray(wte)},
        "lm_head": {"kernel": jnp.asarray(head)},
        "resid_lambda": jnp.ones(1),
    }, cfg


@pytest.mark.usefixtures("ahead")
def test_the_tool_is_called_and_its_answer_forced(tokenizer):
    """The expression goes to the calculator, the result comes back masked, and the model goes on after it."""
    special = {name: tokenizer.special_id(f"<|{name}|>") for name in ("python_start", "python_end", "output_end")}
    call = [special["python_start"], *tokenizer.encode("12+7"), special["python_end"]]
    after = tokenizer.encode("x")[0]
    said = [0, *call], [special["output_end"], after, tokenizer.special_id("<|assistant_end|>")]
    params, cfg = rigged(tokenizer, *said)
    engine = Engine(params, cfg, tokenizer, max_rows=2, logprobs=True)
    for answer in engine.generate([[0], [0]], SamplingParams(0.0, max_tokens=50)):
        output = tokenizer.decode(answer.ids[len(call) : -1])
        assert answer.ids[: len(call)] == call and output == "<|output_start|>19<|output_end|>"
        assert answer.ids[-1] == after and answer.finish_reason == "stop"
        forced = len(answer.ids) - len(call) - 1
        assert answer.mask == [1] * len(call) + [0] * forced + [1]
        assert [p == 0 for p in answer.logprobs] == [False] * len(call) + [True] * forced + [False]
        assert answer.tool_calls == [{"expression": "12+7", "result": "19"}]
    events = list(engine.stream([0], SamplingParams(0.0, max_tokens=50)))
    assert [event["type"] for event in events] == ["tool", "text", "done"] and events[1]["text"] == "x"


@pytest.mark.usefixtures("ahead")
def test_others_do_not_write_on_while_a_row_waits_for_its_tool(tokenizer):
    """Of two rows one calls: what is launched behind its pause stops at once."""
    call = [tokenizer.special_id("<|python_start|>"), tokenizer.encode("1")[0], tokenizer.special_id("<|python_end|>")]
    loop = tokenizer.encode("abc")[:2]
    params, cfg = rigged(tokenizer, [0, *call], [*loop, loop[0]])
    engine = Engine(params, cfg, tokenizer, max_rows=2)
    caller, other = (engine._row([first], SamplingParams(0.0, max_tokens=80), None) for first in (0, loop[0]))
    engine._waiting.extend([[caller], [other]])
    written = {}
    while not caller.completion.tool_calls or not (1 - np.asarray(caller.completion.mask)).any():
        engine.step()
        written.setdefault(len(caller.completion.tool_calls), len(other.completion.ids))
    assert written[1] <= len(call) + 1 and len(other.completion.ids) <= written[1] + steps.CHUNK


@pytest.mark.usefixtures("ahead")
def test_a_row_that_ended_by_a_stop_string_is_not_decoded_ahead(tokenizer, monkeypatch):
    loop = tokenizer.encode("abc")[:2]
    params, cfg = rigged(tokenizer, [*loop, loop[0]])
    engine = Engine(params, cfg, tokenizer, max_rows=2)
    launched = []
    real = engine._launch

    def launch(before, *ahead):
        launched.append(before is not None and any(row.done for row in before.owners.values()))
        return real(before, *ahead)

    monkeypatch.setattr(engine, "_launch", launch)
    stop = (tokenizer.decode([loop[1]]),)
    short, long = SamplingParams(0.0, max_tokens=60, stop=stop), SamplingParams(0.0, max_tokens=60)
    answers = engine.generate([[loop[0]]] * 2, [short, long])
    assert [answer.finish_reason for answer in answers] == ["stop", "length"] and len(launched) > 3
    assert not any(launched)


def test_a_failing_expression_forces_nothing(model, tokenizer):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    row = Row((1,), SamplingParams(max_tokens=50))
    start, end = (tokenizer.special_id(f"<|python_{side}|>") for side in ("start", "end"))
    for token in (start, *tokenizer.encode("1/0"), end):
        engine._advance(row, token, True, 0.0)
    assert not row.forced and row.completion.tool_calls == [{"expression": "1/0", "result": None}]


def ids_of(tokenizer, pieces):
    """Special tokens by name, else text."""
    return [i for p in pieces for i in ([tokenizer.special_id(p)] if p.startswith("<|") else tokenizer.encode(p))]


def test_a_long_result_is_forced_whole(model, tokenizer):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    row = Row((1,), SamplingParams(max_tokens=50))
    for token in ids_of(tokenizer, ["<|python_start|>", "1/3", "<|python_end|>"]):
        engine._advance(row, token, True, 0.0)
    assert tokenizer.decode(row.forced) == "<|output_start|>0.3333333333333333<|output_end|>"


@pytest.mark.parametrize(
    ("pieces", "said", "whole", "reason"),
    [
        (["So ", "<|python_start|>", "1+1 END x", "<|assistant_end|>"], "So 1+1 ", "So <|python_start|>1+1 ", "stop"),
        (["So ", "<|python_start|>", "1+1 END x"], "So 1+1 ", "So <|python_start|>1+1 ", "stop"),
        (["So ", "<|python_start|>", "1+1 EN"], "So 1+1 EN", "So <|python_start|>1+1 EN", "length"),
        (["<|python_start|>", "1 END", "<|user_start|>", "2", "<|bos|>"], "1 ", "<|python_start|>1 ", "stop"),
        (["<|python_start|>", "1", "<|user_start|>", "2"], "12", "<|python_start|>1<|user_start|>2", "length"),
        (["a EN", "<|python_start|>", "D", "<|assistant_end|>"], "a ", "a ", "stop"),
        (["<|python_start|>", "1 EN", "<|python_start|>", "D"], "1 ", "<|python_start|>1 ", "stop"),
        (["EN", "<|output_start|>", "D b"], "", "", "stop"),
        (["EN", "<|output_start|>", "E b"], "ENE b", "EN<|output_start|>E b", "length"),
        (["EN", "<|python_start|>", "1+", "<|python_end|>", "D"], "EN D", None, "length"),
    ],
)
def test_stop_strings_count_in_a_block_that_is_never_closed_and_past_special_tokens(
    model, tokenizer, pieces, said, whole, reason
):
    """Only a tool's event, here as a blank, cuts one in two; special tokens are in the whole text only."""
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    ids = ids_of(tokenizer, pieces)
    row = Row((1,), SamplingParams(max_tokens=len(ids), stop=("END",)), TextStream(("END",)))
    for token in ids:
        if not row.done:
            engine._advance(row, token, True, 0.0)
    assert "".join(event.get("text", " ") for event in row.events) == said
    assert row.completion.finish_reason == reason
    assert engine._whole_text(row) == ("".join(pieces) if whole is None else whole)


def test_special_tokens_of_ones_own_are_text_by_name(tokenizer):
    """In streams as in whole answers, and stop strings may hold them."""
    own = Tokenizer(tokenizer.ranks[:-1], tokenizer.pattern, [*SPECIALS, "<|think|>"])
    said = ["a", "<|output_start|>", "b", "<|think|>", "c", "<|assistant_end|>"]
    params, cfg = rigged(own, [0, *ids_of(own, said)])
    engine = Engine(params, cfg, own, max_rows=1)
    for stop, streamed, whole in (((), "ab<|think|>c", "".join(said[:-1])), (("b<|th",), "a", "a<|output_start|>")):
        how = SamplingParams(0.0, max_tokens=9, stop=stop)
        assert "".join(event.get("text", "") for event in engine.stream([0], how)) == streamed
        assert engine.generate([[0]], how)[0].text == whole
    params, cfg = rigged(own, [0, *ids_of(own, ["<|python_start|>", "<|think|>", "a", "<|assistant_end|>"])])
    unclosed = Engine(params, cfg, own, max_rows=1).stream([0], SamplingParams(0.0, max_tokens=9))
    assert "".join(event.get("text", "") for event in unclosed) == "<|think|>a"


def test_a_row_is_done_once_all_its_text_is_there(model, tokenizer, monkeypatch):
    """Who streams it looks at that without the lock."""
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    row = Row((1,), SamplingParams(), TextStream(), expression=tokenizer.encode("12"))
    seen = []
    monkeypatch.setattr(engine, "_say", lambda row, text: seen.append(row.done))
    engine._finish(row, "length")
    assert seen and not any(seen) and row.done


def test_a_block_that_is_never_closed_is_streamed_as_text(tokenizer):
    params, cfg = rigged(tokenizer, [0, *ids_of(tokenizer, ["<|python_start|>", "1/3", "<|python_end|>"])])
    events = list(Engine(params, cfg, tokenizer, max_rows=1).stream([0], SamplingParams(0.0, max_tokens=2)))
    assert events[:-1] == [{"type": "text", "text": "1"}] and events[-1]["finish_reason"] == "length"


def test_a_bos_ends_an_answer(tokenizer):
    params, cfg = rigged(tokenizer, [0, 5, tokenizer.bos_id])
    (answer,) = Engine(params, cfg, tokenizer, max_rows=1).generate([[0]], SamplingParams(0.0, max_tokens=9))
    assert answer.ids == [5] and answer.finish_reason == "stop"


def test_an_answer_that_never_ends_fills_the_context(tokenizer):
    """The last token is written but never fed, so that it takes no place in the cache."""
    params, cfg = rigged(tokenizer, [5, 5])
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    for length in (90, 95):
        (answer,) = engine.generate([[5] * length], SamplingParams(0.0, max_tokens=50))
        assert answer.ids == [5] * (96 - length + 1) and answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "stopped"),
    [
        (["one ST", "OP two"], ["STOP"], "one ", True),
        (["one STO", "P two"], ["STOP"], "one ", True),
        (["one ST", "ART two"], ["STOP"], "one START two", False),
        (["abcab", "cd rest"], ["abcd"], "abc", True),
        (["x second first"], ["first", "second"], "x ", True),
        (["ends in ST"], ["STOP"], "ends in ST", False),
        ([b"caf\xc3", b"\xa9 \xf0\x9f", b"\x90\x8b!"], [], "café 🐋!", False),
        ([b"half \xf0\x9f"], [], "half \ufffd", False),
        ([b"\xc3", b"\xa9STOP"], ["éS"], "", True),
        (["Call"], ["l"], "Ca", True),
        ([b"end\n\n\xf0\x9f"], ["\n"], "end", True),
    ],
)
def test_text_is_whole_characters_up_to_a_stop_string(pieces, stop, expected, stopped):
    stream = TextStream(stop)
    sent = [stream.feed(piece if isinstance(piece, bytes) else piece.encode()) for piece in pieces]
    assert all("\ufffd" not in text for text in sent)
    assert "".join(sent) + stream.flush() == expected and stream.stopped == stopped
    if stopped:
        fed = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
        assert fed.decode(errors="replace")[: -stream.dropped] == expected


@pytest.mark.usefixtures("ahead")
def test_a_stop_string_ends_an_answer_before_it(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=2)
    free = engine.generate(prompts[:1], SamplingParams(0.0, max_tokens=30))[0]
    stop = free.text[10:13]
    how = SamplingParams(0.0, max_tokens=30, stop=("never said", stop))
    whole = engine.generate(prompts[:1], how)[0]
    assert whole.text == free.text[: free.text.index(stop)] and whole.finish_reason == "stop"
    assert len(whole.ids) < len(free.ids)
    events = list(engine.stream(prompts[0], how))
    assert "".join(event.get("text", "") for event in events) == whole.text
    assert events[-1]["finish_reason"] == "stop"


def test_a_top_p_that_rounds_to_one_draws_from_all(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=4)
    whole, nearly = (
        engine.generate(prompts[:1] * 4, [SamplingParams(2.0, top_p=top_p, max_tokens=8, seed=i) for i in range(4)])
        for top_p in (1.0, 0.99999999)
    )
    assert [answer.ids for answer in nearly] == [answer.ids for answer in whole]
    assert len({tuple(answer.ids) for answer in nearly}) == 4


def test_texts_that_came_together_are_one_event(model, prompts):
    class AllText(NoSpecials):
        def decode_bytes(self, ids):
            return b"a" * len(ids)

    params, cfg = model
    text = {"type": "text", "text": "a"}
    row = Row((1,), SamplingParams(), events=deque([text, text, {"type": "tool"}, text, text]))
    taken = [row.next_event() for _ in range(3)]
    assert taken == [text | {"text": "aa"}, {"type": "tool"}, text | {"text": "aa"}] and not row.events
    engine = Engine(params, cfg, AllText(), max_rows=1)
    *texts, done = engine.stream(prompts[0], SamplingParams(max_tokens=18))
    assert [len(event["text"]) for event in texts] == [1, 16, 1] and done["usage"]["completion_tokens"] == 18


@pytest.mark.usefixtures("ahead")
def test_streams_share_the_batch_and_say_what_generate_says(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=3)
    how = SamplingParams(0.0, max_tokens=12)
    texts = {}

    def read(i):
        events = list(engine.stream(prompts[i], how))
        texts[i] = "".join(event["text"] for event in events if event["type"] == "text")
        assert events[-1]["type"] == "done"
        assert events[-1]["usage"]["prompt_tokens"] == len(prompts[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in enumerate(engine.generate(prompts, how)):
        plain = [token for token in answer.ids if token not in tokenizer.marker_ids]
        assert texts[i] == tokenizer.decode_bytes(plain).decode("utf-8", "replace")


def test_new_parameters_are_used_and_compile_nothing(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    how = SamplingParams(0.0, max_tokens=8)
    other = jax.tree.map(lambda p: -p, params)
    known = prepare._cache_size()
    engine.use(other)
    assert prepare._cache_size() == known
    changed = engine.generate(prompts[:1], how)[0].ids
    assert changed == one_at_a_time(other, cfg, tokenizer, prompts[0], 8)
    assert changed != one_at_a_time(params, cfg, tokenizer, prompts[0], 8)


def test_requests_that_do_not_fit_wait_in_order(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    rows = [engine._row(prompt, SamplingParams(0.0, max_tokens=3), None) for prompt in prompts]
    engine._waiting.extend([row] for row in rows)
    ended = []
    while len(ended) < len(rows):
        engine.step()
        assert len(engine._rows) <= 1
        ended += [row for row in rows if row.done and row not in ended]
    assert ended == rows


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(("failing", "after"), [("prefill", 0), ("prefill", 1), ("decode", 0)])
def test_a_failing_step_breaks_off_what_runs_and_the_engine_goes_on(
    model, tokenizer, prompts, monkeypatch, failing, after
):
    """The device call has already taken the cache away: what ran is told so, what waited is answered right."""
    params, cfg = model
    prompts = [prompts[0], (prompts[3] * 9)[:60], *prompts[2:]]  # the first two are read one after the other
    calls = iter(range(9))
    how = SamplingParams(0.0, max_tokens=12)
    engine = Engine(params, cfg, tokenizer, max_rows=2)
    want = [answer.ids for answer in engine.generate(prompts, how)]
    real = getattr(steps, failing)

    def broken(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == after:
            raise KeyboardInterrupt
        return result

    victim = engine.stream(prompts[1], how)
    rows = [engine._row(prompt, how, None) for prompt in prompts[:3]]
    engine._waiting.extend([row] for row in rows)
    monkeypatch.setattr(engine_module, failing, broken)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine_module, failing, real)
    assert [row.completion.finish_reason for row in rows] == ["failed", "failed", ""]
    assert [answer.ids for answer in engine.generate(prompts, how)] == want
    assert rows[2].completion.ids == want[2]
    assert list(victim)[-1]["type"] == "done"


def test_whoever_waits_for_a_row_that_failed_is_told(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    stream = engine.stream(prompts[0], SamplingParams(1.0, max_tokens=80))
    next(stream)
    for row in list(engine._rows.values()):
        engine._finish(row, "failed")
    with pytest.raises(RuntimeError, match="broke off"):
        list(stream)


@pytest.mark.usefixtures("ahead")
def test_closing_a_stream_frees_its_row(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    stream = engine.stream(prompts[0], SamplingParams(1.0, max_tokens=80))
    next(stream)
    assert engine._rows
    stream.close()
    assert not engine._rows and not engine._waiting
    assert engine.generate(prompts[:1], SamplingParams(0.0, max_tokens=3))[0].ids


def test_logits_at_the_end_of_each_prompt(model, tokenizer, prompts):
    params, cfg = model
    got = Engine(params, cfg, tokenizer, max_rows=1).logits_at(prompts)
    whole = jax.jit(forward, static_argnums=1)
    for prompt, logits in zip(prompts, got, strict=True):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(prompt)] = prompt
        np.testing.assert_allclose(logits, whole(params, cfg, padded)[0, len(prompt) - 1], atol=1e-4)


def test_what_does_not_fit_is_an_error(model, tokenizer):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    with pytest.raises(UserError, match="95 fit"):
        engine.generate([[1] * 96], SamplingParams())
    with pytest.raises(UserError, match="top_p"):
        SamplingParams(top_p=0.0)
    with pytest.raises(ValueError, match="positions reach"):
        engine.logits_at([[1] * (cfg.max_positions + 1)])
    for stop in ("abc", ("",)):
        with pytest.raises(UserError, match="stop"):
            SamplingParams(stop=stop)
    with pytest.raises(UserError, match="int4"):
        Engine(params, cfg, tokenizer, max_rows=1, quantize="int4")


jitted_sample = jax.jit(sample, static_argnums=4)


def draw(logits, n, method=None, seen=None, **knobs):
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0}
    kinds = {"top_k": np.int32}
    rows = {k: np.full(n, knobs.get(k, v), kinds.get(k, np.float32)) for k, v in defaults.items()}
    rows["seed"] = np.arange(n, dtype=np.int32)
    seen = np.zeros((n, len(logits)), bool) if seen is None else np.tile(seen, (n, 1))
    method = method or Method(plain=True, candidates=len(logits), penalized="penalty" in knobs)
    return np.asarray(jitted_sample(jnp.tile(logits[:, None], (1, n)), seen, rows, np.zeros(n, np.int32), method))


def test_sampling_follows_the_probabilities():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125]))
    drawn = draw(logits, 4000)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)
    cold = draw(logits, 4000, temperature=0.5)
    np.testing.assert_allclose(np.bincount(cold, minlength=4)[0] / 4000, 0.25 / 0.34375, atol=0.03)


@pytest.mark.parametrize(
    ("knobs", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 0.3, "top_k": 3}, {0, 1}),
        ({"temperature": 0.0}, {0}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_sampling_keeps_to_what_is_allowed(knobs, allowed):
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.14, 0.11]))
    assert set(draw(logits, 500, **knobs).tolist()) == allowed


def test_top_p_takes_no_more_than_it_needs():
    assert set(draw(jnp.asarray([0.0, 0.0, -99.0]), 200, top_p=0.5).tolist()) == {0}


def test_a_draw_is_the_same_whatever_its_neighbours_need():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=300).astype(np.float32)) * 2
    few = draw(logits, 200, Method(candidates=FEW), top_k=30)
    assert (few == draw(logits, 200, Method(True, 300), top_k=30)).all()
    plain = draw(logits, 200, Method(plain=True))
    assert (plain == draw(logits, 200, Method(True, FEW, True, True))).all() and len(set(plain.tolist())) > 20


@pytest.mark.parametrize(("spec", "cut"), [(None, None), ("data=2,tensor=2", P("tensor", "data"))])
@pytest.mark.parametrize("vocab", [8192, 8198])  # the second leaves a block half empty
def test_the_best_of_many_logits_are_those_of_top_k_equal_ones_in_its_order(vocab, spec, cut):
    logits = np.random.default_rng(0).normal(size=(vocab, 16)).astype(np.float32).round(2)
    logits[-1, 0] = logits[100, 1] = 9  # in the last block; alone in one
    logits[:, 2] = 1
    logits[200:, 3] = -np.inf
    assert logits.size >= MANY
    mesh = make_mesh(spec) if spec else None
    placed = jax.device_put(logits, NamedSharding(mesh, cut)) if spec else jnp.asarray(logits)
    with jax.set_mesh(mesh) if spec else nullcontext():
        compiled = jax.jit(best, static_argnums=1).lower(placed, FEW).compile()
        values, tokens = compiled(placed)
    want = np.argsort(-logits.T, axis=1, kind="stable")[:, :FEW]
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_array_equal(values, np.take_along_axis(logits.T, want, axis=1))
    if not spec:  # the whole vocabulary is neither sorted nor turned
        assert f"f32[16,{vocab}]" not in compiled.as_text()


def test_words_that_were_said_become_less_likely():
    logits = jnp.asarray([2.0, 1.5, -1.0, -1.2])
    seen = np.asarray([True, False, True, False])
    assert set(draw(logits, 50, seen=seen, temperature=0.0, penalty=1.5).tolist()) == {1}
    assert set(draw(logits, 50, seen=seen, temperature=0.0, penalty=1.2).tolist()) == {0}
    negative = jnp.asarray([-1.0, -1.1, -9.0, -9.0])
    assert set(draw(negative, 50, seen=seen, temperature=0.0, penalty=1.5).tolist()) == {1}


def test_buckets():
    assert [bucket(n, 32, 96) for n in (1, 32, 33, 70, 96, 97)] == [32, 32, 64, 96, 96, 97]
    assert [bucket(n) for n in (1, 2, 3, 9)] == [1, 2, 4, 16]
    sizes = {1: 32, 33: 64, 90: 128, 128: 128, 129: 192, 193: 256, 300: 384, 385: 500, 501: 501}
    assert {n: prompt_bucket(n, 500) for n in sizes} == sizes


def test_numbers_of_rows_that_are_decoded():
    sizes = {1: [1], 2: [1, 2], 7: [1, 7], 8: [1, 4, 8], 20: [1, 4, 20], 32: [1, 4, 16, 32]}
    assert {most: decode_buckets(most) for most in sizes} == sizes


def test_how_far_a_decode_reads():
    reaches = {96: [96], 341: [128, 341], 340: [128, 340], 338: [338], 512: [192, 512], 2048: [288, 768, 2048]}
    assert {longest: reach_buckets(longest) for longest in reaches} == reaches


def test_prompts_are_read_together_with_little_padding():
    assert [prompts_at_once(n, 64, 16) for n in range(1, 17)] == [1, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8, 16, 16, 16, 16, 16]
    assert [prompts_at_once(n, 64, 6) for n in (4, 5, 6)] == [4, 6, 6]
    assert [prompts_at_once(40, length, 64) for length in (100, 500, 8192, 9000, 20000)] == [32, 32, 2, 1, 1]


def test_waiting_prompts_are_read_with_those_of_their_length(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=4)
    short, long = prompts[0], (prompts[3] * 9)[:60]
    engine.generate([long, short, short, prompts[2]], SamplingParams(0.0, max_tokens=1))
    assert {name for name in engine.compiled if name[0] == "prefill"} == {
        ("prefill", (1, 64), 1),
        ("prefill", (2, 32), 4),
    }
