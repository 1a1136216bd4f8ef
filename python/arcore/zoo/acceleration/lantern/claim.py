"""The check of the claim."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, steps
from arcore.decoding import AboveDrafter, ModelDrafter, TreeShape, exact, relaxed, speculative_tree
from arcore.decoding.laws import small_model
from arcore.ops import verify_relaxed
from arcore.ops.speculative import codebook_neighbours
from arcore.zoo.acceleration._common import digit_codes, train_raster
from arcore.zoo.acceleration.lantern.drafter import FeatureDrafter, config_for, feature_loss
from arcore.zoo.acceleration.lantern.relax import relaxed_target


def claim(*, quick: bool) -> Claim:
    """One drawn draft against random codebooks, in closed form and by the op; exactness at delta 0 on texts."""
    vocab, count, near_count = 64, 20 if quick else 200, 10
    codes = torch.randn(vocab, 4)
    near = codebook_neighbours(codes, near_count)
    p = (1.5 * torch.randn(count, vocab)).softmax(-1)
    q = (p.log() + torch.randn(count, vocab)).softmax(-1)
    accepted, largest, emitted = {}, 0.0, {}
    for delta in (0.0, 0.05, 0.1, 0.2):
        target = relaxed_target(p, near, delta)
        own = target.diagonal(dim1=-2, dim2=-1)
        chance = (own / q).clamp(max=1.0)
        accepted[delta] = float((q * chance).sum(-1).mean())
        distance = 0.5 * (target - p.unsqueeze(-2)).abs().sum(-1).max()
        largest = max(largest, float(distance) - delta)
        rest = (target - q.unsqueeze(-2)).clamp(min=0)
        rest = rest / rest.sum(-1, keepdim=True).clamp(min=1e-30)
        law = q * chance + ((q * (1 - chance)).unsqueeze(-1) * rest).sum(-2)
        emitted[delta] = float(0.5 * (law - p).abs().sum(-1).mean())
    tries = 2000 if quick else 20000
    drafts = q[:1].expand(tries, -1).multinomial(1)
    found = verify_relaxed(
        torch.stack([p[:1], p[:1]], 1).expand(tries, 2, vocab).contiguous(),
        drafts,
        near,
        draft_probs=q[:1].unsqueeze(1).expand(tries, 1, vocab).contiguous(),
        seed=torch.arange(tries),
        offset=0,
        delta=0.1,
    )
    own = relaxed_target(p[:1], near, 0.1).diagonal(dim1=-2, dim2=-1)
    expected = float((q[:1] * (own / q[:1]).clamp(max=1)).sum())
    error = abs(float(found.accepted.double().mean()) - expected)
    model = small_model(11)
    drafter = ModelDrafter(small_model(11, seed=2, layers=1), shape=TreeShape.full(3, 2))
    texts = [
        speculative_tree(model, drafter, [[1, 2], [3]], max_new_tokens=30, seed=3, verify=verify).ids
        for verify in (exact(), relaxed(codebook_neighbours(torch.randn(11, 3), 5), delta=0.0))
    ]
    rises = min(b - a for a, b in pairwise(accepted.values()))
    images = () if quick else _on_images()
    return Claim(
        (
            equals("tokens that delta 0 changes", int((texts[0] != texts[1]).sum()), 0),
            at_most("total variation of the emitted law at delta 0", emitted[0.0], 1e-5),
            at_least("least rise of the acceptance from one delta to the next", rises, 0.0),
            at_least("acceptance at delta 0.2 over that at 0", accepted[0.2] / accepted[0.0], 1.2),
            at_most("excess of a relaxed target's total variation over delta", largest, 1e-5),
            at_least("total variation of the emitted law at delta 0.1: not bounded by it", emitted[0.1], 0.1),
            at_most("error of the op's acceptance rate", error, 4 * 0.5 / tries**0.5),
            *images,
        )
    )


def _on_images(count: int = 600) -> tuple[Row, ...]:
    """Digits of four grey levels with a trained drafter: tokens per call under each rule, and what delta 0 writes."""
    model = train_raster(count)
    codes, labels = digit_codes("train")
    drafter: Any = FeatureDrafter(config_for(model))  # type: ignore[abstract]
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=2e-3)
    for _ in steps(count, "training the drafter"):
        rows = torch.randint(len(codes), (32,))
        ids = torch.cat([model.prompt(labels[rows]), codes[rows]], dim=1)
        loss = feature_loss(drafter, model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drafter.eval().requires_grad_(False)
    # The four grey levels are their own code vectors.
    near = codebook_neighbours(torch.arange(4.0).unsqueeze(1), 3)
    prompt = model.prompt(torch.arange(10).repeat(3))
    rules = {
        "exact": exact(),
        "0": relaxed(near, delta=0.0),
        "0.1": relaxed(near, delta=0.1),
        "0.3": relaxed(near, delta=0.3),
        "++": relaxed(near, delta=1.0, bound="multiplicative"),
    }
    out = {
        name: speculative_tree(
            model, drafter.drafter(model, 8), prompt, max_new_tokens=64, seed=1, verify=rule
        )
        for name, rule in rules.items()
    }
    above = speculative_tree(model, AboveDrafter(8, 8), prompt, max_new_tokens=64, seed=1)
    rate = {name: one.tokens_per_round for name, one in out.items()}
    return (
        equals("codes of digits that delta 0 changes", int((out["exact"].ids != out["0"].ids).sum()), 0),
        at_least("codes per call of digits, trained drafter, exact", rate["exact"], 1.5),
        at_least("the same over drafts that repeat the row above", rate["exact"] / above.tokens_per_round, 1.0),
        at_least("the same at delta 0.1 over exact", rate["0.1"] / rate["exact"], 1.0),
        at_least("the same at delta 0.3 over delta 0.1", rate["0.3"] / rate["0.1"], 1.0),
        at_least("the same with the multiplicative bound (LANTERN++) over exact", rate["++"] / rate["exact"], 1.0),
    )  # fmt: skip
