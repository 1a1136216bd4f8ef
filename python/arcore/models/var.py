"""VAR: visual autoregressive modelling by next-scale prediction (arXiv:2404.02905).

An image is a pyramid of token maps, coarse to fine. The model predicts a whole map at once from all coarser ones:
inside a map tokens see each other, across maps attention is causal. Training runs over all maps in one pass under
`masks.next_scale`; generation feeds one map per step through a key-value cache and needs no mask.

Module and parameter names are those of the official checkpoints. Differences in storage: the official files also
hold the level index of each position, the dense attention bias (L x L) and a zero key bias; all three follow from
`patch_nums`, so they are dropped on loading. The shared-AdaLN variant (d36) is not built.

Shapes: B batch, L tokens of all scales, C width, H heads, D head_dim, V vocab_size, z channels of the tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from arcore import masks
from arcore._registry import preset, register
from arcore.nn import MLP, AdaLNHead, DropPath, KVCache, modulate
from arcore.ops import block_sparse_attention

MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of a VAR.

    Attributes:
        depth: transformer blocks.
        width: channels C.
        num_heads: attention heads H; must divide `width`.
        patch_nums: side of each token map, coarse to fine; must equal the tokenizer's.
        vocab_size: codes of the tokenizer V.
        z_channels: width of a code z.
        num_classes: classes of the condition.
        mlp_ratio: hidden width of the feed-forward layer over C.
        class_dropout: how often training replaces the class by "no class", for guidance.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        l2_norm_attention: normalise queries and keys and learn a factor per head (all released models do).
        adaln_gamma_init: initial scale of the AdaLN weights that gate the residual branches.
    """

    depth: int
    width: int
    num_heads: int
    patch_nums: tuple[int, ...]
    vocab_size: int
    z_channels: int
    num_classes: int
    mlp_ratio: float = 4.0
    class_dropout: float = 0.1
    drop_path: float = 0.0
    l2_norm_attention: bool = True
    adaln_gamma_init: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("depth", "width", "num_heads", "vocab_size", "z_channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"VARConfig: expected {name} >= 1 but got {getattr(self, name)}")
        if self.width % self.num_heads or (self.width // self.num_heads) % 8:
            raise ValueError(
                "VARConfig: expected width / num_heads to be a multiple of 8 but got "
                f"width={self.width} and num_heads={self.num_heads}"
            )
        sides = self.patch_nums
        if not sides or sides[0] < 1 or any(a >= b for a, b in zip(sides, sides[1:], strict=False)):
            raise ValueError(f"VARConfig: expected patch_nums to grow from >= 1 but got {sides}")


class Attention(nn.Module):
    """Self-attention with one projection for q, k, v and no bias on k."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.num_heads = config.width, config.num_heads
        self.l2_norm = config.l2_norm_attention
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.num_heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: masks.IntervalMask, cache: KVCache | None, layer: int) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.mat_qkv.weight, bias)  # [B, N, 3C]
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        scale = 0.25 / math.sqrt(q.shape[-1])
        if self.l2_norm:
            q = normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
            k = normalize(k, dim=-1)
            scale = 1.0
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast normalises in float32
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = block_sparse_attention(q, k, v, mask, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, gated and modulated by the condition."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.ffn = MLP(config.width, round(config.width * config.mlp_ratio))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, condition: Tensor, mask: masks.IntervalMask, cache: KVCache | None, layer: int
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + self.drop_path(gate1 * self.attn(modulate(x, scale1, shift1), mask, cache, layer))
        return x + self.drop_path(gate2 * self.ffn(modulate(x, scale2, shift2)))


@register(
    "var",
    title="VAR",
    paper="arXiv:2404.02905",
    family="next-scale",
    ops=("block_sparse_attention",),
    summary="Class-conditional image generation by next-scale prediction: one token map per step, coarse to fine.",
    claim="Generating scale by scale through a cache gives the logits of the masked one-pass model.",
    check="tests/models/test_var.py::test_cached_generation_equals_the_masked_pass",
)
class VAR(nn.Module):
    """The model of the paper's section 3.2; implements `arcore.nn.ScaleModel`."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_nums, self.vocab_size = config.patch_nums, config.vocab_size
        self.num_classes = config.num_classes
        self.mask = masks.next_scale(config.patch_nums)
        counts = [side * side for side in self.patch_nums]
        self.starts = [sum(counts[:k]) for k in range(len(counts) + 1)]

        width = config.width
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, counts[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(counts), width))
        self.lvl_embed = nn.Embedding(len(counts), width)
        last = max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.depth))
        self.head_nm = AdaLNHead(width)
        self.head = nn.Linear(width, config.vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: std sqrt(1 / 3C), residual outputs shrunk by sqrt(2 depth), gates near 0."""
        std = math.sqrt(1 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.trunc_normal_(self.pos_1LC, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_nm.ada_lin[1].weight.mul_(0.5)
            for block in self.blocks:
                block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
                block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))
                gates, rest = block.ada_lin[1].weight.split([2 * self.config.width, 4 * self.config.width])
                gates.mul_(self.config.adaln_gamma_init)
                rest.mul_(0.5)

    def _check_labels(self, labels: Tensor) -> None:
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(f"VAR: expected labels int64 [B] but got {labels.dtype} {tuple(labels.shape)}")
        if torch.compiler.is_compiling() or labels.numel() == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.num_classes:
            raise ValueError(
                f"VAR: expected labels in [0, {self.num_classes}] ({self.num_classes} means no class) "
                f"but got values from {low} to {high}"
            )

    def _embed(self, scale: int, inputs: Tensor | None, condition: Tensor) -> Tensor:
        """Token embeddings of one scale, ``[B, p², C]``."""
        first, stop = self.starts[scale], self.starts[scale + 1]
        if scale == 0:
            x = condition.unsqueeze(1) + self.pos_start
        else:
            expected = (condition.shape[0], stop - first, self.config.z_channels)
            if inputs is None or inputs.shape != expected:
                got = "None" if inputs is None else tuple(inputs.shape)
                raise ValueError(f"VAR: expected inputs of scale {scale} of shape {expected} but got {got}")
            x = self.word_embed(inputs)
        return x + self.lvl_embed.weight[scale] + self.pos_1LC[:, first:stop]

    def _logits(self, x: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.head_nm(x.float(), condition.float()))

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits of all scales at once, with the true coarser scales as input (training).

        Args:
            inputs: ``[B, L - p_0², z]``, the tokenizer's `scale_inputs`.
            labels: int64 ``[B]`` in [0, num_classes]; in training mode some are replaced by "no class".

        Returns:
            float32 ``[B, L, V]``.

        Raises:
            ValueError: shapes or labels do not fit.
        """
        self._check_labels(labels)
        batch, tokens = labels.shape[0], self.starts[-1] - self.starts[1]
        if inputs.shape != (batch, tokens, self.config.z_channels):
            raise ValueError(
                f"VAR: expected inputs of shape {(batch, tokens, self.config.z_channels)}, that is all scales of "
                f"patch_nums={self.patch_nums} but the first, but got {tuple(inputs.shape)}"
            )
        if self.training and self.config.class_dropout > 0:
            dropped = torch.rand(batch, device=labels.device) < self.config.class_dropout
            labels = torch.where(dropped, self.num_classes, labels)
        condition = self.class_emb(labels)  # [B, C]
        parts = list(inputs.split([b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False)], dim=1))
        x = torch.cat([self._embed(k, p, condition) for k, p in enumerate([None, *parts])], dim=1)
        mask = self.mask if self.mask.bounds.device == x.device else self.mask.to(x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, condition, mask, None, i)
        return self._logits(x, condition)

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows, in the model's dtype and on its device."""
        config, weight = self.config, self.head.weight
        head_dim = config.width // config.num_heads
        return KVCache(
            config.depth, batch, config.num_heads, self.starts[-1], head_dim, dtype=weight.dtype, device=weight.device
        )

    def scale_logits(self, scale: int, inputs: Tensor | None, labels: Tensor, cache: KVCache) -> Tensor:
        """See `arcore.nn.ScaleModel`."""
        if not 0 <= scale < len(self.patch_nums):
            raise ValueError(f"VAR: expected scale in [0, {len(self.patch_nums)}) but got {scale}")
        if cache.length != self.starts[scale]:
            raise ValueError(
                f"VAR: scale {scale} follows {self.starts[scale]} tokens but the cache holds {cache.length}"
            )
        self._check_labels(labels)
        condition = self.class_emb(labels)
        x = self._embed(scale, inputs, condition)
        mask = masks.full(x.shape[1], self.starts[scale + 1]).to(x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, condition, mask, cache, i)
        cache.advance(x.shape[1])
        return self._logits(x, condition)

    @staticmethod
    def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drops what official checkpoints store beside the weights."""
        derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
        return {key: value for key, value in state.items() if not key.endswith(derived)}


@preset("var")
def var_tiny() -> VARConfig:
    """8 x 8 digits on the codes of msvq_tiny."""
    return VARConfig(
        depth=4,
        width=128,
        num_heads=4,
        patch_nums=(1, 2, 3, 4),
        vocab_size=128,
        z_channels=16,
        num_classes=10,
        adaln_gamma_init=1e-1,
    )


def _imagenet(depth: int) -> VARConfig:
    return VARConfig(
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        vocab_size=4096,
        z_channels=32,
        num_classes=1000,
        drop_path=0.1 * depth / 24,
    )


@preset("var")
def var_d16() -> VARConfig:
    """ImageNet 256 x 256, 310 M parameters."""
    return _imagenet(16)


@preset("var")
def var_d20() -> VARConfig:
    """ImageNet 256 x 256, 600 M parameters."""
    return _imagenet(20)


@preset("var")
def var_d24() -> VARConfig:
    """ImageNet 256 x 256, 1.0 B parameters."""
    return _imagenet(24)


@preset("var")
def var_d30() -> VARConfig:
    """ImageNet 256 x 256, 2.0 B parameters."""
    return _imagenet(30)
