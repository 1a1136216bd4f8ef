"""HMAR's settings, network and presets."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import Published, preset
from arcore.decoding import NextScaleOutput
from arcore.masks import IntervalMask
from arcore.nn import KVCache
from arcore.nn.adaln import modulate_once
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import ScaleTokenizer
from arcore.ops import token_logprobs
from arcore.zoo.next_scale.hmar.schedule import lognorm_weights, own_inputs
from arcore.zoo.next_scale.var import VAR, VARConfig


@check_kinds
@dataclass(frozen=True, kw_only=True)
class HMARConfig(VARConfig):
    """Settings of `HMAR`: those of VAR, and the second branch.

    Attributes:
        tail: last blocks, which the second branch has a copy of.
        refinement: whether there is a second branch; the first stage of training needs none.

    Raises:
        ValueError: as `VARConfig` does, or `tail` is not in [1, depth].
    """

    tail: int = 8
    refinement: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tail <= self.depth:
            raise ValueError(f"expected tail in [1, depth={self.depth}] but got {self.tail}")


@check_kinds
class HMAR(VAR):
    """The transformer. A `ScaleModel` (`arcore.nn.protocols`) whose cache holds nothing.

    Args:
        config: settings.

    Attributes:
        scale_weights: weight of a token of each scale in the first stage, see `lognorm_weights`.
    """

    config: HMARConfig

    def __init__(self, config: HMARConfig) -> None:
        super().__init__(config)
        self.mask = masks.next_scale_markov(config.patch_nums)
        self.scale_weights = tuple(
            weight / side**2
            for weight, side in zip(lognorm_weights(config.patch_nums), config.patch_nums, strict=True)
        )
        blocks, self.ns_head = list(self.blocks), self.head
        del self.blocks, self.head
        self.base_blocks = nn.ModuleList(blocks[: -config.tail])
        self.ns_blocks = nn.ModuleList(blocks[-config.tail :])
        if config.refinement:
            self.mask_blocks = copy.deepcopy(self.ns_blocks)
            self.mask_head = copy.deepcopy(self.ns_head)
            self.mask_embed = nn.Parameter(torch.zeros(1, config.embed_dim))

    def make_cache(self, batch: int, scales: int | None = None) -> KVCache:
        """A cache without room: no scale reads another."""
        return KVCache(num_layers=1, batch=batch, num_heads=0, max_length=0, head_dim=0)

    def prefill(self, inputs: Tensor, labels: Tensor, cache: KVCache) -> Tensor:
        """Logits of the last scale that inputs hold, from its own inputs; arguments and result are those of VAR.

        Raises:
            TypeError, ValueError: as `forward` does, or no scale ends there.
        """
        length = self.scale_starts[1] + (inputs.shape[1] if inputs.dim() == 3 else -1)
        if length not in self.scale_starts[2:]:
            raise ValueError(
                f"expected inputs for whole scales, {self.scale_starts[2:]} tokens with the first, but got inputs of "
                f"shape {tuple(inputs.shape)}"
            )
        k = self.scale_starts.index(length) - 1
        return self.scale_logits(k, inputs[:, -(self.patch_nums[k] ** 2) :], labels, cache)

    def scale_logits(self, k: int, inputs: Tensor | None, labels: Tensor, cache: KVCache) -> Tensor:
        """Logits of scale k alone; arguments and result are those of `ScaleModel`, in any order of scales.

        Raises:
            TypeError, ValueError: as `forward` does, or there is no such scale.
        """
        if not 0 <= k < len(self.patch_nums) or (inputs is None) != (k == 0):
            raise ValueError(
                f"expected a scale from 0 to {len(self.patch_nums) - 1}, with inputs for every one but the first, but "
                f"got scale {k} with {'no' if inputs is None else 'some'} inputs"
            )
        cond = self.class_embed(labels)
        if inputs is None:
            x = cond.unsqueeze(1) + self.pos_start
        else:
            self._check_inputs(inputs, self.patch_nums[k] ** 2, len(labels))
            x = self.word_embed(inputs)
        return self._transform(x + self._places(k), cond, _whole(x), cache)

    def _transform(self, x: Tensor, cond: Tensor, mask: IntervalMask, cache: KVCache | None = None) -> Tensor:
        blocks: list[Any] = [*self.base_blocks, *self.ns_blocks]
        vectors: list[Any] = [cond] * len(blocks)
        if cache is not None:
            # Nothing is read from it or written into it but this.
            vectors = modulate_once(cond, cache, lambda cond: [block.modulation(cond) for block in blocks])
        for block, own in zip(blocks, vectors, strict=True):
            x = block(x, own, mask)
        out: Tensor = self.ns_head(x, cond)
        return out

    def _places(self, k: int) -> Tensor:
        start, stop = self.scale_starts[k : k + 2]
        return self.level_embed.weight[k] + self.pos_embed[:, start:stop]

    def refine_logits(self, k: int, inputs: Tensor, codes: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """Logits of scale k given the tokens that are not masked (section 3.3).

        Args:
            k: scale, from 1.
            inputs: `[B, n_k, z]`, as for `scale_logits`.
            codes: `[B, n_k, z]`, what the tokens of this scale alone add, shrunk to its size; see `own_inputs`.
            masked: bool `[B, n_k]`; tokens that are not read.
            labels: int64 `[B]`.

        Returns:
            float32 `[B, n_k, V]`; those at masked places are of use.

        Raises:
            ValueError: the model has no second branch, there is no such scale, or shapes do not fit.
        """
        if not 1 <= k < len(self.patch_nums):
            raise ValueError(f"expected a scale from 1 to {len(self.patch_nums) - 1} but got {k}")
        self._check_inputs(inputs, self.patch_nums[k] ** 2, len(labels))
        return self._refine(inputs, codes, masked, labels, self._places(k), _whole(inputs))

    def _refine(
        self,
        inputs: Tensor,
        codes: Tensor,
        masked: Tensor,
        labels: Tensor,
        places: Tensor,
        mask: IntervalMask,
    ) -> Tensor:
        if not self.config.refinement:
            raise ValueError(
                "expected a model with a second branch but this one has refinement=False; make one with "
                "arcore.zoo.next_scale.hmar.refine.with_refinement(model)"
            )
        if codes.shape != inputs.shape or masked.shape != inputs.shape[:2] or masked.dtype != torch.bool:
            raise ValueError(
                f"expected codes of shape {tuple(inputs.shape)} and bool masked of shape {tuple(inputs.shape[:2])} "
                f"but got {tuple(codes.shape)} and {masked.dtype} {tuple(masked.shape)}"
            )
        cond = self.class_embed(labels)
        known = F.linear(codes, self.word_embed.weight)  # the bias is in the other term
        x = self.word_embed(inputs) + torch.where(
            masked.unsqueeze(-1), self.mask_embed.to(known.dtype), known
        )
        x = x + places
        for block in itertools.chain(self.base_blocks, self.mask_blocks):
            x = block(x, cond, mask)
        out: Tensor = self.mask_head(x, cond)
        return out

    def second_stage(self) -> HMAR:
        """This model with a second branch, if it has none yet."""
        from arcore.zoo.next_scale.hmar.refine import with_refinement

        return self if self.config.refinement else with_refinement(self)

    def draw_again(self, tokenizer: ScaleTokenizer, labels: Tensor, **settings: Any) -> NextScaleOutput:
        """`generate_refined`, for the command line."""
        from arcore.zoo.next_scale.hmar.refine import generate_refined

        return generate_refined(self, tokenizer, labels, **settings)

    def refinement_parameters(self) -> list[nn.Parameter]:
        """What the second stage trains; all else is frozen."""
        return [value for name, value in self.named_parameters() if name.startswith("mask_")]

    def refinement_loss(self, tokenizer: ScaleTokenizer, indices: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Objective of the second stage: cross entropy of masked tokens, given the others of their scale.

        A share p of U(0, 1) of the tokens of each scale but the first is masked, ceil(p n_k), at the same places in all
        rows of the batch.

        Args:
            tokenizer: of the codes.
            indices: codes of each scale, int64 `[B, n_k]`.
            labels: int64 `[B]`.

        Returns:
            Scalar, float32, in nats per masked token.
        """
        dtype = self.word_embed.weight.dtype
        share = torch.rand((), device=labels.device).clamp(min=1e-6)
        hidden = []
        for side in self.patch_nums[1:]:
            order = torch.rand(side * side, device=labels.device).argsort().argsort()
            hidden.append(order < (share * side * side).ceil())
        masked = torch.cat(hidden).expand(len(labels), -1)
        with torch.no_grad():
            inputs = tokenizer.scale_inputs(indices).to(dtype)
            codes = torch.cat(
                [own_inputs(tokenizer, k, indices[k]) for k in range(1, len(self.patch_nums))], dim=1
            )
        first = self.scale_starts[1]
        places = (self.level_embed() + self.pos_embed)[:, first:]
        mask = masks.next_scale_markov(self.patch_nums[1:]).to(inputs.device)
        logits = self._refine(inputs, codes.to(dtype), masked, labels, places, mask)
        logp, _, _ = token_logprobs(logits, torch.cat(list(indices[1:]), dim=1))
        return -(logp * masked).sum() / masked.sum()

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint, or of one of VAR's layout, under our names.

        A checkpoint of VAR's layout (`blocks.0...`) is that of the first stage: its last `tail` blocks and its head
        become both branches, as the second stage begins.

        Raises:
            ValueError: as VAR's.
        """
        state = dict(state)
        bias = state.pop("attn_bias_for_masking", None)
        allowed = (self.mask, masks.next_scale(self.patch_nums))
        if bias is not None and not any(
            torch.equal(bias.flatten(0, -3)[0] == 0, m.to_bool()[0, 0]) for m in allowed
        ):
            raise ValueError("they are for another mask than masks.next_scale_markov or masks.next_scale")
        ours: dict[str, Tensor] = {}
        cut = self.config.depth - self.config.tail
        for name, value in super().from_official(state).items():
            for pattern, new in _OFFICIAL_NAMES:
                name = re.sub(pattern, new, name)
            layer = re.match(r"^blocks\.(\d+)\.(.*)", name)
            if layer and int(layer[1]) < cut:
                ours[f"base_blocks.{layer[1]}.{layer[2]}"] = value
            elif layer or name.startswith("head."):
                rest = f"blocks.{int(layer[1]) - cut}.{layer[2]}" if layer else name
                ours[f"ns_{rest}"] = value
                if self.config.refinement:
                    ours[f"mask_{rest}"] = value.clone()
            else:
                ours[name] = value
        if self.config.refinement and any(name.startswith("blocks.") for name in state):
            fresh = self.mask_embed.detach()
            ours["mask_embed"] = torch.zeros(fresh.shape) if fresh.is_meta else fresh.clone()
        return ours


_OFFICIAL_NAMES = (
    (r"^word_embed_bias$", "word_embed.bias"),
    (r"^mask_embed\.weight$", "mask_embed"),
    (r"^(ns|mask)_head_nm\.", r"\1_head."),
    (r"^(ns|mask)_head\.(weight|bias)$", r"\1_head.linear.\2"),
)


def _whole(x: Tensor) -> IntervalMask:
    return masks.full(x.shape[1], x.shape[1]).to(x.device)


@preset(tokenizer="msvq_tiny")
def hmar_tiny() -> HMARConfig:
    """8x8 digits in 4 scales, 30 tokens; the first stage, which trains on a CPU in minutes."""
    return HMARConfig(
        depth=4,
        embed_dim=96,
        num_heads=3,
        num_classes=10,
        vocab_size=128,
        z_channels=16,
        patch_nums=(1, 2, 3, 4),
        gate_init=1e-3,
        tail=2,
        refinement=False,
    )


def _published(depth: int) -> HMARConfig:
    return HMARConfig(depth=depth, embed_dim=64 * depth, num_heads=depth, drop_path=0.1 * depth / 24)


@preset(tokenizer="msvq_ch160", weights=Published("nvidia/HMAR", "hmar-d16.pth"))
def hmar_d16() -> HMARConfig:
    """ImageNet, 256 pixels, depth 16; weights: hmar-d16.pth."""
    return _published(16)


@preset(tokenizer="msvq_ch160", weights=Published("nvidia/HMAR", "hmar-d20.pth"))
def hmar_d20() -> HMARConfig:
    """ImageNet, 256 pixels, depth 20; weights: hmar-d20.pth."""
    return _published(20)


@preset(tokenizer="msvq_ch160", weights=Published("nvidia/HMAR", "hmar-d24.pth"))
def hmar_d24() -> HMARConfig:
    """ImageNet, 256 pixels, depth 24; weights: hmar-d24.pth."""
    return _published(24)


@preset(tokenizer="msvq_ch160", weights=Published("nvidia/HMAR", "hmar-d30.pth"))
def hmar_d30() -> HMARConfig:
    """ImageNet, 256 pixels, depth 30; weights: hmar-d30.pth."""
    return _published(30)
