"""TIFF by its tags: which samples are color, and pages that Pillow does not read as they say.

Pillow 13 opens some pages and gives other pixels than are stored: planes of 16 bits without
compression become noise, signed values unsigned ones, and of gray planes only the first is seen.
It refuses bits, byte order and photometric that are not on its list, as 12 bits in MM. tifffile,
where it is installed, reads them all.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .formats import (
    BROKEN_HEADER,
    COLOR,
    MOST_CHANNELS,
    ImageError,
    UndecodedError,
    channels_error,
    check_size,
    reason_of,
)
from .metadata import ORIENTATION, turn_values_upright
from .rgb import DeepImage

_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANES = 258, 259, 262, 277, 284
_EXTRA, _FORMAT = 338, 339
_TILE: Final = (322, 323)  # width and length
_GRAY, _RGB = (0, 1), 2  # photometric: white is zero, black is zero
_NUM_COLOR: Final = {_RGB: 3, 5: 4, 6: 3, 8: 3}  # samples of RGB, CMYK, YCbCr, Lab; else 1
_UNSPECIFIED, _PREMULTIPLIED, _TRANSPARENCY = 0, 1, 2  # kinds of extra samples
_UNSIGNED: Final = (1, 4)  # sample formats; 4 is "undefined", which readers take for unsigned
_FORMATS: Final = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}


class UnknownColorError(ImageError):
    """The color of a page is coded in a way that Pillow alone may know."""


class Samples(NamedTuple):
    """How a page stores its pixels, by its tags.

    Attributes:
        photometric: As in the tag.
        num: Samples of a pixel.
        extra: Kinds of those beyond gray or color, 0 where a kind is not specified.
        values: What a sample is: `uint16`.
        problem: Why values have no range; empty where they do.
        are_apart: Whether each is in a plane of its own.
        are_compressed: Whether they are.
    """

    photometric: int
    num: int
    extra: tuple[int, ...]
    values: str
    problem: str
    are_apart: bool
    are_compressed: bool

    @property
    def pillow_reads_them(self) -> bool:
        """Whether the pixels are those that are stored, where Pillow opens the page at all."""
        if self.num == 1 or not self.are_apart:
            return self.num <= 2 or self.photometric not in _GRAY
        if self.photometric in _GRAY:
            return False
        whole_bytes = self.values == "uint8" and self.extra in ((), (_TRANSPARENCY,))
        return self.are_compressed or whole_bytes

    def shown(self, channels: int) -> tuple[list[int], int | None]:
        """Return which samples are gray or RGB, and which one is transparency, if one is.

        Of RGB the first three are color, whatever is stored beyond them. Gray with more than
        transparency is bands, none of which is more than the others.

        Raises:
            ImageError: They are neither.
        """
        first = self.num - len(self.extra)
        kinds = enumerate(self.extra, start=first)
        alpha = next((at for at, kind in kinds if kind != _UNSPECIFIED), None)
        if self.num > MOST_CHANNELS:
            raise channels_error(self.num, channels)
        if self.num - len(self.extra) < _NUM_COLOR.get(self.photometric, 1):
            raise ImageError(BROKEN_HEADER)
        if self.photometric == _RGB:
            return [0, 1, 2], alpha
        bands = [at for at in range(self.num) if at != alpha]
        if len(bands) not in COLOR:
            raise channels_error(self.num if self.num not in COLOR else len(bands), channels)
        return bands, alpha


def check_tile(tag: Callable[[int, Any], Any], max_pixels: int) -> None:
    """Raise `ImageError` for tiles of too many pixels: a decoder makes whole ones of any image."""
    try:
        width, length = (max(_numbers(tag(key, 0)), default=0) for key in _TILE)
    except (TypeError, ValueError, OverflowError):  # of another type: decoding says it
        return
    check_size((width, length), max_pixels)


def check_samples(image: Any, channels: int) -> None:
    """Raise for a page that Pillow has opened, and whose pixels would not be those it stores.

    Args:
        image: Pillow's.
        channels: That are asked for, 1 or 3.

    Raises:
        UndecodedError: tifffile is to be asked.
        ImageError: Its values have no range, or it has other channels.
    """
    try:
        samples = samples_of(image.tag_v2.get)
    except (TypeError, ValueError, OverflowError) as error:
        raise UndecodedError(BROKEN_HEADER) from error
    if samples.problem:
        raise ImageError(samples.problem)
    is_plain = samples.photometric in (*_GRAY, _RGB)
    if is_plain:
        samples.shown(channels)
    if not samples.pillow_reads_them:
        order = "planes" if samples.are_apart else "samples"
        shown = f"TIFF of {samples.num} {order} of {samples.values}"
        raise (
            UndecodedError(f"{shown} (install simclr-ray[tiff])") if is_plain else ImageError(shown)
        )


def count_pages(image: Any, most: int) -> int:
    """Return how many pages a TIFF has; `most + 1` of any that has more.

    Pillow counts all of them in quadratic time, and a page is no more than a few bytes.

    Args:
        image: Pillow's, whose page stays.
        most: Pages that matter.
    """
    page, num = image.tell(), 1
    try:
        while num <= most:
            image.seek(num)
            num += 1
    except EOFError:
        pass
    finally:
        image.seek(page)
    return num


def are_gray_planes(image: Any, num: int) -> bool:
    """Return whether a TIFF has so many pages, each gray, all of one size and of the same values.

    Args:
        image: Pillow's, whose page is another afterwards.
        num: Pages.
    """
    kinds = set()
    if count_pages(image, num) != num:
        return False
    for place in range(num):
        image.seek(place)
        samples = samples_of(image.tag_v2.get)
        if samples.num != 1 or samples.photometric not in _GRAY or samples.problem:
            return False
        kinds.add((image.size, samples.values, image.tag_v2.get(ORIENTATION, 1)))
    return len(kinds) == 1


def samples_of(tag: Callable[[int, Any], Any]) -> Samples:
    """Return how a page stores its pixels.

    Args:
        tag: Gives the value of a tag by its number, or its second argument.
    """
    photometric = int(tag(_PHOTOMETRIC, 0))
    num_color = _NUM_COLOR.get(photometric, 1)
    num = min(int(tag(_SAMPLES, num_color)), 2**16)  # a damaged one takes no memory below
    extra = _numbers(tag(_EXTRA, ()))[: max(num - num_color, 0)]
    missing = max(num - num_color - len(extra), 0)
    # writers that leave the tag out mean transparency, as Pillow takes it
    is_rgba = photometric == _RGB and (num, missing) == (4, 1)
    extra += (_TRANSPARENCY,) if is_rgba else (_UNSPECIFIED,) * missing
    bits, formats = (set(_numbers(tag(key, 1))[:num]) for key in (_BITS, _FORMAT))
    if formats <= set(_UNSIGNED):
        formats = {1}
    names = sorted(f"{_FORMATS.get(f, 'unknown')}{b}" for f in formats for b in bits)
    values = " and ".join(names)
    has_range = formats == {1} and len(bits) == 1 and max(bits) <= 16
    return Samples(
        photometric,
        num,
        extra,
        values,
        "" if has_range else f"values of {values} have no known range",
        are_apart=num > 1 and tag(_PLANES, 1) == 2,
        are_compressed=tag(_COMPRESSION, 1) != 1,
    )


def read_tiff_page(encoded: bytes, max_pixels: int, channels: int = 3) -> DeepImage | None:
    """Return the first page, gray or RGB, by tifffile; None where that is not installed.

    Raises:
        UnknownColorError: It is neither.
        ImageError: It is broken, too large, of other channels, or of values without a range.
    """
    try:
        tifffile = importlib.import_module("tifffile")
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            page = file.pages[0]
            samples = samples_of(page.tags.valueof)
            check_page(page)
            color, alpha = samples.shown(channels)
            values, top = page_values(page, max_pixels)
            if alpha is None:
                return DeepImage(values[..., 0] if len(color) == 1 else values[..., color], top)
            rgba = [*(color if len(color) == 3 else color * 3), alpha]
            kind = samples.extra[alpha - samples.num]
            return DeepImage(values[..., rgba], top, is_premultiplied=kind == _PREMULTIPLIED)
    except ImportError:
        return None
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(reason_of(error)) from error


def check_page(page: Any) -> None:
    """Raise `ImageError` for a page of tifffile's that has no meaning here."""
    if problem := samples_of(page.tags.valueof).problem:
        raise ImageError(problem)
    kind: str = page.photometric.name
    if not kind.startswith(("MINIS", "RGB")):
        raise UnknownColorError(f"TIFF of {kind.lower()}")


def page_values(page: Any, max_pixels: int) -> tuple[npt.NDArray[Any], int]:
    """Return a page of tifffile's upright, unsigned [H, W, C], 0 is black; and its largest value.

    Raises:
        ImageError: It is too large, or of too many samples.
    """
    check_size((page.imagewidth, page.imagelength), max_pixels, 1)
    check_tile(page.tags.valueof, max_pixels)
    samples = samples_of(page.tags.valueof)
    if samples.num > MOST_CHANNELS:
        raise channels_error(samples.num, MOST_CHANNELS)
    values, top = page.asarray(), 2**page.bitspersample - 1
    values = values.astype(np.uint8) if values.dtype == bool else values
    if samples.are_apart:
        values = np.moveaxis(values, 0, 2)
    values = values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    if page.photometric.name == "MINISWHITE":
        kinds = (_UNSPECIFIED, *samples.extra)
        values = np.where([kind == _UNSPECIFIED for kind in kinds], top - values, values)
    return turn_values_upright(values, page.tags.valueof(ORIENTATION, 1)), top


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple | list) else (int(value),)
