"""GRPO and its named variants, and one command for every alignment objective here (Shao et al., arXiv:2402.03300).

A policy draws several responses to each prompt; a verifier, one or several rewards, or a rater of pairs judges them;
the objective turns judgements into a gradient on log-probabilities. arcore draws and scores with the same ops, the
sampler's kept sets included, so on-policy every ratio is exactly 1. `arcore run align --objective NAME` knows GRPO,
Dr. GRPO, DAPO, GSPO, PPO, RFT, NFT, DPO, IPO, SLiC's hinge, KTO, INPO, SRPO, SPO and dynamic reward weighting; the
prompt of a group is read once. Weights move through LoRA (by peft) or as a whole.

Left out: value models of their own trunk, asynchronous sampling, several machines.

Nearest neighbours here: the objectives' own systems (NFT, INPO, SRPO, SPO), which check their papers' claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from arcore.catalog import System
from arcore.catalog.running import Report, check_bounds
from arcore.nn.checks import check_choice
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="align",
    title="GRPO and its variants",
    paper="arXiv:2402.03300",
    paper_title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    topic="alignment",
    kind="objective",
    summary="One command that aligns a language model with any objective here, from verifiers, rewards or raters.",
    claim=(
        "On-policy the gradient is that of REINFORCE with the group's baseline, rewards count up to scale and offset, "
        "and a small model learns palindromes from a verifier; SmolLM2-135M learns a rule through LoRA."
    ),
    checked_on="published weights",
    reported="51.7 % on MATH by a model of 7 B parameters, 46.8 % before",
    ops=("token_logprobs", "sample", "block_sparse_attention"),
    builds_on=("nft", "inpo", "srpo", "spo", "dynamic_reward_weighting", "reusable_holdout"),
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """A policy, its prompts and its judge.

    Attributes:
        prompts: text file with a prompt per line (\\n for a new line), or JSON lines with "prompt"; or
            reasoning_gym:TASK or reasoning_gym:TASK:COUNT, problems of the package reasoning-gym.
        reward: FILE.py with reward(prompt, response), rewards(prompt, response) or prefer(prompt, first, second); or
            regex:PATTERN, words:N, vowels; or reasoning_gym, the package's own check of answers to its problems.
        objective: `grpo`, dr_grpo, dapo, gspo, ppo, rft, nft, dpo, ipo, hinge, kto, inpo, srpo, spo, drw or
            drw_hypervolume.
        model: run folder, checkpoint, or smollm2_135m.
        reference: another frozen model with the same vocabulary. Default: the policy as it was.
        out: folder of checkpoints, figures and failed rewards.
        resume: go on from the checkpoint there.
        evaluate: only evaluate what is there; needs a checkpoint.
        steps: to do in all.
        group: responses to each prompt.
        prompts_per_step: prompts of a step.
        updates: optimiser steps on each rollout; 1 is on-policy.
        max_new_tokens: longest response.
        temperature: of the draws, above 0.
        top_p: mass of the nucleus. Default: all.
        top_k: likeliest tokens kept. Default: all.
        min_p: share of the largest probability. Default: none.
        template: what a prompt is put into, with {prompt} in it.
        lr: learning rate.
        lora_rank: rank of the adapters; 0 trains all weights.
        max_grad_norm: gradients are scaled down to this norm.
        kl_weight: of the KL divergence from the reference; 0 lets the policy go wherever the reward is.
        clip_low: how far below 1 a ratio counts.
        clip_high: how far above 1 (dapo and gspo bring their own).
        clip_negative: limit of the ratio where the advantage is negative, above 1. Default: none.
        entropy_share: share of the tokens that count, those of the highest entropy.
        beta: of dpo, ipo, hinge, kto and srpo.
        tau: of inpo, the weight of the KL divergence; at most eta.
        eta: of inpo, the inverse of the step's size.
        smoothing: lambda of ppo's advantages.
        value_weight: of ppo's critic.
        weights: of several rewards, in their order. Default: equal.
        weights_lr: of drw's weights; drw_hypervolume keeps the weights and scales all rewards by what the last
            evaluation of the training prompts added to the front.
        on_reward_error: skip the step, or stop; the responses are kept either way.
        held_out: share of the prompts that are only evaluated on, behind a guard against looking too often.
        eval_every: steps between evaluations; one more at the beginning and the end.
        eval_samples: responses to each prompt of an evaluation.
        reward_range: least and largest reward, for the guard.
        guard_budget: how often the guard may tell what the held-out prompts say.
        save_every: steps between checkpoints.
        save_merged: also write the whole model, adapters added in, into the run's folder.
        seed: decides everything random.
    """

    prompts: str | Path
    reward: str
    objective: str = "grpo"
    model: str = "smollm2_135m"
    reference: str | None = None
    out: Path = Path("out/align")
    resume: bool = False
    evaluate: bool = False
    steps: int = 100
    group: int = 8
    prompts_per_step: int = 2
    updates: int = 1
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    template: str = "{prompt}"
    lr: float = 1e-4
    lora_rank: int = 8
    max_grad_norm: float = 1.0
    kl_weight: float = 0.05
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_negative: float | None = None
    entropy_share: float = 1.0
    beta: float = 0.1
    tau: float = 0.01
    eta: float = 0.03
    smoothing: float = 0.95
    value_weight: float = 0.5
    weights: tuple[float, ...] = field(default=())
    weights_lr: float = 0.5
    on_reward_error: Literal["skip", "stop"] = "skip"
    held_out: float = 0.25
    eval_every: int = 50
    eval_samples: int = 4
    reward_range: tuple[float, float] = (0.0, 1.0)
    guard_budget: int = 20
    save_every: int = 10
    save_merged: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(
            self,
            least={
                name: 0
                for name in (
                    "lora_rank",
                    "kl_weight",
                    "clip_low",
                    "clip_high",
                    "tau",
                    "eta",
                    "smoothing",
                    "value_weight",
                    "weights_lr",
                    "guard_budget",
                )
            }
            | {"eval_samples": 1},
            above={"entropy_share": 0},
            # No bound, as the ratio has none in REINFORCE.
            endless=("clip_high",),
        )
        from arcore.zoo.alignment.align.objectives import OBJECTIVES

        check_choice("--objective", self.objective, OBJECTIVES)
        for name in (
            "steps",
            "group",
            "prompts_per_step",
            "updates",
            "max_new_tokens",
            "eval_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at least 1 but got {getattr(self, name)}"
                )
        needs = OBJECTIVES[self.objective].needs
        if self.group < 2 and self.objective != "ppo":
            raise ValueError(
                f"--group 1: {self.objective} compares the responses to a prompt, and the advantage in a group of one "
                "is always 0; give at least 2, or use ppo"
            )
        if needs in ("pairs", "revisions") and self.group % 2:
            raise ValueError(
                f"--group {self.group}: {self.objective} makes pairs of a group; give an even number"
            )
        if self.objective == "inpo" and not 0 < self.tau <= self.eta:
            raise ValueError(
                f"--tau {self.tau}: expected 0 < tau <= eta={self.eta}; beyond it the last policy's weight would be "
                "negative"
            )
        for name, least in (("temperature", 0.0), ("lr", 0.0), ("beta", 0.0), ("max_grad_norm", 0.0)):
            if not least < getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected above {least:g} but got {getattr(self, name)}"
                )
        if not 0 <= self.held_out < 1 or self.lora_rank < 0 or self.kl_weight < 0:
            raise ValueError(
                f"expected --held-out in [0, 1), --lora-rank >= 0 and --kl-weight >= 0 but got {self.held_out}, "
                f"{self.lora_rank} and {self.kl_weight}"
            )
        for name in ("clip_low", "entropy_share", "smoothing"):
            if getattr(self, name) > 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at most 1 but got {getattr(self, name)}"
                )
        if self.clip_negative is not None and not self.clip_negative > 1:
            raise ValueError(
                f"--clip-negative: expected a ratio above 1 but got {self.clip_negative}; leave it out for no limit"
            )
        low, high = self.reward_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(
                f"--reward-range: expected the least reward and a larger one but got {low} and {high}"
            )
        if "{prompt}" not in self.template:
            raise ValueError(
                f"--template {self.template!r}: expected {{prompt}} in it, where the prompt goes"
            )
        if any(not 0 < w < math.inf for w in self.weights):
            raise ValueError(f"--weights: expected numbers above 0 but got {self.weights}")


def run(options: Options) -> Report:
    """Align a language model, or evaluate one that was."""
    from arcore.zoo.alignment.align.files import CHECKPOINT, load, merged, save
    from arcore.zoo.alignment.align.loop import Aligner
    from arcore.zoo.alignment.align.shown import Shown, draw, summary

    begun = (options.out / CHECKPOINT).exists()
    if begun and not (options.resume or options.evaluate):
        raise ValueError(
            f"{options.out} holds a run already: go on with --resume, evaluate it with --evaluate, or give another "
            "--out"
        )
    aligner = Aligner(options)
    if options.resume or options.evaluate:
        load(aligner)
    if options.evaluate:
        if not aligner.evaluate():
            raise RuntimeError(aligner.unjudged[-1])
        save(aligner)
        return Report(
            summary(aligner), {"evaluations": aligner.evaluations}, lambda f: draw(f, aligner), (9, 6)
        )
    with Shown(aligner) as shown:
        if aligner.held_out and not aligner.evaluations:
            shown.evaluated(aligner.evaluate())
        while aligner.step < options.steps:
            shown.add(aligner.advance())
            done = aligner.step == options.steps
            evaluating = bool(aligner.held_out) and (done or aligner.step % options.eval_every == 0)
            if evaluating or done or aligner.step % options.save_every == 0:
                # Before the evaluation, in which the judge may fail.
                save(aligner)
            if evaluating:
                shown.evaluated(aligner.evaluate())
                save(aligner)
            if done or aligner.step % options.save_every == 0:
                shown.plot()
    if options.save_merged:
        from arcore.catalog.checkpoints import save_pretrained

        policy = aligner.policy.model
        plain = type(policy)(policy.config)
        plain.load_state_dict(merged(policy))
        save_pretrained(plain, options.out / "merged")
    values = {"rows": aligner.rows, "evaluations": aligner.evaluations, "skipped": aligner.skipped}
    return Report(summary(aligner), values, lambda figure: draw(figure, aligner), (9, 6))
