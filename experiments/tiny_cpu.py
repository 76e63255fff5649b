"""The whole pipeline on two CPU cores in minutes, from the corpus inside the package: a model that writes English
sentences and computes with a tool.

Command:  make speedrun
Cost:     under 15 minutes on 2 cores, under 8 GB
Result:   not measured yet
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
config = replace(
    defaults,
    model=replace(defaults.model, depth=4, head_dim=64, sequence_len=256),
    tokenizer=replace(defaults.tokenizer, vocab_size=4096),
    data=replace(defaults.data, source="embedded", packing="stream"),
    base=replace(
        defaults.base,
        num_iterations=300,
        total_batch_size=4096,
        device_batch_size=16,
        warmup_steps=20,
        eval_every=100,
        eval_tokens=2**30,
        save_every=50,
    ),
    mid=replace(
        defaults.mid,
        mixture=("arithmetic:8000", "multistep:4000", "letter_count:4000", "choice:2000", "identity*2"),
        num_iterations=150,
        total_batch_size=4096,
        device_batch_size=16,
        loss_on="assistant",
        eval_every=50,
        eval_tokens=2**16,
        save_every=50,
    ),
    sft=replace(
        defaults.sft,
        mixture=("arithmetic:4000", "multistep:4000", "choice:1000", "identity*2"),
        packing="bestfit",
        num_iterations=120,
        total_batch_size=4096,
        device_batch_size=16,
        init_lr_frac=0.3,
        eval_every=50,
        eval_tokens=2**16,
        save_every=50,
    ),
    rl=replace(
        defaults.rl,
        task="multistep",
        num_iterations=30,
        questions_per_step=16,
        samples_per_question=8,
        max_new_tokens=64,
        eval_every=10,
        eval_examples=100,
        save_every=10,
    ),
    eval=replace(
        defaults.eval,
        base=("bpb",),
        chat=("arithmetic", "multistep", "letter_count", "choice"),
        max_examples=1000,
        max_new_tokens=96,
    ),
)
