"""Which GPU architectures are built: decided without a GPU, tested without nvcc."""

from __future__ import annotations

import re

import cuda_config
import pytest


@pytest.fixture
def nvcc(monkeypatch):
    """An nvcc 13.0 that knows compute_75 to compute_120."""
    known = {"75", "80", "86", "89", "90", "100", "120"}
    monkeypatch.setattr(cuda_config, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_config, "nvcc_version", lambda nvcc: "13.0")
    monkeypatch.setattr(cuda_config, "_known_to_nvcc", lambda nvcc: known)
    for name in ("ARCORE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_default_list(nvcc):
    config = cuda_config.detect_cuda("13.0")
    assert config.enabled
    assert config.archs == ["8.0+PTX", "9.0a"]
    # PTX of compute_80 serves every later GPU; a Hopper GPU has the portable kernels as machine code of its own.
    assert config.gencode_sm80 == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    assert config.gencode_sm90a == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert config.jobs >= 1


@pytest.mark.parametrize(
    ("wish", "sm80", "sm90a"),
    [
        ("8.6", ["-gencode=arch=compute_86,code=sm_86"], []),
        ("9.0", ["-gencode=arch=compute_90,code=sm_90"], ["-gencode=arch=compute_90a,code=sm_90a"]),
        (
            "9.0a",  # the portable kernels are every op's fallback and are always built
            ["-gencode=arch=compute_90,code=sm_90"],
            ["-gencode=arch=compute_90a,code=sm_90a"],
        ),
        (
            "9.0+PTX 9.0a",
            ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"],
            ["-gencode=arch=compute_90a,code=sm_90a"],
        ),
        ("8.0 8.9", ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_89,code=sm_89"], []),
    ],
)
def test_arch_list_is_honoured(nvcc, wish, sm80, sm90a):
    nvcc.setenv("TORCH_CUDA_ARCH_LIST", wish)
    config = cuda_config.detect_cuda("13.0")
    assert (config.gencode_sm80, config.gencode_sm90a) == (sm80, sm90a)


def test_unknown_and_old_architectures_are_left_out_with_a_warning(nvcc, capsys):
    nvcc.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;15.0")
    assert cuda_config.detect_cuda("13.0").archs == ["8.0"]
    warnings = capsys.readouterr().err
    assert "15.0; left out" in warnings
    assert "7.5 left out" in warnings


def test_a_malformed_list_is_an_error(nvcc):
    nvcc.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"expected entries like 8.0, 8.0\+PTX or 9.0a but got 'Hopper'"):
        cuda_config.detect_cuda("13.0")


OBSTACLES = {
    "cpu_torch": (None, "nvcc", "the installed torch is a CPU build"),
    "no_nvcc": ("13.0", None, "nvcc was not found; set CUDA_HOME"),
    "other_major": ("12.8", "nvcc", "nvcc is 13.0 while torch was built for CUDA 12.8"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_auto_builds_without_cuda_and_on_says_what_is_wrong(nvcc, name):
    torch_cuda, found, reason = OBSTACLES[name]
    nvcc.setattr(cuda_config, "find_nvcc", lambda: found)
    config = cuda_config.detect_cuda(torch_cuda)
    assert not config.enabled
    assert reason in config.summary
    nvcc.setenv("ARCORE_CUDA", "on")
    with pytest.raises(SystemExit, match="ARCORE_CUDA=on but"):
        cuda_config.detect_cuda(torch_cuda)


def test_off_and_typos(nvcc):
    nvcc.setenv("ARCORE_CUDA", "off")
    assert not cuda_config.detect_cuda("13.0").enabled
    nvcc.setenv("ARCORE_CUDA", "maybe")
    with pytest.raises(SystemExit, match="expected auto, on or off but got 'maybe'"):
        cuda_config.detect_cuda("13.0")


def test_ops_of_equal_bits_are_compiled_without_contraction_everywhere():
    text = (cuda_config.Path(__file__).resolve().parents[2] / "CMakeLists.txt").read_text()
    cpu = set(re.findall(r"csrc/(\w+)/kernel_cpu.cpp", text)) & set(cuda_config.EXACT)
    cuda = re.search(r"csrc/\(([\w|]+)\)/instantiations", text)
    assert cpu == set(cuda_config.EXACT) and cuda is not None
    assert sorted(cuda.group(1).split("|")) == sorted(cuda_config.EXACT)
    source = cuda_config.Path("csrc/sample/instantiations/run_sm80.cu")
    assert cuda_config.flags_of(source) == ["-fmad=false"]
    assert cuda_config.flags_of(cuda_config.Path("csrc/selective_scan/instantiations/fwd_sm80.cu")) == []
