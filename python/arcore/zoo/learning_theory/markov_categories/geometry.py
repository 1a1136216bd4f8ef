"""Entropies of laws, the metric of an output layer, and eigenspaces of kernels between laws."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from arcore.catalog.claims import steps
from arcore.nn.kinds import check_kinds

Divergence = Literal["kl", "tv", "chi2", "renyi"]
Kernel = Literal["log", "bc", "linear"]


@check_kinds
def categorical_entropy(logits: Tensor, divergence: Divergence = "kl", *, alpha: float = 2.0) -> Tensor:
    """Divergence of the law of (w, w), w ~ p, from that of two independent draws of p.

    Args:
        logits: `[..., V]`, floating; -inf has probability 0.
        divergence: `"kl"` gives Shannon's entropy in nats, `"tv"` 1 - sum p^2, `"chi2"` the size of the support less 1,
            `"renyi"` log(sum p^(2 - alpha)) / (alpha - 1).
        alpha: order of `"renyi"`, above 0 and not 1.

    Returns:
        `[...]`.

    Raises:
        ValueError: unknown divergence, or an order that is out of range.

    Reference: section 4.2 and proposition 4.2 of the paper; the closed forms follow from its definition.
    """
    log = logits.log_softmax(-1)
    p = log.exp()
    if divergence == "kl":
        return -torch.where(p > 0, p * log, 0.0).sum(-1)
    if divergence == "tv":
        return 1 - p.square().sum(-1)
    if divergence == "chi2":
        return (p > 0).sum(-1).to(p.dtype) - 1
    if divergence != "renyi":
        raise ValueError(f'expected divergence "kl", "tv", "chi2" or "renyi" but got {divergence!r}')
    if alpha <= 0 or alpha == 1:
        raise ValueError(f"expected a Renyi order alpha above 0 that is not 1 but got {alpha}")
    return torch.where(p > 0, p ** (2 - alpha), 0.0).sum(-1).log() / (alpha - 1)


@check_kinds
def head_metric(weight: Tensor, probs: Tensor) -> Tensor:
    """The Fisher-Rao metric of laws pulled back to hidden states, W^T (diag p - p p^T) W, averaged over laws.

    Args:
        weight: `[V, C]` of the output layer.
        probs: `[n, V]`.

    Returns:
        `[C, C]`, symmetric, positive semidefinite, of rank min(C, V - 1) at most. No `[V, V]` is made.
    """
    mean = probs @ weight
    second = weight.T @ (probs.mean(0).unsqueeze(1) * weight)
    return second - mean.T @ mean / len(probs)


class Spectrum(NamedTuple):
    """Of a metric.

    Attributes:
        values: eigenvalues, largest first, `[C]`.
        effective_rank: exponential of the entropy of the eigenvalues as shares.
        directions: `[C, C]`, column i belongs to value i: moving a state along the first changes the law most.
    """

    values: Tensor
    effective_rank: float
    directions: Tensor


@check_kinds
def spectrum(metric: Tensor) -> Spectrum:
    """Eigenvalues and directions of a symmetric matrix `[C, C]`."""
    values, directions = torch.linalg.eigh(metric)
    values, directions = values.flip(0).clamp(min=0), directions.flip(1)
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.where(share > 0, share * share.log(), 0.0).sum()
    return Spectrum(values, float(entropy.exp()), directions)


@check_kinds
def law_kernel(log_probs: Tensor, kernel: Kernel = "log") -> Tensor:
    """Centred similarity of laws.

    Args:
        log_probs: `[n, V]`, finite for `"log"`.
        kernel: `"bc"` is sum sqrt(p p') (definition 7.3), `"linear"` sum p p', `"log"` the product of logarithms less
            their mean over the vocabulary.

    Returns:
        `[n, n]` with rows and columns of mean 0.

    Raises:
        ValueError: unknown kernel.
    """
    if kernel == "log":
        features = log_probs - log_probs.mean(1, keepdim=True)
    elif kernel == "bc":
        features = (log_probs / 2).exp()
    elif kernel == "linear":
        features = log_probs.exp()
    else:
        raise ValueError(f'expected kernel "log", "bc" or "linear" but got {kernel!r}')
    features = features - features.mean(0)
    return features @ features.T


@check_kinds
def spectral_alignment(
    hidden: Tensor, log_probs: Tensor, kernel: Kernel = "log", *, rank: int | None = None
) -> float:
    """How far hidden states span the leading eigenspace of the kernel of laws, in the same contexts.

    Args:
        hidden: `[n, C]`.
        log_probs: `[n, V]`.
        kernel: as for `law_kernel`.
        rank: r leading directions on both sides; C when None.

    Returns:
        Mean squared cosine of the principal angles, 0 to 1; random spaces have r / n.

    Raises:
        ValueError: numbers of contexts differ, or the rank is not below that number.
    """
    if len(hidden) != len(log_probs):
        raise ValueError(f"expected a law for each of {len(hidden)} states but got {len(log_probs)}")
    rank = hidden.shape[1] if rank is None else rank
    if not 1 <= rank < len(hidden) or rank > hidden.shape[1]:
        raise ValueError(
            f"expected a rank from 1 to {min(hidden.shape[1], len(hidden) - 1)}, below the number of contexts "
            f"{len(hidden)}, but got {rank}"
        )
    states = torch.linalg.svd(hidden - hidden.mean(0), full_matrices=False).U[:, :rank]
    wanted = torch.linalg.eigh(law_kernel(log_probs, kernel)).eigenvectors[:, -rank:]
    return float((states.T @ wanted).square().sum() / rank)


def polar_states(prototypes: Tensor) -> Tensor:
    """Whitened states that agree best with given prototypes: the maximiser of sum_i <h_i, g_i> over h^T h = n 1.

    Args:
        prototypes: `[n, C]`, n above C.

    Returns:
        sqrt(n) times the polar factor of the centred prototypes; it spans the leading eigenspace of their Gram matrix
        (theorem 7.6).
    """
    centred = prototypes - prototypes.mean(0)
    u, _, vh = torch.linalg.svd(centred, full_matrices=False)
    return len(prototypes) ** 0.5 * u @ vh


class Trained(NamedTuple):
    """A free state per context and an output layer, trained by maximum likelihood on the laws of all contexts.

    Attributes:
        laws: float64 `[n, V]`, log-probabilities.
        hidden: `[n, C]`, at the end.
        course: overlaps by training step: pairs of step and overlap by kernel.
    """

    laws: Tensor
    hidden: Tensor
    course: list[tuple[int, dict[str, float]]]


def train_states(
    contexts: int = 96, vocab: int = 40, dim: int = 4, *, noise: float = 0.3, count: int = 1500, seed: int = 0
) -> Trained:
    """Maximum likelihood on random laws whose logits have rank `dim`, up to noise; nothing but states and a layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(contexts, dim) @ normal(vocab, dim).T + noise * normal(contexts, vocab)
    laws = logits.log_softmax(-1)
    hidden = (0.1 * normal(contexts, dim)).requires_grad_()
    weight = (0.1 * normal(vocab, dim)).requires_grad_()
    optimizer = torch.optim.Adam([hidden, weight], lr=0.02)
    target = laws.exp()
    course: list[tuple[int, dict[str, float]]] = []
    marks = sorted({0, count, *(int(count * 2.0**-k) for k in range(1, 9))})
    kernels: tuple[Kernel, ...] = ("log", "bc", "linear")
    for step in steps(count + 1, "training free states"):
        if step in marks:
            now = hidden.detach()
            course.append((step, {name: spectral_alignment(now, laws, name) for name in kernels}))
        loss = -(target * (hidden @ weight.T).log_softmax(-1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Trained(laws, hidden.detach(), course)
