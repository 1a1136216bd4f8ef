"""ARRA: the base with a tap, the adaptor, the loss, the principal components."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn.kinds import check_kinds
from arcore.zoo.raster.llamagen import LlamaGen, LlamaGenConfig


class ARRA(LlamaGen):
    """LlamaGen, whose hidden states behind a layer can be read; parameters and files are those of `LlamaGen`."""

    @check_kinds
    def tapped(self, codes: Tensor, labels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Logits of every code, and hidden states behind the first `layer` layers.

        Args:
            codes: int64 `[B, L]`.
            labels: int64 `[B]`.
            layer: from 1 to the number of layers.

        Returns:
            float32 `[B, L, V]`, as from `forward`; and `[B, L - 1, C]`, at the places of the codes that were read, all
            but the last.

        Raises:
            ValueError: there is no such layer.
        """
        if not 1 <= layer <= len(self.layers):
            raise ValueError(f"expected layer from 1 to {len(self.layers)} but got {layer}")
        ids = torch.cat([self.prompt(labels), codes[:, :-1]], dim=1)
        mask, angles = self.behind((0,), ids.shape[1], ids.device)
        x = tap = self.embed(ids)
        for number, block in enumerate(self.layers, 1):
            x = block(x, angles, mask)
            if number == layer:
                tap = x
        return self.logits(self.norm(x)), tap[:, 1:]


class Adaptor(nn.Module):
    """Two layers from a hidden state to the space of the encoder's vectors.

    Args:
        dim: width C of the hidden states.
        features: width F.
        hidden: width between (the paper: 512 for vectors of 512).
    """

    def __init__(self, dim: int, features: int, hidden: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden or max(features, 64))
        self.down = nn.Linear(hidden or max(features, 64), features)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., F]`."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


@check_kinds
def alignment_loss(adapted: Tensor, features: Tensor) -> Tensor:
    """Mean over places and images of 1 - cosine (section 3.2).

    Args:
        adapted: `[B, L, F]`, hidden states behind the adaptor.
        features: `[B, F]`, of the pictures; no gradient goes there.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: shapes do not fit.
    """
    if adapted.dim() != 3 or features.shape != (adapted.shape[0], adapted.shape[2]):
        raise ValueError(
            "expected adapted states [B, L, F] and features [B, F] but got "
            f"{tuple(adapted.shape)} and {tuple(features.shape)}"
        )
    target = features.detach().float().unsqueeze(1)
    return (1 - F.cosine_similarity(adapted.float(), target, dim=-1)).mean()


class Components(nn.Module):
    """The first principal components of images, scaled to deviation 1.

    Args:
        images: `[N, C, H, W]`, from which they are found; more than `count`.
        count: how many, F.

    Raises:
        ValueError: too few images, or fewer pixels than components.
    """

    def __init__(self, images: Tensor, count: int) -> None:
        super().__init__()
        flat = images.flatten(1).double()
        if min(flat.shape) <= count:
            raise ValueError(
                f"expected more than {count} images and pixels for {count} components but got {len(flat)} images of "
                f"{flat.shape[1]} values"
            )
        mean = flat.mean(0)
        _, sizes, axes = torch.linalg.svd(flat - mean, full_matrices=False)
        scale = (sizes[:count] / len(flat) ** 0.5).clamp(min=1e-12)
        self.register_buffer("mean", mean.float())
        self.register_buffer("axes", (axes[:count] / scale.unsqueeze(1)).float())

    def features(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, F]`."""
        return (images.flatten(1).float() - self.mean) @ self.axes.T  # type: ignore[operator]


@preset(tokenizer="vq16_tiny")
def arra_tiny() -> LlamaGenConfig:
    """The size of `llamagen_tiny`; trains on a CPU in two minutes."""
    return LlamaGenConfig(
        dim=64, num_layers=3, num_heads=4, vocab_size=4, side=8, num_classes=10, multiple_of=32
    )


@preset(tokenizer="vq16_ds16")
def arra_b() -> LlamaGenConfig:
    """The size of `llamagen_b`, whose published weights are a base to start from (--init-from)."""
    return LlamaGenConfig(dim=768, num_layers=12, num_heads=12)
