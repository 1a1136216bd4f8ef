"""The surplus of hidden states, estimated with probes, and the states of a model's layers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog.claims import steps
from arcore.nn.checks import check_whole

HIDDEN = 128
# Principal components of the state that the probe sees: fewer give a lower bound still, and fit on less text.
COMPONENTS = 64


@dataclass(frozen=True)
class Surplus:
    """What hidden states say about later tokens beyond the tokens in between, in nats.

    Attributes:
        by_offset: estimate of I(H_t; W_{t+k} | W_t..W_{t+k-1}) for k = 1..K-1.
        errors: their standard errors, over pieces of text.
        without: cross entropy of the probe without the state, for each k.
        total: their sum, the surplus of horizon K.
        error: standard error of the sum.
    """

    by_offset: tuple[float, ...]
    errors: tuple[float, ...]
    without: tuple[float, ...]
    total: float
    error: float


def surplus(
    hidden: Tensor,
    ids: Tensor,
    embedding: Tensor,
    *,
    horizon: int = 3,
    classes: int = 512,
    count: int = 400,
    seed: int = 0,
) -> Surplus:
    """The surplus of horizon K, by probes.

    Half of the pieces fit the probes, a sixth says when to stop, the rest is measured on.

    Args:
        hidden: `[P, L, C]`; the state at t gives the law of token t + 1.
        ids: int64 `[P, L]`.
        embedding: `[V, E]`, how a probe sees tokens.
        horizon: K >= 2.
        classes: tokens that are told apart as targets, the most frequent ones; the others count as one. This bounds the
            surplus of all tokens from below.
        count: training steps of a probe.
        seed: decides the split and the probes' initial weights.

    Raises:
        ValueError: shapes do not fit, the horizon is below 2, pieces are too short for it or fewer than 6, or values
            are not finite.

    Reference: section 4.1 of the paper; the estimator is this library's.
    """
    check_whole("horizon", horizon, 2)
    if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
        raise ValueError(
            f"expected a state for every token, [P, L, C] for ids {list(ids.shape)}, but got {list(hidden.shape)}"
        )
    pieces, length = ids.shape
    if pieces < 6 or length <= horizon:
        raise ValueError(
            f"expected at least 6 pieces of more than {horizon} tokens but got {pieces} of {length}; give more text or "
            "a shorter horizon"
        )
    if not bool(hidden.isfinite().all()):
        raise ValueError("expected finite hidden states but some are NaN or infinite")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(pieces, generator=generator)
    fit, choose, measure = order.tensor_split([pieces // 2, pieces // 2 + pieces // 6])
    states = _components(hidden.float(), fit)
    words = F.layer_norm(embedding.detach().float(), embedding.shape[1:])
    target_of = _classes(ids[fit], len(embedding), classes)
    found = []
    for k in range(1, horizon):
        # Place t: the state, the tokens t + 1 .. t + k, and the target t + k + 1.
        places = length - k - 1
        given = torch.cat([words[ids[:, 1 + i : 1 + i + places]] for i in range(k)], dim=-1)
        target = target_of[ids[:, k + 1 : k + 1 + places]]
        losses = []
        for use in (False, True):
            x = torch.cat([states[:, :places] if use else torch.zeros_like(states[:, :places]), given], -1)
            what = f"probe {k} tokens ahead {'with' if use else 'without'} the state"
            probe = _fit(x[fit], target[fit], x[choose], target[choose], count, seed, what)
            with torch.no_grad():
                logits = probe(x[measure])
            losses.append(F.cross_entropy(logits.transpose(1, 2), target[measure], reduction="none").mean(1))
        found.append((losses[0] - losses[1], losses[0].mean()))
    gains = torch.stack([gain for gain, _ in found])  # [K - 1, pieces]
    root = math.sqrt(gains.shape[1])
    return Surplus(
        tuple(gains.mean(1).tolist()),
        tuple((gains.std(1) / root).tolist()),
        tuple(float(loss) for _, loss in found),
        float(gains.sum(0).mean()),
        float(gains.sum(0).std() / root),
    )


def _components(hidden: Tensor, fit: Tensor) -> Tensor:
    """The leading principal components of states, standardised, by the pieces that probes are fitted on."""
    seen = hidden[fit].flatten(0, 1)
    mean = seen.mean(0)
    kept = min(COMPONENTS, hidden.shape[2])
    directions = torch.linalg.eigh((seen - mean).T @ (seen - mean) / len(seen))
    axes = directions.eigenvectors[:, -kept:] / directions.eigenvalues[-kept:].clamp(min=1e-10).sqrt()
    return (hidden - mean) @ axes


def _classes(ids: Tensor, vocab: int, classes: int) -> Tensor:
    """int64 `[V]`: the class of each token; the last class is for all that are not frequent."""
    if vocab <= classes:
        return torch.arange(vocab)
    frequent = torch.bincount(ids.flatten(), minlength=vocab).topk(classes - 1).indices
    return torch.full((vocab,), classes - 1).scatter(0, frequent, torch.arange(classes - 1))


def _fit(
    x: Tensor, target: Tensor, other: Tensor, wanted: Tensor, count: int, seed: int, what: str
) -> nn.Module:
    """A probe fitted on x `[P, L, D]`, as it was when the other pieces were predicted best."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = int(max(target.max(), wanted.max())) + 1
        probe = nn.Sequential(nn.Linear(x.shape[2], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, size))
        optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3, weight_decay=0.05)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
        rows, labels = x.flatten(0, 1), target.flatten()
        best, kept = math.inf, {name: value.clone() for name, value in probe.state_dict().items()}
        for step in steps(count, what):
            chosen = torch.randint(len(rows), (512,))
            loss = F.cross_entropy(probe(rows[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            if step % 20 == 19 or step == count - 1:
                with torch.no_grad():
                    now = float(F.cross_entropy(probe(other).flatten(0, 1), wanted.flatten()))
                if now < best:
                    best, kept = now, {name: value.clone() for name, value in probe.state_dict().items()}
    probe.load_state_dict(kept)
    return probe


@torch.no_grad()
def layer_states(model: Any, ids: Tensor, batch: int = 8) -> list[Tensor]:
    """States of a model between its layers.

    Args:
        model: has `embedding`, `layers` and `hidden(ids)`.
        ids: int64 `[P, L]`.
        batch: pieces that the model reads at once.

    Returns:
        The embeddings, what each layer but the last gives, and what the output layer reads: each `[P, L, C]`.

    Raises:
        TypeError: the model lacks these parts.
    """
    if not all(hasattr(model, part) for part in ("embedding", "layers", "hidden")):
        raise TypeError(
            f"expected a language model with `embedding`, `layers` and `hidden` but got {type(model).__name__}"
        )
    parts = []
    for piece in ids.split(batch):
        seen: list[Tensor] = [model.embedding(piece)]
        with ExitStack() as stack:
            for layer in list(model.layers)[:-1]:
                hook = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(_tensor(out)))
                stack.callback(hook.remove)
            last = model.hidden(piece)
        parts.append([*seen, last])
    return [torch.cat([part[i] for part in parts]) for i in range(len(parts[0]))]


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def chain_of_three(vocab: int, seed: int) -> Tensor:
    """A random chain whose next token depends on the last three: float64 `[V, V, V, V]`, oldest first."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(vocab, vocab, vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)


def chain_surplus(chain: Tensor) -> float:
    """I(two tokens before; token after next | next token) of a chain in its stationary law, summed exactly, in nats."""
    law = torch.full(chain.shape[:3], 1.0 / chain[..., 0].numel(), dtype=chain.dtype)
    for _ in range(500):
        law = torch.einsum("abc,abcd->bcd", law, chain)
    joint = law.unsqueeze(-1) * chain  # the two before, the next, the one after it
    given_next = joint.sum((0, 1))
    narrow = -(given_next * (given_next / given_next.sum(1, keepdim=True)).log()).sum()
    wide = -(joint * chain.log()).sum()
    return float(narrow - wide)


def draw_chain(chain: Tensor, pieces: int, length: int, seed: int) -> Tensor:
    """Texts of a chain, int64 `[pieces, length]`, after 20 tokens that are dropped."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(chain), (pieces, 3), generator=generator)
    for _ in range(length + 20):
        law = chain[rows[:, -3], rows[:, -2], rows[:, -1]]
        rows = torch.cat([rows, law.multinomial(1, generator=generator)], dim=1)
    return rows[:, -length:]
