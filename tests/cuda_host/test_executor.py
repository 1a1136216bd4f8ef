"""The executor itself: right kernels run right, and a planted mistake of each kind is found."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from tests.cuda_host.build import guarded, probe_library, statistics_of, unavailable

reason = unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

NONE = 0
(
    INDEX_PAST_SHARED,
    INDEX_FAR_OUTSIDE,
    MISSING_BARRIER,
    MISSING_BARRIER_BEFORE_REUSE,
    UNWAITED_COPY,
    WAIT_WITHOUT_BARRIER,
    RETURN_WITH_COPY,
    LANE_OUT_OF_RANGE,
    DIVERGENT_SHUFFLE,
    DIFFERENT_BARRIERS,
    THREAD_MISSES_BARRIER,
    READS_UNWRITTEN,
    MISALIGNED,
    READS_UNWRITTEN_LOCAL,
    EXITED_LANE,
    INDEX_PAST_BUFFER,
    WARP_INDEX_OF_ONE_LANE,
    GROUP_BARRIER_OF_HALF_WARPS,
    STORES_READONLY,
    MISSING_CLUSTER_BARRIER,
    RETURNS_WHILE_READ,
    RANK_OUTSIDE_CLUSTER,
) = range(1, 23)
REVERSE, MISUSE, PRODUCT, SUM_CLUSTER = range(4)

Probe = Callable[..., str]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    native = probe_library()
    native.arcore_cuda_host_set_cluster_limit(16)
    return native


@pytest.fixture
def probe(library: ctypes.CDLL) -> Probe:
    def run(
        which: int,
        out: torch.Tensor,
        source: torch.Tensor,
        n: int,
        mistake: int = NONE,
        blocks: int = 1,
        threads: int = 128,
        shared: int | None = None,
        seed: int = 0,
        cluster: int = 1,
    ) -> str:
        message = ctypes.create_string_buffer(1024)
        library.arcore_cuda_host_set_seed(seed)
        code = library.probe(
            which,
            out.data_ptr(),
            source.data_ptr(),
            n,
            mistake,
            blocks,
            threads,
            4 * threads if shared is None else shared,
            cluster,
            message,
            len(message),
        )
        assert (code != 0) == bool(message.value)
        return message.value.decode()

    return run


def reversed_right(probe: Probe, mistake: int, seed: int) -> bool:
    source = torch.randn(1024)
    out = torch.full_like(source, float("nan"))
    assert probe(REVERSE, out, source, 1024, mistake, blocks=3, seed=seed) == ""
    return torch.equal(out, source.flip(0))


@pytest.mark.parametrize("seed", range(20))
def test_a_right_kernel_is_right_in_every_order(probe: Probe, seed: int) -> None:
    assert reversed_right(probe, NONE, seed)


@pytest.mark.parametrize(
    "mistake", [MISSING_BARRIER, MISSING_BARRIER_BEFORE_REUSE, UNWAITED_COPY, WAIT_WITHOUT_BARRIER]
)
def test_missing_synchronisation_shows_as_a_wrong_result(probe: Probe, mistake: int) -> None:
    wrong = sum(not reversed_right(probe, mistake, seed) for seed in range(20))
    assert wrong >= 10, f"only {wrong} of 20 orders show the mistake"


def test_the_same_seed_gives_the_same_order(probe: Probe) -> None:
    def once(seed: int) -> torch.Tensor:
        out = torch.zeros(1024)
        torch.manual_seed(0)
        probe(REVERSE, out, torch.randn(1024), 1024, MISSING_BARRIER, blocks=3, seed=seed)
        return out

    for seed in range(5):
        torch.testing.assert_close(once(seed), once(seed), rtol=0, atol=0, equal_nan=True)
    assert any(not torch.equal(once(0).nan_to_num(-1), once(s).nan_to_num(-1)) for s in range(1, 5))


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (INDEX_PAST_SHARED, "a write past the end of the shared memory of block (0, 0, 0)"),
        (INDEX_FAR_OUTSIDE, "an access outside all buffers"),
        (LANE_OUT_OF_RANGE, "a shuffle from a lane outside 0 to 31"),
        (DIVERGENT_SHUFFLE, "lanes of a warp are at different places"),
        (DIFFERENT_BARRIERS, "threads of a block are at different barriers"),
        (THREAD_MISSES_BARRIER, "wait for each other"),
        (MISALIGNED, "not a multiple of the size"),
        (EXITED_LANE, "wait for each other"),
        (WARP_INDEX_OF_ONE_LANE, "warp_index at "),
        (STORES_READONLY, "load_readonly"),
        (GROUP_BARRIER_OF_HALF_WARPS, "lanes of a warp are at different places"),
    ],
)
def test_misuse_is_an_error_that_names_the_place(probe: Probe, mistake: int, expected: str) -> None:
    # The planted index writes numbers 1 to 100, of which 400 bytes hold 0 to 99.
    message = probe(MISUSE, torch.zeros(128), torch.zeros(128), 1, mistake, shared=400)
    assert expected in message
    assert "block (0, 0, 0)" in message


def test_an_index_past_all_shared_memory_is_an_error(probe: Probe) -> None:
    message = probe(MISUSE, torch.zeros(128), torch.zeros(128), 128, INDEX_PAST_SHARED)
    assert "an access outside all buffers" in message


def test_an_index_past_a_guarded_buffer_is_an_error(probe: Probe) -> None:
    out = guarded(torch.zeros(128))
    assert probe(MISUSE, out, torch.zeros(128), 0, INDEX_PAST_BUFFER) == ""
    message = probe(MISUSE, out, torch.zeros(128), 1, INDEX_PAST_BUFFER)
    assert "an access outside all buffers" in message


def test_returning_with_a_copy_under_way_is_an_error(probe: Probe) -> None:
    message = probe(REVERSE, torch.zeros(1024), torch.zeros(1024), 1024, RETURN_WITH_COPY)
    assert "returned while its copy_async was not waited for" in message


@pytest.mark.parametrize("mistake", [READS_UNWRITTEN, READS_UNWRITTEN_LOCAL])
def test_memory_that_nobody_wrote_is_nan(probe: Probe, mistake: int) -> None:
    out = torch.zeros(128)
    assert probe(MISUSE, out, torch.zeros(128), 0, mistake) == ""
    assert out.isnan().all()


def test_a_launch_after_a_failed_one_is_sound(probe: Probe) -> None:
    assert probe(MISUSE, torch.zeros(128), torch.zeros(128), 0, THREAD_MISSES_BARRIER)
    assert reversed_right(probe, NONE, 0)


@pytest.mark.parametrize("pitch", [16, 24])
def test_matrix_product_and_bank_conflicts(probe: Probe, library: ctypes.CDLL, pitch: int) -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    out = torch.full((16, 8), float("nan"))
    source = torch.cat([a.flatten(), b.flatten()]).float()
    assert probe(PRODUCT, out, source, pitch, threads=32, shared=24 * pitch * 2) == ""
    torch.testing.assert_close(out, (a.double() @ b.double().T).float(), rtol=1e-6, atol=1e-6)
    counts = statistics_of(library)
    # Rows of 32 bytes: four of eight share their banks with another one; of 48 bytes: none.
    assert counts["bank_conflicts"] == (8 * 4 if pitch == 16 else 0)
    assert counts["matrix_products"] == 1


def test_an_array_that_is_too_short_for_the_counts_is_refused(library: ctypes.CDLL) -> None:
    with pytest.raises(ctypes.ArgumentError):
        library.arcore_cuda_host_statistics(ctypes.byref((ctypes.c_int64 * 6)()))
    with pytest.raises(TypeError, match="11 arguments"):
        library.probe(REVERSE, None, None, 0, NONE, 1, 32, 0, b"", 0)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "refusal"),
    [(1, 48, 0, 1), (1, 2048, 0, 1), (1, 32, 300 * 1024, 1), (1 << 40, 32, 0, -2), (1 << 31, 32, 0, -2)],
)
def test_a_launch_that_no_gpu_takes_is_refused(
    library: ctypes.CDLL, blocks: int, threads: int, shared: int, refusal: int
) -> None:
    message = ctypes.create_string_buffer(64)
    code = library.probe(REVERSE, None, None, 0, NONE, blocks, threads, shared, 1, message, len(message))
    assert code == refusal
    assert message.value == b""


@pytest.mark.parametrize("cluster", [1, 2, 16])
def test_blocks_of_a_cluster_read_each_other(probe: Probe, cluster: int) -> None:
    blocks, threads = 32, 64
    source, out = torch.randn(blocks, threads), torch.zeros(blocks, threads)
    for seed in range(3):
        assert not probe(
            SUM_CLUSTER, out, source, 0, blocks=blocks, threads=threads, seed=seed, cluster=cluster
        )
        sums = source.view(-1, cluster, threads).sum(1, keepdim=True).expand(-1, cluster, -1)
        torch.testing.assert_close(out, sums.reshape(blocks, threads))


def test_mistakes_with_clusters_are_found(probe: Probe) -> None:
    source, out = torch.randn(4, 64), torch.zeros(4, 64)

    def run(mistake: int, seed: int = 0) -> str:
        return probe(SUM_CLUSTER, out, source, 0, mistake=mistake, blocks=4, threads=64, seed=seed, cluster=4)

    assert "a block that the cluster does not have" in run(RANK_OUTSIDE_CLUSTER)
    assert any("a block that returns" in run(RETURNS_WHILE_READ, seed) for seed in range(5))
    for seed in range(5):
        message = run(MISSING_CLUSTER_BARRIER, seed)
        assert message or out.isnan().any()
