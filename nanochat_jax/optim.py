"""One table, parameter path -> optimizer group; Muon and AdamW as optax transformations; schedules and horizon.

What changes from step to step (learning rates, momentum, decay) is computed on the host by `Schedule` and handed to
the update as `hyper`, so that one compiled step serves every stage. Muon (https://kellerjordan.github.io/posts/muon)
is ours because optax's lacks Polar Express (arXiv 2505.16932), row equilibration, NorMuon's variance reduction (arXiv
2510.05491) and cautious decay. Weights are [in, out]; where the papers speak of rows they mean output units, here the
last axis. Nothing here communicates: zero.py hands each device what it owns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.config import Config, GPTConfig, StageConfig
from nanochat_jax.errors import UserError
from nanochat_jax.model import flops_per_token, scaling_params
from nanochat_jax.sharding import match, path_of

GROUP_OF: tuple[tuple[str, str], ...] = (
    (r"lm_head/kernel", "lm_head"),
    (r"wte/embedding", "wte"),
    (r"value_embed_\d+/embedding", "value_embeds"),
    (r"resid_lambda", "resid"),
    (r"x0_lambda", "x0"),
    (r"smear_gate/kernel|(smear|backout)_lambda", "smear"),
    (r"h_\d+/(attn|mlp)/(q|k|v|proj|ve_gate|fc)/kernel|stack/.*", "muon"),
)
ADAMW = {  # group: (beta1, beta2, weight decay)
    "lm_head": (0.8, 0.96, 0.01),
    "wte": (0.8, 0.995, 0.001),
    "value_embeds": (0.8, 0.995, 0.01),
    "resid": (0.8, 0.95, 0.05),
    "x0": (0.96, 0.95, 0.0),
    "smear": (0.8, 0.95, 0.0),
}
ADAM_EPS = 1e-10
MUON_BETA2 = 0.9
SMEAR_LR = 0.2
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
REFERENCE_BATCH = 2**19
REFERENCE_DEPTH = 12

Hyper = dict


class AdamState(NamedTuple):
    """Steps taken and both moments, in the dtype of the parameter."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def adamw(group: str) -> optax.GradientTransformationExtraArgs:
    """Decoupled AdamW (arXiv 1711.05101) with arithmetic in float32; its rate is hyper["lr"][group]."""
    beta1, beta2, decay = ADAMW[group]

    def init(params: optax.Params) -> AdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        grads: optax.Updates, state: AdamState, params: optax.Params, *, hyper: Hyper
    ) -> tuple[optax.Updates, AdamState]:
        count = state.count + 1
        bias1, bias2 = 1 - beta1 ** count.astype(jnp.float32), 1 - beta2 ** count.astype(jnp.float32)
        rate = hyper["lr"][group]

        def one(g: jax.Array, mu: jax.Array, nu: jax.Array, p: jax.Array) -> tuple:
            g, mu32, nu32, p32 = (x.astype(jnp.float32) for x in (g, mu, nu, p))
            mu32 = mu32 + (1 - beta1) * (g - mu32)
            nu32 = nu32 + (1 - beta2) * (g * g - nu32)
            step = (mu32 / bias1) / (jnp.sqrt(nu32 / bias2) + ADAM_EPS)
            return -rate * (step + decay * p32), mu32.astype(mu.dtype), nu32.astype(nu.dtype)

        updates, mu, nu = _unzipped(jax.tree.map(one, grads, state.mu, state.nu, params), grads)
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _unzipped(triples: optax.Updates, like: optax.Updates) -> tuple[optax.Updates, optax.Updates, optax.Updates]:
    """Three trees of the structure of `like` from one of triples."""
    structure = jax.tree.structure(like)
    rows = structure.flatten_up_to(triples)  # none, where an architecture has no parameter of the group
    return tuple(structure.unflatten([row[i] for row in rows]) for i in range(3))


class MuonState(NamedTuple):
    """Momentum and NorMuon's second moments of stacks of matrices, float32."""

    momentum: optax.Updates
    second: optax.Updates


def polar_express(x: jax.Array) -> jax.Array:
    """Approximate polar factors of the [in, out] matrices of a stack, spectral norms below 1 (arXiv 2505.16932)."""
    # A CPU multiplies one matrix after another faster than a stack of them.
    return jax.lax.platform_dependent(x, cpu=functools.partial(jax.lax.map, polar_single), default=polar_iterated)


def polar_single(x: jax.Array) -> jax.Array:
    """The same of one matrix, with the fewest products: oblong ones in float32 as polynomials of their Gram matrix."""
    oblong = max(x.shape) >= 2 * min(x.shape)
    return polar_by_gram(x) if oblong and x.dtype == jnp.float32 else polar_iterated(x)


def polar_iterated(x: jax.Array) -> jax.Array:
    """The iteration as the paper has it; x [..., in, out]."""
    for a, b, c in POLAR_EXPRESS:
        gram = small_gram(x)
        x = a * x + times(b * gram + c * (gram @ gram), x)
    return x


def polar_by_gram(x: jax.Array) -> jax.Array:
    """What `polar_iterated` gives, with 4 products as long as x instead of 10.

    A factor P is a polynomial of X X^T and commutes with it, so that the next Gram matrix is P P X X^T. Errors grow
    with the squares of the first coefficients: hence once anew from X, after two factors. Then they are those of the
    plain iteration in float32.
    """
    identity = jnp.eye(min(x.shape), dtype=x.dtype)
    for factors in (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]):
        gram, product = small_gram(x), identity
        for i, (a, b, c) in enumerate(factors):
            factor = a * identity + b * gram + c * (gram @ gram)
            product = factor @ product if i else factor
            gram = factor @ (factor @ gram)  # the last one is not used and not computed
        x = times(product, x)
    return x


def small_gram(x: jax.Array) -> jax.Array:
    """X X^T or X^T X, whichever is smaller."""
    return x @ x.mT if x.shape[-1] > x.shape[-2] else x.mT @ x


def times(square: jax.Array, x: jax.Array) -> jax.Array:
    """A symmetric matrix of the size of `small_gram` by x, from the side where it fits."""
    return square @ x if x.shape[-1] > x.shape[-2] else x @ square


def frobenius(x: jax.Array) -> jax.Array:
    """Frobenius norm of each matrix of a stack, [n, 1, 1] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))


def orthogonalized(grad: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Row equilibration and Polar Express in `dtype`, then the Frobenius norm set to sqrt(min(in, out)); float32."""
    n_in, n_out = grad.shape[-2:]
    x = grad.astype(dtype)
    per_output = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-2, keepdims=True))
    x = x * (frobenius(x) / math.sqrt(n_out) / jnp.maximum(per_output, 1e-6)).astype(dtype)
    x = x / (frobenius(x) * 1.01 + 1e-6).astype(dtype)
    x = polar_express(x).astype(jnp.float32)
    return x * (math.sqrt(min(n_in, n_out)) / jnp.maximum(frobenius(x), 1e-6))


def variance_reduced(x: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NorMuon: divide by a running second moment per output (or input, for wide matrices), the norm preserved."""
    axis = -2 if x.shape[-1] >= x.shape[-2] else -1
    length = x.shape[axis]
    mean = jnp.mean(x * x, axis=axis, keepdims=True)
    second = second + (1 - MUON_BETA2) * (mean - second)
    scale = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    before = jnp.sqrt(jnp.sum(mean, axis=(-2, -1), keepdims=True) * length)
    after = jnp.sqrt(jnp.sum(mean * length * scale * scale, axis=(-2, -1), keepdims=True))
    return x * scale * (before / jnp.maximum(after, 1e-10)), second


def muon(dtype: str) -> optax.GradientTransformationExtraArgs:
    """Muon over stacks [n, in, out] of same-shape matrices (see zero.py).

    hyper gives lr["muon"], momentum and weight_decay. `dtype`: "bfloat16" runs equilibration and iterations in
    bfloat16, anything else in float32.
    """
    iteration = jnp.dtype(jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)

    def init(params: optax.Params) -> MuonState:
        def second(p: jax.Array) -> jax.Array:
            return jnp.zeros_like(p[:, :1, :] if p.shape[-1] >= p.shape[-2] else p[:, :, :1])

        return MuonState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(second, params))

    def update(
        grads: optax.Updates, state: MuonState, params: optax.Params, *, hyper: Hyper
    ) -> tuple[optax.Updates, MuonState]:
        mu, rate, decay = hyper["momentum"], hyper["lr"]["muon"], hyper["weight_decay"]

        def one(g: jax.Array, momentum: jax.Array, second: jax.Array, p: jax.Array) -> tuple:
            momentum = momentum + (1 - mu) * (g - momentum)
            x = orthogonalized(g + mu * (momentum - g), iteration)
            x, second = variance_reduced(x, second)
            scaled = rate * math.sqrt(max(1.0, p.shape[-1] / p.shape[-2]))
            return -scaled * (x + decay * p * (x * p >= 0)), momentum, second

        updates, *moments = _unzipped(jax.tree.map(one, grads, state.momentum, state.second, params), grads)
        return updates, MuonState(*moments)

    return optax.GradientTransformationExtraArgs(init, update)


def labels(params: optax.Params) -> optax.Params:
    """The optimizer group of every parameter; KeyError for one that no rule, or more than one, names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match(path_of(path), GROUP_OF), params)


def make_optimizer(dtype: str) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer; `update(grads, state, params, hyper=schedule.hyper(step))`."""
    return optax.partition({group: adamw(group) for group in ADAMW} | {"muon": muon(dtype)}, labels)


@dataclass(frozen=True)
class Horizon:
    """How long pretraining is and what that means for rates: tokens, tokens a step, steps, and their factors."""

    tokens: int
    batch_tokens: int
    steps: int
    lr_scale: float
    weight_decay: float


def horizon(config: Config, cfg: GPTConfig) -> Horizon:
    """Batch size, steps, rate factor sqrt(B/B_ref) and Muon decay of the base stage, all from `depth`."""
    base, ratio = config.base, config.base.target_param_data_ratio
    if not 1 <= ratio * scaling_params(cfg) < 2**63:
        raise UserError(
            f"--base.target-param-data-ratio {ratio:g} gives {ratio * scaling_params(cfg):g} tokens; 1 to 2^63 can be "
            "planned with"
        )
    tokens = int(ratio * scaling_params(cfg))
    twelve = GPTConfig.from_depth(
        dataclasses.replace(config.model, depth=REFERENCE_DEPTH, n_kv_head=None), cfg.vocab_size
    )
    reference_tokens = ratio * scaling_params(twelve)
    batch = base.total_batch_size or 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** 0.383))
    if base.num_iterations is not None:
        steps = base.num_iterations
    elif base.target_flops is not None:
        steps = round(base.target_flops / (flops_per_token(cfg) * batch))
    else:
        steps = tokens // batch
    scale = math.sqrt(batch / REFERENCE_BATCH)
    return Horizon(tokens, batch, steps, scale, base.weight_decay * scale * reference_tokens / tokens)


def check_horizon(config: Config, found: Horizon) -> None:
    """UserError where a horizon is less than one step."""
    if found.steps < 1:
        base = config.base
        ratio, flops = base.target_param_data_ratio, base.target_flops
        option = f"target-param-data-ratio {ratio:g}" if flops is None else f"target-flops {flops:g}"
        raise UserError(
            f"--base.{option} is less than one step of {found.batch_tokens} tokens: raise it, or lower "
            "--base.total-batch-size"
        )


@dataclass(frozen=True)
class Schedule:
    """What the optimizer is told at each step, as plain floats."""

    stage: StageConfig
    steps: int
    n_embd: int
    lr_scale: float = 1.0
    weight_decay: float = 0.0

    @property
    def warmdown(self) -> int:
        """Steps of the linear fall at the end."""
        return round(self.stage.warmdown_ratio * self.steps)

    def lr_multiplier(self, it: int) -> float:
        """Warm-up, constant, linear warm-down to final_lr_frac; the first that applies wins."""
        stage, warmdown = self.stage, self.warmdown
        if it < stage.warmup_steps:
            return (it + 1) / stage.warmup_steps
        if it <= self.steps - warmdown:
            return 1.0
        left = (self.steps - it) / warmdown
        return left + (1 - left) * stage.final_lr_frac

    def momentum(self, it: int) -> float:
        """Muon momentum: linear rise, plateau, linear change over the warm-down; the first that applies wins."""
        stage, warmdown = self.stage, self.warmdown
        if it < stage.momentum_warmup:
            frac = it / stage.momentum_warmup
            return stage.momentum_start + frac * (stage.momentum_peak - stage.momentum_start)
        if it >= self.steps - warmdown and warmdown:
            frac = (it - (self.steps - warmdown)) / warmdown
            return stage.momentum_peak + frac * (stage.momentum_end - stage.momentum_peak)
        return stage.momentum_peak

    def decay(self, it: int) -> float:
        """Muon weight decay: half a cosine from its full value to 0."""
        return self.weight_decay * (1 + math.cos(math.pi * it / max(self.steps, 1))) / 2

    def rates(self) -> dict[str, float]:
        """Learning rate of each group before the multiplier; AdamW's tables scale with width^-0.5 from 768."""
        stage, m = self.stage, (self.n_embd / 768) ** -0.5
        scaled = {
            "lm_head": stage.unembedding_lr * m,
            "wte": stage.embedding_lr * m,
            "value_embeds": 0.5 * stage.embedding_lr * m,
            "resid": 0.01 * stage.scalar_lr,
            "x0": stage.scalar_lr,
            "muon": stage.matrix_lr,
        }
        return {name: rate * self.lr_scale for name, rate in scaled.items()} | {"smear": SMEAR_LR}

    def hyper(self, it: int) -> Hyper:
        """{"lr": {group: rate}, "momentum", "weight_decay"} of step `it`, float32 scalars."""
        factor = self.lr_multiplier(it) * self.stage.init_lr_frac
        return {
            "lr": {name: np.float32(rate * factor) for name, rate in self.rates().items()},
            "momentum": np.float32(self.momentum(it)),
            "weight_decay": np.float32(self.decay(it)),
        }


def base_schedule(config: Config, cfg: GPTConfig) -> tuple[Schedule, Horizon]:
    """The schedule of pretraining with the horizon it comes from."""
    h = horizon(config, cfg)
    return Schedule(config.base, h.steps, cfg.n_embd, h.lr_scale, h.weight_decay), h
