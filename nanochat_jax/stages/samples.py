"""What a stage's model writes after a few fixed prompts, at the end of the stage and in base on the way."""

from __future__ import annotations

from nanochat_jax.distributed import is_leader
from nanochat_jax.inference.requests import SamplingParams
from nanochat_jax.inference.shared import make_engine
from nanochat_jax.stages.session import Session

TEXTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "It is a truth universally acknowledged,",
    "The ship sailed",
)
QUESTIONS = (
    "Hello! Who are you?",
    "What is 12 + 7?",
    "How many r are in strawberry?",
    "Why is the sky blue?",
)


def write_samples(session: Session, *, raw: bool) -> None:
    """On the console and in the stage's samples.md: continuations of texts (`raw`), sampled, or greedy answers."""
    tokenizer, cfg, length = session.tokenizer, session.cfg, session.stage.sample_tokens
    asked = TEXTS if raw else QUESTIONS
    if raw:
        prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in asked]
    else:
        prompts = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]}) for text in asked]
    limit = min(cfg.sequence_len, max(map(len, prompts)) + length + 1)
    engine = make_engine(session.state.params, cfg, tokenizer, max_rows=len(prompts), max_len=limit, mesh=session.mesh)
    fitting = [(text, prompt) for text, prompt in zip(asked, prompts, strict=True) if len(prompt) < limit]
    # A base model left to its likeliest token goes round in circles.
    most = min(length, limit)
    how = SamplingParams(0.8, top_k=50, max_tokens=most) if raw else SamplingParams(0.0, max_tokens=most)
    answers = engine.generate([prompt for _, prompt in fitting], how)
    drawn = "temperature 0.8, top-k 50" if raw else "greedy"
    lines = [f"# Samples of {session.name}, step {session.step}, {drawn}, at most {length} tokens", ""]
    for (text, _), answer in zip(fitting, answers, strict=True):
        said = answer.text.strip() or "(nothing)"
        lines += [f"> {text}", "", said, ""]
        session.log(f"{session.name} {session.step}: {text!r} -> {said!r}")
    if is_leader():
        (session.folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
