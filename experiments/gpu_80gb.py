"""All stages on a card of 80 GB: depth 20, width 1280, 897M parameters, 5.2B tokens.

Command:  python run_speedrun.py --experiment experiments/gpu_80gb.py
Cost:     estimated, not measured on such a card: about 12 hours on an H100 (plan's assumptions: 40% of the peak)
Result:   not measured yet

Memory, estimated, not measured on such a card: 40.1 GiB for a step of base, compiled for an H100 (JAX 0.11.2);
assumed to be much the same from Ampere on. Where it is too much: --base.device-batch-size auto, --remat.
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=20, sequence_len=2048),
    data=replace(defaults.data, num_shards=170),
    base=replace(defaults.base, device_batch_size=16),
    mid=replace(defaults.mid, device_batch_size=16),
    sft=replace(defaults.sft, device_batch_size=16),
    rl=replace(defaults.rl, device_batch_size=16),
    eval=replace(defaults.eval, batch_size=32),
    compute_dtype="bfloat16",
)
