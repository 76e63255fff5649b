"""The side of test_transformers.py that has transformers: FOLDER PADDING STEPS; prints one line of JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

folder, padding, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ours = np.load(folder / "ours.npz")
model = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()
assert not model.accepts_loss_kwargs, "Trainer would add up the losses of microbatches"
tokens = torch.tensor(ours["tokens"])
length = tokens.shape[1]

# The second row begins later: padding on its left.
later = torch.cat([torch.zeros(1, padding, dtype=torch.long), tokens[1:, : length - padding]], dim=1)
rows = torch.cat([tokens[:1], later])
mask = torch.ones_like(rows)
mask[1, :padding] = 0


def largest(logits: torch.Tensor) -> float:
    """Largest difference of both rows' logits from ours."""
    logits = logits.numpy()
    whole = np.abs(logits[0] - ours["logits"][0]).max()
    return float(max(whole, np.abs(logits[1, padding:] - ours["logits"][1, : length - padding]).max()))


with torch.no_grad():
    padded = model(rows, attention_mask=mask).logits
    cache, parts = {}, []
    for start, end in [(0, 100), (100, 150), *((i, i + 1) for i in range(150, length))]:
        out = model(rows[:, start:end], attention_mask=mask[:, :end], use_cache=True, **cache)
        cache = {CACHE: out[CACHE]}
        parts.append(out.logits)
    plain = model(tokens, labels=tokens)
    written = model.generate(
        tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=steps, do_sample=False
    )
answer = written[0, length:].tolist()
print(
    json.dumps(
        {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "largest": {
                "whole": float(np.abs(plain.logits.numpy() - ours["logits"]).max()),
                "padded": largest(padded),
                "with a cache": largest(torch.cat(parts, dim=1)),
            },
            "loss": plain.loss.item(),
            # The engine leaves out the token that ends an answer.
            "same_answer": answer[: len(ours["answer"])] == ours["answer"].tolist(),
        }
    )
)
