"""Distilled Decoding 2: scores, networks, losses, preset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn.causal import CausalDecoder
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.zoo.raster.llamagen import LlamaGen, LlamaGenConfig

# Earliest time: at 0 a code is its own score.
T_MIN = 0.02
_TIMES = 16


def mean_code(x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor) -> Tensor:
    """Mean of the code q given x = (1 - t) q + t e, e standard normal.

    Args:
        x: `[..., c]`.
        t: `[..., 1]` in (0, 1].
        log_probs: `[..., V]`, log-probabilities of the codes.
        codebook: `[V, c]`.
    """
    # |x - (1 - t) c|^2 without |x|^2, which is the same for all codes.
    keep = 1 - t
    logits = log_probs + (keep * (x @ codebook.t()) - keep**2 * codebook.square().sum(-1) / 2) / t**2
    return logits.softmax(-1) @ codebook


@check_kinds
def teacher_score(x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor) -> Tensor:
    """Gradient of the log-density of x; arguments are those of `mean_code`."""
    return -(x - (1 - t) * mean_code(x, t, log_probs, codebook)) / t**2


@check_kinds
def flow_codes(noise: Tensor, log_probs: Tensor, codebook: Tensor, steps: int = 16) -> Tensor:
    """Where the probability flow takes noise at t = 1: int64 `[...]`, the nearest codes.

    Args:
        noise: `[..., c]`.
        log_probs: `[..., V]`.
        codebook: `[V, c]`.
        steps: of Euler's method.
    """
    times = torch.linspace(1.0, T_MIN, steps + 1, dtype=noise.dtype, device=noise.device)
    x = noise
    for now, after in pairwise(times.unbind()):
        t = now.expand(*x.shape[:-1], 1)
        # dx/dt = e - q, and e = (x - (1 - t) q) / t.
        x = x + (after - now) * (x - mean_code(x, t, log_probs, codebook)) / t
    return nearest(x, codebook)


@check_kinds
def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: `[..., c]` to int64 `[...]`."""
    return (vectors @ codebook.t() - codebook.square().sum(-1) / 2).argmax(-1)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class OneStepConfig(LlamaGenConfig):
    """Settings of `OneStepCodes`: those of the teacher, and

    Attributes:
        code_channels: width c of a code.
        head_dim: width of the head that reads a place's own noise.

    Raises:
        ValueError: a size is below 1.
    """

    code_channels: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code_channels < 1 or self.head_dim < 1:
            raise ValueError(
                f"expected code_channels and head_dim of at least 1 but got {self.code_channels} and {self.head_dim}"
            )


class VectorHead(nn.Module):
    """A vector of a place from its hidden state, a vector of its own and a time; zero at first."""

    def __init__(self, dim: int, channels: int, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(dim, width)
        self.own = nn.Linear(channels, width, bias=False)
        self.time = nn.Linear(2 * _TIMES, width, bias=False)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, channels)
        if not self.out.weight.is_meta:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, own: Tensor, t: Tensor) -> Tensor:
        """`[B, L, C]`, `[B, L, c]` and `[B, L, 1]` to `[B, L, c]`."""
        rates = torch.pi * 2.0 ** (torch.arange(_TIMES, device=t.device) / 2 - 1)
        waves = torch.cat([(t * rates).cos(), (t * rates).sin()], -1)
        x = F.silu(self.state(hidden) + self.own(own) + self.time(waves))
        out: Tensor = self.out(F.silu(x + self.middle(x)))
        return out


@check_kinds
class OneStepCodes(CausalDecoder):
    """The generator, and the guidance network that is trained beside it.

    Args:
        config: settings.
    """

    def __init__(self, config: OneStepConfig) -> None:
        super().__init__()
        self.config = config
        fields = {name: getattr(config, name) for name in LlamaGenConfig.__dataclass_fields__}
        trunk = LlamaGen(LlamaGenConfig(**fields | {"vocab_size": 1}))
        self.class_embedding, self.layers, self.norm = trunk.class_embedding, trunk.layers, trunk.norm
        self.rotary, self.vocab_size, self.max_length = trunk.rotary, 0, config.side**2
        self.read = nn.Linear(config.code_channels, config.dim)
        self.head = VectorHead(config.dim, config.code_channels, config.head_dim)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def hidden(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """States that see the class and the vectors before each place: `[B, L, c]`, `[B]` to `[B, L, C]`.

        Raises:
            ValueError: another width, more places than the model has, or a label that is none.
        """
        channels, most = self.config.code_channels, self.config.side**2
        if vectors.dim() != 3 or vectors.shape[2] != channels or not 1 <= vectors.shape[1] <= most:
            raise ValueError(
                f"expected vectors of shape [B, 1 to {most}, {channels}] but got {tuple(vectors.shape)}"
            )
        check_ids("labels", labels, self.config.num_classes + 1)
        first = self.class_embedding(labels).unsqueeze(1)
        x = torch.cat([first, self.read(vectors[:, :-1])], 1)
        mask, angles = self.behind((0,), x.shape[1], x.device)
        return self.run(x, angles, mask)

    @check_kinds
    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Code vectors of noise, in one call: `[B, L, c]` and int64 `[B]` to `[B, L, c]`. Errors: those of `hidden`."""
        t = torch.ones_like(noise[..., :1])
        out: Tensor = noise + self.head(self.hidden(noise, labels), noise, t)
        return out

    def denoise(self, vectors: Tensor, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Mean code of noisy vectors given the clean ones before each place; shapes are those of `mean_code`."""
        out: Tensor = self.head(self.hidden(vectors, labels), noisy, t)
        return out

    @check_kinds
    def generate(self, labels: Tensor, *, seed: int | list[int] = 0) -> Tensor:
        """Code vectors of these classes, `[B, S * S, c]`, in one call; row n of a seed is the same in any batch."""
        seeds = seed if isinstance(seed, list) else [seed + row for row in range(len(labels))]
        if len(seeds) != len(labels):
            raise ValueError(f"expected a seed for each of {len(labels)} rows but got {len(seeds)}")
        shape = (self.config.side**2, self.config.code_channels)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(one)) for one in seeds]
        noise = torch.stack(rows) if rows else torch.zeros(0, *shape)
        with torch.no_grad():
            out: Tensor = self(noise.to(self.read.weight), labels)
        return out

    def start_from(self, teacher: LlamaGen) -> None:
        """Take over the teacher's layers.

        Raises:
            ValueError: the sizes differ.
        """
        own = self.state_dict()
        names = [name for name in own if name.startswith(("class_embedding.", "layers.", "norm."))]
        theirs = teacher.state_dict()
        odd = [name for name in names if name not in theirs or theirs[name].shape != own[name].shape]
        if odd:
            raise ValueError(f"the teacher has other layers: {odd[0]} differs; take its sizes")
        self.load_state_dict({name: theirs[name] for name in names}, strict=False)


# Code vectors `[B, L, c]` and labels `[B]` to log-probabilities of each place's code, `[B, L, V]`.
Teacher = Callable[[Tensor, Tensor], Tensor]


class Losses(NamedTuple):
    """What a step minimises.

    Attributes:
        generator: its gradient is the difference of the scores.
        guidance: squared error of the guidance network's mean code.
    """

    generator: Tensor
    guidance: Tensor


@check_kinds
def distil_losses(
    generator: OneStepCodes, guidance: OneStepCodes, teacher: Teacher, codebook: Tensor, labels: Tensor
) -> Losses:
    """Losses of both networks on fresh noise, by torch's random numbers. Their gradients do not mix.

    Args:
        generator: makes code vectors.
        guidance: learns the mean code of what the generator makes.
        teacher: log-probabilities of codes.
        codebook: `[V, c]`.
        labels: int64 `[B]`.
    """
    shape = (len(labels), generator.max_length, generator.config.code_channels)
    made = generator(torch.randn(shape, device=labels.device), labels)
    fixed = made.detach()
    t = T_MIN + (1 - T_MIN) * torch.rand(*shape[:2], 1, device=labels.device)
    noisy = (1 - t) * fixed + t * torch.randn(shape, device=labels.device)
    ours = guidance.denoise(fixed, noisy, t, labels)
    with torch.no_grad():
        theirs = mean_code(noisy, t, teacher(fixed, labels), codebook)
        # The scores' difference is (1 - t) / t^2 times that of the mean codes, and that is divided out.
        push = ours - theirs
    return Losses((push * made).sum(-1).mean(), (ours - fixed).square().sum(-1).mean())


def raster_teacher(model: LlamaGen, codebook: Tensor, cfg: float = 1.0) -> Teacher:
    """A raster model as a teacher: it reads the nearest codes of the vectors, under guidance if `cfg` is not 1."""

    @torch.no_grad()
    def log_probs(vectors: Tensor, labels: Tensor) -> Tensor:
        codes = nearest(vectors, codebook)
        logits = model(codes, labels)
        if cfg != 1:
            none = model(codes, torch.full_like(labels, model.null_class))
            logits = none + cfg * (logits - none)
        return logits.log_softmax(-1)

    return log_probs


@torch.no_grad()
def flow_pairs(
    model: Any, codebook: Tensor, labels: Tensor, *, cfg: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Noise and the codes that the teacher's flow makes of it, place by place: `[B, L, c]` each (codes as vectors)."""
    length = model.config.side**2
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), length, codebook.shape[1], generator=generator).to(codebook)
    guided = model if cfg == 1 else model.guided(cfg)
    cache = guided.make_cache(len(labels), 1 + length)
    logits = guided.prefill(model.prompt(labels), cache)
    codes = []
    for place in range(length):
        codes.append(flow_codes(noise[:, place], logits.log_softmax(-1), codebook))
        if place + 1 < length:
            logits = guided.step(codes[-1], cache)
    return noise, codebook[torch.stack(codes, 1)]


@preset
def dd2_tiny() -> OneStepConfig:
    """For the codes of `llamagen_tiny` with `vq16_tiny`; takes the sizes of its teacher."""
    return OneStepConfig(
        dim=96, num_layers=3, num_heads=4, vocab_size=256, side=7, num_classes=10, multiple_of=32
    )
