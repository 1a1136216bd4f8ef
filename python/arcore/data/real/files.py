"""Files of packages, found without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from arcore._optional import how_to_install
from arcore.nn.kinds import check_kinds


@check_kinds
def package_file(package: str, name: str, *, extra: str, distribution: str | None = None) -> Path:
    """The path of a file of a package, without importing the package.

    Args:
        package: as it is imported.
        name: of the file, below the package.
        extra: the extra of arcore that installs it.
        distribution: as it is installed, where that name is another one.

    Raises:
        ImportError: the package is missing, or has no such file.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            f"this needs the package {distribution or package!r}, which is not installed: {how_to_install(extra)}",
            name=package,
        )
    path = Path(found.submodule_search_locations[0]) / name
    if not path.exists():
        raise ImportError(
            f"the installed {distribution or package!r} has no {name}: install a version that arcore knows, "
            f"{how_to_install(extra)}",
            name=package,
        )
    return path
