"""How often two crops of one image are global and local, or adjacent: SimCLR §3 and Fig. 3.

Random cropping alone makes two prediction tasks: from a global view to a local one (the boxes lie
one within the other) and from a view to its neighbour (the boxes lie side by side). The paper gives
no borders between them; those here are ours, and `preview` names them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simclr_ray.augment.pipeline import Pipelines
from simclr_ray.augment.views import Boxes, TwoViews

PAIRS = 2000  # of crops that fractions are counted over
WITHIN = 0.75  # of the smaller box lies in the larger one, which has at least twice its area
BESIDE = 0.25  # of the smaller box, at most, lies in the other


class CropTaskFractions(NamedTuple):
    """How often each task is set, in [0, 1]."""

    global_to_local: float
    adjacent: float


def crop_task_fractions(
    views: TwoViews | Pipelines, height: int, width: int
) -> CropTaskFractions | None:
    """Return the fractions of a pipeline over 2,000 pairs of crops of images of one size.

    None where views do not begin with a crop each: without one, or with one crop for both.
    """
    if isinstance(views, Pipelines) and views.shared:
        return None
    blank = [np.zeros((8, 8 * width // height or 8, views.channels), np.uint8)] * PAIRS
    ids = np.arange(PAIRS, dtype=np.int64)
    a, b = (stages[0].draws for stages in views.with_size(8).trace(blank, ids, 0))
    if a is None or b is None:
        return None
    return fractions_of_pairs(*(views.boxes(draws, 10 * height, 10 * width) for draws in (a, b)))


def fractions_of_pairs(a: Boxes, b: Boxes) -> CropTaskFractions:
    """Return the fractions over n pairs of crops."""
    height = _overlap(a.top, a.height, b.top, b.height)
    width = _overlap(a.left, a.width, b.left, b.width)
    areas = np.stack([a.height * a.width, b.height * b.width])
    smaller, larger = areas.min(0), areas.max(0)
    inside = height * width / smaller
    within = (inside >= WITHIN) & (larger >= 2 * smaller)
    return CropTaskFractions(float(within.mean()), float((inside <= BESIDE).mean()))


def _overlap(
    first: NDArray[np.int64], length: NDArray[np.int64],
    other: NDArray[np.int64], other_length: NDArray[np.int64],
) -> NDArray[np.int64]:  # fmt: skip
    end = np.minimum(first + length, other + other_length)
    shared: NDArray[np.int64] = np.maximum(0, end - np.maximum(first, other))
    return shared
