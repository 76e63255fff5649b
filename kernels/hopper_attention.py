"""Causal windowed attention for Hopper (compute capability 9.0) in Mosaic GPU: forward and backward.

Warp-specialised: two warpgroups compute, one moves tiles through TMA; tiles outside the window are visited by none of
the three kernels. What it leaves out: documents inside a row, other head widths than 64 and 128, float32.
`attention.resolve` asks for CUDA 13: the assembler of 12.8 and 12.9 gets causal masks wrong, as JAX's developers found.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.flash_tiles import Setup
from kernels.hopper_backward import backward
from kernels.hopper_common import BLOCK
from kernels.hopper_forward import forward

WIDTHS = (64, 128)
Saved = tuple[jax.Array, ...]


def hopper_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int, interpret: Any = False
) -> jax.Array:
    """As `reference_attention`, for bfloat16 or float16 and H in WIDTHS; any T = S. Returns [B, T, N, H].

    `interpret`: Mosaic GPU's InterpretGPUParams, to run it on a CPU, slowly. ValueError for other widths and dtypes.
    """
    length, width = q_BTNH.shape[1], q_BTNH.shape[3]
    if width not in WIDTHS or q_BTNH.dtype.itemsize != 2:
        raise ValueError(
            f"attention mosaic takes heads of width 64 or 128 in 16-bit precision, here: {width}, {q_BTNH.dtype}; "
            "use --attention auto"
        )
    # Rows past the end see themselves and padding, and get no gradient: they change nothing, and are cut off.
    padding = ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) if length % BLOCK else x for x in (q_BTNH, k_BSKH, v_BSKH))
    return _attention(q, k, v, Setup(window, width**-0.5, None, interpret))[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, setup: Setup) -> jax.Array:
    return forward(q, k, v, setup)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, setup: Setup) -> tuple[jax.Array, Saved]:
    out, logsumexp = forward(q, k, v, setup)
    return out, (q, k, v, out, logsumexp)


def _backward(setup: Setup, saved: Saved, dout: jax.Array) -> Saved:
    return backward(*saved, dout, setup)


_attention.defvjp(_forward, _backward)
