"""The check of the claim."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.zoo.language.nar.methods import ctc, dag, insertion, levenshtein
from arcore.zoo.language.nar.network import BOS, EOS, MASK, SPECIAL, Batch
from arcore.zoo.language.nar.pairs import PairData, load_pairs, trimmed

# Two targets that are right, each half of the time, of five tokens.
TARGETS = ((0, 1, 2, 3), (1, 2, 3, 4))


def two_target_law(order: list[list[int]], targets: tuple[tuple[int, ...], ...] = TARGETS) -> float:
    """Probability that a target is one of those that are right, when places are drawn by exact conditional laws.

    Args:
        order: places that each call draws, independently of one another given what was drawn before.
        targets: equally likely ones.
    """

    def follow(drawn: dict[int, int], calls: list[list[int]]) -> float:
        if not calls:
            return float(any(all(t[i] == drawn[i] for i in drawn) for t in targets))
        left = [t for t in targets if all(t[i] == token for i, token in drawn.items())]
        if not left:
            return 0.0
        laws = [
            {token: sum(t[i] == token for t in left) / len(left) for token in {t[i] for t in left}}
            for i in calls[0]
        ]
        return sum(
            math.prod(law[token] for law, token in zip(laws, choice, strict=True))
            * follow({**drawn, **dict(zip(calls[0], choice, strict=True))}, calls[1:])
            for choice in itertools.product(*laws)
        )

    return follow({}, order)


def ctc_error() -> float:
    """The loss beside a sum over all paths, in float64."""
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(1, 5, SPECIAL + 2, generator=generator, dtype=torch.float64)
    logs[..., [0, BOS, EOS]] = -1e4
    logs = logs.log_softmax(-1)
    worst = 0.0
    for target in ([4], [4, 5], [5, 5], [4, 5, 4]):
        paths = [p for p in itertools.product([MASK, 4, 5], repeat=5) if ctc.collapse(list(p)) == target]
        total = torch.stack([logs[0, range(5), list(path)].sum() for path in paths]).logsumexp(0)
        lengths = (torch.tensor([5]), torch.tensor([len(target)]))
        found = F.ctc_loss(
            logs.transpose(0, 1), torch.tensor([target]), *lengths, blank=MASK, reduction="none"
        )
        worst = max(worst, abs(float(found + total)))
    return worst


def dag_error() -> float:
    """The dynamic program beside a sum over all paths, in float64."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    lengths = torch.tensor([6, 4])
    scores = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    moves = dag.transitions(scores, lengths)
    target = Batch.of([[4, 6, 5], [5, 4]])
    found = dag.target_logprobs(tokens, moves, lengths, target)
    worst = 0.0
    for row in range(2):
        wanted, last = target.ids[row, : target.lengths[row]].tolist(), int(lengths[row]) - 1
        paths = [(0, *middle, last) for middle in itertools.combinations(range(1, last), len(wanted) - 2)]
        total = torch.stack([_path(tokens[row], moves[row], path, wanted) for path in paths]).logsumexp(0)
        worst = max(worst, abs(float(found[row] - total)))
    return worst


def _path(tokens: Tensor, moves: Tensor, path: tuple[int, ...], wanted: list[int]) -> Tensor:
    said = torch.stack([tokens[place, token] for place, token in zip(path, wanted, strict=True)]).sum()
    return said + torch.stack([moves[a, b] for a, b in itertools.pairwise(path)]).sum()


def insertion_calls(length: int) -> int:
    """Calls until a target stands, when each gap gets the missing token that its weights favour."""
    kept: list[int] = []
    calls = 0
    while len(kept) < length:
        gaps = insertion.gap_weights(kept, length)
        kept = sorted([*kept, *(max(gap, key=lambda one: (one[1], -one[0]))[0] for gap in gaps if gap)])
        calls += 1
    return calls


def edit_error() -> int:
    """Rows that the optimal edits do not turn into the wanted ones, or by more edits than needed."""
    wrong = 0
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        sizes = torch.randint(0, 7, (2,), generator=generator).tolist()
        row, wanted = (torch.randint(4, 7, (n,), generator=generator).tolist() for n in sizes)
        stay, room = levenshtein.edits(row, wanted)
        kept = [token for token, stays in zip(row, stay, strict=True) if stays]
        holes = levenshtein._holes(kept, room)
        filled = [w if hole == MASK else hole for hole, w in zip(holes, wanted, strict=False)]
        longest = max(
            (
                k
                for k in range(min(sizes) + 1)
                for one in itertools.combinations(row, k)
                if _within(one, wanted)
            ),
            default=0,
        )
        wrong += len(holes) != len(wanted) or filled != wanted or sum(stay) != longest
    return wrong


def _within(part: tuple[int, ...], row: list[int]) -> bool:
    rest = iter(row)
    return all(token in rest for token in part)


def train_method(method: str, data: PairData, sizes: tuple[int, int], count: int, **settings: Any) -> Any:
    """A tiny model of a method, trained on pairs for `count` steps."""
    model = create_model("nar_tiny", source_vocab=sizes[0], target_vocab=sizes[1], method=method, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=count, pct_start=0.1)
    for step in steps(count, f"training {method}"):
        rows = torch.randint(len(data), (64,))
        source, target = trimmed(data.sources[rows]), trimmed(data.targets[rows])
        method_of: Any = model.method
        loss, _ = method_of.loss(model, source, target, step / count)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def claim(*, quick: bool) -> Claim:
    """Laws written out; in full also mask-predict and glancing trained on words of the CMU dictionary."""
    together, one_by_one = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    distilled = two_target_law(together, TARGETS[:1])
    rows = [
        equals("right targets of two, one call", two_target_law(together), 0.125),
        equals("the same, mask-predict in two calls", two_target_law([[0, 1], [2, 3]]), 0.5),
        equals("the same, in four calls", two_target_law(one_by_one), 1.0),
        equals("the same, one call after distillation", distilled, 1.0),
        at_most("CTC loss beside a sum over paths, largest difference", ctc_error(), 1e-10),
        at_most("log-probability of a graph beside a sum over paths", dag_error(), 1e-10),
        equals(
            "lengths to 64 that insertion does not write in floor(log2 n) + 1 calls",
            sum(insertion_calls(n) != n.bit_length() for n in range(1, 65)),
            0,
        ),
        equals("rows that optimal edits do not mend", edit_error(), 0),
    ]
    if not quick:
        from arcore.zoo.language.nar.recipe import LONGEST, _tokens, score

        pairs = load_pairs("cmudict", words=5000, held_out=500, longest=LONGEST)
        data = PairData(_tokens(pairs.train, pairs.symbols), LONGEST)
        test = _tokens(pairs.test, pairs.symbols)
        masked = train_method("cmlm", data, pairs.symbols.sizes, 1500)
        glancing = train_method("glat", data, pairs.symbols.sizes, 1500)
        by_calls = {count: score(masked, test, count) for count in (1, 4)}
        rows += [
            at_least("words right in four calls less in one", by_calls[4].exact - by_calls[1].exact, 0.05),
            at_most("calls of the decoder by four", by_calls[4].calls, 4),
            at_least("words right by glancing, one call, less mask-predict's",
                     score(glancing, test).exact - by_calls[1].exact, 0.0),
        ]  # fmt: skip
    return Claim(tuple(rows))
