"""Images of any number of channels: arrays of NumPy, pages of a TIFF, and gray."""

from __future__ import annotations

import importlib
import io
import math
import threading
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from .extras import read_deep_color
from .formats import (
    BROKEN_HEADER,
    COLOR,
    FIRST_BYTES,
    MOST_CHANNELS,
    NPY,
    TIFF,
    WEBP,
    Format,
    ImageError,
    Pixels,
    UndecodedError,
    channels_error,
    check_size,
    format_of,
    no_image,
    reason_of,
    webp_size,
)
from .metadata import ORIENTATION, orientation_of, turn_upright, turn_values_upright
from .rgb import WHITE_16, has_transparency, read_gray, read_stored, scaled_gray
from .tiff import are_gray_planes, check_page, check_tile, count_pages, page_values, samples_of

# NumPy parses a header as Python; two threads that do so at once make CPython before 3.11.9 and
# 3.12.3 raise SystemError now and then, and a good image would be a broken one (gh-106905).
_ONE_HEADER: Final = threading.Lock()
GRAY_AND_ALPHA, RGBA = 2, 4  # channels
# Formats by Pillow's names whose encoders, unasked, store no transparency where all is opaque.
LEAVE_OPAQUE_OUT: Final = ("WEBP", "AVIF")
White = float | tuple[float, ...]


class Bands(NamedTuple):
    """An image as its file holds it.

    Attributes:
        values: uint8 or uint16 [H, W, C]; 0 is black.
        top: The largest value that its bits hold.
    """

    values: npt.NDArray[Any]
    top: int

    @property
    def is_deep(self) -> bool:
        """Whether a value has more than 8 bits, so that `white` is asked for."""
        return self.values.dtype.itemsize > 1

    def to_pixels(self, white: White) -> Pixels:
        """Return uint8 [H, W, C].

        Args:
            white: What is 255, of all channels or of each; where it is 0, `top` is. Values of 8
                bits stay what they are.
        """
        if not self.is_deep and self.top == 255:
            return np.array(self.values, np.uint8, order="C")
        channels = self.values.shape[2]
        levels = white if isinstance(white, tuple) else (white,) * channels
        out = np.empty(self.values.shape, np.uint8)
        for channel, level in enumerate(levels):
            full = level if self.is_deep and level else self.top
            out[..., channel] = scaled_gray(self.values[..., channel], full)
        return out

    def as_color(self, channels: int) -> Bands:
        """Return gray as three equal channels, where three are asked for."""
        gray_as_rgb = channels == 3 and self.values.shape[2] == 1
        return Bands(np.repeat(self.values, 3, axis=2), self.top) if gray_as_rgb else self


def read_bands(encoded: bytes, kind: Format | None, channels: int, max_pixels: int) -> Bands:
    """Return the values of an image of `channels` channels, or of as many as it has.

    A NumPy array is [H, W], [H, W, C] or [C, H, W]: where both ends are C, the last. A TIFF has C
    gray pages of one size, or a page of C samples. Other files serve where they have transparency
    and C is 4, or are gray with it and C is 2: it is a channel like the others then, 255 where
    WebP or AVIF have none.

    Args:
        encoded: The bytes of the file.
        kind: What `format_of` says of them.
        channels: C; 0: as many as there are. Of 1 and 3 either serves.
        max_pixels: Of a channel.

    Raises:
        ImageError: The image is broken, too large, or of another number of channels.
    """
    if kind is NPY:
        bands = _read_array(encoded, channels, max_pixels)
    elif kind is TIFF:
        bands = _read_tiff(encoded, channels, max_pixels)
    else:
        bands = _read_rgba(encoded, kind, channels, max_pixels)
    num = bands.values.shape[2]
    fits = num == channels or (channels in COLOR and num in COLOR)
    if num > MOST_CHANNELS or (channels and not fits):
        raise channels_error(num, channels or MOST_CHANNELS)
    return bands


def read_deep_bands(encoded: bytes, channels: int, max_pixels: int = 50_000_000) -> Bands | None:
    """Return the values of an image of 9 to 16 bits and so many channels; None for any other."""
    try:
        bands = read_bands(encoded, format_of(encoded[:FIRST_BYTES]), channels, max_pixels)
    except ImageError:  # decoding says it
        return None
    return bands if bands.is_deep else None


def shown_as_rgb(pixels: Pixels) -> Pixels:
    """Return what a person can look at of pixels [H, W, C]: uint8 [H, W, 3], contiguous.

    The first three channels, or of fewer the first one as gray.
    """
    first = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)
    return np.ascontiguousarray(first)


def luma_of(rgb: Pixels) -> Pixels:
    """Return RGB as gray, uint8 [H, W, 1], by Pillow's weights (ITU-R 601); gray stays as it is."""
    return np.array(Image.fromarray(rgb).convert("L"))[..., None]


def _read_array(encoded: bytes, channels: int, max_pixels: int) -> Bands:
    """Return an array of NumPy, whose header is read first and by NumPy, never a pickle."""
    stream = io.BytesIO(encoded)
    form = np.lib.format
    read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    try:
        with _ONE_HEADER:
            shape, by_column, dtype = read[form.read_magic(stream)](stream)
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(BROKEN_HEADER) from error
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise ImageError(f"values of {dtype.name} have no known range")
    if len(shape) not in (2, 3):
        raise ImageError(f"an array of {len(shape)} dimensions")
    last = len(shape) == 2 or _channels_are_last(shape, channels)
    height, width = shape[:2] if last else shape[1:]
    num = 1 if len(shape) == 2 else shape[2 if last else 0]
    if min(shape) < 1:
        raise ImageError(BROKEN_HEADER)
    if num > MOST_CHANNELS:
        raise channels_error(num, channels or MOST_CHANNELS)
    check_size((width, height), max_pixels, 1)
    count = math.prod(shape)
    if len(encoded) - stream.tell() < count * dtype.itemsize:
        raise ImageError("truncated")
    flat = np.frombuffer(encoded, dtype, count, stream.tell())
    values = flat.reshape(shape, order="F" if by_column else "C")
    if values.ndim == 2:
        values = values[..., None]
    elif not last:
        values = np.moveaxis(values, 0, 2)
    own = np.dtype(f"u{dtype.itemsize}")
    return Bands(values.astype(own, order="C"), int(np.iinfo(own).max))


def _channels_are_last(shape: tuple[int, ...], channels: int) -> bool:
    """Return whether an array is [H, W, C], and not [C, H, W]."""
    for wanted in (channels, *COLOR) if channels in COLOR else (channels,):
        if wanted in (shape[2], shape[0]):
            return shape[2] == wanted
    return shape[2] <= shape[0]


def _read_tiff(encoded: bytes, channels: int, max_pixels: int) -> Bands:
    """Return the gray pages of a TIFF by Pillow; pages of several samples by tifffile."""
    try:
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(encoded))
        num = count_pages(image, MOST_CHANNELS)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - bits and samples that are not on Pillow's list
        return _read_tiff_samples(encoded, channels, max_pixels)
    if num == 1 or (channels and num != channels):
        return _read_tiff_samples(encoded, channels, max_pixels)
    if num > MOST_CHANNELS:
        raise ImageError(f"more than {MOST_CHANNELS} pages")
    try:
        return _stacked([_page(image, place, max_pixels) for place in range(num)])
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise UndecodedError(reason_of(error)) from error


def has_more_pages(encoded: bytes, kind: Format | None) -> bool:
    """Return whether a TIFF has more pages than one; one that is broken has not."""
    if kind is not TIFF:
        return False
    try:
        return count_pages(TiffImagePlugin.TiffImageFile(io.BytesIO(encoded)), 1) > 1
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - decoding says it
        return False


def is_color_by_pages(encoded: bytes, kind: Format | None) -> bool:
    """Return whether an image is a TIFF of three gray pages, which are its channels."""
    if kind is not TIFF:
        return False
    try:
        return are_gray_planes(TiffImagePlugin.TiffImageFile(io.BytesIO(encoded)), 3)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - decoding says it
        return False


def _page(image: TiffImagePlugin.TiffImageFile, place: int, max_pixels: int) -> Bands:
    image.seek(place)
    check_size(image.size, max_pixels, 1)
    check_tile(image.tag_v2.get, max_pixels)
    stored, samples = read_stored(image), samples_of(image.tag_v2.get)
    if samples.problem:
        raise ImageError(samples.problem)
    if samples.num != 1:  # of gray planes Pillow gives the first
        raise ImageError(f"page {place + 1} is not gray")
    orientation = image.tag_v2.get(ORIENTATION, 1)
    image.load()
    deep = read_gray(image, stored)
    if deep is None and image.mode not in ("L", "1"):
        raise ImageError(f"page {place + 1} is not gray")
    values, top = (deep.values, deep.top) if deep else (np.asarray(image.convert("L")), 255)
    return Bands(turn_values_upright(values[..., None], orientation), top)


def _read_tiff_samples(encoded: bytes, channels: int, max_pixels: int) -> Bands:
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError:
        raise ImageError("TIFF of several channels (install simclr-ray[tiff])") from None
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            pages = [file.pages[0]]
            if pages[0].samplesperpixel != channels and len(file.pages) == channels:
                pages = list(file.pages)
            elif pages[0].samplesperpixel == 1 and len(file.pages) > 1:
                raise channels_error(len(file.pages), channels)
            return _stacked([_samples(page, max_pixels) for page in pages])
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(reason_of(error)) from error


def _samples(page: Any, max_pixels: int) -> Bands:
    """Return a page of tifffile's."""
    if page.samplesperpixel > MOST_CHANNELS:
        raise channels_error(page.samplesperpixel, MOST_CHANNELS)
    check_page(page)
    return Bands(*page_values(page, max_pixels))


def _stacked(pages: list[Bands]) -> Bands:
    first = pages[0]
    if any(p.values.shape[:2] != first.values.shape[:2] or p.top != first.top for p in pages):
        raise ImageError("pages of different sizes or bits")
    return Bands(np.concatenate([p.values for p in pages], axis=2), first.top)


def values_of(image: Image.Image, channels: int) -> npt.NDArray[Any]:
    """Return the values of a loaded image of 8 bits, uint8 [H, W, C], upright.

    Args:
        image: Pillow's.
        channels: That are asked for; what is returned may have others.
    """
    is_opaque = image.format in LEAVE_OPAQUE_OUT and image.mode == "RGB"  # turning forgets it
    image = turn_upright(image)
    if image.mode == "LA" and channels == GRAY_AND_ALPHA:
        return np.asarray(image)
    if has_transparency(image) or (is_opaque and channels == RGBA):
        return np.asarray(image.convert("RGBA"))
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


def _read_rgba(encoded: bytes, kind: Format | None, channels: int, max_pixels: int) -> Bands:
    """Return the channels of an image that Pillow opens, transparency as one of them."""
    if kind is None:
        raise no_image(encoded)
    if kind.open is None:
        raise ImageError(f"{kind.name} of several channels")
    try:
        if kind is WEBP:
            check_size(webp_size(encoded), max_pixels)  # Pillow's constructor takes a whole canvas
        image: Image.Image = kind.open(io.BytesIO(encoded))
        check_size(image.size, max_pixels, 1)
        stored = read_stored(image)
        if stored.is_deep_color:
            deep = read_deep_color(encoded, kind, max_pixels)
            if deep is None:
                raise ImageError("color of 16 bits (install simclr-ray[tiff])")
            image.load()  # what says of orientation may come last
            values = deep.values
            if stored.raw_mode.startswith("LA") and channels == GRAY_AND_ALPHA:
                values = values[..., [0, 3]]
            return Bands(turn_values_upright(values, orientation_of(image)), WHITE_16)
        image.load()
        return Bands(values_of(image, channels), 255)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise UndecodedError(reason_of(error)) from error
