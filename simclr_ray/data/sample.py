"""Some images of a dataset, read once before a run: which of them it can use."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from simclr_ray.augment.decode import ImageDecoder, ImageError, channels_in
from simclr_ray.config.wording import counted
from simclr_ray.data.source import Source
from simclr_ray.distributed.machine import cores
from simclr_ray.errors import DataError

SAMPLED_GROUPS: Final = 4
IMAGES_OF_A_GROUP: Final = 64
CHECK_SECONDS: Final = 0.6  # a start waits for it; 256 photographs of 300 px take 0.2
AT_ONCE: Final = 8  # images between two looks at the clock
REASONS_SHOWN: Final = 3
# What begins a reason -> what mends it.
_REMEDIES: Final = {
    "too many pixels": "a larger data.max_pixels takes them",
    "too small": "both sides need 2 pixels",
    "values of": "unsigned integers of 8 or 16 bits have a range",
    "no such file": "paths begin at the folder of the parquet file",
    "base64 text": "decode it to bytes",
}

log = logging.getLogger(__name__)


class SampledImages(NamedTuple):
    """The first images of a row group, and the row of the first."""

    first_row: int
    images: list[bytes | None]


class Sample:
    """The first images of some row groups, the same ones each time.

    A row group is read when it is first looked at, and kept.

    Args:
        source: The dataset.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        places = np.linspace(0, len(source.row_groups) - 1, SAMPLED_GROUPS).round().astype(int)
        self.places: list[int] = list(dict.fromkeys(places.tolist()))
        self._seen: list[SampledImages] = []

    def __iter__(self) -> Iterator[SampledImages]:
        """Yield the images of each row group; raises `DataError` for a file that breaks."""
        for at, index in enumerate(self.places):
            if at == len(self._seen):
                images = self.source.read_first_images(index, IMAGES_OF_A_GROUP)
                self._seen.append(SampledImages(self.source.row_groups[index].first_row, images))
            yield self._seen[at]


class _Problem(NamedTuple):
    reason: str
    remedy: str


def check_sample(
    sample: Sample,
    decoder: ImageDecoder,
    *,
    max_bad_fraction: float = 1,
    seconds: float = CHECK_SECONDS,
) -> None:
    """Refuse a dataset of which no sampled image can be used, and log how many others cannot.

    Args:
        sample: Of the dataset.
        decoder: The run's own.
        max_bad_fraction: Of its images that stops the run.
        seconds: After which no more of the sample is decoded.

    Raises:
        DataError: None can, or a file cannot be read.
    """
    num, problems, num_crowded = _decoded(sample, decoder, seconds)
    if num_crowded:
        log.warning(
            "%s: %d of %s of a sample %s several pages, of which the first is used",
            sample.source.shown_uri, num_crowded, counted(num, "image"),
            "has" if num_crowded == 1 else "have",
        )  # fmt: skip
    num_bad = problems.total()
    if not num_bad:
        return
    most = problems.most_common(REASONS_SHOWN)
    sampled = f"{counted(num, 'image')} of a sample"
    if num_bad == num:
        reason, remedy = most[0][0]
        shown = f"{reason} ({remedy})" if remedy else reason
        raise DataError(f"{sample.source.shown_uri}: none of {sampled} can be used: {shown}")
    reasons = "; ".join(f"{count:,} x {problem.reason}" for problem, count in most)
    stops = f"; more than data.max_bad_fraction={max_bad_fraction:g} of all stop the run"
    log.warning(
        "%s: %d of %s cannot be used: %s%s",
        sample.source.uri, num_bad, sampled, reasons,
        stops if num_bad > max_bad_fraction * num else "",
    )  # fmt: skip


def _decoded(
    sample: Sample, decoder: ImageDecoder, seconds: float
) -> tuple[int, Counter[_Problem], int]:
    """Return how many images were decoded in time, what is wrong with some, how many have pages."""
    num, problems, num_crowded = 0, Counter[_Problem](), 0
    begin = time.monotonic()
    with ThreadPoolExecutor(min(AT_ONCE, cores())) as pool:
        for place, (_, images) in enumerate(sample, start=1):
            for first in range(0, len(images), AT_ONCE):
                few = images[first : first + AT_ONCE]
                problems.update(filter(None, pool.map(partial(_problem, decoder), few)))
                num_crowded += sum(decoder.leaves_pages_out(i) for i in few if i)
                num += len(few)
                if time.monotonic() - begin > seconds * place / len(sample.places):
                    break
            if time.monotonic() - begin > seconds:  # reading counts as well
                break
    return num, problems, num_crowded


def _problem(decoder: ImageDecoder, image: bytes | None) -> _Problem | None:
    """Return why an image cannot be used; None where it can."""
    if image is None:
        return _Problem("null image", "")
    try:
        decoder.decode(image)
    except ImageError as error:
        text = str(error)
        if channels := channels_in(text):
            return _Problem(text, f"data.channels={channels} takes them")
        kinds = (remedy for begin, remedy in _REMEDIES.items() if text.startswith(begin))
        return _Problem(text, next(kinds, ""))
    return None
