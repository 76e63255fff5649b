"""A run's model as a folder that Hugging Face's transformers loads, with the same logits.

    python -m nanochat_jax convert to-hf --workdir runs/d12 --out d12-hf

No class of transformers has this architecture, so the model's code goes along: modeling_nanochat_jax.py, in PyTorch,
which this program itself never imports. Weights have karpathy/nanochat's names. Left out: the optimizer's state.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from nanochat_jax.config import GPTConfig
from nanochat_jax.convert import nanochat_name
from nanochat_jax.data.files import write_json
from nanochat_jax.errors import UserError
from nanochat_jax.model import count_params
from nanochat_jax.sharding import by_path
from nanochat_jax.tokenizer import SPLIT_PATTERN, Tokenizer

HERE = Path(__file__).parent
MODELING = "modeling_nanochat_jax"
VOCABULARY = ("wte", "lm_head", "value_embed_")
"""Parameters that have a row for each token and for padding, which is cut off."""
CHAT = """messages = [{"role": "user", "content": "What is 12 + 7?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
CONTINUE = 'ids = tokenizer("The capital of France is", return_tensors="pt")'
ANSWER = """
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))"""


def to_hf(
    params: dict[str, Any],
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    name: str,
    step: int,
    out: Path,
    dtype: str,
    log: Callable[[str], None],
) -> None:
    """Writes the model `name` (RUN/STAGE), weights in `dtype`, into the new folder `out`: whole, or nothing.

    A model that can chat (any but base) gets the chat template, and stops at the end of its answer. UserError where
    `out` exists, cannot be made, or the disk is full.
    """
    if os.path.lexists(out):
        raise UserError(f"--out {out} is there already: name a folder that is not")
    if tokenizer.pattern != SPLIT_PATTERN:
        log(
            f"the tokenizer's own pattern {tokenizer.pattern!r} is read by another engine there (Oniguruma), which may "
            "refuse it or cut texts otherwise: compare the tokens of some texts before you use it"
        )
    stage = name.rpartition("/")[2]
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror}); name another") from None
    try:
        save_file(tensors(params, cfg, dtype), part / "model.safetensors", {"format": "pt"})
        files: dict[str, Any] = {
            "config.json": model_config(cfg, tokenizer, dtype),
            "generation_config.json": generation_config(tokenizer, stage),
            "tokenizer.json": tokenizer_json(tokenizer),
            "tokenizer_config.json": tokenizer_config(cfg, stage),
        }
        for file, value in files.items():
            write_json(part / file, value)
        shutil.copy(HERE / f"{MODELING}.py", part)
        if stage != "base":
            shutil.copy(HERE / "chat_template.jinja", part)
        (part / "README.md").write_text(model_card(cfg, name, step, out), encoding="utf-8")
        shutil.copymode(part / "config.json", part / "model.safetensors")  # which safetensors keeps to its owner
        os.rename(part, out)
    except SafetensorError as error:
        raise UserError(f"{part} cannot be written ({error}): free some space, or name another --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log(f"{name} of step {step}, {count_params(cfg)['total']:,} parameters in {dtype}: {out}")


def tensors(params: dict[str, Any], cfg: GPTConfig, dtype: str) -> dict[str, np.ndarray]:
    """Weights under nanochat's names, matrices [out, in], without the rows that pad the vocabulary."""

    def one(path: str, value: jax.Array) -> np.ndarray:
        value = np.asarray(value).astype(jnp.dtype(dtype))
        value = value.T if path.endswith("kernel") else value
        return np.ascontiguousarray(value[: cfg.vocab_size] if path.startswith(VOCABULARY) else value)

    return {nanochat_name(path): one(path, value) for path, value in by_path(params).items()}


def model_config(cfg: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["NanochatJaxForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.NanochatJaxConfig",
            "AutoModelForCausalLM": f"{MODELING}.NanochatJaxForCausalLM",
        },
        "model_type": "nanochat_jax",
        "dtype": dtype,
        "bos_token_id": tokenizer.bos_id,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.n_embd,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.sequence_len,
        "windows": list(cfg.windows),
        "value_embed_layers": [i for i in range(cfg.n_layer) if cfg.has_value_embedding(i)],
        **{name: getattr(cfg, name) for name in ("rope_base", "qk_scale", "lambdas", "smear", "backout")},
    }


def generation_config(tokenizer: Tokenizer, stage: str) -> dict[str, Any]:
    """generation_config.json: what ends an answer ends it in this program's engine, too."""
    ends = [tokenizer.bos_id] if stage == "base" else [tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.bos_id}


def tokenizer_config(cfg: GPTConfig, stage: str) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>" if stage == "base" else "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": cfg.sequence_len,
        "clean_up_tokenization_spaces": False,
    }


def model_card(cfg: GPTConfig, name: str, step: int, out: Path) -> str:
    """README.md."""
    run, _, stage = name.rpartition("/")
    words = {"name": run, "stage": stage, "step": f"{step:,}", "params": f"{count_params(cfg)['total']:,}"}
    words |= {
        "length": f"{cfg.sequence_len:,}",
        "folder": out.name,
        "use": (CONTINUE if stage == "base" else CHAT) + ANSWER,
    }
    return Template((HERE / "model_card.md").read_text(encoding="utf-8")).substitute(words)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary in the format of Hugging Face's tokenizers: byte-level BPE with the same ids."""
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    rank = {token: i for i, token in enumerate(tokenizer.ranks)}
    merges = [[spelled(part) for part in parts_of(token, rank)] for token in tokenizer.ranks if len(token) > 1]
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for name, i in tokenizer.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled(token): i for token, i in rank.items()},
            "merges": merges,
        },
    }


def parts_of(token: bytes, rank: dict[bytes, int]) -> Sequence[bytes]:
    """The two tokens that `token` was merged from: what the merges before its own make of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [rank.get(a + b, len(rank)) for a, b in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if missing := [part for part in parts if part not in rank]:
        raise UserError(
            f"the token {token!r} is no merge of two others ({missing[0]!r} is none): this is no byte-level BPE"
        )
    return parts


def byte_letters() -> list[str]:
    """A printable letter for each byte, as GPT-2 has them: its own where it has one, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
