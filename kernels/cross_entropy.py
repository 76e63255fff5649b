"""Cross-entropy of softly capped logits, and its gradient, in one pass over the logits, in Pallas (Triton).

XLA passes twice: what a softmax is divided by is known at the end of the first pass only. But as a factor of a whole
row it can as well go to the other operand of the products that follow, and what is then left of a row's gradient is
made where its logits are read, and written in their place.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOGITS, WARPS = 4096, 8
"""Logits that a program has in registers, at most, a power of two; and the warps that share them."""
MULTIPLE = 32 * WARPS
"""V is a multiple: each logit is one thread's. Of fewer logits than threads Triton has several threads read each, one
of which may find what another has written in its place."""


def softcapped_cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, *, cap: float, vocab_size: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses in nats [B, T], 0 where the target is -1; the sums of the exponentials [B, T]; and gradients [B, T, V].

    V is a multiple of MULTIPLE, else ValueError. Of the logits cap * tanh(logits / cap) the first `vocab_size` count; a
    target beyond gives NaN. The gradients are those of the losses with respect to `logits`, times the sums; of
    positions without a target they mean nothing. Losses and sums are float32, gradients in the dtype of the logits and,
    if nobody else needs those, in their memory.
    """
    rows, width = targets_BT.size, logits_BTV.shape[-1]
    if width % MULTIPLE:
        raise ValueError(f"softcapped_cross_entropy takes multiples of {MULTIPLE} logits, here: {width}")
    row, one = pl.BlockSpec((None, width), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (i,))
    per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    losses, sums, grads = pl.pallas_call(
        functools.partial(_kernel, cap, vocab_size, interpret),
        grid=(rows,),
        in_specs=[row, one],
        out_specs=[one, one, row],
        out_shape=[per_row, per_row, jax.ShapeDtypeStruct((rows, width), logits_BTV.dtype)],
        input_output_aliases={0: 2},
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="softcapped_cross_entropy",
    )(logits_BTV.reshape(rows, width), targets_BT.reshape(rows))
    return losses.reshape(targets_BT.shape), sums.reshape(targets_BT.shape), grads.reshape(logits_BTV.shape)


def _kernel(
    cap: float,
    vocab_size: int,
    interpret: bool,
    logits_ref: jax.Ref,
    target_ref: jax.Ref,
    loss_ref: jax.Ref,
    sum_ref: jax.Ref,
    grads_ref: jax.Ref,
) -> None:
    (width,) = logits_ref.shape
    block = min(LOGITS, width & -width)
    target = jnp.clip(target_ref[0], 0, vocab_size - 1)  # where there is none, no other row's memory

    def capped(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Capped logits, their exponentials, and these times the derivative of the cap."""
        # tanh from the GPU's units for exp and rsqrt; its absolute error is below 1e-6.
        tanh = 1 - 2 * jnp.square(jax.lax.rsqrt(jnp.exp(logits.astype(jnp.float32) * (2 / cap)) + 1))
        exp = jnp.exp(cap * tanh)
        return cap * tanh, exp, exp * (1 - jnp.square(tanh))

    def everybody_is_here() -> None:
        if not interpret:
            triton.debug_barrier()

    target_logit, target_exp, target_grad = capped(logits_ref[target])
    everybody_is_here()  # before the target's place is written to

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        here = pl.ds(i * block, block)
        _, exp, grads = capped(logits_ref[here])
        if vocab_size < width:
            real = i * block + jnp.arange(block) < vocab_size
            exp, grads = jnp.where(real, exp, 0.0), jnp.where(real, grads, 0.0)
        grads_ref[here] = grads.astype(grads_ref.dtype)
        return total + exp

    total = jnp.sum(jax.lax.fori_loop(0, width // block, step, jnp.zeros(block, jnp.float32)))
    everybody_is_here()  # before it is written to once more
    grads_ref[target] = (target_grad - total * target_grad / target_exp).astype(grads_ref.dtype)
    known = jnp.where(target_ref[0] < vocab_size, total, -1.0)  # whose logarithm is NaN
    loss_ref[0] = jnp.where(target_ref[0] >= 0, jnp.log(known) - target_logit, 0.0)
    sum_ref[0] = total
