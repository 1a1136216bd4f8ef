"""The encoder-decoder that all methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.masks import IntervalMask
from arcore.nn import MLP, CrossAttention, SelfAttention
from arcore.nn.checks import check_choice, check_ids
from arcore.nn.kinds import check_kinds

# Target tokens with a meaning of their own; the vocabulary proper begins behind them.
PAD, MASK, BOS, EOS, SPECIAL = 0, 1, 2, 3, 4


@check_kinds
@dataclass(frozen=True, kw_only=True)
class NarConfig:
    """Settings of `Nar`.

    Attributes:
        source_vocab: source tokens, padding 0 included.
        target_vocab: target tokens V, the four special ones included.
        method: name of the method, which decides the heads.
        dim: width C.
        num_heads: attention heads.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        hidden_dim: width of the feed-forward networks.
        max_length: most source tokens, and most target tokens.
        factor: places per source token for methods with more places than target tokens.

    Raises:
        ValueError: a size is below 1, the vocabulary holds nothing but special tokens, or the method is unknown.
    """

    source_vocab: int
    target_vocab: int
    method: str = "cmlm"
    dim: int = 128
    num_heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    hidden_dim: int = 256
    max_length: int = 40
    factor: int = 2

    def __post_init__(self) -> None:
        from arcore.zoo.language.nar.registry import METHODS

        for name in (
            "source_vocab",
            "dim",
            "num_heads",
            "encoder_layers",
            "decoder_layers",
            "max_length",
            "factor",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.target_vocab <= SPECIAL:
            raise ValueError(
                f"expected target_vocab above the {SPECIAL} special tokens but got {self.target_vocab}"
            )
        check_choice("method", self.method, METHODS)


class Batch(NamedTuple):
    """Padded rows.

    Attributes:
        ids: int64 `[B, N]`, 0 behind each row's end.
        lengths: int64 `[B]`.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def real(self) -> Tensor:
        """bool `[B, N]`, False at padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(1)

    @classmethod
    def of(cls, rows: list[list[int]]) -> Batch:
        """Rows of tokens, each with at least one."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        return cls(ids, torch.tensor([len(row) for row in rows]))


class Memory(NamedTuple):
    """What the encoder made of sources.

    Attributes:
        states: `[B, S, C]`.
        lengths: int64 `[B]`.
        length_logits: `[B, max_length]`, of a target of 1, 2, ... tokens.
    """

    states: Tensor
    lengths: Tensor
    length_logits: Tensor

    def repeat(self, times: int) -> Memory:
        """Each row so many times in a row."""
        return Memory(*(part.repeat_interleave(times, dim=0) for part in self))


class Layer(nn.Module):
    """Self-attention, attention to the source in a decoder, and a feed-forward network, normalised first."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, *, crossed: bool) -> None:
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim) if crossed else None
        self.cross = CrossAttention(dim, num_heads) if crossed else None
        self.mlp = MLP(dim, hidden_dim)

    def forward(
        self, x: Tensor, mask: IntervalMask, context: Tensor | None = None, seen: IntervalMask | None = None
    ) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`; `seen` masks the context `[B, S, C]`."""
        x = x + self.attention(self.norm1(x), mask)
        if self.cross is not None and self.norm2 is not None and context is not None and seen is not None:
            x = x + self.cross(self.norm2(x), context, seen)
        out: Tensor = x + self.mlp(self.norm3(x))
        return out


def first(lengths: Tensor, queries: int, keys: int, *, causal: bool = False) -> IntervalMask:
    """Each of `queries` places sees the first keys of its row, up to its length; causal ones none behind themselves."""
    check_ids("lengths", lengths, keys + 1)
    stop = lengths.unsqueeze(1).expand(-1, queries)
    if causal:
        stop = torch.minimum(stop, torch.arange(1, queries + 1, device=lengths.device))
    bounds = torch.stack([torch.zeros_like(stop), stop], -1).unsqueeze(1)
    return IntervalMask.trusted(bounds.to(torch.int32).contiguous(), keys)


@check_kinds
class Nar(nn.Module):
    """Encoder, decoder and the heads of a method.

    Args:
        config: settings.
    """

    def __init__(self, config: NarConfig) -> None:
        super().__init__()
        from arcore.zoo.language.nar.registry import METHODS

        self.config = config
        dim = config.dim
        self.source = nn.Embedding(config.source_vocab, dim)
        self.target = nn.Embedding(config.target_vocab, dim)
        # The encoder reads a token of its own in front, from which the target's length is told.
        self.length_token = nn.Parameter(torch.zeros(dim))
        places = config.max_length * max(config.factor, 1) + 2
        self.source_places, self.target_places = (
            nn.Embedding(config.max_length + 1, dim),
            nn.Embedding(places, dim),
        )
        shape = (dim, config.num_heads, config.hidden_dim)
        self.encoder = nn.ModuleList(Layer(*shape, crossed=False) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(Layer(*shape, crossed=True) for _ in range(config.decoder_layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.output = nn.Linear(dim, config.target_vocab)
        self.length = nn.Linear(dim, config.max_length)
        self.heads = METHODS[config.method].heads(config)
        for embedding in (self.source, self.target, self.source_places, self.target_places):
            nn.init.normal_(embedding.weight, std=0.1)
        nn.init.normal_(self.length_token, std=0.1)

    @property
    def method(self) -> Any:
        """The method's functions, see `registry.Method`."""
        from arcore.zoo.language.nar.registry import METHODS

        return METHODS[self.config.method]

    @check_kinds
    def encode(self, source: Batch) -> Memory:
        """Read sources.

        Raises:
            ValueError: a source is longer than the model is made for, or has a token that it does not know.
        """
        batch, count = source.ids.shape
        if count > self.config.max_length:
            raise ValueError(
                f"expected sources of up to {self.config.max_length} tokens but one has {count}; leave it out, or "
                "train a model with a larger max_length"
            )
        x = self.source(source.ids)
        x = torch.cat([self.length_token.expand(batch, 1, -1), x], dim=1)
        x = x + self.source_places.weight[: count + 1]
        mask = first(source.lengths + 1, count + 1, count + 1)
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.encoder_norm(x)
        return Memory(x[:, 1:], source.lengths, self.length(x[:, 0]))

    def embed(self, ids: Tensor) -> Tensor:
        """Target tokens at their places, int64 `[B, N]` to `[B, N, C]`."""
        out: Tensor = self.target(ids) + self.target_places.weight[: ids.shape[1]]
        return out

    @check_kinds
    def decode(self, x: Tensor, lengths: Tensor, memory: Memory, *, causal: bool = False) -> Tensor:
        """States behind the decoder: `[B, N, C]` to `[B, N, C]`; rows have so many places."""
        count, keys = x.shape[1], memory.states.shape[1]
        mask, seen = first(lengths, count, count, causal=causal), first(memory.lengths, count, keys)
        for layer in self.decoder:
            x = layer(x, mask, memory.states, seen)
        out: Tensor = self.decoder_norm(x)
        return out

    def copied(self, memory: Memory, factor: int) -> tuple[Tensor, Tensor]:
        """Decoder inputs that are encoder states, each `factor` times: `[B, factor S, C]` and lengths."""
        x = memory.states.repeat_interleave(factor, dim=1)
        return x + self.target_places.weight[: x.shape[1]], memory.lengths * factor

    @check_kinds
    def forward(self, source: Batch, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the tokens at all places, `[B, N, V]`, and of the length, `[B, max_length]`.

        Args:
            source: sources.
            ids: int64 `[B, N]`, what stands at the places, `MASK` where nothing does.
            lengths: int64 `[B]`.
        """
        memory = self.encode(source)
        states = self.decode(self.embed(ids), lengths, memory)
        return self.output(states), memory.length_logits


def own_tokens(logits: Tensor) -> Tensor:
    """Logits `[..., V]` without the special tokens, which no target has."""
    forbidden = torch.arange(logits.shape[-1], device=logits.device) < SPECIAL
    return logits.masked_fill(forbidden, -torch.inf)


@preset
def nar_tiny() -> NarConfig:
    """Two layers on either side, for words and how they are spoken."""
    return NarConfig(source_vocab=32, target_vocab=48)
