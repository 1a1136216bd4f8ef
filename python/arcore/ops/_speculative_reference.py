"""The rules of speculative verification in plain Python, one row of the batch at a time.

The same steps as csrc/speculative/verify.h, with the same random numbers, so that ids agree exactly: float32 for what
the kernels keep in float32, double precision for sums and comparisons.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

SAMPLE, COIN, RESIDUAL = 0, 1, 2  # streams of random numbers, csrc/common/philox.h


@dataclass(frozen=True)
class Inputs:
    """Checked arguments: probabilities detached, integers int64 and of full shape."""

    target: Tensor  # [B, M + 1, V]
    tokens: Tensor  # [B, M]
    parents: Tensor | None  # [B, M]
    draft: Tensor | None  # [B, M, V]
    lengths: Tensor | None  # [B]
    seed: Tensor  # [B]
    offset: Tensor  # [B]


@dataclass(frozen=True)
class Relaxation:
    """Which neighbours a proposal may stand for."""

    neighbours: Tensor  # [V, K]
    used: int
    delta: float
    multiplicative: bool

    def of(self, token: int, count: int, vocab: int) -> list[int]:
        """The first `count` entries of a token's row, without padding and the token itself."""
        row = self.neighbours[token, :count].to(torch.int64).tolist()
        return [other if 0 <= other < vocab and other != token else -1 for other in row]

    def stands_for(self, p: Tensor, token: int, scale: float) -> tuple[float, list[int]]:
        """The longest run of nearest tokens whose probabilities add up to the bound: their sum, and which."""
        limit = self.delta * (float(p[token]) if self.multiplicative else scale)
        mass, chosen = 0.0, []
        for other in self.of(token, self.used, p.shape[0]):
            more = mass + (float(p[other]) if other >= 0 else 0.0)
            if not more <= limit:
                break
            mass = more
            chosen.append(other)
        return mass, chosen


class NotADistributionError(Exception):
    """A row that the rule had to read holds NaN, infinity, or no mass."""


@dataclass
class Row:
    """One row of the batch, and what it emits."""

    target: Tensor  # [M + 1, V] float32
    draft: Tensor | None  # [M, V] float32
    tokens: list[int]
    parents: list[int]
    seed: int
    offset: int
    emitted: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)

    def children(self, node: int) -> list[int]:
        return [i for i, p in enumerate(self.parents) if p == node and self.tokens[i] >= 0]

    def accept(self, node: int) -> None:
        self.emitted.append(self.tokens[node])
        self.path.append(node)

    def sample(self, row: int, step: int) -> int:
        """A token of a target row, with the number that plain sampling uses at this position."""
        return draw(self.target[row], random_bits(self.seed, self.offset + step, SAMPLE))

    def coin(self, step: int, sibling: int = 0) -> float:
        return (random_bits(self.seed, self.offset + step, COIN, sibling) >> 11) * 2.0**-53

    def residual(self, row: int, step: int, weights: Tensor) -> int:
        """A token of the residual; of the target row where rounding left the residual without mass."""
        bits = random_bits(self.seed, self.offset + step, RESIDUAL)
        return draw(weights if _sum(weights) > 0.0 else self.target[row], bits)


Rule = Callable[[Row], None]


def verify(row: Row, relaxation: Relaxation | None = None, replacement: bool = False) -> None:
    """Chosen proposals: a draw decides. Drawn ones: coins."""
    if relaxation is not None and relaxation.neighbours.shape[1] == 0:
        relaxation = None
    if row.draft is None:
        _follow_draws(row, relaxation)
    else:
        _toss_coins(row, row.draft, relaxation, replacement)


def _follow_draws(row: Row, relaxation: Relaxation | None) -> None:
    node = -1
    while True:
        p = row.target[node + 1]
        drawn = row.sample(node + 1, len(row.emitted))
        hit = _first_hit(row, node, p.clone(), drawn, relaxation)
        if hit is None:
            row.emitted.append(drawn)
            return
        row.accept(hit)
        node = hit


def _first_hit(row: Row, node: int, p: Tensor, drawn: int, relaxation: Relaxation | None) -> int | None:
    """The first child that stands for the drawn token. What rejected ones stood for is taken out of `p`."""
    left = 1.0
    for child in row.children(node):
        token = row.tokens[child]
        if token == drawn:
            return child
        if relaxation is None:
            continue
        mass, near = relaxation.stands_for(p, token, left)
        if drawn in near:
            return child
        left -= float(p[token]) + mass
        p[[token, *(n for n in near if n >= 0)]] = 0.0
    return None


def _toss_coins(row: Row, draft: Tensor, relaxation: Relaxation | None, replacement: bool) -> None:
    node = -1
    while True:
        children, step = row.children(node), len(row.emitted)
        if not children:
            row.emitted.append(row.sample(node + 1, step))
            return
        p, q = row.target[node + 1].clone(), draft[node + 1]
        p_left, q_left, rejected = 1.0, 1.0, 0.0
        accepted = None
        for sibling, child in enumerate(children):
            token = row.tokens[child]
            repeats = any(row.tokens[other] == token for other in children[:sibling])
            own = _probability(p[token])
            of_draft = 0.0 if repeats and not replacement else _probability(q[token])
            mass, near = (0.0, []) if relaxation is None else relaxation.stands_for(p, token, p_left)
            if _accepts(row.coin(step, sibling), (own + mass) * q_left, of_draft * p_left):
                accepted = child
                break
            if relaxation is not None:
                p[token] = own + mass
                p[[n for n in near if n >= 0]] = 0.0
            q_scale = _float32(1.0 / q_left) if q_left > 0.0 else 0.0
            p = _positive(p * _float32(1.0 / p_left) - q * q_scale)
            rejected += of_draft
            p_left = _sum(p)
            if child != children[-1]:
                q_left = _sum(q) - (0.0 if replacement else rejected)
            if not p_left > 0.0:
                break
        if accepted is None:
            row.emitted.append(row.residual(node + 1, step, p))
            return
        row.accept(accepted)
        node = accepted


def toss_coins_coarsely(row: Row, relaxation: Relaxation) -> None:
    """The rule of LANTERN's released code for chosen proposals."""
    node = -1
    while True:
        children, step = row.children(node), len(row.emitted)
        if not children:
            row.emitted.append(row.sample(node + 1, step))
            return
        p, left, accepted = row.target[node + 1].clone(), 1.0, None
        if not _sum(p) > 0.0:
            raise NotADistributionError
        for sibling, child in enumerate(children):
            token = row.tokens[child]
            own = _probability(p[token])
            mass, near = relaxation.stands_for(p, token, left)
            if _accepts(row.coin(step, sibling), own + mass, left):
                accepted = child
                break
            p[token] = 0.0
            if near:
                p[[n for n in relaxation.of(token, relaxation.used + 1, p.shape[0]) if n >= 0]] = 0.0
            left = _sum(p)
            if left == 0.0:
                p = torch.full_like(p, 1.0 / p.shape[0])
                left = _sum(p)
        if accepted is None:
            row.emitted.append(row.residual(node + 1, step, p))
            return
        row.accept(accepted)
        node = accepted


def judge_block(row: Row) -> None:
    """arXiv:2403.10444, algorithm 2, with one coin instead of one per proposal."""
    assert row.draft is not None
    weights: list[float] = []
    weight = 1.0
    while children := row.children(len(weights) - 1):
        i = children[0]
        own, of_draft = _probability(row.target[i, row.tokens[i]]), _probability(row.draft[i, row.tokens[i]])
        ratio = math.inf if of_draft == 0.0 else own / of_draft
        weight = 0.0 if own == 0.0 or weight == 0.0 else min(weight * ratio, 1.0)
        weights.append(weight)

    def beyond(i: int, weight: float) -> Tensor:
        """The unnormalised residual after i proposals."""
        assert row.draft is not None
        return _positive(row.target[i] * _float32(weight) - row.draft[i])

    coin, refused = row.coin(0), 1.0
    stand, residual = 0, None
    for i in range(len(weights), 0, -1):
        h = weights[i - 1]
        if i < len(weights) and h > 0.0:
            residual = beyond(i, h)
            mass = _sum(residual)
            h = mass / (mass + (1.0 - h)) if mass > 0.0 else 0.0
        refused *= 1.0 - h
        if coin < 1.0 - refused:
            stand = i
            break
    for i in range(stand):
        row.accept(i)
    if stand == len(weights):
        row.emitted.append(row.sample(stand, stand))
        return
    if stand == 0:
        residual = beyond(0, 1.0)
    assert residual is not None
    row.emitted.append(row.residual(stand, stand, residual))


def accept_typical(row: Row, epsilon: float, delta: float, greedy: bool) -> None:
    """The longest path of nodes above the threshold."""
    depth, score = {-1: 0}, {-1: 0.0}
    best = -1
    for node in range(-1, len(row.tokens)):
        children = row.children(node)
        if node not in depth or not children:
            continue
        p = row.target[node + 1]
        entropy = -float((p.double() * (p + 1e-5).double().log()).sum())
        threshold = min(epsilon, delta * math.exp(-entropy))
        for child in children:
            own = _probability(p[row.tokens[child]])
            if not own > threshold:
                continue
            depth[child], score[child] = depth[node] + 1, score[node] + math.log(own)
            if (depth[child], score[child]) > (depth[best], score[best]):
                best = child
    nodes, node = [], best
    while node >= 0:
        nodes.append(node)
        node = row.parents[node]
    for node in reversed(nodes):
        row.accept(node)
    if greedy and bool(row.target[best + 1].isnan().any()):
        raise NotADistributionError
    token = int(row.target[best + 1].argmax()) if greedy else row.sample(best + 1, len(row.emitted))
    row.emitted.append(token)


def run(op: str, x: Inputs, rule: Rule, window: bool = False) -> tuple[Tensor, ...]:
    """Applies a rule to every row; `window` also drafts the rest of a Jacobi window."""
    batch, rows = x.target.shape[0], x.target.shape[1]
    nodes, device = rows - 1, x.target.device
    tokens = torch.full((batch, rows), -1, dtype=torch.int64, device=device)
    accepted = torch.zeros(batch, dtype=torch.int64, device=device)
    path = torch.full((batch, nodes), -1, dtype=torch.int64, device=device)
    valid = torch.zeros(batch, dtype=torch.bool, device=device)
    drafts = torch.full((batch, nodes), -1, dtype=torch.int64, device=device)
    for b, row in enumerate(_rows(op, x)):
        fresh = []
        try:
            rule(row)
            if window:
                fresh = [row.sample(i, i) for i in range(len(row.emitted), len(row.tokens) + 1)]
        except NotADistributionError:
            continue
        tokens[b, : len(row.emitted)] = torch.tensor(row.emitted, device=device)
        path[b, : len(row.path)] = torch.tensor(row.path, dtype=torch.int64, device=device)
        drafts[b, : len(fresh)] = torch.tensor(fresh, dtype=torch.int64, device=device)
        accepted[b], valid[b] = len(row.path), True
    return tokens, accepted, path, valid, drafts


def _rows(op: str, x: Inputs) -> Iterator[Row]:
    batch, rows, vocab = x.target.shape
    for b in range(batch):
        length = rows - 1 if x.lengths is None else int(x.lengths[b])
        if not 0 <= length <= rows - 1:
            raise ValueError(f"arcore.{op}: expected lengths from 0 to {rows - 1} but row {b} has {length}")
        tokens = x.tokens[b, :length].tolist()
        if x.parents is None:
            tokens = tokens[: tokens.index(-1)] if -1 in tokens else tokens
            parents = list(range(-1, len(tokens) - 1))
        else:
            parents = x.parents[b, :length].tolist()
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if not -1 <= token < vocab:
                raise ValueError(
                    f"arcore.{op}: expected draft_tokens from 0 to {vocab - 1}, or -1 for padding, but row {b}, "
                    f"node {i} has {token}"
                )
            if not -1 <= parent < i:
                raise ValueError(
                    f"arcore.{op}: expected -1 <= parents[i] < i but node {i} of row {b} has parent {parent}; "
                    "list parents before their children"
                )
        draft = None if x.draft is None else x.draft[b].float()
        yield Row(x.target[b].float(), draft, tokens, parents, int(x.seed[b]), int(x.offset[b]))


def _accepts(u: float, p: float, q: float) -> bool:
    return u * q < p if q > 0.0 else p > 0.0


def _probability(x: Tensor) -> float:
    value = float(x)
    if not 0.0 <= value < math.inf:
        raise NotADistributionError
    return value


def _positive(x: Tensor) -> Tensor:
    return torch.where(x < 0.0, 0.0, x)  # NaN stays


def _fixed_point(weights: Tensor) -> list[int]:
    """Weights as integers, multiples of 2^-62: sums of them depend on no order."""
    return [int(w) for w in (weights.double().clamp(max=1.0) * 2.0**62).to(torch.int64).tolist()]


def _sum(weights: Tensor) -> float:
    if not bool(((weights >= 0.0) & (weights < math.inf)).all()):
        raise NotADistributionError
    return sum(_fixed_point(weights)) * 2.0**-62


def _float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def draw(weights: Tensor, bits: int) -> int:
    """The token that 64 random bits pick: csrc/common/inverse_cdf.h in exact integers.

    Weights count in multiples of 2^-62. The token is the first whose cumulative weight exceeds the level
    ``floor(bits * total / 2^64)``.
    """
    if not bool(((weights >= 0.0) & (weights < math.inf)).all()):
        raise NotADistributionError
    cumulative = list(accumulate(_fixed_point(weights)))
    if cumulative[-1] == 0:
        raise NotADistributionError
    return bisect_right(cumulative, bits * cumulative[-1] >> 64)


def random_bits(seed: int, position: int, stream: int, index: int = 0) -> int:
    """64 bits of Philox4x32-10 (Salmon et al., SC 2011), keyed as in csrc/common/philox.h."""
    word = (1 << 32) - 1
    counter = [position & word, position >> 32 & word, stream, index >> 1]
    key = [seed & word, seed >> 32 & word]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & word, a >> 32 ^ counter[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    half = 2 * (index & 1)
    return counter[half] | counter[half + 1] << 32
