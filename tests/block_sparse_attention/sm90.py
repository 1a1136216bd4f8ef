"""What the tests of the sm_90a kernels' CPU models share."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCES = (
    *(
        f"block_sparse_attention/{name}.h"
        for name in ("tile_loop_sm90", "gradient_loop_sm90", "fused_loop_sm90", "params")
    ),
    *(f"common/{name}.h" for name in ("stage_clock", "host_device", "dtype")),
)


def build_model(source: str) -> ctypes.CDLL:
    """Compiles a model next to this file; a library of the same sources is reused."""
    digest = hashlib.sha256((HERE / source).read_bytes())
    for header in ("sm90_model.h", "sm90_backward_model.h"):
        digest.update((HERE / header).read_bytes())
    for header in SOURCES:
        digest.update((ROOT / "csrc" / header).read_bytes())
    folder = ROOT / "build" / "sm90_model"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:20]}.so"
    if not library.exists():
        part = folder / f"{library.stem}.{os.getpid()}"
        flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["g++", *flags, str(HERE / source), "-o", str(part)], check=True)
        part.replace(library)
    return ctypes.CDLL(str(library))


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def plan_of(
    allowed: Tensor, tile_rows: int, tile_columns: int, halves: bool = False, visits: bool = False
) -> Tensor:
    """The tile plan of a dense mask [Bm, Hm, rows, columns], in the layout of interval_tile_plan."""
    batch, heads, m, n = allowed.shape
    rows, columns = -(-m // tile_rows), -(-n // tile_columns)
    plan = torch.full((batch, heads, rows, 2 + columns * (1 + visits)), -7, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            counts = []
            for r in range(rows):
                entries = []
                for c in range(columns):
                    i, j = r * tile_rows, c * tile_columns
                    tile = allowed[b, h, i : i + tile_rows, j : j + tile_columns]
                    if not tile.any():
                        continue
                    seen = [bool(half.any()) for half in tile.split(tile_rows // 2)] if halves else [True]
                    entries.append(c << (3 if halves else 1) | int(tile.all()))
                    if halves:
                        entries[-1] |= sum(int(s) << (1 + i) for i, s in enumerate(seen))
                plan[b, h, r, 0] = len(entries)
                plan[b, h, r, 2 : 2 + len(entries)] = torch.tensor(entries, dtype=torch.int32)
                counts.append(len(entries))
            longest = sorted(range(rows), key=lambda r: -counts[r])
            plan[b, h, :, 1] = torch.tensor(longest, dtype=torch.int32)
            if visits:
                number_visits(plan[b, h], plan[b, 0, :, 1].tolist(), columns)
    return plan


def number_visits(grid: Tensor, order: list[int], columns: int) -> None:
    """Fills the places of visits: how many rows before this one, in `order`, have the same tile."""
    tiles = [row[2 : 2 + row[0]] for row in grid.tolist()]
    for rank, r in enumerate(order):
        before = [entry >> 1 for earlier in order[:rank] for entry in tiles[earlier]]
        numbers = [before.count(entry >> 1) for entry in tiles[r]]
        grid[r, 2 + columns : 2 + columns + len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
