"""Whether devices that hold copies of an array hold the same bits: looked at before every checkpoint.

Every device computes its own copy of what is replicated, or gets it from a collective. Should a faulty device, or a
kernel that adds in no fixed order, let two copies part, they would train on as two models without any error.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from nanochat_jax.sharding import by_path, param_specs, state_specs
from nanochat_jax.train import TrainState


def parted(state: TrainState) -> list[str]:
    """Paths of the arrays, of parameters and optimizer, of which two devices hold different copies.

    Wants the mesh in use (`jax.set_mesh`); every process gets the same answer.
    """
    flags = np.asarray(_parted(state))
    return [path for path, differs in zip(by_path(state), flags, strict=True) if differs]


@jax.jit
def _parted(state: TrainState) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    specs = TrainState(param_specs(state.params), state_specs(state.opt_state, mesh))

    def differs(x: jax.Array, spec: P) -> jax.Array:
        cut = {axis for axes in spec if axes for axis in (axes if isinstance(axes, tuple) else (axes,))}
        copies = tuple(axis for axis in mesh.axis_names if axis not in cut)
        if not copies:
            return jnp.zeros((), jnp.int32)
        total = _checksum(x)
        here = (jax.lax.pmax(total, copies) != jax.lax.pmin(total, copies)).astype(jnp.int32)
        return jax.lax.pmax(here, mesh.axis_names)

    def on_a_device(state: TrainState) -> jax.Array:
        leaves = jax.tree.map(differs, state, specs, is_leaf=lambda x: isinstance(x, P))
        return jnp.stack(jax.tree.leaves(leaves))

    return jax.shard_map(on_a_device, in_specs=(specs,), out_specs=P(), check_vma=False)(state)


def _checksum(x: jax.Array) -> jax.Array:
    """A uint32 of all bits of a float or integer array that changes with any of them, and with their order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32).reshape(-1)
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
