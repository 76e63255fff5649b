"""Causal windowed attention in Pallas for every NVIDIA GPU that Triton compiles for: forward and backward.

Only the tiles of the score matrix that some query sees are computed, in all three kernels, and none is written to
memory. What it leaves out: decoding with a cache, dropout, softcap, and the warp specialisation of Hopper.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.flash_backward import backward
from kernels.flash_forward import forward
from kernels.flash_tiles import Setup, Tiles, first_keys, last_rows, padded_width

Saved = tuple[jax.Array | None, ...]


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int,
    doc_start: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `reference_attention`: query i sees keys max(i - window, doc_start[b, i]) <= j <= i. Returns [B, T, N, H].

    `doc_start` [B, T] int32 never falls along a row and is at most i; with it `window` may be a traced number.
    `interpret`: in plain XLA on any device, slowly. `tiles`: powers of two of at least 16; by default chosen from the
    shapes. T equals S, any length.
    """
    length, width = q_BTNH.shape[1], q_BTNH.shape[3]
    tiles = tiles or Tiles.choose(length, width, q_BTNH.dtype.itemsize)
    # Rows past the end see themselves and padding, and get no gradient: they change nothing, and are cut off.
    rows = -length % max(tiles)
    padding = ((0, 0), (0, rows), (0, 0), (0, padded_width(width) - width))
    q, k, v = (x if padding == ((0, 0),) * 4 else jnp.pad(x, padding) for x in (q_BTNH, k_BSKH, v_BSKH))
    setup = Setup(window, width**-0.5, tiles, interpret)
    first = last = None
    if doc_start is not None:
        first, last = _ends(jnp.pad(doc_start, ((0, 0), (0, rows)), mode="edge"), window)
        setup = setup._replace(window=None)
    return _flash(q, k, v, first, last, setup)[:, :length, :, :width]


def _ends(doc_start_BT: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """The first key each row sees and the last row that sees each key, [B, T] int32 both.

    doc_start never falls, so that the rows of a key's document and of those before it are counted by a search.
    """
    at = jnp.arange(doc_start_BT.shape[1])
    doc_last_BT = jax.vmap(lambda starts: jnp.searchsorted(starts, at, side="right"))(doc_start_BT) - 1
    last_BT = jnp.minimum(last_rows(at, window, at.size)[None], doc_last_BT)
    return jnp.maximum(first_keys(at, window)[None], doc_start_BT), last_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | None, last: jax.Array | None, setup: Setup
) -> jax.Array:
    return forward(q, k, v, first, setup)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | None, last: jax.Array | None, setup: Setup
) -> tuple[jax.Array, Saved]:
    out, logsumexp = forward(q, k, v, first, setup)
    return out, (q, k, v, first, last, out, logsumexp)


def _flash_backward(setup: Setup, saved: Saved, dout: jax.Array) -> Saved:
    return *backward(*saved, dout, setup), None, None


_flash.defvjp(_flash_forward, _flash_backward)
