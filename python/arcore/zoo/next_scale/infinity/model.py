"""Infinity: the network and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import masks
from arcore.masks import IntervalMask
from arcore.nn import AdaLNHead, KVCache, RMSNorm, SharedModulation
from arcore.nn.adaln import EPS
from arcore.nn.cache import storage_dtype
from arcore.nn.checks import check_floating
from arcore.nn.kinds import check_kinds
from arcore.zoo.next_scale.infinity.config import LEVELS, InfinityConfig
from arcore.zoo.next_scale.infinity.layers import Angles, CrossAttention, InfinityBlock, Told, grid_angles
from arcore.zoo.next_scale.infinity.published import OFFICIAL_NAMES, our_names
from arcore.zoo.next_scale.infinity.text import Text
from arcore.zoo.tokenizers.multi_scale_bsq.config import SCALES_1024


@check_kinds
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
        _null_rows(self.null_text)
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

    def shard_units(self) -> tuple[nn.Module, ...]:
        """No blocks by themselves: keys of the text are made by parts of them outside of the blocks' calls."""
        return ()

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
            dtype=storage_dtype(self.pos_start),
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
        ours = our_names(state, self._official_names())
        for name in self._tables():
            wanted = getattr(self, name)
            if name in ours and ours[name].shape[1:] == wanted.shape[1:]:
                given = ours[name][: len(wanted)]
                rest = wanted.detach()[len(given) :]
                if rest.is_meta and not given.is_meta:
                    rest = _null_rows(torch.empty(rest.shape, dtype=rest.dtype))
                ours[name] = torch.cat([given, rest.to(given)])
        return ours

    def _tables(self) -> tuple[str, ...]:
        """Tables whose length is a setting, and of which a file may hold more or fewer rows."""
        return ("null_text",)

    def _official_names(self) -> tuple[tuple[str, str], ...]:
        return OFFICIAL_NAMES


def _null_rows(table: Tensor) -> Tensor:
    """Give a table of vectors of the null text its random values."""
    return nn.init.trunc_normal_(table, std=1.2).div_(math.sqrt(table.shape[1]))


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
