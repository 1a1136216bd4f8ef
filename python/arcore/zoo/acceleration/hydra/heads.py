"""The heads, Hydra++'s prefix layer, and their loss."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn import DecoderLayer, GatedMLP, GroupedAttention, RMSNorm, RotaryTable, TokenCache, linear
from arcore.nn.causal import CausalDecoder
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import TokenModel


@check_kinds
@dataclass(frozen=True, kw_only=True)
class HydraConfig:
    """Settings of `HydraHeads`.

    Attributes:
        dim: width C of the model that they serve.
        vocab_size: its tokens V.
        kind: `"hydra"`, or `"medusa"` for heads that see the hidden state only.
        num_heads: tokens ahead.
        num_layers: residual blocks of a head.
        shared_lm_head: heads end in the model's own last layer instead of one each; much smaller, not in the paper.
        draft_vocab: tokens D that heads may propose, the most frequent ones of the text that they are trained on; all
            when None. On a CPU most of a head's time is its last layer (not in the paper; FR-Spec, arXiv:2502.14856).
        prefix_heads: query heads of Hydra++'s prefix layer, a further layer of the model's kind that heads read
            instead of the hidden states; None for heads without.
        prefix_kv_heads: its key heads; as many as query heads when None.
        prefix_hidden_dim: width of its feed-forward network; 8/3 C when None.
        prefix_theta: base of its rotary rates.

    Raises:
        ValueError: a size is below 1, `draft_vocab` is above the vocabulary, or `kind` unknown.
    """

    dim: int
    vocab_size: int
    kind: Literal["hydra", "medusa"] = "hydra"
    num_heads: int = 4
    num_layers: int = 1
    shared_lm_head: bool = False
    draft_vocab: int | None = None
    prefix_heads: int | None = None
    prefix_kv_heads: int | None = None
    prefix_hidden_dim: int | None = None
    prefix_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("dim", "vocab_size", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.draft_vocab is not None and not 1 <= self.draft_vocab <= self.vocab_size:
            raise ValueError(
                f"expected draft_vocab from 1 to the {self.vocab_size} tokens of the model but got {self.draft_vocab}"
            )
        if self.kind not in ("hydra", "medusa"):
            raise ValueError(f'expected kind "hydra" or "medusa" but got {self.kind!r}')
        if self.prefix_heads is not None and (self.prefix_heads < 1 or self.dim % self.prefix_heads):
            raise ValueError(f"expected prefix_heads to divide dim={self.dim} but got {self.prefix_heads}")

    @property
    def proposed(self) -> int:
        """Tokens that heads tell apart."""
        return self.vocab_size if self.draft_vocab is None else self.draft_vocab


class ResBlock(nn.Module):
    """`skip(x) + silu(linear(x))`, with a projection as the skip where the width changes.

    The new part begins at zero.
    """

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, dim)
        self.res_connection = nn.Identity() if inputs == dim else nn.Linear(inputs, dim)
        if not self.linear.weight.is_meta:
            nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., dim]`."""
        out: Tensor = self.res_connection(x) + F.silu(self.linear(x))
        return out


class PrefixLayer(CausalDecoder):
    """Hydra++'s prefix layer: one more layer of the model's kind over its hidden states, with a cache of its own.

    It begins as a norm whose scale is the model's.
    """

    # It reads what another model read, which has its own limit.
    max_length = 1 << 30

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        assert config.prefix_heads is not None
        head_dim = config.dim // config.prefix_heads
        self.vocab_size = 0
        layer = DecoderLayer(
            config.dim,
            attention=GroupedAttention(
                config.dim,
                num_heads=config.prefix_heads,
                num_kv_heads=config.prefix_kv_heads or config.prefix_heads,
                head_dim=head_dim,
            ),
            mlp=GatedMLP(config.dim, config.prefix_hidden_dim or 8 * config.dim // 3),
            norm_eps=1e-5,
        )
        self.layers = nn.ModuleList([layer])
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.rotary = RotaryTable(head_dim, theta=config.prefix_theta)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                if name.endswith(("out.weight", "down.weight")):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden: Tensor, cache: TokenCache | None = None) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`, each place from those up to it; with a cache they follow what it holds."""
        lengths = (0,) if cache is None else cache.lengths
        mask, angles = self.behind(lengths, hidden.shape[1], hidden.device)
        return self.run(hidden, angles, mask, cache)


def check_base(model: Any) -> None:
    """Raise TypeError where a model does not give its hidden states, which heads read."""
    if not hasattr(model, "hidden"):
        raise TypeError(
            f"heads read a model's hidden states, which a {type(model).__name__} does not give: use a model such as "
            "llama_tiny"
        )


@check_kinds
class HydraHeads(nn.Module):
    """The heads. They use embeddings, and with `shared_lm_head` the last layer, of the model that they serve.

    Args:
        config: settings.
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.blocks = nn.ModuleList(
            nn.Sequential(
                ResBlock(dim * (i + 2 if config.kind == "hydra" else 1), dim),
                *(ResBlock(dim, dim) for _ in range(config.num_layers - 1)),
            )
            for i in range(config.num_heads)
        )
        self.lm_heads = (
            None
            if config.shared_lm_head
            else nn.ModuleList(nn.Linear(dim, config.proposed) for _ in range(config.num_heads))
        )
        self.prefix = None if config.prefix_heads is None else PrefixLayer(config)  # type: ignore[abstract]
        self.draft_tokens: Tensor | None
        self.register_buffer(
            "draft_tokens", None if config.draft_vocab is None else torch.arange(config.draft_vocab)
        )

    @torch.no_grad()
    @check_kinds
    def start_from(self, model: Any, text: Tensor | None = None) -> HydraHeads:
        """Begin with the model's last layer in every head, as the paper does.

        Args:
            model: the model.
            text: tokens `[N]` whose most frequent ones are proposed, for heads with a `draft_vocab`.
        """
        self.check(model)
        if self.draft_tokens is not None and text is not None:
            counts = torch.bincount(text.flatten().long(), minlength=self.config.vocab_size)
            self.draft_tokens.copy_(counts.topk(self.config.proposed).indices.sort().values)
        if self.prefix is not None:
            self.prefix.norm.weight.fill_(model.norm.weight.square().mean().sqrt())  # type: ignore[operator, union-attr]
        weight = self.last_layer(model)
        for head in self.lm_heads or ():
            head.weight.copy_(weight)  # type: ignore[operator, union-attr]
            head.bias.zero_()  # type: ignore[operator, union-attr]
        return self

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released heads (`hydra_lm_head.pt`), with or without a prefix layer, under our names.

        The embedding that the released prefix layer holds is never read and is dropped.

        Raises:
            ValueError: heads of the prefix layer are of another width.
        """
        ours: dict[str, Tensor] = {}
        # Dropout may stand between the blocks, so their numbers have gaps.
        places: dict[str, set[int]] = {}
        for key in state:
            if found := _OFFICIAL_BLOCK.match(key):
                places.setdefault(found[1], set()).add(int(found[2]))
        for key, value in state.items():
            if key == f"{_PREFIX}embed_tokens.weight":
                continue
            if key.endswith("rotary_emb.inv_freq"):
                heads = self.config.prefix_heads
                if heads is not None and 2 * len(value) * heads != self.config.dim:
                    raise ValueError(
                        f"the prefix layer has heads of width {2 * len(value)} but the model has "
                        f"{self.config.dim // heads}: set prefix_heads"
                    )
                continue
            if found := _OFFICIAL_BLOCK.match(key):
                key = f"blocks.{found[1]}.{sorted(places[found[1]]).index(int(found[2]))}.{found[3]}"
            ours[_OFFICIAL_LAST.sub(r"lm_heads.\1.\2", key)] = value
        first = f"{_PREFIX}layers.0."
        for parts, name in _OFFICIAL_PREFIX.items():
            keys = [f"{_PREFIX if part == 'norm' else first}{part}.weight" for part in parts.split()]
            if all(key in ours for key in keys):
                ours[name] = torch.cat([ours.pop(key) for key in keys])
        return ours

    def last_layer(self, model: Any) -> Tensor:
        """The model's last layer for the tokens that heads propose, `[D, C]`."""
        weight = _lm_weight(model)[: self.config.vocab_size]
        return weight if self.draft_tokens is None else weight[self.draft_tokens]

    def places(self, ids: Tensor) -> Tensor:
        """Tokens as places among those that heads propose; -100, which a loss ignores, for the others."""
        if self.draft_tokens is None:
            return ids
        table = torch.full((self.config.vocab_size,), -100, device=ids.device)
        return table.scatter(0, self.draft_tokens, torch.arange(len(self.draft_tokens), device=ids.device))[
            ids
        ]

    def check(self, model: Any) -> None:
        """Raise ValueError unless the heads fit the model, and TypeError where it does not give its hidden states."""
        check_base(model)
        width = model.embedding.weight.shape[1]
        if (width, model.vocab_size) != (self.config.dim, self.config.vocab_size):
            raise ValueError(
                f"the heads are made for a model of width {self.config.dim} with {self.config.vocab_size} tokens but "
                f"this one has width {width} and {model.vocab_size} tokens; train heads for it"
            )

    def head(
        self, i: int, hidden: Tensor, embedded: Tensor, model: Any, last_layer: Tensor | None = None
    ) -> Tensor:
        """Logits of head i.

        Args:
            i: head; it predicts the token i + 2 places after the one that `hidden` was computed from.
            hidden: `[..., C]`, of the model behind its last norm, or of the prefix layer where there is one.
            embedded: `[..., i + 1, C]`, the tokens between; Medusa's heads do not look at them.
            model: the model.
            last_layer: what `last_layer(model)` gave, so that it is not gathered again.

        Returns:
            float32 `[..., D]`, of the tokens that heads propose: all V without a `draft_vocab`.
        """
        x = hidden
        if self.config.kind == "hydra":
            x = torch.cat([hidden.unsqueeze(-2), embedded], dim=-2).flatten(-2)
        x = self.blocks[i](x)
        if self.lm_heads is None:
            return linear(x, self.last_layer(model) if last_layer is None else last_layer).float()
        logits: Tensor = self.lm_heads[i](x).float()
        return logits

    @check_kinds
    def forward(self, hidden: Tensor, ids: Tensor, model: Any) -> list[Tensor]:
        """Logits of all heads at all places of texts, given what stands there.

        Args:
            hidden: `[B, L, C]` of the model on `ids`.
            ids: int64 `[B, L]`.
            model: the model.

        Returns:
            For head i float32 `[B, L - i - 2, D]`: at place t the distribution of token t + i + 2.
        """
        if self.prefix is not None:
            hidden = self.prefix(hidden)
        embedded = model.embedding(ids).detach()
        last_layer = self.last_layer(model) if self.lm_heads is None else None
        out = []
        for i in range(self.config.num_heads):
            count = ids.shape[1] - i - 2
            between = torch.stack([embedded[:, k : k + count] for k in range(1, i + 2)], dim=2)
            out.append(self.head(i, hidden[:, :count], between, model, last_layer))
        return out


_PREFIX = "prefix_embeding_layer."
_OFFICIAL_BLOCK = re.compile(r"^hydra_mlp\.(\d+)\.(\d+)\.(.+)$")
_OFFICIAL_LAST = re.compile(r"^hydra_lm_head\.(\d+)\.(?:1\.)?(weight|bias)$")
# Which of the released layer's parts, one after the other, are which of ours.
_OFFICIAL_PREFIX = {
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "prefix.layers.0.attention.qkv.weight",
    "self_attn.o_proj": "prefix.layers.0.attention.out.weight",
    "mlp.gate_proj mlp.up_proj": "prefix.layers.0.mlp.gate_up.weight",
    "mlp.down_proj": "prefix.layers.0.mlp.down.weight",
    "input_layernorm": "prefix.layers.0.norm1.weight",
    "post_attention_layernorm": "prefix.layers.0.norm2.weight",
    "norm": "prefix.norm.weight",
}


@check_kinds
def hydra_loss(
    heads: HydraHeads, model: TokenModel, ids: Tensor, *, lm: float = 1.0, teacher: float = 0.0
) -> Tensor:
    """The paper's training loss, summed over heads and averaged over places.

    Args:
        heads: trained.
        model: frozen.
        ids: int64 `[B, L]`.
        lm: weight of the cross entropy with the text (Hydra: 1).
        teacher: weight of the cross entropy with the model's own distributions (Hydra++: 1, with lm = 0).

    Returns:
        Scalar.
    """
    network: Any = model
    with torch.no_grad():
        hidden = network.hidden(ids)
        soft = linear(hidden, heads.last_layer(model)).float().softmax(-1) if teacher else None
        targets = heads.places(ids)
    loss = ids.new_zeros((), dtype=torch.float32)
    for i, logits in enumerate(heads(hidden, ids, model)):
        if lm:
            loss = loss + lm * F.cross_entropy(logits.flatten(0, 1), targets[:, i + 2 :].flatten())
        if soft is not None:
            wanted = soft[:, i + 1 : i + 1 + logits.shape[1]]
            loss = loss + teacher * F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
    return loss


def _lm_weight(model: Any) -> Tensor:
    weight: Tensor = model.embedding.weight if model.lm_head is None else model.lm_head.weight
    return weight


@preset
def hydra_tiny() -> HydraConfig:
    """Three heads for a model of width 64 on bytes."""
    return HydraConfig(dim=64, vocab_size=256, num_heads=3)


@preset
def medusa_tiny() -> HydraConfig:
    """Medusa's heads of the same number."""
    return HydraConfig(dim=64, vocab_size=256, num_heads=3, kind="medusa")


@preset
def medusa_smollm2_135m() -> HydraConfig:
    """Medusa's heads of the same kind, for SmolLM2 of 135 M parameters."""
    return HydraConfig(dim=576, vocab_size=49152, kind="medusa", shared_lm_head=True, draft_vocab=4096)


@preset
def hydra_smollm2_135m() -> HydraConfig:
    """Four heads for SmolLM2 of 135 M parameters, which end in its own last layer and propose frequent tokens."""
    return HydraConfig(dim=576, vocab_size=49152, shared_lm_head=True, draft_vocab=4096)


@preset
def hydra_plus_tiny() -> HydraConfig:
    """Hydra++: three heads of four layers behind a prefix layer, for a model of width 64 on bytes."""
    return HydraConfig(
        dim=64,
        vocab_size=256,
        num_heads=3,
        num_layers=4,
        prefix_heads=4,
        prefix_kv_heads=2,
        prefix_hidden_dim=176,
    )


@preset
def hydra_plus_smollm2_135m() -> HydraConfig:
    """Hydra++ for SmolLM2 of 135 M parameters: heads of four layers behind a prefix layer, frequent tokens."""
    return HydraConfig(
        dim=576,
        vocab_size=49152,
        num_layers=4,
        shared_lm_head=True,
        draft_vocab=4096,
        prefix_heads=9,
        prefix_kv_heads=3,
        prefix_hidden_dim=1536,
        prefix_theta=100000.0,
    )


@preset
def hydra_vicuna_7b() -> HydraConfig:
    """The paper's heads for Vicuna of 7 B parameters."""
    return HydraConfig(dim=4096, vocab_size=32000)


@preset
def hydra_plus_vicuna_7b() -> HydraConfig:
    """The paper's Hydra++ for Vicuna of 7 B parameters: heads of four layers behind a prefix layer."""
    return HydraConfig(dim=4096, vocab_size=32000, num_layers=4, prefix_heads=32, prefix_hidden_dim=11008)
