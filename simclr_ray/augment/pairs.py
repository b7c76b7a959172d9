"""What two crops of one picture ask of the encoder: SimCLR §3 and Fig. 3.

Random cropping alone makes two prediction tasks: from a global view to a local one (the boxes lie
one within the other) and from a view to its neighbour (the boxes lie side by side). The paper gives
no borders between them; those here are ours, and `preview` names them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simclr_ray.augment.views import Boxes

WITHIN = 0.75  # of the smaller box lies in the larger one, which has at least twice its area
BESIDE = 0.25  # of the smaller box, at most, lies in the other


class PairShares(NamedTuple):
    """How often each task is set, in [0, 1]."""

    global_to_local: float
    adjacent: float


def pair_shares(a: Boxes, b: Boxes) -> PairShares:
    """Return the shares over n pairs of crops."""
    height = _overlap(a.top, a.height, b.top, b.height)
    width = _overlap(a.left, a.width, b.left, b.width)
    areas = np.stack([a.height * a.width, b.height * b.width])
    smaller, larger = areas.min(0), areas.max(0)
    inside = height * width / smaller
    within = (inside >= WITHIN) & (larger >= 2 * smaller)
    return PairShares(float(within.mean()), float((inside <= BESIDE).mean()))


def _overlap(
    first: NDArray[np.int64], length: NDArray[np.int64],
    other: NDArray[np.int64], other_length: NDArray[np.int64],
) -> NDArray[np.int64]:  # fmt: skip
    end = np.minimum(first + length, other + other_length)
    shared: NDArray[np.int64] = np.maximum(0, end - np.maximum(first, other))
    return shared
