"""RAIN: a frozen language model searches, judges its own continuations and rewinds (Li et al., arXiv:2309.07124).

Text is written a few tokens at a time. Before tokens are committed, a search tree grows over possible continuations: it
descends by value and prior, finishes the text from the leaf, lets an evaluator judge it, and hands the value back up;
siblings that mean nearly the same share in it. When the best first step is good and visited enough, it is committed and
the search goes on behind it, with the statistics that it has. Nothing is trained. The evaluator is a function of the
tokens: the model's own verdict on two orders of a question in the paper, a lexicon or a program here.

The tree's texts share prefixes, so one `arcore.decoding.Session` reads them: it rewinds its cache to the common part
instead of reading every text anew, as the released code does.

Left out: the paper's rule that adds a candidate to children which are all alike and bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.decoding import Sampling, Session, generate
from arcore.decoding.laws import small_model
from arcore.nn.kinds import Bounds, check_kinds
from arcore.nn.protocols import DraftableModel
from arcore.zoo.alignment._evaluators import from_file, own_verdict

if TYPE_CHECKING:
    from arcore.recipes.text_decoders import TextDecoder, TextRequest, Written

SYSTEM = System(
    name="rain",
    title="RAIN",
    paper="arXiv:2309.07124",
    paper_title="RAIN: Your Language Models Can Align Themselves without Finetuning",
    topic="alignment",
    kind="decoder",
    ops=("sample",),
    summary="Inference-time search with self-evaluation and rewinding; the language model stays frozen.",
    claim="Values rise by 0.3 over plain sampling at 30 simulations; a rewound cache expects what a fresh one does.",
    checked_on="synthetic data",
)

# Tokens of a step by its depth in the tree; later ones are like the last.
STEPS = (1, 2, 4, 10)
Evaluator = Callable[[list[int]], float]


@dataclass
class Node:
    """A step of the search.

    Attributes:
        tokens: of this step.
        prior: probability of the step, among its siblings.
        depth: of the step, 0 for those behind the committed text.
        visits: how often it was passed, fractional visits of alike siblings included.
        own: how often it was passed itself.
        value: mean of the values that came back.
        embedding: running mean of the embeddings of texts that passed it.
    """

    tokens: list[int]
    prior: float
    depth: Annotated[int, Bounds(least=-1)]
    visits: float = 0.0
    own: int = 0
    value: float = 0.0
    embedding: Tensor | None = None
    children: list[Node] = field(default_factory=list)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RainConfig:
    """Settings of the search; the defaults are the paper's, `rollout` and `simulations` apart.

    Attributes:
        simulations: most simulations before a step is committed.
        fewest: simulations before a good step may be committed early.
        enough_visits: of a good step.
        good: value of a good step.
        candidates: continuations of a leaf.
        top_k: of those that are sampled.
        exploration: factor on the prior.
        uniform: share of the uniform distribution in the priors behind the committed text.
        alike: cosine from which siblings share values.
        shared: weight of a shared visit.
        rollout: most tokens of a simulated rest.
    """

    simulations: int = 50
    fewest: int = 15
    enough_visits: int = 6
    good: float = 0.8
    candidates: int = 10
    top_k: int = 15
    exploration: float = 2.0
    uniform: float = 0.25
    alike: float = 0.95
    shared: float = 0.2
    rollout: int = 16

    def __post_init__(self) -> None:
        for name in ("simulations", "candidates", "top_k", "rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")


def finish(session: Session, count: int, seeds: Tensor, stop: Collection[int] = ()) -> list[list[int]]:
    """Plain samples of at most `count` tokens that end the rows of a session, for the evaluator.

    Args:
        session: continued by them.
        count: most tokens.
        seeds: int64 `[B]`.
        stop: tokens that end a row.
    """
    rests: list[list[int]] = [[] for _ in session.texts]
    for _ in range(count):
        if all(rest and rest[-1] in stop for rest in rests):
            break
        new = session.draw(1, Sampling(), seeds)
        rests = [
            rest if rest and rest[-1] in stop else rest + one for rest, one in zip(rests, new, strict=True)
        ]
    return rests


class Rain:
    """The search for one text.

    Args:
        model: the language model.
        prompt: tokens, at least one.
        evaluator: gives texts (new tokens without the prompt) a value from -1 to 1.
        config: settings.
        stop: tokens that end a simulated rest.
        max_new_tokens: most new tokens.
        seed: of all draws.

    Attributes:
        text: new tokens that are committed.
        evaluations: calls of the evaluator.
    """

    @check_kinds
    def __init__(
        self,
        model: DraftableModel,
        prompt: Sequence[int],
        evaluator: Evaluator,
        *,
        max_new_tokens: int,
        config: RainConfig | None = None,
        stop: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.config = RainConfig() if config is None else config
        self.prompt, self.evaluator, self.stop, self.seed = list(prompt), evaluator, set(stop), seed
        self.max_new_tokens = max_new_tokens
        room = len(prompt) + max_new_tokens + self.config.rollout + max(STEPS) + 2
        self.session = Session(model, [self.prompt], max_length=room)
        self.text: list[int] = []
        self.evaluations = 0
        self._values: dict[tuple[int, ...], float] = {}
        self._draws = 0
        self.root = Node([], 1.0, -1)

    def run(self) -> list[int]:
        """Search until the text is complete, and return it."""
        while len(self.text) < self.max_new_tokens and not (self.text and self.text[-1] in self.stop):
            best = self.search()
            self.text += best.tokens
            self.root = best
            for child in best.children:
                self._lower(child)
        return self.text[: self.max_new_tokens]

    def search(self) -> Node:
        """Simulate until the best step is good or time is up; returns the step that was visited most."""
        if not self.root.children:
            self._expand(self.root, self.text, depth=0)
        self._mix_priors()
        for done in range(1, self.config.simulations + 1):
            self.simulate()
            best = max(self.root.children, key=lambda node: (node.own, node.value))
            good = best.own > self.config.enough_visits and best.value > self.config.good
            if done >= self.config.fewest and good:
                break
        return max(self.root.children, key=lambda node: (node.visits, node.value))

    def simulate(self) -> None:
        """Descend, finish the text, judge it, hand the value back."""
        path, text, node = [], list(self.text), self.root
        while node.children:
            node = self._choose(node)
            path.append(node)
            text += node.tokens
        room = self.max_new_tokens - len(text)
        if room > 0 and not (text and text[-1] in self.stop):
            self._expand(node, text, depth=node.depth + 1)
        value = self._judge(text + self._rest(text))
        embedding = self._embed(text)
        for place, one in enumerate(path):
            one.visits += 1
            one.own += 1
            one.value += (value - one.value) / one.visits
            before = one.embedding
            one.embedding = embedding if before is None else before + (embedding - before) / one.own
            parent = self.root if place == 0 else path[place - 1]
            for sibling in parent.children:
                if sibling is one or sibling.embedding is None:
                    continue
                alike = float(F.cosine_similarity(sibling.embedding, one.embedding, dim=0))
                if alike >= self.config.alike:
                    weight = self.config.shared * alike
                    sibling.visits += weight
                    sibling.value += (value - sibling.value) * weight / sibling.visits

    def _choose(self, node: Node) -> Node:
        visited = [child.value for child in self.root.children if child.visits]
        low, high = (min(visited), max(visited)) if visited else (0.0, 0.0)
        total = sum(child.visits for child in node.children)

        def score(child: Node) -> float:
            value = (child.value - low) / (high - low + 1e-5) if child.visits else 0.0
            # Before the first visit the prior alone decides.
            return value + self.config.exploration * child.prior * math.sqrt(max(total, 1.0)) / (
                1 + child.visits
            )

        return max(node.children, key=score)

    @torch.no_grad()
    def _expand(self, node: Node, text: list[int], depth: int) -> None:
        self._go_to(text)
        size, vocab = self.config.candidates, self.session.model.vocab_size
        length = min(STEPS[min(depth, len(STEPS) - 1)], max(self.max_new_tokens - len(text), 1))
        probs = self.session.logits[0, :vocab].softmax(-1)
        found: dict[tuple[int, ...], float] = {}
        if depth == 0:
            best = probs.topk(min(size, vocab))
            found = {(int(t),): float(p) for t, p in zip(best.indices, best.values, strict=True)}
        else:
            rows = self.session.fork([0] * size)
            chance = torch.zeros(size)
            drawn: list[list[int]] = [[] for _ in range(size)]
            for _ in range(length):
                logits = rows.logits[:, :vocab]
                seeds = torch.arange(size) + 1_000_003 * self._next_draw()
                tokens = Sampling(top_k=min(self.config.top_k, vocab)).draw(
                    logits, seeds, torch.zeros_like(seeds)
                )
                assert isinstance(tokens, Tensor)
                tokens[0] = logits[0].argmax()
                chance += logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
                drawn = [[*row, int(token)] for row, token in zip(drawn, tokens, strict=True)]
                rows.feed([[int(token)] for token in tokens])
            for row, log in zip(drawn, chance.tolist(), strict=True):
                ends = [i for i, token in enumerate(row) if token in self.stop]
                found.setdefault(tuple(row[: ends[0] + 1] if ends else row), math.exp(log))
        total = sum(found.values())
        node.children = [Node(list(tokens), p / total, depth) for tokens, p in found.items()]

    def _mix_priors(self) -> None:
        children, share = self.root.children, self.config.uniform
        total = sum(child.prior for child in children)
        for child in children:
            child.prior = (1 - share) * child.prior / total + share / len(children)

    def _rest(self, text: list[int]) -> list[int]:
        room = min(self.config.rollout, self.max_new_tokens - len(text))
        if text and text[-1] in self.stop:
            return []
        self._go_to(text)
        seeds = torch.tensor([1_000_003 * self._next_draw()])
        return finish(self.session, room, seeds, self.stop)[0]

    def _judge(self, text: list[int]) -> float:
        key = tuple(text)
        if key not in self._values:
            self.evaluations += 1
            try:
                value = float(self.evaluator(list(text)))
            except Exception as error:
                raise RuntimeError(
                    f"the evaluator failed on a text of {len(text)} tokens ({type(error).__name__}: {error}); "
                    f"{len(self.text)} tokens are committed and stay in `text`"
                ) from error
            if not -1.0 <= value <= 1.0:
                raise ValueError(f"expected the evaluator to give a value from -1 to 1 but got {value}")
            self._values[key] = value
        return self._values[key]

    def _embed(self, text: list[int]) -> Tensor:
        weight: Any = getattr(self.session.model, "embedding", None)
        if weight is None:
            return F.one_hot(torch.tensor(text or [0]), self.session.model.vocab_size).float().mean(0)
        return weight.weight[torch.tensor(text or [0])].detach().float().mean(0)

    def _go_to(self, text: list[int]) -> None:
        """Rewind to what the session and a text have in common, and read on from there."""
        wanted, have = self.prompt + text, self.session.texts[0]
        common = next((i for i, (a, b) in enumerate(zip(wanted, have, strict=False)) if a != b), None)
        common = min(len(wanted), len(have)) if common is None else common
        self.session.rewind([max(common, 1)])
        self.session.feed([wanted[max(common, 1) :]])

    def _next_draw(self) -> int:
        self._draws += 1
        return self.seed * 7919 + self._draws

    def _lower(self, node: Node) -> None:
        """The committed step is the root now: all that follow it are one depth nearer."""
        node.depth -= 1
        for child in node.children:
            self._lower(child)


def _write(request: TextRequest) -> Written:
    from arcore.recipes.text_decoders import Written

    options, words = request.options, request.words
    if options.evaluator is None:
        raise ValueError(
            "--decoder rain needs something that judges texts: --evaluator FILE.py with `evaluate(text)`, or "
            "--evaluator self"
        )
    judge = (
        own_verdict(request.base, words, options.question)
        if options.evaluator == "self"
        else from_file(options.evaluator)
    )
    rows, calls, notes = [], 0, []
    for ids, seed in zip(request.prompts, request.seeds, strict=True):
        search = Rain(
            request.model,
            ids,
            lambda text: judge(words.decode(text)),
            max_new_tokens=options.max_new_tokens,
            config=RainConfig(simulations=options.simulations, fewest=min(15, options.simulations)),
            seed=seed % 2**16,
        )
        try:
            rows.append(search.run())
        except (RuntimeError, ValueError) as error:
            written = words.decode(search.text)
            raise type(error)(f"{error}; what was written so far is {written!r}") from error
        calls += search.session.calls
        notes.append(f"(value {judge(words.decode(rows[-1])):.2f}; {search.evaluations} texts were judged)")
    return Written(rows, calls, max(map(len, rows)) / max(calls, 1), "\n".join(notes))


def text_decoder() -> TextDecoder:
    """Writes what `--evaluator` likes."""
    # Recipes need the packages for training; the search does not.
    from arcore.recipes.text_decoders import TextDecoder

    return TextDecoder(_write, ("evaluator", "question", "simulations"))


def claim(*, quick: bool) -> Claim:
    """Values of searched and sampled texts, the cache after many rewinds, and a search that nothing distinguishes."""
    model = small_model(9, seed=4)

    def evaluator(text: list[int]) -> float:
        """From -1 to 1: how often an even token is followed by a larger one."""
        pairs = list(pairwise(text))
        good = sum(1 for a, b in pairs if a % 2 == 0 and b > a)
        return 2 * min(1.0, 2 * good / max(len(pairs), 1)) - 1

    count, length = (3, 8) if quick else (12, 14)
    config = RainConfig(simulations=30, rollout=length)
    searched, sampled, error = [], [], 0.0
    for seed in steps(count, "searching"):
        search = Rain(model, [1, 2], evaluator, max_new_tokens=length, config=config, seed=seed)
        searched.append(evaluator(search.run()))
        fresh = Session(model, search.session.texts, max_length=len(search.session.texts[0]))
        error = max(
            error, float((fresh.logits - search.session.logits).abs().max() / fresh.logits.abs().max())
        )
    texts = generate(model, [[1, 2]] * 200, max_new_tokens=length, seed=1).rows()
    sampled = [evaluator(text) for text in texts]
    even = [
        Rain(model, [1, 2], lambda _: 0.0, max_new_tokens=1, config=config, seed=seed) for seed in range(2)
    ]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[1, 2]]))[0, -1].argmax())
    gain = sum(searched) / len(searched) - sum(sampled) / len(sampled)
    return Claim(
        (
            at_least("mean value less that of plain sampling, 30 simulations", gain, 0.3),
            at_most("logits of the rewound cache beside a fresh one's, relative", error, 1e-5),
            equals("texts that a constant evaluator leads away from the likeliest token",
                   sum(one.run() != [likeliest] for one in even), 0),
        )
    )  # fmt: skip
