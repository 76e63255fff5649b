"""All stages on a card of 24 GB: depth 16, width 1024, 537M parameters, 2.8B tokens.

Command:  python run_speedrun.py --experiment experiments/gpu_24gb.py
Cost:     estimated, not measured on such a card: about 23 hours on an RTX 4090 (plan's assumptions: 40% of the peak)
Result:   not measured yet

Memory, estimated, not measured on such a card: 16.5 GiB for a step of base, compiled for an H100 (JAX 0.11.2);
assumed to be much the same from Ampere on. Where it is too much: --base.device-batch-size auto, --remat.
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=16, sequence_len=2048),
    data=replace(defaults.data, num_shards=90),
    base=replace(defaults.base, device_batch_size=8),
    mid=replace(defaults.mid, device_batch_size=8),
    sft=replace(defaults.sft, device_batch_size=8),
    rl=replace(defaults.rl, questions_per_step=8, device_batch_size=8),
    eval=replace(defaults.eval, batch_size=8),
    compute_dtype="bfloat16",
)
