"""The loss, the patch, and the training that makes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog.claims import steps
from arcore.decoding import generate
from arcore.nn.kinds import check_kinds
from arcore.zoo.raster.llamagen import LlamaGen

LAYERS = 5


@check_kinds
def erase_loss(
    hidden: Tensor,
    target: Tensor,
    positive: Tensor,
    neutral: Tensor,
    mask: Tensor | None = None,
    *,
    strength: float = 1.0,
) -> Tensor:
    """Squared distance of hidden states from where erasing wants them, summed over codes; scalar.

    Args:
        hidden: `[B, L, C]` of the trained model on the positive images, with gradient.
        target: `[B, L, C]` of the model as it was on the target images.
        positive: the same on the positive images.
        neutral: the same on the neutral images.
        mask: `[B, L]` bool, codes that count; all by default.
        strength: how far to move away from the positive images.

    Returns:
        The sum over codes of the mean over rows and channels.

    Raises:
        ValueError: shapes differ, or the strength is negative.
    """
    shapes = {tuple(x.shape) for x in (hidden, target, positive, neutral)}
    if len(shapes) != 1 or hidden.dim() != 3:
        raise ValueError(
            f"arcore.erase_loss: expected hidden states [B, L, C] of one shape but got {sorted(shapes)}; the three "
            "images advance together, code by code"
        )
    if not strength >= 0:
        raise ValueError(f"arcore.erase_loss: expected strength >= 0 but got {strength}")
    error = (hidden - (target - strength * (positive - neutral)).detach()).square().mean(-1)
    if mask is not None:
        error = error.masked_fill(~mask, 0.0)
    return error.sum() / max(len(hidden), 1)


def attention_weights(model: nn.Module, layers: int = LAYERS) -> dict[str, nn.Parameter]:
    """The parameters that erasing trains: all of the attention of the first `layers` layers, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and ".attention." in name and int(name.split(".")[1]) < layers
    }


@contextmanager
@check_kinds
def patched(model: nn.Module, patch: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model with other weights in some places; afterwards those from before, bit for bit.

    Args:
        model: the model.
        patch: weights by name.

    Raises:
        ValueError: a name or shape is not the model's.
    """
    own = dict(model.named_parameters())
    for name, value in patch.items():
        if name not in own or own[name].shape != value.shape:
            found = tuple(own[name].shape) if name in own else "nothing of that name"
            raise ValueError(
                f"the patch has {name} of shape {tuple(value.shape)} but the model has {found}: it was made for "
                "another model"
            )
    before = {name: own[name].data for name in patch}
    try:
        for name, value in patch.items():
            own[name].data = value.to(own[name].dtype).to(own[name].device)
        yield model
    finally:
        for name, value in before.items():
            own[name].data = value


@dataclass(frozen=True, kw_only=True)
class Erasing:
    """How a class is erased.

    Attributes:
        updates: optimiser steps, each on a window of codes of one rollout.
        pairs: images of each of the three kinds in a rollout.
        lr: learning rate of Adam.
        window: codes per update; 0 for all codes of an image.
        threshold: windows whose loss is at most this are left out.
        strength: how far to move away from the erased class.
        cfg: guidance with which the images are drawn.
        layers: layers whose attention is trained.
        keep: weight of a KL divergence per code that keeps the predictions of the other classes and of no class; 0 is
            the published method.
        context: "full", or "official" for contexts of one code.
        seed: of the images.
    """

    updates: int = 40
    pairs: int = 12
    lr: float = 5e-4
    window: int = 0
    threshold: float = 0.05
    strength: float = 1.0
    cfg: float = 2.0
    layers: int = LAYERS
    keep: float = 20.0
    context: Literal["full", "official"] = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "pairs", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1 but got {getattr(self, name)}")
        for name in ("window", "threshold", "strength", "keep"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0 but got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be above 0 and finite but got {self.lr}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"--cfg must be a finite number but got {self.cfg}")
        if self.context not in ("full", "official"):
            raise ValueError(f"--context {self.context}: choose full or official")


def check_classes(model: LlamaGen, erased: int, toward: int) -> None:
    """Raise ValueError unless these are two different classes of the model."""
    count = model.null_class
    if erased == toward or not (0 <= erased < count and 0 <= toward < count):
        raise ValueError(
            f"expected two different classes from 0 to {count - 1} but got erase={erased} and toward={toward}"
        )


@check_kinds
def erase(model: LlamaGen, erased: int, toward: int, how: Erasing) -> dict[str, Tensor]:
    """The patch that erases a class; the model itself stays as it is.

    Args:
        model: of codes, such as `LlamaGen`.
        erased: class to erase.
        toward: class whose images take its place.
        how: settings.

    Raises:
        ValueError: the classes are one, or none of the model's.
    """
    check_classes(model, erased, toward)
    base = model.eval()
    tuned = copy.deepcopy(base).requires_grad_(False)
    trained = attention_weights(tuned, how.layers)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.values(), lr=how.lr)
    length = model.config.side**2
    window = how.window or length
    starts = list(range(0, length, window))
    turn = -1
    spans: list[Any] = []
    others = _others(base, erased, how) if how.keep else None
    chance = torch.Generator().manual_seed(how.seed)
    for _ in steps(how.updates, "erasing"):
        if not spans:
            turn, spans = turn + 1, list(starts)
            ids, goals = rollout(base, erased, toward, how, turn)
        start = spans.pop(0)
        stop = min(start + window, length)
        hidden = last_hidden(tuned, ids, how.context)[:, start:stop]
        loss = erase_loss(hidden, *(goal[:, start:stop] for goal in goals), strength=how.strength)
        if loss.item() <= how.threshold:
            continue
        if others is not None:
            rows = torch.randperm(len(others[0]), generator=chance)[: 2 * how.pairs]
            loss = loss + how.keep * (stop - start) * _moved(tuned, others, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def rollout(base: Any, erased: int, toward: int, how: Erasing, number: int) -> tuple[Tensor, list[Tensor]]:
    """The positive images' tokens and what the unchanged model computes on target, positive and neutral ones."""
    device = next(base.parameters()).device
    labels = torch.tensor([toward, erased, toward], device=device).repeat_interleave(how.pairs)
    ids = _drawn(base, labels, how.cfg, how.seed + number * len(labels))
    with torch.no_grad():
        hidden = last_hidden(base, ids, how.context)
    return ids.chunk(3)[1], list(hidden.chunk(3))


def _drawn(base: Any, labels: Tensor, cfg: float, seed: int) -> Tensor:
    """Prompts and all codes but the last of images of these classes, int64 `[N, L]`."""
    prompt = base.prompt(labels)
    guided = base if cfg == 1 else base.guided(cfg)
    seeds = [seed + row for row in range(len(labels))]
    codes = generate(guided, prompt, max_new_tokens=base.config.side**2, seed=seeds).ids
    return torch.cat([prompt, codes[:, :-1]], 1)


def last_hidden(model: Any, ids: Tensor, context: str) -> Tensor:
    """Last hidden states, `[B, L]` to `[B, L, C]`."""
    if context == "full":
        out: Tensor = model.hidden(ids)
        return out
    # The first step reads the prompt, all others a single code.
    single: Tensor = model.hidden(ids.flatten().unsqueeze(1)).view(*ids.shape, -1)
    return single


def _others(base: Any, erased: int, how: Erasing) -> tuple[Tensor, Tensor]:
    """Tokens of images of the other classes and the log-probabilities of their codes, for `keep`."""
    device = next(base.parameters()).device
    labels = torch.tensor([c for c in range(base.null_class) if c != erased], device=device)
    ids = _drawn(base, labels.repeat(max(how.pairs // 2, 1)), how.cfg, how.seed + 7_000_000)
    # What stands for no class serves guidance, and must stay too.
    none = ids.clone()
    none[:, 0] = base.prompt(labels.new_full((1,), base.null_class))[0, 0]
    ids = torch.cat([ids, none])
    with torch.no_grad():
        wanted = base.logits(base.hidden(ids)).log_softmax(-1)
    return ids, wanted


def _moved(tuned: Any, others: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """KL divergence per code of the tuned model's predictions from the unchanged one's."""
    ids, wanted = (x[rows] for x in others)
    found = tuned.logits(tuned.hidden(ids)).log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()


@torch.no_grad()
@check_kinds
def class_samples(model: Any, count: int, *, cfg: float, seed: int, top_k: int | None = None) -> Tensor:
    """Codes of `count` images of each class, int64 `[classes, count, S * S]`."""
    guided = model if cfg == 1 else model.guided(cfg)
    labels = torch.arange(model.null_class, device=next(model.parameters()).device).repeat_interleave(count)
    seeds = [seed + row for row in range(len(labels))]
    out = generate(guided, model.prompt(labels), max_new_tokens=model.config.side**2, seed=seeds, top_k=top_k)
    return out.ids.view(model.null_class, count, -1)
