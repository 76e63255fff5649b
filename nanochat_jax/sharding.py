"""The device mesh and one table: parameter path -> PartitionSpec.

Three axes. `data`: rows of the batch; parameters are replicated, optimizer state and update are sharded (ZeRO-2).
`fsdp`: rows of the batch too, and the parameters are sharded. `tensor`: attention heads and MLP channels. The same
program with any mesh computes the same loss.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
STACK = P(AXES)

PARAM_SPECS: tuple[tuple[str, P], ...] = (
    (r"wte/embedding", P("fsdp", None)),
    (r"value_embed_\d+/embedding", P("fsdp", "tensor")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"h_\d+/attn/[qkv]/kernel", P("fsdp", "tensor")),
    (r"h_\d+/attn/proj/kernel", P("tensor", "fsdp")),
    (r"h_\d+/mlp/fc/kernel", P("fsdp", "tensor")),
    (r"h_\d+/mlp/proj/kernel", P("tensor", "fsdp")),
    (r"h_\d+/attn/ve_gate/kernel", P(None, "tensor")),
    (r"smear_gate/kernel|(resid|x0|smear|backout)_lambda", P()),
    (r"stack/.*", STACK),  # same-shape matrices as the optimizer sees them, see zero.py
)


def path_of(key_path: Sequence[object]) -> str:
    """A jax key path as "h_0/attn/q/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def by_path(tree: object) -> dict[str, jax.Array]:
    """The leaves of a tree, or their shapes, by path."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def match(path: str, rules: Sequence[tuple[str, object]]) -> object:
    """The value of the one rule whose pattern is the end of `path`; KeyError where none or several match."""
    found = [value for pattern, value in rules if re.search(rf"(^|/)({pattern})$", path)]
    if len(found) != 1:
        raise KeyError(f"parameter {path!r} matches {len(found)} rules, exactly one is needed")
    return found[0]


def parse_mesh(spec: str) -> dict[str, int]:
    """ "8" -> 8-way data parallel; "data=2,fsdp=4" -> those axes; every size at least 1."""
    sizes: dict[str, int] = {}
    try:
        parts = [("data", spec)] if "=" not in spec else [part.split("=") for part in spec.split(",")]
        for name, size in parts:
            if name.strip() not in AXES or name.strip() in sizes or int(size) < 1:
                raise ValueError
            sizes[name.strip()] = int(size)
    except ValueError:
        raise UserError(f"--mesh {spec!r}: a number of devices, or axes such as data=2,fsdp=2,tensor=2") from None
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(spec: str) -> Mesh:
    """The mesh over the first devices; UserError where there are fewer than it asks for."""
    sizes = parse_mesh(spec)
    need, devices = int(np.prod(list(sizes.values()))), jax.devices()
    if need > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = f"; to try it on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={need}"
        raise UserError(f"--mesh {spec} needs {need} devices, {len(devices)} found ({devices[0].platform}){hint}")
    if jax.process_count() > 1 and need < len(devices):
        raise UserError(
            f"--mesh {spec} uses {need} of the {len(devices)} devices of {jax.process_count()} processes; all must "
            f"work: use --mesh {len(devices)}, or axes with that product"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:need])


def check_mesh(mesh: Mesh, cfg: GPTConfig) -> None:
    """UserError where heads, width or vocabulary do not divide over the mesh."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    for what, size, axis, parts in (
        ("key/value heads", cfg.n_kv_head, "tensor", tensor),
        ("query heads", cfg.n_head, "tensor", tensor),
        ("model width", cfg.n_embd, "fsdp", fsdp),
        ("padded vocabulary", cfg.padded_vocab_size, "fsdp", fsdp),
        ("padded vocabulary", cfg.padded_vocab_size, "tensor", tensor),
    ):
        if size % parts:
            raise UserError(f"--mesh {axis}={parts} does not divide the {what} ({size}); choose a divisor of {size}")


def data_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_of_step(name: str, batch_tokens: int, length: int, shards: int) -> int:
    """Rows of `length` tokens in a step of a stage; UserError where the mesh cannot share them out."""
    rows, left = divmod(batch_tokens, length)
    if left or rows < 1 or rows % shards:
        raise UserError(
            f"--{name}.total-batch-size {batch_tokens} is {batch_tokens / length:g} rows of {length} tokens; "
            f"the mesh needs a multiple of {shards} rows: use a multiple of {shards * length}"
        )
    return rows


def rows_of_microbatch(name: str, rows: int, device_batch_size: int | Literal["auto"], shards: int) -> int:
    """Rows of a microbatch of a step of `rows`, over all data shards; UserError where they do not divide. Of "auto" the
    fewest that it can come to: one on each shard.
    """
    here = shards if device_batch_size == "auto" else min(device_batch_size * shards, rows)
    if rows % here:
        raise UserError(
            f"--{name}.device-batch-size {device_batch_size} on {shards} data shards does not divide the {rows} rows "
            f"of a step; use a divisor of {rows // shards}"
        )
    return here


def param_specs(params: object) -> object:
    """A PartitionSpec for every parameter of a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match(path_of(path), PARAM_SPECS), params)


def placed(shapes: object, specs: object, mesh: Mesh) -> object:
    """A tree of arrays or shapes as ShapeDtypeStructs that are cut over the mesh as a tree of PartitionSpecs says."""
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), shapes, specs
    )


def state_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Spec of an optimizer-state array: its parameter's, with `data` added to the first dimension that divides."""
    if not shape:
        return P()
    spec = list(match(path, PARAM_SPECS)) + [None] * len(shape)
    if spec[0] == AXES:
        return STACK
    for dim, size in enumerate(shape):
        axes = () if spec[dim] is None else (spec[dim],)
        if size % int(np.prod([mesh.shape[a] for a in (*axes, "data")])) == 0:
            spec[dim] = (*axes, "data")
            break
    return P(*spec[: len(shape)])


def state_specs(state: object, mesh: Mesh | AbstractMesh) -> object:
    """A PartitionSpec for every array of an optimizer state."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: state_spec(path_of(path), leaf.shape, mesh), state)


def automatic_axes() -> tuple[str, ...]:
    """The axes of the mesh in use that the compiler shards over: none without a mesh, not those of a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)


def cut_axes() -> set[str]:
    """Of the automatic axes those that have more than one device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return {axis for axis in automatic_axes() if sizes[axis] > 1}


def only(axes: Collection[str], *spec: object) -> P:
    """A PartitionSpec without the axes that are not among `axes`."""

    def keep(names: object) -> object:
        if isinstance(names, tuple):
            return tuple(name for name in names if name in axes) or None
        return names if names in axes else None

    return P(*(keep(names) for names in spec))


def shard(x: jax.Array, *spec: object) -> jax.Array:
    """Constrain an array to a PartitionSpec over the automatic axes of the mesh in use; without a mesh, x itself."""
    axes = automatic_axes()
    return jax.lax.with_sharding_constraint(x, only(axes, *spec)) if axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, path: str) -> jax.Array:
    """A parameter, or its rounded copy, whole over `fsdp` where it is used; its gradient is cut again at once.

    Without this the compiler is free to gather activations instead.
    """
    return shard(x, *(None if axis == "fsdp" else axis for axis in match(path, PARAM_SPECS)))


def _gathered_forward(x: jax.Array, path: str) -> tuple[jax.Array, None]:
    return gathered(x, path), None


def _gathered_backward(path: str, _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (shard(grad, *match(path, PARAM_SPECS)),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def data_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which part of a batch's rows this process's devices hold, of how many parts.

    Processes whose devices hold the same rows (the tensor axis goes across them) have the same index.
    """
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    owners = owners.reshape(data_shards(mesh), -1)
    held = [frozenset(np.flatnonzero((owners == p).any(axis=1)).tolist()) for p in range(jax.process_count())]
    parts = sorted(set(held), key=min)
    if sum(map(len, parts)) != len(owners) or len(set(map(len, parts))) > 1:
        raise UserError(
            f"--mesh with tensor={mesh.shape['tensor']} cuts across the {len(jax.local_devices())} devices of a "
            "process: choose a divisor or a multiple of them"
        )
    return parts.index(held[jax.process_index()]), len(parts)


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, leading: int = 0, *, local: bool = False
) -> dict[str, jax.Array]:
    """A host batch on the mesh, its row dimension (after `leading` others) cut over data and fsdp.

    `local`: the arrays are this process's part of the rows (`data_part`); otherwise every process holds all rows.
    """
    sharding = NamedSharding(mesh, P(*([None] * leading), *BATCH))
    # Without a global shape JAX takes what it is given for this process's part.
    return {
        name: jax.make_array_from_process_local_data(sharding, x, None if local else x.shape)
        for name, x in batch.items()
    }
