"""All stages on a card of 12 GB: depth 12, width 768, 286M parameters, 1.3B tokens.

Command:  python run_speedrun.py --experiment experiments/gpu_12gb.py
Cost:     estimated, not measured on such a card: about 39 hours on an RTX 3060 (plan's assumptions: 40% of the peak)
Result:   not measured yet

Memory, estimated, not measured on such a card: 6.6 GiB for a step of base, compiled for an H100 (JAX 0.11.2);
assumed to be much the same from Ampere on. Where it is too much: --base.device-batch-size auto, --remat.
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=12, sequence_len=2048),
    data=replace(defaults.data, num_shards=40),
    base=replace(defaults.base, device_batch_size=4),
    mid=replace(defaults.mid, device_batch_size=4),
    sft=replace(defaults.sft, device_batch_size=4),
    rl=replace(defaults.rl, questions_per_step=8, device_batch_size=4),
    eval=replace(defaults.eval, batch_size=4),
    compute_dtype="bfloat16",
)
