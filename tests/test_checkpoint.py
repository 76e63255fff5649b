"""Checkpoints: a round trip on any mesh, and no way to end up with half of one."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from nanochat_jax import checkpoint
from nanochat_jax.checkpoint import Checkpointer, restore, restore_params, steps
from nanochat_jax.errors import UserError


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def state(value: float = 0.0, sharding=None) -> dict:
    """A tree like a training state: sharded float32, bfloat16, a scalar, a NamedTuple, an empty node."""
    w = jnp.arange(64.0).reshape(8, 8) + value
    w = w if sharding is None else jax.device_put(w, sharding)
    params = {"block": {"w": w}, "wte": jnp.full((4, 3), 1.5 + value, jnp.bfloat16)}
    return {"params": params, "opt": (Moments(jnp.int32(7), {"w": w * 2}), None)}


def spec(tree, sharding=None):
    device = SingleDeviceSharding(jax.devices()[0])

    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if sharding and x.shape == (8, 8) else device)

    return jax.tree.map(leaf, tree)


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("state/**/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def saved(folder: Path, *wanted: int, keep: int = 2) -> Checkpointer:
    """A folder with these steps on disk, each saved with its number as value and meta."""
    checkpoints = Checkpointer(folder, keep)
    for step in wanted:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def restored(checkpoints: Checkpointer, step=None, target=None) -> tuple:
    """What is on disk, once it is."""
    checkpoints.wait()
    return restore(checkpoints.directory, step, spec(state()) if target is None else target)


def params_of(folder: Path, step=None) -> tuple:
    return restore_params(folder, spec(state()["params"]), step)


def first_weight(tree: dict) -> float:
    return float(tree["params"]["block"]["w"][0, 0])


def test_round_trip_between_meshes(tmp_path):
    eight = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    four = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec(None, "data"))
    tree = state(sharding=eight)
    checkpoints = Checkpointer(tmp_path, 2)
    checkpoints.save(3, tree, {"loader": {"epoch": 1}})
    for sharding in (four, None):
        found, meta, step = restored(checkpoints, target=spec(tree, sharding))
        assert_same(found, tree)
        assert (meta, step) == ({"loader": {"epoch": 1}}, 3)
        assert len(found["params"]["block"]["w"].sharding.device_set) == (4 if sharding else 1)


def test_params_alone(tmp_path):
    tree = state(3)
    saved(tmp_path, 3)
    before = sorted(tmp_path.rglob("*"))
    params, meta, step = params_of(tmp_path)
    assert_same(params, tree["params"])
    assert (meta, step) == ({"step": 3}, 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_survives_the_donation_of_what_it_saves(tmp_path):
    """The next step takes the buffers over while the writer is still at work."""
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    view = jax.jit(lambda tree: {"params": tree})  # forwards the very buffers it is given
    checkpoints = Checkpointer(tmp_path, 1)
    tree = step({f"w{i}": jax.device_put(jnp.full((256, 256), i, jnp.float32), everywhere) for i in range(8)})
    expected = jax.tree.map(lambda x: np.array(x, copy=True), tree)
    checkpoints.save(1, view(tree), {})
    for _ in range(3):
        tree = step(tree)
    jax.block_until_ready(tree)
    assert_same(restored(checkpoints, 1, {"params": spec(expected)})[0]["params"], expected)


def test_writing_goes_on_behind_the_program(tmp_path, monkeypatch):
    """Nothing is to be seen before it is whole; one save at a time; `wait` and `restore` wait."""
    gate, order = threading.Event(), []
    sync = checkpoint._sync

    def slow(folder):
        gate.wait()
        order.append(folder.name)
        sync(folder)

    monkeypatch.setattr(checkpoint, "_sync", slow)
    checkpoints = Checkpointer(tmp_path, 2)
    meta = {"counter": 1}
    checkpoints.save(1, state(1), meta)
    meta["counter"] = 2
    assert checkpoints.latest() is None and order == []
    threading.Timer(0.05, gate.set).start()
    checkpoints.save(2, state(2), meta)
    assert checkpoints.latest() == 1
    _, meta, step = restored(checkpoints)
    assert order == ["tmp-step_00000001", "tmp-step_00000002"]
    assert (meta, step) == ({"counter": 2}, 2)
    assert restored(checkpoints, 1)[1] == {"counter": 1}


def test_a_save_is_still_waited_for_after_a_wait_was_broken_off(tmp_path, monkeypatch):
    """As a signal does that comes in a validation."""

    class BrokenOff(BaseException):
        pass

    def broken_off(*_):
        raise BrokenOff

    gate, sync = threading.Event(), checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda folder: gate.wait() and sync(folder))
    checkpoints = Checkpointer(tmp_path, 2)
    checkpoints.save(1, state(1), {})
    before = signal.signal(signal.SIGALRM, broken_off)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(BrokenOff):
            checkpoints.note_validation(1, 0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    threading.Timer(0.1, gate.set).start()
    checkpoints.wait()
    assert checkpoints.latest() == 1


def test_a_checkpoint_that_goes_while_it_is_verified_is_passed_over(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    fingerprints = checkpoint._fingerprints

    def pruned_first(folder, names):
        if folder.name.endswith("2"):
            folder.rename(tmp_path / "gone")
        return fingerprints(folder, names)

    monkeypatch.setattr(checkpoint, "_fingerprints", pruned_first)
    assert params_of(tmp_path)[2] == 1


def test_keeps_the_newest(tmp_path):
    assert Checkpointer(tmp_path, 2).latest() is None
    checkpoints = saved(tmp_path, 5, 10, 15)
    assert checkpoints.latest() == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]
    assert first_weight(restored(checkpoints, 10)[0]) == 10


@pytest.mark.parametrize("higher", [False, True])
def test_keeps_the_best(tmp_path, higher):
    checkpoints = Checkpointer(tmp_path, 1)
    with pytest.raises(UserError, match="has a validation"):
        params_of(tmp_path, "best")
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 4.0)):
        checkpoints.save(step, state(step), {})
        checkpoints.note_validation(step, value, higher_is_better=higher)
    checkpoints.wait()
    best = 4 if higher else 2
    assert steps(tmp_path) == [best, 5]
    assert params_of(tmp_path, "best")[2] == best
    assert params_of(tmp_path)[2] == 5
    checkpoints.save(1, state(), {})  # all of these were of another history
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
@pytest.mark.parametrize("which", ["state", "meta.json", "manifest.json"])
def test_damage_is_named_and_the_one_before_used(tmp_path, capsys, how, which):
    checkpoints = saved(tmp_path, 1, 2)
    newest = tmp_path / "step_00000002"
    victim = largest_file(newest) if which == "state" else newest / which
    damage(victim, how)
    if (which, how) == ("manifest.json", "flipped"):
        victim.write_text(victim.read_text().replace('"sha256": "', '"sha256": "0', 1))
    assert checkpoints.newest_meta() == ({"step": 2} if which == "state" else None)
    tree, meta, step = restored(checkpoints)
    assert (step, meta, first_weight(tree)) == (1, {"step": 1}, 1.0)
    assert str(newest) in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no undamaged checkpoint of step 2 in .*: name another: 1$"):
        restored(checkpoints, 2)
    damage(largest_file(tmp_path / "step_00000001"), how)
    with pytest.raises(UserError, match=f"no undamaged checkpoint in .*: delete {tmp_path.parent} to train"):
        restored(checkpoints)


def test_no_flipped_bit_of_a_manifest_stops_a_run(tmp_path):
    saved(tmp_path, 1, 2)
    manifest = tmp_path / "step_00000002" / "manifest.json"
    whole = manifest.read_bytes()
    for i in range(0, len(whole), max(1, len(whole) // 150)):
        for bit in (1, 4, 64):
            broken = bytearray(whole)
            broken[i] ^= bit
            manifest.write_bytes(broken)
            assert checkpoint._undamaged(tmp_path, None) in (1, 2)
    manifest.write_bytes(whole.replace(b'"format": 1', b'"format": 9'))
    assert checkpoint._undamaged(tmp_path, None) == 1


def test_a_save_that_fails_does_not_take_the_best_with_it(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, keep=1)
    checkpoints.note_validation(1, 3.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", lambda folder: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        checkpoints.save(2, state(2), {})
        with pytest.raises(UserError, match="disk is full"):
            checkpoints.note_validation(2, 1.0)
    checkpoints.save(3, state(3), {})
    checkpoints.note_validation(3, float("nan"))
    assert restored(checkpoints, "best")[2] == 1


def test_a_failed_save_is_known_before_the_next_one(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_sync", lambda folder: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    checkpoints.save(2, state(2), {})
    with pytest.raises(UserError, match="disk is full"):
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)


def test_going_on_after_a_fallback_replaces_what_was_damaged(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    flip(largest_file(tmp_path / "step_00000003"))
    checkpoints.save(2, state(20), {})
    assert first_weight(restored(checkpoints)[0]) == 20
    assert checkpoints.latest() == 2


def test_leftovers_of_a_killed_writer(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "tmp-step_00000002" / "state").mkdir(parents=True)
    checkpoints = Checkpointer(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert restored(checkpoints)[2] == 1


def test_full_disk(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, keep=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for go_on in (checkpoints.wait, lambda: checkpoints.save(3, state(3), {})):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            checkpoints.save(2, state(2), {})
            with pytest.raises(UserError, match=r"disk is full.*step_00000002"):
                go_on()
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        assert restored(checkpoints)[2] == 1


def test_a_folder_that_was_removed_meanwhile(tmp_path):
    checkpoints = saved(tmp_path / "run", 1, keep=1)
    checkpoints.wait()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"step_00000002 was not written: .*No such file"):
        checkpoints.save(2, state(2), {})


def test_what_orbax_has_not_merged_is_no_checkpoint(tmp_path):
    """It takes the path for a pattern, which this one does not match."""
    checkpoints = Checkpointer(tmp_path / "a[1]", 1)
    checkpoints.save(1, state(), {})
    with pytest.raises(UserError, match=r"step_00000001 was not written: .*manifest\.ocdbt"):
        checkpoints.wait()
    assert list(checkpoints.directory.iterdir()) == []


def test_other_shapes_and_formats_are_refused(tmp_path):
    checkpoints = saved(tmp_path, 1)
    tree = state()
    target = spec(tree)
    target["params"]["block"]["w"] = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=target["params"]["wte"].sharding
    )
    with pytest.raises(UserError, match=re.escape("params/block/w is (8, 8) in the checkpoint and (8, 4)")):
        restored(checkpoints, target=target)
    del target["params"]["block"]
    with pytest.raises(UserError, match=re.escape("params/block/w is (8, 8) in the checkpoint and absent")):
        restored(checkpoints, target=target)
    manifest = tmp_path / "step_00000001" / "manifest.json"
    written = json.loads(manifest.read_text()) | {"format": 99}
    written["sha256"] = checkpoint._digest(written)
    manifest.write_text(json.dumps(written))
    with pytest.raises(UserError, match="format 99"):
        restored(checkpoints)


@pytest.mark.parametrize("contents", [b"", b"\xff{", b"[]", b'{"step": 5}', b'{"step": 5, "value": null}'])
def test_a_damaged_note_of_the_best_names_none(tmp_path, contents):
    checkpoints = saved(tmp_path, 4, 5)
    (tmp_path / "best.json").write_bytes(contents)
    with pytest.raises(UserError, match=r"has a validation that best\.json names: name a step \(4, 5\)"):
        params_of(tmp_path, "best")
    checkpoints.note_validation(4, 2.0)  # training goes on
    assert params_of(tmp_path, "best")[2] == 4


def test_copies_under_other_names_are_no_checkpoints(tmp_path):
    checkpoints = saved(tmp_path, 20)
    (tmp_path / "step_20_saved").mkdir()
    assert steps(tmp_path) == [20]
    checkpoints.save(21, state(21), {})
    assert restored(checkpoints)[2] == 21 and (tmp_path / "step_20_saved").exists()


def test_nothing_to_restore(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        params_of(tmp_path)
    saved(tmp_path, 4, 5)
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .* there: 4, 5"):
        params_of(tmp_path, 3)


ZYGOTE = """
import os, sys, time
import jax, jax.numpy as jnp
from pathlib import Path
from nanochat_jax.checkpoint import Checkpointer
os.environ["XLA_FLAGS"] = ""
for line in sys.stdin:  # forks before JAX has any thread: imports are paid once
    if (pid := os.fork()) == 0:
        checkpoints = Checkpointer(Path(sys.argv[1]), 2)
        for step in range((checkpoints.latest() or 0) + 1, 10**6):
            checkpoints.save(step, {"params": {f"w{i}": jnp.full((200, 200), step) for i in range(5)}}, {"step": step})
    print(pid, flush=True)
"""


def test_sigkill_at_any_moment_of_a_save(tmp_path):
    """At several distances from the moment at which a save begins, from early in it to the renames and after."""
    target = spec({f"w{i}": jnp.zeros((200, 200), int) for i in range(5)})
    arguments = [sys.executable, "-c", ZYGOTE, str(tmp_path)]
    newest = 0
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as zygote:
        for delay in np.linspace(0, 0.25, 6):
            zygote.stdin.write("go\n")
            child = int(zygote.stdout.readline())
            while max(steps(tmp_path), default=0) <= newest or not list(tmp_path.glob("tmp-*/state*")):
                time.sleep(0.001)
            time.sleep(delay)
            before = max(steps(tmp_path))
            os.kill(child, signal.SIGKILL)
            params, meta, newest = restore_params(tmp_path, target)
            assert newest in (before, before + 1) and meta == {"step": newest}
            assert all((np.asarray(weight) == newest).all() for weight in params.values())
        zygote.stdin.close()
    Checkpointer(tmp_path, 2)
    names = [f"step_{step:08d}" for step in (newest - 2, newest - 1, newest)]
    # One more where the kill came between a save and the removal of the oldest, which the next save then removes.
    assert sorted(path.name for path in tmp_path.iterdir()) in (names[1:], names)
