"""HMAR: next-scale prediction without a cache, and masked refinement inside a scale (arXiv:2506.04421).

VAR reads all coarser scales, though what it reads for a scale, the reconstruction so far, already holds what they say.
HMAR makes the scales a Markov chain: a token sees the tokens of its own scale only. The mask of training is
block-diagonal, generation is one independent pass per scale, and nothing is kept between them. A second branch, copied
from the last blocks and trained with all else frozen, draws the least certain tokens of a scale anew, given the others.

Legend: B rows, K scales, p_k side of scale k, n_k = p_k^2, L = sum of n_k tokens, C width, z code width, V codes.

From the command line: `arcore train hmar_tiny` is the first stage, with `--init-from` weights of VAR to convert;
`--refine RUN` is the second; `arcore sample RUN --edit PICTURE` edits without training, `--redraw` by both branches.
"""

from __future__ import annotations

import copy
import itertools
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken
from arcore.decoding import Kept, NextScaleOutput
from arcore.decoding._arguments import check_drawn, check_guidance, check_kind, check_labels, dtype_of
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import row_seeds
from arcore.masks import IntervalMask
from arcore.nn import KVCache
from arcore.nn.protocols import ScaleTokenizer
from arcore.ops import block_sparse_attention, sample, token_logprobs
from arcore.zoo.next_scale.var import VAR, VARConfig

SYSTEM = System(
    name="hmar",
    title="HMAR",
    paper="arXiv:2506.04421",
    topic="next_scale",
    kind="model",
    model="HMAR",
    builds_on=("var", "msvq"),
    ops=("block_sparse_attention", "sample", "token_logprobs"),
    recipe="next_scale",
    summary="Image generator whose scales see no coarser tokens, so it needs no cache; uncertain tokens are redrawn.",
    claim="One block-diagonal pass gives the logits of independent scales; the cache is empty.",
    checked_on="published layout, random weights",
)

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


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
        return self._transform(x + self._places(k), cond, _whole(x))

    def _transform(self, x: Tensor, cond: Tensor, mask: IntervalMask, cache: KVCache | None = None) -> Tensor:
        for block in itertools.chain(self.base_blocks, self.ns_blocks):
            x = block(x, cond, mask)
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
                "arcore.zoo.next_scale.hmar.with_refinement(model)"
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
        return self if self.config.refinement else with_refinement(self)

    def draw_again(self, tokenizer: ScaleTokenizer, labels: Tensor, **settings: Any) -> NextScaleOutput:
        """`generate_refined`, for the command line."""
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
            ours["mask_embed"] = self.mask_embed.detach().clone()
        return ours


_OFFICIAL_NAMES = (
    (r"^word_embed_bias$", "word_embed.bias"),
    (r"^mask_embed\.weight$", "mask_embed"),
    (r"^(ns|mask)_head_nm\.", r"\1_head."),
    (r"^(ns|mask)_head\.(weight|bias)$", r"\1_head.linear.\2"),
)


def _whole(x: Tensor) -> IntervalMask:
    return masks.full(x.shape[1], x.shape[1]).to(x.device)


def with_refinement(model: HMAR) -> HMAR:
    """A model of the first stage with a second branch: copies of its last blocks and head. The argument stays."""
    new = HMAR(HMARConfig(**{**vars(model.config), "refinement": True})).to(model.pos_embed)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("mask_")}
    for name in list(state):
        if name.startswith("ns_"):
            state["mask_" + name.removeprefix("ns_")] = state[name]
    new.load_state_dict(state | {"mask_embed": new.mask_embed.detach()})
    return new


def own_inputs(tokenizer: ScaleTokenizer, k: int, indices: Tensor) -> Tensor:
    """What the codes `[B, n_k]` of scale k >= 1 alone add to the latent, shrunk to its size, `[B, n_k, z]`."""
    return tokenizer.next_input(k - 1, tokenizer.add_scale(k, indices, tokenizer.empty_latent(len(indices))))


def lognorm_weights(patch_nums: Sequence[int]) -> list[float]:
    """Weights of the scales in the first stage (section 3.2); they sum to 1.

    The sides, finest first, are standardised (with n - 1), and a scale's weight is the normal density there.
    """
    sides = [side / patch_nums[-1] for side in reversed(patch_nums)]
    if len(sides) < 2:
        return [1.0]
    law = statistics.NormalDist(statistics.mean(sides), statistics.stdev(sides))
    density = [law.pdf(side) for side in sides]
    return [value / sum(density) for value in density]


def published_schedule(patch_nums: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """How many tokens each pass over a scale settles; the published rows, and one pass for other scales above 3 x 3."""
    rows: dict[int, tuple[int, ...]] = {2: (1, 3), 3: (1, 1, 2, 5)}
    if tuple(patch_nums) == SIDES_512:
        rows[4] = (5, 11)
    return tuple(rows.get(side, (side * side,)) for side in patch_nums)


@torch.no_grad()
def generate_refined(
    model: HMAR,
    tokenizer: ScaleTokenizer,
    labels: Tensor,
    *,
    schedule: Sequence[Sequence[int]] | None = None,
    cfg_scale: float = 1.7,
    top_k: int | None = 1000,
    top_p: float | None = 0.99,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    kept: Kept | None = None,
) -> NextScaleOutput:
    """Draw images scale by scale; in each, draw the least certain tokens anew, given the others (section 3.3).

    All tokens of a scale are drawn at once as VAR's are. Of a row (a_0, a_1, ...) of the schedule, the a_0 likeliest
    stay; the others are masked and drawn anew by the second branch, without guidance; the a_1 likeliest of these stay,
    and so on. A token's likelihood is that under the law that it was drawn from.

    Args:
        model: with a second branch, unless the schedule asks for one pass per scale.
        tokenizer: the tokenizer that the model was trained with.
        labels: int64 `[B]`.
        schedule: a row per scale, which sums to its tokens; `published_schedule` by default.
        cfg_scale, top_k, top_p, temperature, seed, kept: as for `arcore.decoding.generate_next_scale`, which a schedule
            of one pass per scale agrees with. What is kept is never drawn anew.

    Returns:
        Images and codes; no previews.

    Raises:
        ValueError: a row of the schedule does not fit, or as `generate_next_scale` does.
        TypeError: likewise.
    """
    check_kind("tokenizer", tokenizer, ScaleTokenizer)
    check_labels(labels)
    check_guidance(cfg_scale)
    sides = model.patch_nums
    if tuple(tokenizer.patch_nums) != tuple(sides) or tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            "expected model and tokenizer to have the same scales and codes but got "
            f"{sides} and {model.vocab_size} against {tuple(tokenizer.patch_nums)} and {tokenizer.vocab_size}"
        )
    rows = [tuple(row) for row in (published_schedule(sides) if schedule is None else schedule)]
    if (
        [sum(row) for row in rows] != [side * side for side in sides]
        or min(map(min, rows)) < 1
        or len(rows[0]) > 1
    ):
        raise ValueError(
            f"expected a schedule with a row of positive numbers for each scale, summing to {[s * s for s in sides]}, "
            f"the first of one pass, but got {rows}"
        )
    guided = cfg_scale > 0 and len(sides) > 1
    both = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    seeds = row_seeds(seed, len(labels), labels.device).unsqueeze(1)
    dtype = dtype_of(model)
    latent = tokenizer.empty_latent(len(labels))
    indices: list[Tensor] = []
    if kept is not None:
        kept.check(len(labels), sides)

    def draw(logits: Tensor, k: int, uncond: Tensor | None = None, again: int = 0) -> tuple[Tensor, Tensor]:
        # Draws of later passes use positions behind those of all tokens.
        start = model.scale_starts[k] + again * model.scale_starts[-1]
        drawn = sample(
            logits.float(),
            uncond=None if uncond is None else uncond.float(),
            cfg_scale=None if uncond is None else 1 + cfg_scale * k / (len(sides) - 1),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seeds,
            offset=torch.arange(start, start + logits.shape[1], device=logits.device),
            return_prob=True,
            check=True,
        )
        assert not isinstance(drawn, Tensor) and drawn.prob is not None
        return drawn.tokens, drawn.prob

    with evaluating(model, tokenizer):
        cache = model.make_cache(len(both))
        for k, row in enumerate(rows):
            inputs = None if k == 0 else tokenizer.next_input(k - 1, latent).to(dtype)
            doubled = torch.cat([inputs, inputs]) if guided and inputs is not None else inputs
            logits = model.scale_logits(k, doubled, both, cache)
            uncond = None
            if guided:
                logits, uncond = logits.chunk(2)
            codes, prob = draw(logits, k, uncond)
            stays = torch.zeros_like(codes, dtype=torch.bool)
            if kept is not None:
                stays = kept.places(k, sides).to(codes.device).expand_as(codes)
                codes = torch.where(stays, kept.indices[k].to(codes.device), codes)
                prob = prob.masked_fill(stays, torch.inf)
            masked = torch.ones_like(codes, dtype=torch.bool)
            for again in range(1, len(row)):
                assert inputs is not None
                # Settled tokens come last in the order, so that the first ones are the least certain of the others.
                order = prob.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True)
                masked = torch.zeros_like(masked).scatter(1, order[:, : sum(row[again:])], True) & ~stays
                known = own_inputs(tokenizer, k, codes).to(dtype)
                fresh, chance = draw(model.refine_logits(k, inputs, known, masked, labels), k, again=again)
                codes, prob = torch.where(masked, fresh, codes), torch.where(masked, chance, prob)
            indices.append(codes)
            latent = tokenizer.add_scale(k, codes, latent)
        images = tokenizer.decode_latent(latent)
    check_drawn(images, "the decoded images")
    return NextScaleOutput(images, indices, [])


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


def _pairs(mask: IntervalMask) -> int:
    return mask.num_pairs


def _attention_seconds(sides: Sequence[int], repeats: int = 5) -> list[float]:
    """Median process time of forward and backward of two heads under VAR's mask and under HMAR's, in turns."""
    length = sum(side * side for side in sides)
    seconds: list[list[float]] = [[], []]
    both = (masks.next_scale(sides), masks.next_scale_markov(sides))
    for turn in range(repeats + 1):
        for times, mask in zip(seconds, both, strict=True):
            q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3))
            gradient = torch.randn(1, 2, length, 64)
            start = time.process_time()
            with torch.enable_grad():
                torch.autograd.grad(block_sparse_attention(q, k, v, mask), (q, k, v), gradient)
            if turn:
                times.append(time.process_time() - start)
    return [statistics.median(times) for times in seconds]


@torch.no_grad()
def _passes_seconds(sides: Sequence[int]) -> list[float]:
    """Process time of all passes of one image by two blocks of d16's shape, of VAR with its cache and of HMAR."""
    both = [
        VAR(VARConfig(depth=2, embed_dim=1024, num_heads=16, patch_nums=tuple(sides))).eval(),
        HMAR(
            HMARConfig(
                depth=2, embed_dim=1024, num_heads=16, patch_nums=tuple(sides), tail=1, refinement=False
            )
        ).eval(),
    ]
    inputs = [torch.randn(1, side * side, 32) for side in sides]
    labels, seconds = torch.tensor([3]), [0.0, 0.0]
    for turn in range(3):
        for i, model in enumerate(both):
            cache, start = model.make_cache(1), time.process_time()
            for k, entering in enumerate(inputs):
                model.scale_logits(k, None if k == 0 else entering, labels, cache)
            if turn:
                seconds[i] += time.process_time() - start
    return seconds


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Scales alone against one pass, the cache, the pairs of attention; in full their time at 512 pixels too."""
    config = HMARConfig(
        depth=4,
        embed_dim=64,
        num_heads=4,
        num_classes=5,
        vocab_size=24,
        z_channels=8,
        patch_nums=(1, 2, 3, 4, 6) if quick else SIDES_256,
        tail=2,
    )
    model = shaken(HMAR(config)).eval()
    starts, labels = model.scale_starts, torch.tensor([0, 4, 5])
    inputs = torch.randn(3, starts[-1] - 1, 8)
    whole = model(inputs, labels)
    cache = model.make_cache(3)
    error = 0.0
    for k, (start, stop) in enumerate(itertools.pairwise(starts)):
        part = model.scale_logits(k, None if k == 0 else inputs[:, start - 1 : stop - 1], labels, cache)
        error = max(error, float((part - whole[:, start:stop]).abs().max()))
    own = inputs[:, 4:13]  # scale 2
    codes, masked = torch.randn(3, 9, 8), torch.rand(3, 9) < 0.5
    base = model.refine_logits(2, own, codes, masked, labels)
    hidden = model.refine_logits(2, own, codes + masked.unsqueeze(-1), masked, labels)
    seen = model.refine_logits(2, own, codes + (~masked).unsqueeze(-1), masked, labels)
    rows = [
        at_most("one block-diagonal pass against scales alone, largest difference", error, 1e-5),
        equals("bytes of the cache after all scales", cache.nbytes, 0),
        equals("change of the second branch's logits with the masked tokens", (hidden - base).abs().max(), 0),
        at_least("the same with the visible ones", (seen - base).abs().max(), 0.01),
    ]
    for size, sides in ((256, SIDES_256), (512, SIDES_512)) + (() if quick else ((1024, SIDES_1024),)):
        ratio = _pairs(masks.next_scale_markov(sides)) / _pairs(masks.next_scale(sides))
        rows.append(at_most(f"pairs of attention over VAR's at {size} pixels", ratio, 0.5))
    if not quick:
        ours, theirs = reversed(_attention_seconds(SIDES_512))
        rows.append(
            at_least(
                "time of VAR's attention over ours, a training step at 512 pixels; goal 2, pairs allow 2.15",
                theirs / ours,
                1.5,
            )
        )
        theirs, ours = _passes_seconds(SIDES_512)
        # Both models have the same matrix products, which are most of the time on a CPU.
        rows.append(
            at_least(
                "time of VAR's passes over ours, two blocks of d16 at 512 pixels; goal 1.5 of the published",
                theirs / ours,
                1.0,
            )
        )
    # The comparison can fail: under VAR's mask the one pass is another.
    model.mask = masks.next_scale(model.patch_nums)
    rows.append(
        at_least("the first comparison under VAR's mask", (model(inputs, labels) - whole).abs().max(), 0.1)
    )
    return Claim(tuple(rows))
