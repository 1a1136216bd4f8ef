"""The kernels for AMX tiles against the references, on tiles in plain C++: what a processor with AMX would run."""

from __future__ import annotations

import pytest

import arcore  # noqa: F401  the ops say which units this CPU has
from tests.bf16_tiles.build import emulated_library, unavailable
from tests.block_sparse_attention.test_determinism import BF16_PROBE
from tests.isa import run_with
from tests.ssd.test_kernel import BF16_SCRIPT

# In a process of its own, where the copy is loaded in the place of the package's library.
BEFORE = """
import torch
package = torch.ops.load_library
torch.ops.load_library = lambda path: package({library!r} if str(path).endswith("_ops.so") else path)
torch.set_num_threads(1)
"""
AFTER = """
import ctypes
assert ctypes.c_int64.in_dll(ctypes.CDLL({library!r}), "arcore_tile_products").value > 10000
"""


# Compiles for a minute.
@pytest.mark.slow
@pytest.mark.parametrize("script", [BF16_PROBE, BF16_SCRIPT], ids=["block_sparse_attention", "ssd"])
def test_kernels_on_tiles(script):
    if reason := unavailable():
        pytest.skip(reason)
    library = str(emulated_library())
    whole = BEFORE.format(library=library) + script + AFTER.format(library=library)
    run_with({"ARCORE_BF16": "tiles"}, whole, "tiles")
