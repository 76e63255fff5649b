"""Generation by several processes: each has an engine on its own devices and answers its share of the prompts.

An engine decides on the host, after every token, what to decode next. Engines of several processes on one mesh would
have to decide alike in lockstep; engines of their own only exchange what came out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig
from nanochat_jax.distributed import gather_json, is_shared
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import Completion, SamplingParams
from nanochat_jax.model import Params
from nanochat_jax.sharding import AXES
from nanochat_jax.tokenizer import Tokenizer


def make_engine(
    params: Params, cfg: GPTConfig, tokenizer: Tokenizer, *, max_rows: int, mesh: Mesh, **options: Any
) -> Engine:
    """An engine for parameters on `mesh`, `max_rows` being those of all processes; `options` as of `Engine`."""
    kind = SharedEngine if is_shared() else Engine
    return kind(params, cfg, tokenizer, max_rows=max_rows, mesh=mesh, **options)


def own_copy(params: Params, mesh: Mesh) -> tuple[Params, Mesh]:
    """Parameters on `mesh` as whole copies on each of this process's devices, and the mesh of those, all `data`.

    In a run of one process both come back as they are.
    """
    if not is_shared():
        return params, mesh
    devices = np.asarray(mesh.local_devices)
    own = Mesh(devices.reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    whole = jax.device_put(params, NamedSharding(mesh, P()))

    def here(x: jax.Array) -> jax.Array:
        copies = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(own, P()), copies)

    return jax.tree.map(here, whole), own


class SharedEngine(Engine):
    """What all processes ask for alike, each answers a part of, and all get. Streams stay in their process."""

    def __init__(self, *model: Any, max_rows: int, mesh: Mesh, **options: Any) -> None:
        """As `Engine`; parameters and `mesh` are those of all processes."""
        self._everywhere = mesh
        rows = -(-max_rows // jax.process_count())
        super().__init__(*model, max_rows=rows, mesh=own_copy({}, mesh)[1], **options)

    def use(self, params: Params) -> None:
        """See `Engine.use`; parameters on the mesh of all."""
        super().use(own_copy(params, self._everywhere)[0])

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams], samples: int = 1
    ) -> list[Completion]:
        """See `Engine.generate`: the same answers, drawn by the process whose turn the prompt is."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        mine = slice(jax.process_index(), None, jax.process_count())
        done = super().generate(prompts[mine], each[mine], samples)
        parts = [iter(part) for part in gather_json([dataclasses.asdict(answer) for answer in done], "answers")]
        turns = [parts[i % len(parts)] for i in range(len(prompts)) for _ in range(samples)]
        return [Completion(**next(part)) for part in turns]

    def logits_at(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Engine.logits_at`."""
        count = jax.process_count()
        share = -(-len(prompts) // count)
        # Arrays that are gathered have one shape: the last prompts stand in where there is no whole turn.
        turns = [*prompts, *prompts[-1:] * (share * count - len(prompts))]
        logits = multihost_utils.process_allgather(super().logits_at(turns[jax.process_index() :: count]))
        return np.moveaxis(logits, 0, 1).reshape(share * count, -1)[: len(prompts)]
