"""Masks are exact; with training, the causal model of all tokens predicts them best."""

from __future__ import annotations

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, Row, at_least, at_most, equals
from arcore.masks import prefix_lm
from arcore.zoo.language.compare_objectives.model import START, Model, Pair, make_pair
from arcore.zoo.language.compare_objectives.study import Options, compare, figure_of


def claim(*, quick: bool) -> Claim:
    """Masks; in full all nine trained on the Bible for equal steps."""
    if quick:
        small = Options(steps=2, multitask=0, context=24, batch=2, dim=16, layers=1, heads=2)
        return Claim(tuple(_exact_rows()), draw=figure_of(compare(small)), size=(7.0, 4.0))
    grid = compare(Options())
    others = min(
        entry.next_token for name, entry in grid.entries.items() if name[1] != "FLM" or name[0] == "ED"
    )
    best = grid.entries["CD", "FLM"].next_token
    rows = [
        *_exact_rows(),
        at_most("next-byte loss of CD:FLM less the least of the others", best - others, 0.0),
    ]
    return Claim(tuple(rows), draw=figure_of(grid), size=(7.0, 4.0))


@torch.no_grad()
def _exact_rows() -> list[Row]:
    """CD and ND of the same weights, and what a prefix sees."""
    torch.manual_seed(0)
    one, other = (Model(kind, dim=32, layers=2, heads=4) for kind in ("CD", "ND"))
    other.load_state_dict(one.state_dict())
    texts = torch.randint(256, (2, 20))
    generator = torch.Generator().manual_seed(0)
    flm = make_pair("FLM", texts, generator)
    same = (one(flm) - other(flm)).abs().max()
    pair = Pair(torch.cat([torch.full((2, 1), START), texts[:, :9]], 1), texts[:, 9:])
    changed = pair.inputs.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256

    def first(model: Model, inputs: Tensor, prefix: int) -> Tensor:
        hidden: Tensor = model.decoder(model.embedding(inputs), prefix_lm(inputs.shape[1], prefix))[:, 0]
        return hidden

    seen = (first(other, pair.inputs, 10) - first(other, changed, 10)).abs().max()
    unseen = (first(one, pair.inputs, 0) - first(one, changed, 0)).abs().max()
    return [
        equals("ND without a prefix against CD, largest difference", same, 0),
        at_least("change of the first state of a prefix by its last token", seen, 1e-6),
        equals("the same in CD", unseen, 0),
    ]
