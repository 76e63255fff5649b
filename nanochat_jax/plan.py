"""`--plan`: what a run will take, worked out from its configuration alone; nothing is downloaded, compiled or trained.

Parameters, FLOPs, steps and tokens of base are exact. The rest is an estimate that says what it assumes: lengths of
conversations, memory of activations, speed of the hardware. Evaluation, downloads and tokenizer training are left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kernels.attention import GPU_IMPLEMENTATIONS
from nanochat_jax.config import DEFAULT_ROWS, MODEL_STAGES, Config, FinetuneConfig, GPTConfig
from nanochat_jax.data.conversations import read_jsonl
from nanochat_jax.data.download import SHARD_BYTES
from nanochat_jax.data.files import expanded
from nanochat_jax.fp8 import precision
from nanochat_jax.inference.native import check_native
from nanochat_jax.loss import kernel_takes
from nanochat_jax.memory import loss_chunk
from nanochat_jax.metrics import duration, gib, peak_flops, si
from nanochat_jax.model import count_params, flops_per_token, scaling_params
from nanochat_jax.optim import check_horizon, horizon
from nanochat_jax.run import gpt_config
from nanochat_jax.sharding import AXES, check_mesh, data_shards, parse_mesh, rows_of_microbatch, rows_of_step
from nanochat_jax.stages.rl import check_settings
from nanochat_jax.tasks import load, parse

ASSUMED_MFU = 0.4
CPU_CORE_FLOPS = 35e9
"""Float32 FLOP/s that training gets out of one CPU core."""
ROLLOUT_EFFICIENCY = 0.1
"""Speed of token-by-token decoding in FLOP/s, relative to training."""
ACTIVATION_BYTES = {"cpu": {"float32": 106, "bfloat16": 71}, "gpu": {"float32": 72, "bfloat16": 36}}
"""Bytes for the backward pass per token, layer and unit of width, by XLA's memory analysis on a CPU and, in bfloat16,
for an H100; without the scores of attention."""
SCORE_BYTES = {"float32": 11, "bfloat16": 9}
"""The same per head and visible key, where attention keeps its scores."""
LOGIT_BYTES = {"cpu": {"float32": 15, "bfloat16": 18}, "gpu": {"float32": 4, "bfloat16": 2}}
"""The same per logit that is there at once; on a GPU their gradients take their place."""
KEEPS_SCORES = ("reference", "xla_blocked")
REMAT_VALUES = 3.5
"""Values per token, layer and unit of width that rematerialisation leaves kept."""
# Training rows (of GSM8K without the 400 held out) and tokens a conversation; other sets are counted.
PUBLIC_SETS = {
    "smoltalk": (460_341, 800),
    "mmlu_aux": (99_842, 200),
    "gsm8k": (7_073, 220),
    "arc_easy": (2_251, 90),
    "arc_challenge": (1_119, 100),
}
MADE_TOKENS = 60
"""Tokens of a conversation made by code."""


def plan(config: Config, chosen: Collection[str] = MODEL_STAGES) -> dict[str, Any]:
    """{"model", "stages", "total", "rows", "memory", "disk", "assumptions"}: counts, bytes, FLOPs, hours and dollars,
    of the `chosen` stages.

    Hours and dollars are per kind of hardware: what JAX sees here, and H100s where that is no accelerator (alone where
    the mesh has several devices). Raises UserError where the configuration cannot be.
    """
    mesh = AbstractMesh(tuple(parse_mesh(config.mesh).values()), AXES)
    devices = mesh.size
    rates = _rates(devices)
    platform = jax.default_backend()
    if platform == "cpu" and devices > 1:
        platform = "gpu"  # of another machine
    cfg = gpt_config(config, config.tokenizer.vocab_size, platform)
    attention, cfg = cfg.attention, replace(cfg, attention="reference")  # which can be traced everywhere
    check_mesh(mesh, cfg)
    precision(cfg, jax.devices()[0])
    check_native(cfg, platform, devices)
    counts, per_token = count_params(cfg), flops_per_token(cfg)
    stages = []
    if "base" in chosen:
        base = horizon(config, cfg)
        check_horizon(config, base)
        stages.append(_stage("base", base.steps, config.base.stop_after, base.batch_tokens, per_token))
    finetuned = [name for name in ("mid", "sft") if name in chosen]
    stages += [_finetune(name, getattr(config, name), config, cfg, per_token) for name in finetuned]
    rows = {stage["stage"]: _rows(config, stage, data_shards(mesh)) for stage in stages}
    memory = step_memory(config, cfg, max(rows.values(), default=1), platform, attention)
    if "rl" in chosen:
        check_settings(config.rl)
        stages.append(_rl(config, per_token))
        if config.rl.control:
            # sft continued for the compute that rl used.
            stages.append({"stage": "sft_continued", "steps": 0, "tokens": 0, "flops": stages[-1]["flops"]})
    for stage in stages:
        rollouts = stage.get("rollout_flops", 0)
        work = (stage["flops"] - rollouts) * (4 / 3 if config.remat else 1) + rollouts / ROLLOUT_EFFICIENCY
        stage["hours"] = {name: work / rate / 3600 for name, rate in rates.items()}
    sums = {key: sum(stage[key] for stage in stages) for key in ("steps", "tokens", "flops")}
    total = {"stage": "total", **sums}
    total["hours"] = {name: sum(stage["hours"][name] for stage in stages) for name in rates}
    for stage in (*stages, total):
        stage["dollars"] = {name: hours * devices * config.device_hour_cost for name, hours in stage["hours"].items()}
    return {
        "model": counts | {"scaling": scaling_params(cfg), "flops_per_token": per_token, "devices": devices},
        "stages": stages,
        "total": total,
        "rows": rows,
        "memory": memory,
        "disk": _disk(config, cfg, chosen),
        "assumptions": _assumptions(rates, cfg, attention, config.device_hour_cost),
    }


def format_plan(figures: dict[str, Any]) -> str:
    """The plan as text."""
    model = [(name.replace("_", " "), f"{count:,}") for name, count in figures["model"].items()]
    hardware = list(figures["total"]["hours"])
    priced = [name for name in hardware if figures["total"]["dollars"][name]]
    stages = [["stage", "steps", "tokens", "FLOPs"]]
    stages[0] += [f"time on {name}" for name in hardware] + [f"dollars on {name}" for name in priced]
    for stage in (*figures["stages"], figures["total"]):
        steps = f"{stage['steps']:,}" if stage["steps"] else "-"
        row = [stage["stage"], steps, si(stage["tokens"]) if stage["tokens"] else "-", f"{stage['flops']:.3g}"]
        row += [_hours(stage["hours"][name]) for name in hardware]
        stages.append(row + [f"{stage['dollars'][name]:,.2f}" for name in priced])
    rows = ", ".join(f"{stage} {count}" for stage, count in figures["rows"].items()) or "1"
    memory, disk = ([(name, gib(size)) for name, size in figures[key].items()] for key in ("memory", "disk"))
    parts = {
        "Model (parameters by group, training FLOPs)": _aligned(model),
        "Stages": _aligned(stages),
        f"Memory per device (estimate; rows a microbatch: {rows})": _aligned(memory),
        "Disk (estimate)": _aligned(disk),
        "Assumptions": [f"  - {text}" for text in figures["assumptions"]],
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in parts.items())


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


def _stage(name: str, steps: int, stop_after: int | None, batch_tokens: int, per_token: int) -> dict[str, Any]:
    steps = steps if stop_after is None else min(steps, stop_after)
    tokens = steps * batch_tokens
    flops = float(tokens * per_token)
    return {"stage": name, "steps": steps, "batch_tokens": batch_tokens, "tokens": tokens, "flops": flops}


def _finetune(name: str, stage: FinetuneConfig, config: Config, cfg: GPTConfig, per_token: int) -> dict[str, Any]:
    batch_tokens = stage.total_batch_size or DEFAULT_ROWS * cfg.sequence_len
    steps = stage.num_iterations
    if steps is None:
        sizes = [_mixture_entry(spec, config) for spec in stage.mixture]
        different = sum(count for count, _, _ in sizes)
        tokens = sum(count * epochs * min(length, cfg.sequence_len) for count, epochs, length in sizes)
        padded = sum(count * epochs for count, epochs, _ in sizes)
        rows = padded if stage.packing == "pad" else tokens / cfg.sequence_len
        held_out = min(stage.val_rows, different // 10) / max(different, 1)
        steps = math.ceil(rows * (1 - held_out) * cfg.sequence_len / batch_tokens)
    return _stage(name, steps, stage.stop_after, batch_tokens, per_token)


def _mixture_entry(spec: str, config: Config) -> tuple[int, int, int]:
    """(different conversations, epochs, tokens of one) of an entry of a mixture, without loading a public set."""
    name, rows, epochs = parse(spec)
    if name in PUBLIC_SETS:
        there, length = PUBLIC_SETS[name]
    elif name.endswith(".jsonl"):
        path = expanded(name)
        there = len(read_jsonl(path))
        length = path.stat().st_size // 4 // there
    else:
        there, length = len(load(name, "train", config.data, config.seed)), MADE_TOKENS
    return there if rows is None else min(rows, there), epochs, length


def _rl(config: Config, per_token: int) -> dict[str, Any]:
    """Every answer as long as allowed, so an upper bound: answers are sampled, then trained on with their questions."""
    rl = config.rl
    questions, _, length = _mixture_entry(rl.task, config)
    steps = rl.num_iterations or max(1, questions // rl.questions_per_step)
    samples = rl.questions_per_step * rl.samples_per_question
    trained = samples * (length + rl.max_new_tokens) * rl.updates_per_batch
    stage = _stage("rl", steps, rl.stop_after, trained, per_token)
    # A forward pass is a third of the training FLOPs; so are the ratios that clipping needs.
    rollouts = stage["steps"] * samples * (rl.max_new_tokens + length / rl.samples_per_question) * per_token / 3
    updates = stage["flops"] * (4 / 3 if rl.clip else 1)
    return stage | {"flops": updates + rollouts, "rollout_flops": rollouts}


def _rows(config: Config, stage: dict[str, Any], shards: int) -> int:
    """Rows of a microbatch of a supervised stage on a device; 1 for `auto`. UserError where they do not divide."""
    name = stage["stage"]
    rows = rows_of_step(name, stage["batch_tokens"], config.model.sequence_len, shards)
    return rows_of_microbatch(name, rows, getattr(config, name).device_batch_size, shards) // shards


def step_memory(config: Config, cfg: GPTConfig, rows: int, platform: str, attention: str) -> dict[str, float]:
    """Bytes that a step with microbatches of `rows` rows takes on a device, by what they are for; an estimate."""
    axes = parse_mesh(config.mesh)
    parameter_parts, all_parts = axes["fsdp"] * axes["tensor"], math.prod(axes.values())
    dtype, low = cfg.compute_dtype, jnp.dtype(cfg.compute_dtype).itemsize
    tokens = rows * cfg.sequence_len
    chunk = loss_chunk(config, rows, platform)
    head_tokens = rows * min(chunk or cfg.sequence_len, cfg.sequence_len) / axes["tensor"]
    kind = _kind(attention)
    in_place = axes["tensor"] == 1 and kernel_takes(replace(cfg, attention=attention))
    logits = LOGIT_BYTES["gpu" if in_place else "cpu"][dtype] * head_tokens * cfg.padded_vocab_size
    # A window's mean number of visible keys, and half a block of queries.
    keys = [window - window**2 / 2 / cfg.sequence_len + 64 for window in cfg.windows]
    scores = SCORE_BYTES[dtype] * cfg.n_head * (attention in KEEPS_SCORES)
    # The residual stream, which remat keeps, is whole on every device of `tensor`.
    residual = REMAT_VALUES * low * tokens * cfg.n_embd
    layers = [tokens * (ACTIVATION_BYTES[kind][dtype] * cfg.n_embd + scores * seen) for seen in keys]
    layers = [residual + (layer - residual) / axes["tensor"] for layer in layers]
    activations = sum(layers)
    if cfg.remat:
        # One layer's activations are there again when the logits are not any more.
        activations = residual * cfg.n_layer + max(0.0, max(layers) - logits)
    # Gradients are float32: the step's sum and a microbatch's, or in the update what that works on.
    weights, optimizer = state_bytes(cfg)
    memory = {
        "weights": weights / parameter_parts,
        "gradients": 2 * 4 * count_params(cfg)["total"] / parameter_parts,
        "optimizer": optimizer / all_parts,
        "activations": activations,
        "logits": logits,
    }
    return memory | {"total": sum(memory.values())}


def state_bytes(cfg: GPTConfig) -> tuple[int, int]:
    """Bytes of parameters and of optimizer: two moments for AdamW, one for Muon, whose second moments are vectors."""
    counts = count_params(cfg)
    embedding = (counts["wte"] + counts["value_embeds"]) * jnp.dtype(cfg.compute_dtype).itemsize
    blocks, rest = 4 * counts["blocks"], 4 * (counts["lm_head"] + counts["scalars"])
    return embedding + blocks + rest, 2 * embedding + blocks + 2 * rest


def _kind(attention: str) -> str:
    """Whose arithmetic a program is like; XLA's own attention on a GPU keeps as much as on a CPU."""
    return "gpu" if attention in GPU_IMPLEMENTATIONS else "cpu"


def _disk(config: Config, cfg: GPTConfig, chosen: Collection[str]) -> dict[str, float]:
    """Bytes of shards to download and of the checkpoints of the stages."""
    downloads = config.data.dir is None and config.data.source != "embedded"
    names = [name for name in MODEL_STAGES if name in chosen]
    continued = ["sft"] if "rl" in chosen and config.rl.control else []
    kept = sum(getattr(config, name).keep + 1 for name in (*names, *continued))
    shards = (config.data.num_shards + 1) * SHARD_BYTES * downloads
    disk = {"shards": float(shards), "checkpoints": float(kept * sum(state_bytes(cfg)))}
    return disk | {"total": sum(disk.values())}


def _assumptions(rates: dict[str, float], cfg: GPTConfig, attention: str, price: float) -> list[str]:
    speeds = ", ".join(f"{name}: {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    lengths = ", ".join(f"{name} {length}" for name, (_, length) in PUBLIC_SETS.items())
    return [
        f"training speed: {speeds}",
        f"from {ASSUMED_MFU:.0%} MFU on accelerators and {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s a CPU core",
        f"tokens a conversation: {lengths}, others {MADE_TOKENS}; a file's bytes / 4",
        f"rl: answers as long as allowed; sampling runs at {ROLLOUT_EFFICIENCY:.0%} of the speed of training",
        f"activations, as XLA keeps them: {ACTIVATION_BYTES[_kind(attention)][cfg.compute_dtype]} bytes a token, layer "
        f"and unit of width; with remat {REMAT_VALUES * jnp.dtype(cfg.compute_dtype).itemsize:.0f}, a third more work",
        f"attention {attention} {'keeps' if attention in KEEPS_SCORES else 'does not keep'} its scores",
        f"device-batch-size auto: counted as 1 row; a shard has up to {SHARD_BYTES / 1e6:.0f} MB",
        f"a device costs ${price:,.2f} an hour" if price else "no dollars, as --device-hour-cost DOLLARS is not given",
        "not counted: evaluation, downloads, tokenizer training, compilation",
    ]
