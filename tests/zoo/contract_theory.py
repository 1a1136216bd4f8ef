"""What every theory must do: its closed form holds to its tolerance, and it draws its figure."""

from __future__ import annotations

import numpy as np
import pytest

from arcore.catalog import list_systems
from arcore.catalog.claims import Claim, equals, run_claim

figures = pytest.importorskip("matplotlib.figure")


def geometric(*, quick: bool) -> Claim:
    """A test double: the geometric series."""
    partial = [sum(0.5**k for k in range(n)) for n in range(1, 30)]
    return Claim(
        (equals("sum of 30 terms", partial[-1], 2.0, tolerance=1e-8),),
        draw=lambda figure: figure.add_subplot().plot(partial),
    )


def claimed(system: str | None) -> Claim:
    if system is None:
        return geometric(quick=True)
    outcome = run_claim(system, quick=True)
    assert outcome.error is None, outcome.error
    return outcome.claim


@pytest.mark.parametrize("system", [None, *list_systems(kind="theory")])
def test_the_closed_form_holds_and_is_drawn(system: str | None) -> None:
    claim = claimed(system)
    assert claim.holds
    assert claim.draw is not None
    figure = figures.Figure(figsize=claim.size)
    claim.draw(figure)
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    assert len(figure.axes) >= 1
    assert np.asarray(canvas.buffer_rgba()).std() > 5
