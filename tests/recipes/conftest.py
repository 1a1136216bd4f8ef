from __future__ import annotations

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("sklearn")
