"""The step on any mesh, accumulation, and the overfit test through checkpoint and KV cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.checkpoint import Checkpointer
from nanochat_jax.config import BaseConfig, GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.inference.engine import Engine, SamplingParams
from nanochat_jax.model import param_shapes
from nanochat_jax.optim import Schedule
from nanochat_jax.sharding import PARAM_SPECS, check_mesh, make_mesh, match, path_of, put_batch
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


@pytest.mark.parametrize("spec", ["8", "data=2,fsdp=2,tensor=2"])
def test_any_mesh_gives_the_same_losses(alone, spec):
    state, losses = train(make_mesh(spec), 8)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-4)
    for name in ("wte", "lm_head", "value_embed_1", "h_0", "h_1"):
        # Not the smear scalars: their first gradients are rounding noise, which AdamW scales to full steps.
        for a, b in zip(*(jax.tree.leaves(tree.params[name]) for tree in (alone[0], state)), strict=True):
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) < 0.02 * np.linalg.norm(a)


def test_accumulation_changes_nothing(alone):
    _, losses = train(make_mesh("1"), 8, microbatches=1)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-4)


def test_one_compilation_serves_all_steps(alone):
    before = train_step._cache_size()
    train(make_mesh("1"), 2, state=with_optimizer(CFG, make_mesh("1"), born_params(CFG, make_mesh("1"), 0)))
    assert train_step._cache_size() == before


def test_data_parallel_shards_the_optimizer(alone):
    state, _ = train(make_mesh("8"), 1)
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.is_fully_replicated
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(alone[0].opt_state))
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state))
    # An eighth, and what padding a stack of few matrices to eight costs.
    padding = sum(
        leaf.nbytes / 8 - whole_leaf.nbytes / 8
        for leaf, whole_leaf in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(alone[0].opt_state), strict=True)
    )
    assert on_one <= whole / 8 + padding + 4096


def test_fsdp_shards_the_parameters():
    params = born_params(CFG, make_mesh("fsdp=4"), 0)
    kernel = params["h_0"]["mlp"]["fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0] // 4, kernel.shape[1])


def test_a_checkpoint_of_eight_devices_goes_on_on_one(tmp_path, alone):
    """Four steps on --mesh 8, saved, and four more on one device: the losses of eight steps on one."""
    eight, one = make_mesh("8"), make_mesh("1")
    state, first = train(eight, 4)
    with jax.set_mesh(eight):
        Checkpointer(tmp_path, 1).save(4, saved_tree(state, cfg=CFG), {})
    tree, _, step = Checkpointer(tmp_path, 1).restore(None, saved_shapes(CFG, one))
    _, then = train(one, 4, state=restored_state(CFG, one, tree), first=step)
    np.testing.assert_allclose(first + then, alone[1], rtol=1e-4)


def test_resuming_is_exact_on_one_mesh(tmp_path, alone):
    mesh = make_mesh("1")
    state, first = train(mesh, 4)
    with jax.set_mesh(mesh):
        Checkpointer(tmp_path, 1).save(4, saved_tree(state, cfg=CFG), {})
    tree, _, _ = Checkpointer(tmp_path, 1).restore(None, saved_shapes(CFG, mesh))
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


def test_every_parameter_has_exactly_one_sharding_rule():
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(param_shapes(CFG))]
    for path in paths:
        match(path, PARAM_SPECS)
    with pytest.raises(KeyError, match="newcomer"):
        match("h_0/newcomer/kernel", PARAM_SPECS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("9", "needs 9 devices"), ("model=2", "number of devices"), ("0", "number of devices"), ("x", "number")],
)
def test_impossible_meshes_are_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        make_mesh(spec)
    assert "\n" not in str(error.value)


def test_heads_that_do_not_divide_are_one_clear_line():
    with pytest.raises(UserError, match="divisor of 2"):
        check_mesh(make_mesh("tensor=4"), GPTConfig.from_depth(ModelConfig(2, 16, 16, 2, 32), 128))


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
        Checkpointer(tmp_path, 1).save(60, saved_tree(state, cfg=cfg), {})
    assert float(metrics["loss"]) < 0.1
    restored, _, _ = Checkpointer(tmp_path, 1).restore(None, saved_shapes(cfg, mesh))
    for params in (state.params, restored["params"]):
        engine = Engine(params, cfg, tokenizer, max_rows=1, max_len=len(tokens) + 1)
        answer = engine.generate([tokens[:3].tolist()], SamplingParams(0.0, max_tokens=len(tokens) - 3))
        assert answer[0].ids == tokens[3:].tolist()
    assert jnp.isfinite(metrics["loss"])
