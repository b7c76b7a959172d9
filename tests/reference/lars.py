"""LARS and its schedule in float64 NumPy, from the authors' `lars_optimizer.py` and `model.py`."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Lars:
    """One tensor under LARS; `authors` has the rate inside the momentum buffer.

    `authors`: g += wd·w, r = eeta·|w|/|g| (1 where a norm is zero), v = m·v + lr·r·g, w -= v.
    `outside`: r = eeta·|w|/(|g| + wd·|w|) of the raw gradient, v = m·v + r·(g + wd·w), w -= lr·v.
    A tensor that is not `adapted` takes r = 1; decay is excluded by giving `weight_decay=0`.
    """

    def __init__(
        self,
        weight: Array,
        *,
        momentum: float,
        weight_decay: float,
        eeta: float = 0.001,
        adapted: bool = True,
        form: Literal["authors", "outside"] = "authors",
    ) -> None:
        self.weight = weight.copy()
        self.buffer = np.zeros_like(weight)
        self.momentum, self.weight_decay, self.eeta = momentum, weight_decay, eeta
        self.adapted, self.form = adapted, form

    def step(self, gradient: Array, lr: float) -> None:
        """Move the weight by one step at rate `lr`."""
        w = self.weight
        decayed = gradient + self.weight_decay * w
        if self.form == "authors":
            ratio = self._ratio(np.linalg.norm(w), np.linalg.norm(decayed))
            self.buffer = self.momentum * self.buffer + lr * ratio * decayed
            self.weight = w - self.buffer
            return
        below = np.linalg.norm(gradient) + self.weight_decay * np.linalg.norm(w)
        ratio = self._ratio(np.linalg.norm(w), below)
        self.buffer = self.momentum * self.buffer + ratio * decayed
        self.weight = w - lr * self.buffer

    def _ratio(self, above: np.floating, below: np.floating) -> float:
        if not self.adapted or above == 0 or below == 0:
            return 1.0
        return float(self.eeta * above / below)


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Return the rate: linear from 0 at step 0, then cosine from `peak` to 0 at `total`."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
