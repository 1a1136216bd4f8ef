"""What must hold of sample, filter_probs and confidence_mask on a device: `check_*(device, small)`.

See tests/device_checks.py. The CPU kernels, which equal their references bit for bit, are the oracle.
"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import torch
from torch import Tensor

from arcore.ops import confidence_mask, filter_probs, reference_confidence_mask, sample
from arcore.ops._constants import constant
from tests import device_checks as checks
from tests.sample.cases import FILTERS, adversarial_rows, random_call

INF = math.inf
ALL = {"return_entropy": True, "return_valid": True, "return_kept": True}
DRAWN = {"return_logprob": "processed", "return_prob": True, **ALL}
# Distance to the edge of a token's share of [0, 1) below which a draw may fall on either side.
TIE = 2e-6

_cpu_sample, _cpu_filter_probs = sample, filter_probs


def _seeds(n: int) -> Tensor:
    return torch.arange(n) * 7919 - 3


def _same_numbers(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True, msg=lambda m: f"{what}: {m}")


def _same_distribution(device: str, logits: Any, **kw: Any) -> None:
    got = checks.on(device, filter_probs)(logits, **kw, **ALL)
    expected = _cpu_filter_probs(logits, **kw, **ALL)
    for name in ("valid", "kept", "probs"):
        checks.assert_equal(getattr(got, name), getattr(expected, name), f"{name} of {kw}")
    _same_numbers(got.entropy, expected.entropy, "entropy")


def _same_draws(device: str, logits: Any, **kw: Any) -> None:
    got = checks.on(device, sample)(logits, **kw, **DRAWN)
    expected = _cpu_sample(logits, **kw, **DRAWN)
    for name in ("tokens", "valid", "kept", "prob"):
        checks.assert_equal(getattr(got, name), getattr(expected, name), f"{name} of {kw}")
    _same_numbers(got.entropy, expected.entropy, "entropy")
    _same_numbers(got.logprob, expected.logprob, "logprob")


def check_hard_rows(device: str, small: bool) -> None:
    for vocab in (33, 300) if small else (33, 300, 4096, 32769):
        rows = torch.stack(list(adversarial_rows(vocab).values()))
        for order in ("hf", "vllm", "joint"):
            for filters in FILTERS[::4] if small else FILTERS:
                _same_distribution(device, rows, order=order, **filters)


def check_vocabularies(device: str, small: bool) -> None:
    sizes = (1, 17, 1025) if small else (1, 2, 31, 33, 1000, 4096, 8193, 16384, 32768, 32769, 65536, 128256)
    for vocab in sizes:
        named = adversarial_rows(vocab)
        rows = torch.stack([named["normal"], named["ties"]])
        for filters in ({}, {"top_k": 9}, {"top_p": 0.7}, {"top_k": 100, "top_p": 0.9, "typical_p": 0.9}):
            _same_distribution(device, rows, **filters)
            for mode in ("inverse_cdf", "gumbel", "greedy"):
                _same_draws(device, rows, seed=_seeds(2), num_samples=5, mode=mode, **filters)


def check_random_calls(device: str, small: bool) -> None:
    """Random settings: guidance, bias, masks, penalties, 16-bit logits, NaN and infinities, settings per row."""
    draw = random.Random(1)
    for _ in range(10 if small else 150):
        x, kw = random_call(draw)
        _same_distribution(device, x, **kw)
        kw |= {"seed": _seeds(3), "offset": 5, "num_samples": 3}
        _same_draws(device, x, mode=draw.choice(["inverse_cdf", "gumbel", "greedy"]), **kw)


def ties_among(tokens: Tensor, expected: Tensor, probs: Tensor, uniform: Tensor) -> int:
    """How many draws differ, after a check that each of them lies at an edge between its two tokens.

    Args: tokens, expected: `[R, S]`; probs `[R, V]`; uniform `[R, S]`, float64 in [0, 1).
    """
    rows, draws = (tokens != expected).nonzero(as_tuple=True)
    cumulative = probs.double().cumsum(-1)
    for row, i in zip(rows.tolist(), draws.tolist(), strict=True):
        low, high = sorted((int(tokens[row, i]), int(expected[row, i])))
        assert low >= 0, f"row {row}, draw {i}: token -1"
        edge = cumulative[row, low] / cumulative[row, -1]
        between = (cumulative[row, high - 1] / cumulative[row, -1] - edge).item()
        off = abs(uniform[row, i].item() - edge.item())
        assert between <= TIE and off <= TIE, (
            f"row {row}, draw {i}: token {int(tokens[row, i])} instead of {int(expected[row, i])}, {off:.1e} away "
            "from the edge between them"
        )
    return len(rows)


def check_same_tokens_as_the_cpu(device: str, small: bool) -> None:
    """A million draws: equal ids for equal keys, but for draws at a rounding edge, which are counted and printed."""
    rows, draws = (20, 50) if small else (1000, 1000)
    for vocab, filters in ((1000, {}), (4096, {"top_k": 900, "top_p": 0.96})):
        generator = torch.Generator().manual_seed(vocab)
        logits = 3 * torch.randn(rows, vocab, generator=generator)
        kw: dict[str, Any] = {"seed": _seeds(rows), "offset": torch.arange(rows) % 7, "num_samples": draws}
        tokens = checks.on(device, sample)(logits, **filters, **kw)
        expected = _cpu_sample(logits, **filters, **kw)
        bits = torch.stack(
            [torch.ops.arcore.random_bits(kw["seed"], kw["offset"], 0, d) for d in range(draws)], dim=1
        )
        uniform = ((bits >> 11) & (2**53 - 1)).double() / 2**53
        ties = ties_among(tokens, expected, _cpu_filter_probs(logits, **filters), uniform)
        print(f"sample on {device}, V={vocab}: {ties} of {rows * draws} draws at a rounding edge differ")
        assert ties <= rows * draws * TIE * 10 + 1


def check_large_vocabulary_tokens(device: str, small: bool) -> None:
    """The rows that a device splits between blocks."""
    vocab = 3000 if small else 128256
    logits = 3 * torch.randn(8, vocab, generator=torch.Generator().manual_seed(0))
    for filters in ({}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "temperature": 0.7}):
        for dtype in (torch.float32, torch.bfloat16):
            _same_draws(device, logits.to(dtype), seed=_seeds(8), num_samples=20, **filters)


def check_blocks_of_a_row(device: str, small: bool) -> None:
    """A block per row, slices, clusters of 2 to 16 where the device has them: the same tokens."""
    ways = ["1", "slices"]
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        ways += ["2", "4", "8"]
    generator = torch.Generator().manual_seed(2)
    for vocab in (500,) if small else (500, 9000, 16384):
        logits = 3 * torch.randn(5, vocab, generator=generator)
        logits[1] = (2 * logits[1]).round() / 2
        history = torch.randint(-1, vocab, (5, 700), generator=generator)
        for filters in (
            {"top_k": 50, "top_p": 0.9},
            {"top_p": 0.97, "history": history, "repetition_penalty": 1.2},
        ):
            for way in ways:
                os.environ["ARCORE_SAMPLE_BLOCKS"] = way
                try:
                    _same_draws(device, logits, seed=_seeds(5), num_samples=20, **filters)
                finally:
                    del os.environ["ARCORE_SAMPLE_BLOCKS"]


def check_layouts(device: str, small: bool) -> None:
    x = torch.randn(4, 6, 100)
    seeds = _seeds(24).view(4, 6)
    function = checks.on(device, sample)
    expected = function(x, seed=seeds, top_k=9)
    wide = torch.randn(4, 12, 200)
    wide[:, ::2, ::2] = x
    shapes = (
        (wide[:, ::2, ::2], seeds),
        (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), seeds),
        (x.view(2, 2, 6, 100), seeds.view(2, 2, 6)),
    )
    for logits, keys in shapes:
        checks.assert_equal(function(logits, seed=keys, top_k=9).view(4, 6), expected, str(logits.stride()))
    checks.assert_equal(function(x[:1].expand(4, 6, 100), seed=seeds, top_k=9)[0], expected[0], "expanded")


def check_bad_rows_stay_alone(device: str, small: bool) -> None:
    good = torch.randn(64, generator=torch.Generator().manual_seed(0))
    nan, inf, forbidden = (good.clone() for _ in range(3))
    nan[5], inf[7], inf[9], forbidden[:] = math.nan, INF, INF, -INF
    batch = torch.stack([good, nan, good, inf, forbidden, good])
    _same_draws(device, batch, seed=torch.full((6,), 3), offset=torch.arange(6), top_k=20, num_samples=50)
    _same_distribution(device, batch, top_k=20)


def check_empty(device: str, small: bool) -> None:
    for shape in ((0, 50), (3, 0, 50), (0, 0)):
        drawn = checks.on(device, sample)(torch.randn(shape), return_prob=True, return_kept=True)
        assert drawn.tokens.shape == shape[:-1]
        assert checks.on(device, filter_probs)(torch.randn(shape)).shape == shape
    none = checks.on(device, sample)(torch.randn(2, 0), return_valid=True)
    assert none.tokens.tolist() == [-1, -1] and not none.valid.any()


def check_confidence_mask(device: str, small: bool) -> None:
    function = checks.on(device, confidence_mask)
    generator = torch.Generator().manual_seed(3)
    for length in (5, 257) if small else (1, 5, 64, 257, 680, 2240, 9000):
        for confidence in (
            torch.rand(3, length, generator=generator),
            torch.randint(0, 4, (3, length), generator=generator).float(),
        ):
            confidence[0, 0], confidence[1, -1] = math.nan, -INF
            counts = torch.tensor([1, 2, 3])
            for ties in ("exact", "all", "none"):
                for count in (0, 1, length // 2, length, length + 5, counts):
                    for extra in ({}, {"candidates": confidence > 0.4}, {"temperature": 2.0}):
                        kw = {"seed": torch.tensor([4, 5, 6]), "offset": 9, "ties": ties, **extra}
                        expected = (
                            reference_confidence_mask(confidence, count, **kw)
                            if length < 100
                            else _cpu_confidence_mask(confidence, count, **kw)
                        )
                        checks.assert_equal(
                            function(confidence, count, **kw), expected, f"{length} {count} {kw}"
                        )


_cpu_confidence_mask = confidence_mask


def check_opcheck(device: str, small: bool) -> None:
    settings = torch.tensor(
        [[0.9, 5, 0.9, 0, 1, 0, 0, 1.2, 0, 0, 2.0, -1.0]], dtype=torch.float64, device=device
    )
    for dtype in (torch.float32, torch.bfloat16):
        logits = [torch.randn(2, 3, 40, device=device).to(dtype) for _ in range(2)]
        mask = torch.rand(2, 3, 40, device=device) < 0.9
        history = torch.randint(0, 40, (2, 3, 4), device=device)
        arguments = (logits, settings, torch.randn(2, 3, 40, device=device), mask, history, None)
        keys = (torch.arange(6, device=device), torch.zeros(1, dtype=torch.int64, device=device))
        for wanted in (True, False):
            torch.library.opcheck(
                torch.ops.arcore.sample.default, (*arguments, *keys, 2, 0, 0, *(wanted,) * 5)
            )
            torch.library.opcheck(torch.ops.arcore.filter_probs.default, (*arguments, 0, wanted, wanted))
    rows = torch.arange(3, device=device)
    confidence = torch.rand(3, 9, device=device)
    torch.library.opcheck(
        torch.ops.arcore.confidence_mask.default,
        (confidence, confidence < 0.5, torch.tensor([4], device=device), rows, rows, 1.0, 0),
    )


def _step(x: Tensor, y: Tensor, seed: Tensor, offset: Tensor, top_p: Tensor) -> tuple[Tensor, ...]:
    drawn = sample(
        x, uncond=y, cfg_scale=1.5, top_k=20, top_p=top_p, seed=seed, offset=offset,
        return_prob=True, return_kept=True,
    )  # fmt: skip
    again = confidence_mask(drawn.prob, 2)
    return drawn.tokens, drawn.prob, again, filter_probs(x, mask=drawn.kept)


def _step_inputs(seed: int, vocab: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (2 * torch.randn(3, 4, vocab, generator=generator) for _ in range(2))
    keys = torch.randint(0, 10**6, (3, 1), generator=generator)
    return x, y, keys, torch.arange(4), torch.rand(3, 4, generator=generator)


def check_compile(device: str, small: bool) -> None:
    inputs = [checks.moved(t, device) for t in _step_inputs(0, 50)]
    checks.assert_compiles(_step, *inputs, backend=checks.backend_for(small))


def check_graph(device: str, small: bool) -> None:
    """Sampling, masks and probabilities in a captured graph, replayed with other logits and keys, without waiting.

    Settings are plain numbers here: they too must reach the device without a copy that waits.
    """
    for vocab in (50,) if small else (50, 4096, 128256):
        checks.assert_replays(device, _step, [_step_inputs(seed, vocab) for seed in range(4)])
        inputs = [checks.moved(t, device) for t in _step_inputs(0, vocab)]
        with checks.no_host_sync(device):
            _step(*inputs)


def check_constants(device: str, small: bool) -> None:
    """Settings that are plain numbers are made once, and never taken from a capture that has not run."""
    where = torch.empty(0, device=device).device
    first = constant((0.9, 50.0), torch.float64, where)
    assert first.tolist() == [0.9, 50.0]
    if device != "cuda":
        return
    assert constant((0.9, 50.0), torch.float64, where) is first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = constant((0.9, 50.0), torch.float64, where)
        fresh = constant((0.7, 50.0), torch.float64, where)
    assert kept is first
    assert constant((0.7, 50.0), torch.float64, where).tolist() == [0.7, 50.0]
    graph.replay()
    assert fresh.tolist() == [0.7, 50.0]


def check_determinism(device: str, small: bool) -> None:
    for shape in ((5, 300),) if small else ((680, 4096), (8, 128256)):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        seeds = _seeds(shape[0]).to(device)

        def run(logits: Tensor = logits, seeds: Tensor = seeds) -> tuple[Any, ...]:
            drawn = sample(logits, seed=seeds, top_k=900, top_p=0.96, num_samples=3, **DRAWN)
            return tuple(drawn)

        checks.assert_repeatable(run, 5 if small else 50)


def check_batch_mates(device: str, small: bool) -> None:
    for vocab in (300,) if small else (300, 40000, 128256):
        x = torch.stack(list(adversarial_rows(vocab).values())).to(device)
        seeds = _seeds(len(x)).to(device)
        kw: dict[str, Any] = {"top_k": 40, "top_p": 0.9, "num_samples": 3, **DRAWN}
        whole = sample(x, seed=seeds, **kw)
        for i in range(len(x)):
            alone = sample(x[i : i + 1], seed=seeds[i : i + 1], **kw)
            checks.assert_equal(tuple(alone), tuple(t[i : i + 1] for t in whole), f"row {i}")


def check_large_offsets(device: str, small: bool) -> None:
    """Rows more than 2^31 elements apart, and more than 2^31 logits and probabilities."""
    x = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    seeds = _seeds(6).view(2, 3).to(device)
    expected = sample(x, seed=seeds, top_p=0.9), filter_probs(x, top_p=0.9)
    far = checks.far_apart(x, small, device)
    checks.assert_equal(
        (sample(far, seed=seeds, top_p=0.9), filter_probs(far, top_p=0.9)), expected, "far apart"
    )
    rows, vocab = (5, 300) if small else (17000, 128256)
    checks.need_memory(7 * rows * vocab, device)
    pair = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    whole = torch.cat([pair[:1].expand(rows - 1, vocab), pair[1:]])
    probs, expected_probs = filter_probs(whole, top_p=0.9), filter_probs(pair, top_p=0.9)
    for i, source in ((0, 0), (rows - 2, 0), (rows - 1, 1)):
        checks.assert_equal(probs[i], expected_probs[source], f"row {i}")
    keys = torch.zeros(rows, dtype=torch.int64, device=device)
    offsets = torch.zeros(rows, dtype=torch.int64, device=device)
    keys[-1] = 5
    tokens = sample(whole, seed=keys, offset=offsets, top_p=0.9)
    few = sample(pair, seed=torch.tensor([0, 5], device=device), top_p=0.9)
    checks.assert_equal(tokens[[0, rows - 2, rows - 1]], few[[0, 0, 1]], "tokens")


CHECKS = (
    check_hard_rows,
    check_vocabularies,
    check_random_calls,
    check_same_tokens_as_the_cpu,
    check_large_vocabulary_tokens,
    check_blocks_of_a_row,
    check_layouts,
    check_bad_rows_stay_alone,
    check_empty,
    check_confidence_mask,
    check_opcheck,
    check_compile,
    check_graph,
    check_constants,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
)
SANITIZED = (
    check_hard_rows,
    check_vocabularies,
    check_random_calls,
    check_layouts,
    check_bad_rows_stay_alone,
)
# Their failure cannot be brought about by wrong results: the op is called by its own name, on nothing, or not at all.
NOT_DISTURBED = (check_opcheck, check_empty, check_constants)
FUNCTIONS = ("sample", "filter_probs", "confidence_mask")
