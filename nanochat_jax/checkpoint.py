"""Checkpoints on orbax: whole or absent, verified, restorable onto any mesh.

A folder of checkpoints holds one folder a step:

    step_00000123/state/         the orbax checkpoint of a tree of arrays
    step_00000123/meta.json      what is not an array: data position, stage, shapes of the run
    step_00000123/manifest.json  format version, size and sha256 of every file above

A checkpoint is written beside its final place, synced, and renamed in one step, so that a kill at any moment leaves it
whole or absent. Orbax restores flipped bits in silence; therefore every file is checked against the manifest first, and
a damaged checkpoint is named on stderr and the one before it used.

Left out: saving in the background and saving from several processes. A save blocks until it is on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from nanochat_jax.errors import UserError
from nanochat_jax.sharding import path_of

FORMAT = 1
PyTree = Any


class Checkpointer:
    """The checkpoints of one training stage, as their only writer. Readers use `restore_params`."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Opens or creates `directory` and clears what a killed writer left there; at most `keep` checkpoints stay."""
        self.directory = Path(directory).absolute()
        self.keep = max(keep, 1)
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("old-step_*"):
            final = self.directory / leftover.name.removeprefix("old-")
            if not final.exists():
                leftover.rename(final)
        self._clear()

    def save(self, step: int, tree: PyTree, meta: dict[str, Any]) -> None:
        """Writes the arrays of `tree` and the JSON-able `meta` as the checkpoint of `step`.

        Later steps, left behind where a restore fell back past them, go. Raises UserError when the disk is full; the
        earlier checkpoints are then untouched.
        """
        name = f"step_{step:08d}"
        final, partial, old = (self.directory / f"{prefix}{name}" for prefix in ("", "tmp-", "old-"))
        try:
            partial.mkdir()
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                writer.save(partial / "state", args=ocp.args.PyTreeSave(tree))
            (partial / "meta.json").write_text(json.dumps(meta))
            names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
            with ThreadPoolExecutor() as pool:
                entries = pool.map(lambda file: _fingerprint(partial / file), names)
            manifest = {"format": FORMAT, "files": dict(zip(names, entries, strict=True))}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _sync(partial)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _disk_full(error):
                raise UserError(
                    f"the disk is full: checkpoint {final} was not written (earlier ones are whole); "
                    "free some space and start again"
                ) from error
            raise
        if final.exists():
            final.rename(old)
        partial.rename(final)
        _sync_entry(self.directory)
        self._clear()
        stale = [other for other in steps(self.directory) if other > step]
        for other in stale + steps(self.directory)[: -self.keep - len(stale)]:
            (self.directory / f"step_{other:08d}").rename(self.directory / f"tmp-step_{other:08d}")
        self._clear()

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return max(steps(self.directory), default=None)

    def restore(self, step: int | None, target: PyTree | None) -> tuple[PyTree, dict[str, Any], int]:
        """(tree, meta, step) of the checkpoint of `step`, or of the newest undamaged one when it is None.

        `target` is a tree of `jax.ShapeDtypeStruct` with shardings: leaves come back with its structure, dtypes and
        shardings, whatever the mesh they were saved from. None: nested dicts and lists of arrays on the default device.
        Raises UserError when nothing undamaged is left or the shapes are not those of `target`.
        """
        return _restore(self.directory, step, target)

    def _clear(self) -> None:
        for prefix in ("tmp-", "old-"):
            for leftover in self.directory.glob(f"{prefix}step_*"):
                shutil.rmtree(leftover)


def restore_params(directory: Path, target: PyTree | None = None) -> tuple[PyTree, dict[str, Any], int]:
    """(params, meta, step) of the newest undamaged checkpoint, without its optimizer state; changes nothing on disk.

    `target` as in `Checkpointer.restore`, for the subtree `params` alone. A writer may be at work in the same folder.
    """
    tree, meta, step = _restore(
        Path(directory).absolute(), None, None if target is None else {"params": target}, "params"
    )
    return tree["params"], meta, step


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in `directory`, rising."""
    return sorted(int(path.name.removeprefix("step_")) for path in Path(directory).glob("step_????????"))


def _restore(
    directory: Path, step: int | None, target: PyTree | None, only: str | None = None
) -> tuple[PyTree, dict[str, Any], int]:
    damaged: set[int] = set()
    # The list is read again each time: a writer may have pruned the step that was missing and added a newer one.
    while candidates := [s for s in steps(directory) if s not in damaged and step in (None, s)]:
        newest = candidates[-1]
        path = directory / f"step_{newest:08d}"
        problem = _verify(path)
        if problem is None:
            tree = _read_state(path / "state", target, only)
            return tree, json.loads((path / "meta.json").read_text()), newest
        damaged.add(newest)
        if path.exists():
            print(f"damaged checkpoint: {problem}; trying the one before it", file=sys.stderr)
    wanted = "" if step is None else f" of step {step}"
    if damaged:
        raise UserError(f"no undamaged checkpoint{wanted} in {directory}: delete the folder to train the stage again")
    raise UserError(f"no checkpoint{wanted} in {directory}: train the stage first")


def _verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, naming the file, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / 'manifest.json'} is missing or unreadable"
    if version != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {version}, this program reads {FORMAT}: use the version that wrote it"
        )
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            return f"{path / name} is missing"
        if size != expected["bytes"]:
            return f"{path / name} has {size} bytes instead of {expected['bytes']}"
    with ThreadPoolExecutor() as pool:
        for name, found in zip(files, pool.map(lambda file: _fingerprint(path / file), files), strict=True):
            if found != files[name]:
                return f"{path / name} has other contents than were written"
    return None


def _read_state(path: Path, target: PyTree | None, only: str | None) -> PyTree:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(path).item_metadata.tree
        if only is not None:
            stored = {only: stored[only]}
        if target is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
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
    return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))
