"""The report of tools/cuda_check.py, on texts that ptxas wrote, and on a kernel that spills."""

from __future__ import annotations

from pathlib import Path

import cuda_check
import pytest
from cuda_config import find_nvcc

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6arcore4test4fineENS_4ArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN6arcore4test4fineENS_4ArgsE
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 2048 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6arcore4test6spillsIfLi3EEEvNS_4ArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN6arcore4test6spillsIfLi3EEEvNS_4ArgsE
    488 bytes stack frame, 760 bytes spill stores, 1108 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 672 bytes cmem[0]
"""


def test_registers_shared_memory_stack_and_spills_are_read() -> None:
    report = cuda_check.Report("x.cu")
    cuda_check.read_log(LOG, report)
    assert report.kernels == [
        cuda_check.Kernel("fine", "sm_80", 64, 2048, 16, 0),
        cuda_check.Kernel("spills<float, 3>", "sm_90", 255, 0, 488, 1868),
    ]
    assert report.faults == ["spills<float, 3> [sm_90] spills 1868 bytes"]


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "ptxas warning : setmaxnreg ignored to maintain minimum requirements",
    ],
)
def test_what_ptxas_gives_up_is_a_fault(line: str) -> None:
    report = cuda_check.Report("x.cu")
    cuda_check.read_log(line, report)
    assert len(report.faults) == 1


def test_claims_are_looked_up_in_the_code() -> None:
    source = "// claims: mma.sync, ldmatrix\nint x;\n"
    assert cuda_check.missing_claims(source, "mma.sync.aligned ldmatrix.sync") == []
    assert cuda_check.missing_claims(source, "ldmatrix.sync") == ["mma.sync"]
    assert cuda_check.missing_claims("int x;", "") == []


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
def test_a_kernel_that_spills_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "csrc" / "op" / "spill_sm80.cu"
    source.parent.mkdir(parents=True)
    (tmp_path / "csrc" / "common").mkdir()
    source.write_text(
        "__launch_bounds__(1024, 2) __global__ void greedy(float* p) {\n"
        "  float x[64];\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) x[i] = p[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) p[(63 - i) * 1024 + threadIdx.x] = x[i] * x[(i * 7) % 64];\n"
        "}\n"
    )
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "CACHE", tmp_path / "cache")
    report = cuda_check.check(str(find_nvcc()), "test", source, cuda_check.QUICK, None)
    assert any("spills" in fault for fault in report.faults)
    assert not (tmp_path / "cache").exists()
