"""Compile the training step for H100s that are not here: memory of each device, and what moves between them.

    pip install "jax[cuda13]==0.11.2"
    python bench/compile_for_h100.py --mesh 8 --depth 24 --rows 16 --microbatches 4

The compiler is CUDA's, the devices are a description (`jax.experimental.topologies`); nothing is run. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DTYPE_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def moved(program: str) -> dict[str, dict[str, float]]:
    """{collective: how many, MB of what a device has from them} in a compiled program's text; a loop's body once."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "mb": 0.0})
    for line in program.splitlines():
        if match := re.search(rf" = (.*?) ({COLLECTIVES})(?:-done)?\(", line):
            size = sum(
                math.prod(map(int, filter(None, dims.split(",")))) * DTYPE_BYTES.get(dtype, 0)
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
            found[match[2]]["count"] += 1
            found[match[2]]["mb"] += size / 1e6
    return {name: {"count": sums["count"], "mb": round(sums["mb"], 1)} for name, sums in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="8")
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--rows", type=int, default=16, help="of a microbatch, on each data shard")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--attention", default="mosaic", choices=("mosaic", "cudnn", "pallas", "xla_blocked"))
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--hlo", type=Path, help="write the compiled program there")
    asked = parser.parse_args()

    # The plugin looks for a driver, which is not needed to compile; arrays of our own stay on the CPU.
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    import jax
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from nanochat_jax.config import GPTConfig, ModelConfig
    from nanochat_jax.memory import account, lowered_step
    from nanochat_jax.sharding import AXES, parse_mesh
    from nanochat_jax.train import compiler_options

    sizes = tuple(parse_mesh(asked.mesh).values())
    described = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=H100, topology=f"1x1x{math.prod(sizes)}"
    )
    mesh = Mesh(np.array(described.devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    model = ModelConfig(depth=asked.depth, sequence_len=asked.sequence_len)
    precision = {"compute_dtype": "bfloat16", "attention": asked.attention, "remat": asked.remat}
    cfg = GPTConfig.from_depth(model, asked.vocab_size, **precision)
    with jax.set_mesh(mesh):
        lowered = lowered_step(cfg, mesh, asked.microbatches, asked.rows, asked.sequence_len)
        program = lowered.compile(compiler_options(cfg, mesh))
    text = program.as_text()
    if asked.hlo:
        asked.hlo.write_text(text)
    needs = account(program)
    gib = {name: round(needs[name] / 2**30, 2) for name in ("bytes", "temporary_bytes")}
    print(
        json.dumps(
            {"device": described.devices[0].device_kind, "jax": jax.__version__, "gib": gib, "moved": moved(text)}
        )
    )


if __name__ == "__main__":
    main()
