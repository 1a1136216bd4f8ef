"""The autoencoder's settings."""

from __future__ import annotations

from dataclasses import dataclass

from arcore.nn.kinds import check_kinds


@check_kinds
@dataclass(frozen=True, kw_only=True)
class TiTokKLConfig:
    """Settings of `TiTokKL`. The defaults are those of AR-Diffusion's released autoencoders.

    Attributes:
        depth: transformer blocks of the encoder, and as many of the decoder.
        embed_dim: width D.
        num_heads: attention heads.
        image_size: pixels per side.
        in_channels: of the image.
        patch_size: side p of a patch, 2^(levels - 1) for the levels of `channel_mult`.
        num_tokens: tokens K.
        token_dim: values c of a token.
        code_dim: channels of the soft codes between the transformer and the convolutions.
        latent_dim: channels that the convolutions start from.
        channels: width of the finest level of the convolutions.
        channel_mult: width of each level as a multiple of `channels`.
        num_res_blocks: residual blocks in the middle; each level has as many.
        norm_groups: groups of the group norms.

    Raises:
        ValueError: a size is below 1, or sizes do not divide.
    """

    depth: int = 24
    embed_dim: int = 1024
    num_heads: int = 16
    image_size: int = 256
    in_channels: int = 3
    patch_size: int = 16
    num_tokens: int = 32
    token_dim: int = 4
    code_dim: int = 1024
    latent_dim: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        for name in (
            "depth",
            "embed_dim",
            "num_heads",
            "image_size",
            "in_channels",
            "num_tokens",
            "token_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"expected num_heads to divide embed_dim={self.embed_dim} but got {self.num_heads}"
            )
        if not self.channel_mult or self.patch_size != 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"expected patch_size to be 2 to the number of levels less 1, for channel_mult={self.channel_mult}, "
                f"but got {self.patch_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"expected patch_size to divide image_size={self.image_size} but got {self.patch_size}"
            )
        widths = [self.channels * mult for mult in self.channel_mult]
        if min(self.norm_groups, self.channels) < 1 or any(width % self.norm_groups for width in widths):
            raise ValueError(f"expected norm_groups to divide {widths} but got {self.norm_groups}")

    @property
    def side(self) -> int:
        """Patches G per side."""
        return self.image_size // self.patch_size
