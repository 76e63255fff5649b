"""The training state and one optimizer step: pure functions that every stage shares.

The loss is the sum over all counted targets of the step - every microbatch, every device - divided by their number, so
neither accumulation nor the mesh changes it. The step is jitted once per architecture and batch shape; learning rates
and the like come in as `hyper`. Loops, files and clocks are the stages' business.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig
from nanochat_jax.model import Params, init_params, param_shapes, token_losses
from nanochat_jax.optim import Hyper, from_portable, make_optimizer, to_portable
from nanochat_jax.sharding import param_shardings, state_shardings


class TrainState(NamedTuple):
    """Parameters and optimizer state; donated to each step."""

    params: Params
    opt_state: optax.OptState


@functools.cache
def optimizer(dtype: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer for a compute dtype; one object each, so that jit sees the same static argument every time."""
    return make_optimizer(dtype)


def _new_opt_state(cfg: GPTConfig, params: Params) -> optax.OptState:
    return optimizer(cfg.compute_dtype).init(params)


def state_shapes(cfg: GPTConfig, mesh: Mesh) -> TrainState:
    """The whole state as ShapeDtypeStructs with their shardings, nothing allocated."""
    with jax.set_mesh(mesh):
        params = param_shapes(cfg)
        opt_state = jax.eval_shape(functools.partial(_new_opt_state, cfg), params)
    shardings = TrainState(param_shardings(params, mesh), state_shardings(opt_state, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        TrainState(params, opt_state),
        shardings,
    )


def born_params(cfg: GPTConfig, mesh: Mesh, seed: int) -> Params:
    """Initial parameters, each created on the devices that hold it."""
    shardings = param_shardings(param_shapes(cfg), mesh)
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
    """What a checkpoint holds: {"params", "optimizer": {path: moments}}, the same on every mesh."""
    return {"params": state.params, "optimizer": to_portable(state.opt_state, state.params)}


def saved_shapes(cfg: GPTConfig, mesh: Mesh) -> dict:
    """The shapes of `saved_tree`, with the shardings to restore it to: the parameters' own, moments whole."""
    shapes = state_shapes(cfg, mesh)
    with jax.set_mesh(mesh):
        tree = jax.eval_shape(functools.partial(saved_tree, cfg=cfg), shapes)
    whole = NamedSharding(mesh, P())
    moments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree["optimizer"])
    return {"params": shapes.params, "optimizer": moments}


def _from_saved(cfg: GPTConfig, tree: dict) -> optax.OptState:
    return from_portable(tree["optimizer"], _new_opt_state(cfg, tree["params"]), tree["params"])


def restored_state(cfg: GPTConfig, mesh: Mesh, tree: dict) -> TrainState:
    """The state on this mesh from a restored `saved_tree`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(cfg, mesh).opt_state)
    make = jax.jit(_from_saved, static_argnums=0, out_shardings=shardings)
    with jax.set_mesh(mesh):
        return TrainState(tree["params"], make(cfg, tree))


def accumulated(value_and_grad: object, params: Params, microbatches: object) -> tuple[jax.Array, Params]:
    """Sums of a loss and of its gradients (float32) over the leading axis of `microbatches`, one after the other."""
    if jax.tree.leaves(microbatches)[0].shape[0] == 1:
        return value_and_grad(params, jax.tree.map(lambda x: x[0], microbatches))

    def add(carry: tuple, microbatch: object) -> tuple[tuple, None]:
        loss, grads = value_and_grad(params, microbatch)
        return (carry[0] + loss, jax.tree.map(lambda a, g: a + g.astype(jnp.float32), carry[1], grads)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.scan(add, (jnp.zeros((), jnp.float32), zeros), microbatches)[0]


def apply_gradients(state: TrainState, cfg: GPTConfig, grads: Params, hyper: Hyper) -> TrainState:
    """One optimizer update; parameters keep their dtype and sharding."""
    updates, opt_state = optimizer(cfg.compute_dtype).update(grads, state.opt_state, state.params, hyper=hyper)
    state = TrainState(optax.apply_updates(state.params, updates), opt_state)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(
        state, TrainState(param_shardings(state.params, mesh), state_shardings(state.opt_state, mesh))
    )


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def train_step(
    state: TrainState, batch: dict[str, jax.Array], hyper: Hyper, *, cfg: GPTConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on batch["inputs"] and batch["targets"], int32 [A microbatches, rows, T], targets -1 not counted.

    batch may hold "weights", float32 of the same shape: then the loss is the weighted sum over the positions, else
    their mean. Returns the new state and {"loss": before the update, "targets": how many were counted}.
    """
    counted = jnp.sum(batch["targets"] >= 0)

    def loss(params: Params, microbatch: dict[str, jax.Array]) -> jax.Array:
        losses_BT = token_losses(params, cfg, microbatch["inputs"], microbatch["targets"])
        if "weights" in microbatch:
            return jnp.sum(losses_BT * microbatch["weights"])
        return jnp.sum(losses_BT) / jnp.maximum(counted, 1)

    total, grads = accumulated(jax.value_and_grad(loss), state.params, batch)
    return apply_gradients(state, cfg, grads, hyper), {"loss": total, "targets": counted}


@functools.partial(jax.jit, static_argnames="cfg")
def eval_losses(params: Params, inputs: jax.Array, targets: jax.Array, *, cfg: GPTConfig) -> jax.Array:
    """Cross-entropy at each position, nats, float32 [rows, T]; 0 where the target is -1."""
    return token_losses(params, cfg, inputs, targets)
