"""What quantized weights cost: bits per byte with them and without, on the corpus inside the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from nanochat_jax.config import GPTConfig
from nanochat_jax.data.pretrain import validation_batches
from nanochat_jax.data.shards import shard_files
from nanochat_jax.evals.bpb import bits_per_byte
from nanochat_jax.inference.decoding import Weights, logits_of, read
from nanochat_jax.inference.engine import Engine
from nanochat_jax.loss import token_losses
from nanochat_jax.model import Params
from nanochat_jax.tokenizer import Tokenizer

CORPUS = Path(__file__).parent.parent / "corpus"
ROWS = 4
TOKENS = 4096


losses = jax.jit(token_losses, static_argnums=1)


@functools.partial(jax.jit, static_argnames="cfg")
def token_nats(weights: Weights, inputs_PT: jax.Array, targets_PT: jax.Array, *, cfg: GPTConfig) -> jax.Array:
    """Nats float32 [P, T] of each target, 0 where it is -1."""
    logits_VPT = logits_of(weights, cfg, read(weights, cfg, inputs_PT).hidden_DPT)
    chosen_PT = jnp.take_along_axis(logits_VPT, jnp.maximum(targets_PT, 0)[None], axis=0)[0]
    return jnp.where(targets_PT >= 0, jax.nn.logsumexp(logits_VPT, axis=0) - chosen_PT, 0.0)


def corpus_bpb(nats: Callable[[jax.Array, jax.Array], jax.Array], sequence_len: int, tokenizer: Tokenizer) -> float:
    """Bits per byte of the corpus' validation shard by nats(inputs, targets), TOKENS targets at most."""
    _, file = shard_files(CORPUS)
    batches = validation_batches(
        file, tokenizer, rows=ROWS, sequence_len=sequence_len, packing="stream", eval_tokens=TOKENS
    )
    return bits_per_byte(nats, batches, tokenizer.token_bytes)


def quantization_error(engine: Engine, params: Params, tokenizer: Tokenizer) -> str:
    """One line: bits per byte of the engine's quantized weights and of the parameters that they were made from."""
    exact, rounded = (
        corpus_bpb(nats, engine.cfg.sequence_len, tokenizer)
        for nats in (
            functools.partial(losses, params, engine.cfg),
            functools.partial(token_nats, engine.weights, cfg=engine.cfg),
        )
    )
    return (
        f"int8 weights: {exact:.4f} -> {rounded:.4f} bits per byte ({rounded - exact:+.4f}), up to {TOKENS:,} tokens "
        "of the embedded validation text"
    )
