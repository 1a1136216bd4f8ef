"""Multi-scale VQ: settings, network, presets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, preset
from arcore.nn.checks import check_floating, check_ids, check_patch_nums, check_tensor
from arcore.nn.codebook import record_use
from arcore.nn.conv import ConvDecoder, ConvEncoder

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# The published weights were trained with these. At k = 2 and k = 7 of 10 scales two ticks are equally near and the
# rounding of float64 decides; float32 decides otherwise, so the tables are written out.
_PHI_TABLES = {
    (10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    (14, 4): (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}


def phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which of the phi convolutions each scale uses.

    Scale k sits at k / (num_scales - 1) on the unit interval and takes the nearest of `num_phi` ticks. The ticks are
    evenly spaced from m to 1 - m, with m = 1/12 for four phis and 1 / (2 num_phi) otherwise. Between two equally near
    ticks the rounding of float64 decides, as in the published code.
    """
    if (num_scales, num_phi) in _PHI_TABLES:
        return _PHI_TABLES[num_scales, num_phi]
    if num_phi == 1:
        return (0,) * num_scales
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    # 1 - 2 * margin would round otherwise and change which of two equally near ticks is taken.
    step = ((1 - margin) - margin) / (num_phi - 1)
    ticks = [margin + step * i for i in range(num_phi - 1)] + [1 - margin]
    places = [k / max(num_scales - 1, 1) for k in range(num_scales)]
    return tuple(min(range(num_phi), key=lambda i: abs(ticks[i] - place)) for place in places)


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


class Phi(nn.Conv2d):
    """phi(x) = (1 - ratio) x + ratio conv3x3(x): smooths what enlarging left."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - self.ratio) + super().forward(x) * self.ratio


class PhiList(nn.Module):
    """The shared convolutions, looked up by scale."""

    # Codes that restart are written in forward, into what would be a gathered copy.
    shardable = False

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(config.z_channels, config.phi_ratio) for _ in range(config.num_phi))
        self.table = phi_indices(len(config.patch_nums), config.num_phi)

    def forward(self, k: int, x: Tensor) -> Tensor:
        out: Tensor = self.qresi_ls[self.table[k]](x)
        return out


class MultiScaleQuantizer(nn.Module):
    """The quantiser between encoder and decoder; works in float32 under autocast too.

    `ema_vocab_hit_SV` `[K, V]` is a running mean of how often each scale uses each code per batch.
    """

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_nums = config.patch_nums
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = PhiList(config)
        self.ema_vocab_hit_SV: Tensor
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.patch_nums), config.vocab_size))

    def code_map(self, k: int, indices: Tensor) -> Tensor:
        """Codes `[B, p_k^2]` of scale k as what they add to f_hat, `[B, C, p_K, p_K]`."""
        return self.vector_map(k, self.embedding(indices))

    def vector_map(self, k: int, vectors: Tensor) -> Tensor:
        """`code_map` for vectors `[B, p_k^2, C]` in place of codes."""
        side, last = self.patch_nums[k], self.patch_nums[-1]
        codes = vectors.transpose(1, 2).unflatten(2, (side, side))  # [B, C, p_k, p_k]
        if side != last:
            codes = F.interpolate(codes, size=(last, last), mode="bicubic")
        with torch.autocast(codes.device.type, enabled=False):
            return self.quant_resi(k, codes)

    def shrink(self, k: int, latent: Tensor) -> Tensor:
        """A latent `[B, C, p_K, p_K]` as the vectors of scale k, `[B, p_k^2, C]`."""
        side = self.patch_nums[k]
        if side != self.patch_nums[-1]:
            latent = F.interpolate(latent, size=(side, side), mode="area")
        return latent.flatten(2).transpose(1, 2)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the code nearest to each vector in L2; `[..., C]` to int64 `[...]`."""
        codes = self.embedding.weight.float()
        flat = vectors.reshape(-1, vectors.shape[-1]).float()
        # |v - e|^2 without |v|^2, which is the same for all codes.
        with torch.autocast(flat.device.type, enabled=False):
            distance = torch.addmm(codes.square().sum(1), flat, codes.t(), alpha=-2)
        return distance.argmin(1).view(vectors.shape[:-1])

    def scales(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Quantise f `[B, C, p_K, p_K]`, coarse to fine.

        Yields:
            Per scale the vectors `[B, p_k^2, C]`, their codes `[B, p_k^2]`, and f_hat so far, which has a gradient to
            codebook and phi but none to f.
        """
        residual = f.detach()
        f_hat = torch.zeros_like(residual)
        for k in range(len(self.patch_nums)):
            with torch.no_grad():
                vectors = self.shrink(k, residual)
                indices = self.nearest(vectors)
            update = self.code_map(k, indices)
            f_hat = f_hat + update
            residual = residual - update.detach()
            yield vectors, indices, f_hat

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Quantise with a straight-through gradient.

        Args:
            f: `[B, C, p_K, p_K]`.

        Returns:
            f_hat whose gradient goes to f unchanged, the loss (mean over scales of
            mse(f_hat, sg f) + beta mse(sg f_hat, f)), and the codes per scale.
        """
        dtype = f.dtype
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            vectors, indices, partial = zip(*self.scales(f), strict=True)
            loss = torch.stack(
                [
                    F.mse_loss(f_hat, f.detach()) + self.config.beta * F.mse_loss(f_hat.detach(), f)
                    for f_hat in partial
                ]
            ).mean()
            if self.training:
                record_use(
                    self.ema_vocab_hit_SV,
                    self.embedding.weight,
                    indices,
                    vectors,
                    restart_below=self.config.restart_below,
                )
            return (f + (partial[-1] - f).detach()).to(dtype), loss, list(indices)


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


class MultiScaleVQ(nn.Module):
    """Encoder, multi-scale quantiser and decoder.

    Images are float `[B, in_channels, H, W]` in [-1, 1], H = W = `config.image_size`. Codes are a list with one int64
    tensor `[B, p_k^2]` per scale, row by row.

    Args:
        config: settings.
    """

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
    def encode(self, images: Tensor) -> list[Tensor]:
        """Codes of images. Errors: those of `forward`."""
        f = self._latent(images).float()
        return [indices for _, indices, _ in self.quantize.scales(f)]

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
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out.clamp(-1, 1)

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
