"""EchoGen: settings, network, presets."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, preset
from arcore.masks import IntervalMask
from arcore.nn import MLP, ModulationTable, SharedModulation
from arcore.nn.adaln import EPS, modulated_norm
from arcore.nn.kinds import check_kinds
from arcore.ops import block_sparse_attention
from arcore.zoo.next_scale.infinity.config import InfinityConfig, infinity_2b, infinity_tiny
from arcore.zoo.next_scale.infinity.layers import (
    CosineAttention,
    CrossAttention,
    InfinityBlock,
    Told,
    keys_of,
)
from arcore.zoo.next_scale.infinity.model import Infinity
from arcore.zoo.next_scale.infinity.published import OFFICIAL_NAMES
from arcore.zoo.next_scale.infinity.text import Text
from arcore.zoo.tokenizers.multi_scale_bsq.config import SCALES_256


@check_kinds
@dataclass(frozen=True, kw_only=True)
class EchoGenConfig(InfinityConfig):
    """Settings of `EchoGen`: those of `Infinity`, and the following.

    Attributes:
        semantic_dim: width of a semantic token.
        semantic_length: semantic tokens of a reference with their summary, 1 + S.
        content_dim: width of a content token.
        content_length: content tokens M of a reference.
        reference_drop: probability that semantic tokens, and that content tokens, become null ones while training.

    Raises:
        ValueError: the numbers do not fit together.
    """

    semantic_dim: int = 768
    semantic_length: int = 1025
    content_dim: int = 16
    content_length: int = 4096
    reference_drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("semantic_dim", 1),
            ("semantic_length", 2),
            ("content_dim", 1),
            ("content_length", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} to be at least {least} but got {getattr(self, name)}")


class Reference(NamedTuple):
    """Reference pictures of a batch, as their encoders see them.

    Attributes:
        semantic: `[B, 1 + S, cs]`, the summary first; None leaves the semantic part of the model out, so that content
            alone distinguishes it from its base.
        content: `[B, M, cc]`.
    """

    semantic: Tensor | None
    content: Tensor


class EchoGenBlock(InfinityBlock):
    """A block of `Infinity` whose tokens also read content tokens, and which carries these on.

    Args:
        config: settings.
        drop_path: rate of stochastic depth.
        last: nothing reads the content behind this block, which therefore only makes keys and values of it.
    """

    config: EchoGenConfig

    def __init__(self, config: EchoGenConfig, drop_path: float, *, last: bool) -> None:
        super().__init__(config, drop_path)
        dim = config.embed_dim
        self.last = last
        self.semantic_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.semantic_v_bias = nn.Parameter(torch.zeros(dim))
        self.content_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.content_v_bias = nn.Parameter(torch.zeros(dim))
        self.content_attn = nn.Linear(dim, dim, bias=False)
        self.content_table = ModulationTable(dim, parts=6)
        if not last:
            self.content_q = nn.Linear(dim, dim, bias=False)
            self.content_q_bias = nn.Parameter(torch.zeros(dim))
            self.content_log_scale = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4.0)))
            self.content_out = nn.Linear(dim, dim)
            self.content_cross_norm = nn.LayerNorm(dim, eps=EPS)
            self.content_cross = CrossAttention(dim, dim, config.num_heads)
            self.content_ffn = MLP(dim, config.mlp_dim)

    def joined(self, out: Tensor, q: Tensor, told: Told, layer: int) -> Tensor:
        """Adds what the image tokens read of the content."""
        if told.content is None:
            return out
        k, v = told.content[layer]
        read = block_sparse_attention(q, k, v, _whole(q, k), scale=1.0)
        return out + self.content_attn(read.transpose(1, 2).flatten(2))

    def read_content(
        self, content: Tensor, modulation: Tensor, context: Tensor, lengths: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Keys and values of the content `[B, M, C]` for the image tokens, and the content for the next block."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.content_table(modulation)
        h = modulated_norm(content, scale1, shift1)
        heads = self.attn.num_heads
        k, v = keys_of(h, self.content_kv, self.content_v_bias, heads)
        k = F.normalize(k, dim=-1)
        if self.last:
            return (k, v), content
        q = F.linear(h, self.content_q.weight, self.content_q_bias)
        q = F.normalize(q.unflatten(2, (heads, -1)).transpose(1, 2), dim=-1)
        q = q * self.content_log_scale.clamp(max=CosineAttention.MAX_LOG_SCALE).exp().to(q.dtype)
        count = content.shape[1]
        out = block_sparse_attention(q, k, v, _whole(q, k), scale=1.0)
        content = content + gate1 * self.content_out(out.transpose(1, 2).flatten(2))
        keys = self.content_cross.keys(context)
        mask = Told(context, context, [keys], lengths).mask(count)
        content = content + self.content_cross(self.content_cross_norm(content), keys, mask)
        content = content + gate2 * self.content_ffn(modulated_norm(content, scale2, shift2))
        return (k, v), content


def _whole(q: Tensor, k: Tensor) -> IntervalMask:
    """Every query may read every key; made so that torch.compile can trace it."""
    bounds = torch.tensor([0, k.shape[2]], dtype=torch.int32, device=q.device)
    return IntervalMask.trusted(bounds.expand(1, 1, q.shape[2], 2).contiguous(), k.shape[2])


@check_kinds
class EchoGen(Infinity):
    """The transformer with its two ways to a reference.

    Args:
        config: settings.
    """

    config: EchoGenConfig

    def __init__(self, config: EchoGenConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.null_semantic = nn.Parameter(torch.empty(config.semantic_length, config.semantic_dim))
        self.null_content = nn.Parameter(torch.empty(config.content_length, config.content_dim))
        self.semantic_pool = nn.Linear(config.semantic_dim, dim)
        self.semantic_start = nn.Parameter(torch.zeros(1, 1, dim))
        self.semantic_proj, self.content_proj = (
            nn.Sequential(nn.Linear(width, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
            for width in (config.semantic_dim, config.content_dim)
        )
        self.semantic_modulation = SharedModulation(dim, dim, parts=6)
        self.content_modulation = SharedModulation(dim, dim, parts=6)
        self.content_semantic_modulation = SharedModulation(dim, dim, parts=6)
        self._init_control()

    def _block(self, layer: int, rate: float) -> nn.Module:
        return EchoGenBlock(self.config, rate, last=layer == self.config.depth - 1)

    @torch.no_grad()
    def _init_control(self) -> None:
        """The content adds nothing at the start; the semantic tokens take part in the text's softmax but hold zeros.

        That the published training begins in a like way, from zero keys and values, is what dilutes the text a little.
        """
        std = math.sqrt(1 / (3 * self.config.embed_dim))
        fresh = (
            *(self.semantic_pool, self.semantic_proj, self.content_proj),
            *(self.semantic_modulation, self.content_modulation, self.content_semantic_modulation),
        )
        for part in fresh:
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=std)
                    module.bias.zero_()
        for table in (self.null_semantic, self.null_content):
            nn.init.trunc_normal_(table, std=1.2)
            table.div_(math.sqrt(table.shape[1]))
        for block in self._blocks():
            block.content_attn.weight.zero_()
            block.semantic_kv.weight.zero_()

    def start_from(self, base: Infinity) -> None:
        """Take all weights of a base model.

        Raises:
            ValueError: the base has other settings.
        """
        names = [field.name for field in dataclasses.fields(InfinityConfig)]
        differing = [
            f"{name}={getattr(base.config, name)} instead of {getattr(self.config, name)}"
            for name in names
            if getattr(base.config, name) != getattr(self.config, name)
        ]
        if differing:
            raise ValueError(f"the base model has other settings: {', '.join(differing)}")
        found = self.load_state_dict(base.state_dict(), strict=False)
        assert not found.unexpected_keys

    def base_parameters(self) -> list[nn.Parameter]:
        """Those that the base model has too, which the published training keeps as they are."""
        return [
            p
            for name, p in self.named_parameters()
            if not re.search(r"(^|\.)(null_)?(semantic|content)", name)
        ]

    def null_reference(self, batch: int) -> Reference:
        """No reference, for guidance."""
        return Reference(self.null_semantic.expand(batch, -1, -1), self.null_content.expand(batch, -1, -1))

    def tell(self, text: Text, dropped: Tensor | None = None, reference: Reference | None = None) -> Told:
        """What the blocks read of texts and references.

        Args:
            text: with at most `text_length` tokens.
            dropped: bool `[B]`, rows that are given the null text; None for none.
            reference: of each row; None for the null reference.

        Raises:
            ValueError: shapes do not fit.
        """
        config, batch = self.config, len(text.lengths)
        pooled, context = self._read(text, dropped)
        semantic, content = self.null_reference(batch) if reference is None else reference
        wanted = (batch, config.content_length, config.content_dim)
        if tuple(content.shape) != wanted:
            raise ValueError(f"expected content tokens of shape {wanted} but got {tuple(content.shape)}")
        modulation, of_content = self.modulation(pooled), self.content_modulation(pooled)
        front, keys, lengths = None, [block.cross.keys(context) for block in self._blocks()], text.lengths
        if semantic is not None:
            wanted = (batch, config.semantic_length, config.semantic_dim)
            if tuple(semantic.shape) != wanted:
                raise ValueError(
                    f"expected semantic tokens of shape {wanted} but got {tuple(semantic.shape)}"
                )
            summary = self.semantic_pool(semantic[:, 0])
            patches = self.semantic_proj(semantic[:, 1:])
            modulation = modulation + self.semantic_modulation(summary)
            of_content = of_content + self.content_semantic_modulation(summary)
            front = summary.unsqueeze(1) + self.semantic_start
            lengths = lengths + patches.shape[1]
            # Before the text, whose end differs from row to row.
            keys = [
                tuple(  # type: ignore[misc]
                    torch.cat(both, 2)
                    for both in zip(
                        keys_of(patches, block.semantic_kv, block.semantic_v_bias, config.num_heads),
                        of_text,
                        strict=True,
                    )
                )
                for block, of_text in zip(self._blocks(), keys, strict=True)
            ]
        carried, contents = self.content_proj(content), []
        for block in self._blocks():
            found, carried = block.read_content(carried, of_content, context, text.lengths)
            contents.append(found)
        return Told(pooled, modulation, keys, lengths, contents, front)

    @check_kinds
    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        text: Text,
        reference: Reference,
        dropped: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits of all bits of all scales in one pass, each scale given the coarser ones.

        Args:
            inputs: `[B, L - 1, d]`, from the tokenizer's `scale_inputs` or `corrected`.
            text: of each row.
            reference: of each row.
            dropped: rows whose text, whose semantic and whose content tokens become null ones; None drops them
                at random while training, each on its own.

        Returns:
            float32 `[B, L, d, 2]`: of each bit, the logits of 0 and of 1.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        batch, device = len(inputs), inputs.device
        if dropped is None and self.training:
            rates = (self.config.text_drop, self.config.reference_drop, self.config.reference_drop)
            one, two, three = (torch.rand(batch, device=device) < rate for rate in rates)
            dropped = (one, two, three)
        if dropped is not None:
            null = self.null_reference(batch)
            semantic, content = reference
            if semantic is not None and null.semantic is not None:
                semantic = torch.where(dropped[1][:, None, None], null.semantic.to(semantic.dtype), semantic)
            content = torch.where(dropped[2][:, None, None], null.content.to(content.dtype), content)
            reference = Reference(semantic, content)
        return self._whole(inputs, self.tell(text, None if dropped is None else dropped[0], reference))

    def guided(self, text: Text, reference: Reference) -> Told:
        """What three copies of each row read, for guidance: text and reference, the text alone, neither."""
        batch = len(text.lengths)
        null, nothing = self.null(text.lengths), self.null_reference(batch)
        vectors = torch.cat([text.vectors, text.vectors, null.vectors.to(text.vectors)])
        semantic = reference.semantic
        if semantic is not None and nothing.semantic is not None:
            semantic = torch.cat([semantic, nothing.semantic, nothing.semantic])
        content = torch.cat([reference.content, nothing.content, nothing.content])
        return self.tell(Text(vectors, text.lengths.repeat(3)), None, Reference(semantic, content))

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published file under our names. What the last block would do with content nobody reads is left.

        Raises:
            ValueError: as of `Infinity`.
        """
        last = f"blocks.{self.config.depth - 1}.content_"
        unread = tuple(last + name for name in ("q.", "q_bias", "log_scale", "out.", "cross", "ffn."))
        return {
            name: value for name, value in super().from_official(state).items() if not name.startswith(unread)
        }

    def _tables(self) -> tuple[str, ...]:
        return ("null_text", "null_semantic", "null_content")

    def _official_names(self) -> tuple[tuple[str, str], ...]:
        return _CONTROL_NAMES + OFFICIAL_NAMES


_CONTROL_NAMES = (
    (r"^control_features_uncond$", "null_semantic"),
    (r"^control_features_refer_uncond$", "null_content"),
    (r"^control_proj_for_sos\.", "semantic_pool."),
    (r"^control_pos_start$", "semantic_start"),
    (r"^control_proj_for_ca\.", "semantic_proj."),
    (r"^control_proj_for_ca_refer\.", "content_proj."),
    (r"^control_shared_ada_lin\.1\.", "semantic_modulation.linear."),
    (r"^control_shared_ada_lin_refer\.1\.", "content_modulation.linear."),
    (r"^control_shared_ada_lin_refer_dino\.1\.", "content_semantic_modulation.linear."),
    (r"\.sa\.control_mat_(q|kv)\.", r".content_\1."),
    (r"\.sa\.control_(q_bias|v_bias)$", r".content_\1"),
    (r"\.sa\.control_scale_mul_1H11$", ".content_log_scale"),
    (r"\.sa\.control_proj\.", ".content_out."),
    (r"\.sa\.control_attn\.", ".content_attn."),
    (r"\.ca\.control_mat_kv\.", ".semantic_kv."),
    (r"\.ca\.control_v_bias$", ".semantic_v_bias"),
    (r"\.control_ca\.", ".content_cross."),
    (r"\.control_ca_norm\.", ".content_cross_norm."),
    (r"\.control_ffn\.", ".content_ffn."),
    (r"\.control_ada_gss$", ".content_table.table"),
)


def _on(base: InfinityConfig, **more: object) -> EchoGenConfig:
    return EchoGenConfig(**{**vars(base), **more})  # type: ignore[arg-type]


@preset(tokenizer="msbsq_tiny")
def echogen_tiny() -> EchoGenConfig:
    """24x24 scenes of two digits, with one of them as the reference; trains on a CPU in minutes."""
    return _on(infinity_tiny(), semantic_dim=64, semantic_length=10, content_dim=8, content_length=36)


@preset(tokenizer="msbsq_d16")
def echogen_125m() -> EchoGenConfig:
    """12 blocks, 256 pixels, on infinity_125m."""
    return EchoGenConfig(
        depth=12,
        embed_dim=768,
        num_heads=8,
        mlp_dim=3072,
        bits=16,
        patch_nums=SCALES_256,
        drop_path=0.1,
        semantic_length=257,
        content_length=1024,
    )


@preset(tokenizer="msbsq_d32", weights=Published("UmiSonoda16/EchoGen", "echogen_2b.pth"))
def echogen_2b() -> EchoGenConfig:
    """32 blocks, 1024 pixels, on infinity_2b; weights: echogen_2b.pth."""
    return _on(infinity_2b())
