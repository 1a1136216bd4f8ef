"""What is emitted has the target's law: joint laws by enumeration and G-test, over several rounds of decoding.

Bonferroni: each p-value must exceed 1e-3 over the number of tests here; seeds are fixed.
"""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import verify_chain, verify_jacobi, verify_relaxed, verify_tree
from arcore.ops.speculative import codebook_neighbours
from tests.speculative.cases import ToyModel, count_sequences, distributions, draw_rows, g_test

# A million, as a release deserves, is for the slow runs.
SOME, MANY = 150_000, 1_000_000
SIZES = [SOME, pytest.param(MANY, marks=pytest.mark.slow)]
VOCAB, LENGTH = 4, 3
LEAST_P = 1e-3 / 40
TREE = [-1, -1, -1, 0, 0, 1]


@pytest.fixture(scope="module")
def target() -> ToyModel:
    return ToyModel(VOCAB, LENGTH, seed=1, zeros=0.15)


@pytest.fixture(scope="module")
def draft() -> ToyModel:
    return ToyModel(VOCAB, LENGTH, seed=2, zeros=0.15)


def _append(sequences, ends, emitted):
    """Writes the emitted tokens behind each row's end; what leaves the buffer is dropped."""
    for j in range(emitted.shape[1]):
        place = ends + j
        keep = ((emitted[:, j] >= 0) & (place < sequences.shape[1])).nonzero()[:, 0]
        sequences[keep, place[keep]] = emitted[keep, j]
    return ends + (emitted >= 0).sum(1)


def _decode(propose, n):
    """Rounds of `propose(sequences, ends, offset) -> Verified` until every row has LENGTH tokens."""
    sequences = torch.zeros(n, LENGTH + 8, dtype=torch.int64)
    ends = torch.zeros(n, dtype=torch.int64)
    done = torch.zeros(n, LENGTH, dtype=torch.int64)
    rows = torch.arange(n)
    while len(rows):
        step = propose(sequences, ends, rows)
        assert bool(step.valid.all())
        ends = _append(sequences, ends, step.tokens)
        full = ends >= LENGTH
        done[rows[full]] = sequences[full, :LENGTH]
        sequences, ends, rows = sequences[~full], ends[~full], rows[~full]
    return done


def _check(done, target):
    assert g_test(count_sequences(done, VOCAB), target.joint()) > LEAST_P


def _chain_round(target, draft, count, generator, **options):
    def propose(sequences, ends, rows):
        sequences = sequences.clone()
        p, q, tokens = [], [], []
        for i in range(count):
            p.append(target.rows_at(sequences, ends + i))
            q.append(draft.rows_at(sequences, ends + i))
            tokens.append(draw_rows(q[-1], generator))
            sequences.scatter_(1, (ends + i).unsqueeze(1), tokens[-1].unsqueeze(1))
        p.append(target.rows_at(sequences, ends + count))
        return verify_chain(
            torch.stack(p, 1), torch.stack(tokens, 1), torch.stack(q, 1), seed=rows, offset=ends, **options
        )

    return propose


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("method", ["token", "block"])
def test_chain(target, draft, method, n):
    generator = torch.Generator().manual_seed(3)
    _check(_decode(_chain_round(target, draft, 2, generator, method=method), n), target)


@pytest.mark.parametrize("n", SIZES)
def test_block_in_one_round(target, draft, n):
    """Three drafts and the token after them, so that every accepted length is met with every residual."""
    generator = torch.Generator().manual_seed(4)
    _check(_decode(_chain_round(target, draft, 3, generator, method="block"), n), target)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["without_replacement", "with_replacement", "chosen"])
def test_tree(target, draft, kind, n):
    generator = torch.Generator().manual_seed(5)
    replacement = kind == "with_replacement"

    def propose(sequences, ends, rows):
        batch, nodes = len(rows), len(TREE)
        tokens = torch.zeros(batch, nodes, dtype=torch.int64)
        p, q = torch.zeros(batch, nodes + 1, VOCAB), torch.zeros(batch, nodes, VOCAB)
        p[:, 0], q[:, 0] = target.rows_at(sequences, ends), draft.rows_at(sequences, ends)
        for i, parent in enumerate(TREE):
            weights = q[:, parent + 1].clone()
            if not replacement:
                for j in range(i):
                    if TREE[j] == parent:
                        weights.scatter_(1, tokens[:, j : j + 1], 0.0)
            # Where the draft has no further token, any will do: its probability there is 0.
            weights[weights.sum(1) == 0] = 1.0
            tokens[:, i] = draw_rows(weights, generator)
            after, node, path = sequences.clone(), i, []
            while node >= 0:
                path.insert(0, node)
                node = TREE[node]
            for depth, node in enumerate(path):
                after.scatter_(1, (ends + depth).unsqueeze(1), tokens[:, node : node + 1])
            p[:, i + 1] = target.rows_at(after, ends + len(path))
            if i + 1 < nodes:
                q[:, i + 1] = draft.rows_at(after, ends + len(path))
        chosen = None if kind == "chosen" else q
        return verify_tree(p, tokens, TREE, chosen, seed=rows, offset=ends, replacement=replacement)

    _check(_decode(propose, n), target)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["drawn", "chosen"])
def test_jacobi(target, kind, n):
    """Windows of three that carry their drafts, and the rows these were drawn from, from one iteration to the next."""
    generator = torch.Generator().manual_seed(6)
    window = 2
    state = {
        "drafts": torch.randint(VOCAB, (n, window), generator=generator),
        "rows": torch.full((n, window, VOCAB), 1.0 / VOCAB),
        "ids": torch.arange(n),
    }

    def propose(sequences, ends, rows):
        keep = torch.isin(state["ids"], rows)  # rows that finished in the last iteration leave
        drafts, q = state["drafts"][keep], state["rows"][keep]
        sequences = sequences.clone()
        p = [target.rows_at(sequences, ends)]
        for i in range(window):
            sequences.scatter_(1, (ends + i).unsqueeze(1), drafts[:, i : i + 1])
            p.append(target.rows_at(sequences, ends + i + 1))
        p = torch.stack(p, 1)
        step = verify_jacobi(p, drafts, q if kind == "drawn" else None, seed=rows, offset=ends)
        left = window - step.accepted
        index = (step.accepted.unsqueeze(1) + 1 + torch.arange(window)).clamp(max=window)
        new = torch.arange(window) >= left.unsqueeze(1)  # places that enter the window now
        q = p.gather(1, index.unsqueeze(2).expand(-1, -1, VOCAB)).masked_fill(new.unsqueeze(2), 1.0 / VOCAB)
        filler = torch.randint(VOCAB, new.shape, generator=generator)
        assert bool(((step.drafts >= 0) == ~new).all())
        state.update(drafts=torch.where(new, filler, step.drafts), rows=q, ids=rows)
        return step

    _check(_decode(propose, n), target)


def test_the_g_test_finds_a_wrong_rule(target, draft):
    """The same decoding with the draft's rows handed over as those of another model is far from the target."""
    generator = torch.Generator().manual_seed(7)
    other = ToyModel(VOCAB, LENGTH, seed=9)
    honest = _chain_round(target, draft, 2, generator)

    def propose(sequences, ends, rows):
        step = honest(sequences, ends, rows)
        wrong = draw_rows(other.rows_at(sequences, ends), generator)
        first = torch.where(torch.rand(len(rows), generator=generator) < 0.02, wrong, step.tokens[:, 0])
        return step._replace(tokens=torch.cat([first.unsqueeze(1), step.tokens[:, 1:]], 1))

    assert g_test(count_sequences(_decode(propose, SOME), VOCAB), target.joint()) < 1e-12


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("vocab", [2, 20])
def test_acceptance_rate_is_the_overlap(vocab, n):
    p = distributions(1, 2, vocab, seed=10).expand(n, -1, -1)
    q = distributions(1, 1, vocab, seed=11).expand(n, -1, -1)
    tokens = draw_rows(q[:, 0], torch.Generator().manual_seed(12))
    rate = (
        verify_chain(p, tokens.unsqueeze(1), q, seed=torch.arange(n), offset=0)
        .accepted.double()
        .mean()
        .item()
    )
    expected = torch.minimum(p[0, 0], q[0, 0]).double().sum().item()
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_block_accepts_at_least_as_much():
    """In expectation; here also by more than chance can explain."""
    n, count, vocab = 200_000, 4, 8
    p = distributions(n, count + 1, vocab, seed=13)
    q = distributions(n, count, vocab, seed=14)
    generator = torch.Generator().manual_seed(15)
    tokens = torch.stack([draw_rows(q[:, i], generator) for i in range(count)], 1)
    accepted = {
        method: verify_chain(p, tokens, q, seed=torch.arange(n), offset=3, method=method).accepted.double()
        for method in ("token", "block")
    }
    gain = accepted["block"] - accepted["token"]
    assert gain.mean().item() > 4 * gain.std().item() / math.sqrt(n)


def test_block_of_one_draft_is_token_verification():
    """Same coin, same residual."""
    n = 5000
    p, q = distributions(n, 2, 6, seed=16), distributions(n, 1, 6, seed=17)
    tokens = draw_rows(q[:, 0], torch.Generator().manual_seed(18)).unsqueeze(1)
    one = verify_chain(p, tokens, q, seed=torch.arange(n), offset=0)
    other = verify_chain(p, tokens, q, seed=torch.arange(n), offset=0, method="block")
    assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("bound", "delta"), [("additive", 0.25), ("multiplicative", 1.5)])
def test_relaxed_emits_the_relaxed_target(bound, delta, n):
    """For one chosen proposal x the emitted token has the law p', and TV(p', p) is at most delta, or delta * p(x)."""
    vocab = 12
    neighbours = codebook_neighbours(torch.randn(vocab, 2, generator=torch.Generator().manual_seed(19)), 8)
    for x in (0, 5):
        p = distributions(1, 2, vocab, seed=20 + x, sharpness=1.0).expand(n, -1, -1)
        step = verify_relaxed(
            p, torch.full((n, 1), x), neighbours, seed=torch.arange(n), offset=0, delta=delta, bound=bound
        )
        exact = p[0, 0].double()
        most = delta if bound == "additive" else delta * exact[x].item()
        relaxed, mass = exact.clone(), 0.0
        for other in neighbours[x].tolist():
            if mass + exact[other].item() > most:
                break
            mass += exact[other].item()
            relaxed[x] += exact[other]
            relaxed[other] = 0.0
        assert 0.0 < mass < 1.0 - exact[x].item()
        distance = 0.5 * (relaxed - exact).abs().sum().item()
        assert distance == pytest.approx(mass)
        assert distance <= most
        counts = torch.bincount(step.tokens[:, 0], minlength=vocab)
        assert g_test(counts, relaxed) > LEAST_P
        assert g_test(counts, exact) < 1e-12
        assert torch.equal(step.accepted == 1, step.tokens[:, 0] == x)


@pytest.mark.parametrize("drawn", [False, True])
def test_delta_does_not_bound_what_is_emitted(drawn):
    """Each proposal may take 0.1 from its neighbour. If every proposal does, all of the target is moved."""
    half, delta = 10, 0.21
    target = torch.cat([torch.full((half,), 1.0 / half), torch.zeros(half)])
    proposals = torch.cat([torch.zeros(half), torch.full((half,), 1.0 / half)])
    neighbours = ((torch.arange(2 * half) + half) % (2 * half)).unsqueeze(1)
    n = 20_000
    if drawn:
        tokens = draw_rows(proposals.expand(n, -1), torch.Generator().manual_seed(21)).unsqueeze(1)
        step = verify_relaxed(
            target.expand(n, 2, -1), tokens, neighbours, None, proposals.expand(n, 1, -1),
            seed=torch.arange(n), offset=0, delta=delta,
        )  # fmt: skip
    else:
        # The ten tokens that the target never emits, as siblings. Rejections leave 9, 8, ... tokens; from the seventh
        # sibling on one of these has more than delta.
        tokens = torch.arange(half, 2 * half).expand(n, -1)
        step = verify_relaxed(
            target.expand(n, half + 1, -1), tokens, neighbours, [-1] * half,
            seed=torch.arange(n), offset=0, delta=delta,
        )  # fmt: skip
    # The total variation distance from the target is the share of tokens that the target never emits.
    moved = (step.tokens[:, 0] >= half).double().mean().item()
    assert moved == 1.0 if drawn else abs(moved - 0.6) < 0.02
