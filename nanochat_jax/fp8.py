"""Training products in 8-bit floats with one scale a tensor: e4m3 forward, e5m2 gradients (arXiv 2209.05433).

Each of a matrix's three products takes its operands as fp8 values times a scalar. XLA turns just this form into cuBLAS'
fp8 product, unless it has given the product to Triton or merged it with others before, which process.GPU_FLAGS forbid;
on a CPU the same expression is arithmetic on values that have been rounded to fp8. Scales are powers of two: scaling
then rounds nothing, in bfloat16 either, and a tensor cut over devices is rounded almost as a whole one is. A scale is
that of a microbatch's tensor on one shard of `data`, which is whole over the other axes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels.attention import generation
from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import UserError
from nanochat_jax.sharding import PARAM_SPECS, gathered, match, shard

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
EPS = 1e-12
"""Maxima below are scaled as this one is."""
CAPABILITY = 8.9
"""The first compute capability of NVIDIA's with fp8 products."""

Scaled = tuple[jax.Array, jax.Array]
"""fp8 values, and the scalar float32 that they are to be multiplied by."""


def fits(rows: int, columns: int) -> bool:
    """Whether a [rows, columns] kernel is multiplied in fp8: cuBLAS needs multiples of 16, small ones do not pay."""
    return rows % 16 == 0 and columns % 16 == 0 and min(rows, columns) >= 128


def quantize(x: jax.Array, dtype: jnp.dtype) -> Scaled:
    """`x` over the largest power of two that uses `dtype`'s range without leaving it; all NaN where x is not finite."""
    peak = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), EPS)
    ratio = jax.lax.bitcast_convert_type(float(jnp.finfo(dtype).max) / peak, jnp.uint32)
    scale = jax.lax.bitcast_convert_type(ratio & jnp.uint32(0xFF800000), jnp.float32)  # its mantissa cut off
    return (x.astype(jnp.float32) * scale).astype(dtype), 1 / scale


def product(
    a: Scaled, b: Scaled, contract: tuple[int, int], dtype: jnp.dtype, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """The product of two matrices over dimension contract[0] of `a` and contract[1] of `b`, in `dtype`."""
    operands = (values.astype(dtype) * unscale.astype(dtype) for values, unscale in (a, b))
    return jax.lax.dot_general(*operands, (((contract[0],), (contract[1],)), ((), ())), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel_KN: jax.Array, path: str) -> jax.Array:
    """x [..., K] @ the float32 parameter at `path`, [..., N] in x's dtype; in fp8 where it is differentiated.

    Evaluation and decoding are not: they multiply in x's dtype.
    """
    return x @ gathered(kernel_KN.astype(x.dtype), path)


def _forward(x: jax.Array, kernel_KN: jax.Array, path: str) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    values_KN, unscale = quantize(kernel_KN, E4M3)
    w_KN = gathered(values_KN, path), unscale  # rounded before it goes over `fsdp`
    x_MK = quantize(x.reshape(-1, x.shape[-1]), E4M3)
    return product(x_MK, w_KN, (1, 0), x.dtype).reshape(*x.shape[:-1], -1), (x_MK, w_KN)


def _backward(path: str, saved: tuple[Scaled, Scaled], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MK, w_KN = saved
    g_MN = quantize(grad.reshape(-1, grad.shape[-1]), E5M2)
    exact = jax.lax.Precision.HIGHEST  # cuBLAS else sums in less than float32, good enough for the forward pass only
    dx = product(g_MN, w_KN, (1, 1), grad.dtype, exact).reshape(*grad.shape[:-1], -1)
    dw_KN = product(x_MK, g_MN, (0, 0), grad.dtype, exact)
    return dx, shard(dw_KN.astype(jnp.float32), *match(path, PARAM_SPECS))


matmul.defvjp(_forward, _backward)


def precision(cfg: GPTConfig, device: jax.Device) -> str:
    """How a stage on `device` multiplies, for a person. UserError where it should use fp8 and cannot."""
    if not cfg.fp8:
        return cfg.compute_dtype
    if expected_products(cfg) == 0:
        raise UserError(
            f"--fp8: no matrix of a model of width {cfg.n_embd} can use it, both dimensions must be multiples of "
            "16 and at least 128: raise --model.depth or --model.aspect-ratio, or leave --fp8 out"
        )
    if device.platform == "cpu":
        return f"{cfg.compute_dtype}, layers train in fp8 (emulated)"
    capability = str(getattr(device, "compute_capability", "none"))
    if generation(capability) < CAPABILITY:
        raise UserError(
            f"--fp8: {device.device_kind} has compute capability {capability}, {CAPABILITY} is needed (Ada, Hopper "
            "or later): leave --fp8 out"
        )
    return f"{cfg.compute_dtype}, layers train in fp8"


def fp8_products(hlo_text: str) -> int:
    """How many fp8 products of cuBLAS a compiled program holds; what XLA did not recognise is 16 bits, unrounded."""
    return hlo_text.count('custom_call_target="__cublas$lt$matmul$f8"')


def expected_products(cfg: GPTConfig) -> int:
    """How many fp8 products a training step has at least: three for each matrix of a layer that `fits`."""
    width, queries, keys = cfg.n_embd, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    layer = (width, queries), (width, keys), (width, keys), (queries, width), (width, 4 * width), (4 * width, width)
    return 3 * cfg.n_layer * sum(fits(*kernel) for kernel in layer)


def check_compiled(cfg: GPTConfig, device: jax.Device, hlo_text: str) -> None:
    """UserError where a training step compiled for a GPU does not multiply in fp8 wherever it should."""
    made, wanted = fp8_products(hlo_text), expected_products(cfg)
    if cfg.fp8 and device.platform == "gpu" and made < wanted:
        raise UserError(
            f"--fp8: XLA made {made} fp8 products of the training step for {device.device_kind}, {wanted} are needed, "
            "and may not even round for the others: drop --xla_gpu_enable_triton_gemm and "
            "--xla_gpu_dot_merger_threshold_mb from XLA_FLAGS, or leave --fp8 out"
        )
