"""The sm_80 kernels, run on the CPU by tests/cuda_host, through the public functions against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from arcore.ops import token_logprobs
from tests.cuda_host.build import CudaHost, installed, unavailable
from tests.token_logprobs import test_extremes as extremes
from tests.token_logprobs import test_importance_ratio as ratio
from tests.token_logprobs import test_linear as linear
from tests.token_logprobs.cases import (
    IGNORE,
    Case,
    assert_as_good_as_eager,
    make_case,
    pack_mask,
    random_mask,
)

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def host() -> Iterator[CudaHost]:
    with installed("token_logprobs") as kernels:
        yield kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [0.7, "rows"])
def test_options(dtype: torch.dtype, softcap: float | None, temperature: float | str) -> None:
    rows = torch.rand(2, 3, generator=torch.Generator().manual_seed(2)) + 0.3
    case = make_case(
        2, 3, 700, dtype=dtype, softcap=softcap, temperature=rows if temperature == "rows" else temperature
    )
    case.target[0, 1] = IGNORE
    assert_as_good_as_eager(case)
    assert_as_good_as_eager(case, entropy=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 31, 33, 255, 257, 2049])
def test_lengths(vocab: int, dtype: torch.dtype) -> None:
    kept = random_mask(3, vocab, share=0.7)
    for mask in (None, kept, pack_mask(kept)):
        assert_as_good_as_eager(make_case(3, vocab, dtype=dtype, mask=mask, softcap=10.0))


def test_long_rows_are_cut_into_slices(host: CudaHost) -> None:
    case = make_case(2, 40000)
    assert_as_good_as_eager(case)
    case.target[1] = IGNORE
    case.logits[0, 35000] = 1e4
    assert_as_good_as_eager(case)
    rows = torch.randn(2, 40000)
    rows[0, 39999] = torch.nan
    rows[1] = -torch.inf
    assert_as_good_as_eager(Case(rows, case.target, case.cotangents))


@pytest.mark.parametrize("tile", [None, (66, 512), (7, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear(tile: tuple[int, int] | None, dtype: torch.dtype) -> None:
    linear.test_tiles(dtype, tile)


def test_results_do_not_depend_on_the_order_of_warps(host: CudaHost) -> None:
    logits = torch.randn(3, 1001)

    def once(seed: int) -> list[torch.Tensor]:
        host.set_seed(seed)
        leaf = logits.clone().requires_grad_()
        out = torch.ops.arcore.token_logprobs(
            leaf, torch.tensor([5, 0, 1000]), None, None, 1.0, 0.0, -1, True
        )
        out[0].sum().backward()
        return [*(x.detach() for x in out), leaf.grad]

    first = once(0)
    assert all(torch.equal(a, b) for seed in range(1, 6) for a, b in zip(first, once(seed), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [100, 2049, 40000])
def test_on_policy_ratio_is_one(vocab: int, dtype: torch.dtype) -> None:
    """The log-probability that the sampler's kernel returns is that of the scoring kernel, bit for bit."""
    logits = (2 * torch.randn(2, vocab)).to(dtype)
    with installed("sample"):
        for settings in ({}, {"top_k": 50, "min_p": 0.01, "temperature": 0.7}):
            old = ratio.draw(logits, **settings)
            new = token_logprobs(
                logits, old.tokens, mask=old.kept, temperature=settings.get("temperature", 1.0)
            )
            ratio.assert_ratio_is_one(old.logprob, new.logp)


@pytest.mark.parametrize("columns", [1, 50, 2100])
@pytest.mark.parametrize("temperature", [1e-29, 1e29])
def test_temperatures_up_to_the_ends_of_the_range(columns: int, temperature: float) -> None:
    extremes.test_any_positive_temperature_and_softcap(columns, {"temperature": temperature}, torch.float32)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 1e300}, {"softcap": 1e-40}, {"temperature": 1e-40}, {"temperature": 1e46}],
    ids=str,
)
def test_numbers_beyond_float32_are_refused(options: dict[str, float]) -> None:
    [name] = options
    with pytest.raises(ValueError, match=f"{name} from 1e-30 to 1e30 on a GPU"):
        token_logprobs(torch.randn(3, 40), torch.tensor([0, 1, 2]), **options)


def test_a_row_with_a_temperature_beyond_float32_is_nan_alone() -> None:
    logits, target = torch.randn(4, 300), torch.randint(300, (4,))
    rows = torch.tensor([1e-39, 0.7, 1e38, 1.0])
    found = token_logprobs(logits, target, temperature=rows, return_entropy=True)
    plain = token_logprobs(
        logits, target, temperature=torch.tensor([1.0, 0.7, 1.0, 1.0]), return_entropy=True
    )
    for name in ("logp", "logsumexp", "entropy"):
        values = getattr(found, name)
        assert values[[0, 2]].isnan().all()
        assert torch.equal(values[[1, 3]], getattr(plain, name)[[1, 3]])


def test_smoothing_is_refused_on_a_gpu() -> None:
    logits, target = torch.randn(3, 40), torch.tensor([0, 1, 2])
    *_, state = torch.ops.arcore.token_logprobs(logits, target, None, None, 1.0, 0.0, -100, False)
    with pytest.raises(RuntimeError, match="label smoothing has no kernel"):
        torch.ops.arcore.token_logprobs_backward(
            None, None, None, logits, target, None, None, state, 1.0, 0.0, -100, torch.ones(3),
            torch.zeros(3, 4, dtype=torch.float64),
        )  # fmt: skip
