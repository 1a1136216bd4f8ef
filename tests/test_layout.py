"""The tree keeps its shape: one op name in four places, includes and imports that point one way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OP_FILES = ("README.md", "params.h", "schema.cpp", "kernel_cpu.cpp")
NOT_OPS_IN_BENCH = {"calls", "threads", "gpu", "models", "results"}

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"(?P<own>[^"]+)"|<(?P<system>[^>]+)>)', re.MULTILINE)
TORCH = ("torch/", "ATen/", "c10/", "caffe2/")
# The one include that leaves csrc: what device functions mean when tests run kernels on the CPU.
EXECUTOR_DOOR = ("common/sm80/device.h", "cuda_host/device.h")
STABLE = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")


def folders(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.is_dir() and p.name[0] not in "._"}


def ops(root: Path) -> set[str]:
    return {p.stem for p in (root / "python/arcore/ops").glob("*.py") if not p.stem.startswith("_")}


def op_place_errors(root: Path) -> list[str]:
    """Where the name of an op is missing, or a folder of csrc or bench is none."""
    names, errors = ops(root), []
    for op in sorted(names):
        errors += [
            f"csrc/{op}/{file} is missing" for file in OP_FILES if not (root / "csrc" / op / file).is_file()
        ]
        errors += [
            f"{place}/{op}/ has no {pattern}"
            for place, pattern in (("tests", "test_*.py"), ("bench", "bench_*.py"))
            if not list((root / place / op).glob(pattern))
        ]
    errors += [f"csrc/{name}/ is no op" for name in sorted(folders(root / "csrc") - names - {"common"})]
    errors += [
        f"bench/{name}/ is no op" for name in sorted(folders(root / "bench") - names - NOT_OPS_IN_BENCH)
    ]
    return errors


def include_errors(csrc: Path) -> list[str]:
    """Includes that break csrc's rules (docs/architecture.md, "Direction of imports")."""
    errors = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        name = path.relative_to(csrc).as_posix()
        op = name.split("/")[0] if "/" in name else ""
        for match in INCLUDE.finditer(path.read_text()):
            own, system = match["own"], match["system"]
            if own is not None:
                target = _resolve(csrc, path, own)
                if (name, own) == EXECUTOR_DOOR:
                    continue
                if target is None:
                    errors.append(f"{name} includes {own!r}, which is not below csrc")
                elif op and target.split("/")[0] not in {op, "common"}:
                    errors.append(f"{name} includes {target}: an op knows only itself and common/")
            elif system.startswith(TORCH) and not _may_include(name, system):
                errors.append(f"{name} includes <{system}>")
        if path.name != "schema.cpp":
            continue
        reached = _reached(csrc, name)
        if "common/vec.h" in reached:
            errors.append(f"{name} reaches common/vec.h, which the stable ABI excludes")
    kernels = [p for p in csrc.glob("*/*") if p.name == "kernel_cpu.cpp" or p.suffix in {".cu", ".cuh"}]
    for path in sorted([*kernels, *csrc.glob("*/instantiations/*.cu")]):
        name = path.relative_to(csrc).as_posix()
        for header in sorted(_reached(csrc, name) - {"common/vec.h"}):
            systems = [m["system"] for m in INCLUDE.finditer((csrc / header).read_text()) if m["system"]]
            errors += [f"{name} reaches <{s}> through {header}" for s in systems if s.startswith(TORCH)]
    return errors


def _may_include(name: str, system: str) -> bool:
    if name == "common/vec.h":
        return system.startswith("ATen/cpu/vec/")
    may_see_stable = name.endswith(("/schema.cpp", "/cuda.cpp", "/checks.h")) or name.startswith("common/")
    return may_see_stable and system.startswith(STABLE)


def _resolve(csrc: Path, path: Path, include: str) -> str | None:
    for base in (path.parent, csrc):
        target = (base / include).resolve()
        if target.is_file() and target.is_relative_to(csrc.resolve()):
            return target.relative_to(csrc.resolve()).as_posix()
    return None


def _reached(csrc: Path, name: str) -> set[str]:
    """Our own files that `name` includes, directly or not, without `name` itself."""
    seen, todo = set[str](), [name]
    while todo:
        path = csrc / todo.pop()
        for match in INCLUDE.finditer(path.read_text()):
            target = _resolve(csrc, path, match["own"]) if match["own"] else None
            if target and target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def test_ops_stand_in_four_places() -> None:
    assert ops(ROOT), "no op was found"
    assert op_place_errors(ROOT) == []


def test_includes_point_one_way() -> None:
    assert (ROOT / "csrc/common/vec.h").is_file()
    assert include_errors(ROOT / "csrc") == []


def test_missing_places_are_found(tmp_path: Path) -> None:
    for folder in (
        "python/arcore/ops",
        "csrc/common",
        "csrc/stray",
        "csrc/scan",
        "tests/scan",
        "bench/results",
    ):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("python/arcore/ops/__init__.py", "python/arcore/ops/scan.py", "tests/scan/test_scan.py"):
        (tmp_path / file).touch()
    for file in OP_FILES[1:]:
        (tmp_path / "csrc/scan" / file).touch()
    assert op_place_errors(tmp_path) == [
        "csrc/scan/README.md is missing",
        "bench/scan/ has no bench_*.py",
        "csrc/stray/ is no op",
    ]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("scan/kernel_cpu.cpp", '#include "sort/params.h"', "an op knows only itself and common/"),
        ("scan/kernel_cpu.cpp", "#include <ATen/ATen.h>", "scan/kernel_cpu.cpp includes <ATen/ATen.h>"),
        ("scan/fwd_sm80.cuh", "# include <c10/util/Half.h>", "scan/fwd_sm80.cuh includes <c10/util/Half.h>"),
        ("scan/kernel_cpu.cpp", '#include "common/check.h"', "reaches <torch/csrc/stable/tensor.h>"),
        ("scan/schema.cpp", "#include <torch/extension.h>", "scan/schema.cpp includes <torch/extension.h>"),
        ("scan/schema.cpp", '#include "common/vec.h"', "reaches common/vec.h"),
        ("module.cpp", "#include <torch/library.h>", "module.cpp includes <torch/library.h>"),
        ("scan/schema.cpp", '#include "nowhere.h"', "not below csrc"),
    ],
)
def test_forbidden_includes_are_found(tmp_path: Path, name: str, text: str, error: str) -> None:
    good = {
        "common/check.h": "#include <torch/csrc/stable/tensor.h>\n",
        "common/vec.h": "#include <ATen/cpu/vec/vec.h>\n",
        "scan/params.h": "#include <cstdint>\n",
        "scan/kernel_cpu.cpp": '#include "common/vec.h"\n#include "params.h"\n',
        "scan/schema.cpp": '#include "common/check.h"\n#include <torch/csrc/stable/library.h>\n',
        "sort/params.h": "",
    }
    for file, content in good.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    assert include_errors(tmp_path) == []
    with open(tmp_path / name, "a") as file:
        file.write(text + "\n")
    assert any(error in line for line in include_errors(tmp_path))


def test_no_build_file_ties_the_library_to_its_build_machine() -> None:
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile"]
    assert [p.name for p in files if "-march=native" in p.read_text()] == []


def test_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    version = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "python/arcore/_version.py").read_text(), re.MULTILINE
    )
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == version[1]


def test_light_import_loads_no_optional_package() -> None:
    """In a fresh interpreter, `import arcore` and the ops load neither the zoo's nor the trainer's packages."""
    code = (
        "import sys, arcore, arcore.ops, arcore.masks\n"
        "heavy = {'pytorch_lightning', 'sklearn', 'matplotlib', 'safetensors', 'PIL', 'tyro', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
