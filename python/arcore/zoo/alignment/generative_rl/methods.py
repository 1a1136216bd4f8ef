"""Where the signal may come from: five ways to move one generator towards a reward.

Each takes the pretrained writer, the texts and settings, and returns a function that draws words, and one that gives
their log-probabilities under the law that they were drawn from. Legend: B words, T letters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from arcore.catalog.claims import steps
from arcore.nn.kinds import check_kinds
from arcore.objectives import gae, ppo_loss, preference_loss, value_loss
from arcore.zoo.alignment.generative_rl.writer import LENGTH, Writer

Reward = Callable[[Tensor], Tensor]


class Tuned(NamedTuple):
    """What a method made.

    Attributes:
        draw: from a count and a generator to words `[B, T]`.
        logprobs: of words, `[B, T]`.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    logprobs: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Attributes:
    updates: of the generator.
    batch: words of an update.
    seed: of all draws.
    """

    updates: int = 150
    batch: int = 64
    seed: int = 0


@check_kinds
def scst_loss(logprobs: Tensor, rewards: Tensor, greedy: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-critical sequence training (Rennie et al., arXiv:1612.00563): the greedy word's reward is the baseline.

    Args:
        logprobs: `[B, T]`, with gradient.
        rewards: `[B]`.
        greedy: scalar or `[B]`, reward of the greedy word.
        mask: `[B, T]` bool, which letters there are; None for all.
    """
    kept = logprobs if mask is None else torch.where(mask, logprobs, 0.0)
    return -((rewards - greedy).detach() * kept.sum(-1)).mean()


@check_kinds
def seqgan_loss(logprobs: Tensor, values: Tensor) -> Tensor:
    """SeqGAN's policy gradient (Yu et al., arXiv:1609.05473): `-sum Q log p`, Q `[B, T]` of each prefix and letter."""
    return -(values.detach() * logprobs).sum(-1).mean()


def _tuned(model: Writer) -> Tuned:
    return Tuned(lambda count, generator: model.draw(count, generator), model.logprobs)


def scst(base: Writer, data: Tensor, reward: Reward, s: Setting) -> Tuned:
    """Samples against the greedy word."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(s.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in steps(s.updates, "SCST"):
        words = model.draw(s.batch, generator)
        greedy = reward(model.draw(1, None))
        logprobs = model.logprobs(words)
        with (
            torch.no_grad()
        ):  # a penalty on the KL divergence per letter: without one the text is vowels alone
            apart = (logprobs - base.logprobs(words)).mean(1)
        _step(optimizer, scst_loss(logprobs, reward(words) - 0.4 * apart, greedy))
    return _tuned(model)


class Discriminator(nn.Module):
    """Tells real words from written ones: convolutions of two widths, the largest answers, a linear layer."""

    def __init__(self, letters: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.filters = nn.ModuleList(nn.Conv1d(width, width, k) for k in (1, 3))
        self.head = nn.Linear(3 * width, 1)

    def forward(self, words: Tensor) -> Tensor:
        """Logits `[B]` of being real."""
        x = self.embedding(words).transpose(1, 2)
        single, triple = (torch.relu(conv(x)) for conv in self.filters)
        out: Tensor = self.head(torch.cat([single.mean(-1), single.amax(-1), triple.amax(-1)], 1))[:, 0]
        return out


@torch.no_grad()
def completions(
    model: Writer, words: Tensor, judge: Callable[[Tensor], Tensor], count: int, generator: torch.Generator
) -> Tensor:
    """Q of each prefix and letter, `[B, T]`: the judge's mean over `count` completions; at the end, of the word."""
    batch, length = words.shape
    found = []
    for t in range(1, length):
        begun = words[:, :t].repeat_interleave(count, 0)
        done = model.draw(len(begun), generator, begun=begun, length=length)
        found.append(judge(done).view(batch, count).mean(1))
    return torch.stack([*found, judge(words)], 1)


def seqgan(base: Writer, data: Tensor, reward: Reward, s: Setting) -> Tuned:
    """A discriminator of texts of high reward; five steps of it for one of the writer, and one teacher-forced."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(s.seed)
    real = data[reward(data) >= torch.quantile(reward(data)[:20000], 0.9)]
    judge = Discriminator(model.letters)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    learner = torch.optim.Adam(judge.parameters(), lr=2e-3)
    for _ in steps(s.updates, "SeqGAN"):
        for _ in range(5):
            true = real[torch.randint(len(real), (s.batch,), generator=generator)]
            false = model.draw(s.batch, generator)
            logits = judge(torch.cat([true, false]))
            _step(
                learner,
                binary_cross_entropy_with_logits(logits, (torch.arange(2 * s.batch) < s.batch).float()),
            )
        words = model.draw(s.batch // 2, generator)
        values = completions(model, words, lambda w: torch.sigmoid(judge(w)), 4, generator)
        # A baseline of each place; the published code has none and takes smaller steps.
        _step(optimizer, seqgan_loss(model.logprobs(words), values - values.mean(0)))
        true = real[torch.randint(len(real), (s.batch // 2,), generator=generator)]
        _step(optimizer, -0.2 * model.logprobs(true).mean())
    return _tuned(model)


def _pairs(base: Writer, reward: Reward, s: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of the base model's words, the better first."""
    one, other = (base.draw(s.batch, generator) for _ in range(2))
    better = reward(one) > reward(other)
    decided = reward(one) != reward(other)
    first, second = torch.where(better[:, None], one, other), torch.where(better[:, None], other, one)
    return first[decided], second[decided]


class RewardModel(nn.Module):
    """A score of words, learnt from pairs by Bradley and Terry's law."""

    def __init__(self, letters: int, width: int = 48) -> None:
        super().__init__()
        self.writer = Writer(letters, width)
        self.head = nn.Linear(width, 1)

    def forward(self, words: Tensor) -> Tensor:
        """`[B]`."""
        out: Tensor = self.head(self.writer.states(words)[:, -1])[:, 0]
        return out


def ppo_rlhf(base: Writer, data: Tensor, reward: Reward, s: Setting) -> Tuned:
    """A reward model of preferences, and PPO with a KL penalty whose weight follows a target."""
    generator = torch.Generator().manual_seed(s.seed)
    torch.manual_seed(s.seed)
    scorer = RewardModel(base.letters)
    learner = torch.optim.Adam(scorer.parameters(), lr=3e-3)
    for _ in range(s.updates):
        better, worse = _pairs(base, reward, s, generator)
        _step(learner, -logsigmoid(scorer(better) - scorer(worse)).mean())
    model = copy.deepcopy(base)
    critic = nn.Linear(model.cell.hidden_size, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *critic.parameters()], lr=1e-3)
    weight, target = 0.1, 0.3  # of the penalty; nats per letter
    mask = torch.ones(s.batch, LENGTH, dtype=torch.bool)
    for _ in steps(s.updates, "PPO-RLHF"):
        words = model.draw(s.batch, generator)
        with torch.no_grad():
            old, reference = model.logprobs(words), base.logprobs(words)
            rewards = -weight * (old - reference)
            rewards[:, -1] += scorer(words)
            values = critic(model.states(words)[:, :-1])[..., 0]
        found = gae(rewards, values, discount=1.0, smoothing=0.95)
        gain = (found.advantages - found.advantages.mean()) / (found.advantages.std() + 1e-8)
        for _ in range(2):
            now = critic(model.states(words)[:, :-1].detach())[..., 0]
            loss = ppo_loss(model.logprobs(words), old, gain, mask) + 0.5 * value_loss(
                now, found.returns, mask
            )
            _step(optimizer, loss)
        error = float((old - reference).mean()) / target - 1
        weight *= 1 + 0.1 * max(-1.0, min(1.0, error))
    return _tuned(model)


def dpo(base: Writer, data: Tensor, reward: Reward, s: Setting) -> Tuned:
    """Pairs of the base model's words, without a reward model or sampling from the policy."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(s.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    for _ in steps(s.updates, "DPO"):
        better, worse = _pairs(base, reward, s, generator)
        both = torch.cat([better, worse])
        with torch.no_grad():
            reference = base.logprobs(both).sum(1).view(2, -1).T
        policy = model.logprobs(both).sum(1).view(2, -1).T
        _step(optimizer, preference_loss(policy, reference, torch.ones(len(better)), beta=1.0))
    return _tuned(model)


def value_guided(base: Writer, data: Tensor, reward: Reward, s: Setting) -> Tuned:
    """The base model's own letters, weighed by what a value network expects of them; its weights stay."""
    generator = torch.Generator().manual_seed(s.seed)
    torch.manual_seed(s.seed)
    value = RewardModel(base.letters)
    learner = torch.optim.Adam(value.parameters(), lr=3e-3)
    for _ in steps(s.updates, "value-guided decoding"):
        words = base.draw(4 * s.batch, generator)
        every = value.head(value.writer.states(words)[:, 1:])[..., 0]
        _step(learner, (every - reward(words)[:, None]).square().mean())
    beta, top = 0.02, 12

    @torch.no_grad()
    def weighed(logits: Tensor, begun: Tensor) -> Tensor:
        best = logits.topk(top, -1).indices
        tried = torch.cat([begun.repeat_interleave(top, 0), best.flatten()[:, None]], 1)
        worth = value(tried).view(-1, top)
        kept = logits.log_softmax(-1).gather(1, best) + worth / beta
        return torch.full_like(logits, -torch.inf).scatter(1, best, kept)

    def guide(logits: Tensor, state: Any, begun: Tensor) -> Tensor:
        return weighed(logits, begun)

    def logprobs(words: Tensor) -> Tensor:
        states = base.states(words)[:, :-1]
        laws = [weighed(base.head(states[:, t]), words[:, :t]).log_softmax(-1) for t in range(words.shape[1])]
        return torch.stack(laws, 1).gather(-1, words[..., None])[..., 0]

    return Tuned(lambda count, g: base.draw(count, g, guide=guide), logprobs)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


METHODS: dict[str, tuple[Callable[[Writer, Tensor, Reward, Setting], Tuned], str]] = {
    "scst": (scst, "the reward itself, the greedy word as baseline"),
    "seqgan": (seqgan, "a discriminator, asked about completions"),
    "ppo_rlhf": (ppo_rlhf, "a reward model of preferences"),
    "dpo": (dpo, "preferences, without a reward model"),
    "value_guided": (value_guided, "a value network, at decoding time"),
}


@torch.no_grad()
def judged(
    tuned: Tuned, base: Writer, reward: Reward, *, count: int, seed: int
) -> tuple[float, float, float]:
    """Mean reward, its standard error, and KL from the base model in nats per letter."""
    words = tuned.draw(count, torch.Generator().manual_seed(seed))
    found = reward(words)
    apart = (tuned.logprobs(words) - base.logprobs(words)).mean()
    return float(found.mean()), float(found.std() / count**0.5), float(apart)
