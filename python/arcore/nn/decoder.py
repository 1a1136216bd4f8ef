"""The layer of Llama's kind: grouped-query attention with rotary positions, and a gated feed-forward network."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask, TreeMask
from arcore.nn.block_weight import stored
from arcore.nn.kinds import Axes, Features, Size, Tokens, check_kinds, explain_kinds
from arcore.nn.linear import Linear
from arcore.nn.norm import RMSNorm
from arcore.nn.rotary import Angles
from arcore.nn.token_cache import TokenCache
from arcore.ops import block_sparse_attention
from arcore.ops.decoder_step import DTYPES as STEP_DTYPES

Mask = IntervalMask | TreeMask


@explain_kinds
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention under either kind of mask; shapes are those of `arcore.ops.block_sparse_attention`.

    The op has no kernel for trees on a GPU yet; there they go to PyTorch's attention with a matrix of booleans.
    """
    if isinstance(mask, TreeMask) and q.is_cuda:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_bool(), enable_gqa=grouped)
    return block_sparse_attention(q, k, v, mask)


@check_kinds
class GroupedAttention(nn.Module):
    """Causal self-attention in which several query heads share a key head (GQA, arXiv:2305.13245).

    Queries, keys and values come from one product, in this order of rows.

    Args:
        dim: width C.
        num_heads: query heads H.
        num_kv_heads: key heads; H must be a multiple.
        head_dim: width D of a head, even.
        qkv_bias: biases of queries, keys and values.
        out_bias: bias of the projection out.

    Raises:
        ValueError: heads do not fit together, or their width is odd.
    """

    def __init__(
        self,
        dim: Size,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__()
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "arcore.nn.GroupedAttention: expected num_heads to be a multiple of num_kv_heads but got "
                f"{num_heads} and {num_kv_heads}"
            )
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"arcore.nn.GroupedAttention: expected an even head_dim but got {head_dim}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * head_dim, dim, bias=out_bias)

    def forward(
        self, x: Tokens, angles: Angles, mask: Mask, cache: TokenCache | None = None, layer: int = 0
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, N, C]`.
            angles: of the N tokens.
            mask: N queries; N keys, or with a cache `cache.length + N`.
            cache: earlier keys and values; those of x are staged in it.
            layer: which layer of the cache is ours.

        Returns:
            `[B, N, C]`.
        """
        batch, length, _ = x.shape
        turned = self.num_heads + self.num_kv_heads
        qkv = self.qkv(x).view(batch, length, turned + self.num_kv_heads, self.head_dim)
        qk = angles.turn(qkv[:, :, :turned])
        # Transposed views: the op takes any strides, so no copy is made here or of its output.
        q = qk[:, :, : self.num_heads].transpose(1, 2)
        k = qk[:, :, self.num_heads :].transpose(1, 2)
        v = qkv[:, :, turned:].transpose(1, 2)
        if cache is not None:
            k, v = cache.stage(layer, k, v)
        out = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        mixed: Tensor = self.out(out)
        return mixed


@check_kinds
class GatedMLP(nn.Module):
    """`down(silu(gate x) * up x)` (SwiGLU, arXiv:2002.05202), gate and up from one product.

    Args:
        dim: width C.
        hidden_dim: width of the hidden layer.
        bias: biases of all three.
    """

    def __init__(self, dim: Size, hidden_dim: Size, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=bias)
        self.down = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Features) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


@check_kinds
class DecoderLayer(nn.Module):
    """`x += attention(norm1(x)); x += mlp(norm2(x))` with RMS norms.

    Args:
        dim: width C.
        attention: mixes tokens.
        mlp: acts on each token.
        norm_eps: of the norms.
        norm1: whether there is a norm before the attention; drafters' first layers have none.
    """

    def __init__(
        self, dim: Size, *, attention: nn.Module, mlp: nn.Module, norm_eps: float = 1e-5, norm1: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, eps=norm_eps) if norm1 else nn.Identity()
        self.attention = attention
        self.norm2 = RMSNorm(dim, eps=norm_eps)
        self.mlp = mlp

    def forward(self, x: Features, *args: Any) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`; the other arguments go to the attention."""
        x = x + self.attention(self.norm1(x), *args)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def fits_step(self) -> bool:
        """Whether `arcore.ops.decoder_step` can take this layer: float32 or bfloat16 on a CPU, plain parts."""
        attention: Any = self.attention
        mlp: Any = self.mlp
        if (
            type(self) is not DecoderLayer
            or type(self.norm1) is not RMSNorm
            or type(attention) is not GroupedAttention
            or type(mlp) is not GatedMLP
            or self._forward_hooks
            or self._forward_pre_hooks
            or not all(type(part) is Linear for part in (attention.qkv, attention.out, mlp.gate_up, mlp.down))
        ):
            return False
        weight: Tensor = attention.qkv.weight
        return (
            weight.is_cpu
            and weight.dtype in STEP_DTYPES
            and all(p.dtype == weight.dtype for p in self.parameters())
        )

    def step_weights(self) -> dict[str, Any]:
        """What `arcore.ops.decoder_step` asks of the layer, by the names of its arguments; blocks as blocks."""
        attention: Any = self.attention
        mlp: Any = self.mlp
        norm1: Any = self.norm1
        return {
            "norm1": norm1.weight,
            "qkv": stored(attention.qkv.weight),
            "out": stored(attention.out.weight),
            "norm2": self.norm2.weight,
            "gate_up": stored(mlp.gate_up.weight),
            "down": stored(mlp.down.weight),
            "num_heads": attention.num_heads,
            "qkv_bias": attention.qkv.bias,
            "out_bias": attention.out.bias,
            "gate_up_bias": mlp.gate_up.bias,
            "down_bias": mlp.down.bias,
            "eps": self.norm2.eps,
        }


@check_kinds
def pairs_to_halves(weight: Annotated[Tensor, Axes("O C")], num_heads: Size) -> Tensor:
    """Rows of a query or key projection, from rotary pairs (2i, 2i + 1) to pairs (i, i + D / 2).

    Files of llama.cpp and Llama's own code store them the first way. Scores do not change when queries and keys are
    permuted alike.

    Args:
        weight: `[H * D, ...]`, weight or bias.
        num_heads: heads H of it.
    """
    heads = weight.unflatten(0, (num_heads, -1, 2))
    halves: Tensor = heads.transpose(1, 2).reshape(weight.shape)
    return halves
