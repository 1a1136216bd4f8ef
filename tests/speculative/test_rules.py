"""Each rule's own promises: edges of acceptance, greedy limits, relaxation, and the paths of published loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from arcore.ops import (
    codebook_neighbours,
    verify_chain,
    verify_jacobi,
    verify_relaxed,
    verify_tree,
    verify_typical,
)
from tests.speculative.cases import TREE, calls, distributions, make_case

NONE = torch.zeros(1, 0, dtype=torch.int64)


def _rows(*rows):
    return torch.tensor([list(map(list, rows))], dtype=torch.float32)


def test_nothing_impossible_is_emitted_and_nothing_possible_refused():
    n = 20_000
    seeds = torch.arange(n)
    p = _rows([0.5, 0.5, 0.0], [0.0, 0.0, 1.0])
    # The draft could not have made this proposal, the target can: it stands.
    q = _rows([0.0, 0.5, 0.5])
    step = verify_chain(
        p.expand(n, -1, -1), torch.zeros(n, 1).long(), q.expand(n, -1, -1), seed=seeds, offset=0
    )
    assert bool((step.accepted == 1).all())
    # The target cannot make this one: it never stands, and the residual is 0.5, 0.
    tokens = torch.full((n, 1), 2)
    for method in ("token", "block"):
        step = verify_chain(
            p.expand(n, -1, -1), tokens, q.expand(n, -1, -1), seed=seeds, offset=0, method=method
        )
        assert bool((step.accepted == 0).all())
        assert bool((step.tokens[:, 0] == 0).all())
    # Neither could: refused.
    both = _rows([0.0, 1.0, 0.0])
    step = verify_chain(p.expand(n, -1, -1), tokens, both.expand(n, -1, -1), seed=seeds, offset=0)
    assert bool((step.accepted == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_distributions_accept_everything(dtype):
    n = 20_000
    p = distributions(1, 4, 20, seed=1, zeros=0.2).to(dtype).expand(n, -1, -1)
    tokens = torch.stack([torch.multinomial(p[0, i].float(), n, replacement=True) for i in range(3)], 1)
    for method in ("token", "block"):
        step = verify_chain(p, tokens, p[:, :3], seed=torch.arange(n), offset=0, method=method)
        assert bool((step.accepted == 3).all())
        assert bool((step.tokens[:, :3] == tokens).all())


def test_a_residual_without_mass_falls_back_to_the_target():
    """Rounding can leave p below q everywhere; here the rows are far from normalised to make that frequent."""
    n = 20_000
    p, q = _rows([0.25, 0.25, 0.0], [1.0, 0.0, 0.0]), _rows([0.5, 0.5, 0.0])
    tokens = torch.zeros(n, 2).long()
    for kind in ("chain", "block", "tree"):
        if kind == "tree":
            rows = p[:, [0, 1, 1]].expand(n, -1, -1)
            step = verify_tree(
                rows, tokens, [-1, -1], q[:, [0, 0]].expand(n, -1, -1), seed=torch.arange(n), offset=0
            )
        else:
            step = verify_chain(
                p.expand(n, -1, -1), tokens[:, :1], q.expand(n, -1, -1), seed=torch.arange(n), offset=0,
                method="block" if kind == "block" else "token",
            )  # fmt: skip
        assert bool(step.valid.all())
        rejected = step.tokens[step.accepted == 0, 0]
        assert abs(len(rejected) / n - 0.5) < 0.02
        assert abs((rejected == 0).double().mean().item() - 0.5) < 0.02
        assert bool((rejected < 2).all())


def test_coin_and_residual_are_independent():
    """Of rejected proposals the coin was high; the residual's draw must not know."""
    n = 200_000
    p, q = _rows([0.2, 0.4, 0.4], [1, 0, 0]), _rows([0.8, 0.1, 0.1])
    step = verify_chain(
        p.expand(n, -1, -1), torch.zeros(n, 1).long(), q.expand(n, -1, -1), seed=torch.arange(n), offset=0
    )
    rejected = step.tokens[step.accepted == 0, 0]
    share = (rejected == 1).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(rejected))


@pytest.mark.parametrize("parents", [[-1, 0, 1, 2], TREE], ids=["chain", "tree"])
def test_chosen_proposals_are_plain_sampling_bit_by_bit(parents):
    """Whatever is proposed, the emitted tokens are the draws that plain sampling makes at these positions."""
    case = make_case(500, 6, parents=parents)
    step = verify_tree(case.target, case.tokens, parents, seed=case.seed, offset=case.offset)
    assert step.accepted.max() >= 3
    for b in range(500):
        nodes = [-1, *step.path[b, : step.accepted[b]].tolist()]
        for i, node in enumerate(nodes):
            plain = verify_chain(
                case.target[b : b + 1, node + 1 : node + 2], NONE, seed=case.seed[b : b + 1],
                offset=case.offset[b : b + 1] + i,
            )  # fmt: skip
            assert plain.tokens[0, 0] == step.tokens[b, i]
    if parents is not TREE:
        chain = verify_chain(case.target, case.tokens, seed=case.seed, offset=case.offset)
        assert torch.equal(chain.tokens, step.tokens)


def test_a_chain_is_a_tree():
    case = make_case(300, parents=[-1, 0, 1, 2])
    keywords = {"seed": case.seed, "offset": case.offset}
    chain = verify_chain(case.target, case.tokens, case.draft, **keywords)
    tree = verify_tree(case.target, case.tokens, case.parents, case.draft, **keywords)
    for a, b in zip(chain, tree, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("bound", ["additive", "multiplicative"])
def test_delta_zero_is_exact(drawn, bound):
    case = make_case(2000, 12, zeros=0.4)
    draft = case.draft if drawn else None
    keywords = {"seed": case.seed, "offset": case.offset}
    exact = verify_tree(case.target, case.tokens, case.parents, draft, **keywords)
    relaxed = verify_relaxed(
        case.target, case.tokens, case.neighbours, case.parents, draft, delta=0.0, bound=bound, **keywords
    )
    for a, b in zip(exact, relaxed, strict=True):
        assert torch.equal(a, b)


def test_the_released_residual_is_not_exact_even_for_delta_zero():
    """Neighbours that the target rules out add up to 0 <= delta; a rejection then discards all stored ones."""
    p = _rows([0.4, 0.3, 0.3, 0.0], [1, 0, 0, 0])
    neighbours = torch.tensor([[3, 1, 2]] * 3 + [[0, 1, 2]])  # of token 0: first 3, which p rules out
    n = 50_000
    arguments = (p.expand(n, -1, -1), torch.zeros(n, 1).long(), neighbours)
    keywords = {"seed": torch.arange(n), "offset": 0, "delta": 0.0, "k": 1}
    ours = verify_relaxed(*arguments, **keywords)
    released = verify_relaxed(*arguments, residual="released", **keywords)
    assert abs((ours.tokens[:, 0] == 1).double().mean().item() - 0.3) < 0.01
    # Discarded: 0, its neighbour 3, and the one after it, 1. All that is left is 2.
    assert not bool((released.tokens[:, 0] == 1).any())
    assert abs((released.tokens[:, 0] == 2).double().mean().item() - 0.6) < 0.01


def test_the_released_residual_is_uniform_when_nothing_is_left():
    p = _rows([0.5, 0.5, 0.0, 0.0], [1, 0, 0, 0])
    neighbours = torch.tensor([[2, 1, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    n = 40_000
    step = verify_relaxed(
        p.expand(n, -1, -1), torch.zeros(n, 1).long(), neighbours,
        seed=torch.arange(n), offset=0, delta=0.1, residual="released",
    )  # fmt: skip
    rejected = step.tokens[step.accepted == 0, 0]
    assert abs(len(rejected) / n - 0.5) < 0.02
    share = torch.bincount(rejected, minlength=4) / len(rejected)
    assert bool((share - 0.25).abs().max() < 0.02)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("bound", ["additive", "multiplicative"])
def test_acceptance_never_falls_with_delta_or_k(drawn, bound):
    """Row by row, not on average: the coins are the same."""
    case = make_case(3000, 16, parents=[-1, 0, 1, 2])
    draft = case.draft if drawn else None

    def accepted(delta, k):
        return verify_relaxed(
            case.target, case.tokens, case.neighbours, None, draft,
            seed=case.seed, offset=case.offset, delta=delta, k=k, bound=bound,
        ).accepted  # fmt: skip

    for settings in (
        [(d, 12) for d in (0.0, 0.05, 0.1, 0.3, 0.8, 2.0)],
        [(0.5, k) for k in (0, 1, 2, 5, 12)],
    ):
        lengths = [accepted(*s) for s in settings]
        for less, more in itertools.pairwise(lengths):
            assert bool((more >= less).all())
        assert bool((lengths[-1] > lengths[0]).any())


def test_neighbours_of_a_codebook():
    codebook = torch.randn(37, 4, dtype=torch.float64)
    codebook[20] = codebook[3]  # equal entries are neighbours of each other, at distance 0
    table = codebook_neighbours(codebook, 36, rows=10)
    assert table.dtype == torch.int32
    distance = torch.cdist(codebook.float(), codebook.float())
    for i in range(37):
        assert i not in table[i].tolist()
        assert sorted(table[i].tolist()) == [j for j in range(37) if j != i]
        along = distance[i, table[i].long()]
        assert bool((along[1:] >= along[:-1] - 1e-5).all())
    assert table[3, 0] == 20
    assert codebook_neighbours(codebook, 0).shape == (37, 0)
    assert codebook_neighbours(codebook[:1], 0).shape == (1, 0)


def test_greedy_rows_verify_greedily():
    """One-hot rows, the limit of temperature 0: all rules take exactly the tokens that are the likeliest."""
    case = make_case(400, 5, parents=TREE)
    best = case.target.argmax(-1)
    greedy = torch.zeros_like(case.target).scatter_(2, best.unsqueeze(2), 1.0)
    expected = verify_tree(greedy, case.tokens, TREE, seed=0, offset=0)
    for b in range(400):
        node, path = -1, []
        while True:
            hits = [i for i, p in enumerate(TREE) if p == node and case.tokens[b, i] == best[b, node + 1]]
            if not hits:
                break
            node = hits[0]
            path.append(node)
        assert expected.path[b, : expected.accepted[b]].tolist() == path
        assert expected.tokens[b, expected.accepted[b]] == best[b, node + 1]
    sharp = (case.target.double().clamp(min=1e-30).log() / 1e-7).softmax(-1).float()
    typical = verify_typical(sharp, case.tokens, TREE)
    assert torch.equal(typical.tokens, expected.tokens)
    assert torch.equal(typical.accepted, expected.accepted)


def _medusa(target, tokens, parents, epsilon, delta):
    """Medusa's evaluation written over candidate paths, as in the paper: every root-to-leaf path, then the best one."""
    children = {p: [i for i, q in enumerate(parents) if q == p] for p in range(-1, len(parents))}
    leaves = [i for i in range(len(parents)) if not children[i]]
    paths = []
    for leaf in leaves:
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    best, best_key = [], (0, 0.0)
    for path in paths:
        kept, score = [], 0.0
        for node in path:
            p = target[parents[node] + 1].double()
            entropy = -(p * (p + 1e-5).log()).sum()
            if not p[tokens[node]] > min(epsilon, delta * math.exp(-entropy)):
                break
            kept.append(node)
            score += math.log(p[tokens[node]])
        if kept and (len(kept), score) > best_key:
            best, best_key = kept, (len(kept), score)
    return best


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 0.09), (0.2, 2.0), (0.0, 0.0), (1.0, 1.0)])
def test_typical_is_medusas_rule(epsilon, delta):
    case = make_case(300, 12)
    step = verify_typical(case.target, case.tokens, TREE, epsilon=epsilon, delta=delta)
    for b in range(300):
        path = _medusa(case.target[b], case.tokens[b], TREE, epsilon, delta)
        assert step.path[b, : step.accepted[b]].tolist() == path
        row = path[-1] + 1 if path else 0
        assert step.tokens[b, step.accepted[b]] == case.target[b, row].argmax()


def test_typical_golden():
    """Two tokens of 0.5: threshold min(0.09, 0.3 / 2) = 0.09; eight equal ones: min(0.09, 0.3 / 8) = 0.0375."""
    two, eight = [0.5, 0.5, 0, 0, 0, 0, 0, 0], [0.125] * 8
    rare = [0.92, 0.08, 0, 0, 0, 0, 0, 0]
    step = verify_typical(_rows(two, eight, rare, two), torch.tensor([[1, 4, 1]]))
    # 0.5 > 0.09, 0.125 > 0.0375, 0.08 < min(0.09, 0.3 exp(-0.279)).
    assert step.tokens.tolist() == [[1, 4, 0, -1]]
    assert step.path.tolist() == [[0, 1, -1]]


def test_typical_padding_is_never_lucky():
    """A padding node stands for no token, not even for token 0 or the likeliest one."""
    case = make_case(200, 5)
    case.tokens[:, 4:] = -1
    step = verify_typical(case.target, case.tokens, TREE, epsilon=0.0, delta=0.0)
    assert step.accepted.max() == 2
    assert bool((step.path < 4).all())


class GreedyToy:
    """A deterministic model: the next token is a hash of all that came before."""

    def __init__(self, vocab):
        self.vocab = vocab

    def next(self, prefix):
        return sum((i + 3) * (t + 1) ** 2 for i, t in enumerate(prefix[-2:])) % self.vocab

    def one_hot(self, prefix):
        row = torch.zeros(self.vocab)
        row[self.next(prefix)] = 1.0
        return row


def test_greedy_jacobi_is_jacobi_iteration():
    """One-hot rows: the window's drafts are at each step those of fixed-point iteration, and the text is greedy's."""
    toy, window, length = GreedyToy(7), 4, 40
    greedy = [0, 1]
    while len(greedy) < length:
        greedy.append(toy.next(greedy))
    text, drafts = [0, 1], [0] * window
    rows = torch.full((window, 7), 1 / 7)
    iterations = 0
    while len(text) < length:
        sequence = text + drafts
        p = torch.stack([toy.one_hot(sequence[: len(text) + i]) for i in range(window + 1)])
        # Jacobi: every place takes the token that follows what stands before it; a draft stands if it stays.
        jacobi = p.argmax(-1).tolist()
        same = [a == b for a, b in zip(drafts, jacobi, strict=False)]
        stand = same.index(False) if False in same else window
        step = verify_jacobi(p[None], torch.tensor([drafts]), rows[None], seed=5, offset=len(text))
        # A uniform row for a new place accepts what the target allows: still the greedy token.
        assert step.accepted.item() == stand
        emitted = step.tokens[0, : stand + 1].tolist()
        assert emitted == jacobi[: stand + 1]
        left = window - stand
        assert step.drafts[0].tolist() == jacobi[stand + 1 :] + [-1] * stand
        text += emitted
        drafts = step.drafts[0, :left].tolist() + [0] * stand
        rows = torch.cat([p[stand + 1 :], torch.full((stand, 7), 1 / 7)])
        iterations += 1
    assert text[:length] == greedy
    assert iterations < length - 2


def test_jacobi_window_of_one_is_plain_sampling():
    case = make_case(500, parents=[])
    step = verify_jacobi(case.target, case.tokens, case.draft, seed=case.seed, offset=case.offset)
    plain = verify_chain(case.target, case.tokens, seed=case.seed, offset=case.offset)
    assert torch.equal(step.tokens, plain.tokens)
    assert step.drafts.shape == (500, 0)


def test_jacobi_emits_what_a_chain_does():
    case = make_case(300, parents=[-1, 0, 1, 2])
    keywords = {"seed": case.seed, "offset": case.offset}
    step = verify_jacobi(case.target, case.tokens, case.draft, **keywords)
    chain = verify_chain(case.target, case.tokens, case.draft, **keywords)
    for a, b in zip(step[:4], chain, strict=True):
        assert torch.equal(a, b)
    # Fresh drafts are what plain sampling draws at their positions.
    for b in range(300):
        for j in range(4 - int(step.accepted[b])):
            row = int(step.accepted[b]) + 1 + j
            plain = verify_chain(
                case.target[b : b + 1, row : row + 1], NONE,
                seed=case.seed[b : b + 1], offset=case.offset[b : b + 1] + row,
            )  # fmt: skip
            assert plain.tokens[0, 0] == step.drafts[b, j]


@pytest.mark.parametrize("rule", list(calls()))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, None])
def test_bad_rows_are_marked_and_hurt_nobody(rule, bad):
    """None: a row without mass."""
    parents = [-1, 0, 1] if rule.startswith(("chain", "jacobi")) else None
    case = make_case(8, parents=parents)
    kernel = calls()[rule]
    keywords = {"seed": case.seed, "offset": case.offset}
    good = kernel(case, **keywords)
    for row in (0, 3):
        case.target[row] = 0.0
        if bad is not None:
            case.target[row] = bad
    step = kernel(case, **keywords)
    touched = torch.tensor([i in (0, 3) for i in range(8)])
    if rule == "typical" and bad is None:
        # Nothing is likely enough, and the likeliest of equal tokens is the first one.
        touched[:] = False
    assert torch.equal(step.valid, ~touched)
    keep = (
        ~touched
        if bad is not None or rule != "typical"
        else torch.tensor([i not in (0, 3) for i in range(8)])
    )
    for a, b in zip(step, good, strict=True):
        assert torch.equal(a[keep], b[keep])
    assert bool((step.tokens[touched] == -1).all())
    assert bool((step.path[touched] == -1).all())
    assert bool((step.accepted[touched] == 0).all())
    reference = calls(reference=True)[rule](case, **keywords)
    for a, b in zip(step, reference, strict=True):
        assert torch.equal(a, b)


def test_a_nan_that_is_never_read_does_no_harm():
    """Row 1 is only read if draft 0 stands."""
    p = _rows([1.0, 0.0], [math.nan, math.nan])
    refused = verify_chain(p, torch.tensor([[1]]), _rows([0.5, 0.5]), seed=0, offset=0)
    assert refused.valid.item()
    assert refused.tokens.tolist() == [[0, -1]]
    accepted = verify_chain(p, torch.tensor([[0]]), _rows([0.5, 0.5]), seed=0, offset=0)
    assert not accepted.valid.item()
    assert accepted.tokens.tolist() == [[-1, -1]]
