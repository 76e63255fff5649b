"""The GPT as it generates: the forward pass of model.py on weights prepared once, and the KV cache.

Arrays have their features first, x_DC, C being the columns: rows when decoding, prompts by positions in a prefill. A
product is then weight [out, in] @ x [in, columns]. A CPU reads each weight once and copies nothing (with rows first, as
in training, it repacks the weights for every token); a GPU does not mind. Weights are cast to the compute dtype once,
or quantized to int8, instead of at every token.

What a layer keeps of a row is a ring: its token p stands in slot p mod S, S being the window and one, or the longest
row. Rows that continue one prompt can share its keys and values ("shared", see `empty_cache`), and count their own
tokens from the end of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels.attention import GPU_IMPLEMENTATIONS
from kernels.reference import MASKED
from nanochat_jax.config import GPTConfig
from nanochat_jax.model import (
    BATCH_AXES,
    EPS,
    GATE_CHANNELS,
    SMEAR_CHANNELS,
    SOFTCAP,
    Params,
    attend,
    check_length,
    per_device,
    rms,
    rope,
    scaled,
)
from nanochat_jax.sharding import match, path_of, shard

Weights = dict
Cache = dict
INT8_MAX = 127

WEIGHT_SPECS: tuple[tuple[str, P], ...] = (
    (r"(qkv|fc|ve_gate|head)(/values)?", P("tensor", None)),
    (r"(qkv|fc)/scales", P("tensor")),
    (r"(out|down)(/values)?", P(None, "tensor")),
    (r"(out|down)/scales", P()),
    (r"value_embed_\d+", P(None, "tensor")),
    (r"wte|smear_gate|\w+_lambda", P()),
)


class Int8(NamedTuple):
    """A weight matrix rounded to 8 bits, one scale for each output: values [out, in] int8, scales [out] float32."""

    values: jax.Array
    scales: jax.Array


def quantized(weight_OI: jax.Array) -> Int8:
    """The nearest Int8, each row's largest magnitude at 127."""
    largest_O = jnp.max(jnp.abs(weight_OI.astype(jnp.float32)), axis=1)
    scales_O = jnp.maximum(largest_O, 1e-30) / INT8_MAX
    return Int8(jnp.round(weight_OI / scales_O[:, None]).astype(jnp.int8), scales_O)


def product(weight: jax.Array | Int8, x_IC: jax.Array) -> jax.Array:
    """weight [O, I] @ x [I, ...], in x's dtype. For Int8 each column of x is rounded to 8 bits too, by its largest
    magnitude, and products of integers are summed exactly (LLM.int8, arXiv 2208.07339, without its outliers).
    """
    over = (((1,), (0,)), ((), ()))
    if not isinstance(weight, Int8):
        return jax.lax.dot_general(weight, x_IC, over)
    scales_C = jnp.maximum(jnp.max(jnp.abs(x_IC.astype(jnp.float32)), axis=0), 1e-30) / INT8_MAX
    x8_IC = jnp.round(x_IC / scales_C[None]).astype(jnp.int8)
    columns = x8_IC.shape[1:]
    if columns == (1,):  # XLA has no fast product of int8 with a single column on a CPU
        x8_IC = jnp.concatenate([x8_IC, x8_IC], axis=1)
    y_OC = jax.lax.dot_general(weight.values, x8_IC, over, preferred_element_type=jnp.int32)
    y_OC = y_OC[:, : columns[0], ...].astype(jnp.float32)
    return (y_OC * scales_C[None] * weight.scales.reshape(-1, *[1] * len(columns))).astype(x_IC.dtype)


def is_packed(values: jax.Array) -> bool:
    """Whether these are a weight's values as kernels/native.cc reads them; else they are [O, I]."""
    return values.ndim > 2


def layer_product(
    weight: jax.Array | Int8,
    x_IC: jax.Array,
    plus: jax.Array | None = None,
    lengths_P: jax.Array | None = None,
    *,
    normed: bool = False,
    squared: bool = False,
) -> jax.Array:
    """`product` and what surrounds it in a layer: of x `normed`, the square of what is above 0, added to `plus`. With
    `lengths`, x being [I, P, T], or [I, T] and P 1, nobody looks at what is beyond them, and the kernels in C++ do not
    compute it.
    """
    values, scales = weight if isinstance(weight, Int8) else (weight, None)
    if is_packed(values):
        from kernels import native

        columns = x_IC.shape[1:]
        flat, *rest = (None if x is None else x.reshape(len(x), -1) for x in (x_IC, plus))
        y_OC = native.product(values, flat, *rest, scales, lengths_P, normed=normed, squared=squared, eps=EPS)
        return y_OC.reshape(-1, *columns)
    y_OC = product(weight, rms(x_IC, axis=0) if normed else x_IC)
    if squared:
        y_OC = jnp.square(jax.nn.relu(y_OC))
    return y_OC if plus is None else plus + y_OC


def of_few(weight_OI: jax.Array, x_IC: jax.Array) -> jax.Array:
    """`product` of few inputs, as a sum that a GPU computes with what surrounds it, not in a kernel of its own."""
    weight = weight_OI.reshape(*weight_OI.shape, *[1] * (x_IC.ndim - 1)).astype(jnp.float32)
    return jnp.sum(weight * x_IC[None].astype(jnp.float32), axis=1).astype(x_IC.dtype)


@functools.partial(jax.jit, static_argnames=("cfg", "quantize"))
def prepare(params: Params, cfg: GPTConfig, quantize: str = "none") -> Weights:
    """Weights for this module from parameters as they are trained; `quantize` "int8": the layers' large matrices.

    Over the mesh in use they are cut over `tensor` and whole on every device otherwise.
    """
    dtype = jnp.dtype(cfg.compute_dtype)

    def turned(kernel_IO: jax.Array) -> jax.Array:
        return kernel_IO.astype(dtype).T

    def laid(weight: jax.Array | Int8) -> jax.Array | Int8:
        if not cfg.native:
            return weight
        from kernels import native

        if not isinstance(weight, Int8):
            return native.packed(weight)
        return weight._replace(values=native.packed(weight.values)) if native.load().has_int8 else weight

    rounded = quantized if quantize == "int8" else lambda weight: weight
    weights: Weights = {"wte": params["wte"]["embedding"], "head": laid(turned(params["lm_head"]["kernel"]))}
    weights |= {name: value for name, value in params.items() if name.endswith("_lambda")}
    weights |= {name: value["embedding"] for name, value in params.items() if name.startswith("value_embed_")}
    if cfg.smear:
        weights["smear_gate"] = turned(params["smear_gate"]["kernel"])
    for i in range(cfg.n_layer):
        attn, mlp = params[f"h_{i}"]["attn"], params[f"h_{i}"]["mlp"]
        # The queries, the key and the value of a key/value head are neighbours, which a mesh cuts by such heads.
        heads = [turned(attn[name]["kernel"]).reshape(cfg.n_kv_head, -1, cfg.n_embd) for name in ("q", "k", "v")]
        layer = {
            "qkv": jnp.concatenate(heads, axis=1).reshape(-1, cfg.n_embd),
            "out": turned(attn["proj"]["kernel"]),
            "fc": turned(mlp["fc"]["kernel"]),
            "down": turned(mlp["proj"]["kernel"]),
        }
        weights[f"h_{i}"] = {name: laid(rounded(weight)) for name, weight in layer.items()}
        if cfg.has_value_embedding(i):
            weights[f"h_{i}"]["ve_gate"] = turned(attn["ve_gate"]["kernel"])
    return jax.tree_util.tree_map_with_path(lambda path, x: shard(x, *match(path_of(path), WEIGHT_SPECS)), weights)


def empty_cache(cfg: GPTConfig, rows: int, length: int, prompts: int = 0, prompt_length: int = 0) -> Cache:
    """Room for `rows` rows of `length` tokens each; with `prompts` also for as many prompts of `prompt_length` tokens,
    prompt i being that of the rows // prompts rows from i * rows // prompts on, which then keep their own tokens only.

    Keys and values [rows, K, S, H] in the compute dtype, heads before slots: a decode step reads contiguous panels.
    "prev" [rows, D]: smear's previous embedding; "seen" [rows, vocabulary]: whether a row has held a token.
    """
    dtype = jnp.dtype(cfg.compute_dtype)

    def panels(count: int, length: int) -> list[dict[str, jax.Array]]:
        slots = [min(length, window + 1) for window in cfg.windows]
        shapes = [(count, cfg.n_kv_head, s, cfg.head_dim) for s in slots]
        return [{name: jnp.zeros(shape, dtype) for name in ("k", "v")} for shape in shapes]

    cache = {
        "prev": jnp.zeros((rows, cfg.n_embd), dtype),
        "seen": jnp.zeros((rows, cfg.vocab_size), bool),
        "own": panels(rows, length),
    }
    return cache | ({"shared": panels(prompts, prompt_length)} if prompts else {})


def cache_spec(path: str) -> P:
    """How an array of the cache is cut over a mesh: rows, and key/value heads."""
    return P(BATCH_AXES, "tensor") if path[-2:] in ("/k", "/v") else P(BATCH_AXES)


def part_of(cache: Cache, slots_R: jax.Array, reach: int) -> Cache:
    """The cache of these rows alone (where rows share prompts, of whole groups of them) and of their first `reach`
    slots, beyond which none of them has or gets a token. The cache itself, where that is all of it.
    """
    every = len(slots_R) == len(cache["prev"])

    def taken(arrays: Any, at: jax.Array, *rest: slice) -> Any:
        if every:
            return jax.tree.map(lambda x: x[:, *rest], arrays)
        return jax.tree.map(lambda x: x.at[at, *rest].get(mode="promise_in_bounds", unique_indices=True), arrays)

    part = {name: taken(cache[name], slots_R) for name in ("prev", "seen")}
    part["own"] = taken(cache["own"], slots_R, slice(None), slice(reach))
    if "shared" in cache:
        together = len(cache["prev"]) // len(cache["shared"][0]["k"])
        part["shared"] = taken(cache["shared"], slots_R[::together] // together)
    return part


def with_part(cache: Cache, part: Cache, slots_R: jax.Array) -> Cache:
    """The cache after a decode of this part of it, which leaves shared prompts as they were."""
    every = len(slots_R) == len(cache["prev"])

    def put_back(x: jax.Array, new: jax.Array) -> jax.Array:
        if every:
            return jax.lax.dynamic_update_slice(x, new, [0] * x.ndim)
        at = slots_R, *(slice(size) for size in new.shape[1:])
        return x.at[at].set(new, mode="promise_in_bounds", unique_indices=True)

    return cache | {name: jax.tree.map(put_back, cache[name], part[name]) for name in ("prev", "seen", "own")}


def ring_positions(last_B: jax.Array, slots: int) -> jax.Array:
    """The token in each slot of a ring whose newest is last_B: int32 [B, S], below 0 where there is none yet."""
    last_B1 = last_B[:, None]
    return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots


Attend = Callable[[int, jax.Array, jax.Array | None], jax.Array]
"""(layer, qkv [K, G + 2, H, *C], v [K, H, *C] or None) -> [K, G, H, *C]; G query heads share a key/value head. Queries
and key are as the product gave them; v stands for the last of qkv where it is not None.
"""


def hidden(
    weights: Weights,
    cfg: GPTConfig,
    tokens_C: jax.Array,
    previous: Callable[[jax.Array], jax.Array],
    attention: Attend,
    lengths_P: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Final hidden states and token embeddings, both [D, *C], by the numerics of `model.GPT`.

    previous(embeddings [D, *C]) -> those one position earlier, for smear. `lengths`: see `layer_product`.
    """
    dtype, on_gpu = jnp.dtype(cfg.compute_dtype), cfg.attention in GPU_IMPLEMENTATIONS
    columns = tokens_C.shape
    multiplied = functools.partial(layer_product, lengths_P=lengths_P)

    def looked_up(table_VE: jax.Array) -> jax.Array:
        return jnp.moveaxis(table_VE[tokens_C].astype(dtype), -1, 0)

    def spread(x_DC: jax.Array) -> jax.Array:
        return shard(x_DC, None, BATCH_AXES, *[None] * (len(columns) - 1))

    embedding_DC = x_DC = spread(rms(looked_up(weights["wte"]), axis=0))
    if cfg.smear:
        gate_1C = jax.nn.sigmoid(product(weights["smear_gate"], x_DC[:SMEAR_CHANNELS]))
        x_DC = x_DC + weights["smear_lambda"][0].astype(dtype) * gate_1C * previous(x_DC)
    x0_DC = middle_DC = x_DC
    for i in range(cfg.n_layer):
        layer = weights[f"h_{i}"]
        if cfg.lambdas:
            x_DC = scaled(weights["resid_lambda"][i], x_DC) + scaled(weights["x0_lambda"][i], x0_DC)
        h_DC = rms(x_DC, axis=0)
        qkv = multiplied(layer["qkv"], x_DC, normed=True).reshape(cfg.n_kv_head, -1, cfg.head_dim, *columns)
        v_KHC = None
        if cfg.has_value_embedding(i):
            gates_KC = (of_few if on_gpu else product)(layer["ve_gate"], h_DC[:GATE_CHANNELS])
            gate_KC = 3 * jax.nn.sigmoid(gates_KC)
            embedded_KHC = looked_up(weights[f"value_embed_{i}"]).reshape(cfg.n_kv_head, cfg.head_dim, *columns)
            v_KHC = qkv[:, -1] + gate_KC[:, None] * embedded_KHC
        y_KGHC = attention(i, qkv, v_KHC)
        x_DC = multiplied(layer["out"], y_KGHC.reshape(-1, *columns), x_DC)
        h_FC = multiplied(layer["fc"], x_DC, normed=True, squared=True)
        x_DC = spread(multiplied(layer["down"], h_FC, x_DC))
        if i == cfg.n_layer // 2:
            middle_DC = x_DC
    if cfg.backout:
        x_DC = x_DC - weights["backout_lambda"][0].astype(dtype) * middle_DC
    return rms(x_DC, axis=0), embedding_DC


def turned(
    qkv: jax.Array, v_KHC: jax.Array | None, tables: tuple[jax.Array, jax.Array], scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, key and value as attention takes them, of qkv and v as `Attend` has them; `tables`: of `model.rope`, for
    the columns.
    """
    cos, sin = (jnp.moveaxis(table[..., 0, :], -1, 0)[None, None] for table in tables)
    x_KGHC = qkv[:, :-1]
    halves = x_KGHC.reshape(*x_KGHC.shape[:2], 2, -1, *x_KGHC.shape[3:])
    swapped_KGHC = jax.lax.rev(halves, (2,)).reshape(x_KGHC.shape)
    qk = scale * rms(x_KGHC * cos + swapped_KGHC * sin, axis=2)
    return qk[:, :-1], qk[:, -1], qkv[:, -1] if v_KHC is None else v_KHC


def logits_of(weights: Weights, cfg: GPTConfig, x_DC: jax.Array, lengths_P: jax.Array | None = None) -> jax.Array:
    """Logits [vocabulary, *C] float32. A transpose right behind the product would make the slow one of it on a CPU."""
    logits_VC = layer_product(weights["head"], x_DC, lengths_P=lengths_P)[: cfg.vocab_size]
    return SOFTCAP * jnp.tanh(logits_VC.astype(jnp.float32) / SOFTCAP)


class Prompts(NamedTuple):
    """What a prefill computes of P prompts: final hidden states [D, P, T], token embeddings [P, T, D], and each
    layer's keys and values [P, T, K, H].
    """

    hidden_DPT: jax.Array
    embedding_PTD: jax.Array
    keys: list[jax.Array]
    values: list[jax.Array]


def read(weights: Weights, cfg: GPTConfig, tokens_PT: jax.Array, lengths_P: jax.Array | None = None) -> Prompts:
    """Runs whole prompts from position 0. ValueError where they reach past the rotary positions. With `lengths` what is
    computed of a prompt beyond its own may be anything.
    """
    check_length(cfg, tokens_PT.shape[1])
    # Each of the many lengths is a compilation, which takes mosaic seconds; cuDNN runs wherever mosaic does.
    impl = "cudnn" if cfg.attention == "mosaic" else cfg.attention
    keys, values = [], []
    positions_PT = jnp.broadcast_to(jnp.arange(tokens_PT.shape[1]), tokens_PT.shape)
    tables = rope(positions_PT, cfg.head_dim, cfg.rope_base, jnp.dtype(cfg.compute_dtype))

    def attention(i: int, qkv: jax.Array, v: jax.Array | None) -> jax.Array:
        if cfg.native:
            from kernels import native

            flat = tuple(table[0, :, 0] for table in tables)
            how = {"window": cfg.windows[i], "qk_scale": cfg.qk_scale, "eps": EPS}
            y_KGHPT, *new = native.prompt_attention(qkv, v, flat, lengths_P, **how)
            for kept, new_PKTH in zip((keys, values), new, strict=True):
                kept.append(new_PKTH.swapaxes(1, 2))
            return y_KGHPT
        q, k, v = turned(qkv, v, tables, cfg.qk_scale)
        q_PTNH = q.reshape(-1, *q.shape[2:]).transpose(2, 3, 0, 1)
        k_PTKH, v_PTKH = k.transpose(2, 3, 0, 1), v.transpose(2, 3, 0, 1)
        keys.append(k_PTKH)
        values.append(v_PTKH)
        y_PTNH = attend(q_PTNH, k_PTKH, v_PTKH, cfg.windows[i], impl)
        return y_PTNH.transpose(2, 3, 0, 1).reshape(q.shape)

    x_DPT, embedding_DPT = hidden(
        weights, cfg, tokens_PT, lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 0)))[:, :, :-1], attention, lengths_P
    )
    return Prompts(x_DPT, jnp.moveaxis(embedding_DPT, 0, -1), keys, values)


def put(panel_BKSH: jax.Array, new_BKH: jax.Array, slots_B: jax.Array) -> jax.Array:
    """The panel with one new key or value a row, in place."""
    if panel_BKSH.ndim == 3:  # a lone row, see `squeezed`
        return jax.lax.dynamic_update_slice_in_dim(panel_BKSH, new_BKH[0][:, None], slots_B[0], 1)
    return panel_BKSH.at[jnp.arange(len(slots_B)), :, slots_B].set(
        new_BKH, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )


def squeezed(cache: Cache) -> Cache:
    """The cache of a single row with panels [K, S, H]. XLA drops the dimension of one anyway, but not everywhere alike,
    and then copies every panel for every token.
    """
    return cache | {"own": [jax.tree.map(lambda panel: panel[0], panels) for panels in cache["own"]]}


def unsqueezed(cache: Cache) -> Cache:
    """What `squeezed` was made from."""
    return cache | {"own": [jax.tree.map(lambda panel: panel[None], panels) for panels in cache["own"]]}


def attend_cache(
    q_BKGH: jax.Array,
    own: dict[str, jax.Array],
    shared: dict[str, jax.Array] | None,
    positions_B: jax.Array,
    first_B: jax.Array,
    window: int,
) -> jax.Array:
    """One query a row, at positions_B, over its own slots and over those of the prompt that it shares: [B, K, G, H]."""
    batch, kv_heads, per_kv, width = q_BKGH.shape
    slots = own["k"].shape[-2]
    alone = own["k"].ndim == 3  # see `squeezed`

    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("...KGH,...KSH->...KGS", q, k, preferred_element_type=jnp.float32) * width**-0.5

    def masked(scores_BKGS: jax.Array, stands_BS: jax.Array, first_B: jax.Array) -> jax.Array:
        visible_BS = (stands_BS >= first_B[:, None]) & (stands_BS >= positions_B[:, None] - window)
        return jnp.where(visible_BS[:, None, None], scores_BKGS, MASKED)

    def together(x_BKGX: jax.Array) -> jax.Array:
        """Rows of a prompt, which stand next to each other, as queries of one product: [prompts, K, rows * G, X]."""
        x = x_BKGX.reshape(len(shared["k"]), -1, *x_BKGX.shape[1:]).swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def apart(x_PKMX: jax.Array) -> jax.Array:
        x = x_PKMX.reshape(*x_PKMX.shape[:2], -1, per_kv, x_PKMX.shape[-1]).swapaxes(1, 2)
        return x.reshape(batch, kv_heads, per_kv, -1)

    of_own = scores(q_BKGH[0], own["k"])[None] if alone else scores(q_BKGH, own["k"])
    of_own = masked(of_own, first_B[:, None] + ring_positions(positions_B - first_B, slots), first_B)
    if shared is None:
        weights_BKGS = jax.nn.softmax(of_own, axis=-1).astype(own["v"].dtype)
    else:
        of_prompt = apart(scores(together(q_BKGH), shared["k"]))
        of_prompt = masked(of_prompt, ring_positions(first_B - 1, shared["k"].shape[2]), jnp.zeros_like(first_B))
        both = jnp.concatenate([of_own, of_prompt], axis=-1)
        weights_BKGS, of_prompt = jnp.split(jax.nn.softmax(both, axis=-1).astype(own["v"].dtype), [slots], axis=-1)
    y_BKGH = jnp.einsum("...KGS,...KSH->...KGH", weights_BKGS[0] if alone else weights_BKGS, own["v"])
    if shared is None:
        return y_BKGH.reshape(q_BKGH.shape)
    return y_BKGH + apart(jnp.einsum("PKMS,PKSH->PKMH", together(of_prompt), shared["v"]))


def has_kernel(cfg: GPTConfig) -> bool:
    """Whether decoding attends over the cache in a kernel: with 16 bits where `--attention pallas` asks for it, and
    interpreted. What `auto` chooses, pallas itself in float32, does not bring it until it has been checked on a GPU.
    """
    asked = cfg.attention == "pallas_interpreted" or (cfg.attention, cfg.compute_dtype) == ("pallas", "bfloat16")
    return asked and cfg.head_dim & (cfg.head_dim - 1) == 0


def over_cache(
    qkv: jax.Array,
    v_KHB: jax.Array | None,
    own: dict[str, jax.Array],
    shared: dict[str, jax.Array] | None,
    tables: tuple[jax.Array, jax.Array],
    positions_B: jax.Array,
    first_B: jax.Array,
    cfg: GPTConfig,
    layer: int,
    slots_B: jax.Array | None = None,
    computed: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What each row's queries see, [B, K, G, H], of queries, key and value as `Attend` has them; and the row's own
    slots with the new key and value. `tables`: of `model.rope`, for positions_B. The kernels in C++ can take a cache of
    more rows, of which these are slots_B, and leave out those behind the first `computed`.
    """
    alone = own["k"].ndim == 3  # see `squeezed`
    if cfg.native:
        from kernels import native

        cos, sin = (table[:, 0] for table in tables)
        rows = len(positions_B)
        slots_B = jnp.arange(rows) if slots_B is None else slots_B
        computed = jnp.asarray(rows) if computed is None else computed
        given = qkv, v_KHB, own, shared, (cos, sin), positions_B, first_B, slots_B, computed
        how = {"window": cfg.windows[layer], "qk_scale": cfg.qk_scale, "eps": EPS}
        y_KGHB, own = native.attention(*given, **how)
        return y_KGHB.transpose(3, 0, 1, 2), own
    if has_kernel(cfg):
        # Pallas takes up to half a second to import.
        from kernels.decode_attention import Setup, decode_attention

        setup = Setup(cfg.windows[layer], cfg.qk_scale, EPS, "interpreted" in cfg.attention)
        heads = len(positions_B), cfg.n_kv_head
        cos, sin = (jnp.broadcast_to(table, (*heads, cfg.head_dim)) for table in tables)
        places = jnp.broadcast_to(jnp.stack([positions_B, first_B], axis=-1)[:, None], (*heads, 2))
        value_BKH = None if v_KHB is None else v_KHB.transpose(2, 0, 1)
        panels = {name: panel[None] for name, panel in own.items()} if alone else own
        given = qkv.transpose(3, 0, 1, 2), value_BKH, cos, sin, places, panels, shared
        y_BKGH, panels = per_device(functools.partial(decode_attention, setup=setup), (BATCH_AXES, "tensor"), given)
        return y_BKGH, {name: panel[0] for name, panel in panels.items()} if alone else panels
    q, k, v = turned(qkv, v_KHB, tables, cfg.qk_scale)
    slots_B = (positions_B - first_B) % own["k"].shape[-2]
    new = {"k": k.transpose(2, 0, 1), "v": v.transpose(2, 0, 1)}
    own = {name: put(panel, new[name], slots_B) for name, panel in own.items()}
    return attend_cache(q.transpose(3, 0, 1, 2), own, shared, positions_B, first_B, cfg.windows[layer]), own


def step(
    weights: Weights,
    cache: Cache,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    first_B: jax.Array,
    active_B: jax.Array,
    cfg: GPTConfig,
    slots_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Feeds one token a row at its position: logits [vocabulary, B] float32 of the next, and the cache with it. Its
    keys and values are of these rows, or with the kernels in C++ of more, of which these are slots_B.

    first_B: where a row's own slots begin, what is before being its shared prompt (0 where nothing is shared). A row
    that is not active may be fed again: it leaves "prev" as it was. The kernels in C++ do not compute those behind the
    last active one.
    """
    own = list(cache["own"])
    shared = cache.get("shared", [None] * cfg.n_layer)
    tables = rope(positions_B, cfg.head_dim, cfg.rope_base, jnp.dtype(cfg.compute_dtype))
    computed = jnp.max(jnp.where(active_B, 1 + jnp.arange(len(active_B), dtype=jnp.int32), 0))

    def attention(i: int, qkv: jax.Array, v: jax.Array | None) -> jax.Array:
        given = qkv, v, own[i], shared[i], tables, positions_B, first_B
        y_BKGH, own[i] = over_cache(*given, cfg, i, slots_B, computed)
        return y_BKGH.transpose(1, 2, 3, 0)

    def previous(x_DB: jax.Array) -> jax.Array:
        return jnp.where(positions_B[None] > 0, cache["prev"].T, 0).astype(x_DB.dtype)

    x_DB, embedding_DB = hidden(weights, cfg, tokens_B, previous, attention, computed[None])
    prev_BD = jnp.where(active_B[:, None], embedding_DB.T, cache["prev"])
    return logits_of(weights, cfg, x_DB, computed[None]), cache | {"prev": prev_BD, "own": own}
