"""FiRST: routers decide from the prompt which layers a text skips (arXiv:2410.12513).

Each layer has a router, a linear map of the hidden state in front of it. Its probabilities, averaged over the prompt,
decide once for the whole text, so the keys and values of the layers that stay are complete and those that are skipped
have none. Phase 1 trains the routers on the frozen model, with the layer's output mixed softly with its input and a
price on layers that are kept. Phase 2, adapting the model to the skipping (LoRA), is left out.

It differs from dropping layers once and for all in that texts of different kinds skip different ones. The paper's code
was not to be found; defaults that it does not give are marked as own choices.

Legend: B rows, N tokens, C width, l layer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import System, create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps
from arcore.decoding import generate
from arcore.decoding.laws import small_model
from arcore.nn import TokenCache
from arcore.nn.causal import CausalDecoder

SYSTEM = System(
    name="first",
    title="FiRST",
    paper="arXiv:2410.12513",
    topic="acceleration",
    kind="decoder",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    summary="Routers choose from the prompt which layers a whole text skips; the cache holds none of their keys.",
    claim="Keeping all is the base model; routing is no worse than the best fixed drop; skipped layers cost nothing.",
    checked_on="synthetic data",
)


class Routers(nn.Module):
    """One router per layer.

    Args:
        dim: width C.
        num_layers: layers.
        keep_first, keep_last: layers at the ends that are never skipped (own choice: 1 each).
        threshold: a layer whose mean probability is below it is skipped.
    """

    def __init__(
        self, dim: int, num_layers: int, *, keep_first: int = 1, keep_last: int = 1, threshold: float = 0.5
    ) -> None:
        super().__init__()
        if keep_first + keep_last > num_layers or min(keep_first, keep_last) < 0:
            raise ValueError(
                f"expected keep_first + keep_last of at most {num_layers} layers but got {keep_first} + {keep_last}"
            )
        self.routers = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_layers))
        self.free = range(keep_first, num_layers - keep_last)
        self.threshold = threshold
        for router in self.routers:
            # All layers are kept at first.
            nn.init.zeros_(router.weight)  # type: ignore[arg-type]
            nn.init.constant_(router.bias, 2.0)  # type: ignore[arg-type]

    def probability(self, layer: int, x: Tensor) -> Tensor:
        """Of keeping a layer: `[..., C]` to `[..., 1]`; 1 for those that always stay."""
        if layer not in self.free:
            return torch.ones_like(x[..., :1])
        out: Tensor = self.routers[layer](x).sigmoid()
        return out


class SkippingModel:
    """A model that skips layers, as a model of the loops; rows of one batch skip the same ones.

    Without `skip` the routers decide when the prompt is read, by its mean over all rows: give rows that should decide
    for themselves one at a time.

    Args:
        model: the model.
        routers: of its layers.
        skip: layers to skip instead.

    Attributes:
        skipped: layers that the last prompt skipped.
    """

    def __init__(
        self, model: CausalDecoder, routers: Routers | None = None, *, skip: Sequence[int] | None = None
    ) -> None:
        if (routers is None) == (skip is None):
            raise ValueError("expected routers or skip, one of them")
        if skip is not None and not set(skip) < set(range(len(model.layers))):
            raise ValueError(
                f"expected skip to name some of the layers 0 to {len(model.layers) - 1}, not all, but got {list(skip)}"
            )
        self.model, self.routers, self.skip = model, routers, skip
        self.skipped: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def make_cache(self, batch: int, max_length: int) -> Skipping:
        """An empty cache; its memory is taken when the prompt has decided."""
        return Skipping(batch, max_length)

    @torch.no_grad()
    def decide(self, ids: Tensor, mask: Tensor | None = None) -> tuple[int, ...]:
        """The layers that a prompt skips: int64 `[B, L]`, bool `[B, L]` False at padding."""
        if self.skip is not None:
            return tuple(sorted(self.skip))
        assert self.routers is not None
        x, kept, skipped = self.model.embed(ids), mask, []
        visible, angles = self.model.behind((0,), ids.shape[1], ids.device)
        for i, layer in enumerate(self.model.layers):
            p = self.routers.probability(i, x).squeeze(-1)
            mean = p.mean() if kept is None else p[kept].mean()
            if mean < self.routers.threshold:
                skipped.append(i)
            else:
                x = layer(x, angles, visible)
        return tuple(skipped)

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: Skipping, mask: Tensor | None = None) -> Tensor:
        """See `TokenModel`."""
        if cache.inner is None:
            # Routers of padded rows read them one by one, so that padding is not seen.
            if mask is not None and not bool(mask.all()) and self.skip is None:
                raise ValueError(
                    "routers read prompts without padding; give rows of one length, or one at a time"
                )
            self.skipped = cache.skipped = self.decide(ids)
            cache.inner = self.model.make_cache(cache.batch, cache.max_length, absent=self.skipped)
        with _without(self.model, cache.skipped):
            return self.model.prefill(ids, cache.inner, mask)

    @torch.no_grad()
    def step(self, ids: Tensor, cache: Skipping) -> Tensor:
        """See `TokenModel`."""
        assert cache.inner is not None
        with _without(self.model, cache.skipped):
            return self.model.step(ids, cache.inner)

    @torch.no_grad()
    def extend(self, ids: Tensor, cache: Skipping, parents: Any = None) -> Any:
        """See `DraftableModel`."""
        assert cache.inner is not None
        with _without(self.model, cache.skipped):
            return self.model.extend(ids, cache.inner, parents)


class Skipping:
    """A `TokenCache` that is made when it is known which layers it has."""

    def __init__(self, batch: int, max_length: int) -> None:
        self.batch, self.max_length = batch, max_length
        self.inner: TokenCache | None = None
        self.skipped: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or self.inner is None:
            raise AttributeError(name)
        return getattr(self.inner, name)


@contextmanager
def _without(model: CausalDecoder, skipped: Sequence[int]) -> Iterator[None]:
    """Leave layers out for the time of a block."""
    before, model.skipped = model.skipped, frozenset(skipped)
    try:
        yield
    finally:
        model.skipped = before


def routed_loss(
    model: CausalDecoder, routers: Routers, ids: Tensor, *, price: float
) -> tuple[Tensor, Tensor]:
    """Phase 1: cross entropy with layers mixed softly, and the price of keeping them.

    Args:
        model: frozen.
        routers: trained.
        ids: int64 `[B, L]`.
        price: factor on the mean probability.

    Returns:
        The loss, and the mean probability of the layers that may be skipped.
    """
    inputs = ids[:, :-1]
    visible, angles = model.behind((0,), inputs.shape[1], ids.device)
    x, kept = model.embed(inputs), []
    for i, layer in enumerate(model.layers):
        out = layer(x, angles, visible)
        if i in routers.free:
            p = routers.probability(i, x)
            kept.append(p.mean())
            out = p * out + (1 - p) * x
        x = out
    logits = model.logits(model.norm(x))
    mean = torch.stack(kept).mean() if kept else x.new_ones(())
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + price * mean, mean


def two_tasks(count: int, length: int = 6, symbols: int = 8) -> Tensor:
    """Texts of two kinds: a mark of the kind, symbols, a separator, and the symbols again, as they are or reversed.

    Returns:
        int64 `[count, 2 length + 2]`.
    """
    words = torch.randint(symbols, (count, length))
    kind = torch.arange(count) % 2
    answer = torch.where(kind.unsqueeze(1) == 0, words, words.flip(1))
    marks = (symbols + kind).unsqueeze(1)
    return torch.cat([marks, words, torch.full_like(marks, symbols + 2), answer], dim=1)


def _train(parameters: Any, loss_of: Any, count: int, what: str, lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in steps(count, what):
        loss = loss_of(two_tasks(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _skipping_loss(model: CausalDecoder, ids: Tensor, skipped: Sequence[int]) -> float:
    with _without(model, skipped):
        visible, angles = model.behind((0,), ids.shape[1] - 1, ids.device)
        logits = model.logits(model.run(model.embed(ids[:, :-1]), angles, visible))
    answer = slice(ids.shape[1] // 2 - 1, None)
    return float(F.cross_entropy(logits[:, answer].flatten(0, 1), ids[:, 1:][:, answer].flatten()))


def _learned(count: int) -> tuple[float, float, float]:
    """Cross entropy of answers under routed skipping and under the best fixed skipping of as many layers; how many."""
    model = small_model(11, seed=1, layers=5, scale=0.0).requires_grad_(True)
    _train(
        model.parameters(),
        lambda ids: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
        count,
        "training the model",
        3e-3,
    )
    model.requires_grad_(False)
    routers = Routers(32, 5)
    _train(
        routers.parameters(),
        lambda ids: routed_loss(model, routers, ids, price=0.3)[0],
        count // 2,
        "training the routers",
        2e-2,
    )
    ids, skipping = two_tasks(200), SkippingModel(model, routers)
    prompt = ids.shape[1] // 2
    decided = [skipping.decide(ids[kind::2, :prompt]) for kind in (0, 1)]
    routed = sum(_skipping_loss(model, ids[kind::2], decided[kind]) for kind in (0, 1)) / 2
    most = max(len(one) for one in decided)
    fixed = min(_skipping_loss(model, ids, one) for one in itertools.combinations(range(1, 4), most))
    return routed, fixed, sum(len(one) for one in decided) / 2


def _seconds(models: Sequence[Any], prompt: Tensor, rounds: int = 7) -> list[float]:
    """Process CPU time of steps of each model, the least of several rounds in which they take turns."""
    caches = [model.make_cache(1, 8 * rounds + prompt.shape[1]) for model in models]
    best = [float("inf")] * len(models)
    for model, cache in zip(models, caches, strict=True):
        model.prefill(prompt, cache)
    for _ in range(rounds):
        for i, (model, cache) in enumerate(zip(models, caches, strict=True)):
            start = time.process_time()
            for _ in range(8):
                model.step(prompt[:, 0], cache)
            best[i] = min(best[i], time.process_time() - start)
    return best


def claim(*, quick: bool) -> Claim:
    """Keeping all, caches of skipped layers, time; in full also routers trained on texts of two kinds."""
    model = small_model(11, layers=6)
    prompt = torch.tensor([[1, 2, 3]])
    plain = generate(model, prompt, max_new_tokens=20, seed=1).ids
    kept = generate(SkippingModel(model, Routers(32, 6)), prompt, max_new_tokens=20, seed=1).ids  # type: ignore[arg-type]
    skipping = SkippingModel(model, skip=[2, 4])
    cache, full = skipping.make_cache(1, 10), model.make_cache(1, 10)
    skipping.prefill(prompt, cache)
    wide = _wide_model(12)
    times = _seconds([SkippingModel(wide, skip=[]), SkippingModel(wide, skip=[2, 4, 6, 8])], prompt)
    rows = [
        equals("tokens that keeping all layers changes", int((plain != kept).sum()), 0),
        equals("bytes of the cache for two layers skipped of six, over those of six", cache.nbytes / full.nbytes, 4 / 6,
               tolerance=1e-9),
        at_least("share of the time saved by skipping 4 of 12 layers", 1 - times[1] / times[0], 0.7 * 4 / 12),
    ]  # fmt: skip
    if not quick:
        routed, fixed, count = _learned(600)
        rows += [
            at_least("layers of five that routers skip, mean", count, 1.0),
            at_most("cross entropy of routed skipping less that of the best fixed one", routed - fixed, 1e-4),
        ]
    return Claim(tuple(rows))


def _wide_model(layers: int) -> Any:
    """A random model whose layers take the time."""
    model = create_model(
        "llama_tiny", dim=512, num_layers=layers, num_heads=8, num_kv_heads=8, hidden_dim=1376, vocab_size=16
    )
    return shaken(model).eval().requires_grad_(False)
