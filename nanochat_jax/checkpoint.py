"""Checkpoints on orbax: whole or absent, verified, restorable onto any mesh, written while training goes on.

A folder of checkpoints holds one folder a step:

    step_00000123/state/         the orbax checkpoint of a tree of arrays
    step_00000123/meta.json      what is not an array: data position, stage, shapes of the run
    step_00000123/manifest.json  format version and sha256 of every file above
    best.json                    the step whose validation was best, and its value; it is kept besides the newest

`save` copies the arrays to the host and returns; a thread writes them beside their final place, syncs, and renames in
one step, so that a kill at any moment leaves a checkpoint whole or absent. Orbax restores flipped bits in silence;
therefore every file is checked against the manifest first, and a damaged checkpoint is named on stderr and the one
before it used. With several processes each writes its own shards into the same folder, which all of them must see, and
process 0 does the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from nanochat_jax.data.files import DISK_FULL, write_json
from nanochat_jax.distributed import barrier, is_leader, leaders
from nanochat_jax.errors import UserError
from nanochat_jax.sharding import by_path

FORMAT = 1
BEST = "best.json"
PyTree = Any
Step = int | Literal["best"] | None
"""Which checkpoint: of a step, of the best validation, or (None) the newest undamaged one."""


class Checkpointer:
    """The checkpoints of one training stage, as their only writer. Readers use `restore`.

    All processes make the same calls. `wait` before the program or a reader goes on after the last `save`.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        """Opens or creates `directory` and clears what a killed writer left there.

        The `keep` newest checkpoints stay, and the best one.
        """
        self.directory = Path(directory).absolute()
        self.keep = max(keep, 1)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None
        if is_leader():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()

    def save(self, step: int, tree: PyTree, meta: dict[str, Any]) -> None:
        """Begins to write the arrays of `tree` and the JSON-able `meta` as the checkpoint of `step`.

        Returns when both are copied: the arrays may be donated, `meta` changed. Waits for the save before, if that is
        not on disk yet, and raises what went wrong with it (see `wait`). Later steps, left behind where a restore fell
        back past them, go when this one is whole.
        """
        self.wait()
        partial = self.directory / f"tmp-step_{step:08d}"
        try:
            if is_leader():
                partial.mkdir()
            writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            writer.save(partial / "state", args=ocp.args.PyTreeSave(tree))
        except Exception as error:
            raise self._failed(step, error) from error
        self._in_flight = self._background.submit(self._write, step, writer, json.dumps(meta))

    def wait(self) -> None:
        """Returns when what was saved is on disk, for all processes.

        Raises UserError where the disk was full; the earlier checkpoints are then untouched.
        """
        if self._in_flight is not None:
            self.settle()
            barrier("checkpoint saved")

    def settle(self) -> None:
        """`wait` without the other processes, for one that is about to end with an error."""
        if self._in_flight is not None:
            error = self._in_flight.exception()  # a signal may break this off: then the save is still in flight
            self._in_flight = None
            if error is not None:
                raise error

    def check(self) -> None:
        """Raises at once what went wrong with the save in flight, if it has ended."""
        if self._in_flight is not None and self._in_flight.done():
            self._in_flight.result()

    def drop(self, step: int) -> None:
        """Removes the checkpoint of `step`, the newest, which turned out to be of no use, unless it is the only one."""
        if is_leader() and steps(self.directory)[:-1]:
            self._prune(step - 1)

    def latest(self) -> int | None:
        """The newest step that is on disk, or None."""
        return max(steps(self.directory), default=None)

    def newest_meta(self) -> dict[str, Any] | None:
        """The meta of the newest checkpoint without its arrays; None where there is none, or it is damaged."""
        step = self.latest()
        if step is None or _verify(path := self.directory / f"step_{step:08d}", "meta.json"):
            return None
        return json.loads((path / "meta.json").read_text())

    def note_validation(self, step: int, value: float, *, higher_is_better: bool = False) -> None:
        """Makes the checkpoint of `step`, saved before, the best one where `value` beats the best so far."""
        self.wait()  # a checkpoint that is not on disk may never be, and pruning reads what is written here
        if not math.isfinite(value):
            return
        best = _best(self.directory)
        better = best is None or (value > best["value"] if higher_is_better else value < best["value"])
        if better and is_leader():
            write_json(self.directory / BEST, {"step": step, "value": value})

    def _write(self, step: int, writer: ocp.AsyncCheckpointer, meta: str) -> None:
        """In the background: from files that orbax is writing to a checkpoint."""
        final, partial = self.directory / f"step_{step:08d}", self.directory / f"tmp-step_{step:08d}"
        try:
            writer.close()  # waits until every process has written its part
            if not is_leader():
                return
            if not (partial / "state" / "manifest.ocdbt").is_file():
                # orbax only logs that it found nothing to merge: what it leaves can never be read.
                raise UserError(
                    f"checkpoint {final} was not written: orbax left no manifest.ocdbt (earlier ones are whole); start "
                    "again, in a --workdir whose path is of letters and digits if that is the reason"
                )
            (partial / "meta.json").write_text(meta)
            names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
            manifest = {"format": FORMAT, "files": _fingerprints(partial, names)}
            manifest["sha256"] = _digest(manifest)
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _sync(partial)
        except Exception as error:
            raise self._failed(step, error) from error
        if final.exists():  # damaged, or this step would have been gone on from
            shutil.rmtree(final)
        partial.rename(final)
        _sync_entry(self.directory)
        self._prune(step)

    def _failed(self, step: int, error: Exception) -> Exception:
        """What to raise where the checkpoint of `step` could not be written; what there is of it goes."""
        if is_leader():
            shutil.rmtree(self.directory / f"tmp-step_{step:08d}", ignore_errors=True)
        lost = f"checkpoint {self.directory / f'step_{step:08d}'} was not written"
        if _disk_full(error):
            return UserError(f"the disk is full: {lost} (earlier ones are whole); free some space and start again")
        return UserError(f"{lost}: {error}") if isinstance(error, OSError) else error

    def _prune(self, newest: int) -> None:
        """Removes the steps after `newest`, and of the others all but the `keep` newest and the best."""
        saved, best = steps(self.directory), _best(self.directory)
        kept = [step for step in saved if step <= newest][-self.keep :]
        if best is not None and best["step"] > newest:
            (self.directory / BEST).unlink()
        elif best is not None:
            kept.append(best["step"])
        for step in set(saved) - set(kept):
            (self.directory / f"step_{step:08d}").rename(self.directory / f"tmp-step_{step:08d}")
        self._clear()

    def _clear(self) -> None:
        for leftover in self.directory.glob("tmp-step_*"):
            shutil.rmtree(leftover)


def restore_params(directory: Path, target: PyTree, step: Step = None) -> tuple[PyTree, dict[str, Any], int]:
    """As `restore`, (params, meta, step) without the optimizer state; `target` for the subtree `params` alone."""
    tree, meta, step = restore(directory, step, {"params": target}, "params")
    return tree["params"], meta, step


def restore(directory: Path, step: Step, target: PyTree, only: str | None = None) -> tuple[PyTree, dict[str, Any], int]:
    """(tree, meta, step) of a checkpoint; `only`: this subtree alone. A writer may be at work in the same folder.

    `target` is a tree of `jax.ShapeDtypeStruct` with shardings: leaves come back with its structure, dtypes and
    shardings, whatever the mesh they were saved from. Raises UserError when nothing undamaged is left or the shapes are
    not those of `target`. Changes nothing on disk.
    """
    directory = Path(directory).absolute()
    found, error = None, None
    if is_leader():  # one process reads all files; the others take its word
        try:
            found = _undamaged(directory, step)
        except UserError as refusal:
            error = str(refusal)
    found, error = leaders([found, error])
    if error is not None:
        raise UserError(error)
    path = directory / f"step_{found:08d}"
    try:
        return _read_state(path / "state", target, only), json.loads((path / "meta.json").read_text()), found
    except Exception as error:
        if path.exists():
            raise
        raise UserError(f"{path} was removed while it was read, training goes on there: try again") from error


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in `directory`, rising."""
    # Digits alone: a copy that somebody keeps under another name, such as step_20_saved, is none of ours.
    return sorted(int(path.name.removeprefix("step_")) for path in Path(directory).glob("step_" + 8 * "[0-9]"))


def _best(directory: Path) -> dict[str, Any] | None:
    """{"step", "value"} of the checkpoint with the best validation, or None; a damaged file names none."""
    try:
        best = json.loads((directory / BEST).read_text())
        return best if best["step"] in steps(directory) and math.isfinite(best["value"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _undamaged(directory: Path, step: Step) -> int:
    """The newest undamaged step, or `step` itself. UserError where there is none."""
    if step == "best":
        best = _best(directory)
        if best is None:
            raise UserError(
                f"no checkpoint in {directory} has a validation that {BEST} names: name a step ({_listed(directory)})"
            )
        step = best["step"]
    damaged: set[int] = set()
    # The list is read again each time: a writer may have pruned the step that was missing and added a newer one.
    while candidates := [s for s in steps(directory) if s not in damaged and step in (None, s)]:
        newest = candidates[-1]
        path = directory / f"step_{newest:08d}"
        problem = _verify(path)
        if problem is None:
            return newest
        damaged.add(newest)
        if path.exists():
            going_on = "trying the one before it" if step is None else "name another step"
            print(f"damaged checkpoint: {problem}; {going_on}", file=sys.stderr)
    if step is not None and not damaged and steps(directory):
        raise UserError(f"no checkpoint of step {step} in {directory}, there: {_listed(directory)}")
    wanted = "" if step is None else f" of step {step}"
    if damaged:
        others = ", ".join(str(other) for other in steps(directory) if other not in damaged)
        # done.json is in the stage's folder: without the checkpoints alone the stage would still count as finished.
        way_out = f"name another: {others}" if others else f"delete {directory.parent} to train the stage again"
        raise UserError(f"no undamaged checkpoint{wanted} in {directory}: {way_out}")
    raise UserError(f"no checkpoint{wanted} in {directory}: train the stage first")


def _listed(directory: Path) -> str:
    return ", ".join(map(str, steps(directory))) or "none"


def _verify(path: Path, only: str | None = None) -> str | None:
    """What is wrong with the checkpoint at `path`, or with this file of it `only`, naming the file, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files = manifest["format"], manifest["files"]
        files = {name: files[name] for name in (files if only is None else [only])}
        if manifest.get("sha256", _digest(manifest)) != _digest(manifest):
            return f"{path / 'manifest.json'} has other contents than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path / 'manifest.json'} is missing or unreadable"
    if version != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version}, this program reads {FORMAT}: use the version that wrote it"
        )
    try:
        found = _fingerprints(path, files)
    except OSError as error:  # removed by training that goes on there, or a disk that cannot read it
        return f"{error.filename or path} is missing or unreadable"
    for name, expected in files.items():
        if found[name]["sha256"] != expected["sha256"]:
            return f"{path / name} has other contents than were written"
    return None


def _read_state(path: Path, target: PyTree, only: str | None) -> PyTree:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(path).item_metadata.tree
        if only is not None:
            stored = {only: stored[only]}
        wanted, found = _shapes(target), _shapes(stored)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise UserError(
                    f"{path} does not fit this model: {name} is {found.get(name, 'absent')} in the checkpoint and "
                    f"{wanted.get(name, 'absent')} in the configuration; use the configuration it was trained with"
                )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return reader.restore(
            path, args=ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=only is not None)
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Shape per leaf, under names that are the same for a NamedTuple and for the dict orbax makes of it."""
    return {path: leaf.shape for path, leaf in by_path(tree).items()}


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of what a manifest says, so that its own damage is not taken for that of a file, or another version."""
    return hashlib.sha256(json.dumps([manifest["format"], manifest["files"]], sort_keys=True).encode()).hexdigest()


def _fingerprints(folder: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{"sha256"} of each of these files."""

    def one(name: str) -> dict[str, str]:
        with open(folder / name, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _sync(folder: Path) -> None:
    """Everything below `folder` reaches the disk before the rename that makes it a checkpoint."""
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(error: BaseException) -> bool:
    # tensorstore reports the system's error inside the text of its own exception
    full = isinstance(error, OSError) and error.errno in DISK_FULL
    return full or any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))
