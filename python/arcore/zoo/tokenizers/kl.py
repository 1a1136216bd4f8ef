"""KL autoencoder: continuous latent images, the stage before latent diffusion (Rombach et al., arXiv:2112.10752).

A convolutional encoder gives each place of a map that is 2^(levels - 1) times smaller a mean and a variance, a decoder
makes the image from a draw or from the mean. A slight pull towards a standard normal distribution keeps the latents
from spreading.

`kl_f8` is the layout of Stable Diffusion's autoencoder, whose latents DiT and ACDiT draw, `kl_f16` that of MAR's. Files
under diffusers' names and under the authors' open; the layout of a file is read from its shapes.

Legend: B images, H their side, f = 2^(levels - 1), z latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.data import load_digits
from arcore.nn import ConvDecoder, ConvEncoder
from arcore.nn.checks import check_floating
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="kl",
    title="KL autoencoder",
    paper="arXiv:2112.10752",
    paper_title="High-Resolution Image Synthesis with Latent Diffusion Models",
    topic="tokenizers",
    kind="model",
    model="KLAutoencoder",
    recipe="autoencoder",
    summary="Convolutional autoencoder with continuous latents, the decoder of latent diffusion.",
    claim="A latent of half as many values keeps most of a held-out image, and the pull keeps its spread near 1.",
    checked_on="real data",
)

LOG_VARIANCE = (-30.0, 20.0)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Settings of `KLAutoencoder`. The defaults are those of Stable Diffusion.

    Attributes:
        in_channels: of the image.
        channels: width of the finest level.
        channel_mult: width of each level as a multiple of `channels`; each level but the last halves the image.
        num_res_blocks: residual blocks per level; the decoder has one more.
        norm_groups: groups of the group norms.
        z_channels: latent channels z.
        encoder_attention: attention after each residual block of the encoder's coarsest level too.
        scaling: latents are multiplied by this, so that their deviation is about 1.
        image_size: pixels per side that it is trained on; any multiple of f can be encoded.

    Raises:
        ValueError: a size is below 1, `norm_groups` does not divide a width, or f does not divide `image_size`.
    """

    in_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    z_channels: int = 4
    encoder_attention: bool = False
    scaling: float = 0.18215
    image_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        for name in ("in_channels", "channels", "num_res_blocks", "norm_groups", "z_channels", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"expected channel_mult to hold positive numbers but got {self.channel_mult}")
        if any(self.channels * mult % self.norm_groups for mult in (1, *self.channel_mult)):
            raise ValueError(
                f"expected norm_groups to divide every width but got {self.norm_groups} groups for widths "
                f"{[self.channels * mult for mult in (1, *self.channel_mult)]}"
            )
        if self.image_size % self.factor:
            raise ValueError(
                f"expected image_size to be a multiple of {self.factor}, as the {len(self.channel_mult)} levels halve "
                f"{len(self.channel_mult) - 1} times, but got {self.image_size}"
            )
        if not self.scaling > 0:
            raise ValueError(f"expected scaling > 0 but got {self.scaling}")

    @property
    def factor(self) -> int:
        """Pixels f per side of a place of the latent."""
        return int(2 ** (len(self.channel_mult) - 1))

    def for_images(self, image_size: int, channels: int) -> dict[str, Any]:
        """Fields that fit an autoencoder to images; a size that f does not divide is rounded down.

        Raises:
            ValueError: the images are smaller than one place of the latent.
        """
        if image_size < self.factor:
            raise ValueError(
                f"expected images of at least {self.factor} pixels per side, one place of the latent, but got "
                f"{image_size}"
            )
        return {"image_size": image_size // self.factor * self.factor, "in_channels": channels}


class KLOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        reconstruction: `[B, in_channels, H, H]`, not clamped.
        kl: scalar, divergence of the latents from a standard normal distribution, per value of the image.
    """

    reconstruction: Tensor
    kl: Tensor


@check_kinds
class KLAutoencoder(nn.Module):
    """Encoder and decoder. A `LatentDecoder` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        z = config.z_channels
        layout = (config.in_channels, config.channels, config.channel_mult, config.num_res_blocks)
        self.encoder = ConvEncoder(*layout, 2 * z, config.norm_groups, attention=config.encoder_attention)
        self.decoder = ConvDecoder(*layout, z, config.norm_groups, attention=False)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    @property
    def latent_shape(self) -> tuple[int | None, ...]:
        """Shape of a latent, None where any size will do."""
        return (self.config.z_channels, None, None)

    @check_kinds
    def forward(self, images: Tensor) -> KLOutput:
        """Encode and decode; in training from a draw of the latents, else from their mean.

        Raises:
            TypeError, ValueError: the images have another dtype or shape than the autoencoder takes.
        """
        mean, log_variance = self.moments(images)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        z = mean
        if self.training:
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return KLOutput(self._decode(z), divergence / images.numel())

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unscaled latents, float32 `[B, z, H / f, H / f]` each."""
        config = self.config
        check_floating(
            "images",
            images,
            self.quant_conv.weight,
            "bytes become images in [-1, 1] by `images / 127.5 - 1`",
        )
        if (
            images.dim() != 4
            or images.shape[1] != config.in_channels
            or any(side % config.factor or not side for side in images.shape[2:])
        ):
            raise ValueError(
                f"expected images of shape [B, {config.in_channels}, H, W], H and W multiples of {config.factor}, "
                f"but got {tuple(images.shape)}"
            )
        mean, log_variance = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    @torch.no_grad()
    @check_kinds
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as scaled latents `[B, z, H / f, W / f]`, the means; errors are those of `forward`."""
        return self.moments(images)[0] * self.config.scaling

    @torch.no_grad()
    @check_kinds
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of scaled latents `[B, z, h, w]`, in any floating dtype.

        Raises:
            ValueError: another number of channels.
        """
        if latents.dim() != 4 or latents.shape[1] != self.config.z_channels:
            raise ValueError(
                f"expected latents of shape [B, {self.config.z_channels}, h, w] but got {tuple(latents.shape)}"
            )
        return self._decode(latents / self.config.scaling).float().clamp(-1, 1)

    def _decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))
        return out

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> KLConfig:
        """What a config.json of diffusers says.

        Raises:
            ValueError: it is of another class, or has settings that are not built.
        """
        if content.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"expected an AutoencoderKL but got {content.get('_class_name')!r}")
        widths = content.get("block_out_channels", [64])
        built = {"shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True, "act_fn": "silu"}
        built["mid_block_add_attention"] = True
        other = [name for name, value in built.items() if content.get(name, value) not in (value, 0.0)]
        if other or len(set(map(type, widths))) != 1 or any(width % widths[0] for width in widths):
            raise ValueError(f"its {', '.join(other) or 'block_out_channels'} are not built here")
        return KLConfig(
            in_channels=content.get("in_channels", 3),
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=content.get("layers_per_block", 1),
            norm_groups=content.get("norm_num_groups", 32),
            z_channels=content.get("latent_channels", 4),
            scaling=content.get("scaling_factor", 0.18215),
            # A default of the library that says nothing about the weights.
            image_size=256 if 256 % 2 ** (len(widths) - 1) == 0 else 2 ** (len(widths) - 1),
        )

    @classmethod
    def config_of(cls, state: Mapping[str, Tensor]) -> KLConfig:
        """The settings that the shapes of published weights tell; the scale is that of the published layout.

        Raises:
            ValueError: they are no weights of such an autoencoder.
        """
        ours = _renamed(state)
        try:
            levels = 1 + max(
                int(found[1]) for key in ours if (found := re.match(r"encoder\.down\.(\d+)\.", key))
            )
            channels, z = len(ours["encoder.conv_in.weight"]), ours["decoder.conv_in.weight"].shape[1]
            widths = [len(ours[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
            blocks = sum(f"encoder.down.0.block.{block}.conv1.weight" in ours for block in range(16))
        except (KeyError, ValueError) as error:
            raise ValueError("they are no weights of a KL autoencoder") from error
        published = kl_f16() if levels == 5 and z == 16 else kl_f8()
        return KLConfig(
            in_channels=ours["encoder.conv_in.weight"].shape[1],
            channels=channels,
            channel_mult=tuple(width // channels for width in widths),
            num_res_blocks=blocks,
            norm_groups=min(32, channels),
            z_channels=z,
            encoder_attention=any(".attn.0." in key for key in ours if key.startswith("encoder.down.")),
            scaling=published.scaling,
        )

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names; what only its training used is dropped."""
        return _renamed(state)


_DIFFUSERS_NAMES = (
    (r"^first_stage_model\.", ""),
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.(?:to_)?(q|k|v)(?:uery|ey|alue)?\.", r".attn_1.\1."),
    (r"\.attn_1\.(?:to_out\.0|proj_attn)\.", ".attn_1.proj_out."),
)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers and of the authors in ours: queries, keys and values are one convolution."""
    named: dict[str, Tensor] = {}
    diffusers = any(".up_blocks." in key for key in state)
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up_blocks.")})
    of_the_first_stage = any(key.startswith("first_stage_model.") for key in state)
    for key, value in state.items():
        if of_the_first_stage and not key.startswith("first_stage_model."):
            continue
        name = key
        for pattern, ours in _DIFFUSERS_NAMES:
            name = re.sub(pattern, ours, name)
        if diffusers:
            # They count the decoder's levels from coarse to fine.
            name = re.sub(
                r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name
            )
        if name.startswith("loss.") or name == "logvar":
            continue
        if re.search(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) and value.dim() == 2:
            value = value[:, :, None, None]
        named[name] = value
    for name in [name for name in named if re.search(r"attn(_1|\.\d+)\.q\.", name)]:
        parts = [named.pop(name.replace(".q.", f".{part}."), None) for part in "qkv"]
        if any(part is None for part in parts):
            raise ValueError(f"{name} has no keys or values beside it")
        named[name.replace(".q.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
    return named


@preset
def kl_tiny() -> KLConfig:
    """8x8 grey digits as 4x4 latents of 2 channels; trains on a CPU in a minute."""
    return KLConfig(
        in_channels=1,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        norm_groups=8,
        z_channels=2,
        scaling=1.0,
        image_size=8,
    )


@preset(
    weights=Published("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors", ("config.json",))
)
def kl_f8() -> KLConfig:
    """Latents of DiT and ACDiT: 8x8 pixels as 4 values; weights: stabilityai/sd-vae-ft-mse, or CompVis' kl-f8."""
    return KLConfig()


@preset
def kl_f16() -> KLConfig:
    """Latents of MAR: 16x16 pixels as 16 values; weights: kl16.ckpt."""
    return KLConfig(channel_mult=(1, 1, 2, 2, 4), z_channels=16, encoder_attention=True, scaling=0.2325)


def claim(*, quick: bool) -> Claim:
    """Held-out digits through latents of half as many values, with the pull and without it."""
    train, test = load_digits("train").images, load_digits("test").images[:300]
    pull, left, spread = 1e-2, {}, {}
    # Without the pull latents spread at once, and nothing else is asked of that model.
    lengths = {pull: (64, 16), 0.0: (40, 8)} if quick else dict.fromkeys((pull, 0.0), (600, 16))
    for weight, (count, batch) in lengths.items():
        torch.manual_seed(0)
        model = KLAutoencoder(replace(kl_tiny(), channels=8, norm_groups=4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, fused=True)
        for _ in steps(count, "training"):
            images = train[torch.randint(len(train), (batch,))]
            out = model(images)
            loss = F.mse_loss(out.reconstruction, images) + weight * out.kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            error = F.mse_loss(model(test).reconstruction, test)
            left[weight] = (error / F.mse_loss(train.mean(0).expand_as(test), test)).item()
            spread[weight] = model.encode(test).std().item()
    return Claim(
        (
            at_most("error of held-out digits, relative to the mean digit's", left[pull], 0.5),
            at_most("deviation of the latents with the pull", spread[pull], 1.3),
            at_least("deviation without it, relative to that", spread[0.0] / spread[pull], 1.5),
        )
    )
