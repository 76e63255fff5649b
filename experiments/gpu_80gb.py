"""TITLE

Command:  python run_speedrun.py --experiment experiments/gpu_80gb.py
Cost:     COST
Result:   not measured on such a card

Memory: MEM
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=20, sequence_len=2048),
    data=replace(defaults.data, num_shards=170),
    base=replace(defaults.base, device_batch_size=8),
    mid=replace(defaults.mid, device_batch_size=8),
    sft=replace(defaults.sft, device_batch_size=8),
    rl=replace(defaults.rl, device_batch_size=8),
    eval=replace(defaults.eval, batch_size=32),
    compute_dtype="bfloat16",
    loss_chunk=256,
)
