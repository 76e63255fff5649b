"""The contract of training attention and the explicit choice of its implementation.

| impl               | runs on           | what it is                                                           |
|--------------------|-------------------|----------------------------------------------------------------------|
| reference          | everywhere        | full score matrix, masked; the specification                         |
| xla_blocked        | everywhere        | plain XLA, computes visible blocks only; best on CPU and TPU         |
| cudnn              | NVIDIA, bf16/fp16 | cuDNN flash attention with a left window                             |
| pallas             | NVIDIA            | our flash attention through Triton, visible tiles only in forward    |
|                    |                   | and backward; float32 products are TF32                              |
| mosaic             | Hopper, bf16/fp16 | the same for compute capability 9.x through Mosaic GPU, H 64 or 128  |
| pallas_interpreted | everywhere        | the same kernels run by XLA, slowly, for tests; `pallas` on a CPU    |

`auto` is resolved once, at start, by `resolve`; an implementation that cannot run here is an error, never a fallback.
Documents inside a row (`doc_start`) are known to `reference` and to `pallas`.
"""

import re

import jax

from kernels.blocked import blocked_attention
from kernels.reference import reference_attention

IMPLEMENTATIONS = ("reference", "xla_blocked", "cudnn", "pallas", "pallas_interpreted", "mosaic")
GPU_IMPLEMENTATIONS = ("cudnn", "pallas", "pallas_interpreted", "mosaic")
"""Those that run on NVIDIA's GPUs alone, `pallas_interpreted` being one of them tried elsewhere."""
AMPERE, HOPPER = 8.0, 9.0
MOSAIC_CUDA = 13000
"""The CUDA that mosaic needs: the assembler of 12.8 and 12.9 gets causal masks wrong, as JAX's developers found."""


def compute_capability() -> str:
    """Of the first device here, such as "9.0" for an H100; empty where it is no GPU."""
    return getattr(jax.local_devices()[0], "compute_capability", "")


def generation(capability: str) -> float:
    """A compute capability of NVIDIA's as a number, to be held against AMPERE and HOPPER; 0: no GPU of theirs."""
    return float(capability) if capability.replace(".", "", 1).isdigit() else 0.0


def cuda_version(platform_version: str | None = None) -> int:
    """The CUDA that JAX was built for, such as 13000 for 13.0, by its `platform_version`; 0 where it was for none."""
    text = jax.local_devices()[0].client.platform_version if platform_version is None else platform_version
    found = re.search(r"cuda (\d+)", text)
    return int(found[1]) if found else 0


def resolve(
    impl: str, platform: str, dtype: str, capability: str | None = None, width: int = 128, cuda: int | None = None
) -> str:
    """The implementation `impl` means on `platform` ("cpu", "gpu", "tpu") in `dtype`; ValueError if it cannot run.

    `capability`, `cuda`: those here where none is given; `width`: of a head. `auto` on NVIDIA's GPUs is the fastest
    that was measured: mosaic on Hopper, else cudnn; and pallas for float32, as XLA takes minutes to compile its blocks.
    """
    capability = compute_capability() if capability is None else capability
    cuda = cuda_version() if cuda is None else cuda
    chip = generation(capability)
    widest = 256 if chip >= HOPPER else 128
    by_cudnn = platform == "gpu" and dtype != "float32" and chip >= AMPERE and width % 8 == 0 and width <= widest
    by_mosaic = by_cudnn and HOPPER <= chip < 10 and width in (64, 128) and cuda >= MOSAIC_CUDA
    if impl == "auto" and by_cudnn:
        return "mosaic" if by_mosaic else "cudnn"
    if impl == "auto":
        return "pallas" if dtype == "float32" and chip >= AMPERE else "xla_blocked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention {impl!r} is unknown; known: auto, {', '.join(IMPLEMENTATIONS)}")
    if impl == "cudnn" and not by_cudnn:
        raise ValueError(
            "attention cudnn needs an NVIDIA GPU of compute capability 8.0 (Ampere) or more, 16-bit precision and "
            f"heads whose width is a multiple of 8, at most {widest}, here: {platform} {capability or '-'}, {dtype}, "
            f"{width}; use --attention auto"
        )
    if impl == "pallas" and platform == "cpu":
        return "pallas_interpreted"
    if impl == "pallas" and platform != "gpu":
        raise ValueError(f"attention pallas needs an NVIDIA GPU, here: {platform}; use --attention auto")
    if impl == "mosaic" and not by_mosaic:
        raise ValueError(
            "attention mosaic needs an NVIDIA GPU of compute capability 9.x (H100, H200), CUDA 13, 16-bit precision "
            f"and heads of width 64 or 128, here: {platform} {capability or '-'}, CUDA {cuda / 1000:.2f}, {dtype}, "
            f"{width}; use --attention auto, or for CUDA 13 requirements-cuda13.txt"
        )
    return impl


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int,
    doc_start: jax.Array | None = None,
    impl: str,
) -> jax.Array:
    """Causal attention of T queries over the S = T keys of the same rows, query i seeing keys i - window <= j <= i.

    With `doc_start` [B, T] int32, at most i and never falling along a row, nor does it see keys before doc_start[b, i].
    Scores are scaled by H^-0.5, softmax is in float32, N is a multiple of K (grouped queries). Returns [B, T, N, H].
    ValueError where the implementation is unknown or knows no documents.
    """
    if impl == "reference":
        return reference_attention(q_BTNH, k_BSKH, v_BSKH, window=window, doc_start=doc_start)
    if impl in ("pallas", "pallas_interpreted"):
        # Pallas takes up to half a second to import.
        from kernels.flash_attention import flash_attention

        interpret = impl == "pallas_interpreted"
        return flash_attention(q_BTNH, k_BSKH, v_BSKH, window=window, doc_start=doc_start, interpret=interpret)
    if doc_start is not None:
        raise ValueError(f"attention {impl} knows no document starts; use reference or pallas")
    if impl == "xla_blocked":
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, window=window)
    if impl == "mosaic":
        from kernels.hopper_attention import hopper_attention

        return hopper_attention(q_BTNH, k_BSKH, v_BSKH, window=window)
    if impl == "cudnn":
        # is_causal as well as the window: a (w, 0) window alone lets queries see the future.
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=(window, 0), implementation="cudnn"
        )
    raise ValueError(f"attention {impl!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}")
