"""VQ-16: images as one map of codes, the tokenizer of LlamaGen (Sun et al., arXiv:2406.06525, section 3.1).

An encoder shrinks the image 16 times (8 times for VQ-8), a 1x1 convolution makes vectors of 8 channels of it, and each
becomes its nearest code. Vectors and codes have length 1, so the nearest code is the one with the largest cosine.

Differs from its neighbour, `msvq`, in that an image is a single map: what reads it goes row by row. Encoder and decoder
are the same, the published names of their parameters are not: `from_official` renames them.

Left out: the discriminator and the perceptual loss of the published training. Restarting dead codes is ours.

Legend: B images, S side of the code map, V codes, c width of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.nn.checks import check_floating, check_ids
from arcore.nn.codebook import record_use
from arcore.nn.conv import ConvDecoder, ConvEncoder
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="vq16",
    title="VQ-16",
    paper="arXiv:2406.06525",
    paper_title="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
    topic="tokenizers",
    kind="model",
    model="ImageVQ",
    recipe="tokenizer",
    summary="Image tokenizer that codes an image as one map of codes of length 1.",
    claim="Published names load strictly; trained for seconds, it gives held-out digits back and uses its codes.",
    checked_on="real data",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ImageVQConfig:
    """Settings of `ImageVQ`. The defaults are those of the published VQ-16.

    Attributes:
        image_size: pixels of an image's side.
        in_channels: channels of the image.
        channels: width of the first level of encoder and decoder.
        channel_mult: width of each level as a multiple of `channels`; each level but the last halves the resolution.
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        norm_groups: groups of the group norms.
        z_channels: width of the latent before it is narrowed to a code's.
        code_channels: width c of a code.
        vocab_size: number of codes V.
        beta: weight of the commitment term of the loss.
        restart_below: while training, a code that is used less than this fraction of the average is moved onto a
            random vector of the batch. 0 switches it off.

    Raises:
        ValueError: the numbers do not fit together.
    """

    image_size: int = 256
    in_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    z_channels: int = 256
    code_channels: int = 8
    vocab_size: int = 16384
    beta: float = 0.25
    restart_below: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "in_channels",
            "channels",
            "num_res_blocks",
            "z_channels",
            "code_channels",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if not self.channel_mult or min(self.channel_mult) < 1 or self.vocab_size < 1:
            raise ValueError(
                f"expected channel_mult and vocab_size of positive numbers but got {self.channel_mult} and "
                f"{self.vocab_size}"
            )
        widths = {self.channels * mult for mult in (1, *self.channel_mult)}
        if self.norm_groups < 1 or any(width % self.norm_groups for width in widths):
            raise ValueError(
                f"expected norm_groups to divide the widths {sorted(widths)} but got {self.norm_groups}"
            )
        if self.image_size % self.factor:
            raise ValueError(
                f"expected image_size to be a multiple of {self.factor}, which {len(self.channel_mult) - 1} "
                f"halvings need, but got {self.image_size}"
            )
        if not self.beta >= 0 or not 0 <= self.restart_below < 1:
            raise ValueError(
                f"expected beta >= 0 and restart_below in [0, 1) but got {self.beta} and {self.restart_below}"
            )

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def side(self) -> int:
        """Codes S along a side."""
        return self.image_size // self.factor

    def for_images(self, image_size: int, channels: int) -> dict[str, Any]:
        """Fields that make a tokenizer like this one for images of another size.

        Fewer halvings while the map would have less than 4 codes per side; a size that they do not divide is rounded
        down.

        Args:
            image_size: pixels per side.
            channels: of an image.

        Raises:
            ValueError: the images are too small.
        """
        if image_size < 4:
            raise ValueError(f"expected images of at least 4 x 4 pixels but got {image_size} x {image_size}")
        halvings = len(self.channel_mult) - 1
        while halvings and image_size >> halvings < 4:
            halvings -= 1
        return {
            "in_channels": channels,
            "image_size": image_size >> halvings << halvings,
            "channel_mult": self.channel_mult[: halvings + 1],
        }


class UnitQuantizer(nn.Module):
    """Vectors to the nearest of V codes, all of length 1; works in float32 under autocast too.

    `use` `[1, V]` is a running mean of how often each code is used per batch.
    """

    def __init__(self, config: ImageVQConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.code_channels)
        if not self.embedding.weight.is_meta:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.use: Tensor
        self.register_buffer("use", torch.zeros(1, config.vocab_size))

    def codebook(self) -> Tensor:
        """The codes, float32 `[V, c]`, of length 1."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the code nearest to each vector of length 1; `[..., c]` to int64 `[...]`."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() @ self.codebook().t()).argmax(-1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise with a straight-through gradient.

        Args:
            latent: `[B, c, S, S]`.

        Returns:
            The codes' vectors `[B, c, S, S]`, whose gradient goes to the normalised latent unchanged; the loss,
            mse(codes, sg latent) + beta mse(sg codes, latent); and the codes, int64 `[B, S * S]`.
        """
        dtype, side = latent.dtype, latent.shape[-1]
        with torch.autocast(latent.device.type, enabled=False):
            vectors = F.normalize(latent.float().flatten(2).transpose(1, 2), dim=-1)  # [B, S * S, c]
            indices = self.nearest(vectors)
            # Of the gathered codes: a restart writes into the table, which autograd must not need any more.
            codes = F.normalize(self.embedding(indices).float(), dim=-1)
            loss = F.mse_loss(codes, vectors.detach()) + self.config.beta * F.mse_loss(
                codes.detach(), vectors
            )
            if self.training:
                record_use(
                    self.use,
                    self.embedding.weight,
                    [indices],
                    [vectors],
                    restart_below=self.config.restart_below,
                )
            through = vectors + (codes - vectors).detach()
            return through.transpose(1, 2).unflatten(2, (side, side)).to(dtype), loss, indices


@dataclass(frozen=True)
class ImageVQOutput:
    """What a training step needs.

    Attributes:
        reconstruction: `[B, in_channels, H, W]`, not clamped.
        vq_loss: scalar; add it to the reconstruction loss.
        indices: codes, int64 `[B, S * S]`, row by row.
    """

    reconstruction: Tensor
    vq_loss: Tensor
    indices: Tensor


@check_kinds
class ImageVQ(nn.Module):
    """Encoder, quantiser and decoder.

    Images are float `[B, in_channels, H, W]` in [-1, 1], H = W = `config.image_size`.

    Args:
        config: settings.
    """

    # Codes that restart are written in forward, into what would be a gathered copy.
    shardable = False

    official_entry = "model"
    # How often codes were used in training: a file without it is as good.
    statistics = ("quantize.use",)

    def __init__(self, config: ImageVQConfig) -> None:
        super().__init__()
        self.config = config
        layout = (config.in_channels, config.channels, config.channel_mult, config.num_res_blocks)
        self.encoder = ConvEncoder(*layout, config.z_channels, config.norm_groups)
        self.decoder = ConvDecoder(*layout, config.z_channels, config.norm_groups)
        self.quantize = UnitQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.z_channels, 1)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def side(self) -> int:
        """Codes along a side."""
        return self.config.side

    @property
    def image_size(self) -> int:
        """Pixels of an image's side."""
        return self.config.image_size

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    def codebook(self) -> Tensor:
        """The codes' vectors, float32 `[V, c]`, of length 1."""
        return self.quantize.codebook()

    @check_kinds
    def forward(self, images: Tensor) -> ImageVQOutput:
        """Encode, quantise, decode.

        While training this also updates the running use of codes and restarts dead ones (see `restart_below`), with
        draws from torch's global generator.

        Raises:
            TypeError, ValueError: the images have another dtype or shape than the tokenizer takes.
        """
        latent, loss, indices = self.quantize(self._latent(images))
        return ImageVQOutput(self.decoder(self.post_quant_conv(latent)), loss, indices)

    @torch.no_grad()
    @check_kinds
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images, int64 `[B, S * S]`, row by row. Errors: those of `forward`."""
        latent = self._latent(images).float().flatten(2).transpose(1, 2)
        return self.quantize.nearest(F.normalize(latent, dim=-1))

    @check_kinds
    def decode(self, indices: Tensor) -> Tensor:
        """Images of codes int64 `[B, S * S]`, clamped to [-1, 1].

        Raises:
            TypeError, ValueError: codes of another dtype, shape or range.
        """
        if indices.dim() != 2 or indices.shape[1] != self.side**2:
            raise ValueError(f"expected codes of shape [B, {self.side**2}] but got {tuple(indices.shape)}")
        check_ids("codes", indices, self.vocab_size)
        return self.decode_vectors(self.codebook()[indices])

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Images of vectors of codes, `[B, S * S, c]`, clamped to [-1, 1].

        Raises:
            ValueError: the vectors have another shape.
        """
        if vectors.dim() != 3 or vectors.shape[1:] != (self.side**2, self.config.code_channels):
            raise ValueError(
                f"expected vectors of shape [B, {self.side**2}, {self.config.code_channels}] but got "
                f"{tuple(vectors.shape)}"
            )
        latent = vectors.transpose(1, 2).unflatten(2, (self.side, self.side))
        out: Tensor = self.decoder(self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype)))
        return out.clamp(-1, 1)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released files (`vq_ds16_c2i.pt`) under our names."""
        left = {key: value for key, value in state.items() if key != "quantize.codebook_used"}
        last = len(self.config.channel_mult) - 1
        ours: dict[str, Tensor] = {}
        for key, value in left.items():
            name = key.replace(".mid.0.", ".mid.block_1.").replace(".mid.1.", ".mid.attn_1.")
            name = name.replace(".mid.2.", ".mid.block_2.")
            part, _, rest = name.partition(".conv_blocks.")
            if rest:
                number, _, rest = rest.partition(".")
                if not number.isdecimal():
                    return left
                rest = rest.replace("res.", "block.", 1) if rest.startswith("res.") else rest
                # The published decoder lists its levels from coarse to fine.
                level = int(number) if part == "encoder" else last - int(number)
                name = f"{part}.{'down' if part == 'encoder' else 'up'}.{level}.{rest}"
            ours[name] = value
        for name in [name for name in ours if name.endswith((".q.weight", ".q.bias"))]:
            three = [name.replace(".q.", f".{letter}.") for letter in "qkv"]
            if all(one in ours for one in three):
                ours[name.replace(".q.", ".qkv.")] = torch.cat([ours.pop(one) for one in three])
        return ours

    def _latent(self, images: Tensor) -> Tensor:
        size, channels = self.config.image_size, self.config.in_channels
        hint = "bytes become images in [-1, 1] by `images / 127.5 - 1`"
        check_floating("images", images, self.quant_conv.weight, hint)
        if images.dim() != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"expected images of shape [B, {channels}, {size}, {size}] but got {tuple(images.shape)}"
            )
        out: Tensor = self.quant_conv(self.encoder(images))
        return out


@preset
def vq16_tiny() -> ImageVQConfig:
    """28x28 grey images as 7x7 maps of 256 codes; trains on a CPU in a minute."""
    return ImageVQConfig(
        image_size=28,
        in_channels=1,
        channels=8,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        norm_groups=4,
        z_channels=32,
        vocab_size=256,
        restart_below=0.03,
    )


@preset(weights=Published("FoundationVision/LlamaGen", "vq_ds16_c2i.pt"))
def vq16_ds16() -> ImageVQConfig:
    """72 M parameters, 256x256 pixels as 16x16 codes; weights: vq_ds16_c2i.pt, vq_ds16_t2i.pt."""
    return ImageVQConfig()


@preset(weights=Published("FoundationVision/LlamaGen", "vq_ds8_c2i.pt"))
def vq16_ds8() -> ImageVQConfig:
    """70 M parameters, 256x256 pixels as 32x32 codes; weights: vq_ds8_c2i.pt."""
    return ImageVQConfig(channel_mult=(1, 2, 2, 4))


def claim(*, quick: bool) -> Claim:
    """A tokenizer of small digits, trained for seconds, on held-out ones; names of the published layout."""
    from arcore.data import load_digits

    train, held_out = load_digits("train").images, load_digits("test").images
    model = ImageVQ(
        ImageVQConfig(
            image_size=8,
            in_channels=1,
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            norm_groups=2,
            z_channels=16,
            vocab_size=64,
            restart_below=0.03,
        )
    )
    count, batch = (40, 16) if quick else (600, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for _ in steps(count, "training on digits"):
        images = train[torch.randint(len(train), (batch,))]
        out = model(images)
        loss = F.mse_loss(out.reconstruction, images) + out.vq_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        codes = model.encode(held_out)
        error = F.mse_loss(model.decode(codes), held_out) / held_out.var()
        lengths = (model.codebook().norm(dim=-1) - 1).abs().max()
    with torch.device("meta"):
        published = ImageVQ(ImageVQConfig())
    millions = sum(p.numel() for p in published.parameters()) / 1e6
    return Claim(
        (
            at_most(
                "squared error of held-out digits, relative to their variance", error, 0.6 if quick else 0.15
            ),
            at_least("codes in use, of 64", len(codes.unique()), 32),
            at_most("error of the codes' length 1", lengths, 1e-6),
            equals("parameters of the published size in millions", millions, 71.88, tolerance=0.01),
        )
    )
