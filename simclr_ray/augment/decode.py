"""One encoded image in, RGB pixels out; and the fixed view that evaluation uses.

This file travels alone with exported models, so it knows only NumPy and Pillow. It picks the
decoder by the first bytes itself rather than through `Image.open`: that keeps Pillow's exotic
formats (some of which start other programs) out of reach of untrusted bytes, tests the size in the
header against our limit before a pixel is decoded, and never touches Pillow's own global limit,
whose warning could only be silenced for the whole process (`catch_warnings` is not thread-safe).
`torchvision.io.decode_image` does not replace it: it allocates what the header says without a
limit, reads neither BMP, TIFF nor PPM, and would have to be installed wherever a model is served.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

Pixels = npt.NDArray[np.uint8]

# The authors' centre crop; 0.875 = 224/256 (google-research/simclr, data_util.py CROP_PROPORTION).
CROP_PROPORTION: Final = 0.875
# At most this side, the authors evaluate on the whole image (data.py: no crop for 32 px and less).
WHOLE_IMAGE_SIDE: Final = 32

_Decoder = Callable[[io.BytesIO], ImageFile.ImageFile]
_DECODERS: Final[tuple[tuple[bytes, _Decoder], ...]] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
    (b"P5", PpmImagePlugin.PpmImageFile),
    (b"P6", PpmImagePlugin.PpmImageFile),
)
_ORIENTED: Final = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


class ImageError(ValueError):
    """One image cannot be used; the message is a short reason, the same for the same fault."""


def decode_image(encoded: bytes, max_pixels: int = 50_000_000, min_side: int = 2) -> Pixels:
    """Return the pixels of one encoded image as people see it, uint8 [H, W, 3], contiguous.

    JPEG, PNG, WebP, GIF, BMP, TIFF and binary PPM/PGM. EXIF orientation is applied, transparency
    is laid over white, 16-bit gray is divided by 257 (65535 -> 255), of an animation the first
    frame counts; CMYK, palette, gray and bilevel become RGB. Safe to call from many threads.

    Args:
        encoded: the bytes of the file.
        max_pixels: images of more pixels are refused by their header, before they take memory.
        min_side: images with a shorter side are refused.

    Raises:
        ImageError: with the reason: `empty`, `not an image`, `broken header`, `truncated`,
            `undecodable`, `too many pixels: WxH`, `too small: WxH`, `pixels of mode F ...`.
    """
    image = _open(encoded, max_pixels)
    _check_size(image.size, max_pixels)
    if min(image.size) < min_side:
        raise ImageError(f"too small: {image.width}x{image.height}")
    try:
        image.load()
        pixels = _to_rgb(_upright(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything at all on broken bytes
        raise ImageError(_reason(error)) from error
    return pixels


def evaluation_view(pixels: Pixels, size: int) -> Pixels:
    """Return the one view of an image that evaluation uses, uint8 [size, size, 3].

    The authors' evaluation (google-research/simclr, `preprocess_for_eval`): up to 32 px the whole
    image; above, the central square of 0.875 of the shorter side; then bicubic resizing, here
    with Pillow's antialiasing.

    Args:
        pixels: uint8 [H, W, 3].
        size: side of the view in pixels.
    """
    height, width = pixels.shape[:2]
    if size <= WHOLE_IMAGE_SIDE:
        if (height, width) == (size, size):
            return pixels
        box = (0, 0, width, height)
    else:
        side = max(round(CROP_PROPORTION * min(height, width)), 1)
        top, left = (height - side + 1) // 2, (width - side + 1) // 2
        box = (left, top, left + side, top + side)
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _open(encoded: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Return the image with its header read and its pixels not."""
    if not encoded:
        raise ImageError("empty")
    decoder = next((d for magic, d in _DECODERS if encoded.startswith(magic)), None)
    if decoder is None:
        raise ImageError("not an image")
    if decoder is WebPImagePlugin.WebPImageFile:
        if encoded[8:12] != b"WEBP":
            raise ImageError("not an image")
        _check_size(_webp_size(encoded), max_pixels)  # Pillow's constructor takes a whole canvas
    try:
        return decoder(io.BytesIO(encoded))
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError("broken header") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"too many pixels: {size[0]}x{size[1]}")


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Return (width, height) from the first chunk of a WebP file (RFC 9649 §2.5-2.7)."""
    kind, head = encoded[12:16], encoded[20:30]
    if len(head) < 10:
        raise ImageError("broken header")
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))
        return width, height
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", head[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError("broken header")


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says; a broken EXIF block says nothing."""
    if image.format != "TIFF" and not any(key in image.info for key in _ORIENTED):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the pixels are whole, only what is said about them is not
        return image


def _to_rgb(image: Image.Image) -> Pixels:
    """Return a loaded image of any mode as uint8 [H, W, 3]."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64)
        gray = np.clip(np.rint(values / 257), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(gray[:, :, None], 3, axis=2))
    if mode in ("I", "F"):
        raise ImageError(f"pixels of mode {mode} have no known range")
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _over_white(image.convert("RGBA"))
    rgb = image if mode == "RGB" else image.convert("RGB")
    return np.array(rgb, dtype=np.uint8, order="C")


def _over_white(rgba: Image.Image) -> Pixels:
    canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    canvas.alpha_composite(rgba)
    return np.array(canvas.convert("RGB"), dtype=np.uint8, order="C")


def _reason(error: Exception) -> str:
    text = str(error).lower()
    cut_short = isinstance(error, EOFError) or any(
        sign in text for sign in ("truncated", "broken data stream", "not enough", "unexpected end")
    )
    return "truncated" if cut_short else "undecodable"
