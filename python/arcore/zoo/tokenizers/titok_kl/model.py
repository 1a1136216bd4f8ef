"""The autoencoder and its presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn.checks import check_floating
from arcore.nn.kinds import check_kinds
from arcore.zoo.tokenizers.titok_kl.config import TiTokKLConfig
from arcore.zoo.tokenizers.titok_kl.layers import PixelDecoder, TiTokDecoder, TiTokEncoder

LOG_VARIANCE = (-30.0, 20.0)


HEAD_DIM = 64


class TiTokKLOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        reconstruction: `[B, in_channels, H, H]`, not clamped.
        kl: scalar, divergence of the tokens from a standard normal distribution, per value of the image.
    """

    reconstruction: Tensor
    kl: Tensor


@check_kinds
class TiTokKL(nn.Module):
    """Encoder and decoder. A `LatentDecoder` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    official_entry = "model"

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.encoder = TiTokEncoder(config)
        self.decoder = TiTokDecoder(config)
        self.latent_tokens = nn.Parameter(dim**-0.5 * torch.randn(config.num_tokens, dim))
        self.pixel_quantize_conv = nn.Conv2d(config.code_dim, config.latent_dim, 1)
        self.pixel_decoder = PixelDecoder(config)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        module.bias.zero_()

    @property
    def latent_shape(self) -> tuple[int | None, ...]:
        """Shape of the tokens of an image."""
        return (self.config.num_tokens, self.config.token_dim)

    @check_kinds
    def forward(self, images: Tensor) -> TiTokKLOutput:
        """Encode and decode; in training from a draw of the tokens, else from their mean.

        Raises:
            TypeError, ValueError: the images have another dtype or shape than the autoencoder takes.
        """
        mean, log_variance = self.moments(images)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        z = mean
        if self.training:
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return TiTokKLOutput(self._decode(z), divergence / images.numel())

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the tokens, float32 `[B, K, c]` each."""
        config = self.config
        hint = "bytes become images in [-1, 1] by `images / 127.5 - 1`"
        check_floating("images", images, self.latent_tokens, hint)
        shape = (config.in_channels, config.image_size, config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(f"expected images of shape {('B', *shape)} but got {tuple(images.shape)}")
        # The network's own images are in [0, 1].
        moments = self.encoder((images + 1) / 2, self.latent_tokens).float()
        mean, log_variance = moments.squeeze(2).transpose(1, 2).chunk(2, dim=2)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    @torch.no_grad()
    @check_kinds
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as tokens `[B, K, c]`, the means; errors are those of `forward`."""
        return self.moments(images)[0]

    @torch.no_grad()
    @check_kinds
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of tokens `[B, K, c]`, in any floating dtype; their lengths do not matter.

        Raises:
            ValueError: another shape.
        """
        shape = self.latent_shape
        if latents.dim() != 3 or tuple(latents.shape[1:]) != shape:
            raise ValueError(f"expected tokens of shape {('B', *shape)} but got {tuple(latents.shape)}")
        return self._decode(latents).float().clamp(-1, 1)

    def _decode(self, tokens: Tensor) -> Tensor:
        tokens = F.normalize(tokens.to(self.latent_tokens.dtype), dim=2)
        codes = self.decoder(tokens.transpose(1, 2).unsqueeze(2)).softmax(dim=1)
        out: Tensor = self.pixel_decoder(self.pixel_quantize_conv(codes))
        return 2 * out - 1

    @classmethod
    def config_of(cls, state: Mapping[str, Tensor]) -> TiTokKLConfig:
        """The settings that the shapes of published weights tell; heads have 64 channels.

        Raises:
            ValueError: they are no weights of such an autoencoder.
        """
        state = _of_the_autoencoder(state)
        try:
            tokens, dim = state["latent_tokens"].shape
            grid = len(state["encoder.positional_embedding"]) - 1
            patch = state["encoder.patch_embed.weight"].shape
            levels = len({key.split(".")[2] for key in state if key.startswith("pixel_decoder.up.")})
            widths = [len(state[f"pixel_decoder.up.{level}.block.0.conv1.weight"]) for level in range(levels)]
            return TiTokKLConfig(
                depth=len({key.split(".")[2] for key in state if key.startswith("encoder.transformer.")}),
                embed_dim=dim,
                num_heads=max(1, dim // HEAD_DIM),
                image_size=round(grid**0.5) * patch[2],
                in_channels=patch[1],
                patch_size=patch[2],
                num_tokens=tokens,
                token_dim=state["decoder.decoder_embed.weight"].shape[1],
                code_dim=state["pixel_quantize_conv.weight"].shape[1],
                latent_dim=len(state["pixel_quantize_conv.weight"]),
                channels=widths[0],
                channel_mult=tuple(width // widths[0] for width in widths),
                num_res_blocks=len(
                    {key.split(".")[2] for key in state if key.startswith("pixel_decoder.mid.")}
                ),
                norm_groups=min(32, widths[0]),
            )
        except (KeyError, IndexError) as error:
            raise ValueError("they are no weights of AR-Diffusion's autoencoder of frames") from error

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint, alone or inside a model of AR-Diffusion, under our names."""
        return _of_the_autoencoder(state)


def _of_the_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's part of a file, without what only training used."""
    inside = {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
    return {key: value for key, value in (inside or dict(state)).items() if not key.startswith("loss.")}


@preset
def titok_kl_tiny() -> TiTokKLConfig:
    """8x8 grey digits as 8 tokens of 4 values; trains on a CPU in minutes."""
    return TiTokKLConfig(
        depth=2,
        embed_dim=64,
        num_heads=2,
        image_size=8,
        in_channels=1,
        patch_size=2,
        num_tokens=8,
        code_dim=64,
        latent_dim=32,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        norm_groups=8,
    )


@preset
def titok_kl_l32() -> TiTokKLConfig:
    """Frames of AR-Diffusion: 256 pixels as 32 tokens of 4 values; weights: the vae of its released models."""
    return TiTokKLConfig()
