"""Copies of images within a dataset, or between two: the same pixels, or nearly.

Two steps. What a perceptual hash is made of, the low frequencies of a thumbnail's cosine transform,
names look-alikes by a matrix product; then each is laid on the image and compared block by block
(`data.alignment`). imagehash and imagededup stop after the first step, with one bit a coefficient,
and a crop moves what they hash. Of 1,349 copies planted among 5,000 images of Caltech-101
(`tests/long/test_duplicates.py`) a 64-bit pHash finds 70 % within 2 bits and 94 % within 8, where 4
and 39 % of its pairs are not planted; these steps find 98.6 %, and 0.4 % of the pairs are no
copies. So the code is our own.

Memory is linear: 3.5 kB an image, 3.5 GB for 1 million. So is the time of decoding, and of aligning
at most 16 look-alikes an image, 0.25 ms each. The product is quadratic: 22 s of a core for 100,000
images, 40 minutes for 1 million. CIFAR-10, 50,000 images against 10,000, takes 40 s of a core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from simclr_ray.augment.decode import Pixels
from simclr_ray.data.alignment import GRAY, SIDE, are_copies
from simclr_ray.data.arrays import Float32s, Int64s
from simclr_ray.distributed.machine import cores

OnPairs = Callable[[int, int], None]

FREQUENCIES: Final = 8  # of each axis, as pHash
# Cosine between descriptors. Of the planted copies of Caltech-101 all are above, and 0.1 % of all
# pairs; of CIFAR-10 0.01 %.
LEAST_ALIKE: Final = 0.75
MOST_LOOKALIKES: Final = 16  # of an image, the most alike: bounds time where all images are alike
FLAT_STD: Final = 3.0  # of 255: below, a thumbnail is one color and its pattern noise
ROWS_AT_ONCE, COLUMNS_AT_ONCE, PAIRS_AT_ONCE = 512, 8192, 256  # 17 MB of products; 30 MB a thread


class NearCopies(NamedTuple):
    """Pairs of images that show the same.

    Attributes:
        pairs: int64 [p, 2], of each pair the earlier row and the later.
        misfits: float32 [p], 0 for the same pixels.
        num_crowded: Images with more look-alikes than were compared.
    """

    pairs: Int64s
    misfits: Float32s
    num_crowded: int


def thumbnail(image: Image.Image) -> Pixels:
    """Return an RGB image squeezed to 32 x 32 pixels, uint8 [32, 32, 3]."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def flat(thumbnails: Pixels) -> npt.NDArray[np.bool]:
    """Return which thumbnails [n, 32, 32, 3] are of one color, bool [n]: none is compared."""
    stds = [(part @ GRAY).std((1, 2)) for part in _in_parts(thumbnails)]
    is_flat: npt.NDArray[np.bool] = np.concatenate([*stds, np.zeros(0, np.float32)]) < FLAT_STD
    return is_flat


def same_digests(digests: Sequence[bytes]) -> list[Int64s]:
    """Return the rows of each digest that occurs more than once, by their first; empty ones not."""
    rows: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests):
        if digest:
            rows[digest].append(row)
    return [np.array(same) for same in rows.values() if len(same) > 1]


def near_copies(
    thumbnails: Pixels,
    sides: npt.NDArray[np.integer],
    *,
    first_query: int = 0,
    on_pairs: OnPairs | None = None,
) -> NearCopies:
    """Return the pairs of thumbnails that show the same image.

    Finds recompressed, scaled and slightly cropped copies, also where brightness or contrast was
    changed; none that was flipped or turned. Leave flat ones out before: they are all alike.

    Args:
        thumbnails: uint8 [n, 32, 32, 3], by `thumbnail`.
        sides: int [n], the shorter side of each image in pixels.
        first_query: Compare rows from this one on with those before it alone; 0: all with all.
        on_pairs: Called with (pairs looked at, all pairs).
    """
    descriptors = _descriptors(thumbnails)
    pairs, misfits, num_crowded = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)], 0
    with ThreadPoolExecutor(cores()) as pool:

        def compared(some: Int64s) -> tuple[Int64s, Float32s]:
            first, second = some.T
            is_copy, misfit = are_copies(
                thumbnails[first], thumbnails[second], np.minimum(sides[first], sides[second])
            )
            return some[is_copy], misfit[is_copy]

        for lookalikes, crowded in _lookalikes(descriptors, first_query, on_pairs):
            num_crowded += crowded
            parts = np.split(lookalikes, range(PAIRS_AT_ONCE, len(lookalikes), PAIRS_AT_ONCE))
            for part, misfit in pool.map(compared, parts):
                pairs.append(part)
                misfits.append(misfit)
    return NearCopies(np.concatenate(pairs), np.concatenate(misfits), num_crowded)


def linked(num_rows: int, pairs: Int64s) -> list[Int64s]:
    """Return the groups of rows that pairs [p, 2] link, directly or by others; each ascending."""
    if not len(pairs):
        return []
    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(num_rows, num_rows))
    _, group_of = connected_components(graph, directed=False)
    order = np.argsort(group_of, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def _in_parts(thumbnails: Pixels) -> Iterator[Float32s]:
    for first in range(0, len(thumbnails), ROWS_AT_ONCE):
        yield thumbnails[first : first + ROWS_AT_ONCE].astype(np.float32)


def _descriptors(thumbnails: Pixels) -> Float32s:
    """Return unit vectors [n, 63] of the low frequencies, the higher weighted by their root."""
    frequency = np.hypot(*np.mgrid[:FREQUENCIES, :FREQUENCIES]).astype(np.float32)
    out = np.zeros((len(thumbnails), FREQUENCIES**2 - 1), np.float32)
    for part, first in zip(_in_parts(thumbnails), range(0, len(out), ROWS_AT_ONCE), strict=True):
        waves = dct(dct(part @ GRAY, axis=1, norm="ortho"), axis=2, norm="ortho")
        low = waves[:, :FREQUENCIES, :FREQUENCIES] * np.sqrt(frequency)
        vectors = low.reshape(len(part), -1)[:, 1:]  # the mean does not count
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        out[first : first + len(part)] = vectors / np.maximum(norms, 1e-6)
    return out


class _Lookalikes(NamedTuple):
    """Pairs whose descriptors are alike: earlier rows, later rows, cosines, [p] each."""

    earlier: Int64s
    later: Int64s
    cosines: Float32s

    def most_alike(self, count: int) -> _Lookalikes:
        """Return of each later row the `count` pairs that are most alike."""
        order = np.lexsort((self.earlier, -self.cosines, self.later))
        starts = np.flatnonzero(np.diff(self.later[order], prepend=-1))
        lengths = np.diff(starts, append=len(order))
        kept = order[np.arange(len(order)) - np.repeat(starts, lengths) < count]
        return _Lookalikes(self.earlier[kept], self.later[kept], self.cosines[kept])


def _lookalikes(
    descriptors: Float32s, first_query: int, on_pairs: OnPairs | None
) -> Iterator[tuple[Int64s, int]]:
    """Yield pairs of look-alikes [p, 2], and how many rows have more of them than are kept."""
    num_rows = len(descriptors)
    total = (num_rows - first_query) * first_query or num_rows * (num_rows - 1) // 2
    done = 0
    for start in range(first_query, num_rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, num_rows)
        alike = _above(descriptors, start, stop, first_query or stop)
        kept = alike.most_alike(MOST_LOOKALIKES)
        num_crowded = int((np.bincount(alike.later - start) > MOST_LOOKALIKES).sum())
        yield np.stack([kept.earlier, kept.later], 1), num_crowded
        done += (stop - start) * first_query or int(np.arange(start, stop).sum())
        if on_pairs:
            on_pairs(done, total)


def _above(descriptors: Float32s, start: int, stop: int, before: int) -> _Lookalikes:
    """Return the look-alikes of some rows among those before a row, one more than are kept."""
    alike = _Lookalikes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    for first in range(0, before, COLUMNS_AT_ONCE):
        columns = descriptors[first : min(first + COLUMNS_AT_ONCE, before)]
        cosines = descriptors[start:stop] @ columns.T
        later, earlier = np.nonzero(cosines > LEAST_ALIKE)
        earlier_first = earlier + first < later + start
        later, earlier = later[earlier_first], earlier[earlier_first]
        merged = _Lookalikes(
            np.concatenate([alike.earlier, earlier + first]),
            np.concatenate([alike.later, later + start]),
            np.concatenate([alike.cosines, cosines[later, earlier]]),
        )
        alike = merged.most_alike(MOST_LOOKALIKES + 1)
    return alike
