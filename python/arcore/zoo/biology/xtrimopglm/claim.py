"""What `arcore check xtrimopglm` measures: the example of GLM's own code, what sees what, brackets from both sides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, shaken, steps
from arcore.zoo.biology.xtrimopglm.blanks import IGNORED, Blanked, blank


def brackets(count: int, pairs: int, generator: torch.Generator) -> Tensor:
    """Balanced texts of four kinds of brackets, as residues 1 to 8 of the protein vocabulary: `[count, 2 pairs]`."""
    rows = []
    for _ in range(count):
        stack: list[int] = []
        row: list[int] = []
        while len(row) < 2 * pairs:
            room = 2 * pairs - len(row) > len(stack)
            if not stack or (room and float(torch.rand((), generator=generator)) < 0.5):
                stack.append(int(torch.randint(4, (), generator=generator)))
                row.append(1 + stack[-1])
            else:
                row.append(5 + stack.pop())
        rows.append(row)
    return torch.tensor(rows)


def bracket_accuracy(infill: bool, *, count: int, seed: int = 0) -> float:
    """Share of blanked brackets that are filled rightly, by blank infilling or by a language model from the left."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = create_model("xtrimopglm_tiny")
    specials = model.vocabulary.specials
    special: Any = {"mask": specials.span_mask, "sop": specials.sop, "eop": specials.eop}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=count, pct_start=0.1)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        texts = brackets(size, 6, generator)
        return texts, torch.randint(texts.shape[1], (size,), generator=generator)

    def logits_and_targets(texts: Tensor, places: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        if infill:
            rows = [
                blank(t, [(p, p + 1)], **special)
                for t, p in zip(texts.tolist(), places.tolist(), strict=True)
            ]
            one = Blanked(*(torch.stack(part) for part in zip(*rows, strict=True)))
            targets = one.targets if train else one.targets.masked_fill(one.targets == specials.eop, IGNORED)
            return model(one.ids, one.positions, one.prefix), targets
        ids = torch.cat([torch.full_like(texts[:, :1], specials.start), texts], 1)[:, :-1]
        positions = torch.stack([torch.arange(ids.shape[1]), torch.zeros(ids.shape[1], dtype=torch.int64)])
        keep = torch.arange(texts.shape[1]) == places.unsqueeze(1)
        targets = texts if train else texts.masked_fill(~keep, IGNORED)
        return model(ids, positions.expand(len(ids), -1, -1), 0), targets

    for _ in steps(count, "training on brackets"):
        logits, targets = logits_and_targets(*batch(64), True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    with torch.no_grad():
        logits, targets = logits_and_targets(*batch(1000), False)
    which = targets != IGNORED
    return float((logits.argmax(-1) == targets)[which].float().mean())


@torch.no_grad()
def _exact_rows(name: str) -> list[Row]:
    """What part A and earlier spans see, a prefix of nothing and of everything, and steps with a cache."""
    model: Any = shaken(create_model(name)).eval()
    specials = model.vocabulary.specials
    text = torch.randint(1, 20, (16,)).tolist()
    one = blank(text, [(9, 12), (3, 5)], mask=specials.span_mask, sop=specials.sop, eop=specials.eop)
    ids, positions, prefix = one.ids[None], one.positions[None], int(one.prefix)
    whole = model(ids, positions, prefix)
    other = ids.clone()
    other[0, prefix + 4 :] = 21
    change = (model(other, positions, prefix) - whole).abs().amax(-1)[0]
    causal, left = model(ids, positions, 0), model(ids[:, :5], positions[:, :, :5], 0)
    encoder = model(ids, positions, ids.shape[1])
    cache = model.make_cache(1, ids.shape[1])
    steps_ = [model.read(ids[:, :prefix], positions[..., :prefix], cache)]
    steps_ += [
        model.read(ids[:, i : i + 1], positions[..., i : i + 1], cache) for i in range(prefix, ids.shape[1])
    ]
    apart = (torch.stack(steps_, 1) - whole[:, prefix - 1 :]).abs().max()
    return [
        at_most(
            f"{name}: change of part A and of the first span when the second is another",
            change[: prefix + 4].max(),
            0,
        ),
        at_most(f"{name}: prefix 0 against the left part alone", (causal[:, :5] - left).abs().max(), 1e-5),
        at_least(f"{name}: change by a prefix of everything", (encoder - whole)[:, prefix].abs().max(), 1e-3),
        at_most(f"{name}: one pass against steps", apart, 1e-5),
    ]


GOLDEN = (
    [900, 1, 901, 4, 5, 901, 7, 8, 904, 6, 904, 2, 3],
    [6, 905, 2, 3, 905],
    [[0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 2, 3]],
)


def claim(*, quick: bool) -> Claim:
    """GLM's own example of a text with blanks; what sees what; in full, brackets filled from both sides."""
    one = blank([900, *range(1, 9)], [(6, 7), (2, 4)], mask=901, sop=904, eop=905)
    wrong = sum(a != b for a, b in zip(one.ids.tolist(), GOLDEN[0], strict=True))
    wrong += sum(a != b for a, b in zip(one.targets.tolist()[8:], GOLDEN[1], strict=True))
    wrong += int((one.positions != torch.tensor(GOLDEN[2])).sum()) + abs(int(one.prefix) - 8)
    rows = [equals("entries of the example that differ from GLM's own code", wrong, 0)]
    for name in ("xtrimopglm_tiny", "xtrimopglm_deep_tiny", "glm_tiny"):
        rows += _exact_rows(name)
    if not quick:
        both, left = (bracket_accuracy(infill, count=500) for infill in (True, False))
        rows.append(
            at_least("brackets filled rightly from both sides less those from the left", both - left, 0.2)
        )
    return Claim(tuple(rows))
