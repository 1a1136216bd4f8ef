"""Mamba of 130 M parameters beside transformers: reading a prompt, and writing token by token. float32, one thread.

Both models have the same random weights. Most of the time goes into matrix products, so each line says how much, by
measuring them alone: transformers' through `torch.nn.functional.linear`, ours through `arcore.nn.linear`. For a single
row they read 516 MB of weights per token, and that is the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import cpu_seconds
from torch import Tensor

import arcore
from arcore.integrations.transformers import enable
from arcore.nn import linear

PROMPT = 1024
TOKENS = 8
CASES = {"prefill": 1, "decode": 1, "decode_16": 16}
IMPLEMENTATIONS = ("arcore", "transformers", "transformers+arcore")

# (case, how many times faster than transformers alone arcore must be in the same run).
FLOORS = {"prefill": 5.0, "decode": 1.15, "decode_16": 2.0}


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    found = {(r["case"], r["impl"]): r for r in records if r.get("op") == "mamba_130m"}
    lines = []
    for (case, impl), r in found.items():
        inside = r["matmul_seconds"]
        lines.append(
            f"{case:<10} {impl:<20} {r['seconds'] * 1e3:8.1f} ms, {r['tokens_per_second']:7.1f} tokens/s; "
            f"{inside * 1e3:.1f} ms in matrix products, {(r['seconds'] - inside) * 1e3:.1f} ms outside"
        )
    for case, least in FLOORS.items():
        ours, theirs = found.get((case, "arcore")), found.get((case, "transformers"))
        if ours and theirs:
            ratio = theirs["seconds"] / ours["seconds"]
            lines.append(
                f"{'ok   ' if ratio >= least else 'BELOW'} {case}: {ratio:.2f} x transformers, floor {least:g}"
            )
    return lines


@cache
def models() -> tuple[Any, Any]:
    """Ours and theirs, with our initial weights: theirs blow up rounding errors from layer to layer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours: Any = arcore.create_model("mamba_130m").eval()
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=24)).eval()
    renamed = {f"backbone.{name}": weight for name, weight in ours.state_dict().items()}
    renamed["backbone.embeddings.weight"] = renamed.pop("backbone.embedding.weight")
    theirs.load_state_dict(renamed | {"lm_head.weight": renamed["backbone.embeddings.weight"]})
    return ours, theirs


def matmuls(rows: int, head_rows: int, impl: str) -> Callable[[], None]:
    """The matrix products of one pass, with the same weights in the same order, by the function the model calls."""
    ours, _ = models()
    product = linear if impl == "arcore" else F.linear
    weights = [
        weight
        for layer in ours.layers
        for weight in (
            layer.mixer.in_proj.weight,
            layer.mixer.x_proj.weight,
            layer.mixer.dt_proj.weight,
            layer.mixer.out_proj.weight,
        )
    ]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    last = torch.randn(head_rows, ours.embedding.weight.shape[1])

    def run() -> None:
        for weight in weights:
            product(inputs[weight.shape[1]], weight)
        product(last, ours.embedding.weight)

    return run


def reader(impl: str) -> Callable[[Tensor], tuple[Tensor, Any]]:
    """Prompt to logits of the next token and cache."""
    ours, theirs = models()

    def arcore_prefill(ids: Tensor) -> tuple[Tensor, Any]:
        state = ours.make_cache(len(ids))
        return ours.prefill(ids, state), state

    def transformers_prefill(ids: Tensor) -> tuple[Tensor, Any]:
        out = theirs(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.cache_params

    return arcore_prefill if impl == "arcore" else transformers_prefill


def writer(impl: str) -> Callable[[Tensor, Any], Tensor]:
    """One token per row to logits of the next."""
    ours, theirs = models()
    if impl == "arcore":
        return lambda ids, state: ours.step(ids, state)
    return lambda ids, state: theirs(ids[:, None], cache_params=state, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def bench_mamba_130m(benchmark, case: str, impl: str):
    rows = CASES[case]
    prompt = torch.randint(50277, (rows, PROMPT if case == "prefill" else 16), generator=_seeded())
    read, write = reader(impl), writer(impl)
    with enable() if impl.endswith("+arcore") else nullcontext():
        # transformers needs half a minute for the long prompt: its first run is the one that counts.
        slow = case == "prefill" and impl == "transformers"
        expected = None if slow else reader("arcore")(prompt)[0]
        logits, state = (None, None) if slow else read(prompt)
        if expected is not None:
            error = (logits - expected).abs().max().item()
            assert error <= 1e-4 * expected.abs().max().item(), f"wrong logits (error {error:.2e}): no number"
        if case == "prefill":
            run: Callable[[], object] = lambda: read(prompt)  # noqa: E731
            seconds = _once(run) if slow else cpu_seconds(run, rounds=3)
            products, tokens = cpu_seconds(matmuls(rows * PROMPT, rows, impl), rounds=3), PROMPT
        else:
            token = torch.randint(50277, (rows,), generator=_seeded())

            def run() -> object:
                for _ in range(TOKENS):
                    out = write(token, state)
                return out

            seconds = cpu_seconds(run, rounds=5) / TOKENS
            products, tokens = cpu_seconds(matmuls(rows, rows, impl), rounds=9), rows
        benchmark.extra_info.update(
            op="mamba_130m",
            case=case,
            direction="forward",
            impl=impl,
            seconds=seconds,
            matmul_seconds=products,
            tokens_per_second=tokens / seconds,
        )
        benchmark.group = f"mamba_130m {case}"
        benchmark.pedantic(lambda: None if slow else run(), rounds=1)


def _once(run: Callable[[], object]) -> float:
    return cpu_seconds(run, rounds=1, warm_up=False)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
