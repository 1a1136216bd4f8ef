"""Kronos: a language model of financial candles (Shi et al., arXiv:2508.02739).

A tokenizer makes a coarse token s1 and a fine token s2 of each candle. A causal transformer reads both tokens and the
calendar of each candle and predicts the next s1; a cross-attention layer, whose query is the embedding of that s1 and
whose keys are what the transformer made of the candles so far, predicts s2. Drawing tokens gives paths of candles.

The released code computes that layer in two ways. In training queries and keys are turned by rotary angles and the
attention is causal (`causal_rope`). In generation there is one query, for which its angles vanish on both sides
(`official_generate`). Evaluated on whole windows it is not causal there, so that later tokens leak into s2; here it
always is.

Left out: dropout inside the attention, and averaging of paths: all of them are returned.

Legend: B windows, T rows, D width, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore.catalog import Published, System, preset
from arcore.nn import Angles, RMSNorm, RotaryTable, linear
from arcore.nn.kinds import check_kinds
from arcore.ops import block_sparse_attention
from arcore.zoo.series._kronos_layers import (
    KronosLayer,
    angles_of,
    causal,
    check_rates,
    init_linear,
    layers_from_official,
)

SYSTEM = System(
    name="kronos",
    title="Kronos",
    paper="arXiv:2508.02739",
    paper_title="Kronos: A Foundation Model for the Language of Financial Markets",
    topic="series",
    kind="model",
    model="Kronos",
    builds_on=("kronos_tokenizer",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Language model of candles with a coarse and a fine token; draws paths of prices.",
    claim="Coarse tokens tell of fine ones, paths through the shared prefix are those without a cache, nothing leaks.",
    checked_on="real data",
    reported="a RankIC 93 % above that of the best other foundation model of series, on candles of 45 exchanges",
)

DependencyMode = Literal["official_generate", "causal_rope"]
# Rows of the calendar's embeddings: minute, hour, weekday, day, month.
CALENDAR_ROWS = (60, 24, 7, 32, 13)
DEPENDENCY_HEADS = 4


@check_kinds
@dataclass(frozen=True, kw_only=True)
class KronosConfig:
    """Settings of `Kronos`.

    Attributes:
        dim: width D.
        num_layers: layers.
        num_heads: heads.
        hidden_dim: width of the feed-forward networks.
        s1_bits: bits of the coarse token.
        s2_bits: bits of the fine token.
        max_length: rows that the model is made for.
        learned_calendar: embeddings of the calendar are learned, else fixed sines.
        dependency: how generation computes the layer between s1 and s2, see the module.
        context: rows of a training window that are used for normalisation.
        horizon: rows of it that follow.
        dropout: of what layers add.
        token_dropout: of embeddings.
        teacher_forcing: in training s2 is predicted with the true s1, else, as in the released code, with a drawn one,
            from which a model that does not predict s1 well yet cannot learn what s1 tells of s2.

    Raises:
        ValueError: a size is out of range or a mode unknown.
    """

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    s1_bits: int = 10
    s2_bits: int = 10
    max_length: int = 512
    learned_calendar: bool = True
    dependency: DependencyMode = "official_generate"
    context: int = 90
    horizon: int = 10
    dropout: float = 0.0
    token_dropout: float = 0.0
    teacher_forcing: bool = False

    def __post_init__(self) -> None:
        if self.dependency not in ("official_generate", "causal_rope"):
            raise ValueError(
                f"expected dependency to be 'official_generate' or 'causal_rope' but got {self.dependency!r}"
            )
        if self.num_heads < 1 or self.dim % (2 * self.num_heads) or self.dim % (2 * DEPENDENCY_HEADS):
            raise ValueError(
                f"expected dim to be a multiple of 8 and of 2 * num_heads={2 * self.num_heads} but got {self.dim}"
            )
        if min(self.num_layers, self.s1_bits, self.s2_bits) < 1 or self.max_length < 2:
            raise ValueError("expected at least 1 layer, 1 bit of each token and 2 rows")

    @property
    def normalise(self) -> str:
        """Every window by the moments of its first `context` rows."""
        return "window"


class Logits(NamedTuple):
    """What `Kronos` predicts of the next candle: float32 `[B, T, V1]` and `[B, T, V2]`."""

    s1: Tensor
    s2: Tensor


class DependencyLayer(nn.Module):
    """Cross-attention from the embedding of the next s1 to the rows so far, and a norm.

    Args:
        dim: width D.
        mode: see the module.
    """

    def __init__(self, dim: int, mode: DependencyMode) -> None:
        super().__init__()
        self.mode = mode
        self.head_dim = dim // DEPENDENCY_HEADS
        self.query = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = RMSNorm(dim)
        self.rotary = RotaryTable(self.head_dim)

    def keys(self, hidden: Tensor, angles: Angles, mode: DependencyMode) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, T, D / H]` of rows `[B, T, D]`."""
        k, v = linear(hidden, self.kv.weight, self.kv.bias).unflatten(-1, (2, DEPENDENCY_HEADS, -1)).unbind(2)
        k = angles.turn(k) if mode == "causal_rope" else k
        return k.transpose(1, 2), v.transpose(1, 2)

    def mix(
        self,
        hidden: Tensor,
        sibling: Tensor,
        keys: tuple[Tensor, Tensor],
        mask: Any,
        angles: Angles,
        mode: str,
    ) -> Tensor:
        """What s2 is predicted from, `[B, N, D]`.

        Args:
            hidden: `[B, N, D]`, the last row that each query may see.
            sibling: `[B, N, D]`, embeddings of the next s1.
            keys: of `keys`.
            mask: for N queries.
            angles: of the N rows.
            mode: see the module.
        """
        q = linear(sibling, self.query.weight, self.query.bias).unflatten(-1, (DEPENDENCY_HEADS, -1))
        q = angles.turn(q) if mode == "causal_rope" else q
        mixed = block_sparse_attention(q.transpose(1, 2), *keys, mask).transpose(1, 2).flatten(2)
        out: Tensor = self.norm(hidden + linear(mixed, self.out.weight, self.out.bias))
        return out


@check_kinds
class Kronos(nn.Module):
    """The language model.

    Args:
        config: settings.
    """

    # Its heads are read outside of the calls that gather weights.
    shardable = False

    def __init__(self, config: KronosConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.horizon, self.normalise = config.context, config.horizon, config.normalise
        self.max_length = config.max_length
        self.vocab_sizes = (2**config.s1_bits, 2**config.s2_bits)
        dim = config.dim
        self.embed_s1 = nn.Embedding(self.vocab_sizes[0], dim)
        self.embed_s2 = nn.Embedding(self.vocab_sizes[1], dim)
        self.fuse = nn.Linear(2 * dim, dim)
        tables = [nn.Embedding(rows, dim) for rows in CALENDAR_ROWS]
        self.calendar = nn.ModuleList(tables).requires_grad_(config.learned_calendar)
        self.layers = nn.ModuleList(
            KronosLayer(dim, config.num_heads, config.hidden_dim, config.dropout)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(dim)
        self.dependency = DependencyLayer(dim, config.dependency)
        self.head_s1 = nn.Linear(dim, self.vocab_sizes[0])
        self.head_s2 = nn.Linear(dim, self.vocab_sizes[1])
        self.rotary = RotaryTable(dim // config.num_heads)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        init_linear(self)
        if self.embed_s1.weight.is_meta:
            return
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                part.weight.normal_(std=self.config.dim**-0.5)
        if not self.config.learned_calendar:
            tables: Any = self.calendar
            for table in tables:
                rates = 10000.0 ** (-torch.arange(0, self.config.dim, 2) / self.config.dim)
                angles = torch.arange(len(table.weight)).unsqueeze(1) * rates
                table.weight.copy_(torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def embed(self, s1: Tensor, s2: Tensor, calendar: Tensor | None) -> Tensor:
        """Embeddings `[B, T, D]` of tokens `[B, T]` at calendars `[B, T, 5]`."""
        scale = self.config.dim**0.5
        both = torch.cat([self.embed_s1(s1) * scale, self.embed_s2(s2) * scale], -1)
        x: Tensor = self.fuse(both)
        if calendar is not None:
            x = x + sum(table(calendar[..., i]) for i, table in enumerate(self.calendar))
        return F.dropout(x, self.config.token_dropout, self.training)

    def run(self, x: Tensor, angles: Angles, mask: Any, cache: Any = None) -> Tensor:
        """All layers and the norm: `[B, N, D]` to `[B, N, D]`; keys and values are staged in the cache."""
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, mask, cache, i)
        out: Tensor = self.norm(x)
        return out

    def hidden(self, s1: Tensor, s2: Tensor, calendar: Tensor | None = None) -> Tensor:
        """What the transformer makes of rows: tokens `[B, T]` and calendars int64 `[B, T, 5]` to `[B, T, D]`.

        Raises:
            ValueError: the shapes differ, or there are more rows than the model is made for.
        """
        if s1.shape != s2.shape or s1.dim() != 2 or not 0 < s1.shape[1] <= self.max_length:
            raise ValueError(
                f"expected tokens s1 and s2 of shape [B, T], T from 1 to {self.max_length}, but got {tuple(s1.shape)} "
                f"and {tuple(s2.shape)}"
            )
        length = s1.shape[1]
        angles = angles_of(self.rotary, length, s1.device)
        return self.run(self.embed(s1, s2, calendar), angles, causal(length, s1.device))

    def fine(self, hidden: Tensor, next_s1: Tensor, mode: DependencyMode | None = None) -> Tensor:
        """Logits of s2 `[B, T, V2]` of the next candle of each row, given its s1 `[B, T]`; later rows are not seen."""
        mode = mode or self.config.dependency
        length = hidden.shape[1]
        angles = angles_of(self.dependency.rotary, length, hidden.device)
        mixed = self.dependency.mix(
            hidden,
            self.embed_s1(next_s1),
            self.dependency.keys(hidden, angles, mode),
            causal(length, hidden.device),
            angles,
            mode,
        )
        return self.fine_logits(mixed)

    def fine_logits(self, mixed: Tensor) -> Tensor:
        """Logits of s2 of what `DependencyLayer.mix` returned: `[..., D]` to `[..., V2]`."""
        return linear(mixed, self.head_s2.weight, self.head_s2.bias).float()

    @check_kinds
    def forward(
        self,
        s1: Tensor,
        s2: Tensor,
        calendar: Tensor | None,
        next_s1: Tensor,
        mode: DependencyMode | None = None,
    ) -> Logits:
        """Logits of the next candle at each row.

        Args:
            s1, s2: int64 `[B, T]`.
            calendar: int64 `[B, T, 5]`, see `arcore.data.calendar`, or None.
            next_s1: int64 `[B, T]`, the coarse token of the next candle, which s2 is predicted with.
            mode: of the layer in between; the config's when None.
        """
        hidden = self.hidden(s1, s2, calendar)
        return Logits(self.coarse(hidden), self.fine(hidden, next_s1, mode))

    def coarse(self, hidden: Tensor) -> Tensor:
        """Logits of s1 `[..., V1]` of the next candle."""
        return linear(hidden, self.head_s1.weight, self.head_s1.bias).float()

    def objective(self, s1: Tensor, s2: Tensor, calendar: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Half of both tokens' cross entropies of the next candle; see `teacher_forcing` of the config.

        Args:
            s1, s2: `[B, T + 1]`.
            calendar: `[B, T + 1, 5]` or None.
        """
        hidden = self.hidden(s1[:, :-1], s2[:, :-1], None if calendar is None else calendar[:, :-1])
        coarse = self.coarse(hidden)
        given = s1[:, 1:]
        if self.training and not self.config.teacher_forcing:
            drawn = torch.multinomial(coarse.detach().softmax(-1).flatten(0, 1), 1)
            given = drawn.view(given.shape)
        fine = self.fine(hidden, given, "causal_rope")
        first = cross_entropy(coarse.flatten(0, 1), s1[:, 1:].flatten())
        second = cross_entropy(fine.flatten(0, 1), s2[:, 1:].flatten())
        return (first + second) / 2, {"ce_s1": first.detach(), "ce_s2": second.detach()}

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> KronosConfig:
        """The config of published weights, from the config.json beside them."""
        names = {"dim": "d_model", "num_layers": "n_layers", "num_heads": "n_heads", "hidden_dim": "ff_dim"}
        given = {ours: content[theirs] for ours, theirs in names.items()}
        return KronosConfig(
            **given,
            s1_bits=content["s1_bits"],
            s2_bits=content["s2_bits"],
            learned_calendar=bool(content["learn_te"]),
        )

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released code under our names.

        Raises:
            ValueError: heads are of another width.
        """
        left = dict(state)
        head_dim = self.config.dim // self.config.num_heads
        ours = layers_from_official(left, "transformer", "layers", self.config.num_layers, head_dim)
        check_rates(left.pop("dep_layer.cross_attn.rotary.inv_freq", None), self.dependency.head_dim)
        cross = "dep_layer.cross_attn."
        renamed = {
            "embedding.emb_s1": "embed_s1",
            "embedding.emb_s2": "embed_s2",
            "embedding.fusion_proj": "fuse",
            "norm": "norm",
            f"{cross}q_proj": "dependency.query",
            f"{cross}out_proj": "dependency.out",
            "dep_layer.norm": "dependency.norm",
            "head.proj_s1": "head_s1",
            "head.proj_s2": "head_s2",
        }
        for i, name in enumerate(("minute", "hour", "weekday", "day", "month")):
            # Fixed tables are modules within modules.
            renamed |= {f"time_emb.{name}_embed{inner}": f"calendar.{i}" for inner in ("", ".emb")}
        for part in ("weight", "bias"):
            for theirs, name in renamed.items():
                if (found := left.pop(f"{theirs}.{part}", None)) is not None:
                    ours[f"{name}.{part}"] = found
            if all(f"{cross}{n}_proj.{part}" in left for n in "kv"):
                ours[f"dependency.kv.{part}"] = torch.cat([left.pop(f"{cross}{n}_proj.{part}") for n in "kv"])
        return ours | left


@preset(
    tokenizer="kronos_tokenizer_2k",
    weights=Published("NeoQuasar/Kronos-mini", "model.safetensors", ("config.json",)),
)
def kronos_mini() -> KronosConfig:
    """4.1 M parameters, windows of 2,048 rows; NeoQuasar/Kronos-mini."""
    return KronosConfig(dim=256, num_layers=4, num_heads=4, hidden_dim=512, max_length=2048)


@preset(
    tokenizer="kronos_tokenizer_base",
    weights=Published("NeoQuasar/Kronos-small", "model.safetensors", ("config.json",)),
)
def kronos_small() -> KronosConfig:
    """24.7 M parameters, windows of 512 rows; NeoQuasar/Kronos-small."""
    return KronosConfig(dim=512, num_layers=8, num_heads=8, hidden_dim=1024)


@preset(
    tokenizer="kronos_tokenizer_base",
    weights=Published("NeoQuasar/Kronos-base", "model.safetensors", ("config.json",)),
)
def kronos_base() -> KronosConfig:
    """102.3 M parameters, windows of 512 rows; NeoQuasar/Kronos-base."""
    return KronosConfig(dim=832, num_layers=12, num_heads=16, hidden_dim=2048)


@preset(tokenizer="kronos_tokenizer_tiny")
def kronos_tiny() -> KronosConfig:
    """6 + 6 bits; trains on a CPU in minutes."""
    return KronosConfig(
        dim=96,
        num_layers=3,
        num_heads=4,
        hidden_dim=192,
        s1_bits=6,
        s2_bits=6,
        max_length=256,
        dependency="causal_rope",
        context=60,
        teacher_forcing=True,
    )


def __getattr__(name: str) -> Any:
    if name == "RECIPE":
        from arcore.zoo.series.kronos.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
