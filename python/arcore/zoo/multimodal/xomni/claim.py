"""X-Omni's claim."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps
from arcore.zoo.multimodal.xomni.model import TEXT, XOmni, XOmniConfig
from arcore.zoo.multimodal.xomni.rewarding import classifier_reward, held_out_nll, mean_reward, reward_updates
from arcore.zoo.tokenizers.vq16 import ImageVQ, ImageVQConfig

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def claim(*, quick: bool) -> Claim:
    """Exact properties; in full a model of small digits, trained and then rewarded for its pictures."""
    found = _exact()
    if quick:
        return Claim(tuple(found))
    from arcore.data import load_digits

    train, held_out = load_digits("train"), load_digits("test")
    tokenizer = ImageVQ(
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
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for _ in steps(600, "training the tokenizer"):
        images = train.images[torch.randint(len(train.images), (32,))]
        out = tokenizer(images)
        _step(optimizer, F.mse_loss(out.reconstruction, images) + out.vq_loss)
    tokenizer.eval().requires_grad_(False)
    model = XOmni(XOmniConfig(side=4, factor=2, vocab_size=64, max_caption=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for number in steps(900, "training the model"):
        rows = torch.randint(len(train.images), (32,))
        codes = tokenizer.encode(train.images[rows])
        captions = [NAMES[label] for label in train.labels[rows].tolist()]
        language = model.loss(model.sequences(captions, codes, image_first=bool(number % 2)))
        flow = model.decoder.loss(train.images[rows], tokenizer.codebook()[codes])
        _step(optimizer, language + flow)
    model.eval()
    reward = classifier_reward(train.images, train.labels, 10)
    unseen = tokenizer.encode(held_out.images)
    captions = [NAMES[label] for label in held_out.labels.tolist()]
    named = model.describe(unseen[:200])
    right = sum(one == two for one, two in zip(named, captions[:200], strict=True)) / 200
    base = copy.deepcopy(model)
    measured = reward_updates(
        model, tokenizer, NAMES, reward, updates=40, prompts_per_update=10, group=8, seed=1
    )
    before, after = (mean_reward(one, tokenizer, NAMES, reward, each=20, seed=5) for one in (base, model))
    likelihood = held_out_nll(model, captions, unseen) / held_out_nll(base, captions, unseen)
    found += [
        at_least("rise of the mean reward on decoded pixels over 40 updates", after - before, 0.03),
        at_most("KL per code at the end (k3)", measured[-1].kl, 0.5),
        at_most("held-out negative log-likelihood over that before", likelihood, 1.10),
        at_least("share of 200 held-out pictures named right from their codes, by chance 0.1", right, 0.7),
    ]
    return Claim(tuple(found))


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def _exact() -> list[Any]:
    """Text passes the layers of images unchanged; a cache gives the logits of one pass; pictures are whole."""
    model = shaken(create_model("xomni_tiny"), scale=0.2).eval()
    assert isinstance(model, XOmni)
    language = model.language
    codes = torch.randint(256, (2, 49))
    ids = model.sequences(["seven", "one"], codes).clamp(min=0)
    whole = model(ids)
    cache = language.make_cache(2, ids.shape[1])
    parts = [language.prefill(ids[:, :4], cache)]
    parts += [language.step(ids[:, i], cache) for i in range(4, ids.shape[1])]
    apart = (torch.stack(parts, 1) - whole[:, 3:]).abs().max() / whole.abs().max()
    before = whole.clone()
    for number in language.of_images:
        shaken(language.layers[number], seed=number + 7, scale=0.2)
    # The caption stands before the picture, so nothing that it reads has changed.
    text = (ids >= TEXT).cumsum(1) == 0
    changed = (model(ids) - before).abs()
    drawn = model.draw(["seven", "one", "eight"], seed=3)
    return [
        at_most("difference between one pass and steps, relative to the largest logit", apart, 1e-5),
        equals("change of text's logits when the layers of images change", changed[text].max(), 0),
        at_least("change of the codes' logits then", changed[~text].max(), 0.1),
        equals("tokens in a drawn picture that are no codes", int(((drawn < 0) | (drawn >= 256)).sum()), 0),
    ]
