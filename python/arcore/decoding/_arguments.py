"""Arguments of the loops that are refused before a model runs, and results that no model should give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arcore.nn.checks import check_number, dtype_name
from arcore.nn.protocols import (
    BlockModel,
    FrameModel,
    MaskedModel,
    ScaleModel,
    ScaleTokenizer,
    TokenModel,
    VectorTokenizer,
)
from arcore.schedules import Solver

# Which loop draws from which kind of model.
LOOPS: dict[type, str] = {
    ScaleModel: "generate_next_scale",
    FrameModel: "generate_frames",
    BlockModel: "generate_blocks",
    MaskedModel: "generate_masked",
    TokenModel: "generate",
}


def check_kind(name: str, model: object, kind: type) -> None:
    """Refuse what does not offer what a loop needs.

    Args:
        name: of the argument.
        model: what came.
        kind: one of the protocols of `arcore.nn.protocols`.

    Raises:
        TypeError: attributes or methods are missing; names them, and the loop that fits.
    """
    if isinstance(model, type):
        raise TypeError(
            f"expected {name} to be a model but got the class {model.__name__}: make one of it first"
        )
    if isinstance(model, kind):
        return
    needed = [part for part in vars(kind) if part[0] != "_"]
    lacking = [part for part in needed if not hasattr(model, part)]
    came = type(model).__name__
    other = next((loop for protocol, loop in LOOPS.items() if isinstance(model, protocol)), None)
    if isinstance(model, ScaleTokenizer) and kind not in (ScaleTokenizer, VectorTokenizer):
        hint = "it is a tokenizer"
    elif other is not None:
        hint = f"draw from it with arcore.decoding.{other}"
    elif isinstance(model, nn.Module):
        hint = f"it lacks {', '.join(lacking) or 'a call'}"
    else:
        hint = f"expected a model of the zoo or your own with {', '.join(needed)}"
    raise TypeError(f"expected {name} to be a {kind.__name__} but got {came}; {hint}")


def check_labels(labels: object) -> None:
    """Refuse labels that are no int64 `[B]`.

    Raises:
        TypeError: no tensor, or no int64.
        ValueError: another shape.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"expected labels as an int64 tensor [B] but got {type(labels).__name__}; use torch.tensor(labels)"
        )
    if labels.dim() != 1:
        raise ValueError(f"expected labels of shape [B] but got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(
            f"expected labels of dtype int64 but got {dtype_name(labels.dtype)}; use labels.long()"
        )


def check_guidance(cfg_scale: object) -> float:
    """The strength of guidance as a float.

    Raises:
        TypeError: no number.
        ValueError: negative or not finite.
    """
    number = check_number("cfg_scale", cfg_scale)
    if number < 0:
        raise ValueError(f"expected cfg_scale >= 0 but got {cfg_scale}")
    return number


def check_solver(solver: object) -> None:
    """Refuse a solver that is none, such as its name.

    Raises:
        TypeError: it is none.
    """
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"expected solver to be one of arcore.schedules, such as DDIM(model.schedule, model.prediction), but got "
            f"{solver!r}"
        )


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor or None."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor but got {type(value).__name__}")


def check_context(context: object, batch: int, inner: tuple[int, ...], most: int, what: str) -> None:
    """Refuse clean first blocks or frames that do not fit.

    Args:
        context: `[B, K, *S]`, or None.
        batch: B.
        inner: S.
        most: of blocks or frames in all; K is smaller.
        what: "blocks" or "frames".

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape, or values that are not finite.
    """
    check_tensor("context", context)
    if context is None:
        return
    assert isinstance(context, Tensor)
    fits = context.dim() == 2 + len(inner) and (context.shape[0], *context.shape[2:]) == (batch, *inner)
    if not fits or not context.shape[1] < most:
        raise ValueError(
            f"expected context of shape {(batch, 'K', *inner)} with fewer than {most} {what} "
            f"but got {tuple(context.shape)}"
        )
    if not context.is_floating_point():
        raise TypeError(f"expected context of a floating dtype but got {dtype_name(context.dtype)}")
    if not bool(context.isfinite().all()):
        raise ValueError("expected a context of finite values but it has NaN or infinite ones")


def check_drawn(values: Tensor, what: str) -> None:
    """Refuse to go on with, or to return, values that are not finite.

    Raises:
        ValueError: some are not.
    """
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"the model gave NaN or infinite values in {what}; in float16 it may overflow: use bfloat16 or float32, "
            "and see that the weights are trained and finite"
        )


def dtype_of(model: object) -> torch.dtype:
    """Of the weights of a model; float32 where it has none."""
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    return torch.float32 if first is None else first.dtype
