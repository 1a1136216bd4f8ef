"""What the ops share when they register their rules with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack as _interpreters
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

_LIBRARY = torch.library.Library("arcore", "IMPL")

# (inputs, outputs, tangents of the inputs or None) -> tangents of the outputs or None. Primals and tangents of
# arguments that are no tensors are passed through as they are and as None.
TangentRule = Callable[
    [tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor | None, ...]], Sequence[Tensor | None]
]


def register_derivatives(
    op: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    tangents: TangentRule | None = None,
) -> None:
    """Give ``arcore::<op>`` its derivatives in reverse and in forward mode, inside and outside of `torch.func`.

    `torch.library.register_autograd` knows no forward mode: tangents are dropped, and the derivative is a silent 0. Nor
    does it work below `torch.func.grad`. This registers one kernel for the Autograd key that does both, in eager mode
    and in what `torch.compile` traces.

    Args:
        op: name of the op; all its arguments are positional.
        backward: ``backward(ctx, *grads)``, as for `torch.library.register_autograd`.
        setup_context: ``setup_context(ctx, inputs, output)``, likewise.
        tangents: the forward-mode rule; forward mode is refused when None.
    """
    overload = getattr(torch.ops.arcore, op).default
    defaults = tuple(a.default_value for a in overload._schema.arguments)

    class Rule(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            # torch turns both modes off here, but levels of torch.func below this one may record.
            with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            found = backward(_WithoutFirst(ctx), *grads)
            return (None, *(found if isinstance(found, tuple) else (found,)))

    def kernel(keyset: Any, *given: Any) -> Any:
        # The dispatcher leaves out trailing arguments that have their default values.
        inputs = given if len(given) == len(defaults) else (*given, *defaults[len(given) :])
        if torch._C._is_fwd_grad_enabled() and _may_have_tangents():
            moving = tuple(_tangent(x) for x in inputs)
            if any(t is not None for t in moving):
                return forward_mode(inputs, moving)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            # What torch.func has wrapped for this level is differentiated at this level, as by any op of torch.
            with enable_single_level_autograd_function():
                return Rule.apply(keyset, *inputs)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward_mode(inputs: tuple[Any, ...], moving: tuple[Tensor | None, ...]) -> Any:
        if tangents is None:
            raise NotImplementedError(
                f"arcore::{op} has no forward-mode derivative; use reverse mode (torch.autograd.grad, torch.func.vjp), "
                f"or the reference in plain PyTorch"
            )
        primals = tuple(_primal(x) for x in inputs)
        outputs = overload(*primals)
        several = isinstance(outputs, tuple)
        results = tangents(primals, outputs if several else (outputs,), moving)
        duals = tuple(
            x if t is None else torch._VF._make_dual(x, t, level=0)
            for x, t in zip(outputs if several else (outputs,), results, strict=True)
        )
        return duals if several else duals[0]

    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


class _WithoutFirst:
    """A context as the rule of an op knows it: without the argument that the kernel puts before the op's own."""

    def __init__(self, ctx: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        needed: tuple[bool, ...] = self._ctx.needs_input_grad[1:]
        return needed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _may_have_tangents() -> bool:
    """False only where a tangent is impossible: a level of forward mode is open, or somebody traces or transforms."""
    return (
        forward_ad._current_level >= 0
        or _interpreters() is not None
        or _len_torch_dispatch_stack() > 0
        or torch.compiler.is_compiling()
    )


# torch has one level of forward mode, 0. `torch.autograd.forward_ad.unpack_dual` asks a Python variable for it that a
# compiled graph does not set.
def _tangent(x: Any) -> Tensor | None:
    if not isinstance(x, Tensor):
        return None
    tangent: Tensor | None = torch._VF._unpack_dual(x, level=0)[1]
    return tangent


def _primal(x: Any) -> Any:
    return torch._VF._unpack_dual(x, level=0)[0] if isinstance(x, Tensor) else x


def forbid_second_derivative(op: str) -> None:
    """Make differentiating ``arcore::<op>_backward`` an error that names the reference, instead of a wrong zero."""

    def refuse(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(_no_second_derivative(op))

    torch.library.register_autograd(f"arcore::{op}_backward", refuse)


def forbid_further_derivatives(op: str, *of: str) -> None:
    """`forbid_second_derivative` in either mode and under `torch.func`, for ``arcore::<op>_<each of these>``."""
    for name in of:
        forbid_derivative(f"{op}_{name}", _no_second_derivative(op))


def _no_second_derivative(op: str) -> str:
    return f"arcore::{op} has no second derivative; use reference_{op} where you need one"


def forbid_derivative(op: str, message: str) -> None:
    """Make differentiating ``arcore::<op>``, in either mode, an error with this message."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(message)

    register_derivatives(op, refuse, lambda ctx, inputs, output: None, refuse)


def register_vmap(op: str) -> None:
    """Let `torch.vmap` call ``arcore::<op>`` once per entry: the op has a batch dimension of its own.

    torch would do the same, but with a warning.
    """
    overload = getattr(torch.ops.arcore, op).default

    def rule(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def entry(i: int) -> list[Any]:
            return [a if d is None else a.select(d, i) for a, d in zip(arguments, dims, strict=True)]

        results = [overload(*entry(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(f"arcore::{op}", rule)


def refuse_derivatives(op: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would expect a derivative of an op that writes in place and has none.

    Args:
        op: the public function's name.
        tensors: its float arguments.

    Raises:
        RuntimeError: gradients are being recorded and one of the tensors requires them.
        NotImplementedError: one of them has a forward-mode tangent.
    """
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"arcore.{op}: expected tensors without gradients, since it writes in place and has none, but one "
                    f"requires them; call it under torch.no_grad(), detach() the tensors, or use the op over whole "
                    "sequences"
                )
    if forward_ad._current_level >= 0 and any(_tangent(t) is not None for t in tensors):
        raise NotImplementedError(
            f"arcore.{op}: expected tensors without forward-mode tangents but got some: it writes in place and has no "
            f"derivative; use the op over whole sequences, or reference_{op}"
        )


def refuse_zero_derivative(op: str, *tensors: Any) -> None:
    """Raise where a transform of `torch.func`, or a tangent, asks for the derivative of numbers that have none.

    Plain autograd says so by itself: what such an op returns does not require grad. Under `torch.func.grad`, `jacrev`,
    `jvp` and with dual numbers the same is a derivative of 0, without a word.

    Args:
        op: the public function's name.
        tensors: its float arguments, or None.

    Raises:
        NotImplementedError: one of them is being differentiated.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    if forward_ad._current_level < 0 and functorch.peek_interpreter_stack() is None:
        return
    for t in tensors:
        tracked = False
        while isinstance(t, Tensor) and not tracked:
            wrapped = functorch.is_functorch_wrapped_tensor(t)
            # Of a batched tensor torch cannot tell whether it has a tangent; what it wraps tells.
            if not functorch.is_batchedtensor(t):
                tracked = _tangent(t) is not None or (functorch.is_gradtrackingtensor(t) and t.requires_grad)
            if not wrapped:
                break
            t = functorch.get_unwrapped(t)
        if tracked:
            raise NotImplementedError(
                f"arcore.{op}: expected arguments that nothing is differentiated by, but torch.func or a dual number "
                "asks for a derivative and these results have none; detach() the arguments, or compute them in plain "
                "PyTorch"
            )


def has_tangents(*tensors: Any) -> bool:
    """Whether forward mode (`torch.func.jvp`, dual numbers) follows one of them; not asked where a graph is traced."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    if forward_ad._current_level < 0 and functorch.peek_interpreter_stack() is None:
        return False
    for t in tensors:
        while isinstance(t, Tensor):
            wrapped = functorch.is_functorch_wrapped_tensor(t)
            # Of a batched tensor torch cannot tell whether it has a tangent; what it wraps tells.
            if not functorch.is_batchedtensor(t) and _tangent(t) is not None:
                return True
            if not wrapped:
                break
            t = functorch.get_unwrapped(t)
    return False


def mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd that a kernel has written into `tensors`, so that it refuses to use older saved values of them."""
    if torch.compiler.is_compiling():  # functionalised: what is written is a new value there
        return
    for t in tensors:
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)


def untracked(*inputs: Any) -> bool:
    """Whether a call on `inputs` runs at once and nobody differentiates it, transforms it or follows it.

    The rules of autograd are Python and take longer than a small kernel; where they have nothing to do, a public
    function goes past them, by `call_below`.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if _interpreters() is not None or _len_torch_dispatch_stack() > 0:
        return False
    return not torch.is_grad_enabled() or not torch._C._any_requires_grad(*inputs)


def call_below(call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)`` of an op without its rules of autograd; for what is `untracked`."""
    with torch._C._AutoDispatchBelowAutograd():
        return call(*args)


def call_in_place(overload: Any, *args: Any) -> Any:
    """``overload(*args)`` past the rules of `register_in_place`, for a caller that has refused derivatives itself.

    Those rules are Python and take longer than a decode step; the caller counts what was written, by `mark_written`.
    """
    if torch.compiler.is_compiling():
        return overload(*args)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return overload(*args)


def register_in_place(op: str) -> None:
    """Let ``arcore::<op>``, which writes into arguments and has no derivative, do as torch's own ops do.

    The version of what is written goes up; arguments that require grad or have a forward-mode tangent are refused.
    """
    overload = getattr(torch.ops.arcore, op).default
    arguments = overload._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def refuse(keyset: Any, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if recorded or (torch._C._is_fwd_grad_enabled() and any(_tangent(x) is not None for x in tensors)):
            raise RuntimeError(
                f"arcore::{op} writes in place and has no derivative, but an argument requires grad; "
                "call it under torch.no_grad() or with detached tensors"
            )
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def count(keyset: Any, *args: Any) -> Any:
        result = overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        mark_written(*(args[i] for i in written if i < len(args)))
        return result

    _LIBRARY.impl(op, refuse, "Autograd", with_keyset=True)
    _LIBRARY.impl(op, count, "ADInplaceOrView", with_keyset=True)
