"""All stages on a card of 8 GB: depth 10, width 640, 196M parameters, 0.84B tokens.

Command:  python run_speedrun.py --experiment experiments/gpu_8gb.py
Cost:     estimated, not measured on such a card: about 11 hours on an RTX 3070 (plan's assumptions: 40% of the peak)
Result:   not measured yet

Memory, estimated, not measured on such a card: 4.8 GiB for a step of base, compiled for an H100 (JAX 0.11.2);
assumed to be much the same from Ampere on. Where it is too much: --base.device-batch-size auto, --remat.
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=10, sequence_len=1024),
    data=replace(defaults.data, num_shards=30),
    base=replace(defaults.base, device_batch_size=8),
    mid=replace(defaults.mid, device_batch_size=8),
    sft=replace(defaults.sft, device_batch_size=8),
    rl=replace(defaults.rl, questions_per_step=4, device_batch_size=4),
    eval=replace(defaults.eval, batch_size=4),
    compute_dtype="bfloat16",
)
