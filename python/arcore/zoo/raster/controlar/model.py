"""ControlAR: settings, network, preset."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.decoding import MixedModel
from arcore.masks import TreeMask
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.nn.rotary import Angles
from arcore.nn.token_cache import TokenCache
from arcore.zoo.raster.llamagen import LlamaGen, LlamaGenConfig


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ControlARConfig(LlamaGenConfig):
    """Settings of `ControlAR`: those of `LlamaGen`, and

    Attributes:
        patch: pixels of the control image per code along a side.
        control_channels: of the control image.
        control_dim: width of the control encoder.
        control_layers: layers that get the control; every third of the depth when empty.

    Raises:
        ValueError: a size is below 1, or there is no such layer.
    """

    patch: int = 16
    control_channels: int = 1
    control_dim: int = 64
    control_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "control_channels", "control_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "control_layers", chosen_layers(self.num_layers, self.control_layers))


def chosen_layers(num_layers: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that get the control; every third of the depth when none are named.

    Raises:
        ValueError: there is no such layer, or one is named twice.
    """
    layers = tuple(wanted) or tuple(dict.fromkeys(num_layers * j // 3 for j in range(3)))
    if len(set(layers)) != len(layers) or not all(0 <= i < num_layers for i in layers):
        raise ValueError(
            f"expected control_layers to be different numbers from 0 to {num_layers - 1} but got {layers}"
        )
    return layers


class ControlEncoder(nn.Module):
    """A control image to one vector per code: `[B, channels, S * patch, S * patch]` to `[B, S * S, dim]`."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch + 2, stride=patch, padding=1)
        self.around = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.patches(images))
        out: Tensor = (x + self.around(x)).flatten(2).transpose(1, 2)
        return out


class ControlMLP(nn.Module):
    """What a layer adds, a network of two layers without biases whose second starts at zero."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, out, bias=False)
        self.fc2 = nn.Linear(out, out, bias=False)
        if not self.fc2.weight.is_meta:
            nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class WithControl(LlamaGen):
    """Adds control vectors to the states in front of some layers; a base of models with control.

    A subclass has `condition_layers`, `config.control_layers` and `control_vectors`.
    """

    config: Any
    condition_layers: nn.ModuleList
    _added: Tensor | None = None
    _strength = 1.0

    def control_vectors(self, control: Tensor) -> Tensor:
        """One vector per code of control images, `[B, S * S, D]`."""
        raise NotImplementedError

    def condition_tokens(self, device: torch.device) -> Tensor:
        """Tokens of each row's condition, the last of which predicts code 0: int64 `[1 or B]`."""
        return torch.ones(1, dtype=torch.int64, device=device)

    @check_kinds
    def controlled(self, control: Tensor, strength: float = 1.0) -> Any:
        """The model with the control images of its rows; it shares all weights.

        Args:
            control: as for `forward`.
            strength: multiplies what is added; 0 is the base model.

        Raises:
            ValueError: control images of another size.
        """
        other = copy.copy(self)
        other._added, other._strength = self._additions(control), float(strength)
        return other

    def _additions(self, control: Tensor) -> Tensor:
        """What each place of each control layer gets: `[J, B, S * S, C]`; nothing for images of zeros."""
        vectors = self.control_vectors(control)
        has = control.flatten(1).ne(0).any(1)
        added = torch.stack([layer(vectors) for layer in self.condition_layers])  # [J, B, S * S, C]
        return torch.where(has[None, :, None, None], added, 0.0)

    def run(self, x: Tensor, angles: Angles, mask: Any, cache: TokenCache | None = None) -> Tensor:
        """See `CausalDecoder.run`; the control is added in front of its layers."""
        if self._added is None:
            return super().run(x, angles, mask, cache)
        return self._through(x, angles, mask, cache, self._strength * self._at(x, mask, cache))

    def _through(
        self, x: Tensor, angles: Angles, mask: Any, cache: TokenCache | None, extra: Tensor
    ) -> Tensor:
        """All layers and the last norm, with additions `[J, B, N, C]` in front of the control layers."""
        where = {layer: j for j, layer in enumerate(self.config.control_layers)}
        for i, layer in enumerate(self.layers):
            if i in where:
                x = x + extra[where[i]]
            if i not in self.skipped:
                x = layer(x, angles, mask, cache, i)
        out: Tensor = self.norm(x)
        return out

    def _at(self, x: Tensor, mask: Any, cache: TokenCache | None) -> Tensor:
        """What is added to the tokens of a call: `[J, B, N, C]`. The token before a code predicts it."""
        assert self._added is not None
        if self._added.shape[1] != len(x):
            raise ValueError(f"expected {len(x)} control images, one per row, but got {self._added.shape[1]}")
        if isinstance(mask, TreeMask):
            places = mask.prefix.long().unsqueeze(1) + mask.depth
        else:
            lengths = (0,) if cache is None else cache.lengths
            places = torch.tensor(lengths).unsqueeze(1) + torch.arange(x.shape[1])
        places = places.to(x.device) + 1 - self.condition_tokens(x.device).unsqueeze(1)
        places = places.expand(len(x), -1)
        last = self._added.shape[2]
        rows = torch.arange(len(x), device=x.device)[:, None]
        found = self._added[:, rows, places.clamp(min=0, max=last - 1)]
        return torch.where(((places >= 0) & (places < last))[None, :, :, None], found, 0.0)

    def _fits_step(self, cache: TokenCache, new: int = 1) -> bool:
        # The op for a step knows no additions.
        return self._added is None and super()._fits_step(cache, new)


@check_kinds
class ControlAR(WithControl):
    """The model. Decoders get it from `controlled`, which fixes the control images of the rows.

    Args:
        config: settings.
    """

    config: ControlARConfig

    def __init__(self, config: ControlARConfig) -> None:
        super().__init__(config)
        self.control_encoder = ControlEncoder(config.control_channels, config.control_dim, config.patch)
        self.condition_layers = nn.ModuleList(
            ControlMLP(config.control_dim, config.dim) for _ in config.control_layers
        )
        self._without_class = False

    @property
    def image_size(self) -> int:
        """Pixels of a control image's side."""
        return self.config.side * self.config.patch

    @check_kinds
    def forward(self, codes: Tensor, labels: Tensor, control: Tensor | None = None) -> Tensor:
        """Logits of every code of images.

        Args:
            codes: int64 `[B, L]`, the first L codes of S * S.
            labels: int64 `[B]`, classes; `num_classes` stands for none.
            control: float `[B, control_channels, H, H]` in [-1, 1]; rows of zeros have none. None: no row has one.

        Returns:
            float32 `[B, L, V]`.

        Raises:
            ValueError: control images of another size or number.
        """
        if control is None:
            return super().forward(codes, labels)
        if len(control) != len(codes):
            raise ValueError(f"expected a control image for each of {len(codes)} rows but got {len(control)}")
        check_ids("labels", labels, self.config.num_classes + 1)
        x = self.embed(torch.cat([self.prompt(labels), codes[:, :-1]], dim=1))
        mask, angles = self.behind((0,), x.shape[1], x.device)
        return self.logits(self._through(x, angles, mask, None, self._additions(control)[:, :, : x.shape[1]]))

    def control_vectors(self, control: Tensor) -> Tensor:
        """See `WithControl`."""
        size, channels = self.image_size, self.config.control_channels
        if control.dim() != 4 or control.shape[1:] != (channels, size, size):
            raise ValueError(
                f"expected control images of shape [B, {channels}, {size}, {size}] but got {tuple(control.shape)}; "
                "scale them to the size of the model's images"
            )
        out: Tensor = self.control_encoder(control.to(self.embedding.weight.dtype))
        return out

    def guided(self, scale: float, interval: tuple[int, int] | None = None) -> Any:
        """The model under guidance; the branch without a condition has neither class nor control.

        Raises:
            ValueError: an interval is asked for.
        """
        if interval is not None:
            raise ValueError("controlar has no guidance interval: leave it out")
        none = copy.copy(self)
        none._added, none._without_class = None, True
        return MixedModel([self, none], [scale, 1 - scale])

    def embed(self, ids: Tensor) -> Tensor:
        """See `LlamaGen.embed`."""
        if self._without_class:
            ids = ids.clamp(max=self.config.vocab_size + self.config.num_classes)
            none = self.config.vocab_size + self.config.num_classes
            ids = torch.where(ids >= self.config.vocab_size, none, ids)
        return super().embed(ids)

    def start_from(self, base: LlamaGen) -> None:
        """Take over the weights of a base model.

        Raises:
            ValueError: its config is another.
        """
        mine, theirs = (
            {name: getattr(model.config, name) for name in LlamaGenConfig.__dataclass_fields__}
            for model in (self, base)
        )
        if mine != theirs:
            apart = ", ".join(f"{k}={theirs[k]} instead of {mine[k]}" for k in mine if mine[k] != theirs[k])
            raise ValueError(f"the base model differs: {apart}")
        self.load_state_dict(base.state_dict(), strict=False)


@preset(tokenizer="vq16_tiny")
def controlar_tiny() -> ControlARConfig:
    """8x8 maps of 4 codes, or the maps of a tokenizer that is trained; trains on a CPU in two minutes."""
    return ControlARConfig(
        dim=64,
        num_layers=3,
        num_heads=4,
        vocab_size=4,
        side=8,
        num_classes=10,
        multiple_of=32,
        patch=1,
        control_dim=32,
    )
