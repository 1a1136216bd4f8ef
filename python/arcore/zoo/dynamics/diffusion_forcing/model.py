"""Diffusion Forcing: settings, network, presets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import preset
from arcore.masks import IntervalMask
from arcore.nn import DiTAttention, KVCache, PostNormBlock
from arcore.nn.checks import check_floating, check_ids, same_values
from arcore.nn.kinds import check_kinds
from arcore.schedules import Spacing, VPSchedule


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DiffusionForcingConfig:
    """Settings of `DiffusionForcing`. The defaults are those of the published transformers but for `causal`.

    Attributes:
        depth: transformer blocks.
        embed_dim: width C, a multiple of 4.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward network.
        num_classes: classes K of the data; 0 for data without classes.
        image_size: side of a frame; 1 for vectors such as positions of a robot.
        in_channels: channels of a frame.
        frames: of a sequence.
        frame_stack: consecutive frames that make one token; the text below calls a token a frame.
        causal: a frame sees itself and earlier ones only. The published planners see all frames.
        prediction: what the network predicts. `"x0"` suits few, wide tokens: noise has more dimensions than C.
        beta_schedule: growth of the noise, see `arcore.schedules.VPSchedule`.
        num_steps: diffusion steps T.
        stabilization: finished frames are read at time `stabilization` - 1; 1 to T.
        loss_weight: `"fused"` weighs the error of a frame by its signal and that of the frames before it, `"min_snr"`
            by its own, `"uniform"` not at all, see `arcore.objectives.fused_snr_weights`.
        snr_clip: largest ratio of signal to noise that those weights know.
        snr_decay: share of the signal that is left of a frame after one more frame of the data.
        class_drop: share of rows that are trained without their class, for guidance.

    Raises:
        ValueError: a setting is out of range, or frames do not fill the stacks.
    """

    depth: int
    embed_dim: int
    num_heads: int
    hidden_dim: int
    num_classes: int = 0
    image_size: int = 1
    in_channels: int = 2
    frames: int
    frame_stack: int = 1
    causal: bool = True
    prediction: Literal["x0", "v", "eps"] = "x0"
    beta_schedule: Literal["linear", "cosine", "sigmoid"] = "cosine"
    num_steps: int = 1000
    stabilization: int = 10
    loss_weight: Literal["fused", "min_snr", "uniform"] = "fused"
    snr_clip: float = 5.0
    snr_decay: float = 0.96
    class_drop: float = 0.1

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "embed_dim",
            "hidden_dim",
            "image_size",
            "in_channels",
            "frames",
            "frame_stack",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.frames % self.frame_stack:
            raise ValueError(
                f"expected frame_stack to divide the {self.frames} frames but got frame_stack={self.frame_stack}"
            )
        for name, right, what in (
            ("embed_dim", self.embed_dim % 4 == 0, "a multiple of 4"),
            ("num_classes", self.num_classes >= 0, "at least 0"),
            ("class_drop", 0 <= self.class_drop <= 1, "from 0 to 1"),
            ("stabilization", 1 <= self.stabilization <= self.num_steps, f"from 1 to {self.num_steps}"),
            ("prediction", self.prediction in ("x0", "v", "eps"), "x0, v or eps"),
            ("loss_weight", self.loss_weight in ("fused", "min_snr", "uniform"), "fused, min_snr or uniform"),
        ):
            if not right:
                raise ValueError(f"expected {name} to be {what} but got {getattr(self, name)!r}")

    @property
    def values(self) -> int:
        """Values P of a token."""
        return self.frame_stack * self.in_channels * self.image_size**2


class FrameCache(KVCache):
    """Keys and values of finished frames.

    Attributes:
        labels: int64 `[B]`, the class of each row; None before `DiffusionForcing.start`.
    """

    labels: Tensor | None = None

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """See `KVCache`."""
        super().select(rows)
        if self.labels is not None:
            self.labels = self.labels[torch.as_tensor(rows, dtype=torch.int64, device=self.labels.device)]


@check_kinds
class DiffusionForcing(nn.Module):
    """The transformer. A `FrameModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    official_entry = "state_dict"
    spacing: Spacing = "trailing_floor"
    mean: Tensor
    std: Tensor

    def __init__(self, config: DiffusionForcingConfig) -> None:
        super().__init__()
        self.config = config
        self.null_class = config.num_classes
        self.schedule = VPSchedule(config.beta_schedule, num_steps=config.num_steps)
        self.prediction = config.prediction
        self.cacheable = config.causal
        self.context_time, self.frames_at_once = config.stabilization - 1, 1
        self.num_frames = config.frames // config.frame_stack
        self.frame_shape = (config.values,)
        dim = config.embed_dim
        self.positions = _waves(torch.arange(self.num_frames, device="cpu"), dim)
        self.mask = _mask(self.num_frames, 0, config.causal)
        self.embed1 = nn.Linear(config.values + dim // 2 + config.num_classes, dim)
        self.embed2 = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.depth))
        self.head = nn.Linear(dim, config.values)
        # Of the data's channels; published weights bring theirs.
        self.register_buffer("mean", torch.zeros(config.in_channels))
        self.register_buffer("std", torch.ones(config.in_channels))

    @check_kinds
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What the network predicts of every frame.

        Args:
            x: noisy frames `[B, N, P]`, see `to_frames`; fewer than `num_frames` are the first ones.
            t: int64 time of each frame `[B, N]`.
            labels: int64 `[B]` in [0, num_classes]; num_classes is the null class.

        Returns:
            float32 `[B, N, P]`.

        Raises:
            TypeError: an argument has a wrong dtype.
            ValueError: shapes do not fit, or a label or a time is out of range.
        """
        return self._transform(x, t, labels, None, 0)

    def make_cache(self, batch: int) -> FrameCache:
        """An empty cache for all frames, like the weights."""
        config = self.config
        return FrameCache(
            num_layers=config.depth,
            batch=batch,
            num_heads=config.num_heads,
            max_length=self.num_frames,
            head_dim=config.embed_dim // config.num_heads,
            dtype=self.embed1.weight.dtype,
            device=self.embed1.weight.device,
        )

    def start(self, labels: Tensor, cache: FrameCache) -> None:
        """See `FrameModel`; the cache remembers the classes, which stand beside every frame.

        Raises:
            ValueError: the network is not causal, so that nothing can be cached, or the cache is not empty.
        """
        if not self.cacheable:
            raise ValueError("frames see later ones: to cache anything, use causal=True")
        if cache.length:
            raise ValueError(f"expected an empty cache but it holds {cache.length} frames")
        cache.labels = labels

    def denoise(self, x: Tensor, t: Tensor, cache: FrameCache, keep: int = 0) -> Tensor:
        """See `FrameModel`.

        Raises:
            TypeError, ValueError: as `forward` does, or `start` has not begun the cache, or `keep` is out of range.
        """
        if cache.labels is None:
            raise ValueError("expected a cache that `start` has begun")
        if not 0 <= keep <= x.shape[1]:
            raise ValueError(f"expected keep from 0 to {x.shape[1]} but got {keep}")
        return self._transform(x, t, cache.labels, cache, keep)

    def _transform(self, x: Tensor, t: Tensor, labels: Tensor, cache: KVCache | None, keep: int) -> Tensor:
        start, count = 0 if cache is None else cache.length, x.shape[1]
        if x.dim() != 3 or x.shape[2:] != self.frame_shape or not count <= self.num_frames - start:
            raise ValueError(
                f"expected frames of shape {('B', 'N', *self.frame_shape)}, N at most {self.num_frames - start}, "
                f"but got {tuple(x.shape)}"
            )
        if t.shape != x.shape[:2] or labels.shape != x.shape[:1]:
            raise ValueError(
                f"expected times of shape {tuple(x.shape[:2])} and labels of shape {tuple(x.shape[:1])} but got "
                f"{tuple(t.shape)} and {tuple(labels.shape)}"
            )
        check_floating("frames", x, self.embed1.weight, "scale them to deviation 1")
        self.schedule.check_times("t", t)
        side = [x, _waves(t, self.config.embed_dim // 2).to(x.dtype), self._classes(labels, x)]
        hidden = self.embed2(F.relu(self.embed1(torch.cat(side, dim=2))))
        hidden = hidden + self.positions[start : start + count].to(hidden.device, hidden.dtype)
        mask = self.mask if count == self.num_frames else _mask(count, start, self.config.causal)
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, mask=mask.to(x.device), cache=cache, layer=layer, commit=keep > 0)
        # Predictions of data need float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.head(hidden.to(self.head.weight.dtype))
        if cache is not None and keep:
            cache.truncate(start + keep)
        return out.float()

    def training_times(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Times to train on, int64 `[B, N]` on the weights' device, each frame's independent of the others."""
        return self.schedule.sample_times(
            batch, self.num_frames, device=self.mean.device, generator=generator
        )

    def _classes(self, labels: Tensor, x: Tensor) -> Tensor:
        """A one at the class, for every frame, `[B, N, K]`; nothing at all for the null class."""
        count = self.config.num_classes
        check_ids("class ids", labels, count + 1, f" ({count} means no class)")
        if self.training and count and self.config.class_drop > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.class_drop
            labels = torch.where(dropped, count, labels)
        hot = labels[:, None] == torch.arange(count, device=labels.device)
        return hot.to(x.dtype).unsqueeze(1).expand(-1, x.shape[1], -1)

    def to_frames(self, videos: Tensor) -> Tensor:
        """Videos `[B, frames, c, H, H]` as tokens `[B, N, P]` with mean 0 and deviation 1.

        Raises:
            ValueError: another shape than the config's, or frames that do not fill the stacks.
        """
        config = self.config
        frame = (config.in_channels, config.image_size, config.image_size)
        if videos.dim() != 5 or videos.shape[2:] != frame or videos.shape[1] % config.frame_stack:
            raise ValueError(
                f"expected videos of shape {('B', 'frames', *frame)}, frames a multiple of {config.frame_stack}, "
                f"but got {tuple(videos.shape)}"
            )
        scaled = (videos - self.mean[:, None, None]) / self.std[:, None, None]
        return scaled.reshape(len(videos), -1, config.values)

    def to_pixels(self, frames: Tensor) -> Tensor:
        """The inverse of `to_frames`, of any number of frames."""
        config = self.config
        videos = frames.reshape(len(frames), -1, config.in_channels, config.image_size, config.image_size)
        return videos * self.std[:, None, None] + self.mean[:, None, None]

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names; its noise schedule must be ours and is dropped.

        Raises:
            ValueError: it is not.
        """
        bars, ours = state.get("diffusion_model.alphas_cumprod"), self.schedule.alphas_cumprod
        if bars is not None and not same_values(bars, ours, rtol=1e-4, atol=1e-7):
            raise ValueError(
                f"its noise schedule is not {self.config.beta_schedule!r} with {len(ours)} steps; "
                "set beta_schedule and num_steps"
            )
        named = {}
        for key, value in state.items():
            for pattern, name in OFFICIAL_NAMES:
                key = re.sub(pattern, name, key)
            if not key.startswith("diffusion_model."):
                named[key] = value
        return named


OFFICIAL_NAMES = (
    (r"^data_(mean|std)$", r"\1"),
    (r"^diffusion_model\.model\.init_mlp\.0\.", "embed1."),
    (r"^diffusion_model\.model\.init_mlp\.2\.", "embed2."),
    (r"^diffusion_model\.model\.out\.", "head."),
    (r"^diffusion_model\.model\.transformer\.layers\.", "blocks."),
    (r"\.self_attn\.in_proj_", ".mixer.qkv."),
    (r"\.self_attn\.out_proj\.", ".mixer.proj."),
    (r"\.linear1\.", ".mlp.0."),
    (r"\.linear2\.", ".mlp.2."),
)


def _block(config: DiffusionForcingConfig) -> PostNormBlock:
    """With the initial weights of `torch.nn.TransformerEncoderLayer`."""
    dim = config.embed_dim
    attention = DiTAttention(dim, config.num_heads)
    nn.init.xavier_uniform_(attention.qkv.weight)
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.proj.bias)
    mlp = nn.Sequential(nn.Linear(dim, config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, dim))
    return PostNormBlock(dim, mixer=attention, mlp=mlp)


def _waves(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of places `[...]`, wavelengths over 2 pi from 1 to 10000: float32 `[..., dim]`."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=places.device) / max(half - 1, 1)
    angles = places.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=256)
def _mask(count: int, start: int, causal: bool) -> IntervalMask:
    """`count` frames after `start` cached ones."""
    return masks.causal(count, start) if causal else masks.full(count, count)


@preset
def diffusion_forcing_tiny() -> DiffusionForcingConfig:
    """8 frames of 16x16 pixels with a moving digit, 8 tokens; trains on a CPU in two minutes."""
    return DiffusionForcingConfig(
        depth=4,
        embed_dim=128,
        num_heads=4,
        hidden_dim=512,
        num_classes=10,
        image_size=16,
        in_channels=1,
        frames=8,
    )


def _maze(episode: int) -> DiffusionForcingConfig:
    return DiffusionForcingConfig(
        depth=12,
        embed_dim=128,
        num_heads=4,
        hidden_dim=512,
        frames=episode + 10,
        frame_stack=10,
        causal=False,
        beta_schedule="linear",
        loss_weight="min_snr",
    )


@preset
def diffusion_forcing_maze2d_medium() -> DiffusionForcingConfig:
    """Positions in the medium maze of D4RL, 600 after the first, 10 per token; weights: maze2d_medium_x.ckpt."""
    return _maze(600)


@preset
def diffusion_forcing_maze2d_large() -> DiffusionForcingConfig:
    """Positions in the large maze of D4RL, 800 after the first, 10 per token; weights: maze2d_large_x.ckpt."""
    return _maze(800)
