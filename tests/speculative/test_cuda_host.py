"""The sm_80 kernels, run on the CPU by tests/cuda_host: the CPU kernels' own tests, and the same ids as theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from arcore.ops import verify_chain, verify_tree
from tests.cuda_host.build import CudaHost, installed, unavailable
from tests.speculative import test_kernel as kernel

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]

SHARED = [
    "test_same_ids",
    "test_lengths_and_padding",
    "test_padding_inside_a_tree_has_no_descendants",
    "test_small_shapes",
    "test_types_of_neighbour_tables",
    "test_neighbours_that_are_none",
    "test_broadcast_rows",
]
globals().update({name: getattr(kernel, name) for name in SHARED})


def verified() -> list[Tensor]:
    """Chains and trees of many rows, drafts near the target, so that both outcomes are frequent."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(60, 4, 301, generator=generator).pow(4)
    target = target / target.sum(-1, keepdim=True)
    draft = target[:, :3] * (0.5 + torch.rand(60, 3, 301, generator=generator))
    draft = draft / draft.sum(-1, keepdim=True)
    tokens = draft.flatten(0, 1).multinomial(1, generator=generator).view(60, 3)
    seeds = torch.arange(60)
    found = [
        verify_chain(target, tokens, draft_probs=draft, seed=seeds, offset=0),
        verify_chain(target, tokens, draft_probs=draft, seed=seeds, offset=0, method="block"),
        verify_tree(target, tokens, torch.tensor([-1, -1, 0]), seed=seeds, offset=0),
    ]
    return [x for result in found for x in (result.tokens, result.accepted)]


@pytest.fixture(scope="module")
def of_the_cpu() -> list[Tensor]:
    return verified()


@pytest.fixture(autouse=True)
def host(of_the_cpu: list[Tensor]) -> Iterator[CudaHost]:
    with installed("speculative") as kernels:
        yield kernels


@pytest.mark.parametrize("seed", range(3))
def test_the_ids_of_the_cpu(host: CudaHost, of_the_cpu: list[Tensor], seed: int) -> None:
    host.set_seed(seed)
    found = verified()
    assert host.statistics()["blocks"] == 60
    assert all(torch.equal(a, b) for a, b in zip(found, of_the_cpu, strict=True))
    accepted = of_the_cpu[1]
    assert 0 < accepted.float().mean() < 3
