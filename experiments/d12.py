"""The reference point of the schedules: depth 12, width 768, compute-optimal horizon.

Command:  python run_speedrun.py --experiment experiments/d12.py
Cost:     one GPU of 80 GB; --plan says the hours
Result:   not measured yet
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=12),
    data=replace(defaults.data, num_shards=40),
    device_hour_cost=3.0,  # 8 x H100 at about $24 an hour, as the reference reckons
)
