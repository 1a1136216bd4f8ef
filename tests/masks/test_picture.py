"""Pictures of masks: what is drawn, where it is written, and what stands beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the plot extra is not installed")

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask, Labels, Segment
from arcore.masks.picture import _FORBIDDEN


@pytest.fixture(name="ax")
def _ax() -> object:
    figure, ax = pyplot.subplots()
    yield ax
    pyplot.close(figure)


def pixels(ax: Axes) -> Tensor:
    return torch.from_numpy(ax.images[0].get_array().copy())


def drawn(ax: Axes) -> Tensor:
    """Which pixels have another colour than forbidden pairs."""
    return (pixels(ax) - torch.tensor(to_rgb(_FORBIDDEN))).abs().sum(-1) > 1e-3


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize(
    "mask",
    [
        masks.next_scale((1, 2, 3)),
        masks.skip_causal(3, 2),
        masks.causal(4, 3),
        masks.causal(9).with_padding([9, 4]),
    ],
    ids=repr,
)
def test_allowed_pairs_are_coloured(mask: IntervalMask, ax: Axes) -> None:
    batch = mask.batch - 1
    assert mask.plot(ax, batch=batch) is ax
    assert torch.equal(drawn(ax), mask.to_bool()[batch, 0])
    assert ax.get_title(loc="left") == repr(mask)


def test_a_head_of_its_own(ax: Axes) -> None:
    mask = IntervalMask(torch.cat([masks.causal(8).bounds, masks.sliding_window(8, 2).bounds], 1), 8)
    mask.plot(ax, head=1)
    assert torch.equal(drawn(ax), mask.to_bool()[0, 1])


def test_colours_are_those_of_the_keys(ax: Axes) -> None:
    masks.skip_causal(2, 3).plot(ax)
    picture = pixels(ax)
    clean, noisy = picture[11, 0], picture[11, 11]
    assert not torch.equal(clean, noisy)
    assert torch.equal(picture[4, 4], clean)
    assert torch.equal(picture[7, 7], noisy)
    assert legend(ax) == ["clean", "noisy", "not allowed"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["clean 0", "clean 1", "noisy 0", "noisy 1"]


def test_scales_are_a_ramp_with_titles(ax: Axes) -> None:
    masks.next_scale((1, 2, 3)).plot(ax)
    assert legend(ax) == ["scale 0", "scale 1", "scale 2", "not allowed"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1×1", "2×2", "3×3"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1×1", "2×2", "3×3"]
    lightness = pixels(ax)[-1].sum(-1)
    assert lightness[0] < lightness[1] < lightness[-1]


def test_a_mask_without_labels(ax: Axes) -> None:
    masks.from_bool(masks.causal(5).to_bool()).plot(ax, title="")
    assert torch.equal(drawn(ax), masks.causal(5).to_bool()[0, 0])
    assert ax.get_legend() is None
    assert ax.get_title(loc="left") == ""


def test_keys_without_a_label_are_drawn(ax: Axes) -> None:
    labels = Labels((), (Segment(2, 4, "known", "known"),))
    IntervalMask(masks.full(3, 6).bounds, 6, labels=labels).plot(ax)
    assert drawn(ax).all()
    assert legend(ax) == ["known", "other", "not allowed"]


def test_tree(ax: Axes) -> None:
    mask = masks.tree([[-1, 0, 0], [-1, -1, 1]], [2, 4])
    mask.plot(ax, batch=1)
    assert torch.equal(drawn(ax), mask.to_bool()[1, 0])
    picture = pixels(ax)
    prefix, ancestor, own = picture[2, 0], picture[2, 5], picture[2, 6]
    assert len({tuple(colour.tolist()) for colour in (prefix, ancestor, own)}) == 3
    assert legend(ax) == ["prefix", "ancestors", "the node itself", "not allowed"]


def test_a_long_mask_is_sampled(ax: Axes) -> None:
    masks.causal(20000).plot(ax)
    assert drawn(ax).shape == (1200, 1200)
    assert drawn(ax).float().mean().item() == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize(("nq", "nk"), [(0, 0), (3, 0), (0, 3)])
def test_an_empty_mask(nq: int, nk: int, tmp_path: Path) -> None:
    masks.full(nq, nk).plot(path=tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_file(name: str, magic: bytes, tmp_path: Path) -> None:
    before = pyplot.get_fignums()
    masks.causal(5).plot(path=tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert pyplot.get_fignums() == before


def test_same_mask_same_bytes(tmp_path: Path) -> None:
    masks.causal(5).plot(path=tmp_path / "a.png")
    masks.causal(5).plot(path=str(tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected path to end in one of"):
        masks.causal(3).plot(path=tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="expected batch to be from 0 to 0 but got 1"):
        masks.causal(3).plot(batch=1)
    with pytest.raises(ValueError, match="expected head to be from 0 to 0 but got -1"):
        masks.causal(3).plot(head=-1)
    with pytest.raises(ValueError, match="expected batch to be from 0 to 0 but got 2"):
        masks.tree([-1], 2).plot(batch=2)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"\.\[plot\]"):
        masks.causal(3).plot()
