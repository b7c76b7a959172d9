"""How the images of a run are decoded: what its config says, and which value is white in them."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from simclr_ray.augment.decode import (
    COLOR,
    Bands,
    DeepImage,
    ImageDecoder,
    ImageError,
    Library,
    image_decoder,
    read_deep_bands,
    read_deep_image,
)
from simclr_ray.config.experiment import DataConfig
from simclr_ray.config.schema import AUTO
from simclr_ray.config.wording import counted
from simclr_ray.data.sample import Sample
from simclr_ray.errors import ConfigError, DataError

WHITE_PERCENTILE: Final = 99.9  # of all values of the sample: single hot pixels are not white
DARK_FRACTION: Final = 0.5  # of the range: images that stay below are said to be dark
VALUES: Final = 2**16
_BELOW: Final = f"{WHITE_PERCENTILE:g} % of the values in"
_ONLY_8_BITS: Final = "no image of a sample has more than 8 bits"
# A JPEG of 24 by 24 pixels with halved colors, by which decoders are told apart.
_PROBE: Final = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVt"
    "VkVGZIhlbXd7gYKBTmCNl4x9lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8"
    "fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHz/wAARCAAYABgDASIAAhEBAxEB/8QAGQABAQEAAwAAAAAAAAAAAAAA"
    "AAQDAQUG/8QAIRAAAQQBAwUAAAAAAAAAAAAAAAECAwRhISIxERJBgaH/xAAYAQADAQEAAAAAAAAAAAAAAAACBAUD"
    "Bv/EAB4RAAICAgIDAAAAAAAAAAAAAAECABEDIQQSEzFB/9oADAMBAAIRAxEAPwDzMdfBXHWwURQKibU1Nm1ZncM+"
    "oYglvlxnisrL2LgTOOrgHaVoFjia17d/lPYDPhGmO5RXOQKE4gr8aFrYe1qdE1UAXRyuEsPc47A5sSiGrgAA2EUU"
    "JaR2qf/Z"
)

ImageT = TypeVar("ImageT", DeepImage, Bands)

log = logging.getLogger(__name__)


class ValueRange(NamedTuple):
    """The values of a sample of images of 9 to 16 bits."""

    num_images: int
    least: int
    most: int
    white: int  # the percentile
    top: int  # the largest value that the bits hold

    @property
    def is_dark(self) -> bool:
        """Whether the values use a fraction of the range that their files declare."""
        return self.most < DARK_FRACTION * self.top

    def __str__(self) -> str:
        images = f"{counted(self.num_images, 'image')} of {self.top.bit_length()} bits"
        return f"{images} with values of {self.least:,} to {self.most:,} of {self.top:,}"


def training_decoder(data: DataConfig) -> ImageDecoder:
    """Return what decodes images for training; `data.white` is a number by now."""
    library: Library = "pillow" if data.decoder == "pillow" else "turbo"
    return evaluation_decoder(data)._replace(library=library)


def evaluation_decoder(data: DataConfig) -> ImageDecoder:
    """Return what decodes images for evaluation and embedding: Pillow, whatever trains."""
    assert not isinstance(data.white, str)  # resolved
    return image_decoder(data.channels, data.white, data.max_pixels)


def resolve_decoder(data: DataConfig) -> DataConfig:
    """Return the config with the hash of what `data.decoder` makes of a JPEG here.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return data.model_copy(update={"decoder_sha256": _hash_of_probe(training_decoder(data))})
    except ImageError as error:
        raise ConfigError.of("data.decoder", f"{data.decoder}: {error}") from None


def check_decoder(data: DataConfig) -> None:
    """Raise `DataError` where a JPEG is decoded otherwise than where the run was started.

    A run whose nodes decode otherwise would depend on which of them made a view.
    """
    if not data.decoder_sha256:
        return
    try:
        same = _hash_of_probe(training_decoder(data)) == data.decoder_sha256
        why = f"by {_version_of(data)} here, to other pixels than where the run was started"
    except ImageError as error:
        same, why = False, f"not at all here: {error}"
    if not same:
        raise DataError(
            f"data.decoder={data.decoder}: JPEG is decoded {why}; the nodes of a run need the same "
            "packages"
        )


def _hash_of_probe(decoder: ImageDecoder) -> str:
    decoder = decoder._replace(channels=3, white=0)  # JPEG is RGB, and of 8 bits
    return hashlib.sha256(decoder.decode(_PROBE).tobytes()).hexdigest()


def _version_of(data: DataConfig) -> str:
    package = "pillow" if data.decoder == "pillow" else "simplejpeg"
    return f"{package} {metadata.version(package)}"


def resolve_white(data: DataConfig, sample: Sample) -> DataConfig:
    """Return the config with `data.white` in numbers; what it is, or should be, is logged.

    Raises:
        DataError: A file cannot be read.
    """
    if data.white not in (AUTO, 0):
        return data
    if data.channels not in COLOR:
        return _resolve_white_of_each(data, sample)
    seen = read_value_range(sample, data.max_pixels)
    if data.white == AUTO:
        white = seen.white if seen else 0
        why = f"{_BELOW} {seen} are below" if seen else _ONLY_8_BITS
        log.info("data.white=%d: %s", white, why)
        return data.model_copy(update={"white": float(white)})
    if seen and seen.is_dark:
        _warn_of_dark(sample, seen, f"{seen.most}")
    return data


def _resolve_white_of_each(data: DataConfig, sample: Sample) -> DataConfig:
    """Return the config with a white of each channel."""
    seen = read_channel_ranges(sample, data.max_pixels, data.channels)
    if data.white == AUTO:
        white = [float(each.white) for each in seen] or 0.0
        shown = f"[{', '.join(f'{each.white}' for each in seen)}]" if seen else "0"
        why = f"{_BELOW} channel 1 of {seen[0]} are below, and so on" if seen else _ONLY_8_BITS
        log.info("data.white=%s: %s", shown, why)
        return data.model_copy(update={"white": white})
    dark = [each for each in seen if each.is_dark]
    if dark:
        _warn_of_dark(sample, dark[0], f"[{', '.join(f'{each.most}' for each in seen)}]")
    return data


def _warn_of_dark(sample: Sample, seen: ValueRange, white: str) -> None:
    log.warning(
        "%s: %s, so they are nearly black: data.white=%s, or data.white=auto, says what is white",
        sample.source.uri, seen, white,
    )  # fmt: skip


def read_deep_ranges(sample: Sample, max_pixels: int, channels: int) -> list[ValueRange]:
    """Return the values of a sample of images of 9 to 16 bits: of gray and color all, else of each.

    Args:
        sample: Of the dataset.
        max_pixels: Larger images are left out.
        channels: Of its images.

    Raises:
        DataError: A file cannot be read.
    """
    if channels not in COLOR:
        return read_channel_ranges(sample, max_pixels, channels)
    return [seen for seen in [read_value_range(sample, max_pixels)] if seen]


def read_value_range(sample: Sample, max_pixels: int) -> ValueRange | None:
    """Return the values of a sample of images; None where its first images have 8 bits.

    Raises:
        DataError: A file cannot be read.
    """
    seen = _Histogram()
    for deep in _sampled(sample, partial(read_deep_image, max_pixels=max_pixels)):
        seen.add(deep.values if deep.values.ndim == 2 else deep.values[:, :, :3], deep.top)
    return seen.range() if seen.num_images else None


def read_channel_ranges(sample: Sample, max_pixels: int, channels: int) -> list[ValueRange]:
    """Return the values of each channel of a sample of images; none where they have 8 bits.

    Args:
        sample: Of the dataset.
        max_pixels: Larger images are left out.
        channels: Of its images; others are left out.

    Raises:
        DataError: A file cannot be read.
    """
    seen = [_Histogram() for _ in range(channels)]
    read = partial(read_deep_bands, channels=channels, max_pixels=max_pixels)
    for bands in _sampled(sample, read):
        for channel, histogram in enumerate(seen):
            histogram.add(bands.values[:, :, channel], bands.top)
    return [histogram.range() for histogram in seen if histogram.num_images]


class _Histogram:
    """How often each value of 16 bits occurs."""

    def __init__(self) -> None:
        self.counts = np.zeros(VALUES, np.int64)
        self.num_images, self.top = 0, 0

    def add(self, values: NDArray[Any], top: int) -> None:
        """Count the values of an image whose bits hold up to `top`."""
        self.counts += np.bincount(values.ravel(), minlength=VALUES)
        self.num_images, self.top = self.num_images + 1, max(self.top, top)

    def range(self) -> ValueRange:
        """Return least, most and white of what was counted."""
        below = np.cumsum(self.counts)
        white = int(np.searchsorted(below, WHITE_PERCENTILE / 100 * below[-1]))
        (occurring,) = np.nonzero(self.counts)
        least, most = int(occurring[0]), int(occurring[-1])
        return ValueRange(self.num_images, least, most, max(white, 1), self.top)


def _sampled(sample: Sample, read: Callable[[bytes], ImageT | None]) -> Iterator[ImageT]:
    """Yield what is read of a sample's images, up to a row group that has none of more bits."""
    for _, images in sample:
        deep = [read(image) for image in images if image]
        if not any(deep):
            return
        yield from (image for image in deep if image is not None)
