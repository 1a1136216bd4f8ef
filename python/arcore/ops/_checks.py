"""Checks of arguments that every op makes in the same words, in the public function and in its fake."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def same_device(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Raise unless all `tensors` are tensors and lie where the first one does; None stands for one not given.

    torch runs an op's fake as soon as one argument is a meta tensor, so a check in the kernel alone is skipped then and
    memory that nobody wrote comes back. Public functions and fakes both call this.

    Args:
        op: how messages name the op, ``"arcore.sample"``.
        tensors: by the name of the argument; a sequence of tensors counts as one argument.

    Raises:
        TypeError: something else than a tensor.
        ValueError: a tensor on another device.
    """
    device = first = None
    for name, value in tensors.items():
        if value is None:
            continue
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                inside = "" if tensor is value else f" with {type(tensor).__name__}"
                raise TypeError(
                    f"{op}: expected {name} to be a tensor but got {type(value).__name__}{inside}; "
                    f"make one with torch.as_tensor({name})"
                )
            if device is None:
                device, first = tensor.device, name
            elif tensor.device != device:
                raise ValueError(
                    f"{op}: expected {name} on the device of {first}, {device}, but got {tensor.device}; "
                    f"move it with {name}.to('{device}')"
                )
