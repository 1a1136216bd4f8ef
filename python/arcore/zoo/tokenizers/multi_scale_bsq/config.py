"""Multi-scale BSQ: settings and presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arcore.catalog import Published, preset
from arcore.nn.checks import check_patch_nums
from arcore.nn.kinds import check_kinds

# Scales of square pictures of 256, 512 and 1024 pixels.
SCALES_256 = (1, 2, 4, 6, 8, 12, 16)
SCALES_512 = (*SCALES_256, 20, 24, 32)
SCALES_1024 = (*SCALES_512, 40, 48, 64)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class MultiScaleBSQConfig:
    """Settings of `MultiScaleBSQ`. The defaults are those of the published tokenizer of 32 bits at 1024 pixels.

    Attributes:
        in_channels: channels of the image.
        channels: width of the first level of encoder and decoder.
        channel_mult: width of each level as a multiple of `channels`; each level but the last halves the resolution.
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        norm_groups: groups of the group norms.
        z_channels: latent channels C, one bit each.
        patch_nums: side length of each scale in tokens, coarse to fine.
        patchify: a token is a square of 2 x 2 places of the latent, whose side is then twice that of the scale.
        beta: weight of the commitment term of the loss.
        zeta: weight of the entropy terms of the loss.
        sharpness: inverse temperature of the entropies.

    Raises:
        ValueError: the numbers do not fit together.
    """

    in_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    z_channels: int = 32
    patch_nums: tuple[int, ...] = SCALES_1024
    patchify: bool = False
    beta: float = 0.25
    zeta: float = 0.1
    sharpness: float = 100.0

    def __post_init__(self) -> None:
        for name in ("in_channels", "channels", "num_res_blocks", "z_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"expected channel_mult to hold positive numbers but got {self.channel_mult}")
        for mult in (1, *self.channel_mult):
            if self.channels * mult % self.norm_groups:
                raise ValueError(
                    f"expected norm_groups to divide every width but got {self.norm_groups} groups for the width "
                    f"{self.channels * mult}"
                )
        if self.beta < 0 or self.zeta < 0 or self.sharpness <= 0:
            raise ValueError(
                "expected beta and zeta to be at least 0 and sharpness above 0 but got "
                f"{self.beta}, {self.zeta} and {self.sharpness}"
            )

    @property
    def factor(self) -> int:
        """Pixels per side of a place of the latent."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def latent_side(self) -> int:
        """Places per side of the latent."""
        return self.patch_nums[-1] * (2 if self.patchify else 1)

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return self.latent_side * self.factor

    @property
    def bits(self) -> int:
        """Bits d of a token."""
        return self.z_channels * (4 if self.patchify else 1)

    def for_images(self, image_size: int, channels: int) -> dict[str, Any]:
        """Fields that make a tokenizer like this one for images of another size, rounded down to whole tokens.

        Args:
            image_size: pixels per side.
            channels: of an image.

        Raises:
            ValueError: the images are smaller than one token.
        """
        side = image_size // (self.image_size // self.patch_nums[-1])
        if side < 1:
            raise ValueError(
                f"expected images of at least {self.image_size // self.patch_nums[-1]} pixels per side, one token, but "
                f"got {image_size}"
            )
        scales = {*self.patch_nums, *(SCALES_1024 if side > self.patch_nums[-1] else ())}
        return {
            "in_channels": channels,
            "patch_nums": (*sorted(scale for scale in scales if scale < side), side),
        }


@preset
def msbsq_tiny() -> MultiScaleBSQConfig:
    """24x24 grey images as 5 scales of 8 bits, 66 tokens; trains on a CPU in minutes."""
    return MultiScaleBSQConfig(
        in_channels=1,
        channels=8,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        norm_groups=4,
        z_channels=8,
        patch_nums=(1, 2, 3, 4, 6),
        sharpness=1.0,
    )


def _published(bits: int, **more: Any) -> MultiScaleBSQConfig:
    return MultiScaleBSQConfig(z_channels=bits, **more)


@preset(weights=Published("FoundationVision/Infinity", "infinity_vae_d16.pth"))
def msbsq_d16() -> MultiScaleBSQConfig:
    """16 bits, 256 pixels; weights: infinity_vae_d16.pth."""
    return _published(16, patch_nums=SCALES_256)


@preset(weights=Published("FoundationVision/Infinity", "infinity_vae_d24.pth"))
def msbsq_d24() -> MultiScaleBSQConfig:
    """24 bits, 256 pixels; weights: infinity_vae_d24.pth."""
    return _published(24, patch_nums=SCALES_256)


@preset(weights=Published("FoundationVision/Infinity", "infinity_vae_d32reg.pth"))
def msbsq_d32() -> MultiScaleBSQConfig:
    """32 bits, 1024 pixels, of the model of 2 billion weights; weights: infinity_vae_d32reg.pth."""
    return _published(32)


@preset(weights=Published("FoundationVision/Infinity", "infinity_vae_d56_f8_14_patchify.pth"))
def msbsq_d14() -> MultiScaleBSQConfig:
    """14 bits a place, 2 x 2 places a token, 1024 pixels, of the model of 8 billion weights."""
    return _published(14, channel_mult=(1, 2, 4, 4), patchify=True)


@preset(weights=Published("FoundationVision/Infinity", "infinity_vae_d64.pth"))
def msbsq_d64() -> MultiScaleBSQConfig:
    """64 bits, 256 pixels; weights: infinity_vae_d64.pth."""
    return _published(64, patch_nums=SCALES_256)
