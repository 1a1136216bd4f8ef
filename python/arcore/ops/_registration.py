"""What the ops share when they register their rules with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forbid_second_derivative(op: str) -> None:
    """Make differentiating ``arcore::<op>_backward`` an error that names the reference, instead of a wrong zero."""

    def refuse(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"arcore::{op} has no second derivative; use reference_{op} where you need one")

    torch.library.register_autograd(f"arcore::{op}_backward", refuse)
