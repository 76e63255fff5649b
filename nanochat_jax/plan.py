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

from nanochat_jax.config import Config, DataConfig, FinetuneConfig, GPTConfig, RLConfig
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import duration, gib, peak_flops, si
from nanochat_jax.model import count_params, flops_per_token, scaling_params
from nanochat_jax.optim import horizon
from nanochat_jax.sharding import parse_mesh
from nanochat_jax.tasks import load, parse

ASSUMED_MFU = 0.4
CPU_CORE_FLOPS = 35e9
"""Float32 FLOP/s that training gets out of one CPU core."""
ROLLOUT_EFFICIENCY = 0.1
"""Speed of token-by-token decoding in FLOP/s, relative to training."""
ACTIVATION_UNITS = {"float32": 30, "bfloat16": 20}
"""Values kept for the backward pass per token, layer and unit of width, by XLA's memory analysis on a CPU; float32
goes with attention that keeps its scores."""
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
    automatic = "float32" if next(iter(rates)).endswith("CPU cores") else "bfloat16"
    dtype = automatic if config.compute_dtype == "auto" else config.compute_dtype
    cfg = GPTConfig.from_depth(config.model, config.tokenizer.vocab_size, compute_dtype=dtype)
    counts, per_token = count_params(cfg), flops_per_token(cfg)
    base = horizon(config, cfg)
    stages = [_stage("base", _stopped(base.steps, config.base.stop_after), base.batch_tokens, per_token)]
    stages += [_finetune(name, getattr(config, name), config, cfg, per_token) for name in ("mid", "sft")]
    stages.append(_rl(config.rl, config, cfg, per_token))
    if config.rl.control:
        # sft continued for the compute that rl used.
        stages.append(dict.fromkeys(("steps", "tokens"), 0) | {"stage": "sft_continued", "flops": stages[-1]["flops"]})
    for stage in stages:
        work = stage["flops"] + stage.get("rollout_flops", 0) * (1 / ROLLOUT_EFFICIENCY - 1)
        stage["hours"] = {name: work / rate / 3600 for name, rate in rates.items()}
        stage["dollars"] = {name: hours * devices * config.device_hour_cost for name, hours in stage["hours"].items()}
    total = {key: sum(stage[key] for stage in stages) for key in ("tokens", "flops")}
    for key in ("hours", "dollars"):
        total[key] = {name: sum(stage[key][name] for stage in stages) for name in rates}
    return {
        "model": counts | {"scaling": scaling_params(cfg), "flops_per_token": per_token, "devices": devices},
        "stages": stages,
        "total": total,
        "memory": _memory(config, cfg, counts),
        "disk": _disk(config, cfg, counts),
        "assumptions": _assumptions(rates),
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
    for title, key in (("Memory per device (estimate)", "memory"), ("Disk (estimate)", "disk")):
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
    return {"stage": name, "steps": steps, "tokens": tokens, "flops": float(tokens * per_token)}


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


def _memory(config: Config, cfg: GPTConfig, counts: dict[str, int]) -> dict[str, float]:
    """Bytes on one device in the largest supervised stage."""
    axes = parse_mesh(config.mesh)
    parameter_parts, all_parts = axes["fsdp"] * axes["tensor"], math.prod(axes.values())
    low = jnp.dtype(cfg.compute_dtype).itemsize
    embedding = (counts["wte"] + counts["value_embeds"]) * low
    blocks, rest = 4 * counts["blocks"], 4 * (counts["lm_head"] + counts["scalars"])
    rows = max(stage.device_batch_size for stage in (config.base, config.mid, config.sft))
    tokens = rows * cfg.sequence_len / axes["tensor"]
    # Two moments for AdamW, one for Muon; its second moments are vectors. Gradients are added up in float32.
    memory = {
        "weights": (embedding + blocks + rest) / parameter_parts,
        "gradients": 4 * counts["total"] / parameter_parts,
        "optimizer": (2 * embedding + blocks + 2 * rest) / all_parts,
        "activations": ACTIVATION_UNITS[cfg.compute_dtype] * tokens * cfg.n_embd * cfg.n_layer * low,
        "logits": 2 * 4 * (tokens if low == 2 else 1024) * cfg.padded_vocab_size,
    }
    return memory | {"total": sum(memory.values())}


def _disk(config: Config, cfg: GPTConfig, counts: dict[str, int]) -> dict[str, float]:
    """Bytes of shards to download and of the checkpoints of all stages."""
    downloads = config.data.dir is None and config.data.source != "embedded"
    low = jnp.dtype(cfg.compute_dtype).itemsize
    embedding = (counts["wte"] + counts["value_embeds"]) * low
    checkpoint = 3 * embedding + 2 * 4 * counts["blocks"] + 3 * 4 * counts["lm_head"]
    kept = sum(stage.keep for stage in (config.base, config.mid, config.sft, config.rl))
    disk = {"shards": (config.data.num_shards + 1) * SHARD_BYTES * downloads, "checkpoints": float(kept * checkpoint)}
    return disk | {"total": sum(disk.values())}


def _assumptions(rates: dict[str, float]) -> list[str]:
    speeds = ", ".join(f"{name}: {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    units = " or ".join(f"{count} ({dtype})" for dtype, count in ACTIVATION_UNITS.items())
    lengths = ", ".join(f"{name} {length}" for name, length in CONVERSATION_TOKENS.items())
    return [
        f"training speed: {speeds}",
        f"from {ASSUMED_MFU:.0%} MFU on accelerators and {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s a CPU core",
        f"tokens a conversation: {lengths}, others {DEFAULT_CONVERSATION_TOKENS}; a file's bytes / 4",
        f"rl: answers as long as allowed; sampling runs at {ROLLOUT_EFFICIENCY:.0%} of the speed of training",
        f"activations: {units} values a token, layer and unit of width",
        f"a shard has {SHARD_BYTES / 1e6:.0f} MB",
        "not counted: evaluation, downloads, tokenizer training, compilation",
    ]
