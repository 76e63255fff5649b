"""The training state and one optimizer step: pure functions that every stage shares.

The loss is the sum over all counted targets of the step - every microbatch, every device - divided by their number, so
neither accumulation nor the mesh changes it. The step is jitted once per architecture and batch shape; learning rates
and the like come in as `hyper`. Loops, files and clocks are the stages' business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig
from nanochat_jax.loss import token_losses, weighted_loss
from nanochat_jax.model import Params, init_params, param_shapes
from nanochat_jax.optim import Hyper, make_optimizer
from nanochat_jax.sharding import param_specs, path_of, placed, shard, state_spec, state_specs
from nanochat_jax.zero import Owners, from_portable, to_portable, view

Batch = dict[str, jax.Array]
LossFn = Callable[[Params, Batch, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """Parameters, and the optimizer state of their `zero.view`; donated to each step."""

    params: Params
    opt_state: optax.OptState


def _new_opt_state(cfg: GPTConfig, params: Params) -> optax.OptState:
    return make_optimizer(cfg.compute_dtype).init(view(params, jax.sharding.get_abstract_mesh().size))


def state_shapes(cfg: GPTConfig, mesh: Mesh) -> TrainState:
    """The whole state as ShapeDtypeStructs with their shardings, nothing allocated."""
    with jax.set_mesh(mesh):
        params = param_shapes(cfg)
        opt_state = jax.eval_shape(functools.partial(_new_opt_state, cfg), params)
    return TrainState(placed(params, param_specs(params), mesh), placed(opt_state, state_specs(opt_state, mesh), mesh))


def born_params(cfg: GPTConfig, mesh: Mesh, seed: int) -> Params:
    """Initial parameters, each created on the devices that hold it."""
    shapes = param_shapes(cfg)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(shapes))
    return jax.jit(init_params, static_argnums=0, out_shardings=shardings)(cfg, jax.random.key(seed))


def with_optimizer(cfg: GPTConfig, mesh: Mesh, params: Params) -> TrainState:
    """A state with fresh moments around `params` (placed on the mesh), born sharded."""
    shapes = state_shapes(cfg, mesh)
    params = jax.tree.map(lambda p, shape: jax.device_put(p, shape.sharding), params, shapes.params)
    make = jax.jit(
        _new_opt_state, static_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes.opt_state)
    )
    with jax.set_mesh(mesh):
        return TrainState(params, make(cfg, params))


@functools.partial(jax.jit, static_argnames="cfg")
def saved_tree(state: TrainState, *, cfg: GPTConfig) -> dict:
    """What a checkpoint holds: {"params", "optimizer": {path: moments}}, the same on every mesh.

    Moments are cut as the table says, so that no device holds more than its share of them while they are saved.
    """
    moments = to_portable(state.opt_state, state.params)
    mesh = jax.sharding.get_abstract_mesh()
    return {
        "params": state.params,
        "optimizer": jax.lax.with_sharding_constraint(moments, _moment_specs(moments, mesh)),
    }


def _moment_specs(moments: dict, mesh: Mesh | AbstractMesh) -> dict:
    """Specs of {parameter path: its moments}: what has the shape of its parameter is cut like it and over `data`."""

    def spec(key_path: tuple, x: jax.Array) -> P:
        path, name = path_of(key_path).rsplit("/", 1)
        return state_spec(path, x.shape, mesh) if name in ("mu", "nu", "momentum") else P()

    return jax.tree_util.tree_map_with_path(spec, moments)


def saved_shapes(cfg: GPTConfig, mesh: Mesh) -> dict:
    """The shapes of `saved_tree`, with the shardings it is saved with and restored to."""
    shapes = state_shapes(cfg, mesh)
    with jax.set_mesh(mesh):
        tree = jax.eval_shape(functools.partial(saved_tree, cfg=cfg), shapes)
    moments = tree["optimizer"]
    return {"params": shapes.params, "optimizer": placed(moments, _moment_specs(moments, mesh), mesh)}


def _from_saved(cfg: GPTConfig, tree: dict) -> optax.OptState:
    devices = jax.sharding.get_abstract_mesh().size
    return from_portable(tree["optimizer"], _new_opt_state(cfg, tree["params"]), tree["params"], devices)


def restored_state(cfg: GPTConfig, mesh: Mesh, tree: dict) -> TrainState:
    """The state on this mesh from a restored `saved_tree`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(cfg, mesh).opt_state)
    make = jax.jit(_from_saved, static_argnums=0, out_shardings=shardings)
    with jax.set_mesh(mesh):
        return TrainState(tree["params"], make(cfg, tree))


def accumulated(loss: LossFn, params: Params, batch: Batch, counted: jax.Array) -> tuple[jax.Array, Params]:
    """Sums of a loss and of its gradients over the microbatches of `batch`, one after the other."""
    value_and_grad = jax.value_and_grad(loss)
    specs = param_specs(params)

    def of_one(microbatch: Batch) -> tuple[jax.Array, Params]:
        total, grads = value_and_grad(params, microbatch, counted)
        return total, jax.tree.map(lambda g, spec: shard(g, *spec), grads, specs)

    def add(carry: tuple, microbatch: Batch) -> tuple[tuple, None]:
        total, grads = of_one(microbatch)
        return (carry[0] + total, jax.tree.map(lambda a, g: a + g.astype(jnp.float32), carry[1], grads)), None

    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return of_one(jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda p, spec: shard(jnp.zeros(p.shape, jnp.float32), *spec), params, specs)
    return jax.lax.scan(add, (jnp.zeros((), jnp.float32), zeros), batch)[0]


def unreduced_gradients(loss: LossFn, params: Params, batch: Batch, counted: jax.Array) -> tuple[jax.Array, Params]:
    """Loss [data] and gradients [data, ...], each data shard's sum over its own rows: nothing moves over `data` yet."""

    def on_a_shard(params: Params, batch: Batch, counted: jax.Array) -> tuple[jax.Array, Params]:
        return jax.tree.map(lambda x: x[None], accumulated(loss, params, batch, counted))

    return jax.shard_map(
        on_a_shard,
        in_specs=(P(), P(None, "data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )(params, batch, counted)


def apply_gradients(state: TrainState, cfg: GPTConfig, grads: Params, hyper: Hyper) -> tuple[TrainState, jax.Array]:
    """One optimizer update with unreduced gradients [data, ...]: the state, and the norm of the reduced gradient.

    Gradients are reduced once, each device updating what it owns, and the new parameters are gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    owners = Owners.of(state.params, mesh)
    specs = TrainState(param_specs(state.params), state_specs(state.opt_state, mesh))

    def on_a_device(state: TrainState, grads: Params, hyper: Hyper) -> tuple[TrainState, jax.Array]:
        reduced = owners.reduced(jax.tree.map(lambda g: g[0], grads))
        owned = owners.owned(state.params)
        updates, opt_state = make_optimizer(cfg.compute_dtype).update(reduced, state.opt_state, owned, hyper=hyper)
        params = owners.whole(optax.apply_updates(owned, updates))
        tree = jax.tree_util.tree_map_with_path(lambda path, _: params[path_of(path)], state.params)
        return TrainState(tree, opt_state), owners.norm(reduced)

    return jax.shard_map(
        on_a_device,
        in_specs=(specs, jax.tree.map(lambda spec: P("data", *spec), specs.params), P()),
        out_specs=(specs, P()),
        check_vma=False,
    )(state, grads, hyper)


def batch_loss(cfg: GPTConfig, params: Params, microbatch: Batch, counted: jax.Array) -> jax.Array:
    """A microbatch's part of the loss of a step that has `counted` targets."""
    targets_BT = microbatch["targets"]
    mean_BT = jnp.full(targets_BT.shape, 1.0 / jnp.maximum(counted, 1))
    return weighted_loss(params, cfg, microbatch["inputs"], targets_BT, microbatch.get("weights", mean_BT))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def train_step(
    state: TrainState, batch: dict[str, jax.Array], hyper: Hyper, *, cfg: GPTConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on batch["inputs"] and batch["targets"], int32 [A microbatches, rows, T], targets -1 not counted.

    batch may hold "weights", float32 of the same shape: then the loss is the weighted sum over the positions, else
    their mean. Returns the new state and {"loss": before the update, "targets": how many were counted, "grad_norm"}.
    Wants a mesh in use (`jax.set_mesh`), of one device too.
    """
    counted = jnp.sum(batch["targets"] >= 0)
    total, grads = unreduced_gradients(functools.partial(batch_loss, cfg), state.params, batch, counted)
    state, norm = apply_gradients(state, cfg, grads, hyper)
    return state, {"loss": jnp.sum(total), "targets": counted, "grad_norm": norm}


def compiler_options(cfg: GPTConfig, mesh: Mesh) -> dict[str, bool]:
    """What `train_step` is compiled with on a mesh, beside the flags of process.py.

    On a GPU XLA's scheduler that hides communication puts weight gradients off, and keeps for them whatever
    rematerialisation made: at depth 12, 16 rows of 2,048 tokens, 12.4 GB of temporaries instead of 6.3. So remat goes
    without it, whatever XLA_FLAGS say, and on several devices waits for communication.
    """
    scheduler = {"xla_gpu_enable_latency_hiding_scheduler": False}
    return scheduler if cfg.remat and mesh.devices.flat[0].platform == "gpu" else {}


@functools.partial(jax.jit, static_argnames="cfg")
def eval_losses(params: Params, inputs: jax.Array, targets: jax.Array, *, cfg: GPTConfig) -> jax.Array:
    """Cross-entropy at each position, nats, float32 [rows, T]; 0 where the target is -1."""
    return token_losses(params, cfg, inputs, targets)
