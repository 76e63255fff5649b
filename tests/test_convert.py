"""Checkpoints of nanochat become runs here: the same logits, and nothing that a file says is run."""

import contextlib
import json
import os
import pickle
import struct
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken

from nanochat_jax import cli, model, run
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.convert import read_tokenizer
from nanochat_jax.errors import UserError
from nanochat_jax.inference.decoding import empty_cache, prepare, step
from nanochat_jax.model import count_params, flops_per_token, param_shapes
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import SPECIALS
from nanochat_jax.torch_file import read_state_dict
from nanochat_jax.train import restored_state, saved_shapes, saved_tree, with_optimizer
from tests.torch_writer import BFLOAT16, TorchTensor, torch_save

forward = jax.jit(model.forward, static_argnums=1)
SIZES = {"sequence_len": 32, "vocab_size": 512, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
JULY = SIZES | {"window_pattern": "SL"}
MODEL = ModelConfig(depth=3, aspect_ratio=21, head_dim=16, n_kv_head=2, sequence_len=32, window_pattern="SL")
FIRST_SWITCHES = {"value_embeds": False, "lambdas": False, "smear": False, "backout": False}
PATTERN = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def nanochat_state(params: dict, n_layer: int) -> dict[str, np.ndarray]:
    """Our parameters of the newest architecture under nanochat's names, [out, in]."""
    p = params
    state = {"transformer.wte.weight": p["wte"]["embedding"], "lm_head.weight": p["lm_head"]["kernel"].T}
    state |= {"smear_gate.weight": p["smear_gate"]["kernel"].T}
    state |= {"resid_lambdas": p["resid_lambda"], "x0_lambdas": p["x0_lambda"]}
    state |= {name: p[name] for name in ("smear_lambda", "backout_lambda")}
    for i in range(n_layer):
        attn, mlp, at = p[f"h_{i}"]["attn"], p[f"h_{i}"]["mlp"], f"transformer.h.{i}"
        state |= {f"{at}.attn.c_{name}.weight": attn[name]["kernel"].T for name in ("q", "k", "v", "proj")}
        state |= {f"{at}.mlp.c_{name}.weight": mlp[name]["kernel"].T for name in ("fc", "proj")}
        if f"value_embed_{i}" in p:
            state |= {f"value_embeds.{i}.weight": p[f"value_embed_{i}"]["embedding"]}
            state |= {f"{at}.attn.ve_gate.weight": attn["ve_gate"]["kernel"].T}
    return state


@pytest.fixture(scope="module")
def july() -> tuple[GPTConfig, dict]:
    """The architecture of July 2026 and parameters of which none is zero."""
    cfg = GPTConfig.from_depth(MODEL, 512)
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(lambda p: (0.2 * rng.standard_normal(p.shape)).astype(p.dtype), param_shapes(cfg))


@pytest.fixture
def state(july) -> dict[str, np.ndarray]:
    return nanochat_state(july[1], 3)


def random_first_release(vocab_size: int, layers: int) -> dict[str, np.ndarray]:
    """Random weights of the first release: the vocabulary not padded, the embedding in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = {"transformer.wte.weight": (vocab_size, 64), "lm_head.weight": (vocab_size, 64)}
    for i in range(layers):
        at = f"transformer.h.{i}"
        shapes |= {f"{at}.attn.c_{name}.weight": (rows, 64) for name, rows in zip("qkv", (64, 32, 32), strict=True)}
        shapes |= {f"{at}.attn.c_proj.weight": (64, 64)}
        shapes |= {f"{at}.mlp.c_fc.weight": (256, 64), f"{at}.mlp.c_proj.weight": (64, 256)}
    weights = {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return weights | {"transformer.wte.weight": weights["transformer.wte.weight"].astype(BFLOAT16)}


def pickled_tokenizer(folder: Path, tokenizer, merges: int | None = None, pattern: str = PATTERN, **changes) -> Path:
    """tokenizer.pkl as nanochat writes it, of the first `merges` ordinary tokens."""
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - len(SPECIALS))][:merges]
    parts = {"pat_str": pattern, "mergeable_ranks": {token: i for i, token in enumerate(tokens)}}
    parts |= {"special_tokens": {name: len(tokens) + i for i, name in enumerate(SPECIALS)}}
    encoding = tiktoken.Encoding(name="rustbpe", **parts)
    # What a tokenizer is made of can be changed to what tiktoken itself would not make.
    encoding.__dict__.update({"_mergeable_ranks" if k == "ranks" else "_special_tokens": v for k, v in changes.items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return folder


@pytest.fixture
def home(tmp_path, tokenizer, state):
    """nanochat's folder with two checkpoints of a base model; --checkpoint is what it returns."""
    folder = tmp_path / "home" / "base_checkpoints" / "d3"
    write_checkpoint(folder, 7, {f"_orig_mod.{name}": value for name, value in state.items()}, JULY)
    write_checkpoint(folder, 12, {name: value + 1 for name, value in state.items()}, JULY)
    pickled_tokenizer(tmp_path / "home" / "tokenizer", tokenizer)
    return folder


def write_checkpoint(folder: Path, step: int, state: dict, sizes: dict, **meta) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"step": step, "model_config": sizes, "user_config": {"depth": 3, "aspect_ratio": 21}} | meta
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return torch_save(folder / f"model_{step:06d}.pt", state)


def convert(checkpoint: Path, workdir: Path, *options: object) -> int:
    words = ["convert", "from-nanochat", "--checkpoint", checkpoint, "--workdir", workdir, *options]
    return cli.main([str(word) for word in words])


def refused(capsys, checkpoint: Path, workdir: Path, *options: object) -> str:
    """The one line that a refused conversion ends with; nothing is written by it."""
    capsys.readouterr()
    before = sorted(workdir.rglob("*"))
    assert convert(checkpoint, workdir, *options) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert sorted(workdir.rglob("*")) == before
    return lines[-1]


def test_special_tokens_of_ones_own_come_along(home, tmp_path, tokenizer):
    names = {name: 502 + i for i, name in enumerate((*SPECIALS, "<|think|>"))}
    pickled_tokenizer(home.parents[1] / "tokenizer", tokenizer, 502, specials=names)
    assert convert(home, tmp_path / "run") == 0
    assert run.read_config(tmp_path / "run").tokenizer.specials == ("<|think|>",)
    assert run.load_model(tmp_path / "run")[2].specials == names


def test_newest_architecture_keeps_its_logits(home, tmp_path, july, capsys):
    workdir = tmp_path / "run"
    assert convert(home, workdir, "--step", 7) == 0
    assert not capsys.readouterr().out, "progress goes to stderr"
    params, cfg, tokenizer, stage, step = run.load_model(workdir)
    assert (replace(cfg, native=False), stage, step) == (july[0], "base", 7)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 32), dtype=np.int32)
    np.testing.assert_array_equal(forward(params, cfg, tokens), forward(july[1], july[0], tokens))
    config = run.read_config(workdir)
    assert config.model == MODEL and config.tokenizer.vocab_size == 512
    assert tokenizer.encode("ab 12 <|bos|>") == read_tokenizer(home.parents[1] / "tokenizer")._encoding.encode_ordinary(
        "ab 12 <|bos|>"
    )
    done = run.finished(workdir, "base")
    assert done["steps"] == 7 and done["params"] == count_params(cfg)["total"]
    assert done["nanochat"]["model_config"] == JULY and run.finished(workdir, "tokenizer")["vocab_size"] == 512


def test_several_stages_of_one_run(home, tmp_path, state, capsys, tokenizer):
    workdir = tmp_path / "run"
    assert convert(home, workdir) == 0
    assert run.load_model(workdir)[4] == 12, "the newest step"
    sft = home.parents[1] / "chatsft_checkpoints" / "d3"
    write_checkpoint(sft, 3, state, JULY, user_config=None)
    assert convert(sft, workdir) == 0
    assert run.load_model(workdir)[3:] == ("sft", 3), "named after nanochat's folder"
    assert "another --stage" in refused(capsys, sft, workdir)
    other = pickled_tokenizer(tmp_path / "other", tokenizer, pattern=r"\S+|\s+")
    assert "another tokenizer" in refused(capsys, sft, workdir, "--stage", "rl", "--tokenizer", other)
    assert convert(sft, workdir, "--stage", "rl", "--tokenizer", home.parents[1] / "tokenizer" / "tokenizer.pkl") == 0


def test_a_conversion_that_was_killed_is_made_again(home, tmp_path, capsys):
    """By whatever checkpoint is named then; what training has made stays."""
    workdir = tmp_path / "run"
    assert convert(home, workdir) == 0
    (workdir / "base" / "done.json").unlink()
    assert convert(home, workdir, "--step", 7) == 0
    assert run.finished(workdir, "base")["steps"] == run.load_model(workdir)[4] == 7
    (workdir / "base" / "done.json").unlink()
    meta = workdir / "base" / "checkpoints" / "step_00000007" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"seconds": 1.0}))
    assert "has a model already" in refused(capsys, home, workdir)


def first_release(w: dict[str, np.ndarray], tokens: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Logits of nanochat's first release for one row, in float64 NumPy."""
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def rms(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)

    x = rms(w["transformer.wte.weight"][tokens])
    length, width = x.shape
    half = width // heads // 2
    angle = np.arange(length)[:, None] / 10000 ** (np.arange(half) / half)[None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def turned(y):
        a, b = y[..., :half], y[..., half:]
        return rms(np.concatenate([a * cos + b * sin, b * cos - a * sin], -1))

    for i in range(sum(name.endswith("c_fc.weight") for name in w)):
        at, h = f"transformer.h.{i}", rms(x)
        q = turned((h @ w[f"{at}.attn.c_q.weight"].T).reshape(length, heads, -1))
        k = turned((h @ w[f"{at}.attn.c_k.weight"].T).reshape(length, kv_heads, -1)).repeat(heads // kv_heads, 1)
        v = (h @ w[f"{at}.attn.c_v.weight"].T).reshape(length, kv_heads, -1).repeat(heads // kv_heads, 1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(2 * half) + np.triu(np.full((length, length), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, width) @ w[f"{at}.attn.c_proj.weight"].T
        hidden = np.maximum(rms(x) @ w[f"{at}.mlp.c_fc.weight"].T, 0) ** 2
        x = x + hidden @ w[f"{at}.mlp.c_proj.weight"].T
    return 15 * np.tanh(rms(x) @ w["lm_head.weight"].T / 15)


def test_first_release_keeps_its_logits(tmp_path, tokenizer):
    folder, workdir = tmp_path / "home" / "base_checkpoints" / "d2", tmp_path / "run"
    state = random_first_release(409, layers=2)
    write_checkpoint(folder, 5, state, SIZES | {"vocab_size": 409, "n_layer": 2})
    pickled_tokenizer(tmp_path / "home" / "tokenizer", tokenizer, merges=400)
    assert convert(folder, workdir) == 0
    said = json.loads((workdir / "config.json").read_text())["config"]["model"]
    assert said["rope_base"] == 10_000 and said["qk_scale"] == 1 and said["window_pattern"] == "L"
    assert {name: said[name] for name in FIRST_SWITCHES} == FIRST_SWITCHES
    params, cfg, *_ = run.load_model(workdir)
    assert cfg.windows == (32, 32) and params.keys() == {"wte", "lm_head", "h_0", "h_1"}
    tokens = np.random.default_rng(1).integers(0, 409, 32)
    expected = first_release(state, tokens, heads=4, kv_heads=2)
    np.testing.assert_allclose(forward(params, cfg, jnp.asarray(tokens)[None])[0], expected, atol=3e-5)

    # Token by token the cache must agree, though there is no smear to keep an embedding for.
    weights, cache = prepare(params, cfg), empty_cache(cfg, 1, 8)
    advance = jax.jit(step, static_argnames="cfg")
    for position in range(8):
        at = jnp.asarray([position])
        logits_VB, cache = advance(weights, cache, tokens[at], at, jnp.zeros(1, int), jnp.ones(1, bool), cfg=cfg)
        np.testing.assert_allclose(logits_VB[:, 0], expected[position], atol=3e-5)


def test_counts_leave_out_what_an_architecture_lacks():
    sizes = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "sequence_len": 64, "window_pattern": "L"}
    cfg = GPTConfig.from_depth(ModelConfig(**sizes, **FIRST_SWITCHES), 100)
    blocks = 2 * 12 * 32 * 32
    counts = {"wte": 128 * 32, "value_embeds": 0, "lm_head": 128 * 32, "blocks": blocks, "scalars": 0}
    assert count_params(cfg) == counts | {"total": sum(counts.values())}
    assert flops_per_token(cfg) == 6 * (blocks + 128 * 32) + 2 * 12 * 32 * 64
    for name in FIRST_SWITCHES:
        alone = GPTConfig.from_depth(ModelConfig(**sizes, **{name: False}), 100)
        gone = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(GPTConfig.from_depth(ModelConfig(**sizes), 100))))
        gone -= count_params(alone)["total"]
        # A gate of 12 channels for 2 heads, a table; 2 a layer; 24 channels and a factor; one factor.
        assert gone == {"value_embeds": 24 + 128 * 32, "lambdas": 4, "smear": 25, "backout": 1}[name]


def test_optimizer_without_some_groups_survives_a_checkpoint():
    cfg = GPTConfig.from_depth(ModelConfig(1, 16, 16, sequence_len=64, **FIRST_SWITCHES), 64)
    mesh = make_mesh("2")
    state = with_optimizer(cfg, mesh, jax.tree.map(lambda p: np.ones(p.shape, p.dtype), param_shapes(cfg)))
    with jax.set_mesh(mesh):
        tree = saved_tree(state, cfg=cfg)
    assert jax.tree.structure(tree) == jax.tree.structure(saved_shapes(cfg, mesh))
    back = restored_state(cfg, mesh, tree)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(back))


def test_training_goes_on_from_a_converted_model(tmp_path, tokenizer):
    """The next stage takes the weights, here of the first release, and saves its own."""
    experiment = Path(__file__).parent / "tiny.py"
    folder, workdir = tmp_path / "home" / "base_checkpoints" / "d1", tmp_path / "run"
    write_checkpoint(folder, 5, random_first_release(512, layers=1), SIZES | {"sequence_len": 64, "n_layer": 1})
    pickled_tokenizer(tmp_path / "home" / "tokenizer", tokenizer)
    assert convert(folder, workdir, "--experiment", experiment) == 0
    one = ["--mid.stop-after", "1", "--mid.init-lr-frac", "1e-9", "--mid.val-rows", "0"]
    assert cli.main(["mid", "--workdir", str(workdir), *one]) == 0
    before, after = (run.load_model(workdir, stage)[0] for stage in ("base", "mid"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)


def test_runs_from_before_the_switches_go_on(home, tmp_path):
    workdir = tmp_path / "run"
    assert convert(home, workdir) == 0
    record = json.loads((workdir / "config.json").read_text())
    for name in ("rope_base", "qk_scale", *FIRST_SWITCHES):
        del record["config"]["model"][name]
    (workdir / "config.json").write_text(json.dumps(record))
    config = run.read_config(workdir)
    assert config.model == MODEL
    run.open_run(config, workdir)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_of_all_types(tmp_path, name):
    values = (np.arange(24).reshape(2, 3, 4) % 7).astype(BFLOAT16 if name == "bfloat16" else name)
    views = {
        "whole": TorchTensor(values),
        "part": TorchTensor(values, (2, 4), (4, 1), offset=12),
        "scalar": TorchTensor(values, (), (), offset=23),
    }
    read = read_state_dict(torch_save(tmp_path / "a.pt", views))
    assert all(array.dtype == values.dtype for array in read.values())
    np.testing.assert_array_equal(read["whole"], values)
    np.testing.assert_array_equal(read["part"], values[1, :2])
    assert read["scalar"] == values[-1, -1, -1]
    assert len([n for n in zipfile.ZipFile(tmp_path / "a.pt").namelist() if "/data/" in n]) == 1, "one storage"


def test_a_file_of_pytorch_itself():
    """Not by our own writer: the golden checkpoint was written by torch.save."""
    path = next((Path(__file__).parent / "golden").glob("model_*.pt"))
    tensors = read_state_dict(path)
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())
    assert tensors["transformer.wte.weight"].ndim == 2 and len(tensors) > 10


@pytest.mark.parametrize(
    "view",
    [
        {"shape": (3, 9), "stride": (9, 1)},
        {"shape": (4, 6), "stride": (1, 4)},
        {"shape": (2,), "stride": (1,), "offset": 23},
        {"shape": (2,), "stride": (-1,), "offset": 5},
        {"shape": (2,), "stride": (1,), "offset": -1},
        {"shape": (2, 2), "stride": (1,)},
        {"shape": (2.0,), "stride": (1,)},
    ],
)
def test_views_outside_their_storage(tmp_path, view):
    path = torch_save(tmp_path / "a.pt", {"w": TorchTensor(np.zeros(24, np.float32), **view)})
    with pytest.raises(UserError, match=r"a\.pt is damaged"):
        read_state_dict(path)


class Call:
    """Pickles to a call of `function` with `args`, with a state to set where given."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce_ex__(self, protocol):
        return self.reduced


ATTACKS = {
    "posix.system": lambda marker: Call(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "builtins.getattr": lambda marker: Call(getattr, {}, "keys"),
    "io.open": lambda marker: Call(open, str(marker), "w"),
    "subprocess.call": lambda marker: Call(subprocess.call, ["touch", str(marker)]),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {marker}"))),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_nothing_a_pickle_calls_is_run(home, tmp_path, capsys, name, kind):
    marker = tmp_path / "marker"
    attack = ATTACKS[name](marker)
    if kind == "model":
        # Protocol 2 calls Python 3's builtins by the names of Python 2.
        torch_save(home / "model_000012.pt", {"transformer.wte.weight": attack})
    else:
        (home.parents[1] / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(attack))
    line = refused(capsys, home, tmp_path / "run")
    assert "not run" in line and name.split(".")[-1] in line and not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("numpy", "load"),
        ("copyreg", "_reconstructor"),
        ("collections", "OrderedDict.fromkeys"),
        ("tiktoken.core", "Encoding.__init__"),
    ],
    ids=".".join,
)
def test_other_names_are_refused(tmp_path, name):
    # As protocol 4 asks for a name, which may be one inside a class.
    asked = b"".join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in name)
    (tmp_path / "tokenizer.pkl").write_bytes(b"\x80\x04" + asked + pickle.STACK_GLOBAL + b")R.")
    with pytest.raises(UserError, match=rf"asks for {'.'.join(name)}, which is not run"):
        read_tokenizer(tmp_path)


def test_pickles_cannot_change_what_reads_them(tmp_path):
    """A state set on a tensor, or on the functions that stand for PyTorch's, changes nothing."""
    values = np.ones(4, np.float32)

    class Stateful(TorchTensor):
        def __reduce_ex__(self, protocol):
            return (*super().__reduce_ex__(protocol), {"shape": (9, 9)})

    with pytest.raises(UserError, match="damaged"):
        read_state_dict(torch_save(tmp_path / "a.pt", {"w": Stateful(values)}))
    for value in (5, "text", [1], {"nested": TorchTensor(values)}):
        with pytest.raises(UserError, match=f"'w' is a {type(value).__name__}, no tensor"):
            read_state_dict(torch_save(tmp_path / "b.pt", {"w": value}))
    with pytest.raises(UserError, match="holds a list"):
        read_state_dict(torch_save(tmp_path / "c.pt", [TorchTensor(values)]))


def flip_a_byte(data: bytes) -> bytes:
    at = data.index(np.float32(0.123).tobytes())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[: len(data) // 2], "no whole file of torch.save"),
        (lambda data: pickle.dumps({"old": 1}, protocol=2), "no whole file of torch.save since PyTorch 1.6"),
        (lambda data: b"", "no whole file of torch.save"),
        (flip_a_byte, "Bad CRC-32"),
    ],
)
def test_damaged_files(home, tmp_path, capsys, state, damage, said):
    state["x0_lambdas"] = np.full(3, 0.123, np.float32)
    path = torch_save(home / "model_000012.pt", state)
    path.write_bytes(damage(path.read_bytes()))
    line = refused(capsys, home, tmp_path / "run")
    assert said in line and "model_000012.pt" in line


def test_archives_that_are_not_torch_files(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/other", "x")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        read_state_dict(path)
    with pytest.raises(UserError, match="No such file"):
        read_state_dict(tmp_path / "absent.pt")
    torch_save(path, {"w": np.zeros(4, np.float32)})
    whole = zipfile.ZipFile(path)
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    deflated = (tmp_path / "deflated.pt").read_bytes()
    assert read_state_dict(tmp_path / "deflated.pt")["w"].shape == (4,)
    for at in range(1, 80):  # headers of the first member, and what is deflated in it
        (tmp_path / "deflated.pt").write_bytes(deflated[:at] + bytes([deflated[at] ^ 0xFF]) + deflated[at + 1 :])
        with contextlib.suppress(UserError):
            read_state_dict(tmp_path / "deflated.pt")
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name)[: -1 if "/data/" in name else None])
    with pytest.raises(UserError, match=r"short\.pt is damaged"):
        read_state_dict(tmp_path / "short.pt")


def test_versions_in_between_are_refused_by_what_shows_them(home, tmp_path, capsys, state):
    early = {name: value for name, value in state.items() if not name.startswith(("smear", "backout"))}
    early = {n: np.zeros((2, 32), np.float32) if "ve_gate" in n else value for n, value in early.items()}
    write_checkpoint(home, 20, early, JULY)
    line = refused(capsys, home, tmp_path / "run")
    assert "resid_lambdas and 5 more, but no smear_gate.weight" in line
    write_checkpoint(home, 21, random_first_release(512, layers=3), JULY)
    assert "window_pattern SL" in refused(capsys, home, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer.h.1.mlp.c_fc.weight": None}, "lacks transformer.h.1.mlp.c_fc.weight,"),
        ({"smear_gate.weight": None}, "lacks smear_gate.weight,"),
        ({"backout_lambda": None, "smear_lambda": None}, "lacks backout_lambda and 1 more,"),
        ({"transformer.h.3.mlp.c_fc.weight": np.zeros((256, 64))}, "has transformer.h.3.mlp.c_fc.weight,"),
        ({"value_embeds.1.weight": np.zeros((512, 32))}, "has value_embeds.1.weight,"),
        ({"transformer.h.2.attn.ve_gate.weight": np.zeros((2, 32))}, "ve_gate.weight has shape (2, 32)"),
        ({"transformer.h.1.attn.c_proj.weight": np.zeros((64, 32))}, "c_proj.weight has shape (64, 32)"),
        ({"x0_lambdas": np.zeros(3, np.int64)}, "asks for torch.LongStorage"),
    ],
)
def test_every_key_is_used_exactly_once(home, tmp_path, capsys, state, change, said):
    changed = {name: value for name, value in (state | change).items() if value is not None}
    write_checkpoint(home, 20, changed, JULY)
    line = refused(capsys, home, tmp_path / "run")
    assert said in line and "model_000020.pt" in line


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"n_layer": 4}, "lacks transformer.h."),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_head": None}, "n_head is None"),
        ({"n_embd": "64"}, "n_embd is '64'"),
        ({"n_head": 3, "n_kv_head": 3}, "width 64 in 3 heads"),
        ({"rope_theta": 5}, "rope_theta in model_config is not known"),
        ({"window_pattern": "SX"}, "'SX'"),
        ({"vocab_size": 500}, "500 tokens, the tokenizer has 512"),
    ],
)
def test_descriptions_that_cannot_be(home, tmp_path, capsys, state, sizes, said):
    write_checkpoint(home, 20, state, JULY | sizes)
    assert said in refused(capsys, home, tmp_path / "run")


def test_paths_that_lead_nowhere(home, tmp_path, capsys):
    run_ = tmp_path / "run"
    assert "not a folder" in refused(capsys, tmp_path / "absent", run_)
    assert "not a folder" in refused(capsys, home / "model_000012.pt", run_)
    assert "there is in d3" in refused(capsys, home.parent, run_)
    assert "--step 8" in (line := refused(capsys, home, run_, "--step", 8)) and "has 7, 12" in line
    (home / "meta_000012.json").unlink()
    assert "meta_000012.json" in refused(capsys, home, run_)
    assert "no tokenizer at" in refused(capsys, home, run_, "--step", 7, "--tokenizer", home)
    assert "shape of the model" in refused(capsys, home, run_, "--model.depth", 3)
    capsys.readouterr()
    assert cli.main(["convert", "from-nanochat", "--checkpoint", str(home)]) == 2
    assert "--workdir" in capsys.readouterr().err
    assert cli.main(["convert", "--checkpoint", str(home), "--workdir", str(run_)]) == 2
    assert "from-nanochat" in capsys.readouterr().err


def test_tokenizer_with_its_own_pattern(tmp_path, tokenizer):
    folder = pickled_tokenizer(tmp_path / "t", tokenizer)
    ours = read_tokenizer(folder)
    theirs = pickle.loads((folder / "tokenizer.pkl").read_bytes())
    for text in ("The cat's 1234 mats,\n\n ünïcödé <|bos|>", ""):
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert {name: ours.special_id(name) for name in SPECIALS} == theirs._special_tokens
    ours.save(tmp_path / "saved")
    assert type(ours).load(tmp_path / "saved").encode("a1b22") == theirs.encode_ordinary("a1b22")


def test_tokenizers_that_are_none(tmp_path, tokenizer):
    specials = {name: 503 + i for i, name in enumerate(SPECIALS)}
    bytes_only = {bytes([i]): i for i in range(256)}
    for changes, said in (
        ({"specials": specials | {"<|extra|>": 600}}, "without a gap"),
        ({"specials": dict(list(specials.items())[:-1])}, r"<\|output_end\|> is missing"),
        ({"ranks": bytes_only | {3: 256}, "specials": {n: i - 246 for n, i in specials.items()}}, "not a tokenizer"),
        ({"ranks": {b"a": "0"}}, "not a tokenizer"),
        ({"ranks": [b"a"]}, "not a tokenizer"),
    ):
        folder = pickled_tokenizer(tmp_path / "t", tokenizer, **changes)
        with pytest.raises(UserError, match=said):
            read_tokenizer(folder)
    (tmp_path / "t" / "tokenizer.pkl").write_bytes(pickle.dumps({"pat_str": "x"}))
    with pytest.raises(UserError, match="does not hold the vocabulary"):
        read_tokenizer(tmp_path / "t")
    for damaged in (b"", b"\x80\x04", struct.pack("<I", 7), pickle.dumps([1])[:-1]):
        (tmp_path / "t" / "tokenizer.pkl").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or of an unknown kind"):
            read_tokenizer(tmp_path / "t")
