"""IconShop: settings, network, drawing, preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore.catalog import preset
from arcore.data.svg import Icon
from arcore.decoding import generate
from arcore.nn import DecoderLayer, GatedMLP, GroupedAttention, RMSNorm
from arcore.nn.causal import CausalDecoder
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.nn.rotary import RotaryTable
from arcore.zoo.raster.iconshop.tokens import (
    COUNTS,
    END,
    FIRST_POINT,
    MASK,
    SPAN_END,
    Grammar,
    GrammarModel,
    IconTokenizer,
    cut_span,
    fill_span,
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class IconShopConfig:
    """Settings of `IconShop`.

    Attributes:
        dim: width C.
        num_layers: layers.
        num_heads: heads.
        hidden_dim: width of the feed-forward network.
        grid: side G of the grid.
        words: W, names of the words by number.
        max_length: tokens of words and drawing.
        norm_eps: of the norms.

    Raises:
        ValueError: a size is below 1, heads do not divide the width, or a word stands twice.
    """

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    grid: int = 100
    words: tuple[str, ...] = ()
    max_length: int = 562
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "hidden_dim", "grid", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"expected heads of an even width but got dim={self.dim} and {self.num_heads} heads"
            )
        object.__setattr__(self, "words", tuple(self.words))
        if len(set(self.words)) != len(self.words):
            raise ValueError("expected words that differ from one another")


@check_kinds
class IconShop(CausalDecoder):
    """The model. Tokens of drawings come first, then the start of words, the start of a drawing, and the words.

    Args:
        config: settings.
    """

    def __init__(self, config: IconShopConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = IconTokenizer(config.grid)
        self.vocab_size = self.tokenizer.vocab_size
        self.max_length = config.max_length
        self.text_start, self.draw_start = self.vocab_size, self.vocab_size + 1
        self.total = self.vocab_size + 2 + len(config.words)
        self.embedding = nn.Embedding(self.total, config.dim)
        self.columns, self.rows = (nn.Embedding(config.grid + 1, config.dim) for _ in range(2))
        head_dim = config.dim // config.num_heads
        self.layers = nn.ModuleList(
            DecoderLayer(
                config.dim,
                attention=GroupedAttention(
                    config.dim, num_heads=config.num_heads, num_kv_heads=config.num_heads, head_dim=head_dim
                ),
                mlp=GatedMLP(config.dim, config.hidden_dim),
                norm_eps=config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, self.total, bias=False)
        self.rotary = RotaryTable(head_dim)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)

    @check_kinds
    def forward(self, ids: Tensor) -> Tensor:
        """Logits of what follows each token: int64 `[B, L]` to float32 `[B, L, V + 2 + W]`."""
        x = self.embed(ids)
        mask, angles = self.behind((0,), ids.shape[1], ids.device)
        return self.logits(self.run(x, angles, mask))

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings, those of points with their column's and row's: int64 `[B, L]` to `[B, L, C]`."""
        check_ids("ids", ids, self.total)
        point = (ids >= FIRST_POINT) & (ids < self.vocab_size)
        place = (ids - FIRST_POINT).clamp(min=0)
        grid = self.config.grid
        # The last entry stands for what is no point.
        column = torch.where(point, place % grid, grid)
        row = torch.where(point, place.div(grid, rounding_mode="floor"), grid)
        out: Tensor = self.embedding(ids) + self.columns(column) + self.rows(row.clamp(max=grid))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., C]` to float32 `[..., V + 2 + W]`."""
        return self.last_layer(hidden, self.lm_head.weight)

    def prompt(self, words: Sequence[str]) -> list[int]:
        """Tokens in front of a drawing.

        Raises:
            ValueError: a word is not known.
        """
        numbers = {word: self.draw_start + 1 + i for i, word in enumerate(self.config.words)}
        for word in words:
            if word not in numbers:
                import difflib

                close = difflib.get_close_matches(word, numbers, n=3)
                hint = (
                    f"did you mean {', '.join(close)}?"
                    if close
                    else "take words of the training icons' names"
                )
                raise ValueError(f"the model does not know the word {word!r}: {hint}")
        return [self.text_start, *(numbers[word] for word in words), self.draw_start]

    @check_kinds
    def draw(
        self, prompts: Sequence[Sequence[int]], *, seed: int = 0, **sampling: float | None
    ) -> list[Icon]:
        """Icons behind prompts, by the grammar.

        Args:
            prompts: what `prompt` gives, one for each icon.
            seed: icon n of a seed is the same whatever the count is.
            **sampling: fields of `arcore.decoding.Sampling`.
        """
        room = self.max_length - max(map(len, prompts))
        grammars = [Grammar(self.vocab_size, room) for _ in prompts]
        rows = self._rows(prompts, grammars, room, END, seed, sampling)
        return [self.tokenizer.decode(row) for row in rows]

    @check_kinds
    def fill(
        self, words: Sequence[str], drawing: Sequence[int], first: int, count: int, *, num: int = 1, seed: int = 0,
        **sampling: float | None,
    ) -> list[Icon]:  # fmt: skip
        """Icons with a span of commands drawn anew between what stands around it.

        Args:
            words: of the icon.
            drawing: tokens of the icon, without the end.
            first: number of the span's first command.
            count: commands of the span.
            num: how many.
            seed: as for `draw`.
            **sampling: as for `draw`.

        Raises:
            ValueError: there is no such span, or no room to fill it.
        """
        cut = cut_span(drawing, first, count)
        kept = cut[: cut.index(END) + 1]
        prompt = [*self.prompt(words), *kept]
        room = self.max_length - len(prompt)
        if room < 1 + max(COUNTS.values()) + 1:
            raise ValueError(
                f"the icon takes {len(prompt)} of {self.max_length} tokens, which leaves no room to fill the gap"
            )
        inside = kept[0] != MASK
        grammars = [Grammar(self.vocab_size, room, filling=True, inside=inside) for _ in range(num)]
        rows = self._rows([prompt] * num, grammars, room, SPAN_END, seed, sampling)
        return [self.tokenizer.decode(fill_span([*kept, *row])) for row in rows]

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        grammars: list[Grammar],
        room: int,
        eos: int,
        seed: int,
        sampling: dict[str, float | None],
    ) -> list[list[int]]:
        if room < 4:
            raise ValueError(f"the prompt leaves {room} of {self.max_length} tokens: no room for a drawing")
        seeds = [seed + n for n in range(len(prompts))]
        model = GrammarModel(self, grammars)
        was = self.training
        self.eval()
        try:
            out = generate(model, prompts, max_new_tokens=room, eos=eos, seed=seeds, **sampling)  # type: ignore[arg-type]
        finally:
            self.train(was)
        return out.rows()


@check_kinds
def icon_loss(
    model: IconShop, ids: Tensor, text_weight: float = 1.0, draw_weight: float = 7.0
) -> tuple[Tensor, Tensor]:
    """Cross entropies of words and drawings, each among its own tokens, weighted 1 to 7; and that of drawings alone.

    Args:
        model: the model.
        ids: int64 `[B, L]`; -1 behind a row's end.
        text_weight: of the words.
        draw_weight: of the drawings.
    """
    logits, targets = model(ids[:, :-1].clamp(min=0)), ids[:, 1:]
    split = model.vocab_size
    losses = []
    for low, high, part in (
        (split, model.total, targets >= split),
        (0, split, (targets >= 0) & (targets < split)),
    ):
        wanted = torch.where(part, targets - low, -100)
        one = cross_entropy(
            logits[..., low:high].flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
        )
        losses.append(one / part.sum().clamp(min=1))
    total = (text_weight * losses[0] + draw_weight * losses[1]) / (text_weight + draw_weight)
    return total, losses[1]


@preset
def iconshop_tiny() -> IconShopConfig:
    """A grid of 32 pixels and drawings of up to 150 tokens; trains on a CPU in minutes."""
    return IconShopConfig(dim=128, num_layers=3, num_heads=4, hidden_dim=320, grid=32, max_length=160)


@preset
def iconshop_base() -> IconShopConfig:
    """The published size: 16 layers of width 512, a grid of 200 pixels as in the released weights."""
    return IconShopConfig(dim=512, num_layers=16, num_heads=8, hidden_dim=1024, grid=200, max_length=562)
