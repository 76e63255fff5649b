"""`--native`: whether the kernels in C++ can do what is asked for, and can be had."""

from __future__ import annotations

from dataclasses import replace

from jax.sharding import Mesh

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import UserError


def _unfit(cfg: GPTConfig, platform: str, devices: int) -> list[str]:
    from kernels.native import LANES

    wrong = {
        f"a device of kind {platform}": platform != "cpu",
        f"{devices} devices": devices > 1,
        f"--compute-dtype {cfg.compute_dtype}": cfg.compute_dtype != "float32",
        f"--model.head-dim {cfg.head_dim}": cfg.head_dim % LANES != 0,
    }
    return [value for value, is_wrong in wrong.items() if is_wrong]


def check_native(cfg: GPTConfig, platform: str, devices: int) -> None:
    """UserError where `--native on` is asked for what the kernels cannot do."""
    if cfg.native and (found := _unfit(cfg, platform, devices)):
        from kernels.native import LANES

        needs = f"one CPU device, float32 and heads whose width is a multiple of {LANES}"
        raise UserError(f"--native on with {', '.join(found)}: it needs {needs}; leave it at auto, or off")


def with_native(cfg: GPTConfig, mesh: Mesh) -> tuple[GPTConfig, str]:
    """The architecture with `native` decided, its kernels made ready if so; and where they would fit but cannot be had,
    why. UserError for that where `--native on` asks for them.
    """
    if cfg.native is False:
        return cfg, ""
    platform = mesh.devices.flat[0].platform
    check_native(cfg, platform, mesh.size)
    if _unfit(cfg, platform, mesh.size):
        return replace(cfg, native=False), ""
    from kernels import native

    try:
        native.load()
    except native.NativeError as error:
        if cfg.native:
            raise UserError(f"--native on: {error}; mend that, or leave it at auto") from None
        return replace(cfg, native=False), str(error)
    return replace(cfg, native=True), ""
