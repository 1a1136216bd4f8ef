"""VAR: visual autoregressive modelling by next-scale prediction (Tian et al., arXiv:2404.02905).

An image is a sequence of token maps, coarse to fine (`arcore.tokenizers.MultiScaleVQ`). A transformer predicts all
tokens of a scale at once from the coarser scales, so ten passes make a 256-pixel image. Training takes all scales
in one pass under `masks.next_scale`; in generation each scale sees all of the cache and needs no mask.

What enters for scale k is not the previous scale's tokens but their reconstruction: f_hat of scales < k, shrunk to
p_k x p_k. The first scale enters as the class embedding, which also modulates every layer norm.

Legend: B rows, K scales, p_k side of scale k, L = sum of p_k^2 tokens, C width, z code width, V codes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, at_least, at_most, shaken
from arcore.masks import IntervalMask
from arcore.nn import (
    MLP,
    AdaLNBlock,
    AdaLNHead,
    ClassEmbedding,
    KVCache,
    LevelEmbedding,
    SelfAttention,
    SharedModulation,
)
from arcore.nn.adaln import modulate_once
from arcore.nn.cache import storage_dtype
from arcore.nn.checks import check_floating, check_patch_nums
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="var",
    title="VAR",
    paper="arXiv:2404.02905",
    paper_title="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction",
    topic="next_scale",
    kind="model",
    model="VAR",
    builds_on=("msvq",),
    ops=("block_sparse_attention",),
    recipe="next_scale",
    summary="Class-conditional image generator that predicts token maps scale by scale.",
    claim="One masked pass over all scales gives the logits of scale-by-scale generation from a cache.",
    checked_on="published layout, random weights",
)


PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Settings of `VAR`. The defaults are those of the published 256-pixel models.

    Attributes:
        depth: transformer blocks.
        embed_dim: width C.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network over C.
        num_classes: classes of the data.
        vocab_size: codes V of the tokenizer.
        z_channels: width z of a code.
        patch_nums: side length of each scale, coarse to fine, as the tokenizer has them.
        attn_l2_norm: cosine attention with a learned temperature per head; without it logits are scaled by
            0.25 / sqrt(head_dim).
        class_drop: share of rows that are trained without their class, for guidance.
        drop_path: stochastic depth of the last block; earlier blocks have proportionally less.
        gate_init: standard deviation of the initial gates, relative to other weights.
        shared_adaln: all blocks share the linear layer of the modulation and add a table each, as the 512-pixel model.

    Raises:
        ValueError: a size is below 1, or `patch_nums` are no growing side lengths.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    vocab_size: int = 4096
    z_channels: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    attn_l2_norm: bool = True
    class_drop: float = 0.1
    drop_path: float = 0.0
    gate_init: float = 1e-5
    shared_adaln: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads", "num_classes", "vocab_size", "z_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))


@check_kinds
class VAR(nn.Module):
    """The transformer. A `ScaleModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    official_entry = "trainer.var_wo_ddp"

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_nums = config.patch_nums
        self.vocab_size = config.vocab_size
        self.null_class = config.num_classes
        dim, sizes = config.embed_dim, [side * side for side in config.patch_nums]
        self.scale_starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
        self.mask = masks.next_scale(config.patch_nums)
        self.class_embed = ClassEmbedding(config.num_classes, dim, drop=config.class_drop)
        self.word_embed = nn.Linear(config.z_channels, dim)
        self.pos_start = nn.Parameter(torch.empty(1, sizes[0], dim))
        self.pos_embed = nn.Parameter(torch.empty(1, sum(sizes), dim))
        self.level_embed = LevelEmbedding(sizes, dim)
        scale = 0.25 / math.sqrt(dim / config.num_heads)
        self.modulation = SharedModulation(dim, dim, parts=6) if config.shared_adaln else nn.Identity()
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                dim,
                dim,
                attn=SelfAttention(dim, config.num_heads, l2_norm=config.attn_l2_norm, scale=scale),
                ffn=MLP(dim, round(dim * config.mlp_ratio)),
                drop_path=config.drop_path * layer / max(config.depth - 1, 1),
                shared=config.shared_adaln,
            )
            for layer in range(config.depth)
        )
        self.head = AdaLNHead(dim, dim, config.vocab_size)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        config = self.config
        std = math.sqrt(1 / (3 * config.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    module.bias.zero_()
        for table in (self.class_embed.weight, self.level_embed.weight, self.pos_start, self.pos_embed):
            nn.init.trunc_normal_(table, std=std)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                weight.div_(math.sqrt(2 * config.depth))
            elif name.endswith("modulation.linear.weight"):
                gates, rest = weight.split([2 * config.embed_dim, 4 * config.embed_dim])
                gates.mul_(config.gate_init)
                rest.mul_(0.5)
            elif name.endswith("modulation.table"):
                gates, rest = weight.split([2, 4], dim=2)
                gates.mul_(config.gate_init)
                rest.mul_(0.5)
        self.head.modulation.linear.weight.mul_(0.5)
        self.head.linear.weight.mul_(0.02)

    @check_kinds
    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits of all scales in one pass, each scale given the true coarser ones.

        Args:
            inputs: `[B, L - p_0^2, z]`, from the tokenizer's `scale_inputs`.
            labels: int64 `[B]` in [0, num_classes]; num_classes is the null class.

        Returns:
            float32 `[B, L, V]`: the logits of the tokens at the same place.

        Raises:
            TypeError: inputs or labels have a wrong dtype.
            ValueError: shapes do not fit `patch_nums`, or a label is out of range.
        """
        self._check_inputs(inputs, self.scale_starts[-1] - self.scale_starts[1], len(labels))
        cond = self.class_embed(labels)
        x = torch.cat([cond.unsqueeze(1) + self.pos_start, self.word_embed(inputs)], dim=1)  # [B, L, C]
        return self._transform(x + self.level_embed() + self.pos_embed, cond, self.mask.to(x.device))

    def make_cache(self, batch: int, scales: int | None = None) -> KVCache:
        """An empty cache for `batch` rows, in the dtype and on the device of the model; for the first `scales` only."""
        return KVCache(
            num_layers=self.config.depth,
            batch=batch,
            num_heads=self.config.num_heads,
            max_length=self.scale_starts[-1 if scales is None else scales],
            head_dim=self.config.embed_dim // self.config.num_heads,
            dtype=storage_dtype(self.pos_embed),
            device=self.pos_embed.device,
        )

    def scale_logits(self, k: int, inputs: Tensor | None, labels: Tensor, cache: KVCache) -> Tensor:
        """Logits of scale k from the coarser scales in the cache; arguments and result are those of `ScaleModel`.

        Raises:
            TypeError, ValueError: as `forward` does, or the scale is not the next one.
        """
        if not 0 <= k < len(self.patch_nums) or cache.length != self.scale_starts[k]:
            raise ValueError(
                f"expected the scales 0 to {len(self.patch_nums) - 1} in order, but got scale {k} while the cache "
                f"holds {cache.length} tokens (scales start at {self.scale_starts[:-1]})"
            )
        if (inputs is None) != (k == 0):
            got = "None" if inputs is None else "some"
            raise ValueError(f"expected inputs for every scale but the first; scale {k} got {got}")
        start, stop = self.scale_starts[k : k + 2]
        cond = self.class_embed(labels)
        if inputs is not None:
            self._check_inputs(inputs, stop - start, len(labels))
        x = cond.unsqueeze(1) + self.pos_start if inputs is None else self.word_embed(inputs)  # [B, p_k^2, C]
        x = x + self.level_embed.weight[k] + self.pos_embed[:, start:stop]
        return self._transform(x, cond, masks.full(stop - start, stop).to(x.device), cache)

    def prefill(self, inputs: Tensor, labels: Tensor, cache: KVCache) -> Tensor:
        """Logits of scale k >= 1 from an empty cache, to which all scales up to k are added in one pass.

        Args:
            inputs: `[B, n, z]`, what enters for the scales 1 to k, one behind the other.
            labels: int64 `[B]`.
            cache: from `make_cache(B)`, empty.

        Returns:
            float32 `[B, patch_nums[k]**2, V]`, of scale k alone.

        Raises:
            TypeError, ValueError: as `forward` does, the cache is not empty, or no scale ends there.
        """
        length = self.scale_starts[1] + (inputs.shape[1] if inputs.dim() == 3 else -1)
        if cache.length or length not in self.scale_starts[2:]:
            raise ValueError(
                f"expected an empty cache and inputs for whole scales, {self.scale_starts[2:]} tokens with the first, "
                f"but got {cache.length} tokens in the cache and inputs of shape {tuple(inputs.shape)}"
            )
        self._check_inputs(inputs, inputs.shape[1], len(labels))
        k = self.scale_starts.index(length) - 1
        cond = self.class_embed(labels)
        x = torch.cat([cond.unsqueeze(1) + self.pos_start, self.word_embed(inputs)], dim=1)
        x = x + (self.level_embed() + self.pos_embed)[:, :length]
        mask = masks.next_scale(self.patch_nums[: k + 1]).to(x.device)
        out: Tensor = self.head(self._hidden(x, cond, mask, cache)[:, self.scale_starts[k] :], cond)
        return out

    def _transform(self, x: Tensor, cond: Tensor, mask: IntervalMask, cache: KVCache | None = None) -> Tensor:
        out: Tensor = self.head(self._hidden(x, cond, mask, cache), cond)
        return out

    def _hidden(self, x: Tensor, cond: Tensor, mask: IntervalMask, cache: KVCache | None) -> Tensor:
        for layer, (block, vectors) in enumerate(zip(self.blocks, self._vectors(cond, cache), strict=True)):
            x = block(x, vectors, mask, cache, layer)
        return x

    def _vectors(self, cond: Tensor, cache: KVCache | None) -> list[Any]:
        """What modulates each block; without a cache the blocks make it themselves."""
        blocks: list[Any] = list(self.blocks)
        if cache is None:
            return [self.modulation(cond)] * len(blocks)
        return modulate_once(
            cond, cache, lambda cond: [block.modulation(self.modulation(cond)) for block in blocks]
        )

    def _check_inputs(self, inputs: Tensor, length: int, batch: int) -> None:
        expected = (batch, length, self.config.z_channels)
        if tuple(inputs.shape) != expected:
            raise ValueError(
                f"expected inputs of shape {expected}, for patch_nums={self.patch_nums} and "
                f"z_channels={self.config.z_channels}, but got {tuple(inputs.shape)}"
            )
        check_floating(
            "inputs", inputs, self.word_embed.weight, "make them with the tokenizer's scale_inputs"
        )

    @staticmethod
    def official_settings(args: Mapping[str, Any]) -> dict[str, Any]:
        """What the command line of the released trainer, stored beside the weights, says about the config."""
        settings: dict[str, Any] = {}
        if "depth" in args:
            # The released models have one head per layer.
            settings |= {"depth": args["depth"], "num_heads": args["depth"]}
        if args.get("patch_nums") or args.get("pn"):
            sides = args.get("patch_nums") or str(args["pn"]).replace("-", "_").split("_")
            settings["patch_nums"] = tuple(int(side) for side in sides)
        for theirs, ours in (("anorm", "attn_l2_norm"), ("saln", "shared_adaln")):
            if theirs in args:
                settings[ours] = bool(args[theirs])
        return settings

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names.

        Its buffers hold nothing learnt: the scale of each token, the L x L mask and a zero bias on keys. They must be
        what ours are and are dropped; no L x L buffer is kept.

        Raises:
            ValueError: they are not.
        """
        levels = [k for k, side in enumerate(self.patch_nums) for _ in range(side * side)]
        if "lvl_1L" in state and state["lvl_1L"].flatten().tolist() != levels:
            raise ValueError(f"they are for other scales than patch_nums={self.patch_nums}")
        bias = state.get("attn_bias_for_masking")
        if bias is not None and not torch.equal(bias == 0, self.mask.to_bool()):
            raise ValueError("they are for another mask than masks.next_scale")
        ours = {}
        for key, value in state.items():
            if key.endswith(".zero_k_bias"):
                if value.any():
                    raise ValueError(f"{key} is not zero, but the model has no bias on keys")
            elif key not in ("lvl_1L", "attn_bias_for_masking"):
                for pattern, name in _OFFICIAL_NAMES:
                    key = re.sub(pattern, name, key)
                ours[key] = value
        return ours


_OFFICIAL_NAMES = (
    (r"^pos_1LC$", "pos_embed"),
    (r"^class_emb\.", "class_embed."),
    (r"^lvl_embed\.", "level_embed."),
    (r"\.mat_qkv\.", ".qkv."),
    (r"\.scale_mul_1H11$", ".log_scale"),
    (r"^head\.(weight|bias)$", r"head.linear.\1"),
    (r"^head_nm\.ada_lin\.1\.", "head.modulation.linear."),
    (r"^shared_ada_lin\.1\.", "modulation.linear."),
    (r"\.ada_lin\.1\.", ".modulation.linear."),
    (r"\.ada_gss$", ".modulation.table"),
)


@preset(tokenizer="msvq_tiny")
def var_tiny() -> VARConfig:
    """8x8 digits in 4 scales, 30 tokens; trains on a CPU in minutes."""
    return VARConfig(
        depth=4,
        embed_dim=96,
        num_heads=3,
        num_classes=10,
        vocab_size=128,
        z_channels=16,
        patch_nums=(1, 2, 3, 4),
        gate_init=1e-3,
    )


@preset(tokenizer="msvq_mnist")
def var_mnist() -> VARConfig:
    """28x28 digits of MNIST in 6 scales, 104 tokens; trains on two CPU cores in minutes."""
    return VARConfig(
        depth=4,
        embed_dim=96,
        num_heads=3,
        num_classes=10,
        vocab_size=256,
        z_channels=16,
        patch_nums=(1, 2, 3, 4, 5, 7),
        gate_init=1e-3,
    )


@preset(tokenizer="msvq_mnist")
def var_mnist_small() -> VARConfig:
    """Half of var_mnist, on the same scales; the refiner of a pair that draws together (`code`)."""
    return VARConfig(
        depth=2,
        embed_dim=64,
        num_heads=2,
        num_classes=10,
        vocab_size=256,
        z_channels=16,
        patch_nums=(1, 2, 3, 4, 5, 7),
        gate_init=1e-3,
    )


def _published(depth: int, **more: Any) -> VARConfig:
    return VARConfig(depth=depth, embed_dim=64 * depth, num_heads=depth, drop_path=0.1 * depth / 24, **more)


@preset(tokenizer="msvq_ch160", weights=Published("FoundationVision/var", "var_d16.pth"))
def var_d16() -> VARConfig:
    """ImageNet, 256 pixels, depth 16; weights: var_d16.pth."""
    return _published(16)


@preset(tokenizer="msvq_ch160", weights=Published("FoundationVision/var", "var_d20.pth"))
def var_d20() -> VARConfig:
    """ImageNet, 256 pixels, depth 20; weights: var_d20.pth."""
    return _published(20)


@preset(tokenizer="msvq_ch160", weights=Published("FoundationVision/var", "var_d24.pth"))
def var_d24() -> VARConfig:
    """ImageNet, 256 pixels, depth 24; weights: var_d24.pth."""
    return _published(24)


@preset(tokenizer="msvq_ch160", weights=Published("FoundationVision/var", "var_d30.pth"))
def var_d30() -> VARConfig:
    """ImageNet, 256 pixels, depth 30; weights: var_d30.pth."""
    return _published(30)


@preset(tokenizer="msvq_ch160_512", weights=Published("FoundationVision/var", "var_d36.pth"))
def var_d36() -> VARConfig:
    """ImageNet, 512 pixels, depth 36; weights: var_d36.pth."""
    return _published(36, patch_nums=PATCH_NUMS_512, shared_adaln=True)


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """The logits of each scale from one masked pass, and from the cache; in full at the scales of 256 pixels too."""
    rows = []
    sizes = (
        [(1, 2, 3, 4, 6)]
        if quick
        else [(1, 2, 3, 4, 6), VARConfig(depth=1, embed_dim=1, num_heads=1).patch_nums]
    )
    for patch_nums in sizes:
        config = VARConfig(
            depth=4,
            embed_dim=64,
            num_heads=4,
            num_classes=5,
            vocab_size=24,
            z_channels=8,
            patch_nums=patch_nums,
        )
        model = shaken(VAR(config)).eval()
        starts = model.scale_starts
        inputs, labels = torch.randn(3, starts[-1] - 1, 8), torch.tensor([0, 4, 5])
        whole = model(inputs, labels)
        cache, errors = model.make_cache(3), []
        for k, (start, stop) in enumerate(itertools.pairwise(starts)):
            part = model.scale_logits(k, None if k == 0 else inputs[:, start - 1 : stop - 1], labels, cache)
            errors.append((part - whole[:, start:stop]).abs().max().item())
        rows.append(
            at_most(
                f"{len(patch_nums)} scales: one pass against steps, largest difference", max(errors), 1e-5
            )
        )
    # The comparison can fail: another mask changes the logits by more than the tolerance.
    model.mask = masks.next_scale_markov(model.patch_nums)
    rows.append(at_least("the same under another mask", (model(inputs, labels) - whole).abs().max(), 0.1))
    return Claim(tuple(rows))
