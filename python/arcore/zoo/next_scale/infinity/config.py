"""Infinity: settings and presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arcore.catalog import NOT_PUBLIC, Published, preset
from arcore.nn.attention import check_heads
from arcore.nn.checks import check_patch_nums
from arcore.nn.kinds import check_kinds
from arcore.zoo.next_scale.infinity.text import MOST_TOKENS
from arcore.zoo.tokenizers.multi_scale_bsq.config import SCALES_256, SCALES_1024

# Rows of the table of scales, whatever the number of scales.
LEVELS = 15


@check_kinds
@dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """Settings of `Infinity`.

    Attributes:
        depth: number of blocks.
        embed_dim: width C.
        num_heads: attention heads.
        mlp_dim: width of the hidden layers of the feed-forward networks.
        bits: d of the tokenizer's codes.
        patch_nums: side length of each scale, coarse to fine.
        grid: side of the grid on which rotary positions are counted: that of the finest scale a model was made for.
        text_dim: width c of a text's vectors.
        text_length: most tokens T of a text.
        pool_heads: heads of the attention that makes one vector of a text.
        text_drop: probability that a text becomes the null text while training, for guidance.
        drop_path: stochastic depth of the last block; earlier blocks have less.
        gate_init: factor on the initial weights of the residual gates.

    Raises:
        ValueError: the numbers do not fit together.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    bits: int = 32
    patch_nums: tuple[int, ...] = SCALES_1024
    grid: int = 64
    text_dim: int = 2048
    text_length: int = MOST_TOKENS
    pool_heads: int = 16
    text_drop: float = 0.1
    drop_path: float = 0.0
    gate_init: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads", "mlp_dim", "bits", "grid", "text_dim", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        for heads in (self.num_heads, self.pool_heads):
            check_heads("Infinity", self.embed_dim, heads)
        if self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"expected heads of a multiple of 4 channels, for rows and columns, but got {self.embed_dim} / "
                f"{self.num_heads}"
            )
        if len(self.patch_nums) > LEVELS or self.patch_nums[-1] > self.grid:
            raise ValueError(
                f"expected at most {LEVELS} scales of at most grid={self.grid} tokens per side but got "
                f"{self.patch_nums}"
            )

    @property
    def scale_sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def num_tokens(self) -> int:
        """Tokens L of all scales."""
        return sum(self.scale_sizes)


@preset(tokenizer="msbsq_tiny")
def infinity_tiny() -> InfinityConfig:
    """24x24 scenes of two digits in 5 scales of 8 bits, 66 tokens; trains on a CPU in minutes."""
    return InfinityConfig(
        depth=4,
        embed_dim=64,
        num_heads=4,
        mlp_dim=256,
        bits=8,
        patch_nums=(1, 2, 3, 4, 6),
        grid=6,
        text_dim=64,
        text_length=24,
        pool_heads=4,
        gate_init=0.1,
    )


def _sized(depth: int, dim: int, heads: int, **more: Any) -> InfinityConfig:
    # As the authors round: to multiples of 256, halves to the even one.
    return InfinityConfig(
        depth=depth,
        embed_dim=dim,
        num_heads=heads,
        mlp_dim=round(4 * dim / 256) * 256,
        **{"drop_path": 0.1, **more},
    )


@preset(tokenizer="msbsq_d16", weights=Published("FoundationVision/Infinity", "infinity_125M_256x256.pth"))
def infinity_125m() -> InfinityConfig:
    """12 blocks, 256 pixels; weights: infinity_125M_256x256.pth."""
    return _sized(12, 768, 8, bits=16, patch_nums=SCALES_256)


@preset(tokenizer="msbsq_d16", weights=NOT_PUBLIC)
def infinity_361m() -> InfinityConfig:
    """16 blocks, 256 pixels, of the paper's comparison of sizes."""
    return _sized(16, 1152, 12, bits=16, patch_nums=SCALES_256)


@preset(tokenizer="msbsq_d16", weights=NOT_PUBLIC)
def infinity_940m() -> InfinityConfig:
    """24 blocks, 256 pixels, of the paper's comparison of sizes."""
    return _sized(24, 1536, 16, bits=16, patch_nums=SCALES_256)


@preset(tokenizer="msbsq_d32", weights=Published("FoundationVision/Infinity", "infinity_2b_reg.pth"))
def infinity_2b() -> InfinityConfig:
    """32 blocks, 1024 pixels; weights: infinity_2b_reg.pth."""
    return _sized(32, 2048, 16)


@preset(tokenizer="msbsq_d14")
def infinity_8b() -> InfinityConfig:
    """40 blocks, 1024 pixels, 2 x 2 places a token; weights: the folder infinity_8b_weights."""
    return _sized(40, 3584, 28, bits=56)


@preset(tokenizer="msbsq_d32", weights=NOT_PUBLIC)
def infinity_20b() -> InfinityConfig:
    """58 blocks, 1024 pixels."""
    return _sized(58, 4608, 36, drop_path=0.25)
