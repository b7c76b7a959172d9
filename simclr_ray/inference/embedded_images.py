"""The images that a file of embeddings was made of, to be looked at."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder, ImageError, shown_as_rgb
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.uris import recall
from simclr_ray.data.contact_sheet import THUMBNAIL_SIDE, Thumbnail, thumbnail_of
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError, SimclrRayError
from simclr_ray.evaluation.feature_columns import ID, PATH
from simclr_ray.inference.embed_input import open_rows
from simclr_ray.inference.embedding_file import EmbeddingFile
from simclr_ray.inference.embedding_index import EmbeddingIndex

log = logging.getLogger(__name__)


class EmbeddedImages(AbstractContextManager["EmbeddedImages"]):
    """Thumbnails of the rows of an index, from where its images lie now.

    Images that are not there, or are others by now, are not shown: their rows have names alone, and
    a warning says why.

    Args:
        index: Of the embeddings.
        where: Where the images lie; empty: where they lay when they were embedded.

    Raises:
        DataError: `where` was given and cannot be read, or holds other images.
    """

    def __init__(self, index: EmbeddingIndex, where: str = "") -> None:
        self._index = index
        self._decoder = ImageDecoder(*index.origin.decoder)
        self._source: Source | None = None
        self._lists = ExitStack()
        self._place = where or recall(index.origin.images)
        if self._place:
            try:
                self._source = self._opened(self._place)
            except SimclrRayError as error:
                self._lists.close()
                if where:
                    raise
                log.warning("images are not shown: %s; --images says where they are", error)

    def __exit__(self, *_: object) -> None:
        """Remove the list that was made of a folder."""
        self._lists.close()

    def _opened(self, place: str) -> Source:
        origin = self._index.origin
        columns = cfg.validate(ColumnsConfig, dict(origin.columns)) if origin.columns else None
        scratch = self._lists.enter_context(tempfile.TemporaryDirectory())
        source = open_rows(place, EmbeddingFile(str(Path(scratch) / "none.parquet")), columns)
        if source.num_rows != self._index.num_rows:
            raise DataError(
                f"{place} has {source.num_rows:,} images, and {self._index.uri} was made of "
                f"{self._index.num_rows:,}"
            )
        return source

    def thumbnails(
        self, places: Iterable[int], notes: Sequence[str] = (), side: int = THUMBNAIL_SIDE
    ) -> list[Thumbnail]:
        """Return the images at some places of the index, in that order.

        Args:
            places: In any order; repeats are read once.
            notes: One for each.
            side: Of a thumbnail in pixels, at most.
        """
        wanted = list(places)
        shown = self._read(sorted(set(wanted)), side)
        return [
            Thumbnail(self._index.names[place], note, shown.get(place))
            for place, note in zip(wanted, notes or [""] * len(wanted), strict=True)
        ]

    def _read(self, places: Sequence[int], side: int) -> dict[int, Image.Image]:
        thumbnails = {}
        for place, encoded in zip(places, self._encoded(places), strict=True):
            with suppress(ImageError, OSError):
                if encoded is not None:
                    pixels = shown_as_rgb(self._decoder.decode(encoded))
                    thumbnails[place] = thumbnail_of(pixels, side)
        return thumbnails

    def _encoded(self, places: Sequence[int]) -> list[bytes | None]:
        names = [self._index.names[place] for place in places]
        if self._source is None:  # files that were named one by one
            return [Path(n).read_bytes() if Path(n).is_file() else None for n in names]
        read = self._source.read_rows(self._index.rows[np.asarray(places, np.int64)])
        now = {PATH: read.paths, ID: [str(number) for number in read.ids]}.get(self._index.key)
        if now is not None and list(now) != names:
            log.warning("images are not shown: those of %s are others now", self._place)
            return [None] * len(names)
        return list(read.images)
