"""One decoder layer for one token per row: public function, reference, and the op's fake rule.

The passes and the numerics are in csrc/decoder_step/README.md.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._block_values import reference_block_values
from arcore.ops._checks import checked_call, int64, integer, same_device
from arcore.ops._registration import (
    call_in_place,
    forbid_derivative,
    mark_written,
    refuse_derivatives,
    register_in_place,
)

OP = "arcore.decoder_step"
# Most rows: kMaxTokens of csrc/common/weights.h.
MAX_ROWS = 64
DTYPES = (torch.float32, torch.bfloat16)
_LOOP = "it writes in place; call it once for all rows, or in a loop"


def decoder_step(
    x: Tensor,
    *,
    norm1: Tensor,
    qkv: Tensor,
    out: Tensor,
    norm2: Tensor,
    gate_up: Tensor,
    down: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    num_heads: int,
    qkv_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    window: int | None = None,
    eps: float = 1e-5,
    drafts: int = 1,
    seen: Tensor | None = None,
) -> Tensor:
    """Take one token of each row through a layer of Llama's kind, with its keys and values in a cache.

    With `drafts` it takes so many new tokens of each text, a chain or a tree of drafts: row b of x is then token
    b % drafts of text b // drafts, and the cache has a row per text.

    ``x += out(attention(qkv(rms_norm(x))))``, then ``x += down(silu(gate) * up)``, where ``gate, up`` are the halves of
    ``gate_up(rms_norm(x))``. Queries and keys are turned by the rotary angles, channel i paired with channel i + D / 2.
    The new key and value are written behind each row's tokens. The weights are read once for all rows; a row's result
    does not depend on the others, on the number of threads or on what lies behind its tokens in the cache.

    Each of `qkv`, `out`, `gate_up` and `down` may be given in blocks, uint8 `[rows, columns / 32, bytes]` as for
    `arcore.ops.block_values`. They are expanded in registers, so the result has the bits that it has for float32
    weights of the same numbers.

    For decoding on CPUs, without gradient. A model does the same in a dozen ops, between which the weights push code
    and data out of the caches.

    Args:
        x: hidden states ``[B, C]``, float32 or bfloat16 like all tensors but blocks, `lengths`, `cos` and `sin`,
            contiguous; written in place. B is at most 64.
        norm1: weight of the norm before the attention, ``[C]``.
        qkv: projections of H query heads, Hkv key heads and Hkv value heads, ``[(H + 2 Hkv) D, C]``.
        out: projection behind the attention, ``[C, H D]``.
        norm2: weight of the norm before the feed-forward network, ``[C]``.
        gate_up: ``[2 F, C]``, gate first.
        down: ``[C, F]``.
        keys: cache ``[B / drafts, Hkv, L, D]``, D even, the tokens of a head side by side; written in place.
        values: likewise.
        cos: cosines of the new tokens' positions, float32 ``[1 or B, D]``.
        sin: sines, likewise, negative in the first half of the channels.
        lengths: tokens of each text in the cache, int64 ``[B / drafts]``; at most L - drafts.
        num_heads: H, a multiple of Hkv.
        qkv_bias: ``[(H + 2 Hkv) D]`` or None.
        out_bias: ``[C]`` or None.
        gate_up_bias: ``[2 F]`` or None.
        down_bias: ``[C]`` or None.
        window: a token sees only so many places back, itself included, at least 1; None for all.
        eps: added to the mean squares, at least 0.
        drafts: new tokens of a text.
        seen: which new tokens each of them sees, int64 ``[B]``: bit t for token t of its text, with the bit of the
            token itself and none above it. None for a chain. Not together with `window`.

    Returns:
        x.

    Raises:
        TypeError: an argument is no tensor, or no number, where it should be one.
        ValueError: a shape, dtype, device, layout or length does not fit, or what is written shares memory with itself
            or with another argument.
        RuntimeError: a gradient or a forward-mode tangent would be expected, or a transform of `torch.func` is active.
        NotImplementedError: the tensors are not on a CPU.

    Reference: Llama (arXiv:2302.13971), grouped-query attention (arXiv:2305.13245).
    """
    window = _check_numbers(num_heads, window, eps, drafts)
    floats = (x, norm1, qkv, out, norm2, gate_up, down, keys, values, cos, sin)
    if not all(isinstance(t, Tensor) for t in (*floats, lengths)):
        _check_tensors(x, *floats[1:], lengths)
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{OP}: expected no transform of torch.func around it but got one; {_LOOP}")
    _refuse_gradients(*floats, qkv_bias, out_bias, gate_up_bias, down_bias)
    checked_call(
        "decoder_step", call_in_place, torch.ops.arcore.decoder_step.default,
        x, norm1, qkv, qkv_bias, out, out_bias, norm2, gate_up, gate_up_bias, down, down_bias,
        keys, values, cos, sin, lengths, num_heads, window, eps, drafts, seen,
    )  # fmt: skip
    mark_written(x, keys, values)
    return x


def reference_decoder_step(
    x: Tensor,
    *,
    norm1: Tensor,
    qkv: Tensor,
    out: Tensor,
    norm2: Tensor,
    gate_up: Tensor,
    down: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    num_heads: int,
    qkv_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    window: int | None = None,
    eps: float = 1e-5,
    drafts: int = 1,
    seen: Tensor | None = None,
) -> Tensor:
    """`decoder_step` in plain PyTorch, row by row; any float dtype, device and sizes."""
    _refuse_gradients(x, norm1, qkv, out, norm2, gate_up, down)
    qkv, out, gate_up, down = (
        reference_block_values(w).to(x.dtype) if w.dtype == torch.uint8 else w
        for w in (qkv, out, gate_up, down)
    )
    kv_heads, dim = keys.shape[1], keys.shape[3]
    for b in range(len(x)):
        text, new = divmod(b, drafts)
        before = int(lengths[text])
        row, length = x[b], before + new
        heads = F.linear(F.rms_norm(row, row.shape, norm1, eps), qkv, qkv_bias).view(-1, dim)
        turned = heads[: num_heads + kv_heads]
        angles = (angle[b if len(angle) > 1 else 0] for angle in (cos, sin))
        c, s = angles
        turned = turned * c + turned.roll(dim // 2, -1) * s
        keys[text, :, length] = turned[num_heads:]
        values[text, :, length] = heads[num_heads + kv_heads :]
        start = 0 if window is None else max(0, length + 1 - window)
        bits = (2 << new) - 1 if seen is None else int(seen[b])
        visible = [t for t in range(start, length + 1) if t < before or bits >> (t - before) & 1]
        group = num_heads // kv_heads
        k, v = (t[text, :, visible].repeat_interleave(group, 0) for t in (keys, values))
        scores = torch.einsum("hd,htd->ht", turned[:num_heads], k) / dim**0.5
        mixed = torch.einsum("ht,htd->hd", scores.softmax(-1), v).flatten()
        row = row + F.linear(mixed, out, out_bias)
        gate, up = F.linear(F.rms_norm(row, row.shape, norm2, eps), gate_up, gate_up_bias).chunk(2)
        x[b] = row + F.linear(F.silu(gate) * up, down, down_bias)
    return x


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{OP}: this op has no gradient; call it under torch.no_grad()")
    if forward_ad._current_level >= 0:
        refuse_derivatives("decoder_step", *tensors)


def _check_numbers(num_heads: int, window: int | None, eps: float, drafts: int) -> int:
    """Raise unless the numbers are what they should be; returns the window as the op takes it."""
    integer(OP, "num_heads", num_heads)
    integer(OP, "drafts", drafts)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{OP}: expected eps to be a number but got {eps!r}")
    if window is None:
        return 0
    if int64(OP, "window", window) < 1:
        raise ValueError(f"{OP}: expected window to be at least 1, or None for no window, but got {window}")
    return window


def _check_tensors(*tensors: Tensor | None) -> None:
    """Raise unless all are tensors on one device."""
    names = (
        "x",
        "norm1",
        "qkv",
        "out",
        "norm2",
        "gate_up",
        "down",
        "keys",
        "values",
        "cos",
        "sin",
        "lengths",
        "seen",
    )
    same_device(OP, **dict(zip(names, tensors, strict=False)))


@torch.library.register_fake("arcore::decoder_step")
def _fake(
    x: Tensor,
    norm1: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    out: Tensor,
    out_bias: Tensor | None,
    norm2: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    heads: int,
    window: int,
    eps: float,
    drafts: int = 1,
    seen: Tensor | None = None,
) -> None:
    _check_tensors(x, norm1, qkv, out, norm2, gate_up, down, keys, values, cos, sin, lengths, seen)
    biases = {
        "qkv_bias": qkv_bias,
        "out_bias": out_bias,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    same_device(OP, x=x, **biases)


register_in_place("decoder_step")


@torch.library.register_fake("arcore::linear_step")
def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# `arcore.nn.linear` calls it only where nobody differentiates.
forbid_derivative("linear_step", "arcore::linear_step has no derivative; use torch.nn.functional.linear")
