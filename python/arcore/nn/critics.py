"""Networks that judge reconstructions of images: features of VGG-16 and a patch discriminator.

Both serve the training of image tokenizers (VQGAN, arXiv:2012.09841, section 3.1) and are no part of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.kinds import Size, check_kinds

# Convolutions of VGG-16 (arXiv:1409.1556, table 1, D) by stage; a stage ends before a pooling by 2.
_STAGES: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@check_kinds
class PerceptualLoss(nn.Module):
    """Distance of two images in the features of VGG-16 (LPIPS, arXiv:1801.03924, section 3, equation 1).

    The last features of each stage are scaled to length 1 at every place; the squared differences are weighted per
    channel, summed over channels, averaged over places, and added up over the stages. The network is frozen.

    Args:
        state: weights of VGG-16 with the names of torchvision, `features.0.weight` and so on. Weights of the channels
            `lin0.model.1.weight` to `lin4.model.1.weight`, as the authors of LPIPS store them, are used where they are
            in it too; without them all channels count 1 / their number.

    Raises:
        ValueError: a weight is missing or has another shape (named).
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        place, width = 0, 3
        for channels in _STAGES:
            stage = nn.ModuleList()
            for wide in channels:
                conv = nn.Conv2d(width, wide, 3, padding=1)
                for part in ("weight", "bias"):
                    _copy(state, f"features.{place}.{part}", getattr(conv, part))
                stage.append(conv)
                place, width = place + 2, wide
            place += 1
            self.stages.append(stage)
        for number, channels in enumerate(_STAGES):
            weight = torch.full((channels[-1],), 1 / channels[-1])
            name = f"lin{number}.model.1.weight"
            if name in state:
                weight = state[name].float().flatten()
                if len(weight) != channels[-1]:
                    raise ValueError(f"{name} has {len(weight)} weights, expected {channels[-1]}")
            self.register_buffer(f"weight{number}", weight)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    @check_kinds
    def from_file(cls, path: Path) -> PerceptualLoss:
        """From a file of torch.save or safetensors with those names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else (the file is named).
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} with weights of VGG-16")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return cls(load_file(path))
            return cls(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} holds no weights of VGG-16 in torchvision's names: {reason}") from error

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance.

        Args:
            images: `[B, C, H, W]` in [-1, 1], C 1 or 3, at least 16 pixels wide and high.
            others: likewise.

        Returns:
            Scalar float32.
        """
        both = torch.cat([images, others]).float()
        x = ((both.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        total = x.new_zeros(())
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, 2)
            for conv in stage:  # type: ignore[attr-defined]
                x = F.relu(conv(x))
            one, two = F.normalize(x, dim=1, eps=1e-10).chunk(2)
            weight = getattr(self, f"weight{number}").view(1, -1, 1, 1)
            total = total + ((one - two).square() * weight).sum(1).mean()
        return total


@check_kinds
class PatchDiscriminator(nn.Module):
    """Says of each patch of an image whether it is real (pix2pix, arXiv:1611.07004, section 3.2.2).

    Convolutions of 4 x 4; the first `depth` halve the picture. Group norm stands in for batch norm, so that a score
    does not depend on the rest of the batch.

    Args:
        in_channels: of the images.
        channels: width of the first layer; doubles with each, up to eight times.
        depth: halvings.
    """

    def __init__(self, in_channels: Size, channels: Size = 64, depth: Size = 3) -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, depth + 1):
            stride = 2 if level < depth else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=False),
                nn.GroupNorm(min(32, widths[level] // 4), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Scores `[B, 1, h, w]` of images `[B, C, H, W]` in [-1, 1]; positive means real."""
        out: Tensor = self.layers(images)
        return out


def _copy(state: Mapping[str, Tensor], name: str, target: nn.Parameter) -> None:
    value = state.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    if value.shape != target.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    with torch.no_grad():
        target.copy_(value)
