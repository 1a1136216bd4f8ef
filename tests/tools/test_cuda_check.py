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


SASS = """\
\t.section\t.text._ZN6arcore4test4fineENS_4ArgsE,"ax",@progbits
.text._ZN6arcore4test4fineENS_4ArgsE:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   MUFU.EX2 R1, R2 ;
.L_x_1:
        /*0040*/              @UP1 MUFU.EX2 R1, R2 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
.text._ZN6arcore4test5otherENS_4ArgsE:
        /*0000*/                   LDL R1, [R1] ;
"""
BETWEEN = "between WARPGROUP.DEPBAR.LE gsb0, 0x1 and WARPGROUP.DEPBAR.LE gsb0, 0x0"


def test_machine_code_is_read_by_kernel() -> None:
    kernels = cuda_check.read_sass(SASS)
    assert [len(code) for code in kernels.values()] == [7, 1]
    assert next(iter(kernels.values()))[1] == "STG.E.128 desc[UR4][R2.64], R4"


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        ("fine: STG.E.128 >= 1; no LDL; MUFU.EX2 >= 3", None),
        (f"fine: MUFU.EX2 >= 2 {BETWEEN}", None),
        (f"fine: MUFU.EX2 >= 3 {BETWEEN}", "has 2"),
        ("fine: STG.E.128 >= 2", "has 1"),
        ("other: no LDL", "has 1"),
        ("other on sm_90: no LDL", "has 1"),
        ("other on sm_80: no LDL", None),
        ("other: few LDL", "no claim this program knows"),
        ("absent: no LDL", "no kernel of this file"),
    ],
)
def test_claims_about_machine_code(claim: str, fault: str | None) -> None:
    kernels = {cuda_check.short_name(name): code for name, code in cuda_check.read_sass(SASS).items()}
    assert set(kernels) == {"fine", "other"}
    faults = cuda_check.broken_sass_claims(f"int x;\n// sass {claim}\n", kernels, "sm_90")
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
@pytest.mark.parametrize(
    ("claim", "fault"),
    [("no LDL; LDG.E >= 1; STG.E >= 1", None), ("STG.E.128 >= 1", "copy claims 'STG.E.128 >= 1' but has 0")],
)
def test_claims_are_checked_in_what_nvcc_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: str, fault: str | None
) -> None:
    nvcc = str(find_nvcc())
    nvdisasm = cuda_check.find_nvdisasm(nvcc)
    if nvdisasm is None:
        pytest.skip("nvdisasm was not found")
    source = tmp_path / "csrc" / "op" / "copy_sm80.cu"
    source.parent.mkdir(parents=True)
    (tmp_path / "csrc" / "common").mkdir()
    source.write_text(
        f"// sass copy: {claim}\n__global__ void copy(float* p) {{ p[threadIdx.x] *= p[0] + 1; }}\n"
    )
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "CACHE", tmp_path / "cache")
    report = cuda_check.check(nvcc, "test", source, cuda_check.QUICK, nvdisasm=nvdisasm)
    assert report.kernels[0].instructions > 5
    assert [f"[sm_80] {fault}"] == report.faults if fault else not report.faults
    # Without the disassembler a claim is not taken on trust.
    report = cuda_check.check(nvcc, "other", source, cuda_check.QUICK)
    assert report.faults == [cuda_check.NO_NVDISASM]


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
    report = cuda_check.check(str(find_nvcc()), "test", source, cuda_check.QUICK)
    assert any("spills" in fault for fault in report.faults)
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
def test_files_are_chosen_by_parts_of_their_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def check(nvcc: str, version: str, source: Path, *_: object) -> cuda_check.Report:
        seen.append(source.name)
        return cuda_check.Report(str(source))

    monkeypatch.setattr(cuda_check, "check", check)
    assert cuda_check.main(["--quick", "selective_scan/", "plan_sm80"]) == 0
    assert {"bwd_few_plain_sm80.cu", "linear_sm80.cu", "plan_sm80.cu"} <= set(seen)
    assert not any("sample" in name or name.startswith("fused") for name in seen)
    with pytest.raises(SystemExit):
        cuda_check.main(["--quick", "no_such_file"])
    assert "no .cu file has any of no_such_file in its path" in capsys.readouterr().err
