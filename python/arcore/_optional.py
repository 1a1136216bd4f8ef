"""Packages that only some parts need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: what to import, e.g. `"PIL.Image"`.
        extra: the extra of arcore that installs it.

    Returns:
        The module.

    Raises:
        ImportError: the package is missing; says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f'this needs the package {package!r}, which is not installed: run `pip install "arcore[{extra}]"`',
            name=package,
        ) from error
