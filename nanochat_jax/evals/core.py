"""CORE, the in-context-learning metric of DCLM (arXiv 2406.11794): 22 tasks, centred on guessing and averaged.

Prompts, shots and scoring are the reference's, row for row. Prompts of like length are scored together, in batches
whose lengths are powers of two, so that at most a dozen programs are compiled. Prompts are never cropped.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh
from tqdm import tqdm

from nanochat_jax.config import GPTConfig
from nanochat_jax.distributed import gather_json
from nanochat_jax.errors import UserError
from nanochat_jax.evals.intervals import centred_mean, wilson
from nanochat_jax.inference.buckets import bucket
from nanochat_jax.model import Params, forward
from nanochat_jax.sharding import data_shards, put_batch
from nanochat_jax.tokenizer import Tokenizer

Log = Callable[[str], None]

SHUFFLE_SEED, SHOTS_SEED = 1337, 1234
SHORTEST = 64
"""Tokens of the shortest batches."""
BATCH_TOKENS = 2**14
"""Tokens of one device's share of a batch, at most: with 32,768 words their logits take 2 GiB in float32."""


@dataclass(frozen=True)
class CoreTask:
    """One line of core.yaml with its rows, shuffled, and its baseline."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    rows: list[dict]


@dataclass(frozen=True)
class Candidate:
    """A token sequence and the part of it that is scored: tokens start to end, each given all before it."""

    tokens: list[int]
    start: int
    end: int


def evaluate_core(
    params: Params,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    bundle: Path,
    mesh: Mesh,
    batch_size: int,
    max_examples: int | None,
    log: Log,
) -> dict:
    """{"core_metric", "interval", "results", "centered_results", "intervals", "n"}, the last four by task label.

    max_examples (None: all) cuts what is scored, never the rows that shots are drawn from. batch_size: rows a device
    scores at once, fewer where they are long. Of several processes each scores a share of the rows: `params` and `mesh`
    are its own then. Raises UserError for an incomplete bundle, or a prompt beyond the model's positions before any is
    scored.
    """
    results, centred, intervals, counts, chances = {}, {}, {}, {}, {}
    for task, n in checked_tasks(cfg, tokenizer, bundle, max_examples):
        mine = range(jax.process_index(), n, jax.process_count())
        items = [candidates(task, i, tokenizer) for i in mine]
        sequences = [candidate for item in items for candidate in item]
        scores = iter(score(params, cfg, sequences, mesh, batch_size, tokenizer.bos_id, task.label))
        right = 0
        for i, item in zip(mine, items, strict=True):
            losses, exact = zip(*itertools.islice(scores, len(item)), strict=True)
            right += exact[0] if task.kind == "language_modeling" else int(np.argmin(losses)) == task.rows[i]["gold"]
        right = sum(gather_json(int(right), "core"))
        accuracy = right / n
        results[task.label] = accuracy
        centred[task.label] = (accuracy - task.baseline) / (1 - task.baseline)
        intervals[task.label] = list(wilson(right, n))
        counts[task.label] = n
        chances[task.label] = task.baseline
        log(f"CORE {task.label}: accuracy {accuracy:.4f}, centred {centred[task.label]:.4f} (n {n})")
    core, low, high = centred_mean([(results[label], counts[label], chance) for label, chance in chances.items()])
    log(f"CORE {core:.4f} over {len(centred)} tasks (95% {low:.4f} to {high:.4f})")
    return {
        "core_metric": core,
        "interval": [low, high],
        "results": results,
        "centered_results": centred,
        "intervals": intervals,
        "n": counts,
    }


def checked_tasks(
    cfg: GPTConfig, tokenizer: Tokenizer, bundle: Path, max_examples: int | None
) -> list[tuple[CoreTask, int]]:
    """The tasks, and how many rows of each are scored. UserError as `evaluate_core`, whichever task is at fault."""
    tasks = []
    for task in read_bundle(bundle):
        n = len(task.rows) if max_examples is None else min(max_examples, len(task.rows))
        if n < 1:
            raise UserError(f"CORE {task.label}: no row to score")
        for text in itertools.chain.from_iterable(prompts(task, i) for i in range(n)):
            # With the BOS, it might be more tokens than it has bytes; JSON can hold half of a pair of surrogates.
            if len(text.encode(errors="surrogatepass")) >= cfg.max_positions:
                padded_length(1 + len(tokenizer.encode(text)), cfg, task.label)
        tasks.append((task, n))
    return tasks


def read_bundle(folder: Path) -> list[CoreTask]:
    """The tasks in the order of core.yaml. Raises UserError for what is missing."""
    try:
        entries = (yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8")) or {}).get("icl_tasks")
        if not entries:
            raise ValueError("core.yaml has no icl_tasks")
        with open(folder / "eval_meta_data.csv", encoding="utf-8") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = []
        for entry in entries:
            lines = (folder / "eval_data" / entry["dataset_uri"]).read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            random.Random(SHUFFLE_SEED).shuffle(rows)
            delimiter = entry.get("continuation_delimiter", " ")
            label = entry["label"]
            kind, shots = entry["icl_task_type"], entry["num_fewshot"][0]
            if len(rows) <= shots:
                raise ValueError(f"{label} has {len(rows)} rows, too few for {shots} examples beside each")
            tasks.append(CoreTask(label, kind, shots, delimiter, baselines[label], rows))
    except (OSError, LookupError, AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's are of several lines
        raise UserError(
            f"{folder} is not a complete CORE bundle ({type(error).__name__}: {reason}); "
            "it needs core.yaml, eval_meta_data.csv and eval_data/: remove the folder to download it again"
        ) from error
    return tasks


def candidates(task: CoreTask, i: int, tokenizer: Tokenizer) -> list[Candidate]:
    """What is scored for row i: the choices, the contexts, or the one continuation."""
    sequences = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts(task, i)]
    if task.kind == "schema":
        shared = common([tokens[::-1] for tokens in sequences])
        return [Candidate(tokens, len(tokens) - shared, len(tokens)) for tokens in sequences]
    start = common(sequences)
    scored = sequences[:1] if task.kind == "language_modeling" else sequences
    return [Candidate(tokens, start, len(tokens)) for tokens in scored]


def prompts(task: CoreTask, i: int) -> list[str]:
    """Row i with each answer that it offers, after its examples; in language modeling then without the answer."""
    drawn = random.Random(SHOTS_SEED + i).sample(range(len(task.rows) - 1), task.shots)
    shots = [task.rows[j + (j >= i)] for j in drawn]  # of the other rows
    right = [pairs(task, shot)[shot.get("gold", 0)] for shot in shots]
    before = "".join(f"{context}{task.delimiter}{continuation}\n\n" for context, continuation in right)
    asked = pairs(task, task.rows[i])
    texts = [f"{before}{context}{task.delimiter}{continuation}" for context, continuation in asked]
    if task.kind == "language_modeling":
        # The blank before a continuation belongs to its first token.
        texts.append(f"{before}{asked[0][0]}{task.delimiter}".strip())
    return texts


def pairs(task: CoreTask, row: dict) -> list[tuple[str, str]]:
    """(context, continuation) of each answer that a row offers."""
    if task.kind == "multiple_choice":
        return [(row["query"], choice) for choice in row["choices"]]
    if task.kind == "schema":
        return [(context, row["continuation"]) for context in row["context_options"]]
    if task.kind == "language_modeling":
        return [(row["context"].strip(), row["continuation"])]
    raise UserError(f"CORE task {task.label} has the unknown type {task.kind!r}")


def common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({tokens[i] for tokens in sequences}) > 1), shortest)


def score(
    params: Params,
    cfg: GPTConfig,
    sequences: Sequence[Candidate],
    mesh: Mesh,
    batch_size: int,
    padding: int,
    label: str,
) -> list[tuple[float, bool]]:
    """Mean loss and all-argmax of the scored part of each sequence."""
    groups: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(padded_length(len(sequence.tokens), cfg, label), []).append(i)
    scores: list = [None] * len(sequences)
    with tqdm(total=len(sequences), desc=label, unit="row", leave=False, disable=None) as bar:
        for length, members in sorted(groups.items()):
            rows = max(1, min(batch_size, BATCH_TOKENS // length)) * data_shards(mesh)
            for first in range(0, len(members), rows):
                chosen = members[first : first + rows]
                batch = put_batch(padded([sequences[i] for i in chosen], rows, length, padding), mesh)
                with jax.set_mesh(mesh):
                    losses, exact = jax.device_get(score_batch(params, batch, cfg=cfg))
                for i, loss, right in zip(chosen, losses, exact, strict=False):
                    scores[i] = float(loss), bool(right)
                bar.update(len(chosen))
    return scores


def padded_length(length: int, cfg: GPTConfig, label: str) -> int:
    """The next power of two, or all of the model's positions; UserError past those."""
    if length > cfg.max_positions:
        raise UserError(
            f"CORE task {label} has a prompt of {length} tokens, the model reaches {cfg.max_positions} "
            "(10 x --model.sequence-len); leave core out of the evaluations of so short a context"
        )
    return bucket(length, SHORTEST, cfg.max_positions)


def padded(sequences: Sequence[Candidate], rows: int, length: int, padding: int) -> dict[str, np.ndarray]:
    """A batch of fixed shape: tokens int32 [rows, length], start and end int32 [rows]."""
    batch = {
        "tokens": np.full((rows, length), padding, np.int32),
        "start": np.ones(rows, np.int32),
        "end": np.full(rows, 2, np.int32),
    }
    for row, sequence in enumerate(sequences):
        batch["tokens"][row, : len(sequence.tokens)] = sequence.tokens
        batch["start"][row], batch["end"][row] = sequence.start, sequence.end
    return batch


@functools.partial(jax.jit, static_argnames="cfg")
def score_batch(params: Params, batch: dict[str, jax.Array], *, cfg: GPTConfig) -> tuple[jax.Array, jax.Array]:
    """Mean loss [B] over tokens start to end of each row (infinite where none), and whether all are the argmax."""
    targets_BT = batch["tokens"][:, 1:]
    logits_BTV = forward(params, cfg, batch["tokens"])[:, :-1]
    place_1T = jnp.arange(1, batch["tokens"].shape[1])[None, :]
    scored_BT = (place_1T >= batch["start"][:, None]) & (place_1T < batch["end"][:, None])
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
    count_B = jnp.sum(scored_BT, axis=1)
    total_B = jnp.sum(jnp.where(scored_BT, losses_BT, 0.0), axis=1)
    mean_B = jnp.where(count_B > 0, total_B / jnp.maximum(count_B, 1), jnp.inf)
    right_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return mean_B, jnp.all(right_BT | ~scored_BT, axis=1)
