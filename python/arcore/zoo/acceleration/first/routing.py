"""Routers, models that skip layers, the losses of both phases, and the adapters of the second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from arcore.catalog import preset
from arcore.nn import TokenCache
from arcore.nn.causal import CausalDecoder
from arcore.nn.kinds import check_kinds


class Routers(nn.Module):
    """One router per layer.

    Args:
        dim: width C.
        num_layers: layers.
        keep_first, keep_last: layers at the ends that are never skipped (own choice: 1 each).
        threshold: a layer whose mean probability is below it is skipped.
    """

    @check_kinds
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
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(float(threshold)))
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

    @check_kinds
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

    @property
    def embedding(self) -> Any:
        """The model's."""
        return self.model.embedding

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model."""
        return self.model.parameters()

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
        with without(self.model, cache.skipped):
            return self.model.prefill(ids, cache.inner, mask)

    @torch.no_grad()
    def step(self, ids: Tensor, cache: Skipping) -> Tensor:
        """See `TokenModel`."""
        assert cache.inner is not None
        with without(self.model, cache.skipped):
            return self.model.step(ids, cache.inner)

    @torch.no_grad()
    def extend(self, ids: Tensor, cache: Skipping, parents: Any = None) -> Any:
        """See `DraftableModel`."""
        assert cache.inner is not None
        with without(self.model, cache.skipped):
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
def without(model: CausalDecoder, skipped: Sequence[int]) -> Iterator[None]:
    """Leave layers out for the time of a block."""
    before, model.skipped = model.skipped, frozenset(skipped)
    try:
        yield
    finally:
        model.skipped = before


@check_kinds
def routed_loss(
    model: CausalDecoder, routers: Routers, ids: Tensor, *, price: float | Tensor, sharpness: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Phase 1: cross entropy with layers mixed softly, and the price of keeping them.

    Args:
        model: frozen.
        routers: trained.
        ids: int64 `[B, L]`.
        price: factor on the mean probability.
        sharpness: factor on the mean of p (1 - p), which drives probabilities to 0 or 1, as decoding takes them (own
            choice; the soft mix alone may leave all of them in between).

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
            kept.append(p)
            out = p * out + (1 - p) * x
        x = out
    logits = model.logits(model.norm(x))
    every = torch.stack(kept) if kept else x.new_ones(1)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + price * every.mean()
    return loss + sharpness * (every * (1 - every)).mean(), every.mean()


@torch.no_grad()
def calibrate(model: CausalDecoder, routers: Routers, texts: Sequence[Tensor], skip: float) -> float:
    """Set the threshold so that a share of the layers of these texts is skipped.

    Probabilities of later layers depend on which earlier ones are left out, so the threshold is searched, with the
    decisions made anew for each try.

    Args:
        model: the model.
        routers: whose threshold is set.
        texts: int64 `[1, L]` or `[B, L]` each; rows of one tensor decide together.
        skip: share of all layers.

    Returns:
        The share that is skipped now, which may miss the wanted one where decisions come in steps.
    """
    total = len(model.layers) * len(texts)
    chooser = SkippingModel(model, routers)

    def share(threshold: float) -> float:
        routers.threshold.fill_(threshold)
        return sum(len(chooser.decide(text)) for text in texts) / total

    low, high = 0.0, 1.0
    best = (abs(share(0.0) - skip), 0.0)
    for _ in range(14):
        middle = (low + high) / 2
        found = share(middle)
        best = min(best, (abs(found - skip), middle))
        low, high = (middle, high) if found < skip else (low, middle)
    return share(best[1])


def skipping_loss(model: CausalDecoder, ids: Tensor, skipped: Sequence[int]) -> Tensor:
    """Phase 2: cross entropy of `[B, L]` with layers left out; scalar."""
    with without(model, skipped):
        visible, angles = model.behind((0,), ids.shape[1] - 1, ids.device)
        logits = model.logits(model.run(model.embed(ids[:, :-1]), angles, visible))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def routed_skipping_loss(
    model: CausalDecoder, routers: Routers, ids: Tensor, *, prompt: int
) -> tuple[Tensor, float]:
    """Phase 2: each text skips what its first `prompt` tokens decide.

    Returns:
        The cross entropy, and the share of layers that are skipped.
    """
    chooser = SkippingModel(model, routers)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(ids)):
        groups.setdefault(chooser.decide(ids[row : row + 1, :prompt]), []).append(row)
    losses = [skipping_loss(model, ids[rows], skipped) * len(rows) for skipped, rows in groups.items()]
    count = sum(len(skipped) * len(rows) for skipped, rows in groups.items())
    return torch.stack(losses).sum() / len(ids), count / (len(ids) * len(model.layers))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class FirstConfig:
    """Settings of `FirstPatch`.

    Attributes:
        dim: width C of the model.
        num_layers: its layers.
        inner_dim: width of its heads together.
        qkv_dim: rows of queries, keys and values together.
        hidden_dim: width of its feed-forward networks.
        keep_first: layers at the beginning that are never skipped.
        keep_last: likewise at the end.
        rank: of the matrices that adapt its linear layers.

    Raises:
        ValueError: a size is below 1, or no layer is left that may be skipped.
    """

    dim: int
    num_layers: int
    inner_dim: int
    qkv_dim: int
    hidden_dim: int
    keep_first: int = 1
    keep_last: int = 1
    rank: int = 8

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "inner_dim", "qkv_dim", "hidden_dim", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.keep_first + self.keep_last >= self.num_layers:
            raise ValueError(
                f"expected a layer that may be skipped but {self.keep_first} + {self.keep_last} of {self.num_layers} "
                "are always kept"
            )


class LowRank(nn.Module):
    """Adds a product of two thin matrices to a weight; nothing at first. A parametrisation of `weight`."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        if not self.down.is_meta:
            nn.init.normal_(self.down, std=inputs**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * self.up @ self.down


# The linear layers that are adapted.
_PARTS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")


@check_kinds
class FirstPatch(nn.Module):
    """What is trained: routers and, for the second phase, adapters of a model's linear layers.

    Args:
        config: settings.
    """

    def __init__(self, config: FirstConfig) -> None:
        super().__init__()
        self.config = config
        self.routers = Routers(
            config.dim, config.num_layers, keep_first=config.keep_first, keep_last=config.keep_last
        )
        sizes = (
            (config.dim, config.qkv_dim),
            (config.inner_dim, config.dim),
            (config.dim, 2 * config.hidden_dim),
            (config.hidden_dim, config.dim),
        )
        self.adapters = nn.ModuleList(
            nn.ModuleList(LowRank(*size, config.rank) for size in sizes) for _ in range(config.num_layers)
        )
        # What keeping a layer costs; it follows the wanted share while routers are trained.
        self.price: Tensor
        self.register_buffer("price", torch.tensor(0.1))

    def check(self, model: Any) -> None:
        """Raise ValueError unless this fits the model."""
        wanted = config_for(model, self.config.rank, self.config.keep_first, self.config.keep_last)
        if wanted != self.config:
            raise ValueError(
                f"these routers are made for a model of {self.config.num_layers} layers of width {self.config.dim} but "
                f"this one has {wanted.num_layers} of width {wanted.dim}; train some for it"
            )

    def attach(self, model: Any) -> None:
        """Put the adapters beside the weights of a model, which must not have any yet."""
        self.check(model)
        for layer, adapters in zip(model.layers, self.adapters, strict=True):
            for part, adapter in zip(_PARTS, adapters, strict=True):  # type: ignore[call-overload]
                parametrize.register_parametrization(layer.get_submodule(part), "weight", adapter)

    def merge(self, model: Any) -> None:
        """Add the attached adapters to the weights for good."""
        for layer in model.layers:
            for part in _PARTS:
                parametrize.remove_parametrizations(layer.get_submodule(part), "weight")


def config_for(model: Any, rank: int = 8, keep_first: int = 1, keep_last: int = 1) -> FirstConfig:
    """The settings of a patch for a decoder of Llama's kind.

    Raises:
        TypeError: the model is of another kind.
    """
    try:
        layer = model.layers[0]
        qkv, out, _, down = (layer.get_submodule(part).weight for part in _PARTS)
    except AttributeError:
        raise TypeError(
            f"expected a model with layers of Llama's kind, such as llama_tiny, but got {type(model).__name__}"
        ) from None
    return FirstConfig(
        dim=qkv.shape[1],
        num_layers=len(model.layers),
        inner_dim=out.shape[1],
        qkv_dim=qkv.shape[0],
        hidden_dim=down.shape[1],
        keep_first=keep_first,
        keep_last=keep_last,
        rank=rank,
    )


@preset
def first_tiny() -> FirstConfig:
    """Routers and adapters for `llama_tiny`."""
    return FirstConfig(dim=128, num_layers=4, inner_dim=128, qkv_dim=256, hidden_dim=344)
