"""Which share of the parameters each device updates (ZeRO, arXiv 1910.02054), and how it gets there and back.

The optimizer does not see the parameters as the model does but a *view* of them, a flat dict: "stack/..." are the
matrices of one shape and one sharding, stacked on a leading axis that is zero-padded and cut over all devices, so that
each owns whole matrices and Newton-Schulz needs no communication; every other entry is a parameter under its own path,
cut over `data` along the first dimension that divides. One step moves gradients into the view (a reduce-scatter over
`data`, all-to-alls over `fsdp` and `tensor`), updates it, and moves the result back (the same in reverse, an
all-gather over `data`).

`view` works on global arrays, `reduced`, `owned` and `whole` inside a shard_map over all axes of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanochat_jax.model import Params
from nanochat_jax.optim import ADAMW, GROUP_OF, AdamState, MuonState
from nanochat_jax.sharding import AXES, PARAM_SPECS, by_path, match, path_of, state_spec

View = dict[str, jax.Array]


def stacks_of(params: Params) -> dict[str, list[str]]:
    """Which matrices share a stack: "stack/<in>x<out>/<axis of in>.<axis of out>" -> their paths in order."""
    stacks: dict[str, list[str]] = {}
    for path, leaf in by_path(params).items():
        if match(path, GROUP_OF) == "muon":
            axes = ".".join(map(str, match(path, PARAM_SPECS)))
            stacks.setdefault(f"stack/{leaf.shape[0]}x{leaf.shape[1]}/{axes}", []).append(path)
    return stacks


def view(params: Params, devices: int) -> View:
    """The whole view, [n, in, out] stacks padded to a multiple of `devices`."""
    leaves = by_path(params)
    rest = {path: leaf for path, leaf in leaves.items() if match(path, GROUP_OF) != "muon"}
    stacks = {key: _stack([leaves[path] for path in paths], devices) for key, paths in stacks_of(params).items()}
    return rest | stacks


@dataclass(frozen=True)
class Owners:
    """Who owns what of parameters of certain shapes on a mesh; the moves between the two layouts."""

    mesh: Mesh | jax.sharding.AbstractMesh
    stacks: dict[str, list[str]]
    data_dims: dict[str, int | None]
    """Of each entry that is no stack: the dimension cut over `data`, None where none divides."""

    @classmethod
    def of(cls, params: Params, mesh: Mesh | jax.sharding.AbstractMesh) -> Owners:
        """For `params`, arrays or shapes, global."""
        dims = {}
        for path, leaf in by_path(params).items():
            if match(path, GROUP_OF) != "muon":
                spec = state_spec(path, leaf.shape, mesh)
                dims[path] = next((i for i, axes in enumerate(spec) if axes and "data" in axes), None)
        return cls(mesh, stacks_of(params), dims)

    def reduced(self, grads: Params) -> View:
        """Each device's part of the sum over `data` of gradients in the parameters' layout."""

        def cut(x: jax.Array, dim: int | None) -> jax.Array:
            if self.mesh.shape["data"] == 1:
                return x
            if dim is None:
                return jax.lax.psum(x, "data")
            return jax.lax.psum_scatter(x, "data", scatter_dimension=dim, tiled=True)

        view = self._to_view(grads, cut)
        return view | {path: self._of_the_first(view[path]) for path in self.data_dims if self._on_all_of_tensor(path)}

    def owned(self, params: Params) -> View:
        """Each device's part of the parameters."""
        return self._to_view(params, lambda x, dim: x if dim is None else self._slice(x, "data", dim))

    def whole(self, view: View) -> dict[str, jax.Array]:
        """The parameters' layout, by path, from each device's part of the view."""
        leaves = {}
        for path, dim in self.data_dims.items():
            leaves[path] = view[path] if dim is None else self._gather(view[path], "data", dim)
        for key, paths in self.stacks.items():
            x = view[key]
            for axis in ("tensor", "fsdp"):
                x = self._from_matrices(x, axis, _dim_of(axis, paths[0]))
            x = self._gather(x, "data", 0)
            leaves |= {path: x[i] for i, path in enumerate(paths)}
        return leaves

    def norm(self, view: View) -> jax.Array:
        """Euclidean norm of a view, float32 scalar, the same on every device."""
        sums: dict[tuple[str, ...], jax.Array] = {}
        for name, x in view.items():
            cut = AXES if name in self.stacks else tuple(axis for axis in match(name, PARAM_SPECS) if axis)
            if self.data_dims.get(name) is not None:
                cut = ("data", *cut)
            cut = tuple(axis for axis in cut if self.mesh.shape[axis] > 1)
            sums[cut] = sums.get(cut, 0.0) + jnp.sum(jnp.square(x.astype(jnp.float32)))
        return jnp.sqrt(sum(jax.lax.psum(x, cut) if cut else x for cut, x in sums.items()))

    def _on_all_of_tensor(self, path: str) -> bool:
        """Whether each device of `tensor` computes this gradient for itself. A GPU adds up that of `wte` in any order,
        and copies that were updated by their own sums would part.
        """
        return self.mesh.shape["tensor"] > 1 and "tensor" not in match(path, PARAM_SPECS)

    def _of_the_first(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index("tensor") == 0, x, 0), "tensor")

    def _to_view(self, params: Params, cut: Callable[[jax.Array, int | None], jax.Array]) -> View:
        leaves = by_path(params)
        parts = {path: cut(leaves[path], dim) for path, dim in self.data_dims.items()}
        for key, paths in self.stacks.items():
            x = cut(_stack([leaves[path] for path in paths], self.mesh.size), 0)
            for axis in ("fsdp", "tensor"):
                x = self._to_matrices(x, axis, _dim_of(axis, paths[0]))
            parts[key] = x
        return parts

    def _to_matrices(self, x: jax.Array, axis: str, dim: int | None) -> jax.Array:
        """From a part of every matrix to every part of some matrices; `dim` of the matrices is cut over `axis`."""
        if dim is None or self.mesh.shape[axis] == 1:
            return self._slice(x, axis, 0)
        return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=1 + dim, tiled=True)

    def _from_matrices(self, x: jax.Array, axis: str, dim: int | None) -> jax.Array:
        if dim is None or self.mesh.shape[axis] == 1:
            return self._gather(x, axis, 0)
        return jax.lax.all_to_all(x, axis, split_axis=1 + dim, concat_axis=0, tiled=True)

    def _gather(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        # The compiler does not drop a collective among one device on every platform.
        return x if self.mesh.shape[axis] == 1 else jax.lax.all_gather(x, axis, axis=dim, tiled=True)

    def _slice(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        if self.mesh.shape[axis] == 1:
            return x
        size = x.shape[dim] // self.mesh.shape[axis]
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dim)


def _dim_of(axis: str, path: str) -> int | None:
    axes = tuple(match(path, PARAM_SPECS))
    return axes.index(axis) if axis in axes else None


def _stack(matrices: list[jax.Array], devices: int) -> jax.Array:
    padding = [jnp.zeros_like(matrices[0])] * (-len(matrices) % devices)
    return jnp.stack([*matrices, *padding])


def to_portable(opt_state: optax.OptState, params: Params) -> dict[str, dict[str, jax.Array]]:
    """Optimizer state as {parameter path: its moments}, nothing stacked or padded: what checkpoints hold."""
    portable = {}
    for group in ADAMW:
        state: AdamState = opt_state.inner_states[group].inner_state
        mu, nu = by_path(state.mu), by_path(state.nu)
        portable |= {path: {"mu": mu[path], "nu": nu[path], "count": state.count} for path in mu}
    muon: MuonState = opt_state.inner_states["muon"].inner_state
    momentum, second = by_path(muon.momentum), by_path(muon.second)
    for key, paths in stacks_of(params).items():
        portable |= {path: {"momentum": momentum[key][i], "second": second[key][i]} for i, path in enumerate(paths)}
    return portable


def from_portable(
    portable: dict[str, dict[str, jax.Array]], fresh: optax.OptState, params: Params, devices: int
) -> optax.OptState:
    """The inverse of `to_portable` for a view on `devices` devices; `fresh` is a state of the same view."""
    inner = dict(fresh.inner_states)

    def restored(tree: optax.Params, leaf_of: Callable[[str], jax.Array]) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: leaf_of(path_of(path)), tree)

    for group in ADAMW:
        state: AdamState = inner[group].inner_state
        paths = by_path(state.mu)
        count = portable[next(iter(paths))]["count"] if paths else state.count
        mu, nu = (restored(state.mu, lambda path, name=name: portable[path][name]) for name in ("mu", "nu"))
        inner[group] = inner[group]._replace(inner_state=AdamState(count, mu, nu))
    stacks = stacks_of(params)
    muon: MuonState = inner["muon"].inner_state
    momentum, second = (
        restored(muon.momentum, lambda key, name=name: _stack([portable[p][name] for p in stacks[key]], devices))
        for name in ("momentum", "second")
    )
    inner["muon"] = inner["muon"]._replace(inner_state=MuonState(momentum, second))
    return fresh._replace(inner_states=inner)
