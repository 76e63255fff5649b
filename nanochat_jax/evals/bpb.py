"""Bits per byte: the loss on text in a unit that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.errors import UserError


def bits_per_byte(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    batches: Iterable[Mapping[str, np.ndarray | jax.Array]],
    token_bytes: np.ndarray,
) -> float:
    """Nats of all targets that stand for text, over ln 2 times their bytes.

    loss_fn(inputs, targets) -> nats at each position, float32 [rows, T]; batches hold "inputs" and "targets" int32
    [rows, T], -1 where nothing is to be predicted; token_bytes int32 [vocab_size], 0 for special tokens, which do not
    count. Raises UserError where no target counts.
    """
    table = jnp.asarray(token_bytes)
    # Sums over batches are exact Python numbers: float32 would lose small terms of a long validation text.
    nats, size = 0.0, 0
    for batch in batches:
        batch_nats, batch_size = totals(loss_fn(batch["inputs"], batch["targets"]), batch["targets"], table)
        nats, size = nats + float(batch_nats), size + int(batch_size)
    if size == 0:
        raise UserError("the validation text has no byte to measure the loss on; give a longer one")
    return nats / (math.log(2) * size)


@jax.jit
def totals(losses_BT: jax.Array, targets_BT: jax.Array, token_bytes_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nats (float32) and bytes (int32) of the targets that stand for text."""
    bytes_BT = jnp.where(targets_BT >= 0, token_bytes_V[jnp.maximum(targets_BT, 0)], 0)
    return jnp.sum(jnp.where(bytes_BT > 0, losses_BT, 0.0)), jnp.sum(bytes_BT)
