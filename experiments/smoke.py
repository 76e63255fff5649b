"""Every stage once, as small as it goes: what CI runs. It checks that the pipeline holds together, not what it learns.

Command:  python run_speedrun.py --experiment experiments/smoke.py
Cost:     about half a minute on 2 cores
Result:   a report with every section; the model itself has learned next to nothing
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
few = {"total_batch_size": 1024, "device_batch_size": 1, "save_every": 5, "sample_tokens": 16}
conversations = {"num_iterations": 10, "val_rows": 16, "eval_every": 5}
config = replace(
    defaults,
    model=replace(defaults.model, depth=2, aspect_ratio=32, head_dim=32, sequence_len=128),
    tokenizer=replace(defaults.tokenizer, vocab_size=512, max_chars=200_000),
    data=replace(defaults.data, source="embedded", packing="stream"),
    base=replace(
        defaults.base,
        num_iterations=20,
        warmup_steps=4,
        eval_every=10,
        eval_tokens=8192,
        **few,
    ),
    mid=replace(defaults.mid, mixture=("arithmetic:200", "choice:100", "identity"), **conversations, **few),
    sft=replace(defaults.sft, mixture=("arithmetic:200", "choice:100"), **conversations, **few),
    rl=replace(
        defaults.rl,
        task="arithmetic",
        num_iterations=3,
        questions_per_step=4,
        samples_per_question=4,
        max_new_tokens=16,
        eval_every=0,
        eval_examples=8,
        pass_k=2,
        save_every=1,
        device_batch_size=2,
        control=True,
        sample_tokens=16,
    ),
    eval=replace(
        defaults.eval,
        base=("bpb",),
        chat=("arithmetic", "choice"),
        max_examples=16,
        batch_size=16,
        max_new_tokens=16,
    ),
)
