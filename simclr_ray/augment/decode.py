"""One encoded image in, RGB pixels out; and the fixed view that evaluation uses.

This file travels alone with exported models, so it knows only NumPy and Pillow. It picks the
decoder by the first bytes itself rather than through `Image.open`: that keeps Pillow's exotic
formats (some of which start other programs) out of reach of untrusted bytes, tests the size in the
header against our limit before a pixel is decoded, and never touches Pillow's own global limit,
whose warning could only be silenced for the whole process (`catch_warnings` is not thread-safe).
`torchvision.io.decode_image` does not replace it: it allocates what the header says without a
limit, reads neither BMP, TIFF nor PPM, and would have to be installed wherever a model is served.

How bright a value is follows from the file's own bits and photometric: 12-bit gray is white at
4095. What a file says *about* its pixels (comments, profiles, thumbnails) never costs the pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    Jpeg2KImagePlugin,
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

FIRST_BYTES: Final = 132  # of a file, which tell its format: DICOM has a preamble of 128


class Format(NamedTuple):
    """A file format, as its first bytes tell it."""

    name: str
    extra: str = ""  # of ours, which installs its decoder
    open: Callable[[io.BytesIO], Any] | None = None  # Pillow's


_JPEG = Format("JPEG", open=JpegImagePlugin.JpegImageFile)
_PNG = Format("PNG", open=PngImagePlugin.PngImageFile)
_WEBP = Format("WebP", open=WebPImagePlugin.WebPImageFile)
_TIFF = Format("TIFF", open=TiffImagePlugin.TiffImageFile)
_JPEG_2000 = Format("JPEG 2000", open=Jpeg2KImagePlugin.Jpeg2KImageFile)
_PNM = Format("PNM", open=PpmImagePlugin.PpmImageFile)
_AVIF = Format("AVIF", open=AvifImagePlugin.AvifImageFile)
_HEIC = Format("HEIC", extra="heic")
_DICOM = Format("DICOM", extra="dicom")
_MAGIC: Final[tuple[tuple[tuple[bytes, ...], Format], ...]] = (
    ((b"\xff\xd8\xff",), _JPEG),
    ((b"\x89PNG\r\n\x1a\n",), _PNG),
    ((b"GIF8",), Format("GIF", open=GifImagePlugin.GifImageFile)),
    ((b"BM",), Format("BMP", open=BmpImagePlugin.BmpImageFile)),
    ((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), _TIFF),  # + is BigTIFF's
    ((b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), _JPEG_2000),
)
_HEIC_BRANDS: Final = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}
_EXTRA_PACKAGES: Final = {"heic": "pi_heif", "dicom": "pydicom"}
_WHITE_16: Final = 65535
_EXIF, _ADOBE = 0xE1, 0xEE  # segments of a JPEG: orientation, and how color is coded
_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274  # tags of a TIFF
_ORIENTED: Final = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


class ImageError(ValueError):
    """One image cannot be used; the message is a short reason, the same for the same fault."""


def format_of(first_bytes: bytes) -> Format | None:
    """Return the format of a file that begins so (`FIRST_BYTES` suffice); None: no image."""
    for magic, kind in _MAGIC:
        if first_bytes.startswith(magic):
            return kind
    if first_bytes.startswith(b"RIFF") and first_bytes[8:12] == b"WEBP":
        return _WEBP
    if first_bytes[:1] == b"P" and first_bytes[1:2] in b"123456" and first_bytes[2:3].isspace():
        return _PNM
    if first_bytes[4:8] == b"ftyp":
        brands = {first_bytes[8:12], *(first_bytes[at : at + 4] for at in range(16, 32, 4))}
        if brands & {b"avif", b"avis"}:
            return _AVIF
        return _HEIC if brands & _HEIC_BRANDS else None
    return _DICOM if first_bytes[128:132] == b"DICM" else None


def decoder_missing(kind: Format) -> str:
    """Return how to install the decoder of a format; nothing where it is there."""
    package = _EXTRA_PACKAGES.get(kind.extra)
    if package is None or importlib.util.find_spec(package):
        return ""
    return f"install simclr-ray[{kind.extra}]"


def decode_image(
    encoded: bytes, max_pixels: int = 50_000_000, min_side: int = 2, white: float = 0
) -> Pixels:
    """Return the pixels of one encoded image as people see it, uint8 [H, W, 3], contiguous.

    JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, JPEG 2000 and PPM/PGM/PBM; HEIC and DICOM where pi-heif
    and pydicom are installed, and TIFF that Pillow does not read where tifffile is. EXIF
    orientation is applied, transparency is laid over white, of an animation the first frame
    counts; CMYK, palette, gray and bilevel become RGB. Gray of more than 8 bits is scaled by its
    bits. Safe to call from many threads.

    Args:
        encoded: the bytes of the file.
        max_pixels: images of more pixels are refused by their header, before they take memory.
        min_side: images with a shorter side are refused.
        white: value that is white in gray of 9 to 16 bits; 0: the largest that its bits hold.

    Raises:
        ImageError: with the reason: `empty`, `not an image`, `broken header`, `truncated`,
            `undecodable`, `too many pixels: WxH`, `too small: WxH`, `pixels of mode F ...`,
            `HEIC (install simclr-ray[heic])`.
    """
    kind = format_of(encoded[:FIRST_BYTES])
    try:
        return _decode(encoded, kind, max_pixels, min_side, white)
    except _UndecodedError as error:
        for stripped in _without_metadata(encoded, kind):
            with contextlib.suppress(_UndecodedError):
                return _decode(stripped, kind, max_pixels, min_side, white)
        if kind is _TIFF:
            page = _tiff_page(encoded, max_pixels, min_side, white)
            if page is not None:
                return page
        raise error from error.__cause__


class _UndecodedError(ImageError):
    """A decoder has failed, perhaps for what is said about the pixels."""


def _decode(
    encoded: bytes, kind: Format | None, max_pixels: int, min_side: int, white: float
) -> Pixels:
    image = _open(encoded, kind, max_pixels)
    _check_size(image.size, max_pixels, min_side)
    try:
        image.load()
        gray = _gray16(image, white)  # before turning, which forgets what the file says
        return _to_rgb(_upright(image) if gray is None else _upright(gray))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything at all on broken bytes
        raise _UndecodedError(_reason(error)) from error


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


def _open(encoded: bytes, kind: Format | None, max_pixels: int) -> Image.Image:
    """Return the image with its header read and its pixels not."""
    if not encoded:
        raise ImageError("empty")
    if kind is None:
        raise ImageError("not an image")
    if kind.open is None:
        return _open_by_extra(encoded, kind, max_pixels)
    if kind is _WEBP:
        _check_size(_webp_size(encoded), max_pixels)  # Pillow's constructor takes a whole canvas
    try:
        image: Image.Image = kind.open(io.BytesIO(encoded))
    except MemoryError:
        raise
    except Exception as error:
        raise _UndecodedError("broken header") from error
    return image


def _open_by_extra(encoded: bytes, kind: Format, max_pixels: int) -> Image.Image:
    """Return an image whose decoder is a package that the base does not install."""
    try:
        if kind is _HEIC:
            heif = importlib.import_module("pi_heif")
            return heif.HeifImagePlugin.HeifImageFile(io.BytesIO(encoded))  # type: ignore[no-any-return]
        dicom = importlib.import_module("pydicom").dcmread(io.BytesIO(encoded))
        _check_size((int(dicom.Columns), int(dicom.Rows)), max_pixels)
        return Image.fromarray(_dicom_frame(dicom))
    except ImportError:
        raise ImageError(f"{kind.name} (install simclr-ray[{kind.extra}])") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError("undecodable") from error


def _dicom_frame(dicom: Any) -> Pixels:
    """Return the first frame as uint8: gray by the file's own tables and window, or color.

    What the window leaves is stretched from its least to its largest value, as viewers do.
    """
    pixels = importlib.import_module("pydicom.pixels")
    frame = pixels.pixel_array(dicom, index=0)
    if dicom.PhotometricInterpretation == "PALETTE COLOR":
        frame = pixels.apply_color_lut(frame, dicom)
        return scaled_gray(frame, np.iinfo(frame.dtype).max)
    if frame.ndim == 3:
        return scaled_gray(frame, 2 ** int(dicom.BitsStored) - 1)
    values = pixels.apply_voi_lut(pixels.apply_modality_lut(frame, dicom), dicom).astype(np.float64)
    gray = (values - values.min()) / max(values.max() - values.min(), 1e-9)
    if dicom.PhotometricInterpretation == "MONOCHROME1":
        gray = 1 - gray
    return scaled_gray(gray, 1)


def _check_size(size: tuple[int, int], max_pixels: int, min_side: int = 0) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"too many pixels: {size[0]}x{size[1]}")
    if min(size) < min_side:
        raise ImageError(f"too small: {size[0]}x{size[1]}")


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
    if image.mode in ("I", "F"):
        raise _UndecodedError(f"pixels of mode {image.mode} have no known range")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _over_white(image.convert("RGBA"))
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # which copies whatever it is
    return np.array(rgb, dtype=np.uint8, order="C")


def _gray16(image: Image.Image, white: float) -> Image.Image | None:
    """Return gray of 9 to 16 bits as gray of 8, by what the file states; None for other pixels."""
    is_wide = image.mode.startswith("I;16")
    if not is_wide and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        return None
    values, top = np.asarray(image), _WHITE_16
    clear = image.info.get("transparency") if image.format == "PNG" else None
    if image.format == "TIFF":
        tags: Any = image
        top = 2 ** int(tags.tag_v2.get(_BITS, (16,))[0]) - 1
        if tags.tag_v2.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds up to 8 bits
            values = top - values
    gray = scaled_gray(values, white or top)
    if isinstance(clear, int):
        gray[values == clear] = 255
    out = Image.fromarray(gray)
    out.info = {key: image.info[key] for key in _ORIENTED if key in image.info}
    if image.format == "TIFF":
        out.getexif().update({_ORIENTATION: image.getexif().get(_ORIENTATION, 1)})
        out.info["exif"] = out.getexif().tobytes()
    return out


def scaled_gray(values: npt.NDArray[Any], white: float) -> Pixels:
    """Return values in [0, white] as uint8; what is above is white."""
    # 65535 / 255 is 257 without rounding
    return np.clip(np.rint(values / (white / 255)), 0, 255).astype(np.uint8)


def gray_to_rgb(gray: Pixels) -> Pixels:
    """Return uint8 [H, W] as [H, W, 3], contiguous."""
    return np.repeat(gray[:, :, None], 3, axis=2)


def _tiff_page(encoded: bytes, max_pixels: int, min_side: int, white: float) -> Pixels | None:
    """Return the first page by tifffile, where that is installed; None where it is not.

    Pillow refuses bits, byte order and photometric that are not on its list, as 12 bits in MM.
    """
    try:
        tifffile = importlib.import_module("tifffile")
        page = tifffile.TiffFile(io.BytesIO(encoded)).pages[0]
        _check_size((page.imagewidth, page.imagelength), max_pixels, min_side)
        kind = page.photometric.name
        if page.dtype.name not in ("uint8", "uint16") or not kind.startswith(("MINIS", "RGB")):
            return None
        values, top = page.asarray(), 2**page.bitspersample - 1
    except ImportError:
        return None
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from error
    values = (top - values if kind == "MINISWHITE" else values).squeeze()
    if values.ndim == 2:
        return gray_to_rgb(scaled_gray(values, white or top))
    gray = scaled_gray(values, top)
    if gray.ndim != 3 or gray.shape[2] not in (3, 4):
        raise ImageError(f"{gray.shape[-1]} channels")
    return _over_white(Image.fromarray(gray)) if gray.shape[2] == 4 else gray


def _without_metadata(encoded: bytes, kind: Format | None) -> Iterator[bytes]:
    """Yield a PNG or JPEG without comments, profiles and the like; of a JPEG EXIF is last to go."""
    with contextlib.suppress(struct.error, IndexError):
        if kind is _PNG:
            yield b"".join(_png_chunks(encoded))
        if kind is _JPEG:
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
