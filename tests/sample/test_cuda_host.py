"""The sm_80 kernels, run on the CPU by tests/cuda_host: the CPU kernels' own tests, and the same tokens as theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.ops import confidence_mask, filter_probs, sample
from tests.cuda_host.build import CudaHost, installed, unavailable
from tests.sample import test_contract as contract
from tests.sample import test_reference as reference

unable = unavailable()
pytestmark = pytest.mark.skipif(unable is not None, reason=unable or "")

SHARED = {
    reference: ["test_random_calls", "test_confidence_masks"],
    contract: [
        "test_a_draw_is_the_inverse_cdf_of_filter_probs",
        "test_layouts_change_nothing",
        "test_half_precision_is_widened_first",
        "test_rows_may_have_their_own_settings",
        "test_bad_rows_stay_alone",
        "test_nan_where_nobody_may_look_is_harmless",
        "test_guidance_never_makes_nan",
        "test_several_sources_are_mixed",
        "test_masks_in_both_forms",
        "test_penalties_count_the_history_only",
        "test_orders_differ_as_documented",
        "test_temperature_zero_and_greedy",
        "test_confidence_masks_choose_the_least",
    ],
}
for module, names in SHARED.items():
    globals().update({name: getattr(module, name) for name in names})


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"typical_p": 0.8},
    {"min_p": 0.05, "eta": 1e-3, "epsilon": 1e-4, "order": "joint"},
    {"top_k": 5, "min_p": 0.1, "order": "vllm"},
    {"top_p": 0.95, "mode": "gumbel"},
]
VOCABS = [1, 17, 1000, 4097]


def tokens_of(vocab: int, settings: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator) * 3
    logits[1] = (logits[1] * 2).round() / 2  # ties
    draws = 20 if "mode" in settings else 500
    return sample(logits, seed=torch.arange(3), num_samples=draws, **settings)


@pytest.fixture(scope="module")
def tokens_of_the_cpu() -> dict[tuple[int, int], Tensor]:
    return {(v, i): tokens_of(v, SETTINGS[i]) for v in VOCABS for i in range(len(SETTINGS))}


@pytest.fixture(autouse=True)
def host(tokens_of_the_cpu: dict[tuple[int, int], Tensor]) -> Iterator[CudaHost]:
    with installed("sample") as kernels:
        yield kernels


@pytest.mark.parametrize("i", range(len(SETTINGS)), ids=lambda i: str(SETTINGS[i]))
@pytest.mark.parametrize("vocab", VOCABS)
def test_the_tokens_of_the_cpu(
    host: CudaHost, tokens_of_the_cpu: dict[tuple[int, int], Tensor], vocab: int, i: int
) -> None:
    """Bit for bit: the same keys give the same tokens, rounding ties included."""
    for seed in (0, 1):
        host.set_seed(seed)
        assert torch.equal(tokens_of(vocab, SETTINGS[i]), tokens_of_the_cpu[vocab, i])
    assert host.statistics()["blocks"] == 3


def test_long_rows_lie_in_global_memory() -> None:
    """Above 24576 tokens; against the distribution, by the rule of the draw."""
    logits = torch.randn(1, 30000) * 3
    probs = filter_probs(logits, top_k=50, top_p=0.9)
    assert (probs > 0).sum() <= 50
    drawn = sample(logits, seed=7, num_samples=64, top_k=50, top_p=0.9)
    assert (probs[0, drawn[0]] > 0).all()
    assert drawn.unique().numel() > 5
    assert confidence_mask(torch.rand(1, 30000), 100).sum() == 100
