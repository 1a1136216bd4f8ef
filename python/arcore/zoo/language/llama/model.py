"""The decoder and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arcore.nn import (
    DecoderLayer,
    GatedMLP,
    GroupedAttention,
    RMSNorm,
    RotaryTable,
)
from arcore.nn.causal import CausalDecoder
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.nn.packing import causal_packing, packed_ids
from arcore.nn.rotary import RopeType

GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Settings of `Llama`.

    Attributes:
        dim: width C.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key heads.
        hidden_dim: width of the feed-forward network.
        vocab_size: tokens V.
        head_dim: width of a head; C / num_heads when None.
        max_length: tokens of a text that the model is made for, prompt included.
        norm_eps: of the norms.
        rope_theta: base of the rotary rates.
        rope_type: how they are stretched, see `arcore.nn.RotaryTable`, as the next four.
        rope_factor: of the stretch.
        rope_low_freq_factor: for `"llama3"`.
        rope_high_freq_factor: for `"llama3"`.
        rope_original_length: for `"llama3"`.
        qkv_bias: biases of queries, keys and values.
        out_bias: bias of the attention's projection out.
        mlp_bias: biases of the feed-forward network.
        window: a token sees only so many places back, itself included; None for all.
        tie_embeddings: the last linear layer is the embedding.

    Raises:
        ValueError: a size is below 1, or heads do not divide the width.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    vocab_size: int
    head_dim: int | None = None
    max_length: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("dim", "num_layers", "num_heads", "num_kv_heads", "hidden_dim", "vocab_size", "max_length")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"expected num_heads to divide dim={self.dim} but got {self.num_heads}; or set head_dim"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"expected a window of at least 1 but got {self.window}; None is no window")


@check_kinds
class Llama(CausalDecoder):
    """The language model. A `DraftableModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        self.window = config.window
        head_dim = config.head_dim or config.dim // config.num_heads
        self.embedding = nn.Embedding(
            config.vocab_size, config.dim, _weight=torch.empty(config.vocab_size, config.dim)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(
                config.dim,
                attention=GroupedAttention(
                    config.dim,
                    num_heads=config.num_heads,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=head_dim,
                    qkv_bias=config.qkv_bias,
                    out_bias=config.out_bias,
                ),
                mlp=GatedMLP(config.dim, config.hidden_dim, bias=config.mlp_bias),
                norm_eps=config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = RotaryTable(
            head_dim,
            theta=config.rope_theta,
            kind=config.rope_type,
            factor=config.rope_factor,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            original_length=config.rope_original_length,
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        if self.embedding.weight.is_meta:
            return
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                # The variance of the residual stream stays the same for any depth.
                depth = 2 * self.config.num_layers if name.endswith(("out.weight", "down.weight")) else 1
                parameter.normal_(std=0.02 / depth**0.5)

    @check_kinds
    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at each position.

        Args:
            ids: int64 `[B, L]`.
            mask: bool `[B, L]`, False at padding, which no token sees; what comes out there means nothing.
            seq_idx: int32 `[B, L]`, which of several sequences packed into a row each token belongs to; they do not
                see each other. Negative means padding.
            cu_seqlens: int32 or int64 `[S + 1]`, the same for a single row (B = 1): starts of S sequences, and L.

        Returns:
            float32 `[B, L, V]`.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong, an id out of range, or both `seq_idx` and `cu_seqlens` are given.
        """
        return self.logits(self.hidden(ids, mask=mask, seq_idx=seq_idx, cu_seqlens=cu_seqlens))

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What `logits` makes logits of: `[B, L, C]` behind the last norm. Arguments and errors as for `forward`."""
        x = self.embed(ids)
        sequence = packed_ids(ids, mask=mask, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        if sequence is None:
            visible, angles = self.behind((0,), ids.shape[1], ids.device)
        else:
            visible, positions = causal_packing(sequence, self.config.window)
            angles = self.rotary.at(positions)
        return self.run(x, angles, visible)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of tokens, int64 `[B, L]` to `[B, L, C]`."""
        if ids.dim() != 2:
            raise ValueError(f"expected token ids of shape [B, L] but got {tuple(ids.shape)}")
        check_ids("token ids", ids, self.vocab_size)
        out: Tensor = self.embedding(ids)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of what `hidden` returned: `[..., C]` to float32 `[..., V]`."""
        return self.last_layer(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The last linear layer's weight `[V, C]`, for `arcore.ops.linear_logprobs`."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return head.weight

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> LlamaConfig:
        """The config of published weights, from the config.json of transformers beside them.

        Raises:
            ValueError: it is of another kind of model, or asks for what this one cannot do.
        """
        kind = content.get("model_type")
        if kind not in ("llama", "mistral", "qwen2"):
            raise ValueError(f"expected model_type llama, mistral or qwen2 but got {kind!r}")
        if content.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"expected hidden_act='silu' but got {content['hidden_act']!r}")
        window = content.get("sliding_window")
        if kind == "qwen2":
            layer_types = set(content.get("layer_types") or ["full_attention"])
            if content.get("use_sliding_window") and layer_types != {"full_attention"}:
                raise ValueError("a sliding window in some of Qwen2's layers is not supported")
            window = None
        bias = content.get("attention_bias", False)
        return LlamaConfig(
            dim=content["hidden_size"],
            num_layers=content["num_hidden_layers"],
            num_heads=content["num_attention_heads"],
            num_kv_heads=content.get("num_key_value_heads") or content["num_attention_heads"],
            hidden_dim=content["intermediate_size"],
            vocab_size=content["vocab_size"],
            head_dim=content.get("head_dim"),
            max_length=content.get("max_position_embeddings", 2048),
            norm_eps=content.get("rms_norm_eps", 1e-6),
            qkv_bias=kind == "qwen2" or bias,
            out_bias=kind == "llama" and bias,
            mlp_bias=content.get("mlp_bias", False),
            window=window if kind != "llama" else None,
            tie_embeddings=content.get("tie_word_embeddings", False),
            **_rope(content),
        )

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the layout of transformers under our names; projections that we compute together are joined.

        Raises:
            ValueError: the config ties embedding and last layer but they differ.
        """
        plain = {"embed_tokens.weight": "embedding.weight", "norm.weight": "norm.weight"}
        in_layers = {
            "self_attn.o_proj": "attention.out",
            "mlp.down_proj": "mlp.down",
            "input_layernorm": "norm1",
            "post_attention_layernorm": "norm2",
        }
        joined = {
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        }
        left = {
            key.removeprefix("model."): value
            for key, value in state.items()
            if not key.endswith("rotary_emb.inv_freq")
        }
        ours = {name: left.pop(key) for key, name in plain.items() if key in left}
        for layer in range(self.config.num_layers):
            for part in ("weight", "bias"):
                for key, name in in_layers.items():
                    if (found := left.pop(f"layers.{layer}.{key}.{part}", None)) is not None:
                        ours[f"layers.{layer}.{name}.{part}"] = found
                for name, keys in joined.items():
                    full = [f"layers.{layer}.{key}.{part}" for key in keys]
                    if all(key in left for key in full):
                        ours[f"layers.{layer}.{name}.{part}"] = torch.cat([left.pop(key) for key in full])
        head = left.pop("lm_head.weight", None)
        if self.lm_head is not None and head is not None:
            ours["lm_head.weight"] = head
        elif head is not None and not torch.equal(head, ours.get("embedding.weight", head)):
            raise ValueError(
                "lm_head.weight is not the embedding, but the config ties them; set tie_embeddings=False"
            )
        return ours | left


def _rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers' configs, of version 5 (`rope_parameters`) or before."""
    found = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rotary rates stretched by {kind!r} are not supported; default, linear and llama3 are"
        )
    names = {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_length",
    }
    theta = found.get("rope_theta", content.get("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_type": kind} | {
        ours: found[theirs] for theirs, ours in names.items() if found.get(theirs) is not None
    }
