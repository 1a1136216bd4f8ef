"""Edges of images, as controls of generation."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from arcore._optional import require
from arcore.nn.kinds import Bounds, check_kinds


@check_kinds
def canny(
    images: Tensor,
    *,
    sigma: Annotated[float, Bounds(least=0, finite=True)] = 1.0,
    low: float = 0.1,
    high: float = 0.2,
) -> Tensor:
    """Edges one pixel wide by Canny's method (doi:10.1109/TPAMI.1986.4767851).

    Gaussian smoothing, Sobel gradients, suppression of what is no maximum across the edge, and hysteresis: strong
    pixels, and weak ones that hang together with them.

    Args:
        images: float `[N, C, H, W]` in [-1, 1]; colours are averaged.
        sigma: of the Gaussian, in pixels; 0 smooths nothing.
        low: least gradient of a weak pixel, as a share of the largest possible one.
        high: of a strong pixel.

    Returns:
        float32 `[N, 1, H, W]`, 1 on edges and -1 elsewhere, on the images' device.

    Raises:
        ValueError: another shape, or thresholds that are not 0 <= low <= high.
        ImportError: scipy is missing.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"expected float images [N, C, H, W] but got {images.dtype} {tuple(images.shape)}")
    if not 0 <= low <= high or not sigma >= 0:
        raise ValueError(
            f"expected 0 <= low <= high and sigma >= 0 but got low={low}, high={high}, sigma={sigma}"
        )
    numpy, ndimage = require("numpy", extra="zoo"), require("scipy.ndimage", extra="train")
    grey = ((images.detach().float().mean(1) + 1) / 2).cpu().numpy()
    found = [_edges(one, sigma, low, high, numpy, ndimage) for one in grey]
    shape = (len(grey), 1, *images.shape[2:])
    table = numpy.stack(found) if found else numpy.zeros(shape)
    return torch.from_numpy(table).to(images.device, torch.float32).view(shape) * 2 - 1


def _edges(image: Any, sigma: float, low: float, high: float, numpy: Any, ndimage: Any) -> Any:
    """Booleans `[H, W]`."""
    smooth = ndimage.gaussian_filter(image, sigma) if sigma else image
    down, right = (ndimage.sobel(smooth, axis) / 4 for axis in (0, 1))
    strength = numpy.hypot(down, right)
    # The neighbours across the edge, of the four directions between pixels.
    sector = numpy.round(numpy.arctan2(down, right) / (numpy.pi / 4)).astype(int) % 4
    padded = numpy.pad(strength, 1)
    rows, columns = numpy.indices(strength.shape)
    step_down, step_right = numpy.array([0, 1, 1, 1])[sector], numpy.array([1, 1, 0, -1])[sector]
    ahead = padded[rows + 1 + step_down, columns + 1 + step_right]
    behind = padded[rows + 1 - step_down, columns + 1 - step_right]
    # Of two equal neighbours one is kept.
    thin = (strength >= ahead) & (strength > behind)
    weak = thin & (strength >= low) & (strength > 0)
    strong = weak & (strength >= high)
    parts, count = ndimage.label(weak, numpy.ones((3, 3)))
    hit = numpy.zeros(count + 1, bool)
    hit[parts[strong]] = True
    hit[0] = False
    return hit[parts]


@check_kinds
def edge_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of edge maps `[N, 1, H, W]`, pixel by pixel: `[N]`; 1 where both have no edge."""
    if one.shape != other.shape:
        raise ValueError(f"expected maps of one shape but got {tuple(one.shape)} and {tuple(other.shape)}")
    a, b = (x.flatten(1) > 0 for x in (one, other))
    union = (a | b).sum(1)
    return torch.where(union == 0, 1.0, (a & b).sum(1) / union.clamp(min=1))
