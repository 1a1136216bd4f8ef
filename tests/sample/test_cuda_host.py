"""The sm_80 kernels, run on the CPU by tests/cuda_host: the CPU kernels' own tests, and the same tokens as theirs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.ops import confidence_mask, filter_probs, sample
from tests.cuda_host.build import HERE, CudaHost, build_library, installed, unavailable
from tests.sample import test_contract as contract
from tests.sample import test_reference as reference
from tests.sample.cases import INF, adversarial_rows

unable = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(unable is not None, reason=unable or "")]

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


def test_long_rows_are_made_by_slices() -> None:
    """Above 16384 tokens without clusters; against the distribution, by the rule of the draw."""
    logits = torch.randn(1, 30000) * 3
    probs = filter_probs(logits, top_k=50, top_p=0.9)
    assert (probs > 0).sum() <= 50
    drawn = sample(logits, seed=7, num_samples=64, top_k=50, top_p=0.9)
    assert (probs[0, drawn[0]] > 0).all()
    assert drawn.unique().numel() > 5
    assert confidence_mask(torch.rand(1, 30000), 100).sum() == 100


# ---- a row by several blocks ----

WANTED = {"return_prob": True, "return_kept": True, "return_valid": True, "return_entropy": True}


def calls() -> list[tuple[Tensor, dict[str, Any]]]:
    """Logits and arguments of `sample` that reach every way of making keys, finding thresholds and drawing."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for vocab in (1100, 4099):
        rows = torch.stack(list(adversarial_rows(vocab).values()))
        rows[0, 7], rows[1, 9] = INF, math.nan
        n = len(rows)
        made += [
            (rows, {"top_k": 700, "top_p": 0.9, "num_samples": 9}),
            (rows, {"top_p": 0.97, "typical_p": 0.9, "eta": 1e-3, "min_p": 1e-4, "order": "joint"}),
        ]
        listed = {
            "history": torch.randint(-1, vocab + 1, (n, 300), generator=generator),
            "prompt": torch.randint(0, vocab, (40,), generator=generator),
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": torch.rand(n, generator=generator),
        }
        mask = torch.rand(n, vocab, generator=generator) < 0.7
        made.append((rows.bfloat16(), {"mask": mask, "top_k": 300, "mode": "gumbel", **listed}))
        uncond, bias = torch.randn(n, vocab, generator=generator), torch.randn(vocab, generator=generator)
        made.append((rows, {"uncond": uncond, "cfg_scale": 1.5, "bias": bias, "top_p": 0.8}))
    made.append((rows[:4], {"temperature": torch.tensor([0.0, 0.5, 0.0, 1.0]), "mode": "greedy"}))
    return made


def answers() -> list[dict[str, Tensor]]:
    results = []
    for logits, kw in calls():
        drawn = sample(logits, seed=torch.arange(len(logits)), **{"num_samples": 3, **kw}, **WANTED)
        results.append(
            {name: getattr(drawn, name) for name in ("tokens", "valid", "kept", "prob", "entropy")}
        )
    return results


@pytest.fixture(scope="module")
def answers_of_the_cpu(tokens_of_the_cpu: Any) -> list[dict[str, Tensor]]:
    return answers()


@pytest.mark.parametrize("blocks", ["1", "slices", "2", "8"])
def test_the_blocks_of_a_row_change_nothing(
    host: CudaHost,
    answers_of_the_cpu: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    blocks: str,
) -> None:
    """One block, slices, or a cluster: the tokens, kept sets and probabilities of the CPU, bit for bit."""
    monkeypatch.setenv("ARCORE_SAMPLE_BLOCKS", blocks)
    host.set_cluster_limit(16)
    try:
        results = answers()
    finally:
        host.set_cluster_limit(0)
    for i, (ours, theirs) in enumerate(zip(results, answers_of_the_cpu, strict=True)):
        for name in ("tokens", "valid", "kept", "prob"):
            same = (ours[name] == theirs[name]) | (ours[name] != ours[name]) & (theirs[name] != theirs[name])
            assert same.all(), f"call {i}: {name}"
        torch.testing.assert_close(ours["entropy"], theirs["entropy"], equal_nan=True)
    if blocks.isdigit():
        assert host.statistics()["blocks"] == 4 * int(blocks)


def test_a_wish_that_no_cluster_grants(host: CudaHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for wish in ("2", "3", "many"):
        monkeypatch.setenv("ARCORE_SAMPLE_BLOCKS", wish)
        with pytest.raises(
            RuntimeError, match='expected ARCORE_SAMPLE_BLOCKS to be "slices" or a power of two'
        ):
            sample(torch.randn(2, 100))


@pytest.mark.parametrize("kind", ["processed", "raw"])
def test_log_probabilities_of_clusters(host: CudaHost, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """They are summed by a second launch, over keys that the blocks have left."""
    logits = torch.randn(2, 3000)
    kw: dict[str, Any] = {"top_k": 100, "seed": torch.arange(2), "num_samples": 4, "return_logprob": kind}
    alone = sample(logits, **kw)
    host.set_cluster_limit(16)
    monkeypatch.setenv("ARCORE_SAMPLE_BLOCKS", "4")
    try:
        shared = sample(logits, **kw)
    finally:
        host.set_cluster_limit(0)
    assert torch.equal(alone.tokens, shared.tokens) and torch.equal(alone.logprob, shared.logprob)


def test_how_many_blocks_a_row_gets() -> None:
    """On 132 multiprocessors: (rows, vocabulary, limit of clusters) to blocks; 0 is a row made by slices."""
    native = ctypes.CDLL(str(build_library([HERE / "blocks_of_row.cpp"])))
    native.blocks_of_row.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    expected = {
        (8, 128256, 16): 16,
        (8, 128256, 8): 8,
        (8, 128256, 1): 0,
        (64, 128256, 16): 4,
        (1000, 128256, 16): 4,
        (1, 4096, 16): 2,
        (1360, 4096, 16): 1,
        (8, 16384, 1): 1,
        (8, 16385, 1): 0,
        (8, 32000, 16): 8,
        (1, 10**6, 16): 0,
        (1, 0, 16): 1,
    }
    assert {call: native.blocks_of_row(*call, 132) for call in expected} == expected
