"""EAR: erasing a concept from an autoregressive image model (arXiv:2506.20151).

The attention of the first layers is trained so that, in the images of the erased class, each code is predicted from
what another class would give. Three images advance together: a positive one of the class to erase, a neutral and a
target one of the class to move toward. At each code the last hidden state of the trained model on the positive image is
drawn to::

    h_target - strength * (h_positive - h_neutral)

all three from the model as it was. The loss is summed over a window of codes, and each window is an update, unless its
loss is at most a threshold already.

Differs from fine-tuning on other labels (`arcore.recipes.raster`) in that it needs no images, and in what it changes:
the result is a patch of attention weights; `patched` puts it in and takes it out again, bit for bit.

The released code feeds one code at a time without a cache after the first, so its later losses see a context of length
1. `context="full"` reads what stands before each code, `context="official"` repeats that.

The method has no term that keeps the other classes; `keep` adds one here (a KL divergence); 0 is the published method.

Legend: B pairs of prompts, L codes, C width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore._files import atomic_path
from arcore._optional import require
from arcore.catalog import System, load_checkpoint
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.catalog.running import Report
from arcore.decoding import generate
from arcore.zoo.raster._digits import accuracy, digit_codes, level_images, train_classifier, train_raster

SYSTEM = System(
    name="ear",
    title="EAR",
    paper="arXiv:2506.20151",
    topic="raster",
    kind="objective",
    builds_on=("llamagen",),
    ops=("block_sparse_attention", "sample"),
    summary="Erases a class from a trained raster image model by a patch of the first layers' attention weights.",
    claim=(
        "After erasing a digit an independent classifier finds it in at most a tenth of its samples, the others in at "
        "least 0.8 of theirs; without the patch the model is what it was, bit for bit."
    ),
    checked_on="real data",
)

LAYERS = 5


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
        if not self.lr > 0:
            raise ValueError(f"--lr must be above 0 but got {self.lr}")
        if self.context not in ("full", "official"):
            raise ValueError(f"--context {self.context}: choose full or official")


def erase(model: Any, erased: int, toward: int, how: Erasing) -> dict[str, Tensor]:
    """The patch that erases a class; the model itself stays as it is.

    Args:
        model: of codes, such as `LlamaGen`.
        erased: class to erase.
        toward: class whose images take its place.
        how: settings.

    Raises:
        ValueError: the classes are one, or none of the model's.
    """
    count = model.null_class
    if erased == toward or not (0 <= erased < count and 0 <= toward < count):
        raise ValueError(
            f"expected two different classes from 0 to {count - 1} but got erase={erased} and toward={toward}"
        )
    base = model.eval()
    tuned = copy.deepcopy(base).requires_grad_(False)
    trained = attention_weights(tuned, how.layers)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.values(), lr=how.lr)
    length = model.config.side**2
    window = how.window or length
    starts = list(range(0, length, window))
    rollout = -1
    spans: list[Any] = []
    others = _others(base, erased, how) if how.keep else None
    chance = torch.Generator().manual_seed(how.seed)
    for _ in steps(how.updates, "erasing"):
        if not spans:
            rollout, spans = rollout + 1, list(starts)
            ids, goals = _rollout(base, erased, toward, how, rollout)
        start = spans.pop(0)
        stop = min(start + window, length)
        hidden = _hidden(tuned, ids, how.context)[:, start:stop]
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


def _rollout(base: Any, erased: int, toward: int, how: Erasing, number: int) -> tuple[Tensor, list[Tensor]]:
    """The positive images' tokens and what the unchanged model computes on target, positive and neutral ones."""
    device = next(base.parameters()).device
    labels = torch.tensor([toward, erased, toward], device=device).repeat_interleave(how.pairs)
    ids = _drawn(base, labels, how.cfg, how.seed + number * len(labels))
    with torch.no_grad():
        hidden = _hidden(base, ids, how.context)
    return ids.chunk(3)[1], list(hidden.chunk(3))


def _drawn(base: Any, labels: Tensor, cfg: float, seed: int) -> Tensor:
    """Prompts and all codes but the last of images of these classes, int64 `[N, L]`."""
    prompt = base.prompt(labels)
    guided = base if cfg == 1 else base.guided(cfg)
    seeds = [seed + row for row in range(len(labels))]
    codes = generate(guided, prompt, max_new_tokens=base.config.side**2, seed=seeds).ids
    return torch.cat([prompt, codes[:, :-1]], 1)


def _hidden(model: Any, ids: Tensor, context: str) -> Tensor:
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
def class_samples(model: Any, count: int, *, cfg: float, seed: int, top_k: int | None = None) -> Tensor:
    """Codes of `count` images of each class, int64 `[classes, count, S * S]`."""
    guided = model if cfg == 1 else model.guided(cfg)
    labels = torch.arange(model.null_class, device=next(model.parameters()).device).repeat_interleave(count)
    seeds = [seed + row for row in range(len(labels))]
    out = generate(guided, model.prompt(labels), max_new_tokens=model.config.side**2, seed=seeds, top_k=top_k)
    return out.ids.view(model.null_class, count, -1)


@dataclass(frozen=True, kw_only=True)
class Options(Erasing):
    """Erase a class from a trained model.

    Attributes:
        checkpoint: run folder or checkpoint of `arcore train llamagen_tiny`.
        erase: class to erase, its number from 0.
        toward: class that takes its place.
        samples: images of each class that an independent classifier judges.
        out: file for the patch (.safetensors). Default: beside the checkpoint, ear_ERASE.safetensors.
    """

    checkpoint: Path
    erase: int
    toward: int
    samples: int = 20
    out: Path | None = None


def run(options: Options) -> Report:
    """Erase a class of a trained model, write the patch, and let a classifier judge samples with and without it."""
    from arcore.data import open_dataset
    from arcore.training import checkpoint

    folder = checkpoint.find(options.checkpoint)
    networks, facts = load_checkpoint(folder)
    model: Any = networks.get("model")
    tokenizer: Any = networks.get("tokenizer")
    if model is None or tokenizer is None or not hasattr(model, "prompt"):
        raise ValueError(
            f"{options.checkpoint} holds no raster image model; train one with `arcore train llamagen_tiny`"
        )
    model, tokenizer = (network.eval().requires_grad_(False) for network in (model, tokenizer))
    names = list(facts["class_names"])
    config: Any = tokenizer.config
    shape = {"image_size": config.image_size, "channels": config.in_channels}
    images, labels = _all(open_dataset(facts["data"], split="train", **shape))
    # The judge also sees what the tokenizer can show, of every second image.
    shown = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images[::2].split(250)])
    judge = train_classifier(
        torch.cat([images, shown]), torch.cat([labels, labels[::2]]), classes=len(names), count=500
    )
    held_out, truth = _all(open_dataset(facts["data"], split="test", **shape))
    seen = accuracy(judge, held_out, truth) if len(truth) else float("nan")
    patch = erase(model, options.erase, options.toward, options)
    out = options.out or folder.parent / f"ear_{options.erase}.safetensors"
    with atomic_path(out) as temporary:
        require("safetensors.torch", extra="zoo").save_file(patch, temporary)
    rates, pictures = {}, {}
    for what, change in (("before", {}), ("after", patch)):
        with patched(model, change):
            codes = class_samples(model, options.samples, cfg=options.cfg, seed=options.seed + 10_000_000)
        drawn = tokenizer.decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        truth = torch.arange(len(names)).repeat_interleave(options.samples)
        hits = (judge(drawn.flatten(0, 1)).argmax(-1) == truth).float().view(len(names), -1).mean(1)
        rates[what], pictures[what] = hits, drawn
    others = [c for c in range(len(names)) if c != options.erase]
    lines = [
        f"an independent classifier, right for {seen:.3f} of held-out images, takes for their class of "
        f"{options.samples} samples each:"
    ]
    lines += [
        f"  {names[c]:>12}  before {rates['before'][c]:.2f}  after {rates['after'][c]:.2f}"
        + ("  (erased)" if c == options.erase else "")
        for c in range(len(names))
    ]
    mean = float(rates["after"][others].mean())
    lines += [
        f"erased class {float(rates['after'][options.erase]):.2f}, mean of the others {mean:.2f}",
        f"patch: {out}",
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        for place, (what, drawn) in zip(axes, pictures.items(), strict=True):
            shown = drawn[:, :8, 0]
            sheet = shown.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
            place.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
            place.set(title=what, xticks=[], yticks=[])

    values = {what: hits.tolist() for what, hits in rates.items()}
    values |= {"others": mean, "patch": str(out), "classifier": seen}
    return Report("\n".join(lines), values, draw, (9.0, 6.0))


def _all(data: Any) -> tuple[Tensor, Tensor]:
    """Images and classes of a dataset."""
    if not len(data):
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])


def claim(*, quick: bool) -> Claim:
    """Erase the 3 toward the 8 in a model of small digits; quick: only that the loss falls and the patch comes off."""
    model = train_raster(5 if quick else 600)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = Erasing(
        updates=4 if quick else 40, pairs=4 if quick else 12, cfg=1.0 if quick else 2.0, threshold=0
    )
    patch = erase(model, 3, 8, how)
    ids, goals = _rollout(model, 3, 8, how, how.updates)  # a rollout that was not trained on

    @torch.no_grad()
    def measured() -> tuple[Tensor, Tensor]:
        hidden = _hidden(model, ids, "full")
        return hidden, erase_loss(hidden, *goals)

    plain = measured()
    with patched(model, patch):
        tuned = measured()
        codes = None if quick else class_samples(model, 20, cfg=2.0, seed=1)
    changed = sum(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = [
        equals("weights of the model that differ after the patch is taken off", changed, 0),
        at_least("largest change of a hidden state while it is on", (tuned[0] - plain[0]).abs().max(), 1e-3),
    ]
    if codes is not None:
        train, labels = digit_codes("train")
        judge = train_classifier(level_images(train), labels, classes=10)
        held_out, truth = digit_codes("test")
        hits = [accuracy(judge, level_images(codes[c]), torch.full((20,), c)) for c in range(10)]
        seen = accuracy(judge, level_images(held_out), truth)
        rows += [
            at_most("loss with the patch over that without", tuned[1] / plain[1], 0.9),
            at_least("accuracy of the classifier on held-out digits", seen, 0.95),
            at_most("samples of the erased class that are taken for it", hits[3], 0.1),
            at_least(
                "the same of the other classes, mean", sum(hits[c] for c in range(10) if c != 3) / 9, 0.8
            ),
        ]
    return Claim(tuple(rows))
