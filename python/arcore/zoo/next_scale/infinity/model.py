"""Infinity: settings, network, presets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import NOT_PUBLIC, Published, preset
from arcore.masks import IntervalMask
from arcore.nn import MLP, AdaLNHead, DropPath, KVCache, ModulationTable, RMSNorm, SharedModulation
from arcore.nn.adaln import EPS, modulated_norm
from arcore.nn.attention import SelfAttention, check_heads
from arcore.nn.checks import check_floating, check_patch_nums
from arcore.nn.kinds import check_kinds
from arcore.ops import block_sparse_attention
from arcore.zoo.next_scale.infinity.text import MOST_TOKENS, Text
from arcore.zoo.tokenizers.multi_scale_bsq.model import SCALES_256, SCALES_1024

# Rows of the table of scales, whatever the number of scales.
LEVELS = 15


@dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """Settings of `Infinity`.

    Attributes:
        depth: number of blocks.
        embed_dim: width C.
        num_heads: attention heads.
        mlp_dim: width of the hidden layers of the feed-forward networks.
        bits: d of the tokenizer's codes.
        patch_nums: side length of each scale, coarse to fine.
        grid: side of the grid on which rotary positions are counted: that of the finest scale a model was made for.
        text_dim: width c of a text's vectors.
        text_length: most tokens T of a text.
        pool_heads: heads of the attention that makes one vector of a text.
        text_drop: probability that a text becomes the null text while training, for guidance.
        drop_path: stochastic depth of the last block; earlier blocks have less.
        gate_init: factor on the initial weights of the residual gates.

    Raises:
        ValueError: the numbers do not fit together.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    bits: int = 32
    patch_nums: tuple[int, ...] = SCALES_1024
    grid: int = 64
    text_dim: int = 2048
    text_length: int = MOST_TOKENS
    pool_heads: int = 16
    text_drop: float = 0.1
    drop_path: float = 0.0
    gate_init: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads", "mlp_dim", "bits", "grid", "text_dim", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        for heads in (self.num_heads, self.pool_heads):
            check_heads("Infinity", self.embed_dim, heads)
        if self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"expected heads of a multiple of 4 channels, for rows and columns, but got {self.embed_dim} / "
                f"{self.num_heads}"
            )
        if len(self.patch_nums) > LEVELS or self.patch_nums[-1] > self.grid:
            raise ValueError(
                f"expected at most {LEVELS} scales of at most grid={self.grid} tokens per side but got "
                f"{self.patch_nums}"
            )

    @property
    def scale_sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def num_tokens(self) -> int:
        """Tokens L of all scales."""
        return sum(self.scale_sizes)


class Angles(NamedTuple):
    """Cosines and sines of N tokens, `[N, D / 2]`: pair i of a head's channels is 2i and 2i + 1."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Turn queries or keys `[..., N, D]`."""
        one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)


def grid_angles(patch_nums: tuple[int, ...], grid: int, head_dim: int) -> Angles:
    """Angles of the tokens of all scales: the first half of the pairs turns by the row, the second by the column.

    A token of scale k counts as standing at round(i grid / p_k) of the finest grid.
    """
    half = head_dim // 2
    rates = 10000.0 ** -(torch.arange(0, half, 2, device="cpu") / half)
    rows, columns = [], []
    for side in patch_nums:
        places = (torch.arange(side, device="cpu") * (grid / side)).round()
        rows.append(places.repeat_interleave(side))
        columns.append(places.repeat(side))
    angles = torch.cat([torch.cat(axis)[:, None] * rates for axis in (rows, columns)], 1)
    return Angles(angles.cos(), angles.sin())


class CrossAttention(nn.Module):
    """Attention to a text; keys have no bias.

    Args:
        dim: width C of queries and result.
        kv_dim: width of the text's vectors.
        num_heads: heads.
        pool: one learned query in place of given ones.
    """

    def __init__(self, dim: int, kv_dim: int, num_heads: int, *, pool: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, num_heads, dim // num_heads)) if pool else None
        self.q = None if pool else nn.Linear(dim, dim)
        self.kv = nn.Linear(kv_dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, T, D]` of a text `[B, T, kv_dim]`."""
        return keys_of(context, self.kv, self.v_bias, self.num_heads)

    def forward(self, x: Tensor | None, keys: tuple[Tensor, Tensor], mask: IntervalMask) -> Tensor:
        """Attend from x `[B, N, C]`, or from the learned query, under a mask of N queries and T keys."""
        if self.q is None:
            assert self.query is not None
            q = self.query.unsqueeze(2).expand(len(keys[0]), -1, -1, -1).to(keys[0].dtype)
        else:
            q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = block_sparse_attention(q, *keys, mask)
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


def keys_of(context: Tensor, linear: nn.Linear, v_bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys without and values with a bias, `[B, H, T, D]`."""
    kv = F.linear(context, linear.weight, torch.cat([torch.zeros_like(v_bias), v_bias]))
    k, v = kv.unflatten(2, (2, num_heads, -1)).transpose(1, 3).unbind(2)
    return k, v


class CosineAttention(SelfAttention):
    """Cosine attention whose queries and keys turn with the token's place."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, l2_norm=True)

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, D]` of tokens `[B, N, C]`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        assert self.log_scale is not None
        q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=self.MAX_LOG_SCALE).exp().to(q.dtype)
        return angles.turn(q), angles.turn(F.normalize(k, dim=-1)), v


class Told(NamedTuple):
    """What a batch of texts is to the blocks; computed once and used at every scale.

    Attributes:
        pooled: `[B, C]`.
        modulation: `[B, 1, 6, C]`, shared by the blocks.
        keys: of each block, keys and values of what cross-attention reads.
        lengths: int64 `[B]`, how many of them count.
        content: of each block, keys and values of a second attention of the image tokens, or None.
        front: a token `[B, 1, C]` before that of the first scale, or None.
    """

    pooled: Tensor
    modulation: Tensor
    keys: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    content: list[tuple[Tensor, Tensor]] | None = None
    front: Tensor | None = None

    def mask(self, queries: int) -> IntervalMask:
        """Each of `queries` rows may read the text up to its end."""
        stop = self.lengths.to(torch.int32).view(-1, 1, 1, 1).expand(-1, 1, queries, 1)
        return IntervalMask.trusted(
            torch.cat([torch.zeros_like(stop), stop], -1).contiguous(), self.keys[0][0].shape[2]
        )


class InfinityBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward network; the first and last are modulated and gated.

    Args:
        config: settings.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, config: InfinityConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.attn = CosineAttention(dim, config.num_heads)
        self.cross_norm = nn.LayerNorm(dim, eps=EPS)
        self.cross = CrossAttention(dim, dim, config.num_heads)
        self.ffn = MLP(dim, config.mlp_dim)
        self.modulation = ModulationTable(dim, parts=6)
        self.drop_path = DropPath(drop_path)

    def attend(
        self,
        x: Tensor,
        angles: Angles,
        mask: IntervalMask,
        cache: KVCache | None,
        layer: int,
        told: Told,
    ) -> Tensor:
        """Self-attention of modulated tokens `[B, N, C]`."""
        q, k, v = self.attn.project(x, angles)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = block_sparse_attention(q, k, v, mask, scale=1.0).transpose(1, 2).flatten(2)
        mixed: Tensor = self.attn.proj(self.joined(out, q, told, layer))
        return mixed

    def joined(self, out: Tensor, q: Tensor, told: Told, layer: int) -> Tensor:
        """What self-attention found, `[B, N, C]`, and what a model that reads more adds, given the queries."""
        return out

    def forward(
        self,
        x: Tensor,
        told: Told,
        angles: Angles,
        mask: IntervalMask,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(told.modulation)
        attended = self.attend(modulated_norm(x, scale1, shift1), angles, mask, cache, layer, told)
        x = x + self.drop_path(gate1 * attended)
        x = x + self.cross(self.cross_norm(x), told.keys[layer], told.mask(x.shape[1]))
        out: Tensor = x + self.drop_path(gate2 * self.ffn(modulated_norm(x, scale2, shift2)))
        return out


class Infinity(nn.Module):
    """The transformer.

    Args:
        config: settings.
    """

    # A full checkpoint of the trainer has these entries before its table.
    official_entry = "trainer.gpt_fsdp"

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_nums, self.bits = config.patch_nums, config.bits
        dim = config.embed_dim
        self.null_text = nn.Parameter(torch.empty(config.text_length, config.text_dim))
        self.text_norm = RMSNorm(config.text_dim, eps=EPS)
        self.text_pool = CrossAttention(dim, config.text_dim, config.pool_heads, pool=True)
        self.text_proj = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.pos_start = nn.Parameter(torch.empty(1, 1, dim))
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.word_embed = nn.Linear(config.bits, dim)
        self.modulation = SharedModulation(dim, dim, parts=6)
        rates = [config.drop_path * layer / max(config.depth - 1, 1) for layer in range(config.depth)]
        self.blocks = nn.ModuleList(self._block(layer, rate) for layer, rate in enumerate(rates))
        self.head = AdaLNHead(dim, dim, 2 * config.bits)
        self.angles = grid_angles(config.patch_nums, config.grid, dim // config.num_heads)
        sizes = config.scale_sizes
        self.scale_starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
        # Without and with a token in front.
        self.attention_masks = [masks.block_causal([sizes[0] + front, *sizes[1:]]) for front in (0, 1)]
        self._init_weights()

    def _block(self, layer: int, rate: float) -> nn.Module:
        return InfinityBlock(self.config, rate)

    @torch.no_grad()
    def _init_weights(self) -> None:
        config = self.config
        std = math.sqrt(1 / (3 * config.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    module.bias.zero_()
        for table in (self.level_embed.weight, self.pos_start, self.text_pool.query):
            assert table is not None
            nn.init.trunc_normal_(table, std=std)
        nn.init.trunc_normal_(self.null_text, std=1.2)
        self.null_text.div_(math.sqrt(config.text_dim))
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attn.proj.weight", "cross.proj.weight", "ffn.fc2.weight")):
                weight.div_(math.sqrt(2 * config.depth))
            elif name.endswith("modulation.table"):
                gates, rest = weight.split([2, 4], dim=2)
                gates.mul_(config.gate_init)
                rest.mul_(0.5)
        self.head.modulation.linear.weight.mul_(0.5)
        self.head.linear.weight.mul_(0.02)

    def null(self, lengths: Tensor) -> Text:
        """The null text in the lengths `[B]` of given ones, for guidance."""
        longest = int(lengths.max())
        return Text(self.null_text[:longest].unsqueeze(0).expand(len(lengths), -1, -1), lengths)

    def tell(self, text: Text, dropped: Tensor | None = None) -> Told:
        """What the blocks read of texts.

        Args:
            text: with at most `text_length` tokens.
            dropped: bool `[B]`, rows that are given the null text; None for none.

        Raises:
            ValueError: shapes do not fit.
        """
        pooled, context = self._read(text, dropped)
        keys = [block.cross.keys(context) for block in self._blocks()]
        return Told(pooled, self.modulation(pooled), keys, text.lengths)

    def _read(self, text: Text, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """One vector of each text `[B, C]`, and what cross-attention reads `[B, T, C]`."""
        vectors, lengths = text
        config = self.config
        if vectors.dim() != 3 or vectors.shape[2] != config.text_dim or lengths.shape != vectors.shape[:1]:
            raise ValueError(
                f"expected a text of vectors [B, T, {config.text_dim}] and lengths [B] but got "
                f"{tuple(vectors.shape)} and {tuple(lengths.shape)}"
            )
        if not 1 <= vectors.shape[1] <= config.text_length:
            raise ValueError(
                f"expected a text of 1 to {config.text_length} tokens but got {vectors.shape[1]}: shorten it"
            )
        if dropped is not None:
            vectors = torch.where(
                dropped[:, None, None], self.null_text[: vectors.shape[1]].to(vectors.dtype), vectors
            )
        vectors = self.text_norm(vectors)
        keys = self.text_pool.keys(vectors)
        mask = Told(vectors, vectors, [keys], lengths).mask(1)
        pooled: Tensor = self.text_pool(None, keys, mask).squeeze(1)
        context: Tensor = self.text_proj(vectors)
        return pooled, context

    @check_kinds
    def forward(self, inputs: Tensor, text: Text, dropped: Tensor | None = None) -> Tensor:
        """Logits of all bits of all scales in one pass, each scale given the coarser ones.

        Args:
            inputs: `[B, L - 1, d]`, from the tokenizer's `scale_inputs` or `corrected`.
            text: of each row.
            dropped: rows that are given the null text; None drops with `text_drop` while training.

        Returns:
            float32 `[B, L, d, 2]`: of each bit, the logits of 0 and of 1.

        Raises:
            TypeError, ValueError: inputs or text do not fit.
        """
        told = self.tell(text, self._dropped(len(inputs), inputs.device) if dropped is None else dropped)
        return self._whole(inputs, told)

    def _whole(self, inputs: Tensor, told: Told) -> Tensor:
        """All scales in one pass."""
        self._check_inputs(inputs, self.config.num_tokens - 1, len(told.pooled))
        x = torch.cat([self._start(told), self.word_embed(inputs)], 1)
        front = x.shape[1] - self.config.num_tokens
        sizes = [size + front * (k == 0) for k, size in enumerate(self.config.scale_sizes)]
        levels = torch.tensor([k for k, size in enumerate(sizes) for _ in range(size)], device=x.device)
        mask = self.attention_masks[front].to(x.device)
        x = self._hidden(
            x + self.level_embed(levels), told, self._angles(0, x.shape[1], front, x), mask, None
        )
        return self._logits(x[:, front:], told)

    def _dropped(self, batch: int, device: torch.device) -> Tensor | None:
        if not self.training or not self.config.text_drop:
            return None
        return torch.rand(batch, device=device) < self.config.text_drop

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows, in the dtype and on the device of the model."""
        return KVCache(
            num_layers=self.config.depth,
            batch=batch,
            num_heads=self.config.num_heads,
            max_length=self.scale_starts[-1] + 1,
            head_dim=self.config.embed_dim // self.config.num_heads,
            dtype=self.pos_start.dtype,
            device=self.pos_start.device,
        )

    def scale_logits(
        self,
        k: int,
        inputs: Tensor | None,
        told: Told,
        cache: KVCache,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits of scale k from the coarser scales in the cache, to which scale k is added.

        Args:
            k: scale, from 0; called in order.
            inputs: `[B, p_k^2, d]`, from the tokenizer's `next_input`; None for k = 0.
            told: from `tell`.
            cache: from `make_cache(B)`.
            between: receives a block's number and what leaves it, and returns what goes on.

        Returns:
            float32 `[B, p_k^2, d, 2]`.

        Raises:
            ValueError: the scale is not the next one, or shapes do not fit.
        """
        front = 0 if told.front is None else 1
        starts = [0, *(start + front for start in self.scale_starts[1:])]
        if not 0 <= k < len(self.patch_nums) or cache.length != starts[k]:
            raise ValueError(
                f"expected the scales 0 to {len(self.patch_nums) - 1} in order, but got scale {k} while the cache "
                f"holds {cache.length} tokens (scales start at {starts[:-1]})"
            )
        if (inputs is None) != (k == 0):
            got = "None" if inputs is None else "some"
            raise ValueError(f"expected inputs for every scale but the first; scale {k} got {got}")
        start, stop = starts[k : k + 2]
        if inputs is None:
            x = self._start(told)
        else:
            self._check_inputs(inputs, stop - start, len(told.pooled))
            x = self.word_embed(inputs)
        x = x + self.level_embed.weight[k]
        mask = masks.full(stop - start, stop).to(x.device)
        x = self._hidden(x, told, self._angles(start, stop, front, x), mask, cache, between)
        return self._logits(x[:, front:] if k == 0 else x, told)

    def _start(self, told: Told) -> Tensor:
        x = told.pooled.unsqueeze(1) + self.pos_start
        return x if told.front is None else torch.cat([told.front, x], 1)

    def _angles(self, start: int, stop: int, front: int, x: Tensor) -> Angles:
        """Of the tokens from start to stop; one in front stands where the first scale's does."""
        places = [part if not front else torch.cat([part[:1], part]) for part in self.angles]
        return Angles(*(part[start:stop].to(x.device) for part in places))

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    def _hidden(
        self,
        x: Tensor,
        told: Told,
        angles: Angles,
        mask: IntervalMask,
        cache: KVCache | None,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        for layer, block in enumerate(self._blocks()):
            x = block(x, told, angles, mask, cache, layer)
            if between is not None:
                x = between(layer, x)
        return x

    def _logits(self, x: Tensor, told: Told) -> Tensor:
        out: Tensor = self.head(x, told.pooled)
        return out.unflatten(-1, (self.bits, 2))

    def _check_inputs(self, inputs: Tensor, length: int, batch: int) -> None:
        expected = (batch, length, self.bits)
        if tuple(inputs.shape) != expected:
            raise ValueError(
                f"expected inputs of shape {expected}, for patch_nums={self.patch_nums} and bits={self.bits}, but got "
                f"{tuple(inputs.shape)}"
            )
        check_floating(
            "inputs", inputs, self.word_embed.weight, "make them with the tokenizer's scale_inputs"
        )

    @staticmethod
    def official_settings(args: Mapping[str, Any]) -> dict[str, Any]:
        """What the command line of the released trainer, stored beside the weights, says about the config."""
        sides = {"0.06M": 7, "0.25M": 10, "1M": 13}
        return {"patch_nums": SCALES_1024[: sides[args["pn"]]]} if args.get("pn") in sides else {}

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published file under our names. A shorter table for the null text is filled up with ours.

        Raises:
            ValueError: a bias on keys is not zero.
        """
        ours: dict[str, Tensor] = {}
        per_chunk = 1 + max(
            (
                int(found[1])
                for name in state
                if (found := re.match(r"^block_chunks\.\d+\.module\.(\d+)\.", name))
            ),
            default=0,
        )
        for key, value in state.items():
            if key.endswith("zero_k_bias"):
                if value.any():
                    raise ValueError(f"{key} is not zero, but the model has no bias on keys")
                continue
            name = re.sub(
                r"^block_chunks\.(\d+)\.module\.(\d+)\.",
                lambda found: f"blocks.{int(found[1]) * per_chunk + int(found[2])}.",
                key,
            )
            for pattern, new in self._official_names():
                name = re.sub(pattern, new, name)
            if value.dim() == 4 and name.endswith("log_scale"):
                value = value.reshape(1, -1, 1, 1)
            ours[name] = value
        for name in self._tables():
            wanted = getattr(self, name)
            if name in ours and ours[name].shape[1:] == wanted.shape[1:]:
                given = ours[name][: len(wanted)]
                ours[name] = torch.cat([given, wanted.detach()[len(given) :].to(given)])
        return ours

    def _tables(self) -> tuple[str, ...]:
        """Tables whose length is a setting, and of which a file may hold more or fewer rows."""
        return ("null_text",)

    def _official_names(self) -> tuple[tuple[str, str], ...]:
        return _OFFICIAL_NAMES


_OFFICIAL_NAMES = (
    (r"^cfg_uncond$", "null_text"),
    (r"^text_proj_for_sos\.ca\.mat_q$", "text_pool.query"),
    (r"^text_proj_for_sos\.ca\.", "text_pool."),
    (r"^text_proj_for_ca\.", "text_proj."),
    (r"^lvl_embed\.", "level_embed."),
    (r"^shared_ada_lin\.1\.", "modulation.linear."),
    (r"^head\.", "head.linear."),
    (r"^head_nm\.ada_lin\.1\.", "head.modulation.linear."),
    (r"^(blocks\.\d+)\.sa\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.ca\.", r"\1.cross."),
    (r"^(blocks\.\d+)\.ca_norm\.", r"\1.cross_norm."),
    (r"^(blocks\.\d+)\.ada_gss$", r"\1.modulation.table"),
    (r"\.attn\.mat_qkv\.", ".attn.qkv."),
    (r"\.attn\.scale_mul_1H11$", ".attn.log_scale"),
    (r"\.mat_q\.", ".q."),
    (r"\.mat_kv\.", ".kv."),
)


def bit_loss(logits: Tensor, bits: list[Tensor]) -> Tensor:
    """Mean cross entropy of bits; a scale's tokens weigh as one over its side, as in the released training.

    Args:
        logits: `[B, L, d, 2]`.
        bits: bool `[B, p_k^2, d]` per scale.
    """
    wanted = torch.cat(bits, 1).long()
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
    sizes = torch.tensor([part.shape[1] for part in bits], device=logits.device)
    weights = torch.repeat_interleave(sizes.float().rsqrt(), sizes, output_size=wanted.shape[1])
    return (loss.mean((0, 2)) * weights).sum() / weights.sum()


@preset(tokenizer="msbsq_tiny")
def infinity_tiny() -> InfinityConfig:
    """24x24 scenes of two digits in 5 scales of 8 bits, 66 tokens; trains on a CPU in minutes."""
    return InfinityConfig(
        depth=4,
        embed_dim=64,
        num_heads=4,
        mlp_dim=256,
        bits=8,
        patch_nums=(1, 2, 3, 4, 6),
        grid=6,
        text_dim=64,
        text_length=24,
        pool_heads=4,
        gate_init=0.1,
    )


def _sized(depth: int, dim: int, heads: int, **more: Any) -> InfinityConfig:
    # As the authors round: to multiples of 256, halves to the even one.
    return InfinityConfig(
        depth=depth,
        embed_dim=dim,
        num_heads=heads,
        mlp_dim=round(4 * dim / 256) * 256,
        **{"drop_path": 0.1, **more},
    )


@preset(tokenizer="msbsq_d16", weights=Published("FoundationVision/Infinity", "infinity_125M_256x256.pth"))
def infinity_125m() -> InfinityConfig:
    """12 blocks, 256 pixels; weights: infinity_125M_256x256.pth."""
    return _sized(12, 768, 8, bits=16, patch_nums=SCALES_256)


@preset(tokenizer="msbsq_d16", weights=NOT_PUBLIC)
def infinity_361m() -> InfinityConfig:
    """16 blocks, 256 pixels, of the paper's comparison of sizes."""
    return _sized(16, 1152, 12, bits=16, patch_nums=SCALES_256)


@preset(tokenizer="msbsq_d16", weights=NOT_PUBLIC)
def infinity_940m() -> InfinityConfig:
    """24 blocks, 256 pixels, of the paper's comparison of sizes."""
    return _sized(24, 1536, 16, bits=16, patch_nums=SCALES_256)


@preset(tokenizer="msbsq_d32", weights=Published("FoundationVision/Infinity", "infinity_2b_reg.pth"))
def infinity_2b() -> InfinityConfig:
    """32 blocks, 1024 pixels; weights: infinity_2b_reg.pth."""
    return _sized(32, 2048, 16)


@preset(tokenizer="msbsq_d14")
def infinity_8b() -> InfinityConfig:
    """40 blocks, 1024 pixels, 2 x 2 places a token; weights: the folder infinity_8b_weights."""
    return _sized(40, 3584, 28, bits=56)


@preset(tokenizer="msbsq_d32", weights=NOT_PUBLIC)
def infinity_20b() -> InfinityConfig:
    """58 blocks, 1024 pixels."""
    return _sized(58, 4608, 36, drop_path=0.25)
