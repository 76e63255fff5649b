"""The recipe of karpathy/nanochat of July 2026: no mid-training, one longer fine-tuning on SmolTalk, MMLU and GSM8K.

Command:  python run_speedrun.py --experiment experiments/nanochat_july.py --stages tokenizer,base,sft --mesh 8
Cost:     eight H100 or H200; --plan says the hours
Result:   not measured yet

With these stages sft starts from base, with its optimizer moments; unlike the reference's, nothing is in fp8 (--fp8).
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
    sft=replace(
        defaults.sft,
        mixture=("smoltalk:460000", "mmlu_aux*3", "gsm8k*4"),
        loss_on="assistant",
        packing="bestfit",
        total_batch_size=2**20,
        device_batch_size=16,
        init_lr_frac=0.8,
        warmdown_ratio=0.5,
        final_lr_frac=0.0,
        momentum_start=0.85,
        momentum_warmup=300,
        init_optimizer=True,
    ),
    device_hour_cost=3.0,  # 8 x H100 at about $24 an hour, as the reference reckons
)
