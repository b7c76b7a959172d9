"""Images whose decoders are packages that the base does not install.

JPEG is simplejpeg's (MIT), which brings libjpeg-turbo and decodes at smaller scales. Measured on
photographs of 300 px, one thread: simplejpeg 0.25 ms an image, torchcodec 0.17 (BSD) 0.29,
torchvision.io 0.33, Pillow 0.53. torchcodec is built for one version of torch and knows no scales;
on 500 photographs of Caltech-101 simplejpeg gave Pillow's own bytes.
"""

from __future__ import annotations

import importlib
import io
import zlib
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from .formats import (
    HEIC,
    PNG,
    TIFF,
    Format,
    ImageError,
    Pixels,
    UndecodedError,
    check_size,
    reason_of,
)
from .metadata import ORIENTATION, ORIENTED, turn_upright
from .rgb import WHITE_16, DeepImage, scaled_gray, to_rgb
from .tiff import read_tiff_page

DEFLATED = "1.2.840.10008.1.2.1.99"  # transfer syntax of a DICOM file (PS3.5 §A.5)
INFLATED_PER_PIXEL = 8  # bytes: three samples of 16 bits, and what is said about them
INFLATED_AT_ONCE = 2**20
LIES_FROM = 5  # orientations in which height and width change places


def open_by_extra(encoded: bytes, kind: Format, max_pixels: int) -> Image.Image:
    """Return an image whose decoder is a package that the base does not install."""
    try:
        if kind is HEIC:
            heif = importlib.import_module("pi_heif")
            return heif.HeifImagePlugin.HeifImageFile(io.BytesIO(encoded))  # type: ignore[no-any-return] # an optional package
        pydicom = importlib.import_module("pydicom")
        _check_inflated(encoded, INFLATED_PER_PIXEL * max_pixels)
        dicom = pydicom.dcmread(io.BytesIO(encoded))
        check_size((int(dicom.Columns), int(dicom.Rows)), max_pixels)
        return Image.fromarray(_dicom_frame(dicom))
    except ImportError:
        raise ImageError(f"{kind.name} (install simclr-ray[{kind.extra}])") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError("undecodable") from error


def _check_inflated(encoded: bytes, most: int) -> None:
    """Raise `ImageError` for a deflated data set that becomes larger, which pydicom would hold."""
    # the header's own length may be wrong, and what it says may come late: pydicom finds where the
    # data set begins, as it will when it decodes
    reader, stream = importlib.import_module("pydicom.filereader"), io.BytesIO(encoded)
    reader.read_preamble(stream, force=False)
    if reader._read_file_meta_info(stream).get("TransferSyntaxUID") != DEFLATED:
        return
    unpacker, total, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, stream.read()
    while rest and not unpacker.eof:
        total += len(unpacker.decompress(rest, INFLATED_AT_ONCE))
        rest = unpacker.unconsumed_tail
        if total > most:
            raise ImageError(f"inflates to more than {most // 2**20} MiB")


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


def read_jpeg_by_turbo(
    encoded: bytes, max_pixels: int, min_side: int, least: tuple[int, int]
) -> Pixels | None:
    """Return what simplejpeg decodes without an error; None where Pillow is to be asked.

    Args:
        encoded: A JPEG.
        max_pixels: Of the whole image, in its header.
        min_side: Of the whole image.
        least: As in `ImageDecoder.decode`.

    Raises:
        ImageError: simplejpeg is not installed, or the image is too large or too small.
    """
    try:
        simplejpeg = importlib.import_module("simplejpeg")
    except ImportError:
        raise ImageError("JPEG (data.decoder=turbo: install simclr-ray[turbo])") from None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(encoded)
        if color not in ("YCbCr", "Gray", "RGB"):
            return None
        check_size((width, height), max_pixels, min_side)
        header = JpegImagePlugin.JpegImageFile(io.BytesIO(encoded))
        is_oriented = any(key in header.info for key in ORIENTED)
        options: dict[str, int] = {}
        if max(least):  # scales of n/8 above 1/2 take longer than the whole
            lies = is_oriented and header.getexif().get(ORIENTATION, 1) >= LIES_FROM
            high, wide = least[::-1] if lies else least
            options = {"min_height": high, "min_width": wide, "min_factor": 2}
        pixels: Pixels = simplejpeg.decode_jpeg(encoded, "RGB", **options)
    except (ImageError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - whatever it is, Pillow finds it and says what it is
        return None
    if not is_oriented:
        return pixels
    image = Image.fromarray(pixels)
    image.info = header.info
    return to_rgb(turn_upright(image))


def read_deep_color(
    encoded: bytes, kind: Format | None, max_pixels: int, channels: int = 3
) -> DeepImage | None:
    """Return the values of a PNG or TIFF whose pixels are several values of 16 bits.

    None for other images, and where imagecodecs and tifffile are not installed.

    Raises:
        ImageError: The image is broken, too large, or of other channels.
    """
    if kind is not PNG:
        return read_tiff_page(encoded, max_pixels, channels) if kind is TIFF else None
    try:
        imagecodecs = importlib.import_module("imagecodecs")
        values = imagecodecs.png_decode(encoded)
    except ImportError:
        return None
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodedError(reason_of(error)) from error
    if values.ndim == 3 and values.shape[2] == 2:
        values = values[:, :, [0, 0, 0, 1]]
    return DeepImage(values, WHITE_16)
