"""How the images of a run are decoded: what its config says, and which value is white in them."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterator
from importlib import metadata
from typing import Final, NamedTuple

import numpy as np

from simclr_ray.augment.decode import DeepImage, ImageDecoder, ImageError, Library, read_deep_image
from simclr_ray.config.experiment import DataConfig
from simclr_ray.config.schema import AUTO
from simclr_ray.config.wording import counted
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, ConfigIssue, DataError

SAMPLED_GROUPS: Final = 4
IMAGES_OF_A_GROUP: Final = 64
WHITE_PERCENTILE: Final = 99.9  # of all values of the sample: single hot pixels are not white
DARK_FRACTION: Final = 0.5  # of the range: images that stay below are said to be dark
VALUES: Final = 2**16
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
    return ImageDecoder(data.max_pixels, white=float(data.white))


def resolve_decoder(data: DataConfig) -> DataConfig:
    """Return the config with the hash of what `data.decoder` makes of a JPEG here.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return data.model_copy(update={"decoder_sha256": _hash_of_probe(training_decoder(data))})
    except ImageError as error:
        raise ConfigError([ConfigIssue("data.decoder", f"{data.decoder}: {error}")]) from None


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
    return hashlib.sha256(decoder.decode(_PROBE).tobytes()).hexdigest()


def _version_of(data: DataConfig) -> str:
    package = "pillow" if data.decoder == "pillow" else "simplejpeg"
    return f"{package} {metadata.version(package)}"


def resolve_white(data: DataConfig, source: Source) -> DataConfig:
    """Return the config with `data.white` a number; what it is, or should be, is logged.

    Raises:
        DataError: A file cannot be read.
    """
    if data.white not in (AUTO, 0):
        return data
    seen = read_value_range(source, data.max_pixels)
    if data.white == AUTO:
        white = seen.white if seen else 0
        why = f"{WHITE_PERCENTILE:g} % of the values in {seen} are below" if seen else (
            "no image of a sample has more than 8 bits"
        )  # fmt: skip
        log.info("data.white=%d: %s", white, why)
        return data.model_copy(update={"white": float(white)})
    if seen and seen.is_dark:
        log.warning(
            "%s: %s, so they are nearly black: data.white=%d, or data.white=auto, says what is "
            "white", source.uri, seen, seen.most,
        )  # fmt: skip
    return data


def read_value_range(source: Source, max_pixels: int) -> ValueRange | None:
    """Return the values of a sample of images; None where its first images have 8 bits.

    The sample is the first images of some row groups, the same ones each time.

    Raises:
        DataError: A file cannot be read.
    """
    counts = np.zeros(VALUES, np.int64)
    num, top = 0, 0
    for deep in _deep_images(source, max_pixels):
        values = deep.values if deep.values.ndim == 2 else deep.values[:, :, :3]
        counts += np.bincount(values.ravel(), minlength=VALUES)
        num, top = num + 1, max(top, deep.top)
    if not num:
        return None
    below = np.cumsum(counts)
    white = int(np.searchsorted(below, WHITE_PERCENTILE / 100 * below[-1]))
    (occurring,) = np.nonzero(counts)
    return ValueRange(num, int(occurring[0]), int(occurring[-1]), max(white, 1), top)


def _deep_images(source: Source, max_pixels: int) -> Iterator[DeepImage]:
    last = len(source.row_groups) - 1
    places = np.linspace(0, last, SAMPLED_GROUPS).round().astype(int)
    for index in dict.fromkeys(places.tolist()):
        images = source.read_first_images(index, IMAGES_OF_A_GROUP)
        deep = [read_deep_image(image, max_pixels) for image in images if image]
        if not any(deep):
            return
        yield from (image for image in deep if image is not None)
