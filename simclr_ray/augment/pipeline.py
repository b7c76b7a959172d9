"""Any list of transformations as two views: shared ones first, then those of each view.

SimCLR's composition study (§3.1) crops each image once, then transforms one branch and leaves the
other as it is: `shared=[crop]`, `a=[...]`, `b=[]`. The paper's usual pipeline is `a=[crop, color,
blur]` and the same, drawn anew, for b; `TwoViews` is its faster form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_ray.augment.ops import Op
from simclr_ray.augment.philox import uniforms
from simclr_ray.augment.views import (
    CROP_ATTEMPTS,
    AugmentParams,
    Boxes,
    Images,
    StageImages,
    TwoViews,
    ViewPair,
    crop_fractions,
)

MOST_DRAWS = 4 * (2**16 - 1)  # of one key
SHARED, VIEW_A, VIEW_B = 0, 1, 2
MAX_STAGES = 32


@dataclass(frozen=True)
class Crop:
    """Random crop, resized to S x S and flipped: what turns images of any size into views.

    Attributes:
        min_area: Least share of the area; with 1, the whole image is resized.
        max_area: Largest.
        flip: Probability of a left-right flip.
    """

    min_area: float = 0.08
    max_area: float = 1.0
    flip: float = 0.5

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - as of an op
        """Return the uniform draws of an image: of place, flip and shape."""
        return 3 + 2 * CROP_ATTEMPTS

    def draws(self, u: NDArray[np.float64]) -> AugmentParams:
        """Return the parameters of n crops."""
        if self.min_area == 1:
            shares = np.ones((len(u), 2))
        else:
            shares = crop_fractions(u[:, 3:], self.min_area, self.max_area)
        return AugmentParams.of_crops(
            np.concatenate([shares, u[:, :2]], axis=1), u[:, 2] < self.flip
        )


class Stage(NamedTuple):
    """One entry of a list."""

    name: str
    op: Crop | Op
    probability: float = 1.0


class Pipelines:
    """Two views by lists of transformations.

    Args:
        size: Side S of a view in pixels.
        shared: Stages whose outcome both views share.
        a: Stages of view a after these.
        b: Of view b. The first stage that a view meets must be a `Crop` of probability 1.
        seed: 32 bits.
        channels: C of the images.

    Raises:
        ValueError: A view does not begin with a crop, or lists are too long.
    """

    def __init__(
        self,
        size: int,
        shared: Sequence[Stage],
        a: Sequence[Stage],
        b: Sequence[Stage],
        *,
        seed: int = 0,
        channels: int = 3,
    ) -> None:
        self.size, self.seed = size, seed
        self.shared, self.a, self.b = tuple(shared), tuple(a), tuple(b)
        for own in (self.a, self.b):
            stages = [*self.shared, *own]
            if not stages or not isinstance(stages[0].op, Crop) or stages[0].probability < 1:
                raise ValueError("a view must begin with a crop of probability 1")
            if len(stages) > MAX_STAGES:
                raise ValueError(f"a view can have {MAX_STAGES} stages at most, got {len(stages)}")
        self._cropper = TwoViews(size, channels=channels)

    @property
    def channels(self) -> int:
        """C of the images."""
        return self._cropper.channels

    def with_size(self, size: int) -> Pipelines:
        """Return the same pipelines for views of another side."""
        other = copy.copy(self)
        other.size, other._cropper = size, self._cropper.with_size(size)
        return other

    def __call__(
        self,
        images: Images,
        ids: NDArray[np.int64],
        epoch: int,
        ids_b: NDArray[np.int64] | None = None,
    ) -> ViewPair:
        """Return both views of each image. Same as a call of `TwoViews`.

        Of two images the shared stages are drawn for each: by its own id.
        """
        if ids_b is None:
            a, b = self.trace(images, ids, epoch)
        else:
            a = self.trace(images[: len(ids)], ids, epoch, (VIEW_A,))[0]
            b = self.trace(images[len(ids) :], ids_b, epoch, (VIEW_B,))[0]
        return ViewPair(a[-1].images, b[-1].images)

    def trace(
        self,
        images: Images,
        ids: NDArray[np.int64],
        epoch: int,
        views: Sequence[int] = (VIEW_A, VIEW_B),
    ) -> list[list[StageImages]]:
        """Return what each view is after each of its stages."""
        shared = list(self._run(images, ids, epoch, SHARED, self.shared, 0))
        begun: Images | Tensor = shared[-1].images if shared else images
        traces = []
        for view in views:
            stages, first = {VIEW_A: self.a, VIEW_B: self.b}[view], len(self.shared)
            traces.append([*shared, *self._run(begun, ids, epoch, view, stages, first)])
        return traces

    def boxes(self, draws: AugmentParams, height: int, width: int) -> Boxes:
        """Return the crops, in pixels, of images of one size."""
        return self._cropper.boxes(draws, height, width)

    def _run(
        self,
        images: Images,
        ids: NDArray[np.int64],
        epoch: int,
        view: int,
        stages: Sequence[Stage],
        first: int,
    ) -> Iterator[StageImages]:
        """Yield the images after each stage; `first` is the place of the first one in its view."""
        current: Images = images
        for place, stage in enumerate(stages, start=first):
            num = 1 + stage.op.num_draws(self.size)
            u = self._draw(ids, num, epoch, view + 4 * place)
            draws = None
            if isinstance(stage.op, Crop):
                draws = stage.op.draws(u[:, 1:])
                done = self._cropper.cropped(current, draws)
            else:
                assert isinstance(current, Tensor)
                done = stage.op(current.float() / 255, u[:, 1:])
                done = (done * 255).round_().to(torch.uint8)
            if stage.probability < 1:
                assert isinstance(current, Tensor)
                chosen = torch.from_numpy(u[:, 0] < stage.probability)
                rows = chosen[:, None, None, None].to(current.device)
                done = torch.where(rows, done, current)
            current = done
            yield StageImages(stage.name, done, draws if place == 0 else None)

    def _draw(self, ids: NDArray[np.int64], num: int, epoch: int, sub: int) -> NDArray[np.float64]:
        """Return [n, num] draws for one stage of one view."""
        parts = [
            uniforms(
                ids,
                min(MOST_DRAWS, num - start),
                seed=self.seed,
                epoch=epoch,
                sub=sub + 4 * MAX_STAGES * part,
                purpose="stages",
            )
            for part, start in enumerate(range(0, num, MOST_DRAWS))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
