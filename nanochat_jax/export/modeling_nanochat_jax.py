"""The GPT of nanochat-jax in PyTorch, for Hugging Face transformers (4.57 and up): the numerics of its model.py.

Part of an exported model: transformers runs it with `trust_remote_code=True`. Names of weights are karpathy/nanochat's.
Rows of different lengths are padded on the left. Without: attention kernels, caches other than DynamicCache (whose keys
and values are whole, also where a layer sees a window of them only), gradient checkpointing, a vocabulary that grows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = 1.1920929e-07
SOFTCAP = 15.0
SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls it."""


class NanochatJaxConfig(PretrainedConfig):
    """What model.py's GPTConfig says; `windows`: keys to the left of its own position that a query sees, by layer."""

    model_type = "nanochat_jax"

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        head_dim: int = 128,
        max_position_embeddings: int = 2048,
        windows: tuple[int, ...] = (),
        rope_base: float = 100_000.0,
        qk_scale: float = 1.2,
        value_embed_layers: tuple[int, ...] = (),
        lambdas: bool = True,
        smear: bool = True,
        backout: bool = True,
        use_cache: bool = True,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.windows = list(windows)
        self.rope_base = rope_base
        self.qk_scale = qk_scale
        self.value_embed_layers = list(value_embed_layers)
        self.lambdas = lambdas
        self.smear = smear
        self.backout = backout
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm without a gain, computed in float32."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on halves."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """No layer has a bias."""
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Windowed causal self-attention with rotary positions, normed q and k, and gated value embeddings."""

    def __init__(self, config: NanochatJaxConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.c_q = linear(width, config.num_attention_heads * config.head_dim)
        self.c_k, self.c_v = linear(width, kv_width), linear(width, kv_width)
        self.c_proj = linear(config.num_attention_heads * config.head_dim, width)
        if layer in config.value_embed_layers:
            self.ve_gate = linear(GATE_CHANNELS, config.num_key_value_heads)

    def forward(
        self,
        h: torch.Tensor,
        embeddings: torch.Tensor,
        value_embeds: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """h, embeddings [B, T, D], visible [B, 1, T, S] -> [B, T, D]."""
        config = self.config
        batch, length, _ = h.shape

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(batch, length, -1, config.head_dim).transpose(1, 2)

        q, k, v = heads(self.c_q(h)), heads(self.c_k(h)), heads(self.c_v(h))
        if value_embeds is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(h[..., :GATE_CHANNELS]))
            v = v + gate.transpose(1, 2)[..., None] * heads(value_embeds)
        q, k = (config.qk_scale * rms(rotate(x, *tables)) for x in (q, k))
        if cache is not None:
            if self.layer == 0:
                # Smear wants the newest token's embedding at the next step: it travels as more channels of the values.
                v = torch.cat([v, embeddings.view(batch, length, v.shape[1], -1).transpose(1, 2)], dim=-1)
            k, v = cache.update(k, v, self.layer)
            v = v[..., : config.head_dim]
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """relu(h @ fc)^2 @ proj."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.c_proj(F.relu(self.c_fc(h)).square())


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: NanochatJaxConfig, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config.hidden_size)

    def forward(self, x: torch.Tensor, *args: object) -> torch.Tensor:
        """[B, T, D] and what attention takes after it -> [B, T, D]."""
        x = x + self.attn(rms(x), *args)
        return x + self.mlp(rms(x))


class NanochatJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """Tokens -> logits, softly capped at +-15; with `labels`, the mean loss of the next tokens, too."""

    config_class = NanochatJaxConfig
    base_model_prefix = ""
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    accepts_loss_kwargs = False  # of several microbatches Trainer has to take the mean itself

    def __init__(self, config: NanochatJaxConfig) -> None:
        super().__init__(config)
        layers, width = config.num_hidden_layers, config.hidden_size
        blocks = nn.ModuleList(Block(config, i) for i in range(layers))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, width), "h": blocks})
        kv_width = config.num_key_value_heads * config.head_dim
        tables = {str(i): nn.Embedding(config.vocab_size, kv_width) for i in config.value_embed_layers}
        self.value_embeds = nn.ModuleDict(tables)
        self.lm_head = linear(width, config.vocab_size)
        if config.smear:
            self.smear_gate = linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.lambdas:
            self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.zeros(layers))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the export; a fresh model is made in JAX."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.transformer["wte"] = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] behind the S - T tokens of the cache (earlier versions of transformers: past_key_values),
        attention_mask [B, S] (0: padding, on the left).
        """
        config = self.config
        batch, length = input_ids.shape
        cache = past_key_values if cache is None else cache
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        before = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch, before + length, dtype=torch.long, device=input_ids.device)
        real = attention_mask.bool()
        keys_at = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        at = keys_at[:, before:]

        x = embeddings = rms(self.transformer["wte"](input_ids))
        if config.smear:
            newest = torch.zeros_like(x[:, :1])
            if before:
                kept = cache.layers[0].values[:, :, -1:, config.head_dim :]
                newest = kept.transpose(1, 2).reshape(batch, 1, -1)
            previous = torch.cat([newest, x[:, :-1]], dim=1) * (at > 0)[..., None]
            gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
            x = x + self.smear_lambda.to(x.dtype) * gate * previous
        x0 = middle = x

        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=x.device) / config.head_dim
        angles = (at[..., None].float() / config.rope_base**half)[:, None]
        tables = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        distance = at[:, :, None] - keys_at[:, None]
        itself = torch.arange(before, before + length, device=x.device)[:, None] == torch.arange(
            before + length, device=x.device
        )
        visible = {  # padding sees itself, as a row of nothing has no softmax
            window: ((distance >= 0) & (distance <= window) & real[:, None] | itself)[:, None]
            for window in set(config.windows)
        }
        for i, block in enumerate(self.transformer["h"]):
            if config.lambdas:
                # Each product in float32, rounded: `scaled` in model.py.
                parts = ((self.resid_lambdas[i], x), (self.x0_lambdas[i], x0))
                x = sum((scalar.float() * part.float()).to(x.dtype) for scalar, part in parts)
            table = self.value_embeds[str(i)](input_ids) if i in config.value_embed_layers else None
            x = block(x, embeddings, table, tables, visible[config.windows[i]], cache)
            if i == config.num_hidden_layers // 2:
                middle = x
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        logits = self.lm_head(rms(x)[:, -logits_to_keep:]).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
