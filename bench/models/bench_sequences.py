"""Sequence models in training beside plain PyTorch: `pytest bench/models/bench_sequences.py`.

A step is forward and backward of the model's own loss. The plain form has the same weights and PyTorch's attention with
the mask as a matrix of booleans, made anew for each batch where the mask depends on it; BICO's reads in both directions
with two matrices of scores, as the released code does. Losses and gradients are compared before the time is taken. One
thread, process CPU time, the two take turns. No model may be slower than its plain form, up to a tenth for noise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import interleaved_seconds
from torch import Tensor

import arcore
from arcore.zoo.biology.crossnovo.spectra import batch_of, compute_spectrum, padded, random_peptides
from arcore.zoo.biology.xtrimopglm.blanks import IGNORED, blank
from arcore.zoo.dynamics.lifegpt.model import hide, lessons, random_states
from arcore.zoo.language.bico import objective as bico

LIMIT = 1.1
# Where the op is looked up when a layer runs.
PLACES = ("arcore.nn.attention", "arcore.nn.decoder", "arcore.zoo.language.bico.objective")


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float | None = None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_bool(), scale=scale, enable_gqa=grouped)


@contextmanager
def plain_attention() -> Iterator[None]:
    modules: list[Any] = [importlib.import_module(name) for name in PLACES]
    own = [module.block_sparse_attention for module in modules]
    for module in modules:
        module.block_sparse_attention = dense
    try:
        yield
    finally:
        for module, op in zip(modules, own, strict=True):
            module.block_sparse_attention = op


def two_matrices(q: Tensor, k: Tensor, v: Tensor, angles: Any, mask: Any) -> Tensor:
    """BICO's attention from both matrices of scores, of which each entry takes one."""
    forwards, backwards = angles
    scores = [torch.einsum("bihd,bjhd->bhij", one.turn(q), one.turn(k)) for one in (forwards, backwards)]
    length = q.shape[1]
    whole = torch.where(torch.ones(length, length, dtype=torch.bool).tril(), *scores) * q.shape[-1] ** -0.5
    seen = mask.to_bool()
    kept = seen[..., :length] | seen[..., length:]
    law = whole.masked_fill(~kept, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", law, v)


def prepared(name: str) -> tuple[Any, Callable[[], Tensor]]:
    """A model and its loss on a fixed batch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if name == "xtrimopglm":
        model: Any = arcore.create_model(
            "xtrimopglm_deep_tiny", dim=256, num_heads=8, hidden_dim=512, num_layers=4
        )
        specials = model.vocabulary.specials
        texts = torch.randint(1, 20, (8, 256), generator=generator).tolist()
        rows = [
            blank(text, [(100, 120), (20, 30)], mask=specials.span_mask, sop=specials.sop, eop=specials.eop)
            for text in texts
        ]
        ids, targets, positions, prefix = (torch.stack(part) for part in zip(*rows, strict=True))
        return model, lambda: F.cross_entropy(
            model(ids, positions, prefix).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
    if name == "ernie3":
        model = arcore.create_model("ernie3_tiny", dim=256, heads=8, layers=4)
        ids = torch.randint(256, (8, 256), generator=generator)

        def both() -> Tensor:
            one, other = model.both(ids)
            return (one * other).square().mean()

        return model, both
    if name == "crossnovo":
        model = arcore.create_model("crossnovo_tiny", dim=128, slots=32, peaks=128)
        peptides = random_peptides(16, 8, 12, generator)
        batch = batch_of([compute_spectrum(one, generator) for one in peptides], 128)
        rows = padded(peptides, 12)
        return model, lambda: sum(model.losses(batch, rows), torch.zeros(()))
    if name == "lifegpt":
        model = arcore.create_model("lifegpt_tiny", dim=128, num_layers=3)
        ids, targets = lessons(random_states(8, 1, 128, generator), "110")
        hidden = hide(ids, 0.15)
        return model, lambda: F.cross_entropy(
            model.forward_hiding(ids, hidden).flatten(0, 1), targets.flatten(), ignore_index=-100
        )
    model = arcore.create_model("llama_tiny", dim=256, num_heads=4, num_kv_heads=4, num_layers=3)
    ids = torch.randint(200, (8, 256), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.15
    masked[:, 0] = False
    return model, lambda: bico.masked_loss(bico.read_both_ways(model, ids, masked), ids, masked)


@pytest.mark.parametrize("name", ["xtrimopglm", "ernie3", "crossnovo", "lifegpt", "bico"])
def bench_sequences(benchmark: Any, name: str) -> None:
    model, loss = prepared(name)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[Tensor, ...]:
        value = loss()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return (value.detach(), *(g for g in found if g is not None))

    def plain() -> tuple[Tensor, ...]:
        with plain_attention(), pytest.MonkeyPatch.context() as patch:
            if name == "bico":
                patch.setattr(bico, "attend_both_ways", two_matrices)
            return step()

    for ours, theirs in zip(step(), plain(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4 * float(theirs.abs().max()) + 1e-7)
    found = interleaved_seconds({"arcore": step, "plain PyTorch": plain}, rounds=5)
    benchmark.extra_info.update(
        op="sequences", case=name, impl="arcore", direction="forward+backward", seconds=found["arcore"],
        peers={"plain PyTorch": found["plain PyTorch"]},
    )  # fmt: skip
    benchmark.pedantic(step, rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    """Milliseconds, and the share of the plain form's time."""
    lines = []
    for record in records:
        if record.get("op") != "sequences":
            continue
        share = record["seconds"] / record["peers"]["plain PyTorch"]
        lines.append(
            f"{'ok' if share <= LIMIT else 'ABOVE':6}{record['case']:12} {record['seconds'] * 1e3:8.1f} ms, "
            f"{share:.2f} of plain PyTorch's time (<= {LIMIT})"
        )
    return lines
