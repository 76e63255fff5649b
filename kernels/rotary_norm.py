"""Rotary positions and the norm of queries or keys in one pass over memory, forward and backward, in Pallas (Triton).

XLA takes two passes forward and three backward: what it rotated stands in memory before it can be summed up, and rows
are mirrored in a pass of their own. Here a program has whole heads of a few positions in registers. The backward pass
wants the result, which attention keeps anyway, and a number for each head; the input is kept by nobody.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

POSITIONS = 32
"""Positions of a program, at most; a power of two."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def rotary_norm(
    x_BTNH: jax.Array, cos_TC: jax.Array, sin_TC: jax.Array, scale: float, eps: float, interpret: bool
) -> jax.Array:
    """scale * y / sqrt(mean(y^2) + eps), where y is x rotated on halves: (x1 cos + x2 sin, x2 cos - x1 sin).

    `cos_TC` and `sin_TC` [T, H / 2] get no gradient. H is a power of two. Arithmetic is float32, y and the result are
    rounded to x's dtype.
    """
    return _forward(x_BTNH, cos_TC, sin_TC, scale, eps, interpret)[0]


def _halves(ref: jax.Ref, head: int) -> tuple[jax.Array, jax.Array]:
    """Both halves of a head of all positions, float32 [positions, H / 2]."""
    half = ref.shape[2] // 2
    return tuple(ref[:, head, pl.ds(start, half)].astype(jnp.float32) for start in (0, half))


def _store(ref: jax.Ref, head: int, first: jax.Array, second: jax.Array) -> None:
    half = ref.shape[2] // 2
    for start, x in ((0, first), (half, second)):
        ref[:, head, pl.ds(start, half)] = x.astype(ref.dtype)


def _mean(first: jax.Array, second: jax.Array) -> jax.Array:
    """Over a head, [positions]."""
    return jnp.sum(first + second, axis=1) / (2 * first.shape[1])


def _forward_kernel(
    scale: float,
    eps: float,
    x_ref: jax.Ref,
    cos_ref: jax.Ref,
    sin_ref: jax.Ref,
    out_ref: jax.Ref,
    factor_ref: jax.Ref,
) -> None:
    cos, sin = cos_ref[...].astype(jnp.float32), sin_ref[...].astype(jnp.float32)
    for head in range(x_ref.shape[1]):
        first, second = _halves(x_ref, head)
        turned = first * cos + second * sin, second * cos - first * sin
        first, second = (y.astype(x_ref.dtype).astype(jnp.float32) for y in turned)
        factor = scale * jax.lax.rsqrt(_mean(first * first, second * second) + eps)
        factor_ref[head, :] = factor
        _store(out_ref, head, first * factor[:, None], second * factor[:, None])


def _backward_kernel(
    scale: float,
    out_ref: jax.Ref,
    factor_ref: jax.Ref,
    grad_ref: jax.Ref,
    cos_ref: jax.Ref,
    sin_ref: jax.Ref,
    dx_ref: jax.Ref,
) -> None:
    cos, sin = cos_ref[...].astype(jnp.float32), sin_ref[...].astype(jnp.float32)
    for head in range(out_ref.shape[1]):
        (first, second), (dfirst, dsecond) = _halves(out_ref, head), _halves(grad_ref, head)
        factor = factor_ref[head, :][:, None]
        along = _mean(first * dfirst, second * dsecond)[:, None] / scale**2
        dfirst, dsecond = (factor * (dy - along * y) for dy, y in ((dfirst, first), (dsecond, second)))
        _store(dx_ref, head, dfirst * cos - dsecond * sin, dsecond * cos + dfirst * sin)


def _call(kernel: Callable[..., None], like: jax.Array, name: str, interpret: bool, forward: bool) -> Callable:
    """A Pallas call of `kernel` for a few positions of a row of the batch at a time, all their heads."""
    batch, length, heads, width = like.shape
    positions = min(POSITIONS, length & -length)  # the largest power of two that divides the length
    whole = pl.BlockSpec((None, positions, heads, width), lambda i, b: (b, i, 0, 0))
    numbers = pl.BlockSpec((None, heads, positions), lambda i, b: (b, 0, i))
    table = pl.BlockSpec((positions, width // 2), lambda i, b: (i, 0))
    shape = jax.ShapeDtypeStruct(like.shape, like.dtype)
    return pl.pallas_call(
        kernel,
        grid=(length // positions, batch),
        in_specs=[whole, table, table] if forward else [whole, numbers, whole, table, table],
        out_specs=[whole, numbers] if forward else whole,
        out_shape=[shape, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)] if forward else shape,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))  # layers alike are compiled once
def _forward(
    x_BTNH: jax.Array, cos_TC: jax.Array, sin_TC: jax.Array, scale: float, eps: float, interpret: bool
) -> list[jax.Array]:
    """The result, and what each head was multiplied by, [B, N, T] float32."""
    kernel = functools.partial(_forward_kernel, scale, eps)
    return _call(kernel, x_BTNH, "rotary_norm", interpret, forward=True)(x_BTNH, cos_TC, sin_TC)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _backward(
    out_BTNH: jax.Array,
    factor_BNT: jax.Array,
    grad_BTNH: jax.Array,
    cos_TC: jax.Array,
    sin_TC: jax.Array,
    scale: float,
    interpret: bool,
) -> jax.Array:
    kernel = functools.partial(_backward_kernel, scale)
    call = _call(kernel, out_BTNH, "rotary_norm_backward", interpret, forward=False)
    return call(out_BTNH, factor_BNT, grad_BTNH, cos_TC, sin_TC)


def _keep(x: jax.Array, cos: jax.Array, sin: jax.Array, scale: float, eps: float, interpret: bool) -> tuple:
    out, factor = _forward(x, cos, sin, scale, eps, interpret)
    return out, (out, factor, cos, sin)


def _pull_back(scale: float, eps: float, interpret: bool, saved: tuple, grad: jax.Array) -> tuple:
    out, factor, cos, sin = saved
    return _backward(out, factor, grad, cos, sin, scale, interpret), None, None


rotary_norm.defvjp(_keep, _pull_back)
