"""Distributions, drafts and a toy language model shared by the tests of speculative verification."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from arcore.ops import Verified
from arcore.ops import speculative as ops

TREE = [-1, -1, 0, 0, 1, 2, 2, 5]


def distributions(*shape: int, seed: int, sharpness: float = 1.5, zeros: float = 0.0) -> Tensor:
    """Random rows that add up to 1, a fraction `zeros` of their entries exactly 0 (never all)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * sharpness
    gone = torch.rand(shape, generator=generator) < zeros
    gone[..., 0] = False
    return logits.masked_fill(gone, -torch.inf).softmax(-1)


@dataclass
class Case:
    """A batch of drafts with everything that a rule may ask for."""

    target: Tensor
    draft: Tensor
    tokens: Tensor
    parents: Tensor
    neighbours: Tensor
    seed: Tensor
    offset: Tensor


def make_case(
    batch: int = 24,
    vocab: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    zeros: float = 0.2,
    parents: list[int] | None = None,
) -> Case:
    """Drafts drawn from distributions that resemble the target, so that some stand and some do not."""
    parents = TREE if parents is None else parents
    nodes = len(parents)
    generator = torch.Generator().manual_seed(seed)
    target = distributions(batch, nodes + 1, vocab, seed=seed + 1, zeros=zeros)
    other = distributions(batch, nodes, vocab, seed=seed + 2, zeros=zeros)
    draft = (0.8 * target[:, :nodes] + 0.2 * other).to(dtype)
    tokens = torch.zeros(batch, nodes, dtype=torch.int64)
    for i, parent in enumerate(parents):
        weights = draft[:, parent + 1].float().clone()
        for j, earlier in enumerate(parents[:i]):
            if earlier == parent:
                weights.scatter_(1, tokens[:, j : j + 1], 0.0)
        weights[weights.sum(1) == 0] = 1.0  # nothing is left to draw: any token will do
        tokens[:, i] = torch.multinomial(weights, 1, generator=generator)[:, 0]
    near = min(vocab - 1, 12)
    if vocab <= 1000:
        neighbours = ops.codebook_neighbours(torch.randn(vocab, 3, generator=generator), near)
    else:
        neighbours = (torch.arange(vocab).unsqueeze(1) + 1 + torch.arange(near)) % vocab
    return Case(
        target=target.to(dtype),
        draft=draft,
        tokens=tokens,
        parents=torch.tensor(parents, dtype=torch.int64),
        neighbours=neighbours,
        seed=torch.randint(-(2**62), 2**62, (batch,), generator=generator),
        offset=torch.randint(0, 10_000, (batch,), generator=generator),
    )


def calls(reference: bool = False) -> dict:
    """Every rule under a name, as a function of a case and of the keywords seed, offset, lengths."""
    name = "reference_verify_" if reference else "verify_"
    chain, tree, typical, relaxed, jacobi = (
        getattr(ops, name + rule) for rule in ("chain", "tree", "typical", "relaxed", "jacobi")
    )
    return {
        "chain": lambda c, **kw: chain(c.target, c.tokens, c.draft, **kw),
        "chain_chosen": lambda c, **kw: chain(c.target, c.tokens, **kw),
        "chain_block": lambda c, **kw: chain(c.target, c.tokens, c.draft, method="block", **kw),
        "tree": lambda c, **kw: tree(c.target, c.tokens, c.parents, c.draft, **kw),
        "tree_replacement": lambda c, **kw: tree(
            c.target, c.tokens, c.parents, c.draft, replacement=True, **kw
        ),
        "tree_chosen": lambda c, **kw: tree(c.target, c.tokens, c.parents, **kw),
        "typical": lambda c, **kw: typical(c.target, c.tokens, c.parents, **kw),
        "typical_sampled": lambda c, **kw: typical(
            c.target, c.tokens, c.parents, epsilon=0.2, delta=0.5, bonus="sample", **kw
        ),
        "relaxed": lambda c, **kw: relaxed(c.target, c.tokens, c.neighbours, c.parents, delta=0.2, **kw),
        "relaxed_drawn": lambda c, **kw: relaxed(
            c.target, c.tokens, c.neighbours, c.parents, c.draft, delta=0.2, **kw
        ),
        "relaxed_multiplicative": lambda c, **kw: relaxed(
            c.target,
            c.tokens,
            c.neighbours,
            c.parents,
            c.draft,
            delta=2.0,
            bound="multiplicative",
            k=min(5, c.neighbours.shape[1]),
            **kw,
        ),
        "relaxed_released": lambda c, **kw: relaxed(
            c.target,
            c.tokens,
            c.neighbours,
            c.parents,
            delta=0.3,
            k=min(5, c.neighbours.shape[1]),
            residual="released",
            **kw,
        ),
        "jacobi": lambda c, **kw: jacobi(c.target, c.tokens, c.draft, **kw),
        "jacobi_chosen": lambda c, **kw: jacobi(c.target, c.tokens, **kw),
    }


RULES = list(calls())


def assert_same(a: Verified, b: Verified) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), name


class ToyModel:
    """A table of the next token's distribution after every prefix shorter than `length`."""

    def __init__(self, vocab: int, length: int, *, seed: int, zeros: float = 0.0, sharpness: float = 1.5):
        self.vocab, self.length = vocab, length
        self._tables = [
            distributions(vocab**n, vocab, seed=seed * 100 + n, zeros=zeros, sharpness=sharpness)
            for n in range(length)
        ]

    def rows(self, prefix: Tensor) -> Tensor:
        """``[n, V]`` after prefixes ``[n, t]``; what lies beyond `length` is not looked at, and uniform."""
        t = prefix.shape[1]
        if t >= self.length:
            return torch.full((1, self.vocab), 1.0 / self.vocab).expand(prefix.shape[0], -1)
        index = torch.zeros(prefix.shape[0], dtype=torch.int64)
        for i in range(t):
            index = index * self.vocab + prefix[:, i]
        return self._tables[t][index]

    def rows_at(self, sequences: Tensor, ends: Tensor) -> Tensor:
        """``[n, V]``: for each row the distribution after its first ``ends`` tokens."""
        out = torch.empty(sequences.shape[0], self.vocab)
        for end in ends.unique().tolist():
            chosen = (ends == end).nonzero()[:, 0]
            out[chosen] = self.rows(sequences[chosen, :end])
        return out

    def joint(self) -> Tensor:
        """Probability of every sequence of `length` tokens, in lexicographic order."""
        out = torch.ones(1, dtype=torch.float64)
        for table in self._tables:
            exact = table.double() / table.double().sum(-1, keepdim=True)
            out = (out.unsqueeze(1) * exact).flatten()
        return out


def draw_rows(rows: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row, from numbers that have nothing to do with arcore's."""
    u = torch.rand(rows.shape[0], 1, generator=generator, dtype=torch.float64)
    cumulative = rows.double().cumsum(-1)
    level = u * cumulative[:, -1:]
    token = (cumulative <= level).sum(-1)
    return token.clamp_(max=rows.shape[1] - 1)


def g_test(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of counts under probabilities; 0 if something impossible was counted. Rare cells are pooled."""
    from scipy.stats import chi2  # takes a second, which processes that only compare ids can save

    n = int(counts.sum())
    expected, observed = probabilities.double() * n, counts.double()
    if observed[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 10
    cells = [(observed[~rare], expected[~rare])]
    if expected[rare].sum() > 0:
        cells.append((observed[rare].sum().reshape(1), expected[rare].sum().reshape(1)))
    o = torch.cat([c[0] for c in cells])
    e = torch.cat([c[1] for c in cells])
    g = 2.0 * float(torch.where(o > 0, o * (o / e).log(), 0.0).sum())
    return float(chi2.sf(g, len(o) - 1))


def count_sequences(sequences: Tensor, vocab: int) -> Tensor:
    index = torch.zeros(sequences.shape[0], dtype=torch.int64)
    for i in range(sequences.shape[1]):
        index = index * vocab + sequences[:, i]
    return torch.bincount(index, minlength=vocab ** sequences.shape[1])


def all_tokens(vocab: int, length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(vocab), repeat=length))
