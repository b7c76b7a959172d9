"""Decoded rows of a dataset by number, and which of them cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simclr_ray.augment.decode import ImageDecoder, ImageError
from simclr_ray.config.wording import GIB
from simclr_ray.data.image_cache import DecodedImage, ImageCache
from simclr_ray.data.rowgroups import EncodedRow, RecentGroups
from simclr_ray.data.source import Source

Take = Callable[[int], EncodedRow | None]
Missing = tuple[int, int, EncodedRow]  # its place, its number, and what is to be decoded


class UnusableRow(NamedTuple):
    """A row that cannot be used: its id, why, and the file that it was, where that is known."""

    id: int
    reason: str
    path: str = ""


class RowReader:
    """Decoded rows by number, through a bounded cache.

    `bad` names each row that could not be decoded, by its id and why.

    Args:
        source: The dataset.
        decoder: Of its images.
        cache_gib: For decoded rows.
        shared: Whether the readers of this node that share a dataset also share the cache.

    Attributes:
        least_sides: Returns the height and width of images, [n, 2], that suffice in this epoch, by
            their ids; None: images are decoded whole. Not to be set with a cache.
    """

    def __init__(
        self, source: Source, decoder: ImageDecoder, *, cache_gib: float, shared: bool = False
    ) -> None:
        self.decoder = decoder
        name = f"{source.uri} {source.fingerprint} {decoder}" if shared else ""
        self.cache = ImageCache(name, source.num_rows, int(cache_gib * GIB), decoder.channels)
        self.recent = RecentGroups(source)
        self.bad: dict[int, UnusableRow] = {}
        self.least_sides: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None

    def images(self, rows: Sequence[int], take: Take) -> list[DecodedImage | None]:
        """Return the decoded rows, None for each that cannot be used.

        Args:
            rows: Row numbers.
            take: Where encoded rows come from; those for which it has None are read one by one.
        """
        images = self.cache.find(rows)
        new: dict[int, DecodedImage] = {}
        missing = (  # one by one: while one is decoded, the next ones are still being read
            (place, row, take(row) or self.recent.take(row))
            for place, (row, image) in enumerate(zip(rows, images, strict=True))
            if image is None and row not in self.bad
        )
        for (place, row, encoded), least in self._with_least(missing):
            images[place] = decoded = self._decode(row, encoded, least)
            if decoded is not None:
                new[row] = decoded
        self.cache.keep(new)
        return images

    def image(self, row: int) -> DecodedImage | None:
        """Return one decoded row, or None where it cannot be used."""
        return self.images([row], self.recent.take)[0]

    def missing(self, first: int, last: int) -> list[int]:
        """Return which rows of [first, last) were never decoded, or not kept."""
        unknown = np.flatnonzero(~self.cache.holds(first, last)) + first
        return [row for row in unknown.tolist() if row not in self.bad]

    def _with_least(self, missing: Iterable[Missing]) -> Iterator[tuple[Missing, tuple[int, int]]]:
        """Yield rows with the height and width that suffice; (0, 0): the whole image."""
        if self.least_sides is None:
            yield from zip(missing, repeat((0, 0)), strict=False)
            return
        listed = list(missing)  # draws are made for all ids at once
        ids = np.array([encoded.id for _, _, encoded in listed], np.int64)
        sides = self.least_sides(ids).tolist() if listed else []
        yield from zip(listed, ((height, width) for height, width in sides), strict=True)

    def _decode(self, row: int, encoded: EncodedRow, least: tuple[int, int]) -> DecodedImage | None:
        try:
            if encoded.image is None:
                raise ImageError("null image")
            return DecodedImage(encoded.id, self.decoder.decode(encoded.image, least))
        except ImageError as error:
            self.bad[row] = UnusableRow(encoded.id, str(error), encoded.path)
            return None
