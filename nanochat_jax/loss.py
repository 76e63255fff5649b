"""Output head and cross-entropy without a second array of the size of the logits.

A training step wants only the weighted sum of the losses and its gradients. Both come out of one pass over the logits:
`weighted_loss` computes the gradients of hidden states and head where it has the logits at hand, in the forward pass,
so that neither logits nor their gradient are kept for the backward pass or computed again in it. With cfg.loss_chunk
that pass runs over so many positions of a row at a time, and [B, T, V] never exists.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.attention import GPU_IMPLEMENTATIONS
from nanochat_jax.config import GPTConfig
from nanochat_jax.model import BATCH_AXES, SOFTCAP, Params, check_length, hidden, per_device, scaled, softcapped
from nanochat_jax.sharding import cut_axes, gathered, shard


def token_losses(params: Params, cfg: GPTConfig, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Cross-entropy in nats at each position [B, T] float32; 0 where the target is -1."""
    x_BTD, kernel_DV = _operands(params, cfg, inputs_BT)
    chunks = _chunked(cfg, x_BTD, targets_BT)
    losses = jax.lax.map(lambda xy: _losses(cfg, xy[0] @ kernel_DV, xy[1])[0], chunks)
    return _whole(losses, targets_BT.shape[1])


def weighted_loss(
    params: Params, cfg: GPTConfig, inputs_BT: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """sum(weights * cross-entropy in nats), a float32 scalar; positions whose target is -1 count nothing."""
    return _weighted(cfg, *_operands(params, cfg, inputs_BT), targets_BT, weights_BT)


def _operands(params: Params, cfg: GPTConfig, inputs_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    check_length(cfg, inputs_BT.shape[1])
    x_BTD = hidden(params, cfg, inputs_BT)
    return x_BTD, gathered(params["lm_head"]["kernel"].astype(x_BTD.dtype), "lm_head/kernel")


def _chunked(cfg: GPTConfig, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] as [chunks, B, chunk, ...]; integers are padded with -1, a target that counts nothing."""
    batch, length = arrays[0].shape[:2]
    chunk = min(cfg.loss_chunk or length, length)
    count = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, count * chunk - length)
        x = jnp.pad(x, padding, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
        return x.reshape(batch, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    return tuple(cut(x) for x in arrays)


def _whole(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunked` for one array."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _losses(cfg: GPTConfig, logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
    """Losses [B, C] of the head's products; what those are capped, its exponentials [B, C, V], their sums [B, C]."""
    # The cap bounds logits to +-15, so the sum of exponentials needs no maximum taken out.
    capped_BCV = softcapped(logits_BCV, cfg)
    exp_BCV = jnp.exp(capped_BCV)
    sum_BC = jnp.sum(exp_BCV, axis=-1)
    # A sum over the vocabulary rather than a lookup: with the vocabulary cut over devices a lookup gathers the logits.
    # Capped after it: a GPU keeps in memory, in float32, what two sums read.
    logits_BCV = logits_BCV[..., : cfg.vocab_size].astype(jnp.float32)
    target_BC1 = jnp.sum(jnp.where(_is_target(cfg, targets_BC), logits_BCV, 0.0), axis=-1, keepdims=True)
    losses_BC = jnp.log(sum_BC) - softcapped(target_BC1, cfg)[..., 0]
    return jnp.where(targets_BC >= 0, losses_BC, 0.0), capped_BCV, exp_BCV, sum_BC


def _is_target(cfg: GPTConfig, targets_BC: jax.Array) -> jax.Array:
    return jnp.arange(cfg.vocab_size)[None, None] == targets_BC[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    cfg: GPTConfig, x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    return _weighted_forward(cfg, x_BTD, kernel_DV, targets_BT, weights_BT)[0]


def _weighted_forward(
    cfg: GPTConfig, x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The loss, and its gradients with respect to hidden states, head and weights."""
    # Devices that have only some of the vocabulary do not know what its softmax is divided by.
    by_kernel = "tensor" not in cut_axes() and kernel_takes(cfg)

    def step(dkernel_DV: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x_BCD, targets_BC, weights_BC = chunk
        weights_BC = jnp.where(targets_BC >= 0, weights_BC, 0.0)
        logits_BCV = x_BCD @ kernel_DV
        if by_kernel:
            losses_BC, sums_BC, dlogits_BCV = _by_kernel(cfg, logits_BCV, targets_BC)
        else:
            losses_BC, dlogits_BCV = _by_xla(cfg, logits_BCV, targets_BC, weights_BC)
        dx_BCD = jnp.einsum("BCV,DV->BCD", dlogits_BCV, kernel_DV)
        if by_kernel:
            factor_BC1 = (weights_BC / sums_BC)[..., None]
            dx_BCD, x_BCD = scaled(factor_BC1, dx_BCD), scaled(factor_BC1, x_BCD)
        here_DV = jnp.einsum("BCD,BCV->DV", x_BCD, dlogits_BCV, preferred_element_type=jnp.float32)
        return dkernel_DV + here_DV, (dx_BCD, losses_BC)

    chunks = _chunked(cfg, x_BTD, targets_BT, weights_BT)
    zeros_DV = shard(jnp.zeros(kernel_DV.shape, jnp.float32), None, "tensor")
    if chunks[0].shape[0] == 1:
        dkernel_DV, outs = step(zeros_DV, tuple(x[0] for x in chunks))
        dx_BTD, losses_BT = outs
    else:
        dkernel_DV, outs = jax.lax.scan(step, zeros_DV, chunks)
        dx_BTD, losses_BT = (_whole(x, targets_BT.shape[1]) for x in outs)
    return jnp.sum(losses_BT * weights_BT), (dx_BTD, dkernel_DV.astype(kernel_DV.dtype), losses_BT)


def _by_xla(
    cfg: GPTConfig, logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses [B, C], and the gradients of their weighted sum [B, C, V] with respect to the head's products."""
    losses_BC, capped_BCV, exp_BCV, sum_BC = _losses(cfg, logits_BCV, targets_BC)
    if not cfg.loss_chunk:  # On a GPU capping twice is cheaper than keeping capped logits of all positions.
        capped_BCV = softcapped(jax.lax.optimization_barrier(logits_BCV), cfg)
        exp_BCV = jnp.exp(capped_BCV)
    softmax_BCV = exp_BCV * (weights_BC / sum_BC)[..., None]
    dcapped_BCV = softmax_BCV - jnp.where(_is_target(cfg, targets_BC), weights_BC[..., None], 0.0)
    dlogits_BCV = dcapped_BCV * (1.0 - jnp.square(capped_BCV / SOFTCAP))  # the derivative of the cap
    padding = [(0, 0), (0, 0), (0, cfg.padded_vocab_size - cfg.vocab_size)]
    return losses_BC, jnp.pad(dlogits_BCV.astype(logits_BCV.dtype), padding)


def kernel_takes(cfg: GPTConfig) -> bool:
    """Whether kernels/cross_entropy.py goes with this attention and takes this vocabulary, if no device has a part."""
    if cfg.attention not in GPU_IMPLEMENTATIONS:
        return False
    from kernels.cross_entropy import MULTIPLE  # Pallas takes up to half a second to import

    return cfg.padded_vocab_size % MULTIPLE == 0


def _by_kernel(cfg: GPTConfig, logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
    """What `softcapped_cross_entropy` gives, on each device of its own rows."""
    from kernels.cross_entropy import softcapped_cross_entropy

    interpret = "interpreted" in cfg.attention
    local = functools.partial(softcapped_cross_entropy, cap=SOFTCAP, vocab_size=cfg.vocab_size, interpret=interpret)
    return per_device(local, (BATCH_AXES,), (logits_BCV, targets_BC))


def _weighted_backward(cfg: GPTConfig, grads: tuple[jax.Array, ...], dloss: jax.Array) -> tuple[jax.Array | None, ...]:
    dx_BTD, dkernel_DV, losses_BT = ((dloss * x).astype(x.dtype) for x in grads)
    return dx_BTD, dkernel_DV, None, losses_BT


_weighted.defvjp(_weighted_forward, _weighted_backward)
