"""`python -m arcore` is the `arcore` command."""

from __future__ import annotations

import sys

from arcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
