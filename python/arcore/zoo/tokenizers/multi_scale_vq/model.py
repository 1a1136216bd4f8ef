"""The tokenizer's network and presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arcore.catalog import Published, preset
from arcore.nn.checks import check_floating, check_ids, check_tensor
from arcore.nn.conv import ConvDecoder, ConvEncoder
from arcore.nn.kinds import check_kinds
from arcore.zoo.tokenizers.multi_scale_vq.config import PATCH_NUMS_512, MultiScaleVQConfig
from arcore.zoo.tokenizers.multi_scale_vq.quantizer import MultiScaleQuantizer

# Channels from which a decoder is run with channels last on a CPU.
WIDE = 64


@dataclass(frozen=True)
class MultiScaleVQOutput:
    """What a training step needs.

    Attributes:
        reconstruction: `[B, in_channels, H, W]`, not clamped.
        vq_loss: scalar; add it to the reconstruction loss.
        indices: codes per scale, int64 `[B, p_k^2]`.
    """

    reconstruction: Tensor
    vq_loss: Tensor
    indices: list[Tensor]


@check_kinds
class MultiScaleVQ(nn.Module):
    """Encoder, multi-scale quantiser and decoder.

    Images are float `[B, in_channels, H, W]` in [-1, 1], H = W = `config.image_size`. Codes are a list with one int64
    tensor `[B, p_k^2]` per scale, row by row.

    Args:
        config: settings.
    """

    # Codes that restart are written in forward, into what would be a gathered copy.
    shardable = False

    official_entry = "trainer.vae_local"
    # How often codes were used in training: a file without it, or with that of other scales, is as good.
    statistics = ("quantize.ema_vocab_hit_SV",)

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.config = config
        channels, z_channels, groups = config.channels, config.z_channels, config.norm_groups
        layout = (
            config.in_channels,
            channels,
            config.channel_mult,
            config.num_res_blocks,
            z_channels,
            groups,
        )
        self.encoder = ConvEncoder(*layout)
        self.decoder = ConvDecoder(*layout)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.config.patch_nums

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def z_channels(self) -> int:
        return self.config.z_channels

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return self.config.image_size

    @check_kinds
    def forward(self, images: Tensor) -> MultiScaleVQOutput:
        """Encode, quantise, decode.

        While training this also updates the running use of codes and restarts dead ones (see `restart_below`), with
        draws from torch's global generator.

        Raises:
            TypeError, ValueError: the images have another dtype or shape than the tokenizer takes.
        """
        f_hat, loss, indices = self.quantize(self._latent(images))
        return MultiScaleVQOutput(self.decoder(self.post_quant_conv(f_hat)), loss, indices)

    @torch.no_grad()
    @check_kinds
    def encode(self, images: Tensor) -> list[Tensor]:
        """Codes of images. Errors: those of `forward`."""
        f = self._latent(images).float()
        return [indices for _, indices, _ in self.quantize.scales(f)]

    @check_kinds
    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        """Images of codes, clamped to [-1, 1].

        Raises:
            TypeError, ValueError: the codes do not fit `patch_nums` and `vocab_size`.
        """
        latent = self.empty_latent(len(indices[0]) if len(indices) else 0)
        for k, codes in enumerate(self._checked(indices)):
            latent = self.add_scale(k, codes, latent)
        return self.decode_latent(latent)

    def scale_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """What a next-scale model reads while training: for each scale but the first, f_hat of the scales before it.

        Args:
            indices: codes of all scales; the last scale's are not used and may be left out.

        Returns:
            `[B, L - p_0^2, C]`.

        Raises:
            TypeError, ValueError: the codes do not fit `patch_nums` and `vocab_size`.
        """
        given = self._checked(indices, least=len(self.patch_nums) - 1)
        latent = self.empty_latent(len(given[0]) if given else 0)
        inputs = [latent.new_zeros(len(latent), 0, self.z_channels)]
        for k in range(len(self.patch_nums) - 1):
            latent = self.add_scale(k, given[k], latent)
            inputs.append(self.next_input(k, latent))
        return torch.cat(inputs, dim=1)

    def empty_latent(self, batch: int) -> Tensor:
        """f_hat before the first scale: zeros `[B, C, p_K, p_K]`."""
        side = self.patch_nums[-1]
        return self.quantize.embedding.weight.new_zeros(batch, self.z_channels, side, side)

    def add_scale(self, k: int, indices: Tensor, latent: Tensor) -> Tensor:
        """f_hat `[B, C, p_K, p_K]` after scale k with codes `[B, p_k^2]`.

        Raises:
            TypeError: the codes are not int64.
            ValueError: there is no scale k, a shape is not that of B images, or a code is out of range.
        """
        self._check_scale(k, len(self.patch_nums))
        self._check_latent(latent)
        self._check_codes(k, indices, len(latent))
        return latent + self.quantize.code_map(k, indices)

    @property
    def codebook(self) -> Tensor:
        """The vector of each code, `[V, C]`."""
        return self.quantize.embedding.weight

    def add_vectors(self, k: int, vectors: Tensor, latent: Tensor) -> Tensor:
        """`add_scale` for vectors `[B, p_k^2, C]`, such as mixtures of codes.

        Raises:
            ValueError: there is no scale k, or a shape is not that of B images.
        """
        self._check_scale(k, len(self.patch_nums))
        self._check_latent(latent)
        expected = (len(latent), self.patch_nums[k] ** 2, self.z_channels)
        if tuple(vectors.shape) != expected:
            raise ValueError(
                f"expected vectors of scale {k} of shape {expected} but got {tuple(vectors.shape)}"
            )
        return latent + self.quantize.vector_map(k, vectors.to(latent.dtype))

    def next_input(self, k: int, latent: Tensor) -> Tensor:
        """f_hat shrunk to scale k + 1, `[B, p_{k+1}^2, C]`.

        Raises:
            ValueError: no scale follows scale k, or the latent has another shape.
        """
        self._check_scale(k, len(self.patch_nums) - 1)
        self._check_latent(latent)
        return self.quantize.shrink(k + 1, latent)

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images of f_hat, clamped to [-1, 1]; f_hat of a few scales gives a blurred image.

        Raises:
            ValueError: the latent is not `[B, C, p_K, p_K]`.
        """
        self._check_latent(latent)
        if latent.device.type == "cpu" and self.config.channels >= WIDE:
            # Wide convolutions are faster on a CPU where a place's channels lie side by side.
            latent = latent.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out.clamp(-1, 1).contiguous()

    def _latent(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        hint = "bytes become images in [-1, 1] by `images / 127.5 - 1`"
        check_tensor("images", images)
        check_floating("images", images, self.quant_conv.weight, hint)
        if images.dim() != 4 or images.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"expected images of shape [B, {self.config.in_channels}, {size}, {size}] "
                f"but got {tuple(images.shape)}"
            )
        out: Tensor = self.quant_conv(self.encoder(images))
        return out

    def _check_scale(self, k: int, stop: int) -> None:
        if not 0 <= k < stop:
            raise ValueError(
                f"expected k from 0 to {stop - 1}, for patch_nums={self.patch_nums}, but got {k}"
            )

    def _check_latent(self, latent: Tensor) -> None:
        side = self.patch_nums[-1]
        if latent.dim() != 4 or latent.shape[1:] != (self.z_channels, side, side):
            raise ValueError(
                f"expected a latent of shape [B, {self.z_channels}, {side}, {side}] but got {tuple(latent.shape)}"
            )

    def _check_codes(self, k: int, codes: Tensor, batch: int) -> None:
        expected = (batch, self.patch_nums[k] ** 2)
        if tuple(codes.shape) != expected:
            raise ValueError(f"expected codes of scale {k} of shape {expected} but got {tuple(codes.shape)}")
        check_ids(f"codes of scale {k}", codes, self.vocab_size)

    def _checked(self, indices: Sequence[Tensor], least: int | None = None) -> Sequence[Tensor]:
        count = len(self.patch_nums)
        if not (count if least is None else least) <= len(indices) <= count:
            raise ValueError(
                f"expected codes of {count} scales, for patch_nums={self.patch_nums}, but got {len(indices)}"
            )
        for k, codes in enumerate(indices):
            self._check_codes(k, codes, len(indices[0]))
        return indices


@preset
def msvq_tiny() -> MultiScaleVQConfig:
    """8x8 grey images as 4 scales, 30 tokens; trains on a CPU in a minute."""
    return MultiScaleVQConfig(
        in_channels=1,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        norm_groups=4,
        z_channels=16,
        vocab_size=128,
        patch_nums=(1, 2, 3, 4),
        restart_below=0.03,
    )


@preset
def msvq_mnist() -> MultiScaleVQConfig:
    """28x28 grey images as 6 scales, 104 tokens; trains on two CPU cores in minutes."""
    return MultiScaleVQConfig(
        in_channels=1,
        channels=16,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        norm_groups=4,
        z_channels=16,
        vocab_size=256,
        patch_nums=(1, 2, 3, 4, 5, 7),
        restart_below=0.03,
    )


@preset(weights=Published("FoundationVision/var", "vae_ch160v4096z32.pth"))
def msvq_ch160() -> MultiScaleVQConfig:
    """The tokenizer of the published VAR models, 256 pixels; weights: vae_ch160v4096z32.pth."""
    return MultiScaleVQConfig()


@preset(weights=Published("FoundationVision/var", "vae_ch160v4096z32.pth"))
def msvq_ch160_512() -> MultiScaleVQConfig:
    """The same tokenizer, with the scales of the 512-pixel VAR; weights: vae_ch160v4096z32.pth."""
    return MultiScaleVQConfig(patch_nums=PATCH_NUMS_512)
