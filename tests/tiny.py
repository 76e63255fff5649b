"""The smallest run that still has every stage: shared by the tests of the stages."""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
tuned = {"total_batch_size": 8 * 64, "device_batch_size": 1, "save_every": 2, "eval_every": 4, "sample_tokens": 8}
config = replace(
    defaults,
    model=replace(defaults.model, depth=2, aspect_ratio=16, head_dim=16, sequence_len=64),
    tokenizer=replace(defaults.tokenizer, vocab_size=512, max_chars=100_000),
    data=replace(defaults.data, source="embedded", packing="stream"),
    base=replace(defaults.base, num_iterations=12, warmup_steps=2, eval_tokens=4096, **tuned),
    mid=replace(defaults.mid, mixture=("arithmetic:100", "choice:40"), num_iterations=12, val_rows=8, **tuned),
    sft=replace(
        defaults.sft,
        mixture=("arithmetic:100", "choice:40"),
        packing="bestfit",
        init_lr_frac=0.5,
        num_iterations=12,
        val_rows=8,
        **tuned,
    ),
    rl=replace(
        defaults.rl,
        task="arithmetic",
        num_iterations=12,
        questions_per_step=2,
        samples_per_question=4,
        max_new_tokens=8,
        eval_every=4,
        eval_examples=4,
        pass_k=2,
        save_every=2,
        device_batch_size=4,
        normalize_over=4,
        control=True,
        sample_tokens=8,
    ),
    eval=replace(defaults.eval, base=("bpb",), chat=("arithmetic", "choice"), max_examples=8, max_new_tokens=8),
)
