"""Every value a run depends on, as frozen dataclasses, and what `depth` implies.

Experiments are files that hold one `config = dataclasses.replace(Config(), ...)`; the command line overrides single
fields (`--base.num-iterations 100`). Nothing here reads files, looks at devices or imports JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, is_dataclass
from typing import Literal

from nanochat_jax.errors import UserError

DEFAULT_ROWS = 32
"""Rows of a step of mid and sft where their total_batch_size is unset."""
STAGES = ("tokenizer", "base", "mid", "sft", "rl")
MODEL_STAGES = ("base", "mid", "sft", "rl")
ARCHITECTURE = ("rope_base", "qk_scale", "value_embeds", "lambdas", "smear", "backout")
"""Fields of ModelConfig that the architecture takes over as they are."""
PACKING = ("packing", "streams", "buffer_docs")
"""Fields of DataConfig that decide which batches come."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model: one dial, `depth`, and the proportions that follow from it."""

    depth: int = 12
    """Number of transformer layers; width, heads, batch size and horizon follow from it."""
    aspect_ratio: int = 64
    """Model width per layer: width = depth * aspect_ratio, rounded up to a multiple of head_dim."""
    head_dim: int = 128
    """Width of one attention head, channels."""
    n_kv_head: int | None = None
    """Key/value heads, a divisor of the query heads; unset: as many as query heads."""
    sequence_len: int = 2048
    """Context length, tokens."""
    window_pattern: str = "SSSL"
    """S (a quarter of the context) or L (all of it) per layer, tiled; the last layer is always L."""
    rope_base: float = 100_000.0
    """Base of the rotary angles; 10,000 in nanochat's release of October 2025."""
    qk_scale: float = 1.2
    """Factor on queries and keys after their norm; 1 in the release of October 2025, which had none of what follows."""
    value_embeds: bool = True
    """Gated value embeddings in every second layer."""
    lambdas: bool = True
    """Learned weights of the residual stream and of the input embedding before each layer."""
    smear: bool = True
    """Mix the previous token's embedding into each position."""
    backout: bool = True
    """Subtract the middle layer's state before the output head."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE training."""

    vocab_size: int = 32768
    """Tokens in the vocabulary, special tokens included."""
    max_chars: int = 2_000_000_000
    """Characters of training text to learn the merges from."""
    doc_cap: int = 10_000
    """Characters of one document that count."""
    specials: tuple[str, ...] = ()
    """Special tokens of your own, such as <|think|>: the assistant's messages have them where they have the name."""
    pattern: str | None = None
    """Regular expression whose matches merges stay inside of; unset: GPT-4's, with numbers cut after two digits."""


@dataclass(frozen=True)
class DataConfig:
    """Where text and tasks come from."""

    source: Literal["embedded", "fineweb-edu", "climbmix"] = "fineweb-edu"
    """Pretraining set: the corpus inside the package, or a set of shards to download."""
    dir: str | None = None
    """Folder of parquet files with a `text` column, used instead of `source`; the last by name is for validation."""
    cache: str = "~/.cache/nanochat_jax"
    """Folder for downloaded shards, task sets and the CORE bundle."""
    num_shards: int = 240
    """Training shards to download, files of about 100 MB; the validation shard comes on top."""
    packing: Literal["bestfit", "stream"] = "bestfit"
    """How documents become rows of T+1 tokens: BOS best fit (large sets) or one stream (small ones)."""
    streams: int = 1
    """Independent document streams dealt out to the processes and over the rows of a batch."""
    buffer_docs: int = 1000
    """Documents kept in the best-fit buffer of a stream."""
    mirror: str | None = None
    """Local copy of the task sets, <org>/<name>/<config>/<split>.parquet; unset: Hugging Face."""
    eval_bundle: str | None = None
    """Folder of the CORE tasks; unset: downloaded."""


@dataclass(frozen=True)
class StageConfig:
    """What all training stages share. Rates are those of width 768 and a batch of 2^19 tokens."""

    num_iterations: int | None = None
    """Optimizer steps; unset: from the horizon (base), one epoch (mid, sft, rl)."""
    device_batch_size: int | Literal["auto"] = 32
    """Rows (rl: samples) per data shard in one microbatch; auto: as many as fit in the device's memory."""
    warmup_steps: int = 40
    """Steps of linear learning-rate warm-up."""
    warmdown_ratio: float = 0.65
    """Share of the steps over which the learning rate falls linearly, at the end."""
    init_lr_frac: float = 1.0
    """Factor on all learning rates."""
    final_lr_frac: float = 0.05
    """Factor on the learning rate at the last step."""
    embedding_lr: float = 0.3
    """AdamW rate of the token embedding; value embeddings take half of it."""
    unembedding_lr: float = 0.008
    """AdamW rate of the output head."""
    matrix_lr: float = 0.02
    """Muon rate of the matrices inside the blocks."""
    scalar_lr: float = 0.5
    """AdamW rate of the x0 lambdas; residual lambdas take a hundredth of it."""
    weight_decay: float = 0.0
    """Muon weight decay; that of base is of the reference batch and horizon, and scaled to this run's."""
    momentum_start: float = 0.85
    """Muon momentum at step 0."""
    momentum_peak: float = 0.95
    """Muon momentum after its warm-up."""
    momentum_end: float = 0.95
    """Muon momentum at the last step, reached linearly over the warm-down."""
    momentum_warmup: int = 300
    """Steps over which the Muon momentum rises from start to peak."""
    eval_every: int = 250
    """Steps between validations (rl: pass@k); 0 or less: only at the end."""
    save_every: int = 1000
    """Steps between checkpoints; 0 or less: only at the end."""
    keep: int = 2
    """Checkpoints kept, the newest ones, besides the one with the best validation."""
    stop_after: int | None = None
    """End the stage early after this many steps, schedules unchanged."""
    init_from: str | None = None
    """WORKDIR/STAGE to take the weights from, instead of the stage before."""
    init_step: int | Literal["best"] | None = None
    """Checkpoint to take them from: a step, or `best`, that of the best validation; unset: the newest."""
    init_optimizer: bool = False
    """Start with the optimizer's moments of where the weights come from as well, instead of fresh ones."""
    sample_tokens: int = 64
    """Length of the samples that a stage writes, tokens."""


@dataclass(frozen=True)
class BaseConfig(StageConfig):
    """Pretraining."""

    total_batch_size: int | None = None
    """Tokens an optimizer step; unset: from the horizon."""
    eval_tokens: int = 80 * 2**19
    """Tokens of validation text per validation, at most."""
    weight_decay: float = 0.28
    momentum_peak: float = 0.97
    momentum_end: float = 0.90
    momentum_warmup: int = 400
    target_param_data_ratio: float = 12.0
    """Training tokens per scaling parameter (block matrices and output head)."""
    target_flops: float | None = None
    """Training compute in FLOPs, instead of the ratio."""
    core_every: int = 0
    """Steps between CORE evaluations; 0: never during training."""
    sample_every: int = 2000
    """Steps between samples of what the model writes, on the console and in samples.md; 0: only at the end."""


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Supervised training on conversations: mid and sft."""

    total_batch_size: int | None = None
    """Tokens an optimizer step; unset: 32 rows."""
    mixture: tuple[str, ...] = ()
    """Sets to learn from, each NAME[:ROWS][*EPOCHS] or FILE.jsonl, where FILE holds one conversation a line."""
    loss_on: Literal["all", "assistant"] = "assistant"
    """Targets: every token, or only what the assistant writes."""
    packing: Literal["bestfit", "pad"] = "bestfit"
    """Whole conversations packed into rows, or one conversation a row."""
    val_rows: int = 256
    """Conversations held out of the mixture for validation, at most a tenth of its different ones."""
    tasks_every: int = 0
    """Steps between evaluations on the tasks of eval.chat, and so of ChatCORE; 0: never during training."""
    tasks_rows: int = 24
    """Questions of each task with written answers in such an evaluation; multiple choice has eval.max-examples."""
    warmup_steps: int = 0


@dataclass(frozen=True)
class RLConfig(StageConfig):
    """Policy gradient on a task with a reward."""

    task: str = "gsm8k"
    """Task that gives questions and rewards."""
    questions_per_step: int = 16
    """Different questions in one step."""
    samples_per_question: int = 16
    """Sampled answers to each question."""
    normalize_over: int = 8
    """Samples of one question whose drawn tokens the objective is averaged over together."""
    max_new_tokens: int = 256
    """Longest answer, tokens."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    top_k: int = 50
    """Tokens considered at each position of a rollout; 0: all."""
    clip: float = 0.0
    """PPO's epsilon: probabilities over the sampler's count from 1 - clip to 1 + clip; 0: no such ratio."""
    updates_per_batch: int = 1
    """Optimizer steps on the answers of one step, each over all of them; more than 1 need `clip`."""
    eval_examples: int = 400
    """Held-out questions for pass@k."""
    pass_k: int = 8
    """Samples per held-out question."""
    control: bool = False
    """Also continue sft for the compute that rl used, as a comparison in the report."""
    device_batch_size: int | Literal["auto"] = 8
    warmup_steps: int = 0
    warmdown_ratio: float = 1.0
    init_lr_frac: float = 0.05
    final_lr_frac: float = 0.0
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    momentum_start: float = 0.95
    eval_every: int = 60
    save_every: int = 60


@dataclass(frozen=True)
class EvalConfig:
    """What is measured after each stage."""

    base: tuple[str, ...] = ("bpb", "core")
    """Evaluations of the base model."""
    chat: tuple[str, ...] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")
    """Evaluations after mid, sft and rl."""
    max_examples: int | None = None
    """Rows of each task; unset: all."""
    batch_size: int = 64
    """Rows evaluated at once."""
    max_new_tokens: int = 512
    """Longest generated answer, tokens."""
    temperature: float = 0.0
    """Of generated answers; 0: greedy."""
    top_k: int = 50
    """Tokens considered at each position of an answer that is drawn; 0: all."""
    num_samples: int = 1
    """Answers to each question, drawn at a temperature above 0; one that is right is enough (pass@k)."""


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    base: BaseConfig = BaseConfig()
    mid: FinetuneConfig = FinetuneConfig(
        mixture=(
            "smoltalk:460000",
            "mmlu_aux:100000",
            "gsm8k:8000",
            "identity*2",
            "simple_spelling:200000",
            "spelling_bee:80000",
        ),
        loss_on="all",
        total_batch_size=2**19,
        warmdown_ratio=0.2,
        final_lr_frac=0.0,
    )
    sft: FinetuneConfig = FinetuneConfig(
        mixture=(
            "arc_easy",
            "arc_challenge",
            "gsm8k",
            "smoltalk:10000",
            "identity:1000",
            "simple_spelling:300",
            "spelling_bee:300",
        ),
        packing="pad",
        device_batch_size=4,
        init_lr_frac=0.02,
        warmdown_ratio=1.0,
        final_lr_frac=0.0,
        momentum_start=0.95,
    )
    rl: RLConfig = RLConfig()
    eval: EvalConfig = EvalConfig()
    mesh: str = "1"
    """Devices: a number (data parallel), or axes such as data=2,fsdp=2,tensor=2."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; auto: bfloat16 on TPUs and on GPUs from Ampere on, else float32."""
    fp8: bool = False
    """Train the layers' products in 8-bit floats: NVIDIA from Ada and Hopper on; a CPU only emulates it."""
    attention: Literal["auto", "reference", "xla_blocked", "cudnn", "pallas", "mosaic"] = "auto"
    """Attention; auto: mosaic on Hopper with CUDA 13, else cudnn on NVIDIA (float32: pallas), xla_blocked elsewhere."""
    # With one for GPUs come the kernels of rotary positions and of the loss. pallas on a CPU is a slow test mode.
    native: Literal["auto", "on", "off"] = "auto"
    """Decode by kernels in C++, made once by the machine's compiler; auto: in float32 on one CPU that has such."""
    remat: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more work."""
    loss_chunk: int | Literal["auto"] = "auto"
    """Positions of a row that go through head and loss at once; 0: all; auto: few on CPU, all elsewhere."""
    device_memory_gb: float | None = None
    """GiB of a device that device-batch-size auto may plan with; unset: nine tenths of what is free there."""
    seed: int = 42
    """Root of all randomness of the run."""
    track: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where training sends its measurements, besides metrics.jsonl; each needs its package, wandb or tensorboardX."""
    unsafe_sandbox: bool = False
    """Run model-written programs without isolation, where the kernel denies it."""
    device_hour_cost: float = 0.0
    """Price of one device for one hour, dollars, for the plan and the report."""


@dataclass(frozen=True)
class GPTConfig:
    """The architecture that `ModelConfig` and a vocabulary imply (hashable, so it can be a static argument of jit)."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    sequence_len: int
    windows: tuple[int, ...]
    """Per layer, how many keys to the left of its own position a query sees."""
    rope_base: float = 100_000.0
    qk_scale: float = 1.2
    value_embeds: bool = True
    lambdas: bool = True
    smear: bool = True
    backout: bool = True
    compute_dtype: str = "float32"
    fp8: bool = False
    """Train the products of layers whose dimensions allow it in 8-bit floats; nothing else computes in them."""
    attention: str = "xla_blocked"
    native: bool | None = False
    """Decode by kernels/native.cc; None: the engine decides."""
    loss_chunk: int = 0
    """Positions of a row in one chunk of the loss over the vocabulary; 0: all at once."""
    remat: bool = False
    """Keep only each block's input for the backward pass and compute the rest again there (arXiv 1604.06174)."""

    @classmethod
    def from_depth(cls, model: ModelConfig, vocab_size: int, **overrides: object) -> GPTConfig:
        """Sizes from one dial. Raises UserError where the proportions do not work out."""
        if model.depth < 1 or model.head_dim < 2 or model.head_dim % 2 or model.sequence_len < 2:
            raise UserError(
                f"--model.depth {model.depth} --model.head-dim {model.head_dim} "
                f"--model.sequence-len {model.sequence_len}: at least 1, even, and at least 2 are needed"
            )
        width = math.ceil(model.depth * model.aspect_ratio / model.head_dim) * model.head_dim
        n_head = width // model.head_dim
        n_kv_head = model.n_kv_head or n_head
        if n_head % n_kv_head:
            raise UserError(
                f"--model.n-kv-head {n_kv_head} does not divide the {n_head} query heads of depth {model.depth}"
            )
        return cls(
            n_layer=model.depth,
            n_embd=width,
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=model.head_dim,
            vocab_size=vocab_size,
            sequence_len=model.sequence_len,
            windows=windows(model.window_pattern, model.depth, model.sequence_len),
            **{name: getattr(model, name) for name in ARCHITECTURE},
            **overrides,
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables: the vocabulary rounded up to a multiple of 64."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def max_positions(self) -> int:
        """Positions the rotary table reaches; a longer sequence is an error."""
        return 10 * self.sequence_len

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, counted so that the last one always has it; none where they are switched off."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


def windows(pattern: str, n_layer: int, sequence_len: int) -> tuple[int, ...]:
    """Left window of each layer in keys: `pattern` tiled, S = a quarter of the context in 128s, the last L."""
    if not pattern or set(pattern.upper()) - {"S", "L"}:
        raise UserError(f"--model.window-pattern {pattern!r}: only the letters S and L, at least one")
    short = math.ceil(sequence_len / 4 / 128) * 128
    sizes = [sequence_len if pattern.upper()[i % len(pattern)] == "L" else short for i in range(n_layer)]
    sizes[-1] = sequence_len
    return tuple(sizes)


COUNT, NOT_NEGATIVE = (1, math.inf), (0, math.inf)
LAYERS, SIZE = (1, 1000), (1, 2**24)
"""Far above any in use: each layer takes milliseconds to trace, and JAX counts in 32 bits."""
RANGES = (
    dict.fromkeys(("aspect_ratio", "head_dim", "n_kv_head", "sequence_len", "vocab_size"), SIZE)
    | dict.fromkeys(("max_chars", "doc_cap", "num_shards", "streams", "buffer_docs"), COUNT)
    | dict.fromkeys(("num_iterations", "total_batch_size", "device_batch_size", "batch_size"), COUNT)
    | dict.fromkeys(("keep", "stop_after", "eval_tokens", "sample_tokens", "max_new_tokens"), COUNT)
    | dict.fromkeys(("questions_per_step", "samples_per_question", "num_samples", "pass_k"), (1, 2**16))
    | dict.fromkeys(("normalize_over", "eval_examples", "max_examples", "tasks_rows"), COUNT)
    | dict.fromkeys(("warmup_steps", "init_lr_frac", "final_lr_frac", "val_rows", "loss_chunk"), NOT_NEGATIVE)
    | dict.fromkeys(("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay"), NOT_NEGATIVE)
    | dict.fromkeys(("momentum_warmup", "init_step"), NOT_NEGATIVE)
    | dict.fromkeys(("momentum_start", "momentum_peak", "momentum_end"), (0, 0.9999))
    | {"depth": LAYERS, "warmdown_ratio": (0, 1), "seed": (0, 2**31 - 1), "device_memory_gb": (0, 2**20)}
    | {"temperature": (0, 100), "top_k": (0, 2**31 - 1)}
)
"""The least and the most that a field can be, in whatever section it is, where it is a number."""
ABOVE_ZERO = ("target_param_data_ratio", "target_flops", "device_memory_gb", "rope_base", "qk_scale")


def check_ranges(config: Config) -> None:
    """UserError naming the first value that is no number that can be computed with, or one that means nothing."""
    sections = {f"{name}.": value for name, value in vars(config).items() if is_dataclass(value)}
    for prefix, section in ({"": config} | sections).items():
        for name, value in vars(section).items():
            if not isinstance(value, int | float):
                continue
            option = f"--{prefix}{name.replace('_', '-')} {value}"
            if not math.isfinite(value):
                raise UserError(f"{option} is no number that can be computed with")
            least, most = RANGES.get(name, (-math.inf, math.inf))
            if not least <= value <= most:
                needed = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise UserError(f"{option}: {needed} is needed")
            if name in ABOVE_ZERO and value <= 0:
                raise UserError(f"{option}: more than 0 is needed")
    if config.base.init_from is None and (config.base.init_optimizer or config.base.init_step is not None):
        raise UserError("--base.init-optimizer and --base.init-step need --base.init-from: whose?")
    steps, flops = config.base.num_iterations, config.base.target_flops
    if steps is not None and flops is not None:
        raise UserError(
            f"--base.num-iterations {steps} and --base.target-flops {flops:g} both say how long: set one to None"
        )
    if config.eval.num_samples > 1 and config.eval.temperature <= 0:
        raise UserError(
            f"--eval.num-samples {config.eval.num_samples} greedy answers are all the same: give --eval.temperature"
        )
    GPTConfig.from_depth(config.model, config.tokenizer.vocab_size)  # which refuses shapes that no model can have
