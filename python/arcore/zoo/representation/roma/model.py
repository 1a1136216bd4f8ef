"""RoMA: settings, network, presets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import preset
from arcore.masks import IntervalMask
from arcore.nn import (
    MLP,
    CrossAttention,
    MambaMixer,
    PatchEmbed,
    PreNormBlock,
    StateCache,
    SwiGLU,
    init_mamba_encoder,
    sincos_positions,
)
from arcore.nn.checks import check_floating, same_values
from arcore.nn.kinds import check_kinds
from arcore.nn.patches import cluster_order, inverse_order, patchify, standardized, unpatchify

# Decoder blocks, and depths of the encoder that they read.
TAPS = 4
HEAD_DIM = 64


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RoMAConfig:
    """Settings of `RoMA`. The defaults are those of the published models.

    Attributes:
        embed_dim: width C of the encoder, a multiple of 4.
        depth: layers of the encoder, a multiple of 6.
        decoder_dim: width D of the decoder, a multiple of 64, the width of a head.
        image_size: pixels per side; a multiple of `cluster * patch_size` and of `block * patch_size`.
        patch_size: pixels per side p of a patch.
        in_channels: of the image.
        cluster: patches per side s of a cluster.
        block: patches per side of the larger blocks in the loss.
        d_state: states per channel of the scan.
        official_quirks: mark patches as the released code does, and let `RoMATask` take its form of the loss: the
            window's corner is divided by the patch size twice, row and column are swapped, and of its patches the
            diagonal is marked.

    Raises:
        ValueError: a size does not fit.
    """

    embed_dim: int
    depth: int = 12
    decoder_dim: int = 512
    image_size: int = 192
    patch_size: int = 16
    in_channels: int = 3
    cluster: int = 4
    block: int = 6
    d_state: int = 16
    official_quirks: bool = False

    def __post_init__(self) -> None:
        for name, unit in (("embed_dim", 4), ("depth", 6), ("decoder_dim", HEAD_DIM)):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"expected {name} to be a multiple of {unit} but got {value}")
        for name in ("image_size", "patch_size", "in_channels", "cluster", "d_state"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        for name in ("cluster", "block"):
            side = getattr(self, name) * self.patch_size
            if self.block < self.cluster or self.image_size % side or self.image_size == side:
                raise ValueError(
                    f"expected several {name}s of {getattr(self, name)} x {getattr(self, name)} patches to tile the "
                    f"image, and block >= cluster, but got image_size={self.image_size}, "
                    f"patch_size={self.patch_size}, cluster={self.cluster}, block={self.block}"
                )

    @property
    def side(self) -> int:
        """Patches per side G of the image."""
        return self.image_size // self.patch_size

    @property
    def patch_values(self) -> int:
        """Values P of a patch."""
        return self.patch_size**2 * self.in_channels


@dataclass(frozen=True)
class RoMACache:
    """What is known of the clusters so far.

    Attributes:
        states: the encoder's state.
        features: `[B, L, 4 D]`, of which the first `states.length` tokens are filled.
    """

    states: StateCache
    features: Tensor


class RoMADecoderBlock(nn.Module):
    """Cross-attention to features and a feed-forward network; no self-attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, dim // HEAD_DIM)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, approximate="none")

    def forward(self, x: Tensor, features: Tensor, mask: IntervalMask) -> Tensor:
        x = x + self.attn(self.norm_q(x), self.norm_kv(features), mask)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


@check_kinds
class RoMA(nn.Module):
    """Encoder and decoder of the pretraining.

    Args:
        config: settings.
    """

    official_entry = "model"
    pos_embed: Tensor
    dec_pos_embed: Tensor
    layers: Any
    tap_norms: Any

    def __init__(self, config: RoMAConfig) -> None:
        super().__init__()
        self.config = config
        dim, width, first = config.embed_dim, config.decoder_dim, config.cluster**2
        length = config.side**2 - first
        self.taps = [config.depth // 2 + tap * config.depth // 6 for tap in range(TAPS)]
        self.mask = masks.block_causal([first] * (length // first))
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.register_buffer("pos_embed", sincos_positions(config.side, dim))
        self.angle_embed = nn.Parameter(torch.empty(1, 1, dim))
        self.layers = nn.ModuleList(
            PreNormBlock(
                dim,
                mixer=MambaMixer(dim, d_state=config.d_state, expand=1),
                mlp=SwiGLU(dim, dim * 8 // 3),
            )
            for _ in range(config.depth)
        )
        self.tap_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(TAPS))
        self.enc2dec = nn.Linear(TAPS * dim, TAPS * width)
        self.ar_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("dec_pos_embed", sincos_positions(config.side, width))
        self.dec_blocks = nn.ModuleList(RoMADecoderBlock(width) for _ in range(TAPS))
        self.ar_norm = nn.LayerNorm(width)
        self.ar_pred = nn.Linear(width, config.patch_values)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        init_mamba_encoder(self.patch_embed, self.layers)
        nn.init.trunc_normal_(self.ar_token, std=0.02)
        nn.init.trunc_normal_(self.angle_embed, std=0.02)
        for module in self.dec_blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        self.enc2dec.bias.zero_()
        self.ar_pred.bias.zero_()

    @check_kinds
    def forward(self, images: Tensor, windows: Tensor | None = None) -> Tensor:
        """Predict each cluster from those before it.

        Args:
            images: `[B, channels, image_size, image_size]`; the last cluster is not read.
            windows: int64 `[B, 3]`, top, left and side length in patches of the window that was rotated in each image
                (side length 0: none); None: in no image.

        Returns:
            float32 `[B, L, P]`: standardized pixels of clusters 1, 2, ..., in cluster order.

        Raises:
            TypeError: images have a wrong dtype.
            ValueError: shapes do not fit.
        """
        size = self.config.image_size
        self._check(images, size)
        x = self.patch_embed(images) + self.pos_embed
        x = x + self._marked(windows, len(images), x)
        order = self._order(x.device)
        x = x[:, order[: self.mask.nk]]  # [B, L, C]
        features = self._encode(x)
        return self._decode(features, order[-self.mask.nq :], self.mask.to(x.device))

    def make_cache(self, batch: int) -> RoMACache:
        """An empty cache for `batch` rows, in the dtype and on the device of the model."""
        mixer = self.layers[0].mixer
        like: Any = {"dtype": self.ar_token.dtype, "device": self.ar_token.device}
        states = StateCache(
            num_layers=self.config.depth,
            batch=batch,
            conv_shape=mixer.conv_shape,
            state_shape=mixer.state_shape,
            **like,
        )
        features = torch.empty(batch, self.mask.nk, TAPS * self.config.decoder_dim, **like)
        return RoMACache(states, features)

    @torch.no_grad()
    def predict_next(self, cluster: Tensor, cache: RoMACache, windows: Tensor | None = None) -> Tensor:
        """Read one cluster and predict the next; the states of earlier clusters are in the cache.

        Args:
            cluster: `[B, channels, s * p, s * p]`, the pixels of the next cluster in raster order.
            cache: from `make_cache(B)`; moves on.
            windows: as for `forward`.

        Returns:
            float32 `[B, s * s, P]`, the standardized pixels of the cluster after it.

        Raises:
            TypeError, ValueError: as `forward` does, or the last predictable cluster has been read.
        """
        tokens, start = self.config.cluster**2, cache.states.length
        if start == self.mask.nk:
            raise ValueError(f"expected at most {start // tokens} clusters: the last one predicts nothing")
        self._check(cluster, self.config.cluster * self.config.patch_size)
        order = self._order(cluster.device)
        here = order[start : start + tokens]
        x = self.patch_embed(cluster) + self.pos_embed[:, here]
        marked = self._marked(windows, len(cluster), x)
        stop = start + tokens
        cache.features[:, start:stop] = self._encode(x + marked[:, here], cache.states)
        cache.states.advance(tokens)
        mask = masks.full(tokens, stop).to(x.device)
        return self._decode(cache.features[:, :stop], order[stop : stop + tokens], mask)

    def reconstruct(self, images: Tensor, predictions: Tensor) -> Tensor:
        """Predictions as pictures: each patch with the brightness and contrast of the true one.

        Args:
            images: the images that were to be predicted, `[B, channels, image_size, image_size]`.
            predictions: what `forward` returned.

        Returns:
            Images of the same shape; the first cluster, which nothing predicts, is that of `images`.
        """
        patches = patchify(images, self.config.patch_size)
        _, mean, std = standardized(patches)
        order = self._order(images.device)
        first = self.config.cluster**2
        later = order[first:]
        drawn = torch.cat([patches[:, order[:first]], predictions * std[:, later] + mean[:, later]], dim=1)
        return unpatchify(drawn[:, inverse_order(order)], self.config.patch_size)

    def _order(self, device: torch.device) -> Tensor:
        return cluster_order(self.config.side, self.config.cluster, device)

    def _marked(self, windows: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """The angle embedding at the patches of the windows, 0 elsewhere, `[B, N, C]` in raster order."""
        side = self.config.side
        if windows is None:
            return like.new_zeros(1, side * side, 1)
        if windows.shape != (batch, 3):
            raise ValueError(f"expected windows of shape {(batch, 3)} but got {tuple(windows.shape)}")
        place = torch.arange(side, device=like.device)
        top, left, size = windows[:, :, None].unbind(1)  # [B, 1]
        if self.config.official_quirks:
            top, left = left // self.config.patch_size, top // self.config.patch_size
        rows = (top <= place) & (place < top + size)
        columns = (left <= place) & (place < left + size)
        inside = rows[:, :, None] & columns[:, None, :]  # [B, G, G]
        if self.config.official_quirks:
            inside = inside & (place[:, None] - top[:, :, None] == place - left[:, :, None])
        return inside.flatten(1).unsqueeze(-1) * self.angle_embed.to(like.dtype)

    def _encode(self, x: Tensor, states: StateCache | None = None) -> Tensor:
        """`[B, n, C]` to the features of all depths, `[B, n, 4 D]`."""
        tapped: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x = layer(x) if states is None else layer(x, cache=states, layer=index)
            if index + 1 in self.taps:
                tapped.append(self.tap_norms[len(tapped)](x))
        features: Tensor = self.enc2dec(torch.cat(tapped, dim=-1))
        return features

    def _decode(self, features: Tensor, places: Tensor, mask: IntervalMask) -> Tensor:
        """Predictions of the patches at raster positions `places`."""
        x = (self.ar_token + self.dec_pos_embed[:, places]).expand(len(features), -1, -1)
        # Block j reads every fourth channel from j on.
        for block, part in zip(self.dec_blocks, features.unflatten(2, (-1, TAPS)).unbind(-1), strict=True):
            x = block(x, part, mask)
        out: Tensor = self.ar_pred(self.ar_norm(x))
        return out.float()

    def _check(self, images: Tensor, size: int) -> None:
        expected = (self.config.in_channels, size, size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images of shape {('B', *expected)} but got {tuple(images.shape)}")
        check_floating("images", images, self.ar_token, "scale them to [-1, 1]")

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names.

        Raises:
            ValueError: its mask or its positions are not ours.
        """
        state = dict(state)
        mask = state.pop("mask", None)
        if mask is not None and not torch.equal(mask == 0, self.mask.to_bool()[0, 0]):
            raise ValueError("they are for another mask than clusters of 16 patches that see earlier ones")
        for name in ("pos_embed", "dec_pos_embed"):
            dim = self.config.embed_dim if name == "pos_embed" else self.config.decoder_dim
            ours = sincos_positions(self.config.side, dim)
            if name in state and not same_values(state[name], ours, rtol=1e-5, atol=1e-4):
                raise ValueError(
                    f"{name} is not the table of {self.config.side} x {self.config.side} positions"
                )
        renamed = {}
        for key, value in state.items():
            for pattern, name in _OFFICIAL_NAMES:
                key = re.sub(pattern, name, key)
            renamed[key] = value
        return renamed


_OFFICIAL_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^norm_([1-4])\.", lambda match: f"tap_norms.{int(match[1]) - 1}."),
    (r"^dec_block\.(\d+)\.attn2\.", r"dec_blocks.\1.attn."),
    (r"^dec_block\.(\d+)\.norm2_1\.", r"dec_blocks.\1.norm_q."),
    (r"^dec_block\.(\d+)\.norm2_2\.", r"dec_blocks.\1.norm_kv."),
    (r"^dec_block\.(\d+)\.norm2\.", r"dec_blocks.\1.norm_mlp."),
    (r"^dec_block\.(\d+)\.mlp\.", r"dec_blocks.\1.mlp."),
)


@preset
def roma_tiny() -> RoMAConfig:
    """48 x 48 grey pixels in 12 x 12 patches of 4; trains on a CPU in a minute."""
    return RoMAConfig(embed_dim=64, depth=6, decoder_dim=64, image_size=48, patch_size=4, in_channels=1)


@preset
def arm_tiny_pz16() -> RoMAConfig:
    """192 pixels, encoder of width 192 and depth 12; weights: checkpoint-*.pth."""
    return RoMAConfig(embed_dim=192)


@preset
def arm_small_pz16() -> RoMAConfig:
    """192 pixels, encoder of width 384 and depth 12; weights: checkpoint-*.pth."""
    return RoMAConfig(embed_dim=384)


@preset
def arm_base_pz16() -> RoMAConfig:
    """192 pixels, encoder of width 768 and depth 12; weights: checkpoint-*.pth."""
    return RoMAConfig(embed_dim=768)


@preset
def arm_large_pz16() -> RoMAConfig:
    """192 pixels, encoder of width 1024 and depth 24; weights: checkpoint-*.pth."""
    return RoMAConfig(embed_dim=1024, depth=24)


@preset
def arm_huge_pz16() -> RoMAConfig:
    """192 pixels, encoder of width 1536 and depth 24; weights: checkpoint-*.pth."""
    return RoMAConfig(embed_dim=1536, depth=24)
