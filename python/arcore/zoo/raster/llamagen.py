"""LlamaGen: images as a text of codes, raster order, by the layers of Llama (Sun et al., arXiv:2406.06525).

A class token comes first, then the codes of a VQ tokenizer row by row. Layers are Llama's, with rotary angles of two
axes: half of the channel pairs turn by the row, half by the column. The class token has no place in the grid; the
released code gives it cosine *and* sine zero, so its query and key are zero vectors: every later token sees the logit 0
on it, and the class acts through its value alone. That is kept, because the published weights need it.

It differs from Llama in these angles and in its prompt: the token V + c stands for class c, V + `num_classes` for none,
which is the text of guidance (`arcore.decoding.GuidedModel`). Decoders need to know nothing else.

Images from captions are a neighbour, `llamagen_t2i`. Left out: the dropout of the training recipe.

Legend: B rows, L tokens, C width, V codes, S side of the code map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arcore.catalog import Published, System, create_model, preset
from arcore.catalog.claims import Claim, at_most, equals, shaken, steps
from arcore.decoding import GuidedModel, generate, jacobi
from arcore.nn import (
    Angles,
    DecoderLayer,
    GatedMLP,
    GroupedAttention,
    RMSNorm,
    pairs_to_halves,
    signed_angles,
)
from arcore.nn.causal import CausalDecoder
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="llamagen",
    title="LlamaGen",
    paper="arXiv:2406.06525",
    paper_title="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
    topic="raster",
    kind="model",
    model="LlamaGen",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    recipe="raster",
    summary="Class-conditional images as raster-order codes, by Llama's layers with two-axis rotary positions.",
    claim="Decoding with a cache gives the logits of one pass; class tokens have rotary angles of zero.",
    checked_on="published layout, random weights",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    """Settings of `LlamaGen`.

    Attributes:
        dim: width C.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key heads; as many as query heads when None.
        vocab_size: codes V.
        side: codes S of an image's side.
        num_classes: classes.
        multiple_of: the feed-forward network's width, 8/3 C, is rounded up to a multiple of this.
        norm_eps: of the norms.
        rope_theta: base of the rotary rates.

    Raises:
        ValueError: a size is below 1, or heads do not divide the width into multiples of 4.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    vocab_size: int = 16384
    side: int = 16
    num_classes: int = 1000
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "vocab_size", "side", "num_classes", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ValueError(
                f"expected heads of a width that is a multiple of 4 but got dim={self.dim} and "
                f"num_heads={self.num_heads}"
            )

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward network."""
        wanted = 8 * self.dim // 3
        return -(-wanted // self.multiple_of) * self.multiple_of


class GridRotary:
    """Angles of the tokens of a condition and the codes of a map behind them; positions beyond the map have those of
    its last code.

    Args:
        head_dim: channels of a head, a multiple of 4.
        side: of the map.
        theta: base of the rates.
        front: tokens of the condition, whose angles are zero.
    """

    def __init__(self, head_dim: int, *, side: int, theta: float, front: int = 1) -> None:
        half = head_dim // 2
        rates = 1.0 / (theta ** (torch.arange(0, half, 2, device="cpu")[: half // 2].float() / half))
        turned = torch.arange(side, device="cpu").unsqueeze(1) * rates  # [S, D / 4]
        rows, columns = turned.repeat_interleave(side, 0), turned.repeat(side, 1)
        table = signed_angles(torch.cat([rows, columns], dim=-1))
        none = torch.zeros_like(table.cos[:, :1]).repeat(1, front, 1, 1)
        self._table = Angles(torch.cat([none, table.cos], 1), torch.cat([none, table.sin], 1))

    def at(self, positions: Tensor) -> Angles:
        """See `arcore.nn.causal.Rotary`."""
        table = self._on(positions.device)
        index = positions.clamp(max=table.cos.shape[1] - 1)
        index = index if index.dim() == 2 else index.unsqueeze(0)
        return Angles(table.cos[0, index], table.sin[0, index])

    def span(self, start: int, stop: int, device: torch.device) -> Angles:
        """See `arcore.nn.causal.Rotary`."""
        table = self._on(device)
        if stop > table.cos.shape[1]:
            return self.at(torch.arange(start, stop, device=device))
        return Angles(table.cos[:, start:stop], table.sin[:, start:stop])

    def _on(self, device: torch.device) -> Angles:
        if self._table.cos.device != device:
            self._table = Angles(self._table.cos.to(device), self._table.sin.to(device))
        return self._table


@check_kinds
class LlamaGen(CausalDecoder):
    """The model. A `DraftableModel` (`arcore.nn.protocols`) whose prompts are class tokens.

    Args:
        config: settings.
    """

    # Where the weights stand in the released files.
    official_entry = "model"
    # Drafts may stand beyond the last code; they are never kept.
    DRAFTS = 256

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_length = 1 + config.side**2 + self.DRAFTS
        head_dim = config.dim // config.num_heads
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config.dim,
                attention=GroupedAttention(
                    config.dim,
                    num_heads=config.num_heads,
                    num_kv_heads=config.num_kv_heads or config.num_heads,
                    head_dim=head_dim,
                ),
                mlp=GatedMLP(config.dim, config.hidden_dim),
                norm_eps=config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = GridRotary(head_dim, side=config.side, theta=config.rope_theta)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        if not self.lm_head.weight.is_meta:
            nn.init.zeros_(self.lm_head.weight)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    @check_kinds
    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits of every code of images.

        Args:
            codes: int64 `[B, L]`, the first L codes of S * S.
            labels: int64 `[B]`, classes; `num_classes` stands for none.

        Returns:
            float32 `[B, L, V]`, of each code given those before it.
        """
        check_ids("labels", labels, self.config.num_classes + 1)
        prompt = self.prompt(labels)
        return self.logits(self.hidden(torch.cat([prompt, codes[:, :-1]], dim=1)))

    def hidden(self, ids: Tensor) -> Tensor:
        """What `logits` makes logits of: class token and codes `[B, L]` to `[B, L, C]`."""
        mask, angles = self.behind((0,), ids.shape[1], ids.device)
        return self.run(self.embed(ids), angles, mask)

    @check_kinds
    def prompt(self, labels: Tensor) -> Tensor:
        """The tokens that stand for classes: int64 `[B]` to `[B, 1]`."""
        check_ids("labels", labels, self.config.num_classes + 1)
        return labels.unsqueeze(1) + self.config.vocab_size

    @check_kinds
    def guided(self, scale: float, interval: tuple[int, int] | None = None) -> GuidedModel:
        """The model under guidance; arguments as for `GuidedModel`."""
        none = torch.tensor([[self.config.vocab_size + self.config.num_classes]])
        return GuidedModel(self, scale=scale, uncond=none.to(self.embedding.weight.device), interval=interval)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of codes, and of classes from V on: int64 `[B, L]` to `[B, L, C]`."""
        if ids.dim() != 2:
            raise ValueError(f"expected ids of shape [B, L] but got {tuple(ids.shape)}")
        check_ids("ids", ids, self.config.vocab_size + self.config.num_classes + 1)
        code = ids < self.config.vocab_size
        out: Tensor = torch.where(
            code.unsqueeze(-1),
            self.embedding(ids.clamp(max=self.config.vocab_size - 1)),
            self.class_embedding((ids - self.config.vocab_size).clamp(min=0)),
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., C]` to float32 `[..., V]`."""
        return self.last_layer(hidden, self.lm_head.weight)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released files under our names, rotary pairs put into our order."""
        names = {
            "cls_embedding.embedding_table.weight": "class_embedding.weight",
            "tok_embeddings.weight": "embedding.weight",
            "norm.weight": "norm.weight",
            "output.weight": "lm_head.weight",
        }
        in_layers = {
            "attention.wo.weight": "attention.out.weight",
            "feed_forward.w2.weight": "mlp.down.weight",
            "attention_norm.weight": "norm1.weight",
            "ffn_norm.weight": "norm2.weight",
        }
        left = {key: value for key, value in state.items() if key != "freqs_cis"}
        ours = {name: left.pop(key) for key, name in names.items() if key in left}
        heads = self.config.num_heads
        turned = heads + (self.config.num_kv_heads or heads)
        split = turned * self.config.dim // heads
        for layer in range(self.config.num_layers):
            first = f"layers.{layer}."
            for key, name in in_layers.items():
                if first + key in left:
                    ours[first + name] = left.pop(first + key)
            if (qkv := left.pop(f"{first}attention.wqkv.weight", None)) is not None:
                ours[f"{first}attention.qkv.weight"] = torch.cat(
                    [pairs_to_halves(qkv[:split], turned), qkv[split:]]
                )
            gate_up = [f"{first}feed_forward.{name}.weight" for name in ("w1", "w3")]
            if all(key in left for key in gate_up):
                ours[f"{first}mlp.gate_up.weight"] = torch.cat([left.pop(key) for key in gate_up])
        return ours | left


@preset(tokenizer="vq16_tiny")
def llamagen_tiny() -> LlamaGenConfig:
    """8x8 maps of 4 codes, or the maps of a tokenizer that is trained; trains on a CPU in two minutes."""
    return LlamaGenConfig(
        dim=96, num_layers=3, num_heads=4, vocab_size=4, side=8, num_classes=10, multiple_of=32
    )


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_B_256.pt"))
def llamagen_b() -> LlamaGenConfig:
    """111 M parameters, 256x256 pixels; weights: c2i_B_256.pt."""
    return LlamaGenConfig(dim=768, num_layers=12, num_heads=12)


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_B_384.pt"))
def llamagen_b_384() -> LlamaGenConfig:
    """111 M parameters, 384x384 pixels; weights: c2i_B_384.pt."""
    return LlamaGenConfig(dim=768, num_layers=12, num_heads=12, side=24)


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_L_256.pt"))
def llamagen_l() -> LlamaGenConfig:
    """343 M parameters, 256x256 pixels; weights: c2i_L_256.pt."""
    return LlamaGenConfig(dim=1024, num_layers=24, num_heads=16)


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_L_384.pt"))
def llamagen_l_384() -> LlamaGenConfig:
    """343 M parameters, 384x384 pixels; weights: c2i_L_384.pt."""
    return LlamaGenConfig(dim=1024, num_layers=24, num_heads=16, side=24)


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_XL_384.pt"))
def llamagen_xl_384() -> LlamaGenConfig:
    """775 M parameters, 384x384 pixels; weights: c2i_XL_384.pt."""
    return LlamaGenConfig(dim=1280, num_layers=36, num_heads=20, side=24)


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_XXL_384.pt"))
def llamagen_xxl_384() -> LlamaGenConfig:
    """1.4 B parameters, 384x384 pixels; weights: c2i_XXL_384.pt."""
    return LlamaGenConfig(dim=1536, num_layers=48, num_heads=24, side=24)


@preset(tokenizer="vq16_ds16", weights=Published("FoundationVision/LlamaGen", "c2i_3B_384.pt"))
def llamagen_3b_384() -> LlamaGenConfig:
    """3.1 B parameters, 384x384 pixels; weights: c2i_3B_384.pt."""
    return LlamaGenConfig(dim=3200, num_layers=24, num_heads=32, side=24)


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """One pass against a cache, the class token's angles, guidance, and the text of a Jacobi window."""
    model = shaken(create_model("llamagen_tiny")).eval()
    labels = torch.arange(2 if quick else 10)
    codes = torch.randint(4, (len(labels), 64))
    whole = model(codes, labels)
    cache = model.make_cache(len(labels), 65)  # type: ignore[operator]
    parts = [model.prefill(model.prompt(labels), cache)]  # type: ignore[operator]
    parts += [model.step(codes[:, i], cache) for i in steps(63, "decoding")]  # type: ignore[operator]
    error = (torch.stack(parts, 1) - whole).abs().max() / whole.abs().max()
    zero = model.rotary.at(torch.tensor([0]))  # type: ignore[operator, union-attr]
    guided = model.guided(2.0)  # type: ignore[operator]
    prompt = model.prompt(labels)  # type: ignore[operator]
    plain = generate(guided, prompt, max_new_tokens=64, seed=1)
    window = jacobi(guided, prompt, max_new_tokens=64, window=8, coupling="common", seed=1)
    return Claim(
        (
            at_most("difference between one pass and steps, relative to the largest logit", error, 1e-5),
            equals(
                "largest rotary value of the class token", max(zero.cos.abs().max(), zero.sin.abs().max()), 0
            ),
            equals("guided codes that a Jacobi window changes", int((plain.ids != window.ids).sum()), 0),
        )
    )
