"""Depthwise causal convolution: public functions, references, and the ops' fake and autograd rules.

The loops and the numerics are in csrc/causal_conv1d/README.md.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import REFUSALS, checked_call, in_words, same_device
from arcore.ops._registration import (
    call_below,
    call_in_place,
    forbid_further_derivatives,
    mark_written,
    refuse_derivatives,
    register_derivatives,
    register_in_place,
    register_vmap,
    untracked,
)

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "silu", "swish")
_FORWARD = torch.ops.arcore.causal_conv1d.default._op


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: Literal[False] = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    *,
    return_final_states: Literal[True],
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, with carried inputs, packed sequences and both directions.

    Computes ``out[t] = act(bias + sum_j weight[j] * x[t - width + 1 + j])`` per channel, in fp32 whatever the storage
    type. Differentiable in x, weight, bias and initial_states, and through the final states, in reverse and in forward
    mode (`torch.func.jvp` costs two to three more convolutions). Deterministic; results do not depend on the number of
    threads, on the layout or on batch mates.

    Args:
        x: ``[B, D, L]``, float32, bfloat16 or float16, any strides: channel-first, channel-last, slices.
        weight: ``[D, width]``, any width from 1 on; 2, 3 and 4 have kernels of their own.
        bias: ``[D]``.
        seq_idx: int32 ``[B, L]``, sequence of each token. A tap that would read another sequence reads 0. Tokens with a
            negative id are padding: their output is 0 and nobody reads them.
        initial_states: the ``width - 1`` inputs before x, ``[B, D, width - 1]``; zero when None. With `seq_idx` they
            belong to the first sequence; with `cu_seqlens` one per sequence, ``[num_sequences, D, width - 1]``.
        return_final_states: also return the last ``width - 1`` inputs, those of `initial_states` included.
        final_states_out: ``[B, D, width - 1]``, receives the final states instead of a new tensor. Not where a gradient
            is wanted.
        activation: None, "silu" or "swish" (the same).
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, boundaries 0 = c0 <= c1 <= ... = L of sequences packed into
            one row (B = 1), each with an initial and a final state of its own; equals separate calls. On CPUs only.
        reverse: anti-causal; equals flipping x, seq_idx and the output in time.

    Returns:
        ``[B, D, L]`` in x's dtype and memory layout; with `return_final_states` also the final states, x's dtype,
        ``[B, D, width - 1]``, with `cu_seqlens` one per sequence. With `seq_idx` they hold 0 where an input belongs to
        another than the last sequence.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices or `activation` do not fit, or `cu_seqlens` and `seq_idx` are both given.

    Reference: Mamba (arXiv:2312.00752, section 3.4); names and order are those of the causal-conv1d package.
    """
    if activation in ACTIVATIONS and untracked(x, weight, bias, initial_states):
        try:  # the op checks tensors itself; the words for what it refuses are found below
            both: tuple[Tensor, Tensor] = call_below(
                _FORWARD,
                x,
                weight,
                bias,
                seq_idx,
                initial_states,
                activation is not None,
                reverse,
                cu_seqlens,
            )
        except REFUSALS:
            pass
        else:
            if final_states_out is None:
                return both if return_final_states else both[0]
            return _results(*both, return_final_states, final_states_out)
    optional = {
        "bias": bias,
        "seq_idx": seq_idx,
        "initial_states": initial_states,
        "cu_seqlens": cu_seqlens,
    }
    _check("causal_conv1d", {"x": x, "weight": weight}, optional, activation)
    _check_dtypes("causal_conv1d", x=x, weight=weight, bias=bias, initial_states=initial_states)
    out, final = checked_call(
        "causal_conv1d",
        torch.ops.arcore.causal_conv1d,
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        activation is not None,
        reverse,
        cu_seqlens,
    )
    return _results(out, final, return_final_states, final_states_out)


def reference_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` in plain PyTorch, any float dtype and device.

    Works in float64 if any input is float64, else in float32. Arguments, returns and errors are those of
    `causal_conv1d`.
    """
    optional = {
        "bias": bias,
        "seq_idx": seq_idx,
        "initial_states": initial_states,
        "cu_seqlens": cu_seqlens,
    }
    _check("causal_conv1d", {"x": x, "weight": weight}, optional, activation)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        outs, finals = [x[..., :0]], [x.new_zeros(0, x.shape[1], weight.shape[1] - 1)]
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            own = None if initial_states is None else initial_states[i : i + 1]
            piece = reference_causal_conv1d(
                x[..., start:stop], weight, bias, None, own, True, None, activation, reverse=reverse
            )
            outs.append(piece[0])
            finals.append(piece[1])
        return _results(torch.cat(outs, dim=2), torch.cat(finals), return_final_states, final_states_out)
    given = [t for t in (x, weight, bias, initial_states) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    batch, dim, length = x.shape
    before = weight.shape[1] - 1
    inputs, ids = x.to(dtype), seq_idx
    if reverse:
        inputs, ids = inputs.flip(2), None if ids is None else ids.flip(1)
    history = inputs.new_zeros(batch, dim, before) if initial_states is None else initial_states.to(dtype)
    padded = torch.cat([history, inputs], dim=2)
    owners, keep = None, None
    if ids is not None:
        owners, keep = _owners(ids, before)
    out = padded.new_zeros(batch, dim, length)
    for j in range(before + 1):
        tap = padded[:, :, j : j + length]
        if owners is not None:
            same = (owners[:, j : j + length] == owners[:, before:]) & (owners[:, before:] >= 0)
            tap = torch.where(same[:, None], tap, 0.0)
        out = out + weight[:, j : j + 1].to(dtype) * tap
    if bias is not None:
        out = out + bias[:, None].to(dtype)
    if activation is not None:
        out = F.silu(out)
    final = padded[:, :, length:]
    if owners is not None and keep is not None:
        out = torch.where((owners[:, before:] >= 0)[:, None], out, 0.0)
        final = torch.where(keep[:, None], final, 0.0)
    if reverse:
        out = out.flip(2)
    return _results(out.to(x.dtype), final.to(x.dtype), return_final_states, final_states_out)


def _owners(ids: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Id of every input, those before the row included, and which of the last ones the final state keeps."""
    if ids.shape[1] == 0:
        none = ids.new_full((ids.shape[0], before), -1)
        return none, none >= 0
    real = ids >= 0
    first = ids.gather(1, real.int().argmax(1, keepdim=True))
    last = ids.gather(1, ids.shape[1] - 1 - real.flip(1).int().argmax(1, keepdim=True))
    owners = torch.cat([first.expand(-1, before), ids], dim=1)
    return owners, (owners[:, ids.shape[1] :] == last) & (last >= 0)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    *,
    num_steps: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """One or a few new tokens of a causal convolution, against a state that is changed in place.

    Several tokens in one call give the bits of as many calls.

    Args:
        x: new inputs, ``[B, D]`` or ``[B, D, S]``, float32, bfloat16 or float16, any strides.
        conv_state: the inputs before, ``[rows, D, state_len]`` with ``state_len >= width - 1``, newest last; receives
            the new ones. Any float dtype of `x`'s list and any strides.
        weight: ``[D, width]``.
        bias: ``[D]``.
        activation: None, "silu" or "swish".
        cache_seqlens: integers ``[B]``: the state is a ring, and the first new input goes to position
            ``cache_seqlens % state_len``. Without it the state is shifted.
        conv_state_indices: integers ``[B]``, row of `conv_state` for each row of x; negative, or `pad_slot_id`: padding
            (output 0, state untouched).
        pad_slot_id: one more index that marks padding, as in `selective_state_update`.
        num_steps: integers ``[B]`` from 0 to S: only so many of a row's tokens count; the output of the others is 0.
        snapshots: ``[B, S + 1, D, state_len]`` in conv_state's dtype; receives the state before the first token and
            after each. Speculative decoding puts back the one after the tokens that were accepted. Rows of padding are
            left as they are. `num_steps` and `snapshots` need tensors on a CPU.

    Returns:
        The outputs, in x's shape and dtype. No gradient flows through this function, and where one would be expected
        it raises.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices or `activation` do not fit, an index is out of range, or the state's elements share
            memory with each other or with another argument.
        RuntimeError: a gradient would be expected.

    Reference: Mamba (arXiv:2312.00752, section 3.4); names and order are those of the causal-conv1d package.
    """
    # The op checks tensors itself; here are only found the words, and no time is lost when nothing is wrong.
    if activation in ACTIVATIONS:
        try:
            refuse_derivatives("causal_conv1d_update", conv_state, x, weight, bias)
            out: Tensor
            if num_steps is None and snapshots is None:
                out = call_in_place(
                    torch.ops.arcore.causal_conv1d_update.default,
                    *(x, conv_state, weight, bias, cache_seqlens, conv_state_indices),
                    *(activation is not None, pad_slot_id),
                )
            else:
                out = call_in_place(
                    torch.ops.arcore.causal_conv1d_update_steps.default,
                    *(x, conv_state, weight, bias, cache_seqlens, conv_state_indices),
                    *(activation is not None, pad_slot_id, num_steps, snapshots),
                )
            mark_written(conv_state, snapshots)
            return out
        except (RuntimeError, TypeError, AttributeError) as error:
            refused = error
    _check_update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, num_steps, snapshots
    )
    _check_dtypes("causal_conv1d_update", x=x, conv_state=conv_state, weight=weight, bias=bias)
    raise in_words("causal_conv1d_update", refused)


def reference_causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    *,
    num_steps: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in plain PyTorch, row by row, any float dtype and device."""
    steps = _check_update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, num_steps, snapshots
    )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width, kept = weight.shape[1], conv_state.shape[2]
    out = torch.zeros_like(steps)
    for b in range(x.shape[0]):
        row = b if conv_state_indices is None else int(conv_state_indices[b])
        if row < 0 or (conv_state_indices is not None and row == pad_slot_id):
            continue
        count = steps.shape[2] if num_steps is None else int(num_steps[b])
        at = 0 if cache_seqlens is None or kept == 0 else int(cache_seqlens[b]) % kept
        oldest_first = conv_state[row].roll(-at, dims=1) if cache_seqlens is not None else conv_state[row]
        inputs = torch.cat([oldest_first.to(dtype), steps[b, :, :count].to(dtype)], dim=1)
        if count > 0:
            window = inputs[:, kept - width + 1 :].unfold(1, width, 1)  # [D, count, width]
            result = (window * weight.to(dtype)[:, None]).sum(2)
            result = result if bias is None else result + bias[:, None].to(dtype)
            out[b, :, :count] = (F.silu(result) if activation is not None else result).to(out.dtype)
        for t in range(0 if snapshots is not None else count, steps.shape[2] + 1):
            after = min(t, count)
            newest = inputs[:, after : after + kept].to(conv_state.dtype)
            state = newest.roll(at + after, dims=1) if cache_seqlens is not None else newest
            if snapshots is not None:
                snapshots[b, t] = state
            conv_state[row] = state
    return out.squeeze(2) if x.dim() == 2 else out


def _results(
    out: Tensor, final: Tensor, return_final: bool, into: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    if into is not None:
        if torch.is_grad_enabled() and (into.requires_grad or final.requires_grad):
            raise RuntimeError(
                "arcore.causal_conv1d: expected final_states_out only where no gradient is wanted, since it is written "
                "in place, but an argument requires one; take the final states that are returned"
            )
        same_device("arcore.causal_conv1d", x=final, final_states_out=into)
        if into.shape != final.shape:
            raise ValueError(
                f"arcore.causal_conv1d: expected final_states_out of shape {tuple(final.shape)} but got "
                f"{tuple(into.shape)}"
            )
        into.copy_(final)
        final = into
    return (out, final) if return_final else out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtypes(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"arcore.{op}: expected {name} of dtype float32, bfloat16 or float16 but got {_name(tensor.dtype)}; "
                f"for float64 (gradcheck) call reference_{op}"
            )


def _check(
    op: str, required: dict[str, Tensor], optional: dict[str, Tensor | None], activation: str | None
) -> None:
    """`required` starts with x, and holds weight."""
    op = f"arcore.{op}"
    x, weight, bias = required["x"], required["weight"], optional.get("bias")
    for name, tensor in {**required, **optional}.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            wanted = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(f"{op}: expected {name} to be {wanted} but got {type(tensor).__name__}")
    same_device(op, **required, **optional)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation None, 'silu' or 'swish' but got {activation!r}")
    if x.dim() != 3:
        raise ValueError(f"{op}: expected x of shape (batch, dim, length) but got {tuple(x.shape)}")
    batch, dim, length = x.shape
    if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] < 1:
        raise ValueError(
            f"{op}: expected weight of shape (dim={dim}, width) but got {tuple(weight.shape)}; "
            "a Conv1d's weight [dim, 1, width] needs .squeeze(1)"
        )
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"{op}: expected bias of shape (dim={dim},) but got {tuple(bias.shape)}")
    seq_idx, states = optional.get("seq_idx"), optional.get("initial_states")
    cu_seqlens, rows = optional.get("cu_seqlens"), batch
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError(f"{op}: expected cu_seqlens or seq_idx but got both; give one")
        if (
            cu_seqlens.dim() != 1
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
            or cu_seqlens.shape[0] < 1
        ):
            raise ValueError(
                f"{op}: expected cu_seqlens int32 or int64 of shape (num_sequences + 1,) but got "
                f"{_name(cu_seqlens.dtype)} {tuple(cu_seqlens.shape)}"
            )
        if batch != 1:
            raise ValueError(
                f"{op}: expected batch 1 with cu_seqlens (sequences packed into one row) but got {batch}; "
                "give seq_idx for several packed rows"
            )
        rows = cu_seqlens.shape[0] - 1
    if seq_idx is not None and (seq_idx.shape != (batch, length) or seq_idx.dtype != torch.int32):
        raise ValueError(
            f"{op}: expected seq_idx int32 of shape (batch={batch}, length={length}) but got "
            f"{_name(seq_idx.dtype)} {tuple(seq_idx.shape)}"
        )
    if states is not None and states.shape != (rows, dim, weight.shape[1] - 1):
        first = f"batch={batch}" if cu_seqlens is None else f"num_sequences={rows}"
        raise ValueError(
            f"{op}: expected initial_states of shape ({first}, dim={dim}, width - 1 = {weight.shape[1] - 1}) "
            f"but got {tuple(states.shape)}"
        )


def _check_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    num_steps: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """x as ``[B, D, S]``."""
    op = "arcore.causal_conv1d_update"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a tensor but got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{op}: expected x of shape (batch, dim) or (batch, dim, steps) but got {tuple(x.shape)}"
        )
    steps = x.unsqueeze(2) if x.dim() == 2 else x
    rows = {
        "cache_seqlens": cache_seqlens,
        "conv_state_indices": conv_state_indices,
        "num_steps": num_steps,
    }
    required = {"x": steps, "weight": weight, "conv_state": conv_state}
    _check("causal_conv1d_update", required, {"bias": bias, **rows, "snapshots": snapshots}, activation)
    if (num_steps is not None or snapshots is not None) and x.is_cuda:
        raise NotImplementedError(
            f"{op}: expected tensors on a CPU with num_steps or snapshots but got {x.device}"
        )
    batch, dim, _ = steps.shape
    width = weight.shape[1]
    if conv_state.dim() != 3 or conv_state.shape[1] != dim or conv_state.shape[2] < width - 1:
        raise ValueError(
            f"{op}: expected conv_state of shape (rows, dim={dim}, at least width - 1 = {width - 1}) but got "
            f"{tuple(conv_state.shape)}"
        )
    if conv_state_indices is None and conv_state.shape[0] != batch:
        raise ValueError(
            f"{op}: expected conv_state with one row per row of x ({batch}) but got {conv_state.shape[0]}; "
            "give conv_state_indices to pick rows"
        )
    for name, tensor in rows.items():
        if tensor is not None and (
            tensor.shape != (batch,) or tensor.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"{op}: expected {name} int32 or int64 of shape (batch={batch},) but got {_name(tensor.dtype)} "
                f"{tuple(tensor.shape)}"
            )
    if snapshots is not None:
        wanted = (batch, steps.shape[2] + 1, dim, conv_state.shape[2])
        if snapshots.shape != wanted or snapshots.dtype != conv_state.dtype:
            raise ValueError(
                f"{op}: expected snapshots {_name(conv_state.dtype)} of shape (batch, steps + 1, dim, state_len) = "
                f"{wanted} but got {_name(snapshots.dtype)} {tuple(snapshots.shape)}"
            )
    return steps


@torch.library.register_fake("arcore::causal_conv1d")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    same_device(
        "arcore.causal_conv1d",
        x=x,
        weight=weight,
        bias=bias,
        seq_idx=seq_idx,
        initial_states=initial_states,
        cu_seqlens=cu_seqlens,
    )
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty((rows, x.shape[1], weight.shape[1] - 1))


@torch.library.register_fake("arcore::causal_conv1d_backward")
def _fake_backward(
    grad_out: Tensor | None,
    grad_final_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.causal_conv1d_backward",
        x=x,
        grad_out=grad_out,
        grad_final_states=grad_final_states,
        weight=weight,
        bias=bias,
        seq_idx=seq_idx,
        initial_states=initial_states,
        cu_seqlens=cu_seqlens,
    )

    def dense(t: Tensor | None) -> Tensor:
        return x.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    return torch.empty_like(x), dense(weight), dense(bias), dense(initial_states)


@torch.library.register_fake("arcore::causal_conv1d_update")
def _fake_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    silu: bool,
    pad_slot_id: int = -1,
) -> Tensor:
    _check_update(x, conv_state, weight, bias, None, cache_seqlens, conv_state_indices)
    return torch.empty_like(x)


@torch.library.register_fake("arcore::causal_conv1d_update_steps")
def _fake_update_steps(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    silu: bool,
    pad_slot_id: int,
    num_steps: Tensor | None,
    snapshots: Tensor | None,
) -> Tensor:
    _check_update(x, conv_state, weight, bias, None, cache_seqlens, conv_state_indices, num_steps, snapshots)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, silu, reverse, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)
    ctx.flags = (silu, reverse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx, initial_states, cu_seqlens = ctx.saved_tensors
    if grad_out is None and grad_final is None:
        return (None,) * 8
    grads = torch.ops.arcore.causal_conv1d_backward(
        grad_out, grad_final, x, weight, bias, seq_idx, initial_states, *ctx.flags, cu_seqlens
    )
    return (
        grads[0],
        grads[1],
        None if bias is None else grads[2],
        None,
        None if initial_states is None else grads[3],
        None,
        None,
        None,
    )


def _tangents(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], along: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """The convolution is linear in its inputs and in its taps; its activation acts on each output alone."""
    x, weight, bias, seq_idx, states, silu, reverse, cu_seqlens = inputs
    x_t, weight_t, bias_t, _, states_t, *_ = along
    out, final = outputs
    wide = torch.float32  # between the convolution and its activation nothing is rounded to 16 bits

    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = torch.ops.arcore.causal_conv1d(
            x.to(wide), weight, bias, seq_idx, states, False, reverse, cu_seqlens
        )
        return made

    moved, moved_final = torch.zeros_like(out, dtype=wide), torch.zeros_like(final, dtype=wide)
    if x_t is not None or states_t is not None:
        moved, moved_final = convolve(torch.zeros_like(x) if x_t is None else x_t, weight, None, states_t)
    if weight_t is not None or bias_t is not None:
        taps = torch.zeros_like(weight) if weight_t is None else weight_t
        moved = moved + convolve(x, taps, bias_t, states)[0]
    if silu:
        before = convolve(x, weight, bias, states)[0]
        gate = torch.sigmoid(before)
        moved = moved * gate * (1 + before * (1 - gate))
    return moved.to(out.dtype), moved_final.to(final.dtype)


register_derivatives("causal_conv1d", _backward, _setup_context, _tangents)
forbid_further_derivatives("causal_conv1d", "backward")
register_vmap("causal_conv1d")
register_vmap("causal_conv1d_backward")


register_in_place("causal_conv1d_update")
register_in_place("causal_conv1d_update_steps")
