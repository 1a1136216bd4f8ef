"""NFT: negative-aware fine-tuning, supervised learning from right and wrong answers (Chen et al., arXiv:2505.18116).

A verifier calls each answer right or wrong; r is the share of right ones among a prompt's answers. Fine-tuning on the
right ones alone (RFT) maximises their log-likelihood. The model that drew the answers is the mixture
`old = r positive + (1 - r) negative`, so a policy that stands for the positive part implies a negative one, and wrong
answers train the policy through it. With R = policy / old per token::

    right:  -log R
    wrong:  -log max(N, floor),   N = (1 - r R) / (1 - r)

weighted per prompt by sqrt((1 - r) / r) or by 1 - r. The maximum has the gradient of N itself (straight-through), so
a token with R > 1 / r, whose N is negative, still is pushed down. On-policy the gradient is that of GRPO: with the
first weight, of GRPO with the *population* standard deviation; with the second, of Dr. GRPO. Off-policy they differ.

Nearest neighbour here: `arcore.objectives.grpo_loss`. Legend: B responses, T tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from arcore.catalog import System
from arcore.catalog.claims import Claim, Row, at_least, at_most, steps
from arcore.nn.kinds import check_kinds
from arcore.objectives import group_advantages, group_statistics, grpo_loss, log_ratio, reduce
from arcore.objectives.policy import Ratio, Reduction
from arcore.ops import token_logprobs

SYSTEM = System(
    name="nft",
    title="NFT",
    paper="arXiv:2505.18116",
    paper_title="Bridging Supervised Learning and Reinforcement Learning in Math Reasoning",
    topic="alignment",
    kind="objective",
    summary="Supervised learning from verified answers, the wrong ones through the negative policy they imply.",
    claim=(
        "On-policy its gradient is GRPO's with the population standard deviation; off-policy it is another one; ratios "
        "beyond 1 / r stay finite; a small model learns from a verifier as with GRPO."
    ),
    checked_on="closed form",
    ops=("token_logprobs",),
)

# Log-ratios and shares of right answers beyond these would make one token outweigh the batch.
_LARGEST_LOG_RATIO = 10.0
_SHARES = (0.02, 0.98)


@check_kinds
def nft_loss(
    logprobs: Tensor,
    old: Tensor,
    correct: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    prompt_weight: Literal["root", "wrong", "none"] = "root",
    negative_weight: float = 1.0,
    floor: float = 1.0,
    ratio: Ratio = "token",
    how: Reduction = "token_mean",
    length: int | None = None,
) -> Tensor:
    """Loss of verified answers; scalar.

    Prompts whose answers are all right or all wrong count nothing: their loss and gradient are 0.

    Args:
        logprobs: `[B, T]` log-probabilities of the tokens under the policy, with gradient.
        old: `[B, T]` under the policy that drew them.
        correct: `[B]`, 1 or True for right answers, 0 for wrong ones.
        groups: `[B]` integers, one number per prompt.
        mask: `[B, T]` bool, the responses' tokens.
        prompt_weight: "root", sqrt((1 - r) / r); "wrong", 1 - r; or "none", 1.
        negative_weight: of the wrong answers; 1 is NFT, 0 is RFT.
        floor: least value of N inside the logarithm, above 0; 1 in the published code.
        ratio: of each token or of the whole response.
        how: see `arcore.objectives.reduce`.
        length: see `arcore.objectives.reduce`.

    Raises:
        ValueError: shapes differ, an answer is neither right nor wrong, or a number is out of range.
    """
    if correct.shape != logprobs.shape[:1] or not ((correct == 0) | (correct == 1)).all():
        raise ValueError(
            f"arcore.nft_loss: expected correct ({len(logprobs)},) of 0 and 1 but got shape {tuple(correct.shape)} "
            f"with values {sorted(set(correct.flatten().tolist()))[:4]}; NFT needs a verifier, not a graded reward"
        )
    if not floor > 0 or not 0 <= negative_weight < math.inf:
        raise ValueError(
            f"arcore.nft_loss: expected floor > 0 and negative_weight >= 0 but got {floor} and {negative_weight}; "
            "1 and 1 are NFT"
        )
    right = correct.to(logprobs.dtype)
    found = group_statistics(right, groups)
    share = found.mean.clamp(*_SHARES)
    weights = {"root": ((1 - share) / share).sqrt(), "wrong": 1 - share, "none": torch.ones_like(share)}
    if prompt_weight not in weights:
        raise ValueError(
            f"arcore.nft_loss: expected prompt_weight to be one of {', '.join(weights)} but got {prompt_weight!r}; "
            "the paper's is 'root'"
        )
    weight = torch.where(found.equal, 0.0, weights[prompt_weight])
    apart = log_ratio(logprobs, old, mask, ratio=ratio).clamp(max=_LARGEST_LOG_RATIO)
    negative = (1 - share[:, None] * apart.exp()) / (1 - share[:, None])
    floored = negative + (negative.clamp(min=floor) - negative).detach()
    loss = torch.where(right[:, None] == 1, -apart, -negative_weight * floored.log())
    return reduce(weight[:, None] * loss, mask, how=how, length=length)


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def _against_grpo(seed: int, noise: float, deviation: str = "population") -> float:
    """Distance of the gradients of NFT and of GRPO without clipping, relative to GRPO's."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens, size = 64, 12, 16
    logits = torch.randn(rows, tokens, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 9, (rows, tokens, 1), generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, target)[..., 0]
    old = logprobs.detach() + noise * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    groups = torch.arange(rows) // size
    # From 1 to 15 right answers of 16, so no prompt drops out.
    correct = (torch.arange(rows) % size) < torch.randint(1, size, (4,), generator=generator)[groups]
    gain = group_advantages(correct.double(), groups, deviation=deviation)  # type: ignore[arg-type]
    weight: Literal["root", "wrong"] = "wrong" if deviation == "none" else "root"
    ours = nft_loss(logprobs, old, correct, groups, mask, prompt_weight=weight)
    theirs = grpo_loss(logprobs, old, gain, mask, clip_low=1.0, clip_high=math.inf, how="token_mean")
    one, other = _gradient(ours, logits), _gradient(theirs, logits)
    return float((one - other).norm() / other.norm())


class Speller(nn.Module):
    """A small autoregressive model of words, for the check: a GRU with one weight per letter pair.

    Args:
        letters: size of the alphabet V.
        length: letters of a word T.
        width: of the state.
    """

    def __init__(self, letters: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.letters, self.length = letters, length
        self.embedding = nn.Embedding(letters + 1, width)
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, letters)

    def forward(self, words: Tensor) -> Tensor:
        """Logits `[B, T, V]` of the letters of words `[B, T]`, each from those before it."""
        begin = words.new_full((len(words), 1), self.letters)
        state = self.embedding.weight.new_zeros(len(words), self.embedding.embedding_dim)
        logits = []
        for letter in torch.cat([begin, words], 1)[:, : self.length].unbind(1):
            state = self.cell(self.embedding(letter), state)
            logits.append(self.head(state))
        return torch.stack(logits, 1)

    @torch.no_grad()
    def draw(self, count: int) -> Tensor:
        """`count` words `[B, T]`, by torch's random numbers."""
        letter = torch.full((count,), self.letters)
        state = self.embedding.weight.new_zeros(count, self.embedding.embedding_dim)
        words = []
        for _ in range(self.length):
            state = self.cell(self.embedding(letter), state)
            letter = self.head(state).softmax(-1).multinomial(1)[:, 0]
            words.append(letter)
        return torch.stack(words, 1)


def learn_palindromes(objective: Literal["nft", "grpo"], *, updates: int, seed: int) -> tuple[float, float]:
    """Share of palindromes among words of four letters of seven, before and after training on a verifier's word."""
    torch.manual_seed(seed)
    model = Speller(7, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def share() -> float:
        words = model.draw(4096)
        return float((words == words.flip(1)).all(1).float().mean())

    before = share()
    groups, mask = torch.zeros(64, dtype=torch.int64), torch.ones(64, 4, dtype=torch.bool)
    for _ in steps(updates, f"{objective} on palindromes"):
        words = model.draw(64)
        correct = (words == words.flip(1)).all(1)
        logprobs = token_logprobs(model(words), words).logp
        if objective == "nft":
            loss = nft_loss(logprobs, logprobs.detach(), correct, groups, mask)
        else:
            loss = grpo_loss(logprobs, logprobs.detach(), group_advantages(correct.float(), groups), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, share()


def claim(*, quick: bool) -> Claim:
    """NFT against GRPO in float64, a ratio beyond 1 / r, and (in full) learning from a verifier."""
    seeds = range(2 if quick else 20)
    logprobs = torch.tensor([[math.log(10.0)], [0.0]], dtype=torch.float64, requires_grad=True)
    far = torch.cat([logprobs, torch.zeros(2, 1, dtype=torch.float64)])
    loss = nft_loss(
        far,
        torch.zeros(4, 1, dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        torch.zeros(4, dtype=torch.int64),
        torch.ones(4, 1, dtype=torch.bool),
    )
    pushed = _gradient(loss, logprobs)
    rows: tuple[Row, ...] = (
        at_most("on-policy gradient against GRPO's, relative", max(_against_grpo(s, 0) for s in seeds), 1e-6),
        at_most(
            "the same with weight 1 - r against Dr. GRPO's",
            max(_against_grpo(s, 0, "none") for s in seeds),
            1e-6,
        ),
        at_least("the same against GRPO with the sample deviation", _against_grpo(0, 0, "sample"), 0.02),
        at_least("the same at log-ratios of 0.3", min(_against_grpo(s, 0.3) for s in seeds), 0.1),
        at_least(
            "gradient that pushes a wrong token at R = 10, r = 0.5 down, if finite",
            pushed[0, 0] if torch.isfinite(pushed).all() else math.nan,
            0.1,
        ),
    )
    if not quick:
        for objective in ("nft", "grpo"):
            found = [learn_palindromes(objective, updates=200, seed=s) for s in range(3)]  # type: ignore[arg-type]
            rows += (
                at_most(f"{objective}: palindromes before, of 3 seeds", max(b for b, _ in found), 0.04),
                at_least(f"{objective}: palindromes after, of 3 seeds", min(a for _, a in found), 0.95),
            )
    return Claim(rows)
