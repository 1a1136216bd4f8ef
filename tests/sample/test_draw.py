"""The shared headers csrc/common/philox.h and inverse_cdf.h: known answers, exact laws, edges."""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import arcore  # noqa: F401  (loads torch.ops.arcore)

ROOT = Path(__file__).resolve().parent.parent.parent
MASK32 = 2**32 - 1

# Known answers of the authors' Random123 distribution: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _bits(seed, position, stream=0, index=0):
    as_vector = lambda x: torch.tensor(x if isinstance(x, list) else [x])  # noqa: E731
    return torch.ops.arcore.random_bits(as_vector(seed), as_vector(position), stream, index)


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK32, (a >> 32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert philox(counter, key) == words
    seed, position = _signed(key[0] | key[1] << 32), _signed(counter[0] | counter[1] << 32)
    # The last word of the counter is index / 2, below 2^32.
    low = _bits(seed, position, counter[2], 2 * counter[3]).item() % 2**64
    high = _bits(seed, position, counter[2], 2 * counter[3] + 1).item() % 2**64
    assert (low & MASK32, low >> 32, high & MASK32, high >> 32) == words


def test_bits_of_many_keys_follow_the_definition():
    draw = random.Random(1)
    for _ in range(200):
        seed, position = (draw.randrange(-(2**63), 2**63) for _ in range(2))
        stream, index = draw.randrange(2**32), draw.randrange(2**33)
        s, p = seed % 2**64, position % 2**64
        words = philox((p & MASK32, p >> 32, stream, index >> 1), (s & MASK32, s >> 32))
        half = words[2:] if index & 1 else words[:2]
        assert _bits(seed, position, stream, index).item() % 2**64 == half[0] | half[1] << 32


def test_seed_position_stream_and_index_all_matter():
    keys = [(s, p, t, i) for s in range(5) for p in range(5) for t in range(5) for i in range(5)]
    assert len({_bits(s, p, t, i).item() for s, p, t, i in keys}) == len(keys)


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_bits_of_consecutive_keys_are_uniform_and_uncorrelated(axis):
    n = 1 << 16
    run, fixed = torch.arange(n), torch.full((n,), 7)
    bits = torch.ops.arcore.random_bits(*((run, fixed) if axis == "seed" else (fixed, run)), 0, 0)
    ones = torch.stack([(bits >> b) & 1 for b in range(64)]).double().mean(dim=1)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
    u = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
    assert u.min() >= 0 and u.max() < 1
    # Kolmogorov's statistic at p = 1e-6, and serial correlation at 5 sigma.
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (u.sort().values - grid).abs().max() < 2.7 / math.sqrt(n)
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 5 / math.sqrt(n)


def _pick(probs, bits):
    rows = torch.tensor(probs, dtype=torch.float32).expand(len(bits), -1)
    return torch.ops.arcore.inverse_cdf(rows, torch.tensor([_signed(b) for b in bits])).tolist()


def _expected(probs: list[float], bits: int) -> int:
    fixed = [math.floor(Fraction(torch.tensor(p).item()) * 2**62) for p in probs]
    total = sum(fixed)
    if total == 0:
        return -1
    level, cumulative = bits * total >> 64, 0
    for token, mass in enumerate(fixed):
        cumulative += mass
        if cumulative > level:
            return token
    raise AssertionError("the walk ran past the end")


@pytest.mark.parametrize("vocab", [1, 2, 3, 63, 64, 65, 127, 1000])
def test_draws_equal_exact_arithmetic(vocab):
    draw = random.Random(vocab)
    probs = [math.exp(draw.gauss(0, 8)) * draw.choice([0, 1, 1]) for _ in range(vocab - 1)] + [1.0]
    probs = (torch.tensor(probs) / sum(probs)).tolist()
    bits = [0, 1, 2**63, 2**64 - 1, *(draw.randrange(2**64) for _ in range(200))]
    assert _pick(probs, bits) == [_expected(probs, b) for b in bits]


def test_the_boundary_between_two_tokens_is_strict():
    assert _pick([0.25, 0.75], [0, 2**62 - 1, 2**62, 2**64 - 1]) == [0, 0, 1, 1]


def test_tokens_of_probability_zero_are_never_drawn():
    ends = [0, 2**64 - 1, 2**63, 2**63 - 1]
    assert _pick([0.0, 0.5, 0.0, 0.5, 0.0], ends) == [1, 3, 3, 1]
    assert _pick([0.0] * 300 + [2.0**-61] + [0.0] * 300, ends) == [300] * 4


def test_a_tail_token_of_one_in_a_billion_has_its_share_of_the_bits():
    tail = torch.tensor(1e-9).item()
    probs = [tail, 1.0]
    share = math.floor(Fraction(tail) / (1 + Fraction(tail)) * 2**64)
    assert _pick(probs, [0, share - 8, share + 8]) == [0, 0, 1]
    # 2^-62 is the last probability that counts.
    assert _pick([2.0**-62, 1.0], [0]) == [0]
    assert _pick([2.0**-63, 1.0], [0]) == [1]


def test_rows_need_not_be_normalised():
    draw = random.Random(3)
    probs = [draw.random() for _ in range(100)]
    for scale in (1e-9, 2.0**-20, 1 / 40):
        scaled = [p * scale for p in probs]
        bits = [draw.randrange(2**64) for _ in range(50)]
        assert _pick(scaled, bits) == [_expected(scaled, b) for b in bits]


@pytest.mark.parametrize("probs", [[], [0.0], [0.0, 0.0, 2.0**-63], [math.nan, -1.0, -math.inf, -0.0]])
def test_a_row_without_mass_gives_minus_one(probs):
    assert _pick(probs, [0, 2**64 - 1]) == [-1, -1]


def test_nan_and_negative_numbers_count_as_zero_and_large_ones_as_one():
    assert _pick([math.nan, -3.0, 0.5, math.inf], [0, 2**64 // 3 - 9, 2**64 // 3 + 9]) == [2, 2, 3]


def test_strides_change_nothing():
    probs = torch.rand(5, 200).softmax(-1)
    bits = torch.ops.arcore.random_bits(torch.arange(5), torch.zeros(5, dtype=torch.int64), 0, 0)
    expected = torch.ops.arcore.inverse_cdf(probs, bits)
    assert torch.equal(torch.ops.arcore.inverse_cdf(probs.t().contiguous().t(), bits), expected)
    wide = torch.rand(5, 400)
    wide[:, ::2] = probs
    assert torch.equal(torch.ops.arcore.inverse_cdf(wide[:, ::2], bits), expected)


def test_argument_errors():
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=re.escape("expected position int64 of shape (1) but got Long (2)")
    ):
        torch.ops.arcore.random_bits(one, torch.zeros(2, dtype=torch.int64), 0, 0)
    with pytest.raises(RuntimeError, match="expected 0 <= index < 2\\^57 but got -1"):
        torch.ops.arcore.random_bits(one, one, 0, -1)
    with pytest.raises(RuntimeError, match=re.escape("expected probs float32 of shape (rows, vocab)")):
        torch.ops.arcore.inverse_cdf(torch.zeros(1, 2, dtype=torch.float64), one)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_headers_compile_as_device_code(tmp_path):
    source = ROOT / "csrc/common/random_probe_sm80.cu"
    command = [
        "nvcc",
        "-std=c++20",
        "-Werror",
        "all-warnings",
        "-I",
        ROOT / "csrc",
        "-arch=sm_80",
        "-c",
        source,
    ]
    done = subprocess.run([*map(str, command), "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
