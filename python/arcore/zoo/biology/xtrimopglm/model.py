"""The network, infilling with a cache, presets, and the check of the claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import create_model, preset
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, shaken, steps
from arcore.decoding import Sampling
from arcore.decoding.draws import row_seeds
from arcore.masks import IntervalMask, full, prefix_lm
from arcore.nn import Rope, TokenCache, attend, rope_table
from arcore.zoo.biology.xtrimopglm.blanks import IGNORED, VOCABULARIES, Blanked, blank


@dataclass(frozen=True, kw_only=True)
class GLMConfig:
    """Settings of `GLM`.

    Attributes:
        dim: width C.
        num_layers: layers.
        num_heads: heads.
        vocab_size: V.
        max_length: largest position.
        positions: `rotary`, in two dimensions, half of a head's channels each; or `table`, two learned tables.
        vocabulary: what tokens are: `protein` or `bytes`.

    Raises:
        ValueError: a size is below 1, or heads do not fit.
    """

    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_length: int = 512
    positions: Literal["rotary", "table"] = "rotary"
    vocabulary: Literal["protein", "bytes"] = "protein"

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "vocab_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ValueError(
                f"expected heads of a width that is a multiple of 4 but got dim={self.dim} and {self.num_heads} heads"
            )
        if self.positions not in ("rotary", "table") or self.vocabulary not in VOCABULARIES:
            raise ValueError(
                f"expected positions rotary or table and a vocabulary of {', '.join(VOCABULARIES)} but got "
                f"{self.positions!r} and {self.vocabulary!r}"
            )


class Attention(nn.Module):
    """Self-attention with biases; names are those of the published weights."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.dense = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: IntervalMask, rope: Rope | None, cache: TokenCache | None, layer: int
    ) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        heads = self.query_key_value(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        if rope is not None:
            q, k = rope.apply(q), rope.apply(k)
        if cache is not None:
            k, v = cache.stage(layer, k, v)
        out: Tensor = self.dense(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    """A pre-norm layer."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, num_heads), MLP(dim)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`; the other arguments are those of the attention."""
        x = x + self.attention(self.input_layernorm(x), *args)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class RotaryPositions(nn.Module):
    """Both positions turn queries and keys, each half of the channels of a head."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rope | None]:
        """Embeddings `[B, N, C]` and positions `[B, 2, N]` to embeddings and angles."""
        batch, _, length = positions.shape
        flat = positions.transpose(0, 1).flatten(1)
        table = rope_table(flat, self.head_dim, split=(1, 1), bases=(10000.0, 10000.0)).to(x.device)
        cos, sin = (part.view(batch, 1, length, self.head_dim) for part in (table.cos, table.sin))
        return x, Rope(cos, sin, table.runs)


class TablePositions(nn.Module):
    """A learned vector for each position, added to the embeddings."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_length + 1, config.dim)
        self.block_position_embeddings = nn.Embedding(config.max_length + 1, config.dim)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rope | None]:
        """Embeddings `[B, N, C]` and positions `[B, 2, N]` to embeddings and no angles."""
        first, second = positions.unbind(1)
        return x + self.position_embeddings(first) + self.block_position_embeddings(second), None


POSITIONS = {"rotary": RotaryPositions, "table": TablePositions}


class GLM(nn.Module):
    """The model; the last linear layer is the embedding.

    Args:
        config: settings.
    """

    official_entry = "module"

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = VOCABULARIES[config.vocabulary]
        self.max_length = config.max_length
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.positions = POSITIONS[config.positions](config)
        self.layers = nn.ModuleList(Layer(config.dim, config.num_heads) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.dim)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, positions: Tensor, prefix: int | Sequence[int] | Tensor) -> Tensor:
        """Logits of texts with blanks.

        Args:
            ids: int64 `[B, L]`.
            positions: int64 `[B, 2, L]`.
            prefix: tokens of part A, one number or one per row; 0 is a causal language model, L an encoder.

        Returns:
            float32 `[B, L, V]`.
        """
        if torch.compiler.is_compiling():
            # Values cannot be looked at in a graph; outside one `prefix_lm` checks them.
            places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
            starts = torch.as_tensor(prefix, device=ids.device).view(-1, 1)
            stop = torch.maximum(places, starts).unsqueeze(1).to(torch.int32)
            mask = IntervalMask.trusted(torch.stack([torch.zeros_like(stop), stop], -1), ids.shape[1])
        else:
            mask = prefix_lm(ids.shape[1], prefix).to(ids.device)
        return self.logits(self.hidden(ids, positions, mask))

    def hidden(
        self, ids: Tensor, positions: Tensor, mask: IntervalMask, cache: TokenCache | None = None
    ) -> Tensor:
        """What comes from behind the last norm, `[B, N, C]`; keys and values are staged in the cache.

        Raises:
            ValueError: shapes do not fit, or a position is larger than the model is made for.
        """
        if positions.shape != (len(ids), 2, ids.shape[1]):
            raise ValueError(
                f"expected positions [B, 2, L] for ids {tuple(ids.shape)} but got {tuple(positions.shape)}"
            )
        if not torch.compiler.is_compiling() and positions.numel() and int(positions.max()) > self.max_length:
            raise ValueError(
                f"the model is made for positions up to {self.max_length} but got {int(positions.max())}: give a "
                "shorter text"
            )
        x, rope = self.positions(self.word_embeddings(ids), positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, rope, cache, i)
        out: Tensor = self.final_layernorm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., C]` to float32 `[..., V]`."""
        return F.linear(hidden, self.word_embeddings.weight).float()

    def make_cache(self, batch: int, max_length: int) -> TokenCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        weight = self.word_embeddings.weight
        return TokenCache(
            num_layers=self.config.num_layers,
            batch=batch,
            num_heads=self.config.num_heads,
            max_length=max_length,
            head_dim=self.config.dim // self.config.num_heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.no_grad()
    def read(self, ids: Tensor, positions: Tensor, cache: TokenCache) -> Tensor:
        """Logits `[B, V]` behind new tokens, which see each other and the cache, and are added to it.

        Part A in one call, then the tokens of part B one by one.
        """
        mask = full(ids.shape[1], cache.length + ids.shape[1]).to(ids.device)
        hidden = self.hidden(ids, positions, mask, cache)
        cache.commit(ids.shape[1])
        return self.logits(hidden[:, -1])

    @torch.no_grad()
    def infill(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int = 0,
        least: int = 1,
    ) -> list[list[int]]:
        """Fill the masks of a text from left to right.

        Args:
            ids: part A; its span masks and end masks are filled.
            max_new_tokens: most tokens per mask.
            sampling: how tokens are drawn.
            seed: of the draws.
            least: tokens below which a span does not end.

        Returns:
            The tokens of each mask.

        Raises:
            ValueError: there is no mask, or the text is longer than the model is made for.
        """
        specials = self.vocabulary.specials
        masks = [i for i, token in enumerate(ids) if token in (specials.span_mask, specials.end_mask)]
        if not masks:
            raise ValueError("the text has no blank to fill")
        device = self.word_embeddings.weight.device
        cache = self.make_cache(1, len(ids) + len(masks) * (max_new_tokens + 1))
        places = torch.arange(len(ids), device=device)
        self.read(torch.tensor([list(ids)], device=device), torch.stack([places, 0 * places])[None], cache)
        seeds, sampling = row_seeds([seed], 1), sampling or Sampling()
        allowed = torch.full((self.config.vocab_size,), -torch.inf, device=device)
        allowed[1 : 1 + len(self.vocabulary.symbols)] = 0
        found: list[list[int]] = []
        for place in masks:
            token, span = specials.sop, list[int]()
            while len(span) < max_new_tokens:
                where = torch.tensor([[[place], [len(span) + 1]]], device=device)
                logits = self.read(torch.tensor([[token]], device=device), where, cache)
                allowed[specials.eop] = 0 if len(span) >= least else -torch.inf
                drawn = sampling.draw(logits + allowed, seeds, torch.tensor([cache.length]))
                assert isinstance(drawn, Tensor)
                token = int(drawn)
                if token == specials.eop:
                    break
                span.append(token)
            found.append(span)
        return found

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of GLM under our names: those of its transformer stand one level higher, the tables together."""
        ours = {}
        for key, value in state.items():
            name = key.removeprefix("transformer.")
            if name.split(".")[0] in ("position_embeddings", "block_position_embeddings"):
                name = f"positions.{name}"
            ours[name] = value
        return ours


@preset
def xtrimopglm_tiny() -> GLMConfig:
    """Rotary positions, amino acids."""
    return GLMConfig(dim=64, num_layers=3, num_heads=4, vocab_size=128)


@preset
def glm_tiny() -> GLMConfig:
    """Learned tables, bytes."""
    return GLMConfig(dim=64, num_layers=3, num_heads=4, vocab_size=264, positions="table", vocabulary="bytes")


@preset
def glm_base() -> GLMConfig:
    """GLM's smallest size, 110 M parameters; weights: blocklm-base-blank.tar.bz2, mp_rank_00_model_states.pt."""
    return GLMConfig(
        dim=768, num_layers=12, num_heads=12, vocab_size=30592, positions="table", vocabulary="bytes"
    )


@preset
def xtrimopglm_1b() -> GLMConfig:
    """The size of the smallest published one."""
    return GLMConfig(dim=2048, num_layers=24, num_heads=32, vocab_size=128, max_length=2048)


def brackets(count: int, pairs: int, generator: torch.Generator) -> Tensor:
    """Balanced texts of four kinds of brackets, as residues 1 to 8 of the protein vocabulary: `[count, 2 pairs]`."""
    rows = []
    for _ in range(count):
        stack: list[int] = []
        row: list[int] = []
        while len(row) < 2 * pairs:
            room = 2 * pairs - len(row) > len(stack)
            if not stack or (room and float(torch.rand((), generator=generator)) < 0.5):
                stack.append(int(torch.randint(4, (), generator=generator)))
                row.append(1 + stack[-1])
            else:
                row.append(5 + stack.pop())
        rows.append(row)
    return torch.tensor(rows)


def bracket_accuracy(infill: bool, *, count: int, seed: int = 0) -> float:
    """Share of blanked brackets that are filled rightly, by blank infilling or by a language model from the left."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = create_model("xtrimopglm_tiny")
    specials = model.vocabulary.specials
    special: Any = {"mask": specials.span_mask, "sop": specials.sop, "eop": specials.eop}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=count, pct_start=0.1)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        texts = brackets(size, 6, generator)
        return texts, torch.randint(texts.shape[1], (size,), generator=generator)

    def logits_and_targets(texts: Tensor, places: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        if infill:
            rows = [
                blank(t, [(p, p + 1)], **special)
                for t, p in zip(texts.tolist(), places.tolist(), strict=True)
            ]
            one = Blanked(*(torch.stack(part) for part in zip(*rows, strict=True)))
            targets = one.targets if train else one.targets.masked_fill(one.targets == specials.eop, IGNORED)
            return model(one.ids, one.positions, one.prefix), targets
        ids = torch.cat([torch.full_like(texts[:, :1], specials.start), texts], 1)[:, :-1]
        positions = torch.stack([torch.arange(ids.shape[1]), torch.zeros(ids.shape[1], dtype=torch.int64)])
        keep = torch.arange(texts.shape[1]) == places.unsqueeze(1)
        targets = texts if train else texts.masked_fill(~keep, IGNORED)
        return model(ids, positions.expand(len(ids), -1, -1), 0), targets

    for _ in steps(count, "training on brackets"):
        logits, targets = logits_and_targets(*batch(64), True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    with torch.no_grad():
        logits, targets = logits_and_targets(*batch(1000), False)
    which = targets != IGNORED
    return float((logits.argmax(-1) == targets)[which].float().mean())


@torch.no_grad()
def _exact_rows(name: str) -> list[Row]:
    """What part A and earlier spans see, a prefix of nothing and of everything, and steps with a cache."""
    model: Any = shaken(create_model(name)).eval()
    specials = model.vocabulary.specials
    text = torch.randint(1, 20, (16,)).tolist()
    one = blank(text, [(9, 12), (3, 5)], mask=specials.span_mask, sop=specials.sop, eop=specials.eop)
    ids, positions, prefix = one.ids[None], one.positions[None], int(one.prefix)
    whole = model(ids, positions, prefix)
    other = ids.clone()
    other[0, prefix + 4 :] = 21
    change = (model(other, positions, prefix) - whole).abs().amax(-1)[0]
    causal, left = model(ids, positions, 0), model(ids[:, :5], positions[:, :, :5], 0)
    encoder = model(ids, positions, ids.shape[1])
    cache = model.make_cache(1, ids.shape[1])
    steps_ = [model.read(ids[:, :prefix], positions[..., :prefix], cache)]
    steps_ += [
        model.read(ids[:, i : i + 1], positions[..., i : i + 1], cache) for i in range(prefix, ids.shape[1])
    ]
    apart = (torch.stack(steps_, 1) - whole[:, prefix - 1 :]).abs().max()
    return [
        at_most(
            f"{name}: change of part A and of the first span when the second is another",
            change[: prefix + 4].max(),
            0,
        ),
        at_most(f"{name}: prefix 0 against the left part alone", (causal[:, :5] - left).abs().max(), 1e-5),
        at_least(f"{name}: change by a prefix of everything", (encoder - whole)[:, prefix].abs().max(), 1e-3),
        at_most(f"{name}: one pass against steps", apart, 1e-5),
    ]


GOLDEN = (
    [900, 1, 901, 4, 5, 901, 7, 8, 904, 6, 904, 2, 3],
    [6, 905, 2, 3, 905],
    [[0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 2, 3]],
)


def claim(*, quick: bool) -> Claim:
    """GLM's own example of a text with blanks; what sees what; in full, brackets filled from both sides."""
    one = blank([900, *range(1, 9)], [(6, 7), (2, 4)], mask=901, sop=904, eop=905)
    wrong = sum(a != b for a, b in zip(one.ids.tolist(), GOLDEN[0], strict=True))
    wrong += sum(a != b for a, b in zip(one.targets.tolist()[8:], GOLDEN[1], strict=True))
    wrong += int((one.positions != torch.tensor(GOLDEN[2])).sum()) + abs(int(one.prefix) - 8)
    rows = [equals("entries of the example that differ from GLM's own code", wrong, 0)]
    for name in ("xtrimopglm_tiny", "glm_tiny"):
        rows += _exact_rows(name)
    if not quick:
        both, left = (bracket_accuracy(infill, count=500) for infill in (True, False))
        rows.append(
            at_least("brackets filled rightly from both sides less those from the left", both - left, 0.2)
        )
    return Claim(tuple(rows))
