"""Makes the Mamba models of transformers run on our kernels.

    import arcore.integrations.transformers as kernels

    with kernels.enable():
        model.generate(...)

transformers picks its implementation of the scan when a modelling file is imported: that of the package mamba_ssm where
there is one, which needs a GPU, else PyTorch code that loops over tokens. `enable` puts our ops into the place of the
chosen functions in these files. Models that exist already use them too, because they look the functions up by name when
they run.
"""

from __future__ import annotations

import functools
import importlib
import math
import pathlib
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from arcore._optional import require
from arcore.integrations._transformers_models import TransformersModel as TransformersModel
from arcore.integrations._transformers_models import register_attention as register_attention
from arcore.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update, ssd

_ACTIVATIONS = (None, "silu", "swish")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A function of a modelling file for which transformers looks for a kernel.
_KERNEL = re.compile(r"@use_kernel_func_from_hub_with_fallback\([^)]*\)\s*def (\w+)")

_originals: dict[tuple[str, str], Callable[..., Any]] = {}


class Enabled:
    """What `enable` returns; as a context manager it undoes the call at the end of the block.

    Attributes:
        models: families of transformers whose functions are replaced, by the names of their folders.
    """

    def __init__(self, changed: bool) -> None:
        self._changed = changed
        self.models = tuple(_MODELS)

    @functools.cached_property
    def left_alone(self) -> dict[str, tuple[str, ...]]:
        """Functions that transformers would take from a package of kernels and that stay as they were, by family.

        Found in the text of transformers' modelling files, so that families of later versions are named too.
        """
        folder = pathlib.Path(require("transformers", extra="transformers").__file__).parent / "models"
        found = {}
        for path in sorted(folder.glob("*/modeling_*.py")):
            functions = _KERNEL.findall(path.read_text(encoding="utf-8"))
            ours = _MODELS.get(path.parent.name, {})
            rest = tuple(name for name in functions if name not in ours)
            if rest:
                found[path.parent.name] = rest
        return found

    def __repr__(self) -> str:
        rest = ", ".join(f"{name} ({', '.join(f)})" for name, f in self.left_alone.items())
        return f"Enabled(models={', '.join(self.models)}; left alone: {rest or 'nothing'})"

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._changed:
            disable()


def enable() -> Enabled:
    """Let the Mamba models of transformers use our convolution, our scan and their decoding steps.

    These are Mamba, FalconMamba, Jamba and Zamba, and with Mamba-2's scan Mamba-2, Bamba, FalconH1, GraniteMoeHybrid,
    NemotronH and Zamba2. Attention and other layers of the mixed ones stay as they are, and so do families that are not
    named here; the result's `left_alone` lists their functions.

    Calls that our kernels cannot serve go to the functions that were there before: tensors on other devices, float64,
    other activations than SiLU, and tracing by `torch.export`; so do packed sequences, which these models do not tell
    the scan about. The fused training functions of mamba_ssm are switched off, because they are not told about padding.
    Calling this twice does no harm.

    Returns:
        For `with`: the end of the block calls `disable`, unless an outer block had it enabled already. Printed, it
        tells what was replaced and what was not.

    Raises:
        ImportError: transformers is missing.
        RuntimeError: this version of transformers is built differently.
    """
    if _originals:
        return Enabled(changed=False)
    transformers = require("transformers", extra="transformers")
    found: list[tuple[Any, str, Callable[..., Any]]] = []
    for name, replacements in _MODELS.items():
        try:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            found += [(module, function, getattr(module, function)) for function in replacements]
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"transformers {transformers.__version__} keeps its functions for {name} elsewhere than version 5.23 "
                f"does ({error}); install transformers 5.23"
            ) from error
    for module, function, original in found:
        _originals[module.__name__, function] = original
        setattr(module, function, (_MAMBA | _MAMBA2)[function](original))
    return Enabled(changed=True)


def disable() -> None:
    """Put everything back as `enable` found it; without `enable` this does nothing."""
    while _originals:
        (module, function), original = _originals.popitem()
        setattr(importlib.import_module(module), function, original)


def is_enabled() -> bool:
    """Whether transformers uses our kernels."""
    return bool(_originals)


def _ours(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    return all(t.is_cpu and t.dtype in _DTYPES for t in given) and not torch.compiler.is_exporting()


def _packed(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens"))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _scan(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = (hidden_states, dt, A, B, C, D, z, delta_bias)
        if not _ours(*tensors) or _packed(kwargs):
            return original(*tensors, delta_softplus, return_last_state, **kwargs)
        return selective_scan(
            hidden_states,
            dt,
            A.float(),
            B,
            C,
            _float(D),
            z,
            _float(delta_bias),
            delta_softplus,
            return_last_state,
        )

    return mamba_selective_scan


def _chunk_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not _ours(hidden_states, dt, A, B, C, D, dt_bias, initial_states, z) or _packed(kwargs):
            rest = (D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)
            return original(hidden_states, dt, A, B, C, chunk_size, *rest, z=z, **kwargs)
        return ssd(
            hidden_states,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            dt_softplus,
            return_final_states,
            dt_limit=dt_limit,
            initial_state=initial_states,
        )

    return mamba2_chunk_scan


def _state_update(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mamba_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        tensors = (state, hidden_states, dt, A, B, C, D, dt_bias, z)
        if not _ours(*tensors):
            return original(*tensors[:6], D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs)
        with torch.no_grad():
            return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return mamba_selective_state_update


def _convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if not _ours(hidden_states, weight, bias) or activation not in _ACTIVATIONS or _packed(kwargs):
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        return causal_conv1d(hidden_states, weight, bias, activation=activation)

    return causal_conv1d_fn


def _convolution_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        if not _ours(hidden_states, conv_state, weight, bias) or activation not in _ACTIVATIONS:
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        with torch.no_grad():
            return causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)

    return replacement


def _no_fusion(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def nothing(projected: Tensor, *args: Any, **kwargs: Any) -> Any:
        # None means: take the way through the scan, which knows about padding.
        return None if _ours(projected) else original(projected, *args, **kwargs)

    return nothing


_Replacements = dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]
_CONVOLUTION: _Replacements = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
}
_MAMBA: _Replacements = _CONVOLUTION | {
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": _state_update,
    "mamba_inner_fn": _no_fusion,
}
_MAMBA2: _Replacements = _CONVOLUTION | {
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _state_update,
    "mamba2_split_conv1d_scan_combined": _no_fusion,
}
# Zamba has no fused training function.
_ZAMBA = {name: f for name, f in _MAMBA.items() if name != "mamba_inner_fn"}
_MODELS = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": _MAMBA,
    "zamba": _ZAMBA,
    "mamba2": _MAMBA2,
    "bamba": _MAMBA2,
    "falcon_h1": _MAMBA2,
    "granitemoehybrid": _MAMBA2,
    "nemotron_h": _MAMBA2,
    "zamba2": _MAMBA2,
}
