"""Which format a file has, told by its first bytes, and why an image cannot be used."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

Pixels = npt.NDArray[np.uint8]

COLOR: Final = (1, 3)  # channels of gray and RGB, which become each other and nothing else
MOST_CHANNELS: Final = 16
_INSTEAD: Final = b"\0no image: "  # no format begins so
MOST_REASON: Final = 80  # characters, of bytes that may come from anywhere
BROKEN_HEADER: Final = "broken header"

FIRST_BYTES: Final = 132  # of a file, which tell its format: DICOM has a preamble of 128


class Format(NamedTuple):
    """A file format, as its first bytes tell it."""

    name: str
    extra: str = ""  # of ours, which installs its decoder
    open: Callable[[io.BytesIO], Any] | None = None  # Pillow's


JPEG = Format("JPEG", open=JpegImagePlugin.JpegImageFile)
PNG = Format("PNG", open=PngImagePlugin.PngImageFile)
WEBP = Format("WebP", open=WebPImagePlugin.WebPImageFile)
TIFF = Format("TIFF", open=TiffImagePlugin.TiffImageFile)
JPEG_2000 = Format("JPEG 2000", open=Jpeg2KImagePlugin.Jpeg2KImageFile)
PNM = Format("PNM", open=PpmImagePlugin.PpmImageFile)
AVIF = Format("AVIF", open=AvifImagePlugin.AvifImageFile)
HEIC = Format("HEIC", extra="heic")
DICOM = Format("DICOM", extra="dicom")
NPY = Format("NumPy array")
_MAGIC: Final[tuple[tuple[tuple[bytes, ...], Format], ...]] = (
    ((b"\xff\xd8\xff",), JPEG),
    ((b"\x89PNG\r\n\x1a\n",), PNG),
    ((b"GIF8",), Format("GIF", open=GifImagePlugin.GifImageFile)),
    ((b"BM",), Format("BMP", open=BmpImagePlugin.BmpImageFile)),
    ((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), TIFF),  # + is BigTIFF's
    ((b"\x93NUMPY",), NPY),
    ((b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), JPEG_2000),
)
_HEIC_BRANDS: Final = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}
_EXTRA_PACKAGES: Final = {"heic": "pi_heif", "dicom": "pydicom"}


class ImageError(ValueError):
    """One image cannot be used; the message is a short reason, the same for the same fault."""


def format_of(first_bytes: bytes) -> Format | None:
    """Return the format of a file that begins so (`FIRST_BYTES` suffice); None: no image."""
    for magic, kind in _MAGIC:
        if first_bytes.startswith(magic):
            return kind
    if first_bytes.startswith(b"RIFF") and first_bytes[8:12] == b"WEBP":
        return WEBP
    if first_bytes[:1] == b"P" and first_bytes[1:2] in b"123456" and first_bytes[2:3].isspace():
        return PNM
    if first_bytes[4:8] == b"ftyp":
        brands = {first_bytes[8:12], *(first_bytes[at : at + 4] for at in range(16, 32, 4))}
        if brands & {b"avif", b"avis"}:
            return AVIF
        return HEIC if brands & _HEIC_BRANDS else None
    return DICOM if first_bytes[128:132] == b"DICM" else None


def missing_decoder(kind: Format) -> str:
    """Return how to install the decoder of a format; nothing where it is there."""
    package = _EXTRA_PACKAGES.get(kind.extra)
    if package is None or importlib.util.find_spec(package):
        return ""
    return f"install simclr-ray[{kind.extra}]"


def instead_of_image(reason: str) -> bytes:
    """Return what stands for an image that cannot be had: decoding it raises the reason."""
    return _INSTEAD + reason.encode()


def stands_for_image(encoded: bytes) -> bool:
    """Return whether bytes are those of `instead_of_image`."""
    return encoded.startswith(_INSTEAD)


def no_image(encoded: bytes) -> ImageError:
    """Return the error of bytes that have no format."""
    if stands_for_image(encoded):
        reason = encoded[len(_INSTEAD) :][:MOST_REASON].decode("ascii", "replace")
        return ImageError(reason if reason.isprintable() else "not an image")
    return ImageError("not an image" if encoded else "empty")


class UndecodedError(ImageError):
    """A decoder has failed, perhaps for what is said about the pixels."""


def channels_error(num: int, channels: int) -> ImageError:
    """Return the error of an image of `num` channels where `channels` are asked for."""
    return ImageError(f"{num} channel{'s' * (num != 1)}, data.channels={channels}")


def channels_in(reason: str) -> int:
    """Return the number of channels that an image has, by its `channels_error`; 0 by another."""
    match = re.match(r"(\d+) channels?, data\.channels=", reason)
    return int(match[1]) if match else 0


def check_size(size: tuple[int, ...], max_pixels: int, min_side: int = 0) -> None:
    """Raise `ImageError` for an image, (width, height) in pixels, of too many or too few."""
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"too many pixels: {size[0]}x{size[1]}")
    if min(size) < min_side:
        raise ImageError(f"too small: {size[0]}x{size[1]}")


def webp_size(encoded: bytes) -> tuple[int, int]:
    """Return (width, height) from the first chunk of a WebP file (RFC 9649 §2.5-2.7)."""
    kind, head = encoded[12:16], encoded[20:30]
    if len(head) < 10:
        raise ImageError(BROKEN_HEADER)
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))
        return width, height
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", head[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError(BROKEN_HEADER)


def reason_of(error: Exception) -> str:
    """Return in a word what a decoder's error says."""
    text = str(error).lower()
    cut_short = isinstance(error, EOFError) or any(
        sign in text for sign in ("truncated", "broken data stream", "not enough", "unexpected end")
    )
    return "truncated" if cut_short else "undecodable"
