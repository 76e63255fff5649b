"""What Hugging Face's transformers computes from an exported model, against our own logits: a minute.

    TRANSFORMERS_PYTHON=~/venv/bin/python make test-slow ARGS="-s tests/slow/test_transformers.py"

TRANSFORMERS_PYTHON has torch, transformers (4.57 and up) and accelerate. Prints the versions and the largest differences.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import model
from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.data.shards import read_texts, shard_files
from nanochat_jax.export import to_hf
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
SHAPE = {"depth": 4, "aspect_ratio": 16, "head_dim": 16, "sequence_len": 512, "window_pattern": "SL"}
FIRST = {"rope_base": 10_000.0, "qk_scale": 1.0} | dict.fromkeys(("value_embeds", "lambdas", "smear", "backout"), False)
MODELS = {
    "newest": ModelConfig(**SHAPE, n_kv_head=2),
    "first release": ModelConfig(**SHAPE | FIRST | {"window_pattern": "L"}),
}
LENGTH, PADDING, STEPS = 300, 40, 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "TRANSFORMERS_PYTHON" not in os.environ, reason="TRANSFORMERS_PYTHON has transformers and torch"
    ),
]


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_ours(name, tmp_path):
    files, _ = shard_files(ROOT / "nanochat_jax" / "corpus")
    tokenizer = Tokenizer.train(read_texts(files[:1]), 500)
    cfg = GPTConfig.from_depth(MODELS[name], 500)
    rng = np.random.default_rng(0)
    # None of them zero, as some are at the start of training.
    params = jax.tree.map(lambda p: (0.2 * rng.standard_normal(p.shape)).astype(p.dtype), model.param_shapes(cfg))
    to_hf(params, cfg, tokenizer, "run/sft", 1, tmp_path / "hf", "float32", print)
    tokens_BT = rng.integers(491, size=(2, LENGTH))
    logits_BTV = np.asarray(jax.jit(model.forward, static_argnums=1)(params, cfg, tokens_BT))
    engine = Engine(jax.tree.map(jax.numpy.asarray, params), cfg, tokenizer, max_rows=1, mesh=make_mesh("1"))
    prompt = tokens_BT[0, :LENGTH].tolist()
    answer = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=STEPS))[0].ids
    np.savez(tmp_path / "ours.npz", tokens=tokens_BT, logits=logits_BTV, answer=answer)
    words = [
        os.environ["TRANSFORMERS_PYTHON"],
        Path(__file__).parent / "transformers_side.py",
        tmp_path,
        PADDING,
        STEPS,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    printed = subprocess.run([str(word) for word in words], env=environment, check=True, capture_output=True, text=True)
    figures = json.loads(printed.stdout.splitlines()[-1])
    print(f"\n{name}, logits to {np.abs(logits_BTV).max():.1f}: {figures}")
    assert max(figures["largest"].values()) < 2e-4
    assert figures["loss"] == pytest.approx(expected_loss(logits_BTV, tokens_BT), abs=1e-4)
    assert figures["same_answer"] and len(answer) > 1


def expected_loss(logits_BTV, tokens_BT):
    """Nats a token."""
    log_probs = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -float(np.mean(np.take_along_axis(np.asarray(log_probs), tokens_BT[:, 1:, None], axis=-1)))
