"""Takes over what karpathy/nanochat (PyTorch) has trained: checkpoint and tokenizer into a workdir of ours.

    python -m nanochat_jax convert from-nanochat --checkpoint ~/.cache/nanochat/base_checkpoints/d12 --workdir runs/d12

Two architectures are known: that of 14 March 2026 and later, and that of the first release, October 2025, which stood
until 11 January 2026. Which one a file is of shows in its keys and shapes. The versions between them changed windows,
gates and scales under the same names, so that nothing in the file tells them apart; they are refused. Left out: the
optimizer's state, so that --sft.init-optimizer is refused after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from nanochat_jax import run
from nanochat_jax.checkpoint import Checkpointer
from nanochat_jax.config import MODEL_STAGES, Config, GPTConfig, ModelConfig
from nanochat_jax.data.files import read_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.model import count_params, param_shapes
from nanochat_jax.sharding import by_path, path_of
from nanochat_jax.tokenizer import FILE_NAME, SPECIALS, Tokenizer
from nanochat_jax.torch_file import read_state_dict
from nanochat_jax.unpickle import unpickle

NAMES = (  # ours -> nanochat's; the first that matches
    (r"wte/embedding", "transformer.wte.weight"),
    (r"value_embed_(\d+)/embedding", r"value_embeds.\1.weight"),
    (r"h_(\d+)/attn/ve_gate/kernel", r"transformer.h.\1.attn.ve_gate.weight"),
    (r"h_(\d+)/(attn|mlp)/(\w+)/kernel", r"transformer.h.\1.\2.c_\3.weight"),
    (r"(lm_head|smear_gate)/kernel", r"\1.weight"),
    (r"(resid|x0)_lambda", r"\1_lambdas"),
    (r"(smear|backout)_lambda", r"\1_lambda"),
)
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
FIRST_KEYS = r"lm_head\.weight|transformer\.(wte|h\.\d+\.(attn\.c_(q|k|v|proj)|mlp\.c_(fc|proj)))\.weight"
"""The keys of the first release, all of which later ones have too."""
SINCE_MARCH = ("smear_gate.weight", "smear_lambda", "backout_lambda")
FIRST = {"rope_base": 10_000.0, "qk_scale": 1.0} | dict.fromkeys(("value_embeds", "lambdas", "smear", "backout"), False)


@dataclass(frozen=True)
class NanochatCheckpoint:
    """One checkpoint of nanochat."""

    path: Path
    step: int
    meta: dict[str, Any]
    sizes: dict[str, Any]
    """What meta says about the model."""
    tensors: dict[str, np.ndarray]


def from_nanochat(
    config: Config,
    workdir: Path,
    checkpoint: Path,
    log: Callable[[str], None],
    step: int | None = None,
    tokenizer: Path | None = None,
    stage: str | None = None,
) -> None:
    """Writes config.json, the tokenizer and the model of `checkpoint` into `workdir`, as the finished stage `stage`.

    `config` gives all but the model. `step` is the newest, `tokenizer` nanochat's own folder beside the checkpoints,
    and `stage` that of the folder's name, unless given. Everything is read and checked before anything is written.
    """
    found = open_checkpoint(checkpoint, step)
    folder = found.path.resolve().parent
    # nanochat's folders are base_checkpoints, mid_checkpoints, chatsft_checkpoints, chatrl_checkpoints.
    named = folder.parent.name.removeprefix("chat").removesuffix("_checkpoints")
    stage = stage or (named if named in MODEL_STAGES else "base")
    vocabulary = read_tokenizer(tokenizer or folder.parents[1] / "tokenizer")
    if vocabulary.vocab_size != found.sizes["vocab_size"]:
        raise UserError(
            f"{found.path} is of a model of {found.sizes['vocab_size']} tokens, the tokenizer has "
            f"{vocabulary.vocab_size}: name the one it was trained with, --tokenizer DIR"
        )
    model = model_config(found)
    saved = (workdir / stage).glob("checkpoints/step_*")
    if run.finished(workdir, stage) or not all(map(_left_by_conversion, saved)):
        raise UserError(f"{workdir / stage} has a model already: use another --workdir, or another --stage")
    there = (workdir / "tokenizer" / FILE_NAME).exists() and Tokenizer.load(workdir / "tokenizer")
    if there and there.fingerprint() != vocabulary.fingerprint():
        raise UserError(f"{workdir} has another tokenizer than this checkpoint: use another --workdir")
    cfg = GPTConfig.from_depth(model, vocabulary.vocab_size)
    params = converted(found, cfg)
    found_there = replace(config.tokenizer, vocab_size=vocabulary.vocab_size, specials=vocabulary.own_specials)
    run.open_run(replace(config, model=model, tokenizer=found_there), workdir, log=log)
    now = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "converted_from": str(found.path)}
    if not run.finished(workdir, "tokenizer"):
        vocabulary.save(workdir / "tokenizer")
        facts = {"vocab_size": vocabulary.vocab_size, "fingerprint": vocabulary.fingerprint()}
        write_json(workdir / "tokenizer" / "done.json", {"stage": "tokenizer"} | facts | now)
    checkpoints = Checkpointer(workdir / stage / "checkpoints", keep=1)
    checkpoints.save(found.step, {"params": params}, {"nanochat": found.meta})
    checkpoints.wait()
    done = {"stage": stage, "steps": found.step, "params": count_params(cfg)["total"], "nanochat": found.meta}
    write_json(workdir / stage / "done.json", done | now)
    log(f"{found.path}: {count_params(cfg)['total']:,} parameters are now the {stage} model of {workdir}")


def open_checkpoint(folder: Path, step: int | None) -> NanochatCheckpoint:
    """The checkpoint of `step`, or the newest, in a folder such as base_checkpoints/d12. UserError where there is none
    or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder}: not a folder; name the one that holds model_NNNNNN.pt")
    steps = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", path.name))}
    if not steps:
        below = sorted({path.parent.name for path in folder.glob("*/model_*.pt")})
        hint = f"; there is in {', '.join(below)}: name one of these" if below else ""
        raise UserError(f"--checkpoint {folder}: there is no model_NNNNNN.pt in it{hint}")
    step = max(steps) if step is None else step
    if step not in steps:
        raise UserError(f"--step {step}: {folder} has {', '.join(map(str, sorted(steps)))}")
    meta_path = folder / steps[step].name.replace("model_", "meta_").replace(".pt", ".json")
    try:
        meta = read_json(meta_path)
        sizes = meta["model_config"]
        if wrong := [n for n in SIZES if type(sizes.get(n)) is not int or sizes[n] < 1]:
            raise ValueError(f"{wrong[0]} is {sizes.get(wrong[0])!r}")
        if unknown := sizes.keys() - {*SIZES, "window_pattern"}:
            raise ValueError(f"{min(unknown)} in model_config is not known")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{meta_path} is no description of a nanochat model ({error})") from None
    tensors = read_state_dict(steps[step])
    # torch.compile leaves a prefix.
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    return NanochatCheckpoint(steps[step], step, meta, sizes, tensors)


def model_config(found: NanochatCheckpoint) -> ModelConfig:
    """The architecture of a checkpoint in our terms. UserError where its version or its proportions are not known."""
    sizes, pattern = found.sizes, str(found.sizes.get("window_pattern", "L"))
    newer = sorted(name for name in found.tensors if not re.fullmatch(FIRST_KEYS, name))
    first = not newer and not pattern.upper().strip("L")
    if not first and not any(name in found.tensors for name in SINCE_MARCH):
        raise UserError(
            f"{found.path} is neither of nanochat's first release (October 2025) nor of March 2026 or later: it has "
            f"{_some(newer) if newer else f'window_pattern {pattern}'}, but no {SINCE_MARCH[0]}; versions between "
            "differ in windows, gates and scales that the file does not show; only the nanochat that trained it runs it"
        )
    head_dim, left = divmod(sizes["n_embd"], sizes["n_head"])
    # Not stored in all versions; any that gives this width, rounded up to whole heads, gives this model.
    aspect_ratio = sizes["n_embd"] // sizes["n_layer"]
    if left or -(-sizes["n_layer"] * aspect_ratio // head_dim) != sizes["n_head"]:
        raise UserError(
            f"{found.path}: width {sizes['n_embd']} in {sizes['n_head']} heads and {sizes['n_layer']} layers is not "
            "layers x an aspect ratio, rounded up to whole heads, as this program sizes its models"
        )
    return ModelConfig(
        depth=sizes["n_layer"],
        aspect_ratio=aspect_ratio,
        head_dim=head_dim,
        n_kv_head=None if sizes["n_kv_head"] == sizes["n_head"] else sizes["n_kv_head"],
        sequence_len=sizes["sequence_len"],
        window_pattern=pattern,
        **(FIRST if first else {}),
    )


def converted(found: NanochatCheckpoint, cfg: GPTConfig) -> dict[str, Any]:
    """The parameters as our tree of NumPy arrays: float32, but bfloat16 embeddings stay so.

    UserError names a key that is missing, left over, or of another shape than `cfg` implies.
    """
    shapes = param_shapes(cfg)
    names = {path: nanochat_name(path) for path in by_path(shapes)}
    if missing := sorted(set(names.values()) - found.tensors.keys()):
        raise UserError(f"{found.path} lacks {_some(missing)}, which a model of its meta file has")
    if left := sorted(found.tensors.keys() - set(names.values())):
        raise UserError(f"{found.path} has {_some(left)}, which no version of nanochat known here has in this model")

    def one(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = path_of(key_path)
        values = found.tensors.pop(names[path])  # so that no tensor is in memory twice
        shape = leaf.shape[::-1] if path.endswith("kernel") else leaf.shape
        vocabulary = path.endswith("embedding") or path.startswith("lm_head")
        # The first release did not pad the vocabulary.
        if values.shape != shape and not (vocabulary and values.shape == (cfg.vocab_size, *shape[1:])):
            raise UserError(f"{found.path}: {names[path]} has shape {values.shape}, the model of its meta file {shape}")
        if not (path.endswith("embedding") and values.dtype == ml_dtypes.bfloat16):
            values = values.astype(np.float32, copy=False)
        if values.shape != shape:
            values = np.pad(values, [(0, shape[0] - values.shape[0]), (0, 0)])
        return np.ascontiguousarray(values.T) if path.endswith("kernel") else values

    return jax.tree_util.tree_map_with_path(one, shapes)


def nanochat_name(path: str) -> str:
    """What nanochat calls our parameter at `path`."""
    return next(m.expand(name) for pattern, name in NAMES if (m := re.fullmatch(pattern, path)))


def read_tokenizer(path: Path) -> Tokenizer:
    """Our tokenizer from nanochat's `tokenizer.pkl`, a pickled tiktoken.Encoding, in the folder `path` or at it.

    UserError where it is missing, holds anything else, or its ids are not the ranks and then the special tokens.
    """
    path = path / "tokenizer.pkl" if path.is_dir() else path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"no tokenizer at {path} ({error.strerror}); name its folder with --tokenizer DIR") from None

    class Encoding:
        fields: object = None

        def __setstate__(self, state: object) -> None:
            self.fields = state

    encoding = unpickle(data, {"tiktoken.core.Encoding": Encoding}, path)
    fields = encoding.fields if isinstance(encoding, Encoding) else None
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold the vocabulary of a tiktoken.Encoding")
    try:
        ranks, specials = fields["mergeable_ranks"], fields["special_tokens"]
        if sorted(ranks.values()) + sorted(specials.values()) != list(range(len(ranks) + len(specials))):
            raise ValueError("the ids are not the ranks from 0 on, then the special tokens, without a gap")
        if absent := [name for name in SPECIALS if name not in specials]:
            raise ValueError(f"the special token {absent[0]} is missing")
        return Tokenizer(sorted(ranks, key=ranks.get), fields["pat_str"], sorted(specials, key=specials.get))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of nanochat ({error})") from None


def _left_by_conversion(path: Path) -> bool:
    """Whether the checkpoint at `path` is of a conversion, not of training; the next one may replace it."""
    try:
        return set(read_json(path / "meta.json")) == {"nanochat"}
    except (OSError, ValueError, TypeError):
        return False


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
