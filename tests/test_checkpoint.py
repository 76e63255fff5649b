"""Checkpoints: a round trip on any mesh, and no way to end up with half of one."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from nanochat_jax.checkpoint import Checkpointer, restore_params
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


def test_round_trip_between_meshes(tmp_path):
    eight = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    four = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec(None, "data"))
    tree = state(sharding=eight)
    Checkpointer(tmp_path, 2).save(3, tree, {"loader": {"epoch": 1}})
    for sharding in (four, None):
        restored, meta, step = Checkpointer(tmp_path, 2).restore(None, spec(tree, sharding))
        assert_same(restored, tree)
        assert (meta, step) == ({"loader": {"epoch": 1}}, 3)
        assert len(restored["params"]["block"]["w"].sharding.device_set) == (4 if sharding else 1)


def test_params_alone(tmp_path):
    tree = state()
    Checkpointer(tmp_path, 2).save(3, tree, {"stage": "base"})
    before = sorted(tmp_path.rglob("*"))
    for target in (None, spec(tree["params"])):
        params, meta, step = restore_params(tmp_path, target)
        assert_same(params, tree["params"])
        assert (meta, step) == ({"stage": "base"}, 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpointer(tmp_path, 2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        checkpoints.save(step, state(step), {})
    assert checkpoints.latest() == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]
    assert checkpoints.restore(10, None)[0]["params"]["block"]["w"][0, 0] == 10


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
    checkpoints = Checkpointer(tmp_path, 2)
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.save(2, state(2), {"step": 2})
    newest = tmp_path / "step_00000002"
    victim = largest_file(newest) if which == "state" else newest / which
    damage(victim, how)
    if (which, how) == ("manifest.json", "flipped"):
        victim.write_text(victim.read_text().replace('"sha256": "', '"sha256": "0', 1))
    tree, meta, step = checkpoints.restore(None, None)
    assert (step, meta, float(tree["params"]["block"]["w"][0, 0])) == (1, {"step": 1}, 1.0)
    said = capsys.readouterr().err
    assert str(newest) in said
    assert (how == "truncated" and which != "manifest.json") == ("bytes instead of" in said)
    with pytest.raises(UserError, match="no undamaged checkpoint of step 2"):
        checkpoints.restore(2, None)
    damage(largest_file(tmp_path / "step_00000001"), how)
    with pytest.raises(UserError, match="no undamaged checkpoint in"):
        checkpoints.restore(None, None)


def test_going_on_after_a_fallback_replaces_what_was_damaged(tmp_path):
    checkpoints = Checkpointer(tmp_path, 2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {})
    flip(largest_file(tmp_path / "step_00000003"))
    checkpoints.save(2, state(20), {})
    assert checkpoints.latest() == 2
    assert checkpoints.restore(None, None)[0]["params"]["block"]["w"][0, 0] == 20


def test_leftovers_of_a_killed_writer(tmp_path):
    Checkpointer(tmp_path, 2).save(1, state(1), {})
    (tmp_path / "tmp-step_00000002" / "state").mkdir(parents=True)
    (tmp_path / "step_00000001").rename(tmp_path / "old-step_00000001")  # killed between the two renames
    checkpoints = Checkpointer(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.restore(None, None)[2] == 1


def test_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, 1)
    checkpoints.save(1, state(1), {})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*step_00000002"):
        checkpoints.save(2, state(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.restore(None, None)[2] == 1


def test_other_shapes_and_formats_are_refused(tmp_path):
    checkpoints = Checkpointer(tmp_path, 1)
    tree = state()
    checkpoints.save(1, tree, {})
    target = spec(tree)
    target["params"]["block"]["w"] = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=target["params"]["wte"].sharding
    )
    with pytest.raises(UserError, match=re.escape("params/block/w is (8, 8) in the checkpoint and (8, 4)")):
        checkpoints.restore(None, target)
    del target["params"]["block"]
    with pytest.raises(UserError, match=re.escape("params/block/w is (8, 8) in the checkpoint and absent")):
        checkpoints.restore(None, target)
    manifest = tmp_path / "step_00000001" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoints.restore(None, None)


def test_nothing_to_restore(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_params(tmp_path)


def test_sigkill_leaves_whole_checkpoints(tmp_path):
    program = (
        "import sys, jax.numpy as jnp; from pathlib import Path; from nanochat_jax.checkpoint import Checkpointer\n"
        "checkpoints = Checkpointer(Path(sys.argv[1]), 2)\n"
        "for step in range(10**6): checkpoints.save(step, {'params': {'w': jnp.full((300, 300), step)}}, {}); print(step, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 5:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    checkpoints = Checkpointer(tmp_path, 2)
    params, _, step = restore_params(tmp_path)
    assert step == checkpoints.latest() >= 5
    assert (np.asarray(params["w"]) == step).all()
    assert not list(tmp_path.glob("tmp-*"))
