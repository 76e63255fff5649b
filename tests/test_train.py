"""The step on any mesh, accumulation, and the overfit test through checkpoint and KV cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.checkpoint import Checkpointer, restore
from nanochat_jax.config import BaseConfig, GPTConfig, ModelConfig
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.optim import Schedule
from nanochat_jax.sharding import make_mesh, put_batch
from nanochat_jax.train import born_params, restored_state, saved_shapes, saved_tree, train_step, with_optimizer

MODEL = ModelConfig(depth=2, aspect_ratio=32, head_dim=16, sequence_len=32)
CFG = GPTConfig.from_depth(MODEL, 128)
SCHEDULE = Schedule(BaseConfig(warmup_steps=2, warmdown_ratio=0.2), 40, CFG.n_embd, lr_scale=0.1, weight_decay=0.1)


def batches(steps, microbatches=2, rows=8):
    """Text with something to learn: arithmetic progressions."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        start, stride = rng.integers(0, 128, (rows * 2 // microbatches * microbatches, 2)).T
        tokens = (start[:, None] + np.arange(33)[None] * (1 + stride[:, None] % 3)) % 128
        tokens = tokens.astype(np.int32).reshape(microbatches, -1, 33)
        yield {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def train(mesh, steps, microbatches=2, state=None, first=0):
    state = state or with_optimizer(CFG, mesh, born_params(CFG, mesh, 0))
    losses = []
    for step, batch in enumerate(batches(first + steps, microbatches)):
        if step < first:
            continue
        with jax.set_mesh(mesh):
            placed = put_batch(batch, mesh, leading=1)
            state, metrics = train_step(state, placed, SCHEDULE.hyper(step), cfg=CFG)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def alone():
    return train(make_mesh("1"), 8)


def test_the_loss_falls(alone):
    assert alone[1][-1] < alone[1][0] - 0.3


def test_accumulation_changes_nothing(alone):
    _, losses = train(make_mesh("1"), 8, microbatches=1)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-4)


def test_one_compilation_serves_all_steps(alone):
    before = train_step._cache_size()
    train(make_mesh("1"), 2, state=with_optimizer(CFG, make_mesh("1"), born_params(CFG, make_mesh("1"), 0)))
    assert train_step._cache_size() == before


def test_a_checkpoint_of_eight_devices_goes_on_on_one(tmp_path, alone):
    """Four steps on --mesh 8, saved, and four more on one device: the losses of eight steps on one."""
    eight, one = make_mesh("8"), make_mesh("1")
    state, first = train(eight, 4)
    with jax.set_mesh(eight):
        (checkpoints := Checkpointer(tmp_path, 1)).save(4, saved_tree(state, cfg=CFG), {})
        checkpoints.wait()
    tree, _, step = restore(tmp_path, None, saved_shapes(CFG, one))
    _, then = train(one, 4, state=restored_state(CFG, one, tree), first=step)
    np.testing.assert_allclose(first + then, alone[1], rtol=1e-4)


def test_resuming_is_exact_on_one_mesh(tmp_path, alone):
    mesh = make_mesh("1")
    state, first = train(mesh, 4)
    with jax.set_mesh(mesh):
        (checkpoints := Checkpointer(tmp_path, 1)).save(4, saved_tree(state, cfg=CFG), {})
        checkpoints.wait()
    tree, _, _ = restore(tmp_path, None, saved_shapes(CFG, mesh))
    state, then = train(mesh, 4, state=restored_state(CFG, mesh, tree), first=4)
    assert first + then == alone[1]
    jax.tree.map(np.testing.assert_array_equal, alone[0].params, state.params)


def test_masked_targets_and_weights():
    mesh = make_mesh("1")
    batch = next(batches(1, 1))
    masked = {**batch, "targets": np.full_like(batch["targets"], -1)}
    state = with_optimizer(CFG, mesh, born_params(CFG, mesh, 0))
    with jax.set_mesh(mesh):
        _, metrics = train_step(state, masked, SCHEDULE.hyper(0), cfg=CFG)
    assert float(metrics["loss"]) == 0.0 and int(metrics["targets"]) == 0
    weights = np.zeros(batch["targets"].shape, np.float32)
    weights[0, 3, 5] = -2.0
    state = with_optimizer(CFG, mesh, born_params(CFG, mesh, 0))
    with jax.set_mesh(mesh):
        _, metrics = train_step(state, {**batch, "weights": weights}, SCHEDULE.hyper(0), cfg=CFG)
    assert float(metrics["loss"]) == pytest.approx(-2 * np.log(128), rel=0.02)


def test_overfit_one_sequence_then_say_it(tmp_path, tokenizer):
    """Trained on one text, the model says it token for token through the KV cache, also after save and restore."""
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
    tokens = np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    mesh = make_mesh("1")
    cfg = GPTConfig.from_depth(ModelConfig(2, 32, 16, None, len(tokens)), tokenizer.vocab_size)
    state = with_optimizer(cfg, mesh, born_params(cfg, mesh, 0))
    schedule = Schedule(BaseConfig(warmup_steps=0, warmdown_ratio=0.5), 60, cfg.n_embd, lr_scale=0.3)
    batch = {"inputs": tokens[None, None, :-1], "targets": tokens[None, None, 1:]}
    with jax.set_mesh(mesh):
        for step in range(60):
            state, metrics = train_step(state, put_batch(batch, mesh, 1), schedule.hyper(step), cfg=cfg)
        (checkpoints := Checkpointer(tmp_path, 1)).save(60, saved_tree(state, cfg=cfg), {})
        checkpoints.wait()
    assert float(metrics["loss"]) < 0.1
    restored, _, _ = restore(tmp_path, None, saved_shapes(cfg, mesh))
    for params in (state.params, restored["params"]):
        engine = Engine(params, cfg, tokenizer, max_rows=1, mesh=make_mesh("1"), max_len=len(tokens) + 1)
        answer = engine.generate([tokens[:3].tolist()], SamplingParams(0.0, max_tokens=len(tokens) - 3))
        assert answer[0].ids == tokens[3:].tolist()
    assert jnp.isfinite(metrics["loss"])
