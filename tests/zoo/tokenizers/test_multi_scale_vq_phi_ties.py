"""Which phi a scale takes when two are equally near: what decides is how the published code rounds."""

from __future__ import annotations

import numpy as np
import pytest

from arcore.zoo.tokenizers.multi_scale_vq.quantizer import phi_indices


@pytest.mark.parametrize("num_phi", [1, 2, 3, 4, 5])
def test_phi_follows_float64(num_phi: int):
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    for scales in range(1, 33):
        places = [k / max(scales - 1, 1) for k in range(scales)]
        assert phi_indices(scales, num_phi) == tuple(int(np.abs(ticks - place).argmin()) for place in places)


def test_float32_would_choose_otherwise():
    """The trap is real: the same rule in float32 gives another table for the published 10 scales."""
    ticks = np.linspace(np.float32(1 / 12), np.float32(11 / 12), 4, dtype=np.float32)
    places = np.arange(10, dtype=np.float32) / np.float32(9)
    assert tuple(np.abs(ticks[:, None] - places).argmin(0).tolist()) != phi_indices(10, 4)
