"""X-Omni's last stage: policy gradients on rewards of decoded pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import load_checkpoint, save_checkpoint
from arcore.catalog.claims import steps
from arcore.catalog.running import Report, check_bounds
from arcore.nn.kinds import check_kinds
from arcore.objectives.policy import group_advantages, grpo_loss
from arcore.ops import token_logprobs
from arcore.zoo.multimodal.xomni.model import XOmni

# Pictures `[N, C, H, W]` in [-1, 1] and the numbers of their prompts `[N]` to rewards `[N]`.
Reward = Callable[[Tensor, Tensor], Tensor]


class Update(NamedTuple):
    """What an update measured.

    Attributes:
        reward: mean reward of the drafts.
        kl: mean over codes of the estimate exp(d) - d - 1 against the reference (k3).
    """

    reward: float
    kl: float


def reward_updates(
    model: XOmni,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    *,
    updates: int,
    prompts_per_update: int = 10,
    group: int = 8,
    lr: float = 2e-4,
    kl_weight: float = 0.01,
    min_p: float = 0.03,
    decoder_steps: int = 6,
    seed: int = 0,
) -> list[Update]:
    """Tune the language model in place; the decoder stays as it is.

    Args:
        model: the model.
        tokenizer: gives the codes' vectors.
        prompts: captions to draw.
        reward: scores decoded pictures.
        updates: optimiser steps; every draft is used once, so ratios are 1 and nothing is clipped.
        prompts_per_update: prompts per step, drawn with replacement.
        group: drafts per prompt (the paper: 16).
        lr: learning rate.
        kl_weight: weight of the KL term (the paper: .01).
        min_p: of the drafts. Log-probabilities are those of the whole distribution.
        decoder_steps: of the flow.
        seed: of all draws.

    Raises:
        ValueError: the reward gives another number of scores, or NaN; no update of that step is made.
    """
    reference = copy.deepcopy(model.language).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.language.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(prompts_per_update).repeat_interleave(group)
    size = tokenizer.side * tokenizer.config.factor
    measured = []
    for number in steps(updates, "rewarding pictures"):
        chosen = torch.randint(len(prompts), (prompts_per_update,), generator=generator)[groups]
        captions = [prompts[i] for i in chosen.tolist()]
        seeds = torch.randint(2**62, (len(captions),), generator=generator).tolist()
        codes = model.draw(captions, min_p=min_p, seed=seeds)
        noise = torch.randn(prompts_per_update, model.config.in_channels, size, size, generator=generator)
        pictures = model.decoder.draw(
            tokenizer.codebook()[codes], steps=decoder_steps, noise=noise.to(codes.device)[groups]
        )
        scores = reward(pictures, chosen)
        if scores.shape != (len(captions),) or not bool(scores.isfinite().all()):
            raise ValueError(
                f"expected the reward to give {len(captions)} finite numbers but got shape {tuple(scores.shape)}"
                f"{'' if bool(scores.isfinite().all()) else ' with values that are not finite'} in update {number}"
            )
        advantages = group_advantages(scores.float().cpu(), groups).to(codes.device)
        logprobs = _logprobs(model, captions, codes)
        with torch.no_grad():
            ours = model.language
            model.language = reference
            known = _logprobs(model, captions, codes)
            model.language = ours
        mask = torch.ones_like(codes, dtype=torch.bool)
        loss = grpo_loss(logprobs, logprobs.detach(), advantages, mask, reference=known, kl_weight=kl_weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.language.parameters(), 1.0)
        optimizer.step()
        apart = known - logprobs.detach()
        measured.append(Update(scores.mean().item(), (apart.exp() - apart - 1).mean().item()))
    return measured


def _logprobs(model: XOmni, captions: Sequence[str], codes: Tensor) -> Tensor:
    """Log-probability of each code, `[B, S * S]`."""
    return token_logprobs(model.code_logits(captions, codes), codes).logp


def classifier_reward(images: Tensor, labels: Tensor, classes: int, count: int = 300) -> Reward:
    """The probability that a classifier gives the prompt's class.

    Args:
        images: `[N, C, H, W]` in [-1, 1], on which a small convolutional network is trained.
        labels: int64 `[N]`.
        classes: how many.
        count: training steps.
    """
    from arcore.zoo.raster._digits import train_classifier

    judge = train_classifier(images, labels, classes=classes, count=count)
    return lambda pictures, wanted: judge(pictures).softmax(-1).gather(1, wanted.unsqueeze(1))[:, 0].detach()


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """A trained model, and what its pictures are rewarded for.

    Attributes:
        checkpoint: run folder or checkpoint of a trained xomni model.
        data: images and classes that a classifier is trained on; its probability of the prompt's class is the reward.
            Default: what the model was trained on.
        updates: optimiser steps.
        group: drafts per prompt.
        lr: learning rate.
        kl_weight: weight of the divergence from the model that came.
        out: folder of the tuned model.
        seed: of all draws.
    """

    checkpoint: Path | None = None
    data: str | None = None
    updates: int = 40
    group: int = 8
    lr: float = 2e-4
    kl_weight: float = 0.01
    out: Path = Path("out/xomni-rewarded")
    seed: int = 0

    def __post_init__(self) -> None:
        # A group of one has no other draw to be compared with.
        check_bounds(self, least={"updates": 1, "group": 2, "kl_weight": 0}, above={"lr": 0})


def run(options: Options) -> Report:
    """Tune a trained model by rewards on its pictures and save it like the one that came."""
    from arcore.data import open_dataset
    from arcore.training import checkpoint

    if options.checkpoint is None:
        raise ValueError("give a trained model with --checkpoint: make one with `arcore train xomni_tiny`")
    networks, facts = load_checkpoint(checkpoint.find(options.checkpoint))
    model, tokenizer = networks.get("model"), networks.get("tokenizer")
    if not isinstance(model, XOmni) or tokenizer is None:
        raise ValueError(
            f"expected a checkpoint of xomni with its tokenizer but {options.checkpoint} holds {', '.join(networks)}"
        )
    shape: Any = tokenizer.config
    data = open_dataset(
        options.data or facts["data"],
        split="train",
        image_size=shape.image_size,
        channels=shape.in_channels,
    )
    some = [data[index] for index in range(min(len(data), 4000))]
    images = torch.stack([image for image, _ in some])
    labels = torch.tensor([int(label) for _, label in some])
    names = list(data.class_names)
    measured = reward_updates(
        model.eval(),
        tokenizer.eval(),
        names,
        classifier_reward(images, labels, len(names)),
        updates=options.updates,
        group=options.group,
        lr=options.lr,
        kl_weight=options.kl_weight,
        seed=options.seed,
    )
    save_checkpoint(options.out, networks, facts)
    first, last = measured[0], measured[-1]
    text = (
        f"{len(measured)} updates: reward {first.reward:.3f} at first, {last.reward:.3f} at last, KL {last.kl:.3f} per "
        f"code; saved in {options.out}"
    )
    return Report(text, {"reward": [one.reward for one in measured], "kl": [one.kl for one in measured]})


def mean_reward(
    model: XOmni, tokenizer: Any, prompts: Sequence[str], reward: Reward, *, each: int, seed: int
) -> float:
    """Mean reward of `each` drafts of every prompt."""
    wanted = torch.arange(len(prompts)).repeat_interleave(each)
    codes = model.draw([prompts[i] for i in wanted.tolist()], seed=seed)
    pictures = model.decoder.draw(tokenizer.codebook()[codes], steps=6, seed=seed)
    return float(reward(pictures, wanted).mean())


def held_out_nll(model: XOmni, captions: Sequence[str], codes: Tensor) -> float:
    """Mean negative log-likelihood of codes behind their captions."""
    with torch.no_grad():
        return F.cross_entropy(model.code_logits(captions, codes).flatten(0, 1), codes.flatten()).item()
