"""Reinforcement learning for generative AI: where the signal comes from, side by side (Cao et al., arXiv:2308.14328).

The survey orders methods by what teaches the generator. Its reward sources stand here as interchangeable parts over one
generator, a small model of letters of the King James Version, with one reward, the share of vowels: SCST learns from
the reward itself, SeqGAN from a discriminator, RLHF by PPO from a model of preferences, DPO from preferences alone, and
value-guided decoding leaves the generator as it is. One command, one table: reward, and how far the generator went from
where it was. `--taxonomy FILE` writes the survey's groups with the systems of this zoo in them.

Left out: images and molecules; programs and architectures as generators.

Nearest neighbours here: `align`, which has a language model in the generator's place. Legend: B words, T letters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore.catalog import System, catalog
from arcore.catalog.claims import Claim, Row, at_least, at_most
from arcore.catalog.running import Report
from arcore.nn.checks import check_choice
from arcore.nn.kinds import check_kinds
from arcore.zoo.alignment.generative_rl.methods import METHODS, Setting, judged, scst_loss, seqgan_loss
from arcore.zoo.alignment.generative_rl.writer import pretrained, texts, vowel_share

SYSTEM = System(
    name="generative_rl",
    title="RL for generative AI",
    paper="arXiv:2308.14328",
    paper_title="Reinforcement Learning for Generative AI: A Survey",
    topic="alignment",
    kind="objective",
    summary="SCST, SeqGAN, PPO-RLHF, DPO and value-guided decoding on one generator, in one table.",
    claim=(
        "SCST's and SeqGAN's gradients are unbiased, by enumeration; each method raises the reward by at least 0.1 and "
        "stays within half a nat per letter of the model it began with."
    ),
    checked_on="real data",
    ops=("token_logprobs",),
    builds_on=("align",),
)

# The survey's groups, and the systems here whose signal is of that kind.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "through steps that have no derivative": ("the task's own reward", ("align", "vla_rl")),
    "a signal from preferences": ("raters of pairs", ("spo", "inpo", "srpo", "length_controlled")),
    "a signal from verifiers": ("right or wrong", ("nft", "align")),
    "a signal from several rewards": ("weights of rewards", ("dynamic_reward_weighting", "c_morl")),
    "a signal from the data's own law": ("likelihood ratios to data", ("ddo",)),
    "search and sampling": ("values at decoding time", ("rain", "genarm")),
    "values of actions": ("soft Q of tokens", ("arsq",)),
    "programs as rewards": ("code that a model wrote", ("auto_mc_reward", "lma3")),
}


def taxonomy() -> str:
    """The survey's groups as a table in Markdown; of systems, those that the catalogue has."""
    known = catalog()
    lines = [
        "# Reinforcement learning for generative models",
        "",
        "By where the signal comes from, after Cao et al., arXiv:2308.14328. Made by",
        "`arcore run generative_rl --taxonomy FILE` from what the systems declare.",
        "",
        "| group | signal | here |",
        "|---|---|---|",
    ]
    lines += [
        f"| one generator, one table | {text} | `generative_rl`: {name} |"
        for name, (_, text) in METHODS.items()
    ]
    for group, (signal, names) in GROUPS.items():
        found = [f"[{known[n].system.title}]({known[n].system.url})" for n in names if n in known]
        if found:
            lines.append(f"| {group} | {signal} | {', '.join(found)} |")
    return "\n".join(lines) + "\n"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """Methods on one generator.

    Attributes:
        method: one of scst, seqgan, ppo_rlhf, dpo, value_guided, or all.
        updates: of the generator (of the value network, where it stays as it is).
        pretraining: updates of the generator before.
        words: drawn to judge each.
        taxonomy: file for the table of groups. Default: none.
        seed: decides everything random.
    """

    method: str = "all"
    updates: int = 150
    pretraining: int = 400
    words: int = 2000
    taxonomy: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("--method", self.method, ("all", *METHODS))
        if min(self.updates, self.pretraining, self.words) < 2:
            raise ValueError("expected --updates, --pretraining and --words of at least 2")


def compare(options: Options) -> dict[str, tuple[float, float, float]]:
    """Reward, its standard error and KL per letter, of the base model and of each method."""
    from arcore.zoo.alignment.generative_rl.methods import Tuned

    data = texts()
    base = pretrained(data, updates=options.pretraining, seed=options.seed)
    plain = Tuned(lambda count, generator: base.draw(count, generator), base.logprobs)
    judging: dict[str, Any] = {"count": options.words, "seed": options.seed + 1}
    found = {"base": judged(plain, base, vowel_share, **judging)}
    names = METHODS if options.method == "all" else (options.method,)
    for name in names:
        tuned = METHODS[name][0](base, data, vowel_share, Setting(updates=options.updates, seed=options.seed))
        found[name] = judged(tuned, base, vowel_share, **judging)
    return found


def run(options: Options) -> Report:
    """Move one generator towards a reward in each way."""
    found = compare(options)
    lines = [f"{'method':14}{'reward':>9}{'s.e.':>8}{'gain':>8}{'KL per letter':>15}   signal"]
    for name, (reward, error, apart) in found.items():
        signal = METHODS[name][1] if name in METHODS else "likelihood"
        lines.append(
            f"{name:14}{reward:9.4f}{error:8.4f}{reward - found['base'][0]:8.4f}{apart:15.4f}   {signal}"
        )
    if options.taxonomy is not None:
        from arcore._files import atomic_path

        with atomic_path(options.taxonomy) as temporary:
            temporary.write_text(taxonomy(), encoding="utf-8")
        lines.append(f"taxonomy: {options.taxonomy}")

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, (reward, error, apart) in found.items():
            axes.errorbar([apart], [reward], yerr=[error], marker="o", linestyle="", label=name)
        axes.set(xlabel="KL from the base model, nats per letter", ylabel="share of vowels")
        axes.legend()

    values = {name: {"reward": r, "error": e, "kl": k} for name, (r, e, k) in found.items()}
    return Report("\n".join(lines), values, draw)


def _table(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a table policy of three letters of four (a row per prefix), all words, and rewards, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1 + 4 + 16, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    words = torch.cartesian_prod(*[torch.arange(4)] * 3)
    return logits, words, torch.rand(64, generator=generator, dtype=torch.float64)


def _logprobs(logits: Tensor, words: Tensor) -> Tensor:
    rows = torch.stack([0 * words[:, 0], 1 + words[:, 0], 5 + 4 * words[:, 0] + words[:, 1]], 1)
    return logits.log_softmax(-1)[rows, words]


def gradient_errors(seed: int) -> tuple[float, float]:
    """Distance of the expected gradients of SCST and of SeqGAN from that of the expected reward, by enumeration."""
    logits, words, rewards = _table(seed)
    logp = _logprobs(logits, words)
    law = logp.sum(1).exp()
    (wanted,) = torch.autograd.grad((law * rewards).sum(), logits, retain_graph=True)
    letters: list[int] = []
    for row in (lambda w: 0, lambda w: 1 + w[0], lambda w: 5 + 4 * w[0] + w[1]):
        letters.append(int(logits[row(letters)].argmax()))
    greedy = rewards[16 * letters[0] + 4 * letters[1] + letters[2]]
    # Expectations: each word's loss, weighted by its probability.
    weight = law.detach()
    scst = sum(weight[i] * scst_loss(logp[i : i + 1], rewards[i : i + 1], greedy) for i in range(64))
    conditional = law.detach().view(4, 4, 4)
    table = rewards.view(4, 4, 4)
    first = (conditional * table).sum((1, 2)) / conditional.sum((1, 2))
    second = (conditional * table).sum(2) / conditional.sum(2)
    q = torch.stack([first[words[:, 0]], second[words[:, 0], words[:, 1]], rewards], 1)
    seqgan = sum(weight[i] * seqgan_loss(logp[i : i + 1], q[i : i + 1]) for i in range(64))
    found = []
    for loss in (scst, seqgan):
        assert isinstance(loss, Tensor)
        (gradient,) = torch.autograd.grad(-loss, logits, retain_graph=True)
        found.append(float((gradient - wanted).abs().max()))
    return found[0], found[1]


def claim(*, quick: bool) -> Claim:
    """Unbiased gradients, and (in full) every method in one table."""
    errors = [gradient_errors(seed) for seed in range(2 if quick else 10)]
    rows: tuple[Row, ...] = (
        at_most(
            "SCST: expected gradient against that of the expected reward", max(e for e, _ in errors), 1e-10
        ),
        at_most("SeqGAN: the same, for a fixed discriminator", max(e for _, e in errors), 1e-10),
    )
    if not quick:
        # The methods' settings were chosen on seed 0; what is told of them is told on another.
        found = compare(Options(updates=200, seed=31))
        for name in METHODS:
            reward, _, apart = found[name]
            rows += (
                at_least(f"{name}: gain in the share of vowels", reward - found["base"][0], 0.1),
                at_most(f"{name}: KL from the base model, nats per letter", apart, 0.5),
            )
    return Claim(rows)
