"""LlamaGen for captions: images as a text of codes behind the embeddings of a caption (Sun et al., arXiv:2406.06525).

In place of the class token stand 120 tokens of a caption, made by the encoder of Flan-T5-XL and mapped to the model's
width by two layers. Short captions are padded on the left, and nobody sees the padding. The rotary angles of the
caption's tokens are cosine and sine zero, as those of the class token are, so they too are seen with the logit 0. Under
guidance the other branch has learned embeddings of no caption in the same places.

A caption is no text of tokens, so the prompt says only which places of it there are: the token V + i stands for place
i, and `captioned` gives a model that knows what stands there in each row. Every loop decodes it.

It differs from its neighbour, `llamagen`, in the prompt alone.

Legend: B rows, L tokens, C width, V codes, S side of the code map, T places of a caption, E width of its embeddings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, System, create_model, preset
from arcore.catalog.claims import Claim, at_most, equals, shaken, steps
from arcore.decoding import MixedModel, generate, jacobi
from arcore.masks import IntervalMask
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.nn.rotary import Angles
from arcore.zoo.raster.llamagen import GridRotary, LlamaGen, LlamaGenConfig

SYSTEM = System(
    name="llamagen_t2i",
    title="LlamaGen (text to image)",
    paper="arXiv:2406.06525",
    paper_title="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
    topic="raster",
    kind="model",
    model="LlamaGenText",
    builds_on=("llamagen",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="LlamaGen behind the embeddings of a caption, padded on the left; loads the released weights.",
    claim="Decoding with a cache gives the logits of one pass for captions of any length; padding changes nothing.",
    checked_on="published layout, random weights",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LlamaGenTextConfig(LlamaGenConfig):
    """Settings of `LlamaGenText`: those of `LlamaGen`, of which `num_classes` means nothing, and

    Attributes:
        caption_tokens: places T of a caption.
        caption_dim: width E of its embeddings.

    Raises:
        ValueError: a size is below 1.
    """

    num_classes: int = 1
    caption_tokens: int = 120
    caption_dim: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("caption_tokens", "caption_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")


class CaptionRotary(GridRotary):
    """`GridRotary` for rows whose captions have fewer tokens than places.

    Attributes:
        shift: int64 `[B]`, places that each row's caption leaves empty; None where positions count all places.
    """

    shift: Tensor | None = None

    def shifted(self, shift: Tensor) -> CaptionRotary:
        """The same for rows with so many empty places."""
        other = copy.copy(self)
        other.shift = shift
        return other

    def at(self, positions: Tensor) -> Angles:
        """See `arcore.nn.causal.Rotary`."""
        if self.shift is None:
            return super().at(positions)
        table = positions if positions.dim() == 2 else positions.unsqueeze(0)
        return super().at(table + self.shift.to(positions.device).unsqueeze(1))

    def span(self, start: int, stop: int, device: torch.device) -> Angles:
        """See `arcore.nn.causal.Rotary`."""
        if self.shift is None:
            return super().span(start, stop, device)
        return self.at(torch.arange(start, stop, device=device))


class CaptionMLP(nn.Module):
    """Embeddings of a caption to the model's width: two layers without biases."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` to `[..., C]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


@check_kinds
class LlamaGenText(LlamaGen):
    """The model. Decoders get it from `captioned`, which fixes the captions of the rows.

    Args:
        config: settings.
    """

    config: LlamaGenTextConfig

    def __init__(self, config: LlamaGenTextConfig) -> None:
        super().__init__(config)
        del self.class_embedding
        self.max_length = config.caption_tokens + config.side**2 + self.DRAFTS
        head_dim = config.dim // config.num_heads
        self.rotary = CaptionRotary(
            head_dim, side=config.side, theta=config.rope_theta, front=config.caption_tokens
        )
        self.caption = CaptionMLP(config.caption_dim, config.dim)
        self.no_caption = nn.Parameter(torch.empty(config.caption_tokens, config.caption_dim))
        if not self.no_caption.is_meta:
            for parameter in (*self.caption.parameters(), self.no_caption):
                nn.init.normal_(parameter, std=0.02)
        self._given: Tensor | None = None

    @property
    def null_class(self) -> int:
        """Captions are no classes.

        Raises:
            AttributeError: always.
        """
        raise AttributeError("llamagen_t2i draws from captions and has no classes")

    @check_kinds
    def forward(self, codes: Tensor, captions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of every code of images.

        Args:
            codes: int64 `[B, L]`, the first L codes of S * S.
            captions: floating `[B, T, E]`.
            mask: bool `[B, T]`, False at padding, which stands before a caption's tokens; none by default.

        Returns:
            float32 `[B, L, V]`, of each code given those before it.

        Raises:
            ValueError: a shape is another, or padding stands elsewhere.
        """
        x, angles, visible = self._whole(codes, captions, mask)
        return self.logits(self.run(x, angles, visible)[:, self.config.caption_tokens - 1 :])

    def _whole(
        self, codes: Tensor, captions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Angles, IntervalMask]:
        """Embeddings, angles and mask of captions with all their places and the codes behind them but the last."""
        vectors = self.caption(self._checked(captions, mask))
        check_ids("codes", codes, self.config.vocab_size)
        x = torch.cat([vectors, self.embedding(codes[:, :-1])], dim=1)
        count, places = x.shape[1], torch.arange(x.shape[1], device=x.device)
        stop = (places + 1).expand(len(x), -1)
        start = torch.zeros_like(stop)
        if mask is not None:
            # Padding sees itself, as in the released code: a row without keys has no softmax.
            start = torch.minimum((~mask).sum(1, keepdim=True), places)
        bounds = torch.stack([start, stop], -1).unsqueeze(1).to(torch.int32)
        angles = GridRotary.span(self.rotary, 0, count, x.device)  # type: ignore[arg-type]
        return x, angles, IntervalMask.trusted(bounds.contiguous(), count)

    def captioned(self, captions: Tensor, mask: Tensor | None = None) -> Any:
        """The model with the captions of its rows, for decoders; it shares all weights.

        Args:
            captions: as for `forward`.
            mask: likewise; give it to the decoder too.
        """
        other = copy.copy(self)
        other._given = self.caption(self._checked(captions, mask))
        shift = torch.zeros(len(captions), dtype=torch.int64) if mask is None else (~mask).sum(1)
        other.rotary = cast(CaptionRotary, self.rotary).shifted(shift)
        return other

    def prompt(self, labels: Tensor) -> Tensor:
        """The tokens of captions, all places: int64 `[B, T]`; only the number of labels counts."""
        places = torch.arange(self.config.caption_tokens, device=labels.device)
        return (places + self.config.vocab_size).expand(len(labels), -1)

    def guided(self, scale: float, interval: tuple[int, int] | None = None) -> Any:
        """The model under guidance; the other branch has no caption, in the same places.

        Raises:
            ValueError: an interval is asked for, or there are no captions.
        """
        if interval is not None:
            raise ValueError("llamagen_t2i has no guidance interval: leave it out")
        if self._given is None:
            raise ValueError("captions come first: model.captioned(captions, mask).guided(scale)")
        none = copy.copy(self)
        none._given = self.caption(self.no_caption).expand(len(self._given), -1, -1)
        return MixedModel([self, none], [scale, 1 - scale])

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of codes, and of places of the rows' captions from V on: int64 `[B, L]` to `[B, L, C]`."""
        if ids.dim() != 2:
            raise ValueError(f"expected ids of shape [B, L] but got {tuple(ids.shape)}")
        check_ids("ids", ids, self.config.vocab_size + self.config.caption_tokens)
        code = ids < self.config.vocab_size
        found: Tensor = self.embedding(ids.clamp(max=self.config.vocab_size - 1))
        if bool(code.all()):
            return found
        if self._given is None:
            raise ValueError(
                "the prompt has a caption but none was given: use model.captioned(captions, mask)"
            )
        if len(self._given) != len(ids):
            raise ValueError(f"expected {len(ids)} captions, one per row, but got {len(self._given)}")
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        return torch.where(
            code.unsqueeze(-1), found, self._given[rows, (ids - self.config.vocab_size).clamp(min=0)]
        )

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released files under our names."""
        names = {
            "cls_embedding.uncond_embedding": "no_caption",
            "cls_embedding.cap_proj.fc1.weight": "caption.fc1.weight",
            "cls_embedding.cap_proj.fc2.weight": "caption.fc2.weight",
        }
        left = dict(state)
        ours = {name: left.pop(key) for key, name in names.items() if key in left}
        return ours | super().from_official(left)

    def _checked(self, captions: Tensor, mask: Tensor | None) -> Tensor:
        places, width = self.config.caption_tokens, self.config.caption_dim
        if captions.dim() != 3 or captions.shape[1:] != (places, width):
            raise ValueError(
                f"expected captions of shape [B, {places}, {width}] but got {tuple(captions.shape)}; pad short ones on "
                "the left, cut long ones"
            )
        if mask is not None:
            if mask.shape != captions.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"expected a bool mask of shape {tuple(captions.shape[:2])} but got {mask.dtype} of shape "
                    f"{tuple(mask.shape)}"
                )
            # A compiled graph cannot look at values.
            looks = not torch.compiler.is_compiling()
            if looks and not (bool(mask[:, -1].all()) and not bool((mask[:, :-1] & ~mask[:, 1:]).any())):
                raise ValueError(
                    "expected padding only before the tokens of a caption, and at least one token"
                )
        return captions.to(self.no_caption.dtype)


@preset(tokenizer="vq16_tiny")
def llamagen_t2i_tiny() -> LlamaGenTextConfig:
    """8x8 maps of 4 codes behind captions of six places; for tests."""
    return LlamaGenTextConfig(
        dim=64,
        num_layers=2,
        num_heads=4,
        vocab_size=4,
        side=8,
        multiple_of=32,
        caption_tokens=6,
        caption_dim=16,
    )


@preset(tokenizer="vq16_ds16", weights=Published("peizesun/llamagen_t2i", "t2i_XL_stage1_256.pt"))
def llamagen_t2i_xl_256() -> LlamaGenTextConfig:
    """775 M parameters, 256x256 pixels; weights: t2i_XL_stage1_256.pt."""
    return LlamaGenTextConfig(dim=1280, num_layers=36, num_heads=20)


@preset(tokenizer="vq16_ds16", weights=Published("peizesun/llamagen_t2i", "t2i_XL_stage2_512.pt"))
def llamagen_t2i_xl_512() -> LlamaGenTextConfig:
    """775 M parameters, 512x512 pixels; weights: t2i_XL_stage2_512.pt."""
    return LlamaGenTextConfig(dim=1280, num_layers=36, num_heads=20, side=32)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.raster._captions import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """One pass against a cache for captions of several lengths, padding, and the codes of a Jacobi window."""
    model: Any = shaken(create_model("llamagen_t2i_tiny")).eval()
    count = 3 if quick else 12
    captions, codes = torch.randn(count, 6, 16), torch.randint(4, (count, 64))
    mask = torch.arange(6) >= (torch.arange(count) % 6).unsqueeze(1)
    whole = model(codes, captions, mask)
    bound = model.captioned(captions, mask)
    cache = bound.make_cache(count, 6 + 64)
    prompt = bound.prompt(torch.zeros(count))
    parts = [bound.prefill(prompt, cache, mask)]
    parts += [bound.step(codes[:, i], cache) for i in steps(63, "decoding")]
    error = (torch.stack(parts, 1) - whole).abs().max() / whole.abs().max()
    other = torch.where(mask.unsqueeze(2), captions, 9.0)
    padding = (model(codes, other, mask) - whole).abs().max()
    angles = model.rotary.at(torch.arange(6))
    guided = bound.guided(2.0)
    plain = generate(guided, prompt, mask=mask, max_new_tokens=64, seed=1)
    window = jacobi(guided, prompt, mask=mask, max_new_tokens=64, window=8, coupling="common", seed=1)
    return Claim(
        (
            at_most("difference between one pass and steps, relative to the largest logit", error, 1e-5),
            equals("change of the logits by what stands at the padding", padding, 0),
            equals(
                "largest rotary value of a caption", max(angles.cos.abs().max(), angles.sin.abs().max()), 0
            ),
            equals("guided codes that a Jacobi window changes", int((plain.ids != window.ids).sum()), 0),
        )
    )
