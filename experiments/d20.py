"""The size of the first nanochat speedrun: depth 20, width 1280, compute-optimal horizon.

Command:  python run_speedrun.py --experiment experiments/d20.py --mesh 8
Cost:     eight H100 or H200; --plan says the hours
Result:   not measured yet
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=20),
    data=replace(defaults.data, num_shards=170),
    base=replace(defaults.base, device_batch_size=16),
    mid=replace(defaults.mid, device_batch_size=16),
    device_hour_cost=3.0,  # 8 x H100 at about $24 an hour, as the reference reckons
)
