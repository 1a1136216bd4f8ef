"""Multi-scale BSQ: the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.bsq import BinarySphericalQuantizer, bits_of, index_of
from arcore.nn.checks import check_floating, check_ids, check_tensor
from arcore.nn.conv import ConvDecoder, ConvEncoder
from arcore.nn.kinds import check_kinds
from arcore.zoo.tokenizers.multi_scale_bsq.config import MultiScaleBSQConfig

# Codes are int64 numbers, which hold so many bits.
MOST_BITS = 62


@dataclass(frozen=True)
class MultiScaleBSQOutput:
    """What a training step needs.

    Attributes:
        reconstruction: `[B, in_channels, H, W]`, not clamped.
        vq_loss: scalar; add it to the reconstruction loss.
        bits: of each scale, bool `[B, p_k^2, d]`.
    """

    reconstruction: Tensor
    vq_loss: Tensor
    bits: list[Tensor]


@check_kinds
class MultiScaleBSQ(nn.Module):
    """Encoder, multi-scale binary quantiser and decoder.

    Images are float `[B, in_channels, H, W]` in [-1, 1], H = W = `config.image_size`. Codes are a list with one tensor
    per scale, row by row: bits, bool `[B, p_k^2, d]`, or numbers, int64 `[B, p_k^2]`, whose binary digits are those
    bits, the first bit the highest.

    Args:
        config: settings.
    """

    official_entry = "vae"

    def __init__(self, config: MultiScaleBSQConfig) -> None:
        super().__init__()
        self.config = config
        layout = (
            config.in_channels,
            config.channels,
            config.channel_mult,
            config.num_res_blocks,
            config.z_channels,
            config.norm_groups,
        )
        self.encoder = ConvEncoder(*layout, attention=False, mid_attention=False)
        self.decoder = ConvDecoder(*layout, attention=False, mid_attention=False)
        self.quantizer = BinarySphericalQuantizer(
            config.z_channels,
            group=1,
            beta=config.beta,
            gamma=1.0,
            zeta=config.zeta,
            sharpness=config.sharpness,
        )

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.config.patch_nums

    @property
    def bits(self) -> int:
        """Bits d of a token."""
        return self.config.bits

    @property
    def vocab_size(self) -> int:
        return 2**self.config.bits

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
    def forward(self, images: Tensor) -> MultiScaleBSQOutput:
        """Encode, quantise, decode.

        Raises:
            TypeError, ValueError: the images have another dtype or shape than the tokenizer takes.
        """
        f = self.latent(images)
        found, losses, bits = torch.zeros_like(f), [], []
        left = f
        for k in range(len(self.patch_nums)):
            out = self.quantizer(self._shrunk(k, left).movedim(1, -1))
            codes = out.codes.movedim(-1, 1)
            update = self._enlarged(codes)
            found, left = found + update, left - update.detach()
            losses.append(out.loss)
            bits.append(self._tokens(codes.detach()) > 0)
        return MultiScaleBSQOutput(self.decoder(found), torch.stack(losses).mean(), bits)

    def latent(self, images: Tensor) -> Tensor:
        """The encoder's map `[B, C, side, side]`, before it is quantised. Errors: those of `forward`."""
        size = self.config.image_size
        hint = "bytes become images in [-1, 1] by `images / 127.5 - 1`"
        check_tensor("images", images)
        check_floating("images", images, self.encoder.conv_in.weight, hint)
        if images.dim() != 4 or images.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"expected images of shape [B, {self.config.in_channels}, {size}, {size}] but got {tuple(images.shape)}"
            )
        out: Tensor = self.encoder(images)
        return out

    @check_kinds
    @torch.no_grad()
    def encode_bits(self, images: Tensor) -> list[Tensor]:
        """Bits of images, bool `[B, p_k^2, d]` per scale. Errors: those of `forward`."""
        return self.corrected(self.latent(images), None)[0]

    @torch.no_grad()
    def corrected(self, f: Tensor, strengths: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Bits of a latent, and what a transformer reads, with bits flipped on the way (section 3.3).

        What a scale adds to the map has each bit flipped with a probability of its own scale; the bits of the next
        scales are those of what is then left, so a model that reads them learns to correct its own mistakes. The bits
        of a scale are never flipped themselves.

        Args:
            f: `[B, C, side, side]`, from `latent`.
            strengths: probability of a flip for each scale, `[K]`; draws come from torch's global generator. None
                flips nothing.

        Returns:
            Bits, bool `[B, p_k^2, d]` per scale, and inputs `[B, L - p_0^2, d]`.
        """
        found, bits, inputs = torch.zeros_like(f), [], []
        for k in range(len(self.patch_nums)):
            signs = self._shrunk(k, f - found) > 0
            bits.append(self._tokens(signs))
            if strengths is not None:
                signs = signs ^ (torch.rand(signs.shape, device=f.device) < strengths[k])
            found = found + self._enlarged(self._values(signs).to(f.dtype))
            if k + 1 < len(self.patch_nums):
                inputs.append(self.next_input(k, found))
        return bits, torch.cat([f.new_zeros(len(f), 0, self.bits), *inputs], 1)

    @check_kinds
    def encode(self, images: Tensor) -> list[Tensor]:
        """Codes of images, int64 `[B, p_k^2]` per scale.

        Raises:
            TypeError, ValueError: as `forward`, or a code has more bits than an int64 holds.
        """
        return [self.codes_of(bits) for bits in self.encode_bits(images)]

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images of bits or codes of all scales, clamped to [-1, 1].

        Raises:
            TypeError, ValueError: they do not fit the scales.
        """
        latent = self.empty_latent(len(codes[0]) if len(codes) else 0)
        for k, part in enumerate(self._checked(codes)):
            latent = self.add_scale(k, part, latent)
        return self.decode_latent(latent)

    def scale_inputs(self, codes: Sequence[Tensor]) -> Tensor:
        """What a next-scale model reads while training, `[B, L - p_0^2, d]`: the map of the scales before each one.

        Args:
            codes: bits or codes of all scales; the last scale's are not used and may be left out.
        """
        given = self._checked(codes, least=len(self.patch_nums) - 1)
        latent = self.empty_latent(len(given[0]) if given else 0)
        inputs = [latent.new_zeros(len(latent), 0, self.bits)]
        for k in range(len(self.patch_nums) - 1):
            latent = self.add_scale(k, given[k], latent)
            inputs.append(self.next_input(k, latent))
        return torch.cat(inputs, dim=1)

    def empty_latent(self, batch: int) -> Tensor:
        """The map before the first scale: zeros `[B, C, side, side]`."""
        side = self.config.latent_side
        return self.encoder.conv_in.weight.new_zeros(batch, self.z_channels, side, side)

    def add_scale(self, k: int, codes: Tensor, latent: Tensor) -> Tensor:
        """The map after scale k with bits `[B, p_k^2, d]` or codes `[B, p_k^2]`.

        Raises:
            TypeError: they are neither bool nor int64.
            ValueError: a shape does not fit, or a code is out of range.
        """
        self._check_scale(k, len(self.patch_nums))
        self._check_latent(latent)
        self._check_codes(k, codes, len(latent))
        bits = codes if codes.dtype == torch.bool else self.bits_of(codes)
        side = self.patch_nums[k]
        signs = bits.transpose(1, 2).unflatten(2, (side, side))
        if self.config.patchify:
            signs = F.pixel_shuffle(signs, 2)
        return latent + self._enlarged(self._values(signs).to(latent.dtype))

    def next_input(self, k: int, latent: Tensor) -> Tensor:
        """The map resized to scale k + 1 as tokens, `[B, p_{k+1}^2, d]`.

        Raises:
            ValueError: no scale follows scale k, or the latent has another shape.
        """
        self._check_scale(k, len(self.patch_nums) - 1)
        self._check_latent(latent)
        side = self.patch_nums[k + 1] * (2 if self.config.patchify else 1)
        return self._tokens(F.interpolate(latent, size=(side, side), mode="bilinear"))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images of the map, clamped to [-1, 1].

        Raises:
            ValueError: the latent is not `[B, C, side, side]`.
        """
        self._check_latent(latent)
        out: Tensor = self.decoder(latent)
        return out.clamp(-1, 1)

    def codes_of(self, bits: Tensor) -> Tensor:
        """Numbers int64 `[...]` of bits bool `[..., d]`, the first bit the highest.

        Raises:
            ValueError: a code has more bits than an int64 holds.
        """
        self._check_bits()
        return index_of(bits.flip(-1))

    def bits_of(self, codes: Tensor) -> Tensor:
        """Bits bool `[..., d]` of numbers int64 `[...]`; the inverse of `codes_of`, with its errors."""
        self._check_bits()
        return bits_of(codes, self.bits).flip(-1)

    def _check_bits(self) -> None:
        if self.bits > MOST_BITS:
            raise ValueError(
                f"a code of {self.bits} bits does not fit into an int64: use encode_bits and give bits to decode"
            )

    def _values(self, signs: Tensor) -> Tensor:
        return torch.where(signs, 1.0, -1.0) / self.z_channels**0.5

    def _shrunk(self, k: int, latent: Tensor) -> Tensor:
        side = self.patch_nums[k] * (2 if self.config.patchify else 1)
        if side == self.config.latent_side:
            return latent
        return F.interpolate(latent, size=(side, side), mode="area")

    def _enlarged(self, codes: Tensor) -> Tensor:
        side = self.config.latent_side
        if codes.shape[-1] == side:
            return codes
        return F.interpolate(codes, size=(side, side), mode="bilinear")

    def _tokens(self, maps: Tensor) -> Tensor:
        """Maps `[B, C, s, s]` of one scale as `[B, p_k^2, d]`."""
        if self.config.patchify:
            maps = F.pixel_unshuffle(maps, 2)
        return maps.flatten(2).transpose(1, 2)

    def _check_scale(self, k: int, stop: int) -> None:
        if not 0 <= k < stop:
            raise ValueError(
                f"expected k from 0 to {stop - 1}, for patch_nums={self.patch_nums}, but got {k}"
            )

    def _check_latent(self, latent: Tensor) -> None:
        side = self.config.latent_side
        if latent.dim() != 4 or latent.shape[1:] != (self.z_channels, side, side):
            raise ValueError(
                f"expected a latent of shape [B, {self.z_channels}, {side}, {side}] but got {tuple(latent.shape)}"
            )

    def _check_codes(self, k: int, codes: Tensor, batch: int) -> None:
        check_tensor(f"codes of scale {k}", codes)
        expected: tuple[int, ...] = (batch, self.patch_nums[k] ** 2)
        if codes.dtype == torch.bool:
            expected = (*expected, self.bits)
        if tuple(codes.shape) != expected:
            raise ValueError(f"expected codes of scale {k} of shape {expected} but got {tuple(codes.shape)}")
        if codes.dtype != torch.bool:
            check_ids(f"codes of scale {k}", codes, self.vocab_size)

    def _checked(self, codes: Sequence[Tensor], least: int | None = None) -> Sequence[Tensor]:
        count = len(self.patch_nums)
        if not (count if least is None else least) <= len(codes) <= count:
            raise ValueError(
                f"expected codes of {count} scales, for patch_nums={self.patch_nums}, but got {len(codes)}"
            )
        for k, part in enumerate(codes):
            self._check_codes(k, part, len(codes[0]))
        return codes

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published file under our names.

        Raises:
            ValueError: it is for another number of bits.
        """
        mask = state.get("quantizer.lfq.mask")
        if mask is not None and mask.numel() != self.z_channels:
            raise ValueError(f"it is for {mask.numel()} bits, not {self.z_channels}")
        return {
            re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name): value
            for name, value in state.items()
            if name != "quantizer.lfq.mask"
        }
