"""The quantiser: what is left of a latent map, scale by scale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.codebook import record_use
from arcore.zoo.tokenizers.multi_scale_vq.config import MultiScaleVQConfig

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
