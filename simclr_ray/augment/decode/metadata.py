"""What a file says about its pixels: orientation is heeded, the rest may be broken."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .formats import JPEG, PNG, Format

_EXIF, _ADOBE = 0xE1, 0xEE  # segments of a JPEG: orientation, and how color is coded
ORIENTATION: Final = 274  # tag of EXIF and of a TIFF
ORIENTED: Final = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def turn_upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says; a broken EXIF block says nothing."""
    if image.format != "TIFF" and not any(key in image.info for key in ORIENTED):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the pixels are whole, only what is said about them is not
        return image


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that is loaded, 1 where a broken block says none."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the pixels are whole, only what is said about them is not
        return 1


def turn_values_upright(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return values [H, W, C] turned as an EXIF orientation says; an unknown one says nothing."""
    turned = {
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.swapaxes(0, 1),
        6: np.rot90(values, -1),
        7: values[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(values),
    }
    return turned.get(orientation, values)


def without_metadata(encoded: bytes, kind: Format | None) -> Iterator[bytes]:
    """Yield a PNG or JPEG without comments, profiles and the like; of a JPEG EXIF is last to go."""
    with contextlib.suppress(struct.error, IndexError):
        if kind is PNG:
            yield b"".join(_png_chunks(encoded))
        if kind is JPEG:
            yield b"".join(_jpeg_segments(encoded, kept=(_EXIF, _ADOBE)))
            yield b"".join(_jpeg_segments(encoded, kept=(_ADOBE,)))


def _png_chunks(encoded: bytes) -> Iterator[bytes]:
    """Yield signature and critical chunks, named with a capital; transparency and EXIF as well."""
    yield encoded[:8]
    at = 8
    while at < len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at)
        name = encoded[at + 4 : at + 8]
        if name[:1].isupper() or name in (b"tRNS", b"eXIf"):
            yield encoded[at : at + 12 + length]
        at += 12 + length


def _jpeg_segments(encoded: bytes, kept: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the segments but for comments and, unless `kept`, those of applications."""
    yield encoded[:2]
    at = 2
    while encoded[at + 1] != 0xDA:  # the scan, to which nothing is said any more
        marker, (length,) = encoded[at + 1], struct.unpack_from(">H", encoded, at + 2)
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker in kept:
            yield encoded[at : at + 2 + length]
        at += 2 + length
    yield encoded[at:]
