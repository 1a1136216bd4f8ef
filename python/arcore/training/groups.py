"""What an optimiser trains, apart from Lightning, so that a short training by hand needs none of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from arcore.nn.kinds import check_kinds


@check_kinds
def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What an optimiser trains, with and without weight decay.

    Vectors are not decayed, nor what a module names in its attribute `no_weight_decay`.
    """
    exempt = {
        id(parameter)
        for part in module.modules()
        for name in getattr(part, "no_weight_decay", ())
        if (parameter := getattr(part, name)) is not None
    }
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in exempt]
    others = [p for p in parameters if p.ndim < 2 or id(p) in exempt]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
