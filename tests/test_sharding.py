"""The mesh: one table for everything, the same losses on any mesh, and which collectives the compiled step holds."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_train import CFG, batches

from nanochat_jax.config import BaseConfig, GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.model import param_shapes
from nanochat_jax.optim import Schedule
from nanochat_jax.replicas import parted
from nanochat_jax.sharding import PARAM_SPECS, by_path, check_mesh, make_mesh, match, put_batch, state_spec
from nanochat_jax.train import born_params, saved_shapes, saved_tree, state_shapes, train_step, with_optimizer
from nanochat_jax.zero import Owners, stacks_of, view

MESHES = ("8", "data=4,fsdp=2", "fsdp=8", "data=4,tensor=2", "data=2,fsdp=2,tensor=2")
STEPS = 20
POSITIONS = 29
"""A length of rows that no dimension of a parameter is a multiple of, by which activations are known in the HLO."""
# At first the lambdas have a gradient of rounding noise alone (blocks whose output is 0 and a norm behind them make the
# loss blind to them), which AdamW scales to full steps of either sign. The warm-up of a real run keeps these small.
SCHEDULE = Schedule(BaseConfig(warmdown_ratio=0.2), 100, CFG.n_embd, lr_scale=0.1, weight_decay=0.1)


def train(spec):
    mesh, losses = make_mesh(spec), []
    state = with_optimizer(CFG, mesh, born_params(CFG, mesh, 0))
    with jax.set_mesh(mesh):
        for step, batch in enumerate(batches(STEPS)):
            state, metrics = train_step(state, put_batch(batch, mesh, leading=1), SCHEDULE.hyper(step), cfg=CFG)
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return state, np.asarray(losses)


@pytest.fixture(scope="module")
def alone():
    return train("1")


@pytest.fixture(scope="module", params=MESHES)
def trained(request):
    return request.param, *train(request.param)


def test_any_mesh_gives_the_losses_of_one_device(alone, trained):
    assert alone[1][-1, 0] < alone[1][0, 0] - 0.3
    np.testing.assert_allclose(trained[2], alone[1], rtol=1e-4)  # losses and gradient norms of every step


def test_any_mesh_gives_the_parameters_of_one_device(alone, trained):
    for name in ("wte", "lm_head", "value_embed_1", "h_0", "h_1"):
        for a, b in zip(*(jax.tree.leaves(state.params[name]) for state in (alone[0], trained[1])), strict=True):
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) < 1e-3 * np.linalg.norm(a)


def test_replicated_values_are_the_same_on_all_devices(trained):
    for path, leaf in by_path(trained[1]).items():
        parts = {}
        for shard in leaf.addressable_shards:
            same = parts.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(same, np.asarray(shard.data), err_msg=path)


def test_copies_that_differ_between_devices_are_found(trained):
    spec, state, _ = trained
    with jax.set_mesh(make_mesh(spec)):
        assert parted(state) == []
        for path in ("resid_lambda", "wte/embedding"):
            x = by_path(state.params)[path]
            if spec == "fsdp=8" and "wte" in path:
                continue  # no two devices hold the same rows of the table
            parts = [np.array(shard.data) for shard in x.addressable_shards]
            parts[5].reshape(-1)[1] *= 1 + 2**-7  # one number on one device, one bit of bfloat16
            put = [jax.device_put(part, shard.device) for part, shard in zip(parts, x.addressable_shards, strict=True)]
            odd = jax.make_array_from_single_device_arrays(x.shape, x.sharding, put)
            leaves = {**by_path(state.params), path: odd}
            changed = jax.tree.unflatten(jax.tree.structure(state.params), leaves.values())
            assert parted(state._replace(params=changed)) == [f"params/{path}"]


def test_the_devices_of_tensor_take_one_gradient_of_what_all_hold():
    """Though each computes its own, which on a GPU may differ by rounding."""
    mesh = make_mesh("data=4,tensor=2")
    params = param_shapes(CFG)
    owners = Owners.of(params, mesh)

    def reduced():
        own = 1 + jax.lax.axis_index("tensor")
        whole = {path: np.ones(mesh_shape(path, x.shape)) * own for path, x in by_path(params).items()}
        view = owners.reduced(whole)
        return {path: view[path][None, None] for path in ("wte/embedding", "resid_lambda", "lm_head/kernel")}

    def mesh_shape(path, shape):
        specs = (*match(path, PARAM_SPECS), *[None] * len(shape))
        return tuple(n // (mesh.shape[axis] if axis else 1) for n, axis in zip(shape, specs, strict=False))

    with jax.set_mesh(mesh):
        on_each = jax.shard_map(reduced, in_specs=(), out_specs=P("tensor", "data"), check_vma=False)()
    for path, x in on_each.items():
        second = 8 if path == "lm_head/kernel" else 4  # what is cut over `tensor` is each device's own
        assert np.all(x[0] == 4) and np.all(x[1] == second), path


def test_each_device_holds_its_share_of_the_state(alone, trained):
    spec, state, _ = trained
    whole = by_path(alone[0].opt_state)
    for path, leaf in by_path(state.opt_state).items():
        size = whole[path].nbytes
        if "stack/" in path:  # an eighth of the matrices, rounded up to whole ones
            share = -(-whole[path].shape[0] // 8) * (size // whole[path].shape[0])
        else:
            share = size // 8 if size > 256 else size  # a few lambdas do not divide
            # fsdp and tensor cut what the table cuts, whether or not `data` divides the rest
            share = share if spec in ("8", "data=4,fsdp=2", "fsdp=8") else size
        assert leaf.addressable_shards[0].data.nbytes <= max(share, 64), path
    if spec == "8":
        for leaf in jax.tree.leaves(state.params):
            assert leaf.sharding.is_fully_replicated
    if "fsdp" in spec:
        kernel = state.params["h_0"]["mlp"]["fc"]["kernel"]
        assert kernel.addressable_shards[0].data.size < kernel.size


def test_no_device_holds_the_whole_optimizer_while_it_is_saved(trained):
    spec, state, _ = trained
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        tree = saved_tree(state, cfg=CFG)
    wanted = saved_shapes(CFG, mesh)
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, wanted)
    moments = {path: x for path, x in by_path(tree["optimizer"]).items() if not path.endswith(("second", "count"))}
    large = [x for x in moments.values() if x.size >= 1024]
    parts = 8 if "tensor" not in spec else 4  # the token embedding is not cut over `tensor`
    assert sum(x.addressable_shards[0].data.nbytes for x in large) <= sum(x.nbytes for x in large) / parts
    for path, x in by_path(wanted["optimizer"]).items():
        assert x.sharding.is_equivalent_to(by_path(tree["optimizer"])[path].sharding, x.ndim), path


def view_shapes(devices):
    return jax.eval_shape(lambda params: view(params, devices), param_shapes(CFG))


def collectives(spec, microbatches):
    """(name, shape of its result, whether in a loop) of every collective of the compiled step, with their number."""
    mesh = make_mesh(spec)
    batch = next(batches(1, microbatches, rows=4 * microbatches))
    batch = {name: x[..., :POSITIONS] for name, x in batch.items()}
    with jax.set_mesh(mesh):
        lowered = train_step.lower(
            state_shapes(CFG, mesh), put_batch(batch, mesh, leading=1), SCHEDULE.hyper(0), cfg=CFG
        )
        text = lowered.compile().as_text()
    found, in_entry = Counter(), False
    for line in text.splitlines():
        if line.endswith("{") and ") -> " in line:
            in_entry = line.startswith("ENTRY")
        names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
        if operation := re.search(rf"= (.+?) ({names})(?:-start)?\(", line):
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", operation[1]):
                if kind != "s32":  # the count of targets
                    found[operation[2], tuple(map(int, filter(None, shape.split(",")))), not in_entry] += 1
    return found


def test_gradients_are_reduced_once_a_step_whatever_the_accumulation():
    whole = view_shapes(8)
    reduced = Counter()
    for path, leaf in whole.items():
        cut = next((i for i, axes in enumerate(state_spec(path, leaf.shape, make_mesh("8"))) if axes), None)
        shape = tuple(n // 8 if i == cut else n for i, n in enumerate(leaf.shape))
        reduced["all-reduce" if cut is None else "reduce-scatter", shape, False] += 1
    reduced["all-reduce", (), False] += 2  # the loss and the norm of the gradient
    gathered = Counter(
        ("all-gather", leaf.shape, False)
        for path, leaf in whole.items()
        if any(state_spec(path, leaf.shape, make_mesh("8")))
    )
    for microbatches in (1, 4):
        assert collectives("8", microbatches) == reduced + gathered


@pytest.mark.parametrize("spec", MESHES[1:])
def test_no_collective_gathers_activations(spec):
    found = collectives(spec, 2)
    assert any(name == "all-gather" for name, _, _ in found)
    for name, shape, in_loop in found:
        if name in ("all-gather", "all-to-all", "collective-permute"):
            assert all(size % POSITIONS for size in shape), (name, shape)
            assert not in_loop or name == "all-gather", (name, shape)
    # The check can see activations: with `tensor` the sums behind each layer's products are all-reduced.
    reduced = [shape for name, shape, _ in found if name == "all-reduce" and POSITIONS in shape]
    assert bool(reduced) == ("tensor" in spec)


def test_every_parameter_has_exactly_one_rule():
    shapes = param_shapes(CFG)
    for path in (*by_path(shapes), *view_shapes(1)):
        match(path, PARAM_SPECS)
    assert sum(map(len, stacks_of(shapes).values())) == sum("h_" in path for path in by_path(shapes))
    with pytest.raises(KeyError, match="newcomer"):
        match("h_0/newcomer/kernel", PARAM_SPECS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("9", "needs 9 devices"), *((spec, "a number of devices") for spec in ("model=2", "0", "x", "data=2,data=4"))],
)
def test_impossible_meshes_are_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        make_mesh(spec)
    assert "\n" not in str(error.value)


def test_heads_that_do_not_divide_are_one_clear_line():
    with pytest.raises(UserError, match="divisor of 2"):
        check_mesh(make_mesh("tensor=4"), GPTConfig.from_depth(ModelConfig(2, 16, 16, 2, 32), 128))
