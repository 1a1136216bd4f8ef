"""TiTok with continuous tokens: an image as a short sequence without places (Yu et al., arXiv:2406.07550).

A transformer reads the patches of an image and K learned tokens, and gives each of those a mean and a variance; the
decoder's transformer reads K latent tokens and a mask token for every patch, and convolutions make pixels of what
becomes of those. This is the variant by which AR-Diffusion (arXiv:2503.07418) codes frames: continuous tokens of
length 1 in place of a codebook.

Of the released code two turns are kept because weights depend on them: the K outputs of the encoder are laid out as if
channels came first before the last linear layer, and a block of the pixel decoder that changes its width adds its own
output once more through a 1x1 convolution in place of its input.

Legend: B images, K tokens, c values per token, D width, p patch side, G = side / p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import System, preset
from arcore.catalog.claims import Claim, at_least, at_most, shaken
from arcore.data import load_digits
from arcore.nn.checks import check_floating

SYSTEM = System(
    name="titok_kl",
    title="TiTok",
    paper="arXiv:2406.07550",
    topic="tokenizers",
    kind="model",
    model="TiTokKL",
    recipe="autoencoder",
    summary="Autoencoder of images as a short sequence of continuous tokens, those of AR-Diffusion's frames.",
    claim="Tokens have no places: each token changes pixels all over the image.",
    checked_on="random weights",
)

LOG_VARIANCE = (-30.0, 20.0)
HEAD_DIM = 64


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


class TiTokKLOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        reconstruction: `[B, in_channels, H, H]`, not clamped.
        kl: scalar, divergence of the tokens from a standard normal distribution, per value of the image.
    """

    reconstruction: Tensor
    kl: Tensor


class _Block(nn.Module):
    """Pre-norm transformer block with torch's own attention, whose names the published weights have."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.attn.num_heads
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.attn.out_proj(mixed)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class _Trunk(nn.Module):
    """What encoder and decoder have in common: positions, blocks and norms."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.embed_dim**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, dim))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.side**2 + 1, dim))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(config.num_tokens, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = nn.ModuleList(_Block(dim, config.num_heads) for _ in range(config.depth))

    def trunk(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """`[B, G * G, D]` and `[B, K, D]` through the blocks, the class token in front."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        image = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([image, tokens + self.latent_token_positional_embedding], dim=1))
        for block in self.transformer:
            x = block(x)
        return x


class TiTokEncoder(_Trunk):
    """Images to two numbers per value of a token."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__(config)
        dim, patch = config.embed_dim, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.conv_out = nn.Conv2d(dim, 2 * config.token_dim, 1)

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        """`[B, C, H, H]` and `[K, D]` to `[B, 2 c, 1, K]`."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        count = len(queries)
        read = self.ln_post(self.trunk(patches, queries.expand(len(images), -1, -1))[:, -count:])
        # Without a transposition, as the released weights were trained.
        out: Tensor = self.conv_out(read.reshape(len(images), -1, count, 1))
        return out.reshape(len(images), -1, 1, count)


class TiTokDecoder(_Trunk):
    """Tokens to logits of soft codes at every patch."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.decoder_embed = nn.Linear(config.token_dim, dim)
        self.mask_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))
        self.ffn = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1), nn.Tanh(), nn.Conv2d(2 * dim, config.code_dim, 1)
        )
        self.side = config.side

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, c, 1, K]` to `[B, code_dim, G, G]`."""
        tokens = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        masked = self.mask_token.expand(len(latents), self.side**2, -1)
        x = self.ln_post(self.trunk(masked, tokens)[:, 1 : 1 + self.side**2])
        out: Tensor = self.ffn(x.transpose(1, 2).unflatten(2, (self.side, self.side)))
        return out


class _ResBlock(nn.Module):
    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.nin_shortcut = None if before == after else nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(h))
        return out


class _Level(nn.Module):
    def __init__(self, before: int, after: int, blocks: int, groups: int, *, up: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResBlock(before if place == 0 else after, after, groups) for place in range(blocks)
        )
        self.upsample_conv = nn.Conv2d(after, after, 3, padding=1) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        out: Tensor = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class PixelDecoder(nn.Module):
    """Convolutions from patches to pixels, without attention."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(
            _ResBlock(widths[-1], widths[-1], groups) for _ in range(config.num_res_blocks)
        )
        self.up = nn.ModuleList(
            _Level(widths[min(level + 1, last)], width, config.num_res_blocks, groups, up=level > 0)
            for level, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, latent_dim, G, G]` to `[B, in_channels, G p, G p]`."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


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
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as tokens `[B, K, c]`, the means; errors are those of `forward`."""
        return self.moments(images)[0]

    @torch.no_grad()
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


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """One token after the other comes from another image; patches that change are counted. And tokens change places."""
    torch.manual_seed(0)
    shares: list[float] = []
    moved, size = 0.0, 0.0
    for _ in range(2 if quick else 10):
        model = shaken(TiTokKL(titok_kl_tiny())).eval()
        images = load_digits("test").images[:20]
        tokens = model.encode(images)
        for place in range(tokens.shape[1]):
            mixed = tokens.clone()
            mixed[:, place] = tokens.roll(1, 0)[:, place]
            shares.append(_share(model.decode(mixed) - model.decode(tokens)))
        order = torch.randperm(tokens.shape[1])
        whole = model.decode(tokens)
        positions = model.decoder.latent_token_positional_embedding
        positions.copy_(positions[order].clone())
        moved = max(moved, (model.decode(tokens[:, order]) - whole).abs().max().item())
        size = whole.std().item()
    return Claim(
        (
            # Of a grid of 8 places each would have an eighth.
            at_least("share of patches that a token changes, mean", sum(shares) / len(shares), 0.25),
            at_most("change where tokens move with their positions", moved, 1e-5),
            at_least("standard deviation of the pixels", size, 0.05),
        )
    )


def _share(change: Tensor) -> float:
    """Share of 2x2 patches whose mean change is at least a tenth of the largest."""
    patches = F.avg_pool2d(change.abs().mean((0, 1))[None, None], 2)
    return (patches > 0.1 * patches.max()).float().mean().item()
