"""A copy of arcore's op library whose AMX kernels run on a processor without AMX, on tiles.h."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "bf16_tiles"
# Those that choose a unit, and so have to be told that there are tiles.
CHOOSING = ("block_sparse_attention", "common", "ssd")


def _objects() -> dict[str, Path]:
    """Compiled sources of the op library by ``target/source``, from the newest build folder."""
    folders = sorted(ROOT.glob("build/cmake-*/CMakeFiles"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Path] = {}
    for path in folders[-1].glob("*.dir/csrc/**/*.o") if folders else ():
        target = path.relative_to(folders[-1]).parts[0].removesuffix(".dir")
        if target != "_C":
            found[f"{target}/{path.as_posix().partition('/csrc/')[2].removesuffix('.o')}"] = path
    return found


def unavailable() -> str | None:
    """Why the library cannot be built or run here, or None."""
    if shutil.which("g++") is None:
        return "g++ was not found"
    # The kernels round by AVX512-BF16 whichever unit multiplies.
    if "dot" not in torch.ops.arcore.cpu_bf16_supported().split():
        return "this CPU has no AVX512-BF16"
    if not _objects():
        return "no build folder (installed from a wheel)"
    return None


def emulated_library() -> Path:
    """Compiles what differs and links it with the rest; a library of the same sources is reused."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-w"]
    flags += [f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    kernel = ["-DCPU_CAPABILITY=AMX", "-DCPU_CAPABILITY_AVX512", "-DARCORE_ISA=AMX", "-DARCORE_BF16_UNIT"]
    kernel += [
        "-DARCORE_AMX",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
    ]
    kernel += ["-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c", "-include", str(HERE / "tiles.h")]
    objects = _objects()
    schema = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DARCORE_EMULATED_TILES"]
    jobs = {f"_ops/{op}/schema.cpp": schema for op in CHOOSING}
    jobs |= {name: kernel for name in objects if name.startswith("arcore_cpu_AMX/")}
    digest = hashlib.sha256(json.dumps([flags, jobs, torch.__version__]).encode())
    for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp"), HERE / "tiles.h"]):
        digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{digest.hexdigest()[:20]}.so"
    with open(CACHE / f"{library.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        folder = CACHE / library.stem
        folder.mkdir(exist_ok=True)
        for i, (name, extra) in enumerate(jobs.items()):
            source = ROOT / "csrc" / name.partition("/")[2]
            objects[name] = folder / f"{i}.o"
            command = ["g++", *flags, *extra, "-c", str(source), "-o", str(objects[name])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name} does not compile\n{done.stderr}"
        link = ["g++", "-shared", *map(str, objects.values()), "-o", f"{library}.part"]
        link += [f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined"]
        subprocess.run(link, check=True)
        os.replace(f"{library}.part", library)
        shutil.rmtree(folder)
    return library
