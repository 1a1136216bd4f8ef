"""The tokenizer's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arcore.nn.checks import check_patch_nums
from arcore.nn.kinds import check_kinds

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class MultiScaleVQConfig:
    """Settings of `MultiScaleVQ`. The defaults are those of the published 256-pixel tokenizer.

    Attributes:
        in_channels: channels of the image.
        channels: width of the first level of encoder and decoder.
        channel_mult: width of each level as a multiple of `channels`; each level but the last halves the resolution.
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        norm_groups: groups of the group norms.
        z_channels: width C of a code.
        vocab_size: number of codes V.
        patch_nums: side length of each scale, coarse to fine; the last is the latent's.
        num_phi: phi convolutions, shared by neighbouring scales.
        phi_ratio: share of the convolution in phi(x) = (1 - ratio) x + ratio conv(x).
        beta: weight of the commitment term of the loss.
        restart_below: while training, a code that is used less than this fraction of the average is moved onto a
            random vector of the batch. 0 switches it off.

    Raises:
        ValueError: the numbers do not fit together.
    """

    in_channels: int = 3
    channels: int = 160
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    z_channels: int = 32
    vocab_size: int = 4096
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    num_phi: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    restart_below: float = 0.0

    def __post_init__(self) -> None:
        for name in ("in_channels", "channels", "num_res_blocks", "z_channels", "vocab_size", "num_phi"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"expected channel_mult to hold positive numbers but got {self.channel_mult}")
        for mult in (1, *self.channel_mult):
            if self.norm_groups < 1 or self.channels * mult % self.norm_groups:
                raise ValueError(
                    f"expected norm_groups to divide every width but got {self.norm_groups} groups for the width "
                    f"{self.channels * mult}"
                )
        if self.beta < 0:
            raise ValueError(f"expected beta to be at least 0 but got {self.beta}")
        if not 0 <= self.phi_ratio <= 1 or not 0 <= self.restart_below < 1:
            raise ValueError(
                "expected phi_ratio in [0, 1] and restart_below in [0, 1) "
                f"but got {self.phi_ratio} and {self.restart_below}"
            )

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return self.patch_nums[-1] * 2 ** (len(self.channel_mult) - 1)

    def for_images(self, image_size: int, channels: int) -> dict[str, Any]:
        """Fields that make a tokenizer like this one for images of another size.

        As many halvings as here, or more until the latent has at most twice this one's side, or fewer until it has at
        least 4; a size that the halvings do not divide is rounded down. Scales in between are those of
        `PATCH_NUMS_256`.

        Args:
            image_size: pixels per side.
            channels: of an image.

        Raises:
            ValueError: the images are too small.
        """
        if image_size < 2:
            raise ValueError(f"expected images of at least 2 x 2 pixels but got {image_size} x {image_size}")
        halvings = len(self.channel_mult) - 1
        while halvings and image_size >> halvings < 4:
            halvings -= 1
        while image_size >> halvings > 2 * self.patch_nums[-1]:
            halvings += 1
        side = image_size >> halvings
        scales = sorted(
            {*self.patch_nums, *PATCH_NUMS_256} if side > self.patch_nums[-1] else self.patch_nums
        )
        mult = self.channel_mult[: halvings + 1]
        return {
            "in_channels": channels,
            "channel_mult": mult + mult[-1:] * (halvings + 1 - len(mult)),
            "patch_nums": (*(scale for scale in scales if scale < side), side),
        }
