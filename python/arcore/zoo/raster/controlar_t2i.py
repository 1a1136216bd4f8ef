"""ControlAR for captions, in the released layout: images that follow edges, depth and the like (arXiv:2410.02705).

A DINOv2 makes a vector of each 14x14 patch of the control image, which is scaled so that there is one patch per code. A
network of two layers takes it to the model's width, another is shared by the control layers, and each of three layers,
a third of the depth apart, adds what its own network makes of the vector to the state that predicts the code. The text
prompt is LlamaGen's. Under guidance the other branch has neither caption nor control.

Differs from its neighbour, `controlar`, in the prompt, the encoder and the shared network; what is added where is the
same. The released images are square, 512x512; other sizes of the arbitrary-resolution files are left out.

Legend: B rows, L tokens, C width, V codes, S side of the code map, T places of a caption, D width of the encoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, System, create_model, preset
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps
from arcore.decoding import MixedModel
from arcore.nn.kinds import check_kinds
from arcore.zoo.raster.controlar.dinov2 import GRID, PATCH, Dinov2
from arcore.zoo.raster.controlar.model import ControlMLP, WithControl, chosen_layers
from arcore.zoo.raster.llamagen_t2i import CaptionMLP, CaptionRotary, LlamaGenText, LlamaGenTextConfig

SYSTEM = System(
    name="controlar_t2i",
    title="ControlAR (text to image)",
    paper="arXiv:2410.02705",
    paper_title="ControlAR: Controllable Image Generation with Autoregressive Models",
    topic="raster",
    kind="model",
    model="ControlARText",
    builds_on=("controlar", "llamagen_t2i"),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="LlamaGen's text-to-image model with control through DINOv2, in the layout of the released files.",
    claim="Zero control is the base model; a code sees its own control and no later one; a cache changes nothing.",
    checked_on="published layout, random weights",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ControlARTextConfig(LlamaGenTextConfig):
    """Settings of `ControlARText`: those of `LlamaGenText`, and

    Attributes:
        encoder_dim: width D of the encoder, 384 (small) or 768 (base).
        encoder_layers: its layers.
        encoder_heads: its heads.
        encoder_grid: patches of a side at which its positions were learned.
        resize: how control images are scaled for it: nearest for edges and segments, bicubic for the rest.
        control_layers: layers that get the control; every third of the depth when empty.

    Raises:
        ValueError: a size is below 1, or there is no such layer.
    """

    encoder_dim: int = 384
    encoder_layers: int = 12
    encoder_heads: int = 6
    encoder_grid: int = GRID
    resize: Literal["nearest", "bicubic"] = "nearest"
    control_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_dim", "encoder_layers", "encoder_heads", "encoder_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.resize not in ("nearest", "bicubic"):
            raise ValueError(f"expected resize to be nearest or bicubic but got {self.resize!r}")
        object.__setattr__(self, "control_layers", chosen_layers(self.num_layers, self.control_layers))


@check_kinds
class ControlARText(WithControl, LlamaGenText):
    """The model. Decoders get it from `captioned` and `controlled`, which fix what the rows follow.

    Args:
        config: settings.
    """

    config: ControlARTextConfig
    # Pixels of a code's side.
    FACTOR = 16

    def __init__(self, config: ControlARTextConfig) -> None:
        super().__init__(config)
        self.adapter = Dinov2(
            config.encoder_dim, config.encoder_layers, config.encoder_heads, config.encoder_grid
        )
        self.adapter_mlp = CaptionMLP(config.encoder_dim, config.dim)
        self.condition_mlp = CaptionMLP(config.dim, config.dim)
        self.condition_layers = nn.ModuleList(
            ControlMLP(config.dim, config.dim) for _ in config.control_layers
        )

    @property
    def image_size(self) -> int:
        """Pixels of a control image's side."""
        return self.config.side * self.FACTOR

    @check_kinds
    def forward(
        self, codes: Tensor, captions: Tensor, mask: Tensor | None = None, control: Tensor | None = None
    ) -> Tensor:
        """Logits of every code of images.

        Args:
            codes: int64 `[B, L]`, the first L codes of S * S.
            captions: floating `[B, T, E]`.
            mask: bool `[B, T]`, False at padding, which stands before a caption's tokens; none by default.
            control: float `[B, 3, H, H]` in [-1, 1], H = 16 S; rows of zeros have none. None: no row has one.

        Returns:
            float32 `[B, L, V]`.

        Raises:
            ValueError: control images of another size or number, or captions that do not fit.
        """
        if control is None:
            return super().forward(codes, captions, mask)
        if len(control) != len(codes):
            raise ValueError(f"expected a control image for each of {len(codes)} rows but got {len(control)}")
        x, angles, visible = self._whole(codes, captions, mask)
        front = self.config.caption_tokens - 1
        added = self._additions(control)[:, :, : x.shape[1] - front]
        extra = F.pad(added, (0, 0, front, 0))
        return self.logits(self._through(x, angles, visible, None, extra)[:, front:])

    def control_vectors(self, control: Tensor) -> Tensor:
        """See `WithControl`."""
        size = self.image_size
        if control.dim() != 4 or control.shape[1:] != (3, size, size):
            raise ValueError(
                f"expected control images of shape [B, 3, {size}, {size}] but got {tuple(control.shape)}; scale them "
                "to the size of the model's images"
            )
        small = (self.config.side * PATCH,) * 2
        corners = None if self.config.resize == "nearest" else True
        images = F.interpolate(control, size=small, mode=self.config.resize, align_corners=corners)
        out: Tensor = self.condition_mlp(self.adapter_mlp(self.adapter(images.to(self.no_caption.dtype))))
        return out

    def condition_tokens(self, device: torch.device) -> Tensor:
        """See `WithControl`: the caption's tokens without padding."""
        rotary: CaptionRotary = self.rotary  # type: ignore[assignment]
        shift = torch.zeros(1, dtype=torch.int64) if rotary.shift is None else rotary.shift
        return self.config.caption_tokens - shift.to(device)

    def guided(self, scale: float, interval: tuple[int, int] | None = None) -> Any:
        """The model under guidance; errors are those of `LlamaGenText.guided`."""
        mixed = super().guided(scale, interval)
        mixed.models[1] = copy.copy(mixed.models[1])
        mixed.models[1]._added = None
        assert isinstance(mixed, MixedModel)
        return mixed

    def start_from(self, base: LlamaGenText) -> None:
        """Take over the weights of a base model of the same sizes."""
        self.load_state_dict(base.state_dict(), strict=False)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released files under our names; what they hold and never use is left out."""
        left = {
            key: value
            for key, value in state.items()
            if key not in ("condition_embeddings.weight", "condition_mlp.uncond_embedding")
        }
        ours = {}
        for key in list(left):
            if key.startswith("adapter.model."):
                ours["adapter." + key.removeprefix("adapter.model.")] = left.pop(key)
            elif key.startswith("condition_mlp.cap_proj."):
                ours["condition_mlp." + key.removeprefix("condition_mlp.cap_proj.")] = left.pop(key)
        return ours | super().from_official(left)


@preset(tokenizer="vq16_tiny")
def controlar_t2i_tiny() -> ControlARTextConfig:
    """8x8 maps of 4 codes behind captions of six places; for tests."""
    return ControlARTextConfig(
        dim=64,
        num_layers=3,
        num_heads=4,
        vocab_size=4,
        side=8,
        multiple_of=32,
        caption_tokens=6,
        caption_dim=16,
        encoder_dim=24,
        encoder_layers=1,
        encoder_heads=2,
        encoder_grid=4,
    )


@preset(tokenizer="vq16_ds16", weights=Published("wondervictor/ControlAR", "canny_MR.safetensors"))
def controlar_t2i_canny() -> ControlARTextConfig:
    """775 M parameters and DINOv2-small, 512x512 pixels, edges; weights: canny_MR.safetensors."""
    return ControlARTextConfig(dim=1280, num_layers=36, num_heads=20, side=32)


@preset(tokenizer="vq16_ds16", weights=Published("wondervictor/ControlAR", "depth_MR.safetensors"))
def controlar_t2i_depth() -> ControlARTextConfig:
    """775 M parameters and DINOv2-small, 512x512 pixels, depth; weights: depth_MR.safetensors."""
    return ControlARTextConfig(dim=1280, num_layers=36, num_heads=20, side=32, resize="bicubic")


@preset(tokenizer="vq16_ds16", weights=Published("wondervictor/ControlAR", "hed.safetensors"))
def controlar_t2i_hed() -> ControlARTextConfig:
    """775 M parameters and DINOv2-small, 512x512 pixels, soft edges; weights: hed.safetensors."""
    return ControlARTextConfig(dim=1280, num_layers=36, num_heads=20, side=32, resize="bicubic")


@preset(tokenizer="vq16_ds16", weights=Published("wondervictor/ControlAR", "seg_cocostuff.safetensors"))
def controlar_t2i_seg() -> ControlARTextConfig:
    """775 M parameters and DINOv2-small, 512x512 pixels, segments; weights: seg_cocostuff.safetensors."""
    return ControlARTextConfig(dim=1280, num_layers=36, num_heads=20, side=32)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.raster._captions import CONTROLLED

        return CONTROLLED
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def claim(*, quick: bool) -> Claim:
    """What no control adds, what a code's control reaches, and one pass against a cache."""
    model: Any = shaken(create_model("controlar_t2i_tiny")).eval()
    count = 2 if quick else 6
    captions, codes = torch.randn(count, 6, 16), torch.randint(4, (count, 64))
    mask = torch.arange(6) >= (torch.arange(count) % 6).unsqueeze(1)
    control = torch.randint(2, (count, 3, 128, 128)).float() * 2 - 1
    with torch.no_grad():
        plain = model(codes, captions, mask)
        none = int((model(codes, captions, mask, torch.zeros_like(control)) != plain).sum())
        whole = model(codes, captions, mask, control)
        bound = model.captioned(captions, mask).controlled(control)
        cache = bound.make_cache(count, 6 + 64)
        parts = [bound.prefill(bound.prompt(torch.zeros(count)), cache, mask)]
        parts += [bound.step(codes[:, i], cache) for i in steps(63, "decoding")]
        error = (torch.stack(parts, 1) - whole).abs().max() / whole.abs().max()
    vectors = model.control_vectors(control).detach().requires_grad_(True)
    x, angles, visible = model._whole(codes, captions, mask)
    extra = F.pad(torch.stack([layer(vectors) for layer in model.condition_layers]), (0, 0, 5, 0))
    logits = model.logits(model._through(x, angles, visible, None, extra[:, :, : x.shape[1]])[:, 5:])
    (reach,) = torch.autograd.grad(logits[:, 20].square().sum(), vectors)
    return Claim(
        (
            equals("logits that a control of zeros changes", none, 0),
            equals(
                "gradient of code 20's logits to the control of later codes", reach[:, 21:].abs().max(), 0
            ),
            at_least("the same to its own", reach[:, 20].abs().max(), 1e-6),
            at_most("difference between one pass and steps, relative to the largest logit", error, 1e-5),
        )
    )
