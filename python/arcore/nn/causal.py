"""A decoder of causal layers that keeps a cache: what language models and raster image models have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from arcore.masks import IntervalMask, TreeMask
from arcore.nn.cache import storage_dtype
from arcore.nn.decoder import DecoderLayer
from arcore.nn.kinds import explain_kinds
from arcore.nn.linear import linear
from arcore.nn.protocols import Extended, Parents
from arcore.nn.rotary import Angles
from arcore.nn.token_cache import TokenCache
from arcore.ops import decoder_step

# Tokens of a call, over all rows, that one op per layer reads; torch's products of more of them take less time.
STEP_ROWS = {torch.float32: 64, torch.bfloat16: 32}


class Rotary(Protocol):
    """Angles of tokens by their position."""

    def at(self, positions: Tensor) -> Angles:
        """At positions, int64 `[N]` or `[B, N]`."""
        ...

    def span(self, start: int, stop: int, device: torch.device) -> Angles:
        """At the positions from `start` to `stop`."""
        ...


class CausalDecoder(nn.Module):
    """Reads tokens into a `TokenCache`: prompts, single tokens, and chains or trees of drafts.

    It is a `DraftableModel` (`arcore.nn.protocols`). A subclass sets the attributes and says what `embed` and `logits`
    are.

    Attributes:
        layers: of `arcore.nn.DecoderLayer`.
        norm: behind the last layer.
        rotary: angles by position.
        vocab_size: tokens that may be drawn.
        max_length: tokens of a text that the model is made for, prompt included.
        window: a token sees only so many places back, itself included; None for all.
        skipped: layers that are left out; a cache may have them absent.
    """

    layers: Any
    norm: nn.Module
    rotary: Rotary
    vocab_size: int
    max_length: int
    window: int | None = None
    skipped: frozenset[int] = frozenset()

    @abstractmethod
    @explain_kinds
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of tokens, int64 `[B, L]` to `[B, L, C]`."""

    @abstractmethod
    @explain_kinds
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of what comes from behind the last norm: `[..., C]` to float32 `[..., V]`."""

    @explain_kinds
    def last_layer(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """`[..., C]` by a weight `[V, C]` to float32 `[..., V]`; those of a token do not depend on how many are read in
        the same call, as long as one op per layer reads them all."""
        return linear(hidden, weight, rows=STEP_ROWS.get(weight.dtype)).float()

    @explain_kinds
    def make_cache(self, batch: int, max_length: int, absent: Sequence[int] = ()) -> TokenCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, drafts included.

        Raises:
            ValueError: the model is not made for so many tokens.
        """
        if max_length > self.max_length:
            raise ValueError(
                f"the model is made for texts of {self.max_length} tokens but {max_length} were asked for; "
                "shorten the prompt, ask for fewer new tokens, or choose a model for longer ones"
            )
        attention = self.layers[0].attention
        weight = next(self.parameters())
        return TokenCache(
            num_layers=len(self.layers),
            batch=batch,
            num_heads=attention.num_kv_heads,
            max_length=max_length,
            head_dim=attention.head_dim,
            dtype=storage_dtype(weight),
            device=weight.device,
            absent=absent,
        )

    @torch.no_grad()
    @explain_kinds
    def prefill(self, ids: Tensor, cache: TokenCache, mask: Tensor | None = None) -> Tensor:
        """Read several tokens per row; arguments and result are those of `TokenModel`."""
        return self.read_prompt(ids, cache, mask)[0]

    @torch.no_grad()
    @explain_kinds
    def read_prompt(
        self, ids: Tensor, cache: TokenCache, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """`prefill` that also gives what logits are made from, for drafters that look at it.

        Returns:
            The last logits `[B, V]`; states `[B, L, C]` behind the last norm, each row's from its first place on; and
            how many of them each row has.
        """
        ids, counts = left_aligned(ids, cache, mask)
        hidden = self._stage(ids, cache, None)
        cache.commit(counts)
        if isinstance(counts, int):
            return self.logits(hidden[:, -1]), hidden, [counts] * len(ids)
        last = torch.tensor(counts, device=ids.device) - 1
        return self.logits(hidden[torch.arange(len(ids), device=ids.device), last]), hidden, counts

    @torch.no_grad()
    @explain_kinds
    def step(self, ids: Tensor, cache: TokenCache) -> Tensor:
        """Read one token per row; arguments and result are those of `TokenModel`."""
        if ids.dim() != 1:
            raise ValueError(f"expected token ids of shape [B] but got {tuple(ids.shape)}")
        hidden = self._stage(ids.unsqueeze(1), cache, None)[:, 0]
        cache.commit(1)
        return self.logits(hidden)

    @torch.no_grad()
    @explain_kinds
    def extend(self, ids: Tensor, cache: TokenCache, parents: Parents | None = None) -> Extended:
        """Read drafted tokens without counting them in; arguments and result are those of `DraftableModel`."""
        hidden = self._stage(ids, cache, parents)
        return Extended(self.logits(hidden), hidden)

    def _fits_step(self, cache: TokenCache, new: int = 1) -> bool:
        """Whether one op per layer can read `new` tokens, which spares a CPU most of what is not the product itself."""
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        most = STEP_ROWS.get(cache.keys.dtype, 0)
        if not cache.derived:
            fits = (
                0 < cache.batch <= most
                and all(isinstance(layer, DecoderLayer) and layer.fits_step() for layer in self.layers)
                and all(p.dtype == cache.keys.dtype for p in self.layers.parameters())
            )
            cache.derived = {i: layer.step_weights() if fits else None for i, layer in enumerate(self.layers)}
        return cache.derived[0] is not None and 0 < cache.batch * new <= most

    def _step(self, ids: Tensor, cache: TokenCache, tree: TreeMask | None = None) -> Tensor:
        """What comes from behind the last norm for a few tokens per row, by one op per layer.

        Args:
            ids: int64 `[B, N]`.
            cache: receives their keys and values, staged.
            tree: of the N tokens of each row, which are a chain when None.

        Returns:
            `[B, N, C]`.
        """
        batch, new = ids.shape
        x = self.embed(ids).flatten(0, 1).contiguous()
        lengths = torch.tensor(cache.lengths, dtype=torch.int64)
        if tree is not None:
            places = tree.prefix.long().unsqueeze(1) + tree.depth
            angles = self.rotary.at(places.expand(batch, -1))
        elif cache.ragged:
            angles = self.rotary.at(lengths.unsqueeze(1) + torch.arange(new))
        else:
            start = cache.lengths[0]
            angles = self.rotary.span(start, start + new, x.device)
        cos, sin = (angle.view(-1, angle.shape[-1]) for angle in angles)
        if len(cos) not in (1, len(x)):
            cos, sin = cos.repeat(batch, 1), sin.repeat(batch, 1)
        seen = None if tree is None else tree.words.view(len(tree.words), new).expand(batch, -1).flatten()
        cache.open(new)
        for i, weights in cache.derived.items():
            if i not in self.skipped:
                keys, values = cache.layer(i)
                decoder_step(
                    x,
                    **weights,
                    keys=keys,
                    values=values,
                    cos=cos,
                    sin=sin,
                    lengths=lengths,
                    window=self.window,
                    drafts=new,
                    seen=seen,
                )
        out: Tensor = self.norm(x).view(batch, new, -1)
        return out

    def _stage(self, ids: Tensor, cache: TokenCache, parents: Parents | None) -> Tensor:
        new = ids.shape[1]
        if len(ids) != cache.batch or new == 0:
            raise ValueError(
                f"expected at least one token for each of the cache's {cache.batch} rows but got ids of shape "
                f"{tuple(ids.shape)}"
            )
        if parents is None:
            if self._fits_step(cache, new):
                return self._step(ids, cache)
            mask, angles = self.behind(cache.lengths, new, ids.device)
            return self.run(self.embed(ids), angles, mask, cache)
        if self.window is not None:
            raise ValueError("a tree of drafts cannot be read under a sliding window; draft chains")
        table = torch.as_tensor(parents, device="cpu")
        if table.shape not in ((new,), tuple(ids.shape)):
            raise ValueError(
                f"expected parents of shape [{new}] or {list(ids.shape)}, one for each draft, but got "
                f"{list(table.shape)}"
            )
        tree = TreeMask.from_parents(table, list(cache.lengths)).to(ids.device)
        if self._fits_step(cache, new):
            return self._step(ids, cache, tree)
        positions = tree.prefix.long().unsqueeze(1) + tree.depth
        return self.run(self.embed(ids), self.rotary.at(positions), tree, cache)

    @explain_kinds
    def behind(self, lengths: Sequence[int], new: int, device: torch.device) -> tuple[IntervalMask, Angles]:
        """The mask and the angles of `new` tokens that follow each row's tokens.

        Args:
            lengths: tokens that each row has; all rows may share one number.
            new: tokens that follow.
            device: of the result.
        """
        if len(set(lengths)) <= 1:
            lengths = lengths[:1] or (0,)
            angles = self.rotary.span(lengths[0], lengths[0] + new, device)
        else:
            positions = torch.tensor(lengths).unsqueeze(1) + torch.arange(new)
            angles = self.rotary.at(positions.to(device))
        if len(lengths) == 1:
            # Numbers of Python only: a compiled graph cannot look at values.
            stop = torch.arange(lengths[0] + 1, lengths[0] + new + 1, dtype=torch.int32, device=device)[None]
        else:
            stop = torch.tensor(lengths, dtype=torch.int32).unsqueeze(1) + torch.arange(1, new + 1)
        start = torch.zeros_like(stop)
        if self.window is not None:
            start = (stop - self.window).clamp(min=0)
        bounds = torch.stack([start, stop], -1).unsqueeze(1).to(device, torch.int32)
        return IntervalMask.trusted(bounds, max(lengths) + new), angles

    @explain_kinds
    def run(self, x: Tensor, angles: Angles, mask: Any, cache: TokenCache | None = None) -> Tensor:
        """All layers and the last norm: `[B, N, C]` to `[B, N, C]`; keys and values are staged in the cache."""
        for i, layer in enumerate(self.layers):
            if i not in self.skipped:
                x = layer(x, angles, mask, cache, i)
        out: Tensor = self.norm(x)
        return out


@explain_kinds
def left_aligned(ids: Tensor, cache: TokenCache, mask: Tensor | None) -> tuple[Tensor, int | list[int]]:
    """Rows with the padding before their tokens moved behind them, and how many tokens each has.

    Raises:
        ValueError: padding stands elsewhere, a row has no token, or the cache holds tokens already.
    """
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"expected mask of shape {tuple(ids.shape)} but got {tuple(mask.shape)}")
    if mask is None or bool(mask.all()):
        return ids, ids.shape[1]
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("expected padding only before the tokens of a row, not after or between them")
    if cache.length:
        raise ValueError("expected padding only in the first tokens that a cache receives")
    counts = mask.sum(1)
    place = torch.arange(ids.shape[1], device=ids.device) + (ids.shape[1] - counts).unsqueeze(1)
    return ids.gather(1, place.clamp(max=ids.shape[1] - 1)), counts.tolist()
