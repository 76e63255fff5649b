"""GPT-2 grade sooner, on ClimbMix instead of FineWeb-Edu; otherwise experiments/speedrun.py.

Command:  python run_speedrun.py --experiment experiments/gpt2_climbmix.py --mesh 8
Cost:     eight H100 or H200; --plan says the hours
Result:   not measured yet
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=24),
    data=replace(defaults.data, source="climbmix", num_shards=170),
    base=replace(defaults.base, target_param_data_ratio=8.0, device_batch_size=16),
    mid=replace(defaults.mid, device_batch_size=16),
    device_hour_cost=3.0,  # 8 x H100 at about $24 an hour, as the reference reckons
)
