"""The images that a file of embeddings was made of, to be looked at."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder, ImageError, shown_as_rgb
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.uris import recall
from simclr_ray.data.contact_sheet import THUMBNAIL_SIDE, Thumbnail, thumbnail_of
from simclr_ray.data.source import Source
from simclr_ray.distributed.machine import cores
from simclr_ray.errors import DataError, SimclrRayError
from simclr_ray.evaluation.feature_columns import ID, PATH
from simclr_ray.inference.embed_input import open_rows
from simclr_ray.inference.embedding_file import EmbeddingFile
from simclr_ray.inference.embedding_index import EmbeddingIndex

log = logging.getLogger(__name__)


class EmbeddedImages(AbstractContextManager["EmbeddedImages"]):
    """Thumbnails of the rows of an index, from where its images lie now.

    Where they are not there any more, or others are, rows have names alone, and a warning says why.

    Args:
        index: Of the embeddings.
        where: Where the images lie; empty: where they lay when they were embedded.

    Raises:
        DataError: `where` was given and cannot be read, or has other images.
    """

    def __init__(self, index: EmbeddingIndex, where: str = "") -> None:
        self._index, self._is_explicit = index, bool(where)
        self._decoder = ImageDecoder(*index.origin.decoder)
        self._lists = ExitStack()
        self._where = where or recall(index.origin.images)
        self._source: Source | None = None
        self._are_files = not self._where  # named one by one
        if self._where:
            try:
                self._source = self._opened(self._where)
            except SimclrRayError as error:
                self._lists.close()
                self._refuse(str(error))

    def __exit__(self, *_: object) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Remove the list that was made of a folder."""
        self._lists.close()

    def _refuse(self, why: str) -> None:
        """Raise where somebody has said where the images are; else warn."""
        if self._is_explicit:
            raise DataError(why)
        log.warning("images are not shown: %s; --images says where they are", why)

    def _opened(self, where: str) -> Source:
        origin = self._index.origin
        columns = cfg.validate(ColumnsConfig, dict(origin.columns)) if origin.columns else None
        scratch = self._lists.enter_context(tempfile.TemporaryDirectory())
        source = open_rows(where, EmbeddingFile(str(Path(scratch) / "none.parquet")), columns)
        if source.num_rows != self._index.num_rows:
            raise DataError(
                f"{where} has {source.num_rows:,} images, and {self._index.uri} was made of "
                f"{self._index.num_rows:,}"
            )
        is_moved = where != recall(origin.images)  # the place is part of a fingerprint
        if origin.fingerprint and source.fingerprint != origin.fingerprint and not is_moved:
            raise DataError(f"{where} has changed since {self._index.uri} was made of it")
        return source

    def thumbnails(
        self, positions: Iterable[int], notes: Sequence[str] = (), side: int = THUMBNAIL_SIDE
    ) -> list[Thumbnail]:
        """Return the images at some positions of the index, in that order.

        Args:
            positions: In any order; repeats are read once.
            notes: One for each.
            side: Of a thumbnail in pixels, at most.

        Raises:
            DataError: `where` was given and has other images.
        """
        wanted = list(positions)
        shown = self._read(np.unique(np.asarray(wanted, np.int64)), side)
        return [
            Thumbnail(self._index.names[position], note, shown.get(position))
            for position, note in zip(wanted, notes or [""] * len(wanted), strict=True)
        ]

    def _read(self, positions: np.ndarray, side: int) -> dict[int, Image.Image]:
        """Return the thumbnails that there are; the bytes of one row group are in memory."""
        thumbnails: dict[int, Image.Image] = {}

        def shrunk(encoded: bytes | None) -> Image.Image | None:
            try:
                pixels = self._decoder.decode_small(encoded or b"", side)
            except ImageError:
                return None
            return thumbnail_of(shown_as_rgb(pixels), side)

        with ThreadPoolExecutor(cores()) as pool:
            for some in self._parts(positions):
                images = pool.map(shrunk, self._encoded(some))
                made = zip(some.tolist(), images, strict=True)
                thumbnails |= {position: image for position, image in made if image is not None}
        return thumbnails

    def _parts(self, positions: np.ndarray) -> list[np.ndarray]:
        """Return the positions by row group, files named one by one as many together."""
        if self._source is None:
            return [positions[first : first + 64] for first in range(0, len(positions), 64)]
        owner = self._source.groups_of(self._index.rows[positions])
        return [positions[owner == group] for group in np.unique(owner)]

    def _encoded(self, positions: np.ndarray) -> list[bytes | None]:
        names = [self._index.names[position] for position in positions]
        if self._are_files:
            files = [Path(self._index.origin.folder, name) for name in names]
            return [file.read_bytes() if file.is_file() else None for file in files]
        if self._source is None:
            return [None] * len(names)
        read = self._source.read_rows(self._index.rows[positions])
        now = {PATH: read.paths, ID: [str(number) for number in read.ids]}.get(self._index.key)
        if now is not None and list(now) != names:
            self._refuse(f"those of {self._where} are others now")
            return [None] * len(names)
        return list(read.images)
