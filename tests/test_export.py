"""A model as a folder for Hugging Face: weights, vocabulary and chat format are this program's own.

What transformers computes from it: tests/slow/test_transformers.py.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path

import jax
import jinja2
import ml_dtypes
import numpy as np
import pytest
import tiny
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import load_file
from test_cli import expect_error

from nanochat_jax import cli, export, model
from nanochat_jax import run as runs
from nanochat_jax.checkpoint import Checkpointer
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.model import param_shapes
from nanochat_jax.sharding import by_path
from nanochat_jax.tokenizer import Tokenizer

TEXTS = [
    "Hello, it's 1234567 -- déjà vu!  Two  spaces,\ttabs\r\n\r\nand lines\n   indented",
    "def f(x):\n    return x**2 + 0x1F  # done",
    "Ζεύς 你好，世界 🙂👩‍👩‍👧 नमस्ते",
    "\x00\x01\x7f\u00a0\u2003 trailing   ",
    "I'M THEY'LL we've o'clock",
    "",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 12 + 7?"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "So: "},
                {"type": "python", "text": "12+7"},
                {"type": "python_output", "text": "19"},
                {"type": "text", "text": "19."},
            ],
        },
        {"role": "user", "content": "  and\nnow? "},
        {"role": "assistant", "content": "Nothing."},
    ],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run with a base and an rl model of random weights."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    runs.open_run(tiny.config, workdir, log=print)
    tokenizer.save(workdir / "tokenizer")
    cfg = GPTConfig.from_depth(tiny.config.model, tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), param_shapes(cfg))
    for stage in ("base", "rl"):
        checkpoints = Checkpointer(workdir / stage / "checkpoints", 1)
        checkpoints.save(3, {"params": params}, {})
        checkpoints.wait()
    return workdir


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The newest model of the run, exported by the command line."""
    out = tmp_path_factory.mktemp("export") / "hf"
    assert cli.main(["convert", "to-hf", "--workdir", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def hf(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_weights_are_the_runs(run, folder):
    params, _, _, stage, _ = runs.load_model(run)
    assert stage == "rl"
    weights = load_file(folder / "model.safetensors")
    flat = by_path(params)
    assert len(weights) == len(flat)
    np.testing.assert_array_equal(weights["transformer.h.1.attn.c_q.weight"], flat["h_1/attn/q/kernel"].T)
    np.testing.assert_array_equal(weights["transformer.h.0.mlp.c_proj.weight"], flat["h_0/mlp/proj/kernel"].T)
    np.testing.assert_array_equal(weights["resid_lambdas"], flat["resid_lambda"])
    np.testing.assert_array_equal(weights["value_embeds.1.weight"], flat["value_embed_1/embedding"])
    assert {weight.dtype for weight in weights.values()} == {np.dtype("float32")}


def test_rows_that_pad_the_vocabulary_stay_behind():
    cfg = GPTConfig.from_depth(ModelConfig(depth=2, aspect_ratio=16, head_dim=16, sequence_len=64), 500)
    rng = np.random.default_rng(0)
    params = {path: rng.standard_normal(shape.shape) for path, shape in by_path(param_shapes(cfg)).items()}
    weights = export.tensors(params, cfg, "bfloat16")
    assert params["wte/embedding"].shape[0] == params["lm_head/kernel"].shape[1] == 512
    for name, path in (("transformer.wte", "wte/embedding"), ("value_embeds.1", "value_embed_1/embedding")):
        expected = params[path][:500].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(weights[f"{name}.weight"], expected)
    np.testing.assert_array_equal(
        weights["lm_head.weight"], params["lm_head/kernel"].T[:500].astype(ml_dtypes.bfloat16)
    )


def test_the_models_code_takes_what_config_json_says(folder):
    """transformers is not here to ask; what it would complain of are names that its class does not know."""
    config = json.loads((folder / "config.json").read_text())
    tree = ast.parse((folder / "modeling_nanochat_jax.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in (*config["architectures"], *(target.split(".")[1] for target in config["auto_map"].values())):
        assert name in classes
    constants = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    for name in ("EPS", "SOFTCAP", "SMEAR_CHANNELS", "GATE_CHANNELS"):
        assert ast.literal_eval(constants[name]) == getattr(model, name)
    init = next(node for node in classes["NanochatJaxConfig"].body if getattr(node, "name", "") == "__init__")
    general = {"architectures", "auto_map", "model_type", "dtype", "bos_token_id"}
    # tie_word_embeddings and use_cache are the same in all models.
    assert config.keys() - general == {argument.arg for argument in init.args.args} - {"self", "use_cache"}
    assert config["windows"] == [128, 64] and config["value_embed_layers"] == [1]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_same_tokens(run, hf, text):
    ours = Tokenizer.load(run / "tokenizer")
    assert hf.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert hf.encode(text).ids == [ours.bos_id, *ours.encode(text)]
    assert hf.decode(ours.encode(text)) == text


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("answering", [False, True])
def test_conversations_have_the_same_tokens(run, folder, hf, messages, answering):
    ours = Tokenizer.load(run / "tokenizer")
    template = jinja2.Template((folder / "chat_template.jinja").read_text())
    if answering:
        expected = ours.render_for_completion({"messages": messages})
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    else:
        expected, _ = ours.render({"messages": messages})
    text = template.render(messages=messages, add_generation_prompt=answering)
    assert hf.encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "19"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    ],
)
def test_what_the_model_has_never_seen_is_refused(folder, message):
    def refused(text):
        raise UserError(text)

    template = jinja2.Template((folder / "chat_template.jinja").read_text())
    with pytest.raises(UserError):
        template.render(messages=[{"role": "user", "content": "Hi"}, message], raise_exception=refused)


def test_a_pattern_of_ones_own_is_warned_about(run, tmp_path):
    """Of such a pattern tokenizers' engine makes an error, or something else."""
    params, cfg, tokenizer, _, _ = runs.load_model(run)
    said, own = [], Tokenizer(tokenizer.ranks, "(?s).{1,2}")
    for one in (tokenizer, own):
        export.to_hf(params, cfg, one, "run/sft", 1, tmp_path / f"hf{len(said)}", "float32", said.append)
    assert [line for line in said if "Oniguruma" in line] == [said[1]] and "(?s).{1,2}" in said[1]


def test_an_answer_ends_where_the_engine_ends_it(run, folder):
    ours = Tokenizer.load(run / "tokenizer")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted([ours.special_id("<|assistant_end|>"), ours.bos_id])


def test_a_base_model_continues_text(run, tmp_path):
    out = tmp_path / "base-hf"
    words = ["--stage", "base", "--step", "3", "--dtype", "bfloat16"]
    assert cli.main(["convert", "to-hf", "--workdir", str(run), "--out", str(out), *words]) == 0
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|bos|>"
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    card = (out / "README.md").read_text()
    assert "stage base" in card and 'from_pretrained("base-hf"' in card and "apply_chat_template" not in card


def test_what_a_run_was_trained_with_need_not_run_here(run, tmp_path, monkeypatch):
    """A run of a GPU, exported on a laptop."""
    read = runs.read_config
    monkeypatch.setattr(runs, "read_config", lambda path: replace(read(path), attention="cudnn"))
    assert cli.main(["convert", "to-hf", "--workdir", str(run), "--out", str(tmp_path / "hf")]) == 0


def test_all_or_nothing(capsys, run, tmp_path, monkeypatch):
    words = ["convert", "to-hf", "--workdir", run, "--out", tmp_path / "hf"]

    def full(*args):
        Path(args[1]).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    expect_error(capsys, words, 1, "No space left on device", "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hf").mkdir()
    expect_error(capsys, words, 1, f"--out {tmp_path / 'hf'} is there already")
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for out, complaint in (("file/hf", "Not a directory"), ("n" * 300, "too long"), ("nowhere", "already")):
        expect_error(capsys, [*words[:-1], tmp_path / out], 1, "--out", complaint)


def test_options_of_the_other_direction(capsys, run, tmp_path):
    words = ["convert", "to-hf", "--workdir", run]
    expect_error(capsys, words, 2, "to-hf needs --out")
    expect_error(capsys, [*words, "--out", tmp_path / "a", "--checkpoint", tmp_path], 2, "no --checkpoint")
    expect_error(capsys, [*words, "--out", tmp_path / "a", "--model.depth", "9"], 2, "--model options")
    words = ["convert", "from-nanochat", "--workdir", tmp_path / "new"]
    expect_error(capsys, words, 2, "from-nanochat needs --checkpoint")
    expect_error(capsys, [*words, "--checkpoint", tmp_path, "--step", "best"], 2, "--step best")
    expect_error(capsys, [*words, "--checkpoint", tmp_path, "--dtype", "bfloat16"], 2, "--dtype")
    expect_error(capsys, ["convert", "to-hf", "--workdir", tmp_path, "--out", tmp_path / "a"], 1, str(tmp_path))


def test_a_vocabulary_that_no_merges_make():
    rank = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(UserError, match=r"b'abc' is no merge of two others \(b'ab' is none\)"):
        export.parts_of(b"abc", rank)
