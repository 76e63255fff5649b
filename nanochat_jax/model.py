"""The GPT of nanochat in Flax Linen: forward pass, initial values, counts. With a KV cache: inference/decoding.py.

Dimensions: B batch, T query position, S key position, D model width, N query heads, K key/value heads, H head width,
F = 4D, V padded vocabulary, L layers. Weights are [in, out]. Parameters are a nested dict with one array a leaf, e.g.
params["h_0"]["attn"]["q"]["kernel"]; sharding and optimizer groups key on that path. Every weight has a module of its
own, so its random key comes from its path alone and adding one never moves another.

Beyond a plain GPT (see docs of nanochat): smear mixes in the previous token's embedding, value embeddings feed every
second layer's values, each layer re-reads the input embedding, and a mid-layer state is subtracted before the head.
Each of these can be off, as in nanochat's first release; its parameters then do not exist.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from kernels.attention import GPU_IMPLEMENTATIONS, attention
from nanochat_jax import fp8
from nanochat_jax.config import GPTConfig
from nanochat_jax.sharding import PARAM_SPECS, automatic_axes, cut_axes, data_shards, gathered, match, only, shard

EPS = 1.1920929e-07
SOFTCAP = 15.0
SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
BATCH_AXES = ("data", "fsdp")
ROWS_AND_HEADS = BATCH_AXES, None, "tensor", None
"""How [B, T, N, H] is cut over the mesh."""

Params = dict
Angles = tuple[jax.Array, jax.Array]


def rms(x: jax.Array, axis: int = -1) -> jax.Array:
    """Root-mean-square norm over an axis, no gain, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axis, keepdims=True) + EPS)).astype(x.dtype)


def scaled(scalar: jax.Array, x: jax.Array) -> jax.Array:
    """scalar * x with the product in float32, rounded to x's dtype."""
    return (scalar * x.astype(jnp.float32)).astype(x.dtype)


def rope(positions: jax.Array, head_dim: int, base: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """What `rotate` multiplies with (RoFormer, arXiv 2104.09864): cos and signed sin [..., 1, H] in `dtype` for integer
    `positions` [...].
    """
    inverse = 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * inverse.reshape((1,) * positions.ndim + (1, -1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    tables = jnp.concatenate([cos, cos], axis=-1).astype(dtype), jnp.concatenate([sin, -sin], axis=-1).astype(dtype)
    # Else the compiler computes the cosines again wherever they are used, for every head of every layer.
    return jax.lax.optimization_barrier(tables)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding on halves; the sign convention is the reference's."""
    halves = x_BTNH.reshape(*x_BTNH.shape[:-1], 2, -1)
    return x_BTNH * cos + jax.lax.rev(halves, (halves.ndim - 2,)).reshape(x_BTNH.shape) * sin


def uniform(scale: float, low: float | None = None) -> nn.initializers.Initializer:
    """Initializer U(low, scale); low defaults to -scale."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale if low is None else low, scale)


class Linear(nn.Module):
    """x @ kernel without bias; the float32 master weight is cast to x's dtype at use; with `fp8` see fp8.py."""

    features: int
    initial: nn.initializers.Initializer
    fp8: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.initial, (x.shape[-1], self.features), jnp.float32)
        path = "/".join((*self.path, "kernel"))
        if self.fp8 and fp8.fits(*kernel.shape):
            return fp8.matmul(x, kernel, path)
        return matmul(x, gathered(kernel.astype(x.dtype), path))


@jax.custom_vjp
def matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x [..., I] @ kernel. A CPU transposes an operand for the kernel's gradient: here the narrower one of the two."""
    return x @ kernel_IO


def _matmul_forward(x: jax.Array, kernel_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Without a barrier cuBLAS adds the product to the residual stream, in place, and XLA copies that before it does.
    out = jax.lax.platform_dependent(x @ kernel_IO, cuda=jax.lax.optimization_barrier, default=lambda out: out)
    return out, (x, kernel_IO)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_IO = saved
    rows = tuple(range(x.ndim - 1))
    over_rows = ((rows, rows), ((), ()))
    if kernel_IO.shape[0] <= kernel_IO.shape[1]:
        dkernel_IO = jax.lax.dot_general(x, grad, over_rows)
    else:
        # The barrier keeps this transpose out of the product, where it would make the slow one of it.
        dkernel_IO = jax.lax.optimization_barrier(jax.lax.dot_general(grad, x, over_rows)).T
    return grad @ kernel_IO.T, dkernel_IO


matmul.defvjp(_matmul_forward, _matmul_backward)


class Embedding(nn.Module):
    """Rows of a [V, features] table kept in `dtype`; gradients of the lookup are a scatter-add."""

    rows: int
    features: int
    initial: nn.initializers.Initializer
    dtype: str

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return self.initial(key, shape, jnp.float32).astype(dtype)

        table = self.param("embedding", init, (self.rows, self.features), jnp.dtype(self.dtype))
        return lookup(table, tokens, "/".join((*self.path, "embedding")))


@jax.custom_vjp
def whole_table(part: jax.Array) -> jax.Array:
    """The rows of a table from all devices of `fsdp`; gradients are summed in float32 and cut (bfloat16 sums of this
    kind abort XLA's compiler for CPUs).
    """
    return jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)


def _whole_table_backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
    total = jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=0, tiled=True)
    return (total.astype(grad.dtype),)


whole_table.defvjp(lambda part: (whole_table(part), None), _whole_table_backward)


@jax.custom_vjp
def rows_of(table_VE: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of a table, NaN for a token beyond it. Gradients add up in float32 whatever the table's dtype: more exact
    where tokens repeat, and GPUs add float32 to memory at once where they loop for bfloat16.
    """
    return jnp.take(table_VE, tokens_BT, axis=0)


def _rows_of_forward(table_VE: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_of(table_VE, tokens_BT), (tokens_BT, jnp.zeros((table_VE.shape[0], 0), table_VE.dtype))


def _rows_of_backward(saved: tuple[jax.Array, jax.Array], grad_BTE: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, like = saved
    sums_VE = (
        jnp.zeros((like.shape[0], grad_BTE.shape[-1]), jnp.float32).at[tokens_BT].add(grad_BTE.astype(jnp.float32))
    )
    return sums_VE.astype(like.dtype), None


rows_of.defvjp(_rows_of_forward, _rows_of_backward)


def lookup(table_VE: jax.Array, tokens_BT: jax.Array, path: str) -> jax.Array:
    """Rows of the table `path`, by each device for its own rows of the batch; over `fsdp` the table is gathered first
    and its gradient reduced and cut in one.
    """
    axes = cut_axes()
    if not axes:
        return rows_of(table_VE, tokens_BT)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if "fsdp" in axes:
            table = whole_table(table)
        return rows_of(table, tokens)

    spec, rows = only(axes, *match(path, PARAM_SPECS)), only(axes, BATCH_AXES, None)
    return jax.shard_map(local, in_specs=(spec, rows), out_specs=P(*rows, spec[1]), axis_names=axes)(
        table_VE, tokens_BT
    )


class Attention(nn.Module):
    """Windowed causal self-attention with rotary positions, normed q and k, and gated value embeddings."""

    cfg: GPTConfig
    layer: int

    @nn.compact
    def __call__(self, h_BTD: jax.Array, ve_BTE: jax.Array | None, angles: Angles) -> jax.Array:
        cfg = self.cfg
        batch, length, width = h_BTD.shape
        linear = functools.partial(Linear, initial=uniform((3 / width) ** 0.5), fp8=cfg.fp8)
        q_BTNH = linear(cfg.n_head * cfg.head_dim, name="q")(h_BTD).reshape(batch, length, -1, cfg.head_dim)
        k_BTKH = linear(cfg.n_kv_head * cfg.head_dim, name="k")(h_BTD).reshape(batch, length, -1, cfg.head_dim)
        v_BTKH = linear(cfg.n_kv_head * cfg.head_dim, name="v")(h_BTD).reshape(batch, length, -1, cfg.head_dim)
        if ve_BTE is not None:
            gate_BTK = 3 * jax.nn.sigmoid(
                Linear(cfg.n_kv_head, uniform(0.02, 0.0), name="ve_gate")(h_BTD[..., :GATE_CHANNELS])
            )
            v_BTKH = v_BTKH + gate_BTK[..., None] * ve_BTE.reshape(v_BTKH.shape)
        q_BTNH, k_BTKH = (turned(x, angles, cfg) for x in (q_BTNH, k_BTKH))
        window = cfg.windows[self.layer]
        y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, window, cfg.attention)
        return Linear(width, nn.initializers.zeros, cfg.fp8, name="proj")(y_BTNH.reshape(batch, length, -1))


def turned(x_BTNH: jax.Array, angles: Angles, cfg: GPTConfig) -> jax.Array:
    """Queries or keys as attention takes them: rotated, normed and scaled."""
    half = cfg.head_dim // 2
    if cfg.attention not in GPU_IMPLEMENTATIONS or half & (half - 1):
        return cfg.qk_scale * rms(rotate(x_BTNH, *angles))
    # Pallas takes up to half a second to import.
    from kernels.rotary_norm import rotary_norm

    def local(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return rotary_norm(x, cos, sin, cfg.qk_scale, EPS, "interpreted" in cfg.attention)

    return per_device(local, ROWS_AND_HEADS, (x_BTNH,), *(table[0, :, 0, :half] for table in angles))


def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, impl: str) -> jax.Array:
    """`kernels.attention` on each device's own rows and heads."""
    local = functools.partial(attention, window=window, impl=impl)
    return per_device(local, ROWS_AND_HEADS, (q_BTNH, k_BTKH, v_BTKH))


def per_device(local: Callable, axes_of: Sequence, cut: Sequence, *whole: jax.Array) -> jax.Array | tuple:
    """`local` of each device's own part of the arrays in `cut`, which like all results are cut as `axes_of` says, and
    of the arrays `whole`; plain jit would gather them all for a kernel.
    """
    axes = automatic_axes()
    if not axes or jax.sharding.get_abstract_mesh().size == 1:
        return local(*cut, *whole)
    spec = only(axes, *axes_of)
    specs = *[spec] * len(cut), *[P()] * len(whole)
    return jax.shard_map(local, in_specs=specs, out_specs=spec, axis_names=set(axes), check_vma=False)(*cut, *whole)


class MLP(nn.Module):
    """relu(h @ fc)^2 @ proj."""

    fp8: bool = False

    @nn.compact
    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        width = h_BTD.shape[-1]
        h_BTF = Linear(4 * width, uniform(0.4 * (3 / width) ** 0.5), self.fp8, name="fc")(h_BTD)
        return Linear(width, nn.initializers.zeros, self.fp8, name="proj")(jnp.square(jax.nn.relu(h_BTF)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    cfg: GPTConfig
    layer: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, ve_BTE: jax.Array | None, angles: Angles) -> jax.Array:
        x_BTD = x_BTD + Attention(self.cfg, self.layer, name="attn")(rms(x_BTD), ve_BTE, angles)
        x_BTD = x_BTD + MLP(self.cfg.fp8, name="mlp")(rms(x_BTD))
        return shard(x_BTD, BATCH_AXES, None, None)


class GPT(nn.Module):
    """tokens -> final hidden states; the head is applied by `logits_of`, whole or in chunks."""

    cfg: GPTConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] in the compute dtype; rows start at position 0."""
        cfg = self.cfg
        dtype = jnp.dtype(cfg.compute_dtype)
        wide = (cfg.padded_vocab_size, cfg.n_embd)
        x_BTD = Embedding(*wide, nn.initializers.normal(0.8), cfg.compute_dtype, name="wte")(tokens_BT)
        x_BTD = shard(rms(x_BTD.astype(dtype)), BATCH_AXES, None, None)
        angles = rope(jnp.arange(tokens_BT.shape[1])[None, :], cfg.head_dim, cfg.rope_base, dtype)

        if cfg.smear:
            previous_BTD = jnp.concatenate([jnp.zeros_like(x_BTD[:, :1]), x_BTD[:, :-1]], axis=1)
            gate_BT1 = jax.nn.sigmoid(Linear(1, uniform(0.02, 0.0), name="smear_gate")(x_BTD[..., :SMEAR_CHANNELS]))
            smear = self.param("smear_lambda", nn.initializers.zeros, (1,), jnp.float32)
            x_BTD = x_BTD + smear[0].astype(dtype) * gate_BT1 * previous_BTD
        x0_BTD = x_BTD

        if cfg.lambdas:
            resid = self.param("resid_lambda", ramp(1.15, 1.05), (cfg.n_layer,), jnp.float32)
            x0s = self.param("x0_lambda", ramp(0.20, 0.05), (cfg.n_layer,), jnp.float32)
        kv_width = cfg.n_kv_head * cfg.head_dim
        middle_BTD = x_BTD
        block = nn.remat(Block) if cfg.remat else Block
        for i in range(cfg.n_layer):
            if cfg.lambdas:
                x_BTD = scaled(resid[i], x_BTD) + scaled(x0s[i], x0_BTD)
            ve_BTE = None
            if cfg.has_value_embedding(i):
                init = uniform((3 / cfg.n_embd) ** 0.5)
                table = Embedding(cfg.padded_vocab_size, kv_width, init, cfg.compute_dtype, name=f"value_embed_{i}")
                ve_BTE = table(tokens_BT).astype(dtype)
            x_BTD = block(cfg, i, name=f"h_{i}")(x_BTD, ve_BTE, angles)
            if i == cfg.n_layer // 2:
                middle_BTD = x_BTD
        if self.is_initializing():
            Linear(cfg.padded_vocab_size, nn.initializers.normal(0.001), name="lm_head")(x_BTD)
        if cfg.backout:
            backout = self.param("backout_lambda", nn.initializers.constant(0.2), (1,), jnp.float32)
            x_BTD = x_BTD - backout[0].astype(dtype) * middle_BTD
        return rms(x_BTD)


def ramp(first: float, last: float) -> nn.initializers.Initializer:
    """Initializer that falls linearly from `first` (layer 0) to `last` (the last layer)."""
    return lambda key, shape, dtype: first + (last - first) * jnp.arange(shape[0], dtype=dtype) / max(shape[0] - 1, 1)


def init_params(cfg: GPTConfig, key: jax.Array) -> Params:
    """Initial parameters, a nested dict of arrays; float32, embeddings in the compute dtype."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = 1 if mesh.empty else data_shards(mesh)
    return GPT(cfg).init(key, jnp.zeros((rows, 2), jnp.int32))["params"]


@functools.cache
def param_shapes(cfg: GPTConfig) -> Params:
    """The shapes and dtypes of the parameters, nothing allocated."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def hidden(params: Params, cfg: GPTConfig, tokens_BT: jax.Array) -> jax.Array:
    """Final hidden states [B, T, D] of whole rows."""
    return GPT(cfg).apply({"params": params}, tokens_BT)


def logits_of(params: Params, cfg: GPTConfig, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [..., vocab_size] float32, softly capped at +-15; padding rows of the vocabulary are cut off."""
    kernel_DV = gathered(params["lm_head"]["kernel"].astype(hidden_BTD.dtype), "lm_head/kernel")
    return softcapped(hidden_BTD @ kernel_DV, cfg)


def softcapped(logits_BTV: jax.Array, cfg: GPTConfig) -> jax.Array:
    """The head's products as `logits_of` gives them."""
    return SOFTCAP * jnp.tanh(logits_BTV[..., : cfg.vocab_size].astype(jnp.float32) / SOFTCAP)


def forward(params: Params, cfg: GPTConfig, tokens_BT: jax.Array) -> jax.Array:
    """Logits [B, T, vocab_size] float32 of whole rows."""
    check_length(cfg, tokens_BT.shape[1])
    return logits_of(params, cfg, hidden(params, cfg, tokens_BT))


def check_length(cfg: GPTConfig, length: int) -> None:
    """ValueError where a sequence would pass the rotary table's end."""
    if length > cfg.max_positions:
        raise ValueError(f"sequence of {length} tokens; positions reach 10 x sequence_len = {cfg.max_positions}")


def count_params(cfg: GPTConfig) -> dict[str, int]:
    """Parameters by group: wte, value_embeds, lm_head, blocks (all matrices inside), scalars, total."""
    counts = dict.fromkeys(("wte", "value_embeds", "lm_head", "blocks", "scalars"), 0)
    for name, sub in param_shapes(cfg).items():
        group = "blocks" if name.startswith("h_") else "value_embeds" if name.startswith("value_embed_") else name
        counts[group if group in counts else "scalars"] += sum(leaf.size for leaf in jax.tree.leaves(sub))
    return counts | {"total": sum(counts.values())}


def flops_per_token(cfg: GPTConfig) -> int:
    """Training FLOPs a token: 6 per weight used in a product, 12*N*H per visible key of each layer (PaLM's count)."""
    counts = count_params(cfg)
    products = counts["blocks"] + counts["lm_head"] + cfg.smear * SMEAR_CHANNELS
    keys = sum(min(cfg.sequence_len, window) for window in cfg.windows)
    return 6 * products + 12 * cfg.n_head * cfg.head_dim * keys


def scaling_params(cfg: GPTConfig) -> int:
    """The parameters that the training horizon is counted in: block matrices and output head."""
    counts = count_params(cfg)
    return counts["blocks"] + counts["lm_head"]
