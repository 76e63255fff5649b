"""The device mesh and one table: parameter path -> PartitionSpec.

Three axes. `data`: rows of the batch; parameters are replicated, optimizer state and update are sharded (ZeRO-2).
`fsdp`: rows of the batch too, and the parameters are sharded. `tensor`: attention heads and MLP channels. The same
program with any mesh computes the same loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
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
    (r"h_\d+/attn/ve_gate/kernel", P()),
    (r"smear_gate/kernel|(resid|x0|smear|backout)_lambda", P()),
)


def path_of(key_path: Sequence[object]) -> str:
    """A jax key path as "h_0/attn/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def match(path: str, rules: Sequence[tuple[str, object]]) -> object:
    """The value of the one rule whose pattern is the end of `path`; KeyError where none or several match."""
    found = [value for pattern, value in rules if re.search(rf"(^|/)({pattern})$", path)]
    if len(found) != 1:
        raise KeyError(f"parameter {path!r} matches {len(found)} rules, exactly one is needed")
    return found[0]


def parse_mesh(spec: str) -> dict[str, int]:
    """ "8" -> 8-way data parallel; "data=2,fsdp=4" -> those axes; every size at least 1."""
    sizes = dict.fromkeys(AXES, 1)
    try:
        parts = [("data", spec)] if "=" not in spec else [part.split("=") for part in spec.split(",")]
        for name, size in parts:
            if name.strip() not in sizes or int(size) < 1:
                raise ValueError
            sizes[name.strip()] = int(size)
    except ValueError:
        raise UserError(f"--mesh {spec!r}: a number of devices, or axes such as data=2,fsdp=2,tensor=2") from None
    return sizes


def make_mesh(spec: str) -> Mesh:
    """The mesh over the first devices; UserError where there are fewer than it asks for."""
    sizes = parse_mesh(spec)
    need, devices = int(np.prod(list(sizes.values()))), jax.devices()
    if need > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = f"; to try it on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={need}"
        raise UserError(f"--mesh {spec} needs {need} devices, {len(devices)} found ({devices[0].platform}){hint}")
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


def param_shardings(shapes: object, mesh: Mesh) -> object:
    """A NamedSharding for every parameter of a tree of shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, match(path_of(path), PARAM_SPECS)), shapes
    )


def state_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of an optimizer-state array: its parameter's, with `data` added to the first dimension that divides.

    Muon's stacks are cut along their leading axis over all devices.
    """
    if "stacks/" in path:
        return STACK
    if not shape:
        return P()
    spec = list(match(path, PARAM_SPECS)) + [None] * len(shape)
    for dim, size in enumerate(shape):
        axes = () if spec[dim] is None else (spec[dim],)
        if size % int(np.prod([mesh.shape[a] for a in (*axes, "data")])) == 0:
            spec[dim] = (*axes, "data")
            break
    return P(*spec[: len(shape)])


def state_shardings(shapes: object, mesh: Mesh) -> object:
    """A NamedSharding for every array of an optimizer state's tree of shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, state_spec(path_of(path), leaf.shape, mesh)), shapes
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, leading: int = 0) -> dict[str, jax.Array]:
    """A host batch on the mesh, its row dimension (after `leading` others) cut over data and fsdp."""
    spec = P(*([None] * leading), *BATCH)
    return {name: jax.device_put(value, NamedSharding(mesh, spec)) for name, value in batch.items()}
