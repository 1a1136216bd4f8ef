"""The kernels against their references, to the last bit."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest
import torch

from arcore.ops import _sample_reference as rules
from arcore.ops import (
    confidence_mask,
    filter_probs,
    reference_confidence_mask,
    reference_filter_probs,
    reference_sample,
    sample,
)
from tests.sample.cases import FILTERS, adversarial_rows, random_call

ALL = {"return_entropy": True, "return_valid": True, "return_kept": True}


def assert_same_distribution(logits, **kw):
    got = filter_probs(logits, **kw, **ALL)
    expected = reference_filter_probs(logits, **kw, **ALL)
    assert torch.equal(got.probs, expected.probs)
    assert torch.equal(got.kept, expected.kept)
    assert torch.equal(got.valid, expected.valid)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("order", ["hf", "vllm", "joint"])
@pytest.mark.parametrize("vocab", [33, 300])
def test_adversarial_rows(vocab, order):
    rows = torch.stack(list(adversarial_rows(vocab).values()))
    for filters in FILTERS:
        assert_same_distribution(rows, order=order, **filters)
    assert_same_distribution(rows, order=order, temperature=0.7, top_k=20, top_p=0.9)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 1023, 1025, 5000])
def test_sizes(vocab):
    rows = torch.stack([row for name, row in adversarial_rows(vocab).items() if name in ("normal", "ties")])
    for filters in ({}, {"top_k": 9}, {"top_p": 0.7}, {"top_k": 100, "top_p": 0.9, "typical_p": 0.9}):
        assert_same_distribution(rows, **filters)


@pytest.mark.parametrize("seed", range(6))
def test_random_calls(seed):
    draw = random.Random(seed)
    for _ in range(12):
        x, kw = random_call(draw)
        assert_same_distribution(x, **kw)
        kw |= {
            "seed": torch.arange(3) + seed,
            "offset": 5,
            "num_samples": 3,
            "mode": draw.choice(["inverse_cdf", "gumbel", "greedy"]),
            "return_logprob": draw.choice(["raw", "processed"]),
            "return_prob": True,
        }
        got, expected = sample(x, **kw), reference_sample(x, **kw)
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.prob.nan_to_num(9), expected.prob.nan_to_num(9))
        torch.testing.assert_close(got.logprob, expected.logprob, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_random_calls(seed):
    test_random_calls(seed)


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa):
    """The reference has none, and the one in use is tested above."""
    if isa == "avx2" and torch.ops.arcore.cpu_isa_supported() == "default":
        pytest.skip("this CPU has no avx2")
    code = (
        "import torch\n"
        "from tests.sample import test_reference as t\n"
        "print('isa', torch.ops.arcore.cpu_isa())\n"
        "t.test_random_calls(50)\n"
        "t.test_adversarial_rows(33, 'hf')\n"
        "t.test_confidence_masks('exact')\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert f"isa {isa}" in done.stdout


@pytest.mark.parametrize("ties", ["exact", "all", "none"])
def test_confidence_masks(ties):
    torch.manual_seed(3)
    for length in (1, 5, 64, 257):
        for confidence in (torch.rand(3, length), torch.randint(0, 4, (3, length)).float()):
            confidence[0, 0] = math.nan
            confidence[1, -1] = -math.inf
            for count in (0, 1, length // 2, length, length + 5, torch.tensor([1, 2, 3])):
                for kw in ({}, {"candidates": torch.rand(3, length) < 0.6}, {"temperature": 2.0}):
                    kw = {"seed": torch.tensor([4, 5, 6]), "offset": 9, "ties": ties, **kw}
                    got = confidence_mask(confidence, count, **kw)
                    assert torch.equal(got, reference_confidence_mask(confidence, count, **kw))


def test_exponential_of_the_reference_is_accurate():
    t = -torch.cat([torch.linspace(0, 87.3, 100001), torch.logspace(-30, 1, 1000)])
    exact = t.double().exp()
    ulp = 2.0 ** (exact.log2().floor() - 23)
    assert ((rules.exp(t).double() - exact).abs() / ulp).max() < 1.5
    assert rules.exp(torch.tensor([0.0, -87.34, -1e30])).tolist() == [1.0, 0.0, 0.0]


def test_fused_multiply_add_of_the_reference_rounds_once():
    from fractions import Fraction

    torch.manual_seed(0)
    a, b = (torch.randn(2000) for _ in range(2))
    c = torch.cat([torch.randn(1000), -(a * b)[1000:]])  # the second half cancels
    for x, y, z, got in zip(
        a.tolist(), b.tolist(), c.tolist(), rules.fma(a, b, c.double()).tolist(), strict=True
    ):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        rounded = torch.tensor(got)
        error = abs(Fraction(got) - exact)
        for other in (math.inf, -math.inf):
            neighbour = torch.nextafter(rounded, torch.tensor(other)).item()
            assert error <= abs(Fraction(neighbour) - exact)


def test_random_bits_of_the_reference_are_those_of_the_kernels():
    index = torch.arange(6)
    for seed, offset, stream in ((0, 0, 0), (-5, 2**62 + 1, 3), (2**63 - 1, -(2**63), 4)):
        expected = torch.cat(
            [
                torch.ops.arcore.random_bits(torch.tensor([seed]), torch.tensor([offset]), stream, int(i))
                for i in index
            ]
        )
        assert torch.equal(rules.philox_bits(seed, offset, stream, index), expected)
