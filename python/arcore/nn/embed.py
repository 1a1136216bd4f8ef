"""Embeddings of conditions and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from arcore.nn.checks import check_ids
from arcore.nn.kinds import Size, check_kinds


@check_kinds
class ClassEmbedding(nn.Module):
    """Class embedding with one more row, the null class of classifier-free guidance (arXiv:2207.12598).

    Args:
        num_classes: classes; the null class is number `num_classes`.
        dim: width C.
        drop: probability that a label becomes the null class while training.
    """

    def __init__(self, num_classes: int, dim: Size, *, drop: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1 or not 0.0 <= drop <= 1.0:
            raise ValueError(
                "arcore.nn.ClassEmbedding: expected at least one class and 0 <= drop <= 1 "
                f"but got num_classes={num_classes} and drop={drop}"
            )
        self.null_class = num_classes
        self.drop = drop
        self.weight = nn.Parameter(torch.empty(num_classes + 1, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """Int64 labels `[B]` in [0, num_classes], the null class included, to `[B, C]`.

        Raises:
            TypeError: the labels are not int64.
            ValueError: a label is out of range (checked on the CPU only: on a GPU it would wait for the device).
        """
        if labels.dim() != 1:
            raise ValueError(f"expected labels of shape [B] but got {tuple(labels.shape)}")
        check_ids("class ids", labels, self.null_class + 1, f" ({self.null_class} means no class)")
        if self.training and self.drop > 0.0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.drop
            labels = torch.where(dropped, self.null_class, labels)
        return nn.functional.embedding(labels, self.weight)


NullContext = Literal["learned", "zero", "first"]


@check_kinds
class ContextEmbedding(nn.Module):
    """Each class as several learned tokens, for models that read their condition as context.

    Args:
        num_classes: classes; label `num_classes` is the null class of classifier-free guidance.
        tokens: of a class.
        dim: width C.
        null: tokens of the null class: `"learned"` like those of a class; `"zero"`; or `"first"`, those of class 0 (as
            in the released code of AR-Diffusion), so that class 0 is no class of its own. The label `num_classes` then
            has tokens too, but is no null class.
        drop: probability that a label becomes the null class while training.

    Attributes:
        null_class: the label of the null class.

    Raises:
        ValueError: a count is below 1, `null` is unknown, or `drop` is no probability.
    """

    def __init__(
        self, num_classes: int, tokens: int, dim: Size, *, null: NullContext = "learned", drop: float = 0.0
    ) -> None:
        super().__init__()
        if min(num_classes, tokens, dim) < 1 or not 0.0 <= drop <= 1.0:
            raise ValueError(
                "arcore.nn.ContextEmbedding: expected at least one class, token and channel and 0 <= drop <= 1 but got "
                f"num_classes={num_classes}, tokens={tokens}, dim={dim} and drop={drop}"
            )
        if null not in ("learned", "zero", "first"):
            raise ValueError(
                f"arcore.nn.ContextEmbedding: expected null to be learned, zero or first but got {null!r}"
            )
        self.num_classes, self.null, self.drop = num_classes, null, drop
        self.null_class = 0 if null == "first" else num_classes
        self.weight = nn.Parameter(0.1 * torch.randn(num_classes + (null != "zero"), tokens, dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Int64 labels `[B]` in [0, num_classes] to `[B, tokens, C]`; errors are those of `ClassEmbedding`."""
        if labels.dim() != 1:
            raise ValueError(f"expected labels of shape [B] but got {tuple(labels.shape)}")
        check_ids("class ids", labels, self.num_classes + 1, f" ({self.null_class} means no class)")
        if self.training and self.drop > 0.0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.drop
            labels = torch.where(dropped, self.null_class, labels)
        table = nn.functional.pad(self.weight, (0, 0, 0, 0, 0, 1)) if self.null == "zero" else self.weight
        return table[labels]


@check_kinds
class LevelEmbedding(nn.Module):
    """One learned vector per segment of the sequence, e.g. per scale.

    Args:
        sizes: tokens of each segment, in order.
        dim: width C.
    """

    def __init__(self, sizes: Sequence[int], dim: Size) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(torch.empty(len(self.sizes), dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self) -> Tensor:
        """Vectors of all tokens, `[1, N, C]`."""
        rows = [row.expand(size, -1) for row, size in zip(self.weight, self.sizes, strict=True)]
        return torch.cat(rows).unsqueeze(0)


@check_kinds
def sincos_sequence(length: Size, dim: Size, base: float = 10000.0) -> Tensor:
    """Fixed sine-cosine positions of a sequence, the sines first; computed in float64 on the CPU.

    Args:
        length: tokens.
        dim: width C, even.
        base: ratio of the longest to the shortest wavelength.

    Returns:
        float32 `[1, length, C]`.

    Raises:
        ValueError: `dim` is odd.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"expected dim to be a multiple of 2 but got {dim}")
    rates = base ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float().unsqueeze(0)


@check_kinds
def sincos_positions(side: Size, dim: Size, base: float = 10000.0) -> Tensor:
    """Fixed sine-cosine positions of side x side patches in raster order (as in arXiv:2111.06377).

    The first half of the channels encodes the column, the second half the row; each half has its sines first.
    Computed in float64 on the CPU.

    Args:
        side: patches per side.
        dim: width C, a multiple of 4.
        base: ratio of the longest to the shortest wavelength.

    Returns:
        float32 `[1, side * side, C]`.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"expected dim to be a multiple of 4 but got {dim}")
    columns = sincos_sequence(side, dim // 2, base).expand(side, side, -1)
    table = torch.cat([columns, columns.transpose(0, 1)], dim=-1)
    return table.reshape(1, side * side, dim)
