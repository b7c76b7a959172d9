"""Small files that a careless decoder makes gigabytes of, written byte by byte.

`python -m tests.reference.bombs` decodes each in a process of its own and prints the memory taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import json
import os
import resource
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from simclr_ray.augment.decode import ImageDecoder, ImageError

SIDE: Final = 50_000  # of an image that claims to be so large
INFLATED: Final = 2**28  # bytes that a stream of few becomes
MIB: Final = 2**20
PIXELS: Final = 1_000_000  # that the decoder here allows


@functools.lru_cache
def zeros(size: int) -> bytes:
    """Return zeros of so many bytes, deflated (1,000 to one)."""
    packer, block = zlib.compressobj(1), bytes(2**22)
    parts = [packer.compress(block) for _ in range(size // len(block))]
    return b"".join([*parts, packer.compress(bytes(size % len(block))), packer.flush()])


def png_chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG (ISO 15948 §5.3)."""
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *, kind: bytes = b"\x01\x00", extra: bytes = b"") -> bytes:
    """Return a PNG of zeros; `kind` is bits and color type."""
    header = struct.pack(">II", width, height) + kind + b"\0\0\0"
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind[1]]
    row = 1 + (width * channels * kind[0] + 7) // 8
    body = png_chunk(b"IHDR", header) + extra
    body += png_chunk(b"IDAT", zeros(row * height)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as a file of some format."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(tags: dict[int, tuple[int, int]], data: bytes) -> bytes:
    """Return a little-endian TIFF of one page: tag -> type (3: short, 4: long) and value.

    The data lies behind the tags; 273 and 324, its offset, are filled in.
    """
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, (kind, value) in sorted(tags.items()):
        number = offset if tag in (273, 324) else value
        packed = struct.pack("<HHI", tag, kind, 1)
        entries += packed + (
            struct.pack("<HH", number, 0) if kind == 3 else struct.pack("<I", number)
        )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


GRAY_TIFF: Final = {  # 64 by 64 in one deflated strip
    256: (4, 64), 257: (4, 64), 258: (3, 8), 259: (3, 8), 262: (3, 1), 273: (4, 0), 277: (3, 1),
    278: (4, 64), 279: (4, 0),
}  # fmt: skip


def tiff_strip(bits: int = 8) -> bytes:
    """Return a page whose strip inflates to far more than its rows hold; tifffile reads 12 bits."""
    data = zeros(INFLATED)
    return tiff(GRAY_TIFF | {258: (3, bits), 279: (4, len(data))}, data)


def tiff_tile(bits: int = 8) -> bytes:
    """Return a small page whose one tile is of 30,000 by 30,000."""
    data, side = zeros(2**20), (4, 30_000)
    tags = {key: value for key, value in GRAY_TIFF.items() if key not in (273, 278, 279)}
    tile = {258: (3, bits), 322: side, 323: side, 324: (4, 0), 325: (4, len(data))}
    return tiff(tags | tile, data)


def tiff_samples() -> bytes:
    """Return a page of 60,000 samples a pixel."""
    data, side = zeros(2**20), (4, 4096)
    tags = {256: side, 257: side, 278: side, 277: (3, 60_000), 279: (4, len(data))}
    return tiff(GRAY_TIFF | tags, data)


def tiff_pages() -> bytes:
    """Return 20,000 pages of nothing, each of which points to the next."""
    at, parts = 8, [b"II*\0" + struct.pack("<I", 8)]
    for _ in range(20_000):
        at += 18
        parts.append(struct.pack("<HHHIII", 1, 256, 4, 1, 1, at))
    return b"".join(parts)


def jpeg() -> bytes:
    """Return a JPEG whose header says 50,000 by 50,000."""
    data = bytearray(saved(Image.new("L", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", SIDE, SIDE)
    return bytes(data)


def jpeg_2000() -> bytes:
    """Return a JPEG 2000 whose box says 8 by 8, around a tile of 50,000 by 50,000."""
    data = bytearray(saved(Image.new("L", (8, 8)), "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 8  # behind two markers, the length and capabilities
    data[at : at + 8] = struct.pack(">II", SIDE, SIDE)
    data[at + 16 : at + 24] = struct.pack(">II", SIDE, SIDE)
    return bytes(data)


def webp() -> bytes:
    """Return a WebP of 16,383 by 16,383."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    (bits,) = struct.unpack_from("<I", data, 21)
    struct.pack_into("<I", data, 21, bits & ~0xFFFFFFF | 0x3FFE << 14 | 0x3FFE)
    return bytes(data)


def avif() -> bytes:
    """Return an AVIF whose box says 30,000 by 30,000."""
    data = saved(Image.new("RGB", (64, 64)), "AVIF")
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", 30_000, 30_000) + data[at + 8 :]


def animated(kind: str, frames: int) -> bytes:
    """Return so many frames of 1,000 by 1,000."""
    shown = [Image.new("L", (1000, 1000), k % 250) for k in range(frames)]
    return saved(shown[0], kind, save_all=True, append_images=shown[1:])


def gif_frame() -> bytes:
    """Return a GIF with a screen of 8 by 8 with a frame of 50,000 by 50,000."""
    data = bytearray(saved(Image.new("L", (8, 8)), "GIF"))
    at = data.index(b",\0\0\0\0")
    data[at + 5 : at + 9] = struct.pack("<HH", SIDE, SIDE)
    return bytes(data)


def element(group: int, number: int, kind: bytes, value: bytes | int) -> bytes:
    """Return an element of a DICOM file, explicit and little-endian (PS3.5 §7.1.2)."""
    data = struct.pack("<H", value) if isinstance(value, int) else value + b"\0" * (len(value) % 2)
    long = kind in (b"OB", b"OW")
    size = struct.pack("<HI" if long else "<H", *([0] if long else []), len(data))
    return struct.pack("<HH", group, number) + kind + size + data


def dicom(side: int, *, deflated: bool, uid: bytes = b"1.2", length_off: int = 0) -> bytes:
    """Return a gray DICOM file, with few bytes of values, or deflated with far too many.

    A long `uid` stands before what says that it is deflated; a header may be wrong in its length.
    """
    syntax = b"1.2.840.10008.1.2.1.99" if deflated else b"1.2.840.10008.1.2.1"
    meta = element(2, 1, b"OB", b"\0\1") + element(2, 2, b"UI", b"1.2.840.10008.5.1.4.1.1.7")
    meta += element(2, 3, b"UI", uid) + element(2, 16, b"UI", syntax)
    head = (
        bytes(128)
        + b"DICM"
        + element(2, 0, b"UL", struct.pack("<I", len(meta) + length_off))
        + meta
    )
    numbers = {2: 1, 0x10: side, 0x11: side, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    body = b"".join(element(0x28, number, b"US", value) for number, value in numbers.items())
    body += element(0x28, 4, b"CS", b"MONOCHROME2")
    if not deflated:
        return head + body + element(0x7FE0, 0x10, b"OB", bytes(64))
    body += struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, INFLATED)
    packer, block = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS), bytes(2**22)
    parts = [packer.compress(part) for part in (body, *[block] * (INFLATED // len(block)))]
    return head + b"".join([*parts, packer.flush()])


def npy() -> bytes:
    """Return an array of 50,000 by 50,000 with no values."""
    out = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (SIDE, SIDE, 3)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + bytes(100)


def gif() -> bytes:
    """Return a GIF of 50,000 by 50,000 with one byte of data."""
    sides = struct.pack("<HH", SIDE, SIDE)
    return b"GIF89a" + sides + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + sides + b"\0\2\2\x4c\1\0;"


def bmp() -> bytes:
    """Return the header of a BMP of 50,000 by 50,000."""
    sides = struct.pack("<ii", SIDE, SIDE)
    return (
        b"BM" + struct.pack("<IIII", 54, 0, 54, 40) + sides + struct.pack("<HH", 1, 24) + bytes(24)
    )


def png_with(name: bytes, data: bytes, times: int = 1) -> bytes:
    """Return a PNG of 8 by 8 with chunks about its pixels."""
    return png(8, 8, extra=times * png_chunk(name, data))


def png_data() -> bytes:
    """Return a PNG of 8 by 8 whose pixels inflate to far more."""
    return png(8, 8)[:33] + png_chunk(b"IDAT", zeros(INFLATED)) + png_chunk(b"IEND", b"")


BOMBS: Final[dict[str, Callable[[], bytes]]] = {
    "png": lambda: png(SIDE, SIDE // 10),
    "png_text": lambda: png_with(b"zTXt", b"k\0\0" + zeros(INFLATED)),
    "png_international_text": lambda: png_with(b"iTXt", b"k\0\1\0\0\0" + zeros(INFLATED)),
    "png_profile": lambda: png_with(b"iCCP", b"p\0\0" + zeros(INFLATED)),
    "png_many_texts": lambda: png_with(b"zTXt", b"k\0\0" + zeros(MIB - 9), 200),
    "png_data": png_data,
    "png_animated": lambda: animated("PNG", 60),
    "gif": gif,
    "gif_frame": gif_frame,
    "gif_animated": lambda: animated("GIF", 400),
    "webp": webp,
    "webp_animated": lambda: animated("WEBP", 60),
    "jpeg": jpeg,
    "jpeg_2000": jpeg_2000,
    "avif": avif,
    "bmp": bmp,
    "ppm": lambda: b"P6 50000 50000 255\n" + bytes(9),
    "tiff": lambda: tiff(GRAY_TIFF | dict.fromkeys((256, 257, 278), (4, SIDE)), zeros(99_000)),
    "tiff_strip": tiff_strip,
    "tiff_strip_of_12_bits": lambda: tiff_strip(12),
    "tiff_tile": tiff_tile,
    "tiff_tile_of_12_bits": lambda: tiff_tile(12),
    "tiff_samples": tiff_samples,
    "tiff_pages": tiff_pages,
    "dicom": lambda: dicom(SIDE, deflated=False),
    "dicom_deflated": lambda: dicom(64, deflated=True),
    "dicom_deflated_said_late": lambda: dicom(64, deflated=True, uid=b"1.2." + b"3" * 2000),
    "dicom_deflated_misplaced": lambda: dicom(64, deflated=True, length_off=20),
    "npy": npy,
}


def random_values(*shape: int, dtype: type = np.uint8) -> npt.NDArray[Any]:
    """Return values that no format makes smaller."""
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def honest() -> Iterator[tuple[str, bytes, ImageDecoder]]:
    """Yield images of as many pixels as are allowed, which take the most of their kind."""
    decoder = ImageDecoder(PIXELS)
    width, height = 1250, PIXELS // 1250
    rgb, exif = Image.fromarray(random_values(height, width, 3)), Image.Exif()
    exif[274] = 6  # lies on its side
    yield "whole jpeg", saved(rgb, "JPEG", exif=exif), decoder
    yield "whole jpeg of CMYK", saved(rgb.convert("CMYK"), "JPEG"), decoder
    yield "whole jpeg 2000", saved(rgb, "JPEG2000"), decoder
    yield "whole webp", saved(rgb, "WEBP", method=0), decoder
    yield "whole bmp", saved(rgb, "BMP"), decoder
    yield "png of RGBA", png(width, height, kind=b"\x08\x06"), decoder
    yield "png of 16 bits", png(width, height, kind=b"\x10\0"), decoder
    deep = png(width, height, kind=b"\x10\x06")
    yield "png of RGBA of 16 bits", deep, decoder
    yield "png of RGBA with white", deep, decoder._replace(white=4095.0)
    bands = io.BytesIO()
    np.save(bands, random_values(height, width, 4, dtype=np.uint16))
    yield "array of 4 bands", bands.getvalue(), decoder._replace(channels=4)


def memory_of(encoded: bytes, decoder: ImageDecoder) -> tuple[str, int]:
    """Return what a decode in a process of its own comes to, and the bytes that it took more."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the child takes what is free here
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            text = f"{decoder.decode(encoded).shape}"
        except ImageError as error:
            text = str(error)
        except BaseException as error:  # noqa: BLE001 - told to the test
            text = f"{type(error).__name__}: {error}"
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(theirs, f"{taken * 1024} {text}".encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        number, _, came_to = answer.read().partition(" ")
    os.waitpid(child, 0)
    return came_to, int(number or -1)


def measured() -> Iterator[tuple[str, int, str, int]]:
    """Yield name, channels, what a decode comes to, and the bytes that it took."""
    for package in ("pydicom.pixels", "tifffile", "imagecodecs"):  # so that no import is measured
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    for name, make in BOMBS.items():
        bomb = make()
        for channels in (3, 4) if name.startswith(("tiff", "npy", "png")) else (3,):
            yield name, channels, *memory_of(bomb, ImageDecoder(PIXELS, channels=channels))
    for kind, encoded, decoder in honest():
        yield kind, decoder.channels, *memory_of(encoded, decoder)


if __name__ == "__main__":
    for measurement in measured():
        sys.stdout.write(json.dumps(measurement) + "\n")
