"""`--plan`: what a run will take, worked out from its configuration alone; nothing is downloaded, compiled or trained.

Parameters, FLOPs, steps and tokens of base are exact. The rest is an estimate that says what it assumes: lengths of
conversations, memory of activations, speed of the hardware. Evaluation, downloads and tokenizer training are left out.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import resolve
from nanochat_jax.config import Config, DataConfig, FinetuneConfig, GPTConfig, RLConfig
from nanochat_jax.errors import UserError
from nanochat_jax.memory import RESERVE, device_limit, loss_chunk
from nanochat_jax.metrics import duration, gib, peak_flops, si
from nanochat_jax.model import count_params, flops_per_token, scaling_params
from nanochat_jax.optim import horizon
from nanochat_jax.sharding import make_mesh, parse_mesh
from nanochat_jax.tasks import load, parse

ASSUMED_MFU = 0.4
CPU_CORE_FLOPS = 35e9
"""Float32 FLOP/s that training gets out of one CPU core."""
ROLLOUT_EFFICIENCY = 0.1
"""Speed of token-by-token decoding in FLOP/s, relative to training."""
ACTIVATION_BYTES = {"float32": 106, "bfloat16": 71}
"""Bytes for the backward pass per token, layer and unit of width, by XLA's memory analysis on a CPU; without the
scores of attention."""
SCORE_BYTES = {"float32": 11, "bfloat16": 9}
"""The same per head and visible key, where attention keeps its scores."""
LOGIT_BYTES = {"float32": 15, "bfloat16": 11}
"""The same per logit that is there at once."""
FLASH = ("cudnn", "pallas", "pallas_interpreted")
"""Attention that keeps no scores."""
REMAT_VALUES = 3.5
"""Values per token, layer and unit of width that rematerialisation leaves kept."""
H100_BYTES = 80e9
SHARD_BYTES = 100e6
# Training rows of the public sets (GSM8K without the 400 held out), and tokens a conversation; other sets are made by
# code and counted, at the default length.
PUBLIC_ROWS = {"smoltalk": 460_341, "mmlu_aux": 99_842, "gsm8k": 7_073, "arc_easy": 2_251, "arc_challenge": 1_119}
CONVERSATION_TOKENS = {"smoltalk": 800, "mmlu_aux": 200, "gsm8k": 220, "arc_easy": 90, "arc_challenge": 100}
DEFAULT_CONVERSATION_TOKENS = 60


def plan(config: Config) -> dict[str, Any]:
    """{"model", "stages", "total", "memory", "disk", "assumptions"}: counts, bytes, FLOPs, hours and dollars.

    Hours and dollars are per kind of hardware: what JAX sees here, and H100s where that is no accelerator (alone where
    the mesh has several devices). Raises UserError where the configuration cannot be.
    """
    devices = math.prod(parse_mesh(config.mesh).values())
    rates = _rates(devices)
    platform = jax.default_backend()
    if platform == "cpu" and not next(iter(rates)).endswith("CPU cores"):
        platform = "gpu"  # of another machine
    cfg = _architecture(config, platform)
    counts, per_token = count_params(cfg), flops_per_token(cfg)
    base = horizon(config, cfg)
    stages = [_stage("base", _stopped(base.steps, config.base.stop_after), base.batch_tokens, per_token)]
    stages += [_finetune(name, getattr(config, name), config, cfg, per_token) for name in ("mid", "sft")]
    rows, memory = _memory(config, cfg, counts, {stage["stage"]: stage["batch_tokens"] for stage in stages}, platform)
    stages.append(_rl(config.rl, config, cfg, per_token))
    if config.rl.control:
        # sft continued for the compute that rl used.
        stages.append(dict.fromkeys(("steps", "tokens"), 0) | {"stage": "sft_continued", "flops": stages[-1]["flops"]})
    for stage in stages:
        rollouts = stage.get("rollout_flops", 0)
        work = (stage["flops"] - rollouts) * (4 / 3 if config.remat else 1) + rollouts / ROLLOUT_EFFICIENCY
        stage["hours"] = {name: work / rate / 3600 for name, rate in rates.items()}
        stage["dollars"] = {name: hours * devices * config.device_hour_cost for name, hours in stage["hours"].items()}
    total = {key: sum(stage[key] for stage in stages) for key in ("tokens", "flops")}
    for key in ("hours", "dollars"):
        total[key] = {name: sum(stage[key][name] for stage in stages) for name in rates}
    return {
        "model": counts | {"scaling": scaling_params(cfg), "flops_per_token": per_token, "devices": devices},
        "stages": stages,
        "total": total,
        "rows": rows,
        "memory": memory,
        "disk": _disk(config, cfg, counts),
        "assumptions": _assumptions(rates, cfg, _attention(config, cfg, platform)),
    }


def format_plan(figures: dict[str, Any]) -> str:
    """The plan as text."""
    model, total = figures["model"], figures["total"]
    lines = ["Model"]
    groups = ("wte", "value_embeds", "lm_head", "blocks", "scalars", "total", "scaling")
    lines += _aligned([(f"{name.replace('_', ' ')} parameters", f"{model[name]:,}") for name in groups])
    lines += _aligned(
        [("training FLOPs per token", f"{model['flops_per_token']:,}"), ("devices", str(model["devices"]))]
    )
    hardware = list(total["hours"])
    header = ["stage", "steps", "tokens", "FLOPs", *(f"time on {name}" for name in hardware)]
    priced = any(total["dollars"].values())
    header += [f"dollars on {name}" for name in hardware if priced]
    rows = [header]
    for stage in [*figures["stages"], {"stage": "total", "steps": 0} | total]:
        row = [
            stage["stage"],
            f"{stage['steps']:,}" if stage["steps"] else "-",
            si(stage["tokens"]) if stage["tokens"] else "-",
        ]
        row += [f"{stage['flops']:.3g}", *(_hours(stage["hours"][name]) for name in hardware)]
        rows.append(row + [f"{stage['dollars'][name]:,.2f}" for name in hardware if priced])
    lines += ["", "Stages", *_aligned(rows)]
    rows = ", ".join(f"{stage} {count}" for stage, count in figures["rows"].items())
    for title, key in (
        (f"Memory per device (estimate; rows a microbatch: {rows})", "memory"),
        ("Disk (estimate)", "disk"),
    ):
        lines += ["", title, *_aligned([(name.replace("_", " "), gib(size)) for name, size in figures[key].items()])]
    return "\n".join([*lines, "", "Assumptions", *(f"  - {text}" for text in figures["assumptions"])])


def _hours(hours: float) -> str:
    return f"{hours / 24:,.0f} days" if hours > 48 else duration(3600 * hours)


def _aligned(rows: list) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(["  " + row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _rates(devices: int) -> dict[str, float]:
    """Kind of hardware -> FLOP/s that training is assumed to get out of all of it."""
    device, cores = jax.devices()[0], os.cpu_count() or 1
    peak = peak_flops(device)
    if peak is not None:
        return {f"{devices} x {device.device_kind}": devices * ASSUMED_MFU * peak}
    here = {f"{cores} CPU cores": cores * CPU_CORE_FLOPS} if device.platform == "cpu" and devices == 1 else {}
    return here | {f"{devices} x H100": devices * ASSUMED_MFU * 989e12}


def _stopped(steps: int, stop_after: int | None) -> int:
    return steps if stop_after is None else min(steps, stop_after)


def _stage(name: str, steps: int, batch_tokens: int, per_token: int) -> dict[str, Any]:
    tokens = steps * batch_tokens
    flops = float(tokens * per_token)
    return {"stage": name, "steps": steps, "batch_tokens": batch_tokens, "tokens": tokens, "flops": flops}


def _finetune(name: str, stage: FinetuneConfig, config: Config, cfg: GPTConfig, per_token: int) -> dict[str, Any]:
    batch_tokens = stage.total_batch_size or 32 * cfg.sequence_len
    steps = stage.num_iterations
    if steps is None:
        sizes = [_mixture_entry(spec, config.data, config.seed, cfg.sequence_len) for spec in stage.mixture]
        conversations, tokens = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        rows = conversations if stage.packing == "pad" else tokens / cfg.sequence_len
        held_out = min(stage.val_rows, conversations // 10) / max(conversations, 1)
        steps = max(1, int(rows * (1 - held_out) * cfg.sequence_len // batch_tokens)) if conversations else 0
    return _stage(name, _stopped(steps, stage.stop_after), batch_tokens, per_token)


def _mixture_entry(spec: str, data: DataConfig, seed: int, sequence_len: int) -> tuple[int, int]:
    """(conversations, tokens) of one entry of a mixture, without loading a public set."""
    name, rows, epochs = parse(spec)
    length = CONVERSATION_TOKENS.get(name, DEFAULT_CONVERSATION_TOKENS)
    if name.endswith(".jsonl"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"mixture entry {spec!r}: there is no file {path}")
        with path.open("rb") as file:
            there = sum(1 for line in file if line.strip())
        length = max(1, path.stat().st_size // 4 // max(there, 1))
    else:
        there = PUBLIC_ROWS[name] if name in PUBLIC_ROWS else len(load(name, "train", data, seed))
    count = (there if rows is None else min(rows, there)) * epochs
    return count, count * min(length, sequence_len)


def _rl(rl: RLConfig, config: Config, cfg: GPTConfig, per_token: int) -> dict[str, Any]:
    """Every answer as long as allowed, so an upper bound: answers are sampled, then trained on with their questions."""
    steps = rl.num_iterations
    if steps is None:
        steps = _mixture_entry(rl.task, config.data, config.seed, cfg.sequence_len)[0] // rl.questions_per_step
    question = CONVERSATION_TOKENS.get(rl.task, DEFAULT_CONVERSATION_TOKENS)
    samples = rl.questions_per_step * rl.samples_per_question
    stage = _stage("rl", _stopped(steps, rl.stop_after), samples * (question + rl.max_new_tokens), per_token)
    # A forward pass is a third of the training FLOPs.
    rollouts = stage["steps"] * samples * (rl.max_new_tokens + question / rl.samples_per_question) * per_token / 3
    return stage | {"flops": stage["flops"] + rollouts, "rollout_flops": rollouts}


def _architecture(config: Config, platform: str) -> GPTConfig:
    """The model in the precision of `platform`, with the attention that can be traced everywhere."""
    automatic = "float32" if platform == "cpu" else "bfloat16"
    dtype = automatic if config.compute_dtype == "auto" else config.compute_dtype
    resolved = {"compute_dtype": dtype, "remat": config.remat}
    return GPTConfig.from_depth(config.model, config.tokenizer.vocab_size, **resolved)


def _attention(config: Config, cfg: GPTConfig, platform: str) -> str:
    """The implementation that is used on `platform`. UserError where it cannot run."""
    try:
        return resolve(config.attention, platform, cfg.compute_dtype)
    except ValueError as error:
        raise UserError(str(error)) from None


def _memory(
    config: Config, cfg: GPTConfig, counts: dict[str, int], batch_tokens: dict[str, int], platform: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Rows of a microbatch of each supervised stage, and the bytes on one device in the one that takes most."""
    axes = parse_mesh(config.mesh)
    limit, sizes, rows = None, {}, {}
    for name, tokens in batch_tokens.items():
        here = max(1, tokens // cfg.sequence_len // (axes["data"] * axes["fsdp"]))
        wanted = getattr(config, name).device_batch_size
        if wanted == "auto":
            limit = limit or _limit(config, platform)
            fits = [n for n in range(1, here + 1) if here % n == 0]
            fits = [n for n in fits if step_memory(config, cfg, counts, n, platform)["total"] <= limit]
            wanted = max(fits, default=1)
        rows[name] = min(wanted, here)
        sizes[name] = step_memory(config, cfg, counts, rows[name], platform)
    return rows, max(sizes.values(), key=lambda memory: memory["total"])


def _limit(config: Config, platform: str) -> float:
    """Bytes that `auto` can plan with: as stated, else what is free here, or on H100s where those are planned with."""
    if config.device_memory_gb is None and platform != jax.default_backend():
        return (1 - RESERVE) * H100_BYTES
    return device_limit(config, make_mesh(config.mesh if platform == jax.default_backend() else "1"))


def step_memory(config: Config, cfg: GPTConfig, counts: dict[str, int], rows: int, platform: str) -> dict[str, float]:
    """Bytes that a step with microbatches of `rows` rows takes on a device, by what they are for; an estimate."""
    axes = parse_mesh(config.mesh)
    parameter_parts, all_parts = axes["fsdp"] * axes["tensor"], math.prod(axes.values())
    dtype = cfg.compute_dtype
    low = jnp.dtype(dtype).itemsize
    embedding = (counts["wte"] + counts["value_embeds"]) * low
    blocks, rest = 4 * counts["blocks"], 4 * (counts["lm_head"] + counts["scalars"])
    tokens = rows * cfg.sequence_len / axes["tensor"]
    chunk = loss_chunk(config, rows, platform)
    head_tokens = rows * min(chunk or cfg.sequence_len, cfg.sequence_len) / axes["tensor"]
    logits = LOGIT_BYTES[dtype] * head_tokens * cfg.padded_vocab_size
    layers = [tokens * ACTIVATION_BYTES[dtype] * cfg.n_embd] * cfg.n_layer
    if _attention(config, cfg, platform) not in FLASH:
        # A window's mean number of visible keys, and half a block of queries.
        keys = [window - window**2 / 2 / cfg.sequence_len + 64 for window in cfg.windows]
        layers = [
            size + tokens * SCORE_BYTES[dtype] * cfg.n_head * seen for size, seen in zip(layers, keys, strict=True)
        ]
    activations = sum(layers)
    if cfg.remat:
        # One layer's activations are there again when the logits are not any more.
        activations = REMAT_VALUES * low * tokens * cfg.n_embd * cfg.n_layer + max(0.0, max(layers) - logits)
    # Two moments for AdamW, one for Muon; its second moments are vectors. Gradients are float32: the step's sum and
    # a microbatch's, or in the update what that works on.
    memory = {
        "weights": (embedding + blocks + rest) / parameter_parts,
        "gradients": 2 * 4 * counts["total"] / parameter_parts,
        "optimizer": (2 * embedding + blocks + 2 * rest) / all_parts,
        "activations": activations,
        "logits": logits,
    }
    return memory | {"total": sum(memory.values())}


def _disk(config: Config, cfg: GPTConfig, counts: dict[str, int]) -> dict[str, float]:
    """Bytes of shards to download and of the checkpoints of all stages."""
    downloads = config.data.dir is None and config.data.source != "embedded"
    low = jnp.dtype(cfg.compute_dtype).itemsize
    embedding = (counts["wte"] + counts["value_embeds"]) * low
    checkpoint = 3 * embedding + 2 * 4 * counts["blocks"] + 3 * 4 * counts["lm_head"]
    kept = sum(stage.keep + 1 for stage in (config.base, config.mid, config.sft, config.rl))
    disk = {"shards": (config.data.num_shards + 1) * SHARD_BYTES * downloads, "checkpoints": float(kept * checkpoint)}
    return disk | {"total": sum(disk.values())}


def _assumptions(rates: dict[str, float], cfg: GPTConfig, attention: str) -> list[str]:
    speeds = ", ".join(f"{name}: {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    lengths = ", ".join(f"{name} {length}" for name, length in CONVERSATION_TOKENS.items())
    return [
        f"training speed: {speeds}",
        f"from {ASSUMED_MFU:.0%} MFU on accelerators and {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s a CPU core",
        f"tokens a conversation: {lengths}, others {DEFAULT_CONVERSATION_TOKENS}; a file's bytes / 4",
        f"rl: answers as long as allowed; sampling runs at {ROLLOUT_EFFICIENCY:.0%} of the speed of training",
        f"activations, as XLA keeps them on a CPU: {ACTIVATION_BYTES[cfg.compute_dtype]} bytes a token, layer and unit "
        f"of width, with remat {REMAT_VALUES * jnp.dtype(cfg.compute_dtype).itemsize:.0f} and a third more work",
        f"attention {attention} {'keeps no scores' if attention in FLASH else 'keeps its scores'}",
        f"a shard has {SHARD_BYTES / 1e6:.0f} MB",
        "not counted: evaluation, downloads, tokenizer training, compilation",
    ]
