"""The network, infilling with a cache, and presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.decoding import Sampling
from arcore.decoding.draws import row_seeds
from arcore.masks import IntervalMask, full, prefix_lm
from arcore.nn import Rope, TokenCache, linear, rope_table
from arcore.nn.cache import storage_dtype
from arcore.nn.kinds import check_kinds
from arcore.zoo.biology.xtrimopglm.blanks import VOCABULARIES
from arcore.zoo.biology.xtrimopglm.layers import MLP, Attention, DeepNormLayer, GatedMLP, Layer


@check_kinds
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
        norm: `pre`, or `deep` for DeepNorm.
        mlp: `gelu` or `geglu`.
        hidden_dim: width of the MLP; four times the width when None.
        own_head: the last linear layer is not the embedding, and has a bias.

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
    norm: Literal["pre", "deep"] = "pre"
    mlp: Literal["gelu", "geglu"] = "gelu"
    hidden_dim: int | None = None
    own_head: bool = False

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
        if self.norm not in ("pre", "deep") or self.mlp not in MLPS:
            raise ValueError(
                f"expected norm pre or deep and mlp gelu or geglu but got {self.norm!r} and {self.mlp!r}"
            )
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"expected hidden_dim to be at least 1 but got {self.hidden_dim}")


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


MLPS = {"gelu": MLP, "geglu": GatedMLP}
POSITIONS = {"rotary": RotaryPositions, "table": TablePositions}


@check_kinds
class GLM(nn.Module):
    """The model; the last linear layer is the embedding, unless the config says otherwise.

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
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size) if config.own_head else None
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        for layer in self.layers:
            if isinstance(layer, DeepNormLayer) and not layer.input_layernorm.weight.is_meta:
                layer.scale()

    @check_kinds
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
        if self.head is None:
            return linear(hidden, self.word_embeddings.weight).float()
        found: Tensor = self.head(hidden).float()
        return found

    def make_cache(self, batch: int, max_length: int) -> TokenCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        weight = self.word_embeddings.weight
        return TokenCache(
            num_layers=self.config.num_layers,
            batch=batch,
            num_heads=self.config.num_heads,
            max_length=max_length,
            head_dim=self.config.dim // self.config.num_heads,
            dtype=storage_dtype(weight),
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
    @check_kinds
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

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> GLMConfig:
        """The config of weights in xTrimoPGLM's layout, from the config.json beside them.

        Raises:
            ValueError: a setting is one that is not built here.
        """
        deep = bool(content.get("deepnorm", False))
        wanted = {
            "glu_activation": ("geglu",),
            "rotary_embedding_2d": (True,),
            "apply_residual_connection_post_layernorm": (deep,),
            "rmsnorm": (False,),
            "multi_query_attention": (False,),
            "moe": (False,),
            "post_layer_norm": (True,),
        }
        for name, fine in wanted.items():
            if content.get(name, fine[0]) not in fine:
                raise ValueError(f"expected {name} to be {fine[0]} but the config has {content[name]!r}")
        return GLMConfig(
            dim=content["hidden_size"],
            num_layers=content["num_layers"],
            num_heads=content["num_attention_heads"],
            vocab_size=content["padded_vocab_size"],
            max_length=content.get("seq_length", 2048),
            norm="deep" if deep else "pre",
            mlp="geglu",
            hidden_dim=content["ffn_hidden_size"],
            own_head=True,
        )

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of GLM, or of xTrimoPGLM's released code, under our names.

        GLM's transformer stands one level higher there, its tables together. In the other layout queries, keys and
        values of a head stand behind each other; rates of the rotation are computed.
        """
        ours = {}
        for key, value in state.items():
            name = key.removeprefix("transformer.").removeprefix("embedding.").removeprefix("encoder.")
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if ".self_attention." in name:
                name = name.replace(".self_attention.", ".attention.")
                if ".query_key_value." in name:
                    heads = value.unflatten(0, (self.config.num_heads, 3, -1))
                    value = heads.transpose(0, 1).flatten(0, 2)
            if name.split(".")[0] in ("position_embeddings", "block_position_embeddings"):
                name = f"positions.{name}"
            ours[name.replace("output_layer.", "head.")] = value
        return ours


def _layer(config: GLMConfig) -> Layer:
    attention = Attention(config.dim, config.num_heads)
    mlp = MLPS[config.mlp](config.dim, config.hidden_dim or 4 * config.dim)
    if config.norm == "deep":
        return DeepNormLayer(attention, mlp, config.dim, config.num_layers)
    return Layer(attention, mlp, config.dim)


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
def xtrimopglm_deep_tiny() -> GLMConfig:
    """As the released code has it, small: DeepNorm, GEGLU, a head of its own."""
    return GLMConfig(
        dim=64,
        num_layers=3,
        num_heads=4,
        vocab_size=128,
        norm="deep",
        mlp="geglu",
        hidden_dim=128,
        own_head=True,
    )


@preset
def xtrimopglm_1b() -> GLMConfig:
    """The size of the smallest published one."""
    return GLMConfig(
        dim=2048,
        num_layers=24,
        num_heads=32,
        vocab_size=128,
        max_length=2048,
        norm="deep",
        mlp="geglu",
        hidden_dim=5461,
        own_head=True,
    )
