"""The engine: greedy is exact, rows do not see each other, tools are called, streams cancel, sampling obeys its knobs."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference import sampling as steps
from nanochat_jax.inference.engine import Engine, Row, SamplingParams, bucket
from nanochat_jax.inference.sampling import sample
from nanochat_jax.model import forward, init_params
from nanochat_jax.sharding import make_mesh


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


def test_rows_over_a_mesh_say_the_same(model, tokenizer, prompts):
    params, cfg = model
    how = SamplingParams(0.0, max_tokens=6)
    alone = [a.ids for a in Engine(params, cfg, tokenizer, max_rows=4).generate(prompts, how)]
    engine = Engine(params, cfg, tokenizer, max_rows=4, mesh=make_mesh("4"))
    assert [a.ids for a in engine.generate(prompts, how)] == alone


def test_compilations_are_bounded(model, tokenizer, prompts):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=2)
    engine.generate(prompts, SamplingParams(0.0, max_tokens=4))
    prefills, decodes = steps.prefill._cache_size(), steps.decode._cache_size()
    longer = [prompt + prompt[1:] for prompt in prompts[:3]]
    engine.generate(longer + prompts, SamplingParams(0.0, max_tokens=9))
    assert steps.decode._cache_size() == decodes
    assert steps.prefill._cache_size() <= prefills + 2


def test_the_tool_is_called_and_its_answer_forced(model, tokenizer):
    """Tokens are dealt to a row as if drawn: the expression goes to the calculator, the result comes back masked."""
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    special = {name: tokenizer.special_id(f"<|{name}|>") for name in ("python_start", "python_end")}
    row = Row((1, 2, 3), SamplingParams(max_tokens=50))
    said = [special["python_start"], *tokenizer.encode("12+7"), special["python_end"]]
    for token in said:
        engine._advance(row, token)
    forced = list(row.forced)
    assert tokenizer.decode(forced) == "<|output_start|>19<|output_end|>"
    for _ in forced:
        engine._advance(row, 5)
    engine._advance(row, tokenizer.encode("x")[0])
    engine._advance(row, tokenizer.special_id("<|assistant_end|>"))
    answer = row.completion
    assert answer.mask == [1] * len(said) + [0] * len(forced) + [1]
    assert answer.tool_calls == [{"expression": "12+7", "result": "19"}]
    assert answer.finish_reason == "stop" and answer.ids[-1] == tokenizer.encode("x")[0]


def test_a_failing_expression_forces_nothing(model, tokenizer):
    params, cfg = model
    engine = Engine(params, cfg, tokenizer, max_rows=1)
    row = Row((1,), SamplingParams(max_tokens=50))
    start, end = (tokenizer.special_id(f"<|python_{side}|>") for side in ("start", "end"))
    for token in (start, *tokenizer.encode("1/0"), end):
        engine._advance(row, token)
    assert not row.forced and row.completion.tool_calls == [{"expression": "1/0", "result": None}]


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
        plain = [token for token in answer.ids if token not in tokenizer.special_ids]
        assert texts[i] == tokenizer.decode_bytes(plain).decode("utf-8", "replace")


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
    answer = engine.generate([[1] * 90], SamplingParams(0.0, max_tokens=50))[0]
    assert answer.finish_reason in ("length", "stop") and len(answer.ids) <= 7


jitted_sample = jax.jit(sample, static_argnums=3)


def draw(logits, n, candidates, **knobs):
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    kinds = {"top_k": np.int32}
    rows = {k: np.full(n, knobs.get(k, v), kinds.get(k, np.float32)) for k, v in defaults.items()}
    rows["seed"] = np.arange(n, dtype=np.int32)
    return np.asarray(jitted_sample(jnp.tile(logits[None], (n, 1)), rows, np.zeros(n, np.int32), candidates))


def test_sampling_follows_the_probabilities():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125]))
    drawn = draw(logits, 4000, 4)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)
    cold = draw(logits, 4000, 4, temperature=0.5)
    np.testing.assert_allclose(np.bincount(cold, minlength=4)[0] / 4000, 0.25 / 0.34375, atol=0.03)


@pytest.mark.parametrize(
    ("knobs", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"temperature": 0.0}, {0}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_sampling_keeps_to_what_is_allowed(knobs, allowed):
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.14, 0.11]))
    assert set(draw(logits, 500, 4, **knobs).tolist()) == allowed


def test_buckets():
    assert [bucket(n, 96, 32) for n in (1, 32, 33, 70, 96)] == [32, 32, 64, 96, 96]
