"""ETT's claim."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.zoo.multimodal.ett.model import ETT, ETTConfig, caption_loss, read_codes
from arcore.zoo.tokenizers.vq16 import ImageVQ, ImageVQConfig

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def claim(*, quick: bool) -> Claim:
    """A tokenizer of small digits, tuned through captions with and without its own loss."""
    from arcore.data import load_digits

    train, held_out = load_digits("train"), load_digits("test")
    unseen, classes = held_out.images, held_out.labels
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
    for _ in steps(30 if quick else 500, "training the tokenizer"):
        images = train.images[torch.randint(len(train.images), (32,))]
        _, drawn, vq = read_codes(tokenizer, images)
        _step(optimizer, F.mse_loss(drawn, images) + vq)
    before = _error(tokenizer, unseen)
    model = ETT(ETTConfig(num_codes=tokenizer.side**2, code_channels=8, max_caption=8))
    soft, hard = _encoder_gradients(tokenizer, model, unseen[:16], classes[:16])
    results = {}
    if not quick:
        # The paper's first stage: the tokenizer stays as it is.
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
        for _ in steps(200, "training the reader alone"):
            rows = torch.randint(len(train.images), (32,))
            with torch.no_grad():
                vectors, _, _ = read_codes(tokenizer.eval(), train.images[rows])
            captions = model.encode([NAMES[label] for label in train.labels[rows].tolist()])
            _step(optimizer, caption_loss(model, vectors, captions))
    for alpha in () if quick else (1.0, 0.0):
        torch.manual_seed(0)
        tuned, reader = copy.deepcopy(tokenizer).train(), copy.deepcopy(model)
        optimizer = torch.optim.AdamW([*tuned.parameters(), *reader.parameters()], lr=3e-4, betas=(0.9, 0.95))
        for _ in steps(300, f"tuning with alpha {alpha:g}"):
            rows = torch.randint(len(train.images), (32,))
            vectors, drawn, vq = read_codes(tuned, train.images[rows])
            captions = reader.encode([NAMES[label] for label in train.labels[rows].tolist()])
            own = F.mse_loss(drawn, train.images[rows]) + vq
            _step(optimizer, caption_loss(reader, vectors, captions) + alpha * own)
        results[alpha] = (_error(tuned, unseen), _read(tuned, reader, unseen, classes))
    found = [
        at_least("norm of the caption's gradient at the encoder", soft, 1e-6),
        equals("the same where the model reads numbers of codes", hard, 0),
    ]
    if not quick:
        found += [
            at_most("reconstruction error over that before, alpha 1", results[1.0][0] / before, 1.05),
            at_least(
                "reconstruction error with alpha 0 over that with alpha 1",
                results[0.0][0] / results[1.0][0],
                1.3,
            ),
            at_least("share of held-out digits named right, alpha 1", results[1.0][1], 0.6),
        ]
    return Claim(tuple(found))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _encoder_gradients(tokenizer: Any, model: ETT, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Norm of the caption's gradient at the encoder through vectors, and through a table looked up by numbers."""
    captions = model.encode([NAMES[label] for label in labels.tolist()])
    norms = []
    for soft in (True, False):
        tokenizer.zero_grad()
        vectors, _, _ = read_codes(tokenizer, images)
        if not soft:
            vectors = tokenizer.codebook()[tokenizer.encode(images)]
        caption_loss(model, vectors, captions).backward()
        found = [p.grad.norm().item() for p in tokenizer.encoder.parameters() if p.grad is not None]
        norms.append(sum(found))
    tokenizer.zero_grad()
    return norms[0], norms[1]


@torch.no_grad()
def _error(tokenizer: Any, images: Tensor) -> float:
    """Mean squared error of reconstructions."""
    tokenizer.eval()
    error = F.mse_loss(tokenizer.decode(tokenizer.encode(images)), images).item()
    tokenizer.train()
    return error


@torch.no_grad()
def _read(tokenizer: Any, model: ETT, images: Tensor, labels: Tensor) -> float:
    tokenizer.eval()
    texts = model.captions(read_codes(tokenizer, images)[0])
    right = [
        text.decode("utf-8", "replace") == NAMES[label]
        for text, label in zip(texts, labels.tolist(), strict=True)
    ]
    return sum(right) / len(right)
