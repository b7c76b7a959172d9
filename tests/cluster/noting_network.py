"""A network that notes which images pass it while it trains: step, id, view and a digest of pixels.

Each process appends to a file of its own below `$NOTES`; without that nothing is noted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from simclr_ray.nn.resnet import ResNet
from simclr_ray.nn.stochastic import DropoutKeys, KeyedLayer

FOLDER = "NOTES"


class Note(NamedTuple):
    """One view of an image, as the network was given it."""

    step: int
    id: int
    view: int
    digest: str


class Noting(KeyedLayer):
    """The identity; the loop says by `draw_for` whose images pass."""

    def __init__(self) -> None:
        super().__init__(0.0, 0)

    def forward(self, x: Tensor) -> Tensor:
        folder = os.environ.get(FOLDER)
        if folder and self.training and self.keys is not None:
            rows = zip(self.keys.ids.tolist(), self.keys.views.tolist(), x, strict=True)
            with Path(folder, f"{os.uname().nodename}-{os.getpid()}.txt").open("a") as file:
                for index, view, pixels in rows:
                    digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
                    file.write(f"{self.keys.step} {index} {view} {digest}\n")
        return x

    def factor(self, keys: DropoutKeys, x: Tensor) -> Tensor:
        return x.new_ones(())

    def unkeyed(self, x: Tensor) -> Tensor:
        return x


def noting_network() -> nn.Module:
    """Return a small ResNet that notes what it is given."""
    return nn.Sequential(Noting(), ResNet(10, 0.125, "strided"))


def notes_in(files: Iterable[Path]) -> list[Note]:
    """Return all that was noted, by step, id and view, each as often as it was noted."""
    lines = [line.split() for path in files for line in path.read_text().splitlines()]
    return sorted(Note(int(step), int(i), int(view), digest) for step, i, view, digest in lines)
