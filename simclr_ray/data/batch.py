"""One rank's share of a global batch, as the stream hands it to the loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """This rank's share of one global batch."""

    step: int
    a: Tensor  # uint8 [n, C, S, S]
    b: Tensor  # uint8 [n, C, S, S]
    ids: Tensor  # int64 [n], of the images of view a, by which labels and dropout go
    bad: Tensor  # int64 [m], ids of rows that had to be replaced
    reasons: tuple[str, ...] = ()  # why, of each of `bad`
    paths: tuple[str, ...] = ()  # the file of each of `bad`, empty where it is not known
    labels: Tensor | None = (
        None  # int64 [n] or a teacher's scores [n, 2, K], if the loss takes them
    )
    ids_b: Tensor | None = None  # int64 [n], where view b is of another image of the group
