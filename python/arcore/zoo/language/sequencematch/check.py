"""The check of the claim."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.decoding import Sampling, Session
from arcore.decoding.laws import small_model
from arcore.zoo.language.sequencematch.edits import (
    History,
    contexts,
    edited_hidden,
    noisy,
    write_with_backspace,
)
from arcore.zoo.language.sequencematch.loss import phi, sequencematch_loss

# A regular language: in state s two of eight symbols may follow, and the symbol is the next state.
SYMBOLS, STATES = 8, 8
FOLLOW = [((3 * s + 1) % STATES, (5 * s + 2) % STATES) for s in range(STATES)]


def sentences(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Words of the language, int64 `[count, length]`."""
    rows = torch.randint(SYMBOLS, (count, 1), generator=generator)
    table = torch.tensor(FOLLOW)
    while rows.shape[1] < length:
        choice = torch.randint(2, (count,), generator=generator)
        rows = torch.cat([rows, table[rows[:, -1], choice].unsqueeze(1)], dim=1)
    return rows


def valid(text: list[int]) -> bool:
    """Whether a text is a word of the language."""
    return all(b in FOLLOW[a] for a, b in itertools.pairwise(text))


def identities(gamma: float = 0.9, depth: int = 3, actions: int = 2) -> tuple[float, float]:
    """Exact sums over all texts of a tabular model that ends after `depth` actions in a state that stays.

    Returns:
        |E[V - gamma V'] - V(s0)| in the discounted occupancy of a policy, and the distance of the objective at
        alpha = 0 from the discounted log-likelihood.
    """
    generator = torch.Generator().manual_seed(0)
    scores = {
        text: torch.randn(actions, generator=generator, dtype=torch.float64)
        for n in range(depth)
        for text in itertools.product(range(actions), repeat=n)
    }
    ends = {
        text: torch.randn((), generator=generator, dtype=torch.float64)
        for text in itertools.product(range(actions), repeat=depth)
    }
    behaviour = {text: torch.rand(actions, generator=generator, dtype=torch.float64) for text in scores}
    value = {text: score.logsumexp(0) for text, score in scores.items()} | ends
    zero = torch.zeros((), dtype=torch.float64)
    telescoped, gained, likelihood = zero, zero, zero
    for text in ends:
        chance = zero + 1
        for t in range(depth):
            law = behaviour[text[:t]] / behaviour[text[:t]].sum()
            chance = chance * law[text[t]]
        for t in range(depth):
            state, after, weight = text[:t], text[: t + 1], chance * gamma**t
            telescoped = telescoped + weight * (value[state] - gamma * value[after])
            gained = gained + weight * (scores[state][text[t]] - gamma * value[after])
            likelihood = likelihood + weight * scores[state].log_softmax(0)[text[t]]
        # The last state stays: its only action has the value of the state.
        rest = chance * gamma**depth / (1 - gamma)
        telescoped = telescoped + rest * (1 - gamma) * value[text]
        gained = gained + rest * (1 - gamma) * value[text]
    objective = gained - telescoped / 2 - value[()] / 2
    return float((telescoped - value[()]).abs()), float((objective - likelihood).abs())


@torch.no_grad()
def context_error(model: Any, raw: Tensor, backspace: int) -> float:
    """Logits of one pass over edit histories beside those of every edited text, read anew."""
    hidden = model.logits(edited_hidden(model, raw, backspace))
    worst = 0.0
    for row, tokens in enumerate(raw.tolist()):
        for i, text in enumerate(contexts(tokens, backspace)):
            alone = model(torch.tensor([text]))[0, -1]
            worst = max(worst, float((alone - hidden[row, i]).abs().max()))
    return worst


def trained(count: int, rate: float = 0.1) -> tuple[Any, int]:
    """A small model of the language with a backspace, by likelihood that turns into the objective."""
    backspace = SYMBOLS
    model = small_model(SYMBOLS + 1, seed=2, scale=0.0).requires_grad_(True).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    own: Continued | None = None
    for step in steps(count, "training with a backspace"):
        history = noisy(sentences(32, 25, generator), backspace, rate, generator)
        weight = min(step / (0.2 * count), 1.0)
        if weight and (own is None or step % 20 == 0):
            texts = noisy(sentences(64, 25, generator), backspace, rate, generator)
            own = continued(model, texts, backspace, count=64, seed=step)
        loss = edit_loss(model, history, own, backspace, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), backspace


def edit_loss(
    model: Any, history: Any, own: Continued | None, backspace: int, *, weight: float, alpha: float = 0.01,
    gamma: float = 0.998,
) -> Tensor:  # fmt: skip
    """Likelihood and the objective, mixed.

    Args:
        model: trained.
        history: texts with edits.
        own: the model's own edit histories; None where the weight is 0.
        backspace: the action.
        weight: of the objective; the likelihood has the rest.
        alpha: of the objective.
        gamma: of the objective.
    """
    logits = model.logits(edited_hidden(model, history.raw, backspace))[..., : model.vocab_size]
    likelihood = F.cross_entropy(logits.flatten(0, 1), history.wanted.flatten())
    if weight == 0:
        return likelihood
    assert own is not None
    sampled = model.logits(edited_hidden(model, own.raw, backspace))[..., : model.vocab_size]
    matched = sequencematch_loss(
        logits,
        history.wanted[:, :-1],
        sampled,
        mask=history.follows[:, :-1],
        sampled_mask=own.drawn,
        alpha=alpha,
        gamma=gamma,
    )
    return (1 - weight) * likelihood + weight * matched


class Continued(NamedTuple):
    """Edit histories that a model went on with.

    Attributes:
        raw: int64 `[B, L]`, a history of the data up to some place, what the model did behind it, and tokens that
            nobody reads.
        drawn: bool `[B, L - 1]`, steps from a token to the next that were the model's.
    """

    raw: Tensor
    drawn: Tensor


def stretches(follows: Tensor) -> list[tuple[int, int, int]]:
    """Runs of steps that belong to the texts: row, first step, and how many; follows is `History.follows`."""
    found = []
    for row, steps_of_row in enumerate(follows[:, :-1].tolist()):
        start = None
        for i, own in enumerate([*steps_of_row, False]):
            if own and start is None:
                start = i
            elif not own and start is not None:
                found.append((row, start, i - start))
                start = None
    return found


@torch.no_grad()
def continued(model: Any, history: History, backspace: int, *, count: int, seed: int) -> Continued:
    """Steps of the model from where stretches of the data begin, as many as those have; by full passes.

    An inserted error is no step of the data, so each begins a new stretch, and in the objective the values of where
    stretches begin and end only cancel between data and model when both have stretches of the same kinds: with starts
    at the beginning of texts alone, or of other lengths, the objective grows without bound by a shift of all values
    that depends on the place in the text.

    Args:
        model: trained.
        history: edit histories of the data.
        backspace: the action; the first token is never deleted.
        count: stretches B.
        seed: of the choice of stretches and of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    every, device = stretches(history.follows), history.raw.device
    chosen = [every[i] for i in torch.randint(len(every), (count,), generator=generator).tolist()]
    rows, begins, sizes = (torch.tensor(part) for part in zip(*chosen, strict=True))
    given = history.raw.cpu()[rows]
    length = given.shape[1]
    raw, left = given[:, :1], torch.ones(count)
    for place in range(1, length):
        going = (place > begins) & (place <= begins + sizes)
        # Behind a stretch stands anything but a backspace.
        drawn = torch.where(place <= begins, given[:, place], 0)
        if bool(going.any()):
            logits = model.logits(edited_hidden(model, raw.to(device), backspace)[:, -1]).cpu()
            logits = logits[:, : model.vocab_size]
            logits[left < 2, backspace] = -torch.inf
            own = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
            drawn = torch.where(going, own, drawn)
        left += torch.where(drawn == backspace, -1.0, 1.0)
        raw = torch.cat([raw, drawn.unsqueeze(1)], dim=1)
    step = torch.arange(length - 1)
    mine = (step >= begins.unsqueeze(1)) & (step < (begins + sizes).unsqueeze(1))
    return Continued(raw.to(device), mine.to(device))


def claim(*, quick: bool) -> Claim:
    """The identities, one pass against edited texts, the cut cache; in full also a model of a regular language."""
    telescoped, likelihood = identities()
    model, backspace = small_model(9, seed=3), 8
    raw = torch.tensor([[1, 2, 8, 3, 4, 8, 8, 5, 6, 7], [1, 2, 3, 4, 8, 8, 8, 5, 8, 2]])
    edited = write_with_backspace(model, [1, 2], backspace, max_new_tokens=12, sampling=Sampling(), seed=4)
    cut = Session(model, [[1, 2, 3, 4, 5]], max_length=9)
    cut.rewind([3])
    fresh = Session(model, [[1, 2, 3]], max_length=9)
    error = (cut.logits - fresh.logits).abs().max()
    rows = [
        at_most("E[V - gamma V'] less V(s0), summed over all texts", telescoped, 1e-10),
        at_most("the objective at alpha = 0 less the discounted log-likelihood", likelihood, 1e-10),
        at_most("chi-square phi at alpha 1e-6 less its limit, at r = 2",
                abs(float(phi(torch.tensor(2e-6, dtype=torch.float64))) / 1e-6 - 2.0), 1e-5),
        at_most("logits of one masked pass less those of edited texts", context_error(model, raw, backspace), 1e-5),
        at_most("logits of a cut cache less those of a fresh one", float(error), 1e-5),
        equals("tokens of a written text that its edits do not leave",
               int(contexts([1, 2, *edited.raw], backspace)[-1] != [1, 2, *edited.text]), 0),
    ]  # fmt: skip
    if not quick:
        model, backspace = trained(800)
        rows += on_the_language(model, backspace)
    return Claim(tuple(rows))


@torch.no_grad()
def on_the_language(model: Any, backspace: int, texts: int = 100) -> list[Any]:
    """How surely wrong symbols are taken back, and valid texts at temperature 1.3 with and without a backspace."""
    generator = torch.Generator().manual_seed(9)
    words = sentences(200, 12, generator)
    wrong = torch.randint(SYMBOLS, (200,), generator=generator)
    allowed = torch.tensor(FOLLOW)[words[:, -1]]
    chosen = (allowed != wrong.unsqueeze(1)).all(1)
    probs = model(torch.cat([words, wrong.unsqueeze(1)], dim=1)[chosen])[:, -1, : model.vocab_size].softmax(
        -1
    )
    right = {
        use: sum(
            valid([seed % SYMBOLS, *write_with_backspace(
                model, [seed % SYMBOLS], backspace, max_new_tokens=20, sampling=Sampling(temperature=1.3), seed=seed,
                allowed=use,
            ).text])
            for seed in steps(texts, "writing")
        ) / texts
        for use in (True, False)
    }  # fmt: skip
    return [
        at_least(
            "probability of a backspace after an inserted wrong symbol",
            float(probs[:, backspace].mean()),
            0.9,
        ),
        at_least(
            "valid texts at temperature 1.3, with a backspace less without", right[True] - right[False], 0.0
        ),
    ]
