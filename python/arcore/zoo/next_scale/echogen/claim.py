"""EchoGen's claim: what it draws is the reference's subject, and content is read once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps
from arcore.zoo.next_scale.echogen.model import Reference
from arcore.zoo.next_scale.echogen.references import SubjectScenes, small_encoders, subjects_of
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.model import bit_loss
from arcore.zoo.next_scale.infinity.text import Text, word_vectors
from arcore.zoo.tokenizers.multi_scale_bsq.claim import trained_tokenizer

PROMPT = "the digit on the left"
CANDIDATES = 20


def claim(*, quick: bool) -> Claim:
    """Exact properties; in full a model of scenes of digits, and whether its subjects are the references'."""
    with torch.no_grad():
        rows = _exact()
    if quick:
        return Claim(tuple(rows))
    from arcore.data import load_scenes

    tokenizer = trained_tokenizer(1000)
    model = trained(tokenizer, 3000)
    pictures = subjects_of(load_scenes("test"))
    found, without = (retrieval(model, tokenizer, pictures, guided) for guided in (True, False))
    rows += [
        at_least("drawn subjects nearest to their reference among 20 of the class", found, 0.5),
        at_most("the same without the reference, by chance 0.05", without, 0.15),
    ]
    return Claim(tuple(rows))


def trained(tokenizer: Any, count: int, each: Any = None) -> Any:
    """`echogen_tiny` after some steps on scenes of digits; `each(step, model)` is called after every one."""
    from arcore.data import load_scenes

    scenes = SubjectScenes(subjects_of(load_scenes("train")))
    every = word_vectors(scenes.class_names, 64)
    model: Any = create_model("echogen_tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=count)
    for number in steps(count, "training the model"):
        batch = [scenes[i] for i in torch.randint(len(scenes), (32,)).tolist()]
        pairs, labels = torch.stack([pair for pair, _ in batch]), torch.tensor([label for _, label in batch])
        strengths = torch.randint(31, (len(tokenizer.patch_nums),)) / 100
        bits, inputs = tokenizer.corrected(tokenizer.latent(pairs[:, 0]), strengths)
        reference = small_encoders(pairs[:, 1], tokenizer)
        optimizer.zero_grad()
        bit_loss(
            model(inputs, Text(every.vectors[labels], every.lengths[labels]), reference), bits
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if each is not None:
            each(number, model)
    return model.eval()


@torch.no_grad()
def retrieval(model: Any, tokenizer: Any, pictures: Any, with_reference: bool, each: int = 6) -> float:
    """Share of drawn subjects that are nearer to their reference than to 19 other pictures of its class.

    Without the reference the same prompt is drawn, and the likeness to the reference is chance.
    """
    chosen, groups = [], []
    for digit in range(10):
        members = (pictures.labels == digit).nonzero().flatten()[:CANDIDATES]
        chosen += members[:each].tolist()
        groups += [members] * each
    images = pictures.images[chosen]
    text = word_vectors([PROMPT], model.config.text_dim)
    text = Text(text.vectors.expand(len(images), -1, -1), text.lengths.expand(len(images)))
    reference = small_encoders(images, tokenizer) if with_reference else model.null_reference(len(images))
    drawn = draw_bits(
        model, tokenizer, model.guided(text, reference), guidance=(2.5, 2.5), temperature=0.5, seed=11
    ).images
    half = drawn.shape[-1] // 2
    right = 0
    for row, members in enumerate(groups):
        small = F.interpolate(pictures.images[members], size=(half, half), mode="bilinear", antialias=True)
        right += int(members[likeness(drawn[row, 0, :, :half], small[:, 0]).argmax()]) == chosen[row]
    return right / len(groups)


def likeness(drawn: Tensor, candidates: Tensor) -> Tensor:
    """Largest correlation `[N]` of candidates `[N, s, s]` with the parts `[s, s]` of a strip `[S, s]` at any height."""
    side = candidates.shape[-1]
    parts = drawn.unfold(0, side, 1).transpose(1, 2).flatten(1)  # [S - s + 1, s * s]
    parts = F.normalize(parts - parts.mean(1, keepdim=True), dim=1)
    wanted = candidates.flatten(1)
    wanted = F.normalize(wanted - wanted.mean(1, keepdim=True), dim=1)
    return (wanted @ parts.T).amax(1)


def _exact() -> list[Any]:
    """Content does not know the picture; guidance at its corners; a silent branch."""
    model: Any = shaken(create_model("echogen_tiny"), scale=0.2).eval()
    config = model.config
    text = word_vectors([PROMPT, "a 3 and " + PROMPT], config.text_dim)
    reference = Reference(
        torch.randn(2, config.semantic_length, config.semantic_dim),
        torch.randn(2, config.content_length, config.content_dim),
    )
    inputs = torch.randn(2, config.num_tokens - 1, config.bits)
    told = model.tell(text, None, reference)
    kept = [part.clone() for keys in told.content for part in keys]
    for noise in (inputs, torch.randn_like(inputs)):
        model._whole(noise, told)
    change = max(
        float((one - two).abs().max())
        for one, two in zip(kept, (part for keys in told.content for part in keys), strict=True)
    )
    alone = Reference(None, reference.content)
    loud = model(inputs, text, alone)
    full, middle, none = (model._whole(inputs, one) for one in _corners(model, text, reference))
    guided = model._whole(inputs.repeat(3, 1, 1), model.guided(text, reference)).chunk(3)
    corner = max(
        float((one - two).abs().max()) for one, two in zip(guided, (full, middle, none), strict=True)
    )
    for block in model.blocks:
        block.content_attn.weight.zero_()
    silent = model(inputs, text, alone)
    other = model(inputs, text, Reference(None, reference.content + 1))
    return [
        equals("change of the content's keys and values with the picture", change, 0),
        at_most("the guided copies against each condition alone, largest difference", corner, 1e-4),
        equals(
            "change of the logits with the content where its branch is silent",
            (silent - other).abs().max(),
            0,
        ),
        at_least("the same where it is not", (loud - silent).abs().max(), 0.01),
    ]


def _corners(model: Any, text: Text, reference: Reference) -> list[Any]:
    nothing = model.null_reference(len(text.lengths))
    return [
        model.tell(text, None, reference),
        model.tell(text, None, nothing),
        model.tell(model.null(text.lengths), None, nothing),
    ]
