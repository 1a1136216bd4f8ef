"""Verification of drafted tokens: public functions, references, and the ops' fake rules.

What each rule guarantees is on the page docs/ops/speculative.md, the passes over the vocabulary in
csrc/speculative/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from arcore import _extension as _extension
from arcore.masks import TreeMask
from arcore.ops import _speculative_reference as rules
from arcore.ops._checks import checked_call, int64, integer, same_device
from arcore.ops._constants import constant
from arcore.ops._speculative_reference import Inputs, Relaxation

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (*SUPPORTED_DTYPES, torch.float64)
NEIGHBOUR_DTYPES = (torch.int32, torch.int64, torch.uint16)

Parents = Tensor | Sequence[int] | TreeMask


class Verified(NamedTuple):
    """What a verification emits, per row of the batch.

    Attributes:
        tokens: int64 ``[B, M + 1]``, the accepted tokens and the one after them, then -1.
        accepted: int64 ``[B]``, how many drafted tokens were accepted; ``accepted + 1`` tokens are emitted.
        path: int64 ``[B, M]``, indices of the accepted nodes (what to keep of a cache), then -1.
        valid: bool ``[B]``. False where a probability that the rule had to read was NaN, infinite or negative, or a
            row had no mass; such a row has only -1 in `tokens` and `path`, and `accepted` 0.
    """

    tokens: Tensor
    accepted: Tensor
    path: Tensor
    valid: Tensor


class VerifiedWindow(NamedTuple):
    """`Verified`, and what the window still holds.

    Attributes:
        drafts: int64 ``[B, M]``, the next drafts for the positions after the emitted ones, then -1. Entry j was drawn
            from ``target_probs[:, accepted + 1 + j]``, which is its ``draft_probs`` in the next call.
    """

    tokens: Tensor
    accepted: Tensor
    path: Tensor
    valid: Tensor
    drafts: Tensor


def verify_chain(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
    method: Literal["token", "block"] = "token",
) -> Verified:
    """Speculative sampling of a chain of drafted tokens; the emitted tokens have the target's law.

    ``method="token"`` accepts drafts from left to right, each with probability ``min(1, p(x) / q(x))``; the first that
    is rejected is replaced by a draw from ``max(p - q, 0)``, normalised; if all stand, one more token comes from the
    target. ``method="block"`` judges all of them together, which accepts at least as many on average. Without
    `draft_probs` the drafts were chosen, not drawn: a draw from the target decides and the emitted tokens are, bit for
    bit, those of plain sampling with the same seed.

    Probabilities are used as they are, after all processing (temperature, top-k, ...); the draft's must be exactly
    those the drafts were drawn from. No gradient is defined: inputs are detached.

    Args:
        target_probs: ``[B, M + 1, V]``, float32, bfloat16 or float16, any strides. Row i is the target's distribution
            of the token at draft i's place, row M that of the token after the last draft.
        draft_tokens: integers ``[B, M]``; a row's drafts end at its first -1.
        draft_probs: ``[B, M, V]`` of target_probs' dtype, row i is what draft i was drawn from; or None.
        seed: int64, one number or ``[B]``: the row's own seed.
        offset: int64, one number or ``[B]``: position in its sequence of the first token that this call emits. Random
            numbers belong to (seed, position, purpose), so a row's result depends on no other row.
        lengths: integers ``[B]``, drafts that count in each row; all by default.
        method: ``"token"`` or ``"block"``.

    Returns:
        `Verified`; ``path`` is 0, 1, 2, ... for a chain.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes, devices or `method` do not fit, "block" is asked for without `draft_probs`, or, on a CPU, a
            drafted token or a length is out of range.

    Reference: Leviathan et al. (arXiv:2211.17192, algorithm 1), Chen et al. (arXiv:2302.01318, algorithm 2); block
    verification: Sun et al. (arXiv:2403.10444, algorithm 2).
    """
    x = _prepare(
        "verify_chain", target_probs, draft_tokens, None, draft_probs, lengths, seed, offset, SUPPORTED_DTYPES
    )
    block = _is_block(method, x.draft)
    return Verified(
        *checked_call(
            "verify_chain",
            torch.ops.arcore.verify_chain,
            x.target,
            x.tokens,
            x.draft,
            x.lengths,
            x.seed,
            x.offset,
            block,
        )
    )


def verify_tree(
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Parents,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
    replacement: bool = False,
) -> Verified:
    """Speculative sampling of a tree of drafted tokens; the emitted tokens have the target's law.

    Without `draft_probs` the children of a node were chosen (the likeliest tokens, an n-gram): one draw from the target
    decides, and descends if it hits a child. With `draft_probs` they were drawn: each child has a coin with probability
    ``min(1, p(x) / q(x))``, and after a rejection p becomes ``max(p - q, 0)``, normalised, and q loses the child.

    Args:
        target_probs: ``[B, M + 1, V]``, as for `verify_chain`: row 0 follows the prefix, row i + 1 follows node i.
        draft_tokens: integers ``[B, M]``, the token of each node; -1 marks a padding node, which has no descendants.
        parents: node i hangs under node ``parents[i] < i``, -1 under the prefix: ``[M]``, ``[B, M]``, or an
            `arcore.masks.TreeMask`.
        draft_probs: ``[B, M, V]`` or None: row 0 is what the children of the prefix were drawn from, row i + 1 what the
            children of node i were drawn from, in the order of their indices.
        seed: as for `verify_chain`.
        offset: as for `verify_chain`.
        lengths: as for `verify_chain`; counts nodes.
        replacement: siblings were drawn independently, so that they may be equal; by default without replacement.

    Returns:
        `Verified`.

    Raises:
        TypeError, ValueError: as for `verify_chain`; likewise a parent that is out of range.

    Reference: SpecInfer (arXiv:2305.09781, section 4.3) for drawn siblings; EAGLE-2 (arXiv:2406.16858) for chosen ones.
    """
    if parents is None:
        raise TypeError(
            "arcore.verify_tree: expected parents, one for each draft, but got None; for a chain of drafts call "
            "verify_chain"
        )
    x = _prepare(
        "verify_tree",
        target_probs,
        draft_tokens,
        parents,
        draft_probs,
        lengths,
        seed,
        offset,
        SUPPORTED_DTYPES,
    )
    return Verified(
        *checked_call(
            "verify_tree",
            torch.ops.arcore.verify_tree,
            x.target,
            x.tokens,
            x.parents,
            x.draft,
            x.lengths,
            x.seed,
            x.offset,
            replacement,
        )
    )


def verify_typical(
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Parents | None = None,
    *,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    lengths: Tensor | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
    bonus: Literal["greedy", "sample"] = "greedy",
) -> Verified:
    """Medusa's typical acceptance: the longest path of tokens that the target finds likely enough. Not exact.

    A node stands if its parent does and ``p(x) > min(epsilon, delta * exp(-H(p)))``, where p is the target's
    distribution at its place and H its entropy, taken with ``log(p + 1e-5)`` as in the released code. Of equally long
    paths the one with the larger sum of log-probabilities is emitted, of equal sums the first. At temperature 0, when
    rows are one-hot, this is greedy verification. What is emitted does not have the target's law.

    Padding never stands: nodes are judged before the longest path is chosen.

    Args:
        target_probs: ``[B, M + 1, V]``, as for `verify_tree`.
        draft_tokens: integers ``[B, M]``.
        parents: as for `verify_tree`; None for a chain.
        seed: used with ``bonus="sample"`` only.
        offset: likewise.
        lengths: as for `verify_tree`.
        epsilon: upper bound of the threshold.
        delta: factor of the entropy term; sqrt(epsilon) in the paper.
        bonus: the token after the path is the likeliest one, as in the released code, or a draw from the target.

    Returns:
        `Verified`.

    Raises:
        TypeError, ValueError: as for `verify_tree`; `epsilon` or `delta` is negative or not finite, or
            `bonus` unknown.

    Reference: Medusa (arXiv:2401.10774, section 2.3.1); Hydra (arXiv:2402.05109) uses the same rule.
    """
    x = _prepare(
        "verify_typical", target_probs, draft_tokens, parents, None, lengths, seed, offset, SUPPORTED_DTYPES
    )
    greedy = _is_greedy(epsilon, delta, bonus)
    return Verified(
        *checked_call(
            "verify_typical",
            torch.ops.arcore.verify_typical,
            x.target,
            x.tokens,
            x.parents,
            x.lengths,
            x.seed,
            x.offset,
            float(epsilon),
            float(delta),
            greedy,
        )
    )


def verify_relaxed(
    target_probs: Tensor,
    draft_tokens: Tensor,
    neighbours: Tensor,
    parents: Parents | None = None,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
    delta: float = 0.1,
    k: int | None = None,
    bound: Literal["additive", "multiplicative"] = "additive",
    residual: Literal["relaxed", "released"] = "relaxed",
    replacement: bool = False,
) -> Verified:
    """LANTERN's relaxed verification: a proposal also takes the probability of the tokens near it. Not exact.

    For a proposal x with nearest tokens n_1, n_2, ... let m be the largest number, at most k, with
    ``p(n_1) + ... + p(n_m) <= delta`` (``bound="multiplicative"``: ``<= delta * p(x)``). The relaxed target p' gives x
    the probability of n_1 ... n_m and those none, so ``TV(p', p) <= delta``. Verification goes on with p' in p's place,
    in the acceptance and in the residual; ``delta=0`` is `verify_tree`, bit for bit.

    The bound holds for one proposal. What is emitted is a mixture over proposals, and over siblings: `delta` does not
    bound its distance from the target.

    Args:
        target_probs: ``[B, M + 1, V]``, as for `verify_tree`.
        draft_tokens: integers ``[B, M]``.
        neighbours: int32, int64 or uint16 ``[V, K]``, for each token the others, nearest first, e.g. of
            `codebook_neighbours`. The token itself and entries outside of [0, V) are skipped; entries of a row must
            differ.
        parents: as for `verify_tree`; None for a chain.
        draft_probs: as for `verify_tree`; None where proposals were chosen.
        seed: as for `verify_tree`.
        offset: as for `verify_tree`.
        lengths: as for `verify_tree`.
        delta: bound on the moved probability.
        k: neighbours in use, at most K; all by default.
        bound: ``"additive"`` (LANTERN) or ``"multiplicative"`` (LANTERN++; the released code writes 1 + delta).
        residual: ``"relaxed"``, the residual of p'; ``"released"``, what the released code does for chosen proposals: a
            rejection discards all k + 1 stored neighbours if m >= 1.
        replacement: as for `verify_tree`.

    Returns:
        `Verified`.

    Raises:
        TypeError, ValueError: as for `verify_tree`; `neighbours`, `k`, `delta`, `bound` or `residual`
            does not fit, or the released residual is asked for with `draft_probs`.

    Reference: LANTERN (arXiv:2410.03355, section 3); LANTERN++ (arXiv:2502.06352) for the multiplicative bound.
    """
    x = _prepare(
        "verify_relaxed",
        target_probs,
        draft_tokens,
        parents,
        draft_probs,
        lengths,
        seed,
        offset,
        SUPPORTED_DTYPES,
    )
    near = _relaxation(x, neighbours, delta, k, bound, residual)
    return Verified(
        *checked_call(
            "verify_relaxed", torch.ops.arcore.verify_relaxed,
            x.target, x.tokens, neighbours, x.parents, x.draft, x.lengths, x.seed, x.offset,
            float(delta), near, bound == "multiplicative", residual == "released", replacement,
        )
    )  # fmt: skip


def verify_jacobi(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
) -> VerifiedWindow:
    """One iteration of speculative Jacobi decoding; the emitted tokens have the target's law.

    The window's tokens were drawn in the last iteration from rows that have since changed, because the tokens before
    them did. They are verified as by `verify_chain`, at least one token is emitted, and the positions after it are
    drafted anew from their present rows. With a window of one (M = 0) this is plain sampling; with one-hot rows it is
    Jacobi iteration. Without `draft_probs` the tokens of plain sampling are emitted, bit for bit, and a draft stands
    where the same random number still draws it.

    Args:
        target_probs: ``[B, M + 1, V]``, as for `verify_chain`, computed from the present window.
        draft_tokens: integers ``[B, M]``.
        draft_probs: ``[B, M, V]``: the rows that the drafts were drawn from, one iteration ago; or None.
        seed: as for `verify_chain`.
        offset: as for `verify_chain`.
        lengths: as for `verify_chain`.

    Returns:
        `VerifiedWindow`.

    Raises:
        TypeError, ValueError: as for `verify_chain`.

    Reference: SJD (arXiv:2410.01699, algorithm 1).
    """
    x = _prepare(
        "verify_jacobi",
        target_probs,
        draft_tokens,
        None,
        draft_probs,
        lengths,
        seed,
        offset,
        SUPPORTED_DTYPES,
    )
    return VerifiedWindow(
        *checked_call(
            "verify_jacobi",
            torch.ops.arcore.verify_jacobi,
            x.target,
            x.tokens,
            x.draft,
            x.lengths,
            x.seed,
            x.offset,
        )
    )


def reference_verify_chain(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
    method: Literal["token", "block"] = "token",
) -> Verified:
    """`verify_chain` in plain PyTorch and Python, one row after the other, with the same random numbers.

    Takes any float dtype and device; computes in float32 where the kernel does. Arguments, returns and errors are those
    of `verify_chain`, except that a token or length out of range is a ValueError.
    """
    x = _prepare(
        "verify_chain", target_probs, draft_tokens, None, draft_probs, lengths, seed, offset, REFERENCE_DTYPES
    )
    rule = rules.judge_block if _is_block(method, x.draft) else rules.verify
    return Verified(*rules.run("verify_chain", x, rule)[:4])


def reference_verify_tree(
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Parents,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
    replacement: bool = False,
) -> Verified:
    """`verify_tree` in plain PyTorch and Python; see `reference_verify_chain`."""
    x = _prepare(
        "verify_tree",
        target_probs,
        draft_tokens,
        parents,
        draft_probs,
        lengths,
        seed,
        offset,
        REFERENCE_DTYPES,
    )
    return Verified(*rules.run("verify_tree", x, partial(rules.verify, replacement=replacement))[:4])


def reference_verify_typical(
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Parents | None = None,
    *,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    lengths: Tensor | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
    bonus: Literal["greedy", "sample"] = "greedy",
) -> Verified:
    """`verify_typical` in plain PyTorch and Python; see `reference_verify_chain`."""
    x = _prepare(
        "verify_typical", target_probs, draft_tokens, parents, None, lengths, seed, offset, REFERENCE_DTYPES
    )
    greedy = _is_greedy(epsilon, delta, bonus)
    rule = partial(rules.accept_typical, epsilon=epsilon, delta=delta, greedy=greedy)
    return Verified(*rules.run("verify_typical", x, rule)[:4])


def reference_verify_relaxed(
    target_probs: Tensor,
    draft_tokens: Tensor,
    neighbours: Tensor,
    parents: Parents | None = None,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
    delta: float = 0.1,
    k: int | None = None,
    bound: Literal["additive", "multiplicative"] = "additive",
    residual: Literal["relaxed", "released"] = "relaxed",
    replacement: bool = False,
) -> Verified:
    """`verify_relaxed` in plain PyTorch and Python; see `reference_verify_chain`."""
    x = _prepare(
        "verify_relaxed",
        target_probs,
        draft_tokens,
        parents,
        draft_probs,
        lengths,
        seed,
        offset,
        REFERENCE_DTYPES,
    )
    near = _relaxation(x, neighbours, delta, k, bound, residual)
    relaxation = Relaxation(neighbours, near, delta, bound == "multiplicative")
    if residual == "released":
        return Verified(
            *rules.run("verify_relaxed", x, partial(rules.toss_coins_coarsely, relaxation=relaxation))[:4]
        )
    rule = partial(rules.verify, relaxation=relaxation, replacement=replacement)
    return Verified(*rules.run("verify_relaxed", x, rule)[:4])


def reference_verify_jacobi(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    lengths: Tensor | None = None,
) -> VerifiedWindow:
    """`verify_jacobi` in plain PyTorch and Python; see `reference_verify_chain`."""
    x = _prepare(
        "verify_jacobi",
        target_probs,
        draft_tokens,
        None,
        draft_probs,
        lengths,
        seed,
        offset,
        REFERENCE_DTYPES,
    )
    return VerifiedWindow(*rules.run("verify_jacobi", x, rules.verify, window=True))


def codebook_neighbours(codebook: Tensor, k: int, *, rows: int = 1024) -> Tensor:
    """For each entry of a codebook the k nearest others by Euclidean distance, nearest first; for `verify_relaxed`.

    Args:
        codebook: ``[V, D]``, any float dtype; distances are float32.
        k: from 0 to V - 1.
        rows: entries whose distances are held at a time, a ``[rows, V]`` matrix.

    Returns:
        int32 ``[V, k]``. Of equal distances the lower index comes first.

    Raises:
        TypeError: the codebook is no tensor of floats.
        ValueError: the shape or `k` does not fit, or a number is not finite.
    """
    k, rows = (integer("arcore.codebook_neighbours", n, v) for n, v in (("k", k), ("rows", rows)))
    same_device("arcore.codebook_neighbours", codebook=codebook)
    if not codebook.is_floating_point():
        raise TypeError(
            f"arcore.codebook_neighbours: expected codebook of a floating-point dtype but got {_name(codebook.dtype)}; "
            "convert it with .float()"
        )
    if codebook.dim() != 2:
        raise ValueError(
            f"arcore.codebook_neighbours: expected codebook of shape [V, D] but got {tuple(codebook.shape)}"
        )
    size = codebook.shape[0]
    if not 0 <= k <= max(size - 1, 0):
        raise ValueError(f"arcore.codebook_neighbours: expected k from 0 to V - 1 = {size - 1} but got {k}")
    if rows < 1:
        raise ValueError(f"arcore.codebook_neighbours: expected rows >= 1 but got {rows}")
    entries = codebook.detach().float()
    if not entries.isfinite().all():
        raise ValueError("arcore.codebook_neighbours: expected a codebook of finite numbers but some are not")
    every = torch.arange(size, device=codebook.device)
    parts = [torch.empty(0, k, dtype=torch.int32, device=codebook.device)]
    for start in range(0, size, rows):
        own = every[start : start + rows].unsqueeze(1)
        distance = torch.cdist(
            entries[start : start + rows], entries, compute_mode="donot_use_mm_for_euclid_dist"
        )
        distance.scatter_(1, own, math.inf)
        # The bits of non-negative floats are ordered like the floats; below them the index decides.
        key = distance.view(torch.int32).to(torch.int64) << 32 | every
        nearest = key.topk(k, dim=1, largest=False).values
        parts.append((nearest & 0xFFFFFFFF).int())
    return torch.cat(parts)


def _prepare(
    op: str,
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Parents | None,
    draft_probs: Tensor | None,
    lengths: Tensor | None,
    seed: int | Tensor,
    offset: int | Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> Inputs:
    where = f"arcore.{op}"
    same_device(
        where,
        target_probs=target_probs,
        draft_tokens=draft_tokens,
        parents=parents if isinstance(parents, Tensor) else None,
        draft_probs=draft_probs,
        lengths=lengths,
        seed=seed if isinstance(seed, Tensor) else None,
        offset=offset if isinstance(offset, Tensor) else None,
    )
    if target_probs.dim() != 3 or target_probs.shape[1] < 1 or target_probs.shape[2] < 1:
        raise ValueError(
            f"{where}: expected target_probs of shape [B, M + 1, V] but got {tuple(target_probs.shape)}"
        )
    batch, rows, vocab = target_probs.shape
    nodes = rows - 1
    if target_probs.dtype not in dtypes:
        names = ", ".join(_name(d) for d in dtypes)
        raise TypeError(
            f"{where}: expected target_probs of a dtype of {names} but got {_name(target_probs.dtype)}; "
            "convert it with .float()"
        )
    if draft_probs is not None:
        if draft_probs.shape != (batch, nodes, vocab):
            raise ValueError(
                f"{where}: expected draft_probs of shape (B={batch}, M={nodes}, V={vocab}), one row less than "
                f"target_probs, but got {tuple(draft_probs.shape)}"
            )
        if draft_probs.dtype != target_probs.dtype:
            raise TypeError(
                f"{where}: expected draft_probs of target_probs' dtype {_name(target_probs.dtype)} but got "
                f"{_name(draft_probs.dtype)}; verify with the values that the drafts were drawn from"
            )
    tokens = _integers(where, "draft_tokens", draft_tokens, (batch, nodes))
    hangs = None
    if parents is not None:
        if isinstance(parents, TreeMask):
            parents = parents.parents
            parents = parents[0] if parents.shape[0] == 1 else parents
            same_device(where, target_probs=target_probs, parents=parents)
        elif not isinstance(parents, Tensor):
            nodes_of = tuple(int64(where, f"parents[{i}]", x) for i, x in enumerate(parents))
            parents = constant(nodes_of, torch.int64, target_probs.device)
        hangs = _integers(where, "parents", parents, (nodes,) if parents.dim() == 1 else (batch, nodes))
        hangs = hangs.expand(batch, nodes)
    counts = None if lengths is None else _integers(where, "lengths", lengths, (batch,))
    return Inputs(
        target=target_probs.detach(),
        tokens=tokens,
        parents=hangs,
        draft=None if draft_probs is None else draft_probs.detach(),
        lengths=counts,
        seed=_per_row(where, "seed", seed, target_probs),
        offset=_per_row(where, "offset", offset, target_probs),
    )


def _integers(where: str, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{where}: expected {name} of an integer dtype but got {_name(x.dtype)}")
    if x.shape != shape:
        raise ValueError(f"{where}: expected {name} of shape {shape} but got {tuple(x.shape)}")
    return x.to(torch.int64)


def _per_row(where: str, name: str, value: int | Tensor, target: Tensor) -> Tensor:
    batch = target.shape[0]
    if not isinstance(value, Tensor):
        value = int64(where, name, value)
        return torch.full((1,), value, dtype=torch.int64, device=target.device).expand(batch)
    if value.dtype != torch.int64:
        raise TypeError(f"{where}: expected {name} of dtype int64 but got {_name(value.dtype)}")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
        raise ValueError(
            f"{where}: expected one {name}, or one per row (B={batch}), but got shape {tuple(value.shape)}"
        )
    return value.expand(batch)


def _is_block(method: str, draft: Tensor | None) -> bool:
    if method not in ("token", "block"):
        raise ValueError(f'arcore.verify_chain: expected method "token" or "block" but got {method!r}')
    if method == "block" and draft is None:
        raise ValueError(
            'arcore.verify_chain: expected draft_probs with method="block"; for chosen drafts use "token"'
        )
    return method == "block"


def _is_greedy(epsilon: float, delta: float, bonus: str) -> bool:
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"arcore.verify_typical: expected a finite {name} >= 0 but got {value}")
    if bonus not in ("greedy", "sample"):
        raise ValueError(f'arcore.verify_typical: expected bonus "greedy" or "sample" but got {bonus!r}')
    return bonus == "greedy"


def _relaxation(x: Inputs, neighbours: Tensor, delta: float, k: int | None, bound: str, residual: str) -> int:
    """Checks the relaxation's own arguments; returns k."""
    where, vocab = "arcore.verify_relaxed", x.target.shape[2]
    same_device(where, target_probs=x.target, neighbours=neighbours)
    if neighbours.dtype not in NEIGHBOUR_DTYPES:
        names = ", ".join(_name(d) for d in NEIGHBOUR_DTYPES)
        raise TypeError(
            f"{where}: expected neighbours of a dtype of {names} but got {_name(neighbours.dtype)}"
        )
    if neighbours.dim() != 2 or neighbours.shape[0] != vocab:
        raise ValueError(
            f"{where}: expected neighbours of shape (V={vocab}, K) but got {tuple(neighbours.shape)}"
        )
    used = neighbours.shape[1] if k is None else integer(where, "k", k)
    if not 0 <= used <= neighbours.shape[1]:
        raise ValueError(
            f"{where}: expected k from 0 to the K={neighbours.shape[1]} stored neighbours but got {k}"
        )
    if not 0.0 <= delta < math.inf:
        raise ValueError(f"{where}: expected a finite delta >= 0 but got {delta}")
    if bound not in ("additive", "multiplicative"):
        raise ValueError(f'{where}: expected bound "additive" or "multiplicative" but got {bound!r}')
    if residual not in ("relaxed", "released"):
        raise ValueError(f'{where}: expected residual "relaxed" or "released" but got {residual!r}')
    if residual == "released" and x.draft is not None:
        raise ValueError(
            f'{where}: expected no draft_probs with residual="released", whose rule treats proposals as chosen'
        )
    return used


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fake_results(target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows = target.shape[0], target.shape[1]
    return (
        target.new_empty((batch, rows), dtype=torch.int64),
        target.new_empty((batch,), dtype=torch.int64),
        target.new_empty((batch, rows - 1), dtype=torch.int64),
        target.new_empty((batch,), dtype=torch.bool),
    )


@torch.library.register_fake("arcore::verify_chain")
def _fake_chain(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    block: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.verify_chain",
        target_probs=target_probs,
        draft_tokens=draft_tokens,
        draft_probs=draft_probs,
        lengths=lengths,
        seed=seed,
        offset=offset,
    )
    return _fake_results(target_probs)


@torch.library.register_fake("arcore::verify_tree")
def _fake_tree(
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    replacement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.verify_tree",
        target_probs=target_probs,
        draft_tokens=draft_tokens,
        parents=parents,
        draft_probs=draft_probs,
        lengths=lengths,
        seed=seed,
        offset=offset,
    )
    return _fake_results(target_probs)


@torch.library.register_fake("arcore::verify_typical")
def _fake_typical(
    target_probs: Tensor,
    draft_tokens: Tensor,
    parents: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    epsilon: float,
    delta: float,
    greedy_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.verify_typical",
        target_probs=target_probs,
        draft_tokens=draft_tokens,
        parents=parents,
        lengths=lengths,
        seed=seed,
        offset=offset,
    )
    return _fake_results(target_probs)


@torch.library.register_fake("arcore::verify_relaxed")
def _fake_relaxed(
    target_probs: Tensor,
    draft_tokens: Tensor,
    neighbours: Tensor,
    parents: Tensor | None,
    draft_probs: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    delta: float,
    k: int,
    multiplicative: bool,
    coarse: bool,
    replacement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.verify_relaxed",
        target_probs=target_probs,
        draft_tokens=draft_tokens,
        neighbours=neighbours,
        parents=parents,
        draft_probs=draft_probs,
        lengths=lengths,
        seed=seed,
        offset=offset,
    )
    return _fake_results(target_probs)


@torch.library.register_fake("arcore::verify_jacobi")
def _fake_jacobi(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.verify_jacobi",
        target_probs=target_probs,
        draft_tokens=draft_tokens,
        draft_probs=draft_probs,
        lengths=lengths,
        seed=seed,
        offset=offset,
    )
    drafts = target_probs.new_empty((target_probs.shape[0], target_probs.shape[1] - 1), dtype=torch.int64)
    return *_fake_results(target_probs), drafts
