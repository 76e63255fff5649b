"""The whole pipeline on two CPU cores in minutes, from the corpus inside the package: a model that writes English
sentences and computes with a tool.

Command:  make speedrun
Cost:     6 to 13 minutes on 2 cores, 2.5 GB
Result:   three seeds on two processors in README.md: 1.72 to 1.73 bits per byte, arithmetic at least 99%, multistep up
          by 17 to 29 points with rl
"""

from dataclasses import replace

from nanochat_jax.config import Config

defaults = Config()
batch = {"total_batch_size": 4096, "device_batch_size": 16}
# Fine-tuning is short: rates far above those of a long run, but for the embeddings, whose rare rows would be lost.
rates = {"matrix_lr": 0.03, "embedding_lr": 0.05, "unembedding_lr": 0.004, "scalar_lr": 0.1}
config = replace(
    defaults,
    model=replace(defaults.model, depth=4, aspect_ratio=48, head_dim=64, sequence_len=256),
    tokenizer=replace(defaults.tokenizer, vocab_size=4096),
    data=replace(defaults.data, source="embedded", packing="stream"),
    base=replace(
        defaults.base,
        num_iterations=170,
        init_lr_frac=3.0,
        unembedding_lr=0.03,
        warmup_steps=10,
        eval_every=85,
        eval_tokens=2**16,  # the whole validation shard
        save_every=85,
        **batch,
    ),
    mid=replace(
        defaults.mid,
        mixture=("arithmetic:16000", "multistep:5000", "choice:1000", "identity"),
        num_iterations=60,
        loss_on="assistant",
        init_lr_frac=1.0,
        warmup_steps=5,
        momentum_warmup=30,
        val_rows=64,
        eval_every=0,
        save_every=30,
        **batch,
        **rates,
    ),
    sft=replace(
        defaults.sft,
        mixture=("arithmetic:16000", "multistep:5000", "choice:1000", "identity"),
        packing="bestfit",
        num_iterations=60,
        init_lr_frac=0.7,
        val_rows=64,
        eval_every=0,
        save_every=30,
        **batch,
        **rates,
    ),
    rl=replace(
        defaults.rl,
        task="multistep",
        num_iterations=40,
        questions_per_step=8,
        samples_per_question=8,
        max_new_tokens=80,
        init_lr_frac=0.1,
        embedding_lr=0.05,
        scalar_lr=0.1,
        eval_every=20,
        eval_examples=100,
        pass_k=4,
        save_every=20,
        control=True,
    ),
    eval=replace(
        defaults.eval,
        base=("bpb",),
        chat=("arithmetic", "multistep", "choice"),
        max_examples=1000,
        batch_size=128,
        max_new_tokens=96,
    ),
)
