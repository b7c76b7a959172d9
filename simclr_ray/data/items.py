"""What an input of `prepare` is, and the images that its tasks hand over to be stored."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from simclr_ray.data.arrays import Int64s


class Item(NamedTuple):
    """One image to store.

    Attributes:
        id: Its id.
        name: What a person may call it.
        encoded: Its bytes; None where they cannot be had.
        label: Its class, or -1.
        path: Where it came from, relative to the input; empty for what is no file.
        group: What else is of the same thing; None: nothing.
    """

    id: int
    name: str
    encoded: bytes | None
    label: int
    path: str = ""
    group: int | str | None = None


class ShardTask(Protocol):
    """The rows of one shard, picklable."""

    def read(self) -> Iterator[Item]:
        """Yield the items in the order in which they are to be stored."""


class Input(Protocol):
    """A set of images that can be cut into parts."""

    @property
    def identity(self) -> dict[str, object]:
        """What decides the rows: a rerun with another identity is another dataset."""

    @property
    def num_rows(self) -> int:
        """How many rows there are, good and bad."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order; empty without labels."""

    def parts(self, rows_per_shard: int, seed: int) -> list[ShardTask]:
        """Return the shuffled rows, cut into shards."""


def encode(image: Image.Image) -> bytes:
    """Return an image as lossless WebP (PNG where WebP cannot hold it), fastest setting."""
    out = io.BytesIO()
    if image.mode in ("RGB", "RGBA", "L") and max(image.size) <= 16_383:
        image.save(out, "WEBP", lossless=True, method=0, quality=0)
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def shuffled(num_rows: int, seed: int) -> Int64s:
    """Return [0, num_rows) in the order of a seed."""
    return np.random.default_rng(seed).permutation(num_rows).astype(np.int64)


def cut(rows: Int64s, count: int) -> Sequence[Int64s]:
    """Return pieces of at most `count` rows."""
    return [rows[first : first + count] for first in range(0, len(rows), count)]
