"""Every image of a dataset looked at once: what cannot be used, sizes, ranges, copies, leaks.

Threads decode, since Pillow lets go of the interpreter's lock, and one reads ahead; of an image
there stays its thumbnail, its size and two digests.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from simclr_ray.augment.decode import COLOR, ImageDecoder, ImageError, Pixels, shown_as_rgb
from simclr_ray.data.ahead import ahead
from simclr_ray.data.alignment import SIDE
from simclr_ray.data.arrays import Float32s, Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.decoding import ValueRange, read_deep_ranges
from simclr_ray.data.duplicates import flat, linked, near_copies, same_digests, thumbnail
from simclr_ray.data.sample import Sample
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.distributed.machine import cores

DIGEST_BYTES = 16  # 1e9 images collide with a chance of 1e-21
RGB = ("red", "green", "blue")
OnStage = Callable[[str, str, int, int], None]  # what is looked at, unit, done, all
LOOKING, COMPARING = "images", "pairs"


class ChannelRange(NamedTuple):
    """Values of one channel over all pixels of all images, of 255, as decoding gives them."""

    name: str
    least: int
    most: int
    mean: float
    std: float


class Copies(NamedTuple):
    """Rows that show one image; `labels_differ` where they are not all of one class."""

    rows: list[int]
    misfit: float  # the largest of those that link them: 0 for the same pixels
    same_bytes: bool
    labels_differ: bool


class Match(NamedTuple):
    """A row of another dataset that shows the same image as one of this, the nearest."""

    other: int
    row: int
    misfit: float  # 0 for the same pixels


@dataclass(frozen=True)
class ImageScan:
    """What looking at all images of a dataset left of them.

    Attributes:
        name: What the user calls the dataset.
        source: The dataset.
        decoder: Of its images.
        ids: int64 [M].
        paths: Which file each was; None: the dataset does not say.
        labels: int64 [M], -1 without.
        sizes: int64 [M, 2], width and height in pixels; 0 for those that cannot be used.
        unusable: Reason -> rows.
        values: int64 [C, 256], how often each value occurs in each channel.
        thumbnails: uint8 [M, 32, 32, 3].
        pixels: Digest of size and pixels of each; empty for those that cannot be used.
        encoded: Digest of the bytes of each.
    """

    name: str
    source: Source
    decoder: ImageDecoder
    ids: Int64s
    paths: list[str | None] | None
    labels: Int64s
    sizes: Int64s
    unusable: dict[str, list[int]]
    values: Int64s
    thumbnails: npt.NDArray[np.uint8]
    pixels: list[bytes]
    encoded: list[bytes]

    @property
    def usable(self) -> Int64s:
        """Rows whose image can be used, ascending."""
        return np.flatnonzero(self.sizes[:, 0])

    @cached_property
    def is_flat(self) -> npt.NDArray[np.bool_]:
        """Which images are of one color, bool [M]; those that cannot be used are."""
        return flat(self.thumbnails)

    @cached_property
    def compared(self) -> Int64s:
        """Rows that are compared: usable, of no single color, the first of their pixels."""
        seen: set[bytes] = set()
        first = []
        for row in self.usable.tolist():
            if not self.is_flat[row] and self.pixels[row] not in seen:
                first.append(row)
            seen.add(self.pixels[row])
        return np.array(first, np.int64)

    @property
    def channels(self) -> list[ChannelRange]:
        """Ranges of the channels; empty without usable images."""
        num = len(self.values)
        numbered = (f"channel {at}" for at in range(1, num + 1))
        names = RGB if num == 3 else ("gray",) if num == 1 else numbered
        return [
            _range(name, counts)
            for name, counts in zip(names, self.values, strict=True)
            if counts.any()
        ]

    def name_of(self, row: int) -> str:
        """Return what a person may call a row: its file, or its number."""
        path = self.paths[row] if self.paths else None
        return path or f"row {row}"


class Leaks(NamedTuple):
    """Images of another dataset, as a test split, that are in this one."""

    other: ImageScan
    matches: list[Match]
    num_crowded: int


class Inspection(NamedTuple):
    """What was seen of a dataset.

    `same_pixels` and `near` are groups of copies; of images with the same pixels the first alone is
    compared with others. `num_flat` images of one color are compared by pixels alone, and
    `num_crowded` have more look-alikes than were compared. `deep` are the values of images of 9 to
    16 bits: all of gray and color, of others those of each channel; none where all have 8 bits.
    """

    scan: ImageScan
    deep: list[ValueRange]
    duplicates: bool  # whether copies were looked for
    same_pixels: list[Copies]
    near: list[Copies]
    num_flat: int
    num_crowded: int
    leaks: Leaks | None


def inspect_all(
    source: Source,
    *,
    against: Source | None = None,
    names: tuple[str, str] = ("", ""),
    duplicates: bool = True,
    channels: int = 3,
    on_progress: OnStage | None = None,
) -> Inspection:
    """Return what is seen when every image is decoded, and compared with every other.

    Args:
        source: The dataset.
        against: Another, as the test split, whose images are looked for in `source`.
        names: What to call both; empty: by their places.
        duplicates: Whether to look for copies within `source`.
        channels: Of the images, as `data.channels`. Copies are looked for in what
            `shown_as_rgb` shows of them, exact ones in all channels.
        on_progress: Called with the dataset's place, what is counted (`images` looked at, then
            `pairs` compared), how many are done and how many there are.

    Raises:
        DataError: A file is gone, changed, or broken.
    """
    tell = on_progress or (lambda _what, _unit, _done, _total: None)
    max_pixels = ImageDecoder().max_pixels
    deep = read_deep_ranges(Sample(source), max_pixels, channels)
    decoder = ImageDecoder(max_pixels, channels=channels)
    # what is nearly black is stretched, as `data.white=auto` does, or all would be of one color
    if any(seen.is_dark for seen in deep):
        levels = tuple(float(seen.white) for seen in deep)
        decoder = decoder._replace(white=levels[0] if channels in COLOR else levels)
    scan = look(source, decoder, tell, names[0])
    same: list[Copies] = []
    near: list[Copies] = []
    num_crowded = 0
    if duplicates:
        same = [_copies(scan, rows, 0.0) for rows in same_digests(scan.pixels)]
        near, num_crowded = _near(scan, tell)
    num_flat = int(scan.is_flat[scan.usable].sum())
    leaks = _leaks(scan, look(against, decoder, tell, names[1]), tell) if against else None
    return Inspection(scan, deep, duplicates, same, near, num_flat, num_crowded, leaks)


def look(source: Source, decoder: ImageDecoder, tell: OnStage, name: str = "") -> ImageScan:
    """Return what is kept of each image of a dataset, after decoding it.

    Raises:
        DataError: A file is gone, changed, or broken.
    """
    m, name = source.num_rows, name or source.uri
    ids, sizes = np.zeros(m, np.int64), np.zeros((m, 2), np.int64)
    thumbnails = np.zeros((m, SIDE, SIDE, 3), np.uint8)
    values = np.zeros((decoder.channels, 256), np.int64)
    unusable: defaultdict[str, list[int]] = defaultdict(list)
    pixels, encoded = [b""] * m, [b""] * m
    paths: list[str | None] = [None] * m
    with ThreadPoolExecutor(cores()) as pool:
        for first, table in ahead(_groups(source), 1):
            rows = range(first, first + len(table.images))
            ids[first : rows.stop] = table.ids
            if table.paths is not None:
                paths[first : rows.stop] = table.paths
            for row, seen in zip(
                rows, pool.map(partial(_look_at, decoder), table.images), strict=True
            ):
                if isinstance(seen, str):
                    unusable[seen].append(row)
                    continue
                pixels[row], encoded[row], sizes[row], thumbnails[row], counts = seen
                values += counts
            tell(name, LOOKING, rows.stop, m)
    labels = source.labels() if source.has_labels else np.full(m, NO_LABEL)
    return ImageScan(
        name,
        source,
        decoder,
        ids,
        paths if source.has_paths else None,
        labels,
        sizes,
        dict(unusable),
        values,
        thumbnails,
        pixels,
        encoded,
    )


class _Seen(NamedTuple):
    pixels: bytes
    encoded: bytes
    size: tuple[int, int]
    thumbnail: npt.NDArray[np.uint8]
    values: Int64s


def _look_at(decoder: ImageDecoder, encoded: bytes | None) -> _Seen | str:
    """Return what is kept of an image, or why it cannot be used."""
    try:
        decoded = decoder.decode(encoded or b"")
    except ImageError as error:
        return str(error)
    height, width, _ = decoded.shape
    image = Image.fromarray(shown_as_rgb(decoded))
    pixels = hashlib.blake2b(
        decoded.data, digest_size=DIGEST_BYTES, salt=f"{width}x{height}".encode()
    )
    whole = hashlib.blake2b(encoded or b"", digest_size=DIGEST_BYTES)
    values = _histogram(decoded, image)
    return _Seen(pixels.digest(), whole.digest(), (width, height), thumbnail(image), values)


def _histogram(pixels: Pixels, shown: Image.Image) -> Int64s:
    """Return how often each value occurs in each channel of pixels [H, W, C], int64 [C, 256]."""
    if pixels.shape[2] == 3:
        return np.array(shown.histogram(), np.int64).reshape(3, 256)
    planes = np.moveaxis(pixels, 2, 0)
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in planes])


def _groups(source: Source) -> Iterator[tuple[int, RowTable]]:
    """Yield the row groups with their first rows."""
    for index, group in enumerate(source.row_groups):
        yield group.first_row, source.read_group(index, labels=False)


def _range(name: str, counts: Int64s) -> ChannelRange:
    """Return least, most, mean and standard deviation of a histogram [256]."""
    occur, value, total = np.flatnonzero(counts), np.arange(256), int(counts.sum())
    mean = float((counts * value).sum() / total)
    std = float(np.sqrt((counts * (value - mean) ** 2).sum() / total))
    return ChannelRange(name, int(occur[0]), int(occur[-1]), mean, std)


def _copies(scan: ImageScan, rows: Int64s, misfit: float) -> Copies:
    encoded = {scan.encoded[row] for row in rows}
    labels = set(scan.labels[rows].tolist()) - {NO_LABEL}
    return Copies(rows.tolist(), misfit, len(encoded) == 1, len(labels) > 1)


def _near(scan: ImageScan, tell: OnStage) -> tuple[list[Copies], int]:
    rows = scan.compared
    copies = near_copies(
        scan.thumbnails[rows],
        scan.sizes[rows].min(1),
        on_pairs=lambda done, total: tell(scan.name, COMPARING, done, total),
    )
    groups = linked(len(rows), copies.pairs)
    group_of = {int(row): at for at, group in enumerate(groups) for row in group}
    misfits = [0.0] * len(groups)
    for (row, _), misfit in zip(copies.pairs.tolist(), copies.misfits.tolist(), strict=True):
        at = group_of[row]
        misfits[at] = max(misfits[at], misfit)
    near = [_copies(scan, rows[g], m) for g, m in zip(groups, misfits, strict=True)]
    return near, copies.num_crowded


def _leaks(scan: ImageScan, other: ImageScan, tell: OnStage) -> Leaks:
    """Return which images of `other` are in `scan`: by their pixels, else nearly."""
    row_of = {digest: row for row, digest in reversed(list(enumerate(scan.pixels))) if digest}
    same = {
        row: Match(row, row_of[digest], 0.0)
        for row, digest in enumerate(other.pixels)
        if digest in row_of
    }
    usable = other.usable.tolist()
    queries = [row for row in usable if row not in same and not other.is_flat[row]]
    rows = scan.compared
    if not len(rows) or not queries:
        return Leaks(other, list(same.values()), 0)
    copies = near_copies(
        np.concatenate([scan.thumbnails[rows], other.thumbnails[queries]]),
        np.concatenate([scan.sizes[rows], other.sizes[queries]]).min(1),
        first_query=len(rows),
        on_pairs=lambda done, total: tell(other.name, COMPARING, done, total),
    )
    return Leaks(
        other, _nearest(same, rows, queries, copies.pairs, copies.misfits), copies.num_crowded
    )


def _nearest(
    same: dict[int, Match], rows: Int64s, queries: list[int], pairs: Int64s, misfits: Float32s
) -> list[Match]:
    """Return the matches by their row of the other dataset, of each the one that fits best."""
    matches = dict(same)
    for at in np.argsort(misfits, kind="stable"):
        row, other = rows[pairs[at, 0]], queries[pairs[at, 1] - len(rows)]
        matches.setdefault(other, Match(other, int(row), float(misfits[at])))
    return [matches[other] for other in sorted(matches)]
