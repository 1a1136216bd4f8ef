"""Loads the two native parts: `_ops.so` (torch.ops.arcore.*) and `_C` (host-side planners, build information)."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

with warnings.catch_warnings():
    # torch says so at its import; nothing that arcore imports here needs numpy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

FOLDER = Path(__file__).resolve().parent
_FIX = "build it with `pip install .` in arcore's source folder (torch must be installed first)"
MINIMUM_TORCH = (2, 11)


def _load() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(
            f"arcore needs torch>=2.11 but torch {torch.__version__} is installed: pip install 'torch>=2.11'"
        )
    library = FOLDER / "_ops.so"
    if not library.exists():
        raise ImportError(f"arcore's compiled extension is missing ({library} does not exist): {_FIX}")
    if importlib.util.find_spec("arcore._C") is None:
        raise ImportError(f"arcore._C is missing or was built for another Python: {_FIX}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"arcore's compiled extension does not load with torch {torch.__version__} ({error}): {_FIX}"
        ) from error


@contextmanager
def built_from_these_sources() -> Iterator[None]:
    """Says what to do where Python's side asks for an op that the compiled one does not have.

    Raises:
        ImportError: it is older than the sources, as after an update that was not built.
    """
    try:
        yield
    except (AttributeError, RuntimeError) as error:
        if "_OpNamespace" not in str(error) and "does not exist" not in str(error):
            raise
        raise ImportError(
            f"arcore's compiled extension ({FOLDER / '_ops.so'}) is older than arcore's Python files "
            f"({error}): {_FIX}, or `make build` in a checkout"
        ) from error


_load()
