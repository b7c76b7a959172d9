"""One encoded image in, RGB pixels out; and the fixed view that evaluation uses.

This folder travels alone with exported models, so it knows only NumPy and Pillow. It picks the
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
import io
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin

from .channels import (
    Bands,
    White,
    has_more_pages,
    is_color_by_pages,
    luma_of,
    read_bands,
    read_deep_bands,
    shown_as_rgb,
    values_of,
)
from .extras import open_by_extra, read_deep_color, read_jpeg_by_turbo
from .formats import (
    BROKEN_HEADER,
    COLOR,
    FIRST_BYTES,
    JPEG,
    NPY,
    PNG,
    PNM,
    TIFF,
    WEBP,
    Format,
    ImageError,
    Pixels,
    UndecodedError,
    channels_in,
    check_size,
    format_of,
    instead_of_image,
    missing_decoder,
    no_image,
    reason_of,
    stands_for_image,
    webp_size,
)
from .metadata import turn_upright, without_metadata
from .rgb import (
    EIGHT_BITS,
    WHITE_16,
    DeepImage,
    Stored,
    read_gray,
    read_stored,
    to_rgb,
    with_orientation_of,
)
from .tiff import UnknownColorError, check_samples, check_tile, read_tiff_page

__all__ = [
    "BYTES_PER_PIXEL",
    "COLOR",
    "DEFAULT_DECODER",
    "FIRST_BYTES",
    "Bands",
    "DeepImage",
    "ImageDecoder",
    "ImageError",
    "Library",
    "Pixels",
    "White",
    "channels_in",
    "decode_image",
    "evaluation_view",
    "format_of",
    "image_decoder",
    "image_shape",
    "image_size",
    "instead_of_image",
    "missing_decoder",
    "read_deep_bands",
    "read_deep_image",
    "shown_as_rgb",
    "stands_for_image",
]

# The authors' centre crop; 0.875 = 224/256 (google-research/simclr, data_util.py CROP_PROPORTION).
CROP_PROPORTION: Final = 0.875
# At most this side, the authors evaluate on the whole image (data.py: no crop for 32 px and less).
WHOLE_IMAGE_SIDE: Final = 32

# What decoding takes at most, beside the file: 25 of RGBA, 17 of JPEG that lies on its side
# (tests/unit/augment/test_bombs.py). Floats are made of blocks of rows.
BYTES_PER_PIXEL: Final = 40
MAY_BE_DEEP: Final = (PNG, TIFF, PNM)  # formats whose values may have more than 8 bits

Library = Literal["pillow", "turbo"]


class ImageDecoder(NamedTuple):
    """How the images of a dataset are decoded: all by the same rules.

    Attributes:
        max_pixels: Images of more pixels are refused by their header, before they take memory.
        min_side: Images with a shorter side are refused.
        white: Value that is white in images of 9 to 16 bits; 0: the largest that their bits hold.
            Where color is of 16 bits, that takes the extra `tiff`. DICOM states its own window.
            With other channels than 1 and 3, one for all or one for each.
        library: What decodes JPEG: `pillow`, or `turbo` (simplejpeg), in two thirds of the time
            and within 2 of 255. What simplejpeg does not decode whole, Pillow is asked about.
        channels: C of the pixels, 1 to 16: 3 is RGB, 1 gray (luma where the image has color); any
            other is what the files have to hold, as `read_bands` reads them.
    """

    max_pixels: int = 50_000_000
    min_side: int = 2
    white: White = 0
    library: Library = "pillow"
    channels: int = 3

    def decode(self, encoded: bytes, least: tuple[int, int] = (0, 0)) -> Pixels:
        """Return the pixels of one encoded image, uint8 [H, W, C], else as `decode_image` does.

        Args:
            encoded: The bytes of the file.
            least: Height and width that suffice: `turbo` decodes a JPEG at 1/2, 1/4 or 1/8 of its
                size where that leaves no less. (0, 0): whole images only.
        """
        kind = format_of(encoded[:FIRST_BYTES])
        are_bands = kind is NPY or self.channels not in COLOR
        if are_bands or (self.channels == 3 and is_color_by_pages(encoded, kind)):
            bands = read_bands(encoded, kind, self.channels, self.max_pixels)
            check_size(bands.values.shape[1::-1], self.max_pixels, self.min_side)
            pixels = bands.as_color(self.channels).to_pixels(self.white)
            return luma_of(pixels) if self.channels == 1 < pixels.shape[2] else pixels
        pixels = self._decode_rgb(encoded, kind, least)
        return luma_of(pixels) if self.channels == 1 else pixels

    def leaves_pages_out(self, encoded: bytes) -> bool:
        """Return whether a TIFF that can be decoded has pages beside those that are its image."""
        kind = format_of(encoded[:FIRST_BYTES])
        if self.channels not in COLOR or (self.channels == 3 and is_color_by_pages(encoded, kind)):
            return False
        return has_more_pages(encoded, kind)

    def decode_small(self, encoded: bytes, side: int) -> Pixels:
        """Return the pixels of an image that will be shown with `side` px, uint8 [H, W, C].

        A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides keep twice that, which
        shrinks as well as the whole image does. Else as `decode` does.
        """
        if format_of(encoded[:FIRST_BYTES]) is JPEG and self.channels in COLOR:
            # whatever is wrong, the whole image is decoded, and says what it is
            with contextlib.suppress(ImageError, OSError, SyntaxError, ValueError):
                image = JpegImagePlugin.JpegImageFile(io.BytesIO(encoded))
                check_size(image.size, self.max_pixels, self.min_side)
                image.draft(None, (2 * side, 2 * side))
                return self.convert(image)
        return self.decode(encoded)

    def convert(self, image: Image.Image | npt.NDArray[Any]) -> Pixels:
        """Return the pixels of an image that is decoded already, uint8 [H, W, C].

        They are those of its file, but for color of 16 bits, of which Pillow has kept 8.

        Args:
            image: Pillow's, upright or with its EXIF orientation; or an array as `read_bands` takes
                it, uint8 or uint16 [H, W], [H, W, C] or [C, H, W].

        Raises:
            ImageError: As `decode`.
        """
        if isinstance(image, Image.Image) and self.channels in COLOR:
            check_size(image.size, self.max_pixels, self.min_side)
            pixels = self._upright(image, read_stored(image))
            return luma_of(pixels) if self.channels == 1 else pixels
        if isinstance(image, Image.Image):
            image = values_of(image, self.channels)
        values = np.asarray(image)
        if values.dtype.hasobject:
            raise ImageError(f"values of {values.dtype.name} have no known range")
        out = io.BytesIO()
        np.save(out, values)
        return self.decode(out.getvalue())

    def _decode_rgb(self, encoded: bytes, kind: Format | None, least: tuple[int, int]) -> Pixels:
        if kind is JPEG and self.library == "turbo":
            pixels = read_jpeg_by_turbo(encoded, self.max_pixels, self.min_side, least)
            if pixels is not None:
                return pixels
        try:
            return self._decode(encoded, kind)
        except UndecodedError as error:
            for stripped in without_metadata(encoded, kind):
                with contextlib.suppress(UndecodedError):
                    return self._decode(stripped, kind)
            page = self._page_instead(encoded, error) if kind is TIFF else None
            if page is None:
                raise error from error.__cause__
            check_size(page.values.shape[1::-1], self.max_pixels, self.min_side)
            return page.to_pixels(self._white)

    def _page_instead(self, encoded: bytes, error: ImageError) -> DeepImage | None:
        try:
            return read_tiff_page(encoded, self.max_pixels, self.channels)
        except UnknownColorError:
            if str(error) == BROKEN_HEADER:  # it is not, Pillow does not know the page
                raise
            return None

    @property
    def _white(self) -> float:
        assert not isinstance(self.white, tuple)  # RGB and gray have one
        return self.white

    def _decode(self, encoded: bytes, kind: Format | None) -> Pixels:
        image = _open(encoded, kind, self.max_pixels)
        check_size(image.size, self.max_pixels, self.min_side)
        if kind is TIFF:
            check_samples(image, self.channels)
        stored = read_stored(image) if kind in MAY_BE_DEEP else EIGHT_BITS
        deep = None
        if self.white and stored.is_deep_color:
            deep = read_deep_color(encoded, kind, self.max_pixels, self.channels)
            if deep is None:
                shown = f"color of 16 bits with data.white={self._white:g}"
                raise ImageError(f"{shown} (install simclr-ray[tiff])")
            if kind is TIFF:  # upright already, and Pillow would decode it a second time
                return deep.to_pixels(self._white)
        return self._upright(image, stored, deep)

    def _upright(self, image: Image.Image, stored: Stored, deep: DeepImage | None = None) -> Pixels:
        """Return the pixels of an image as RGB; `deep` are its values where they are read."""
        try:
            image.load()
            # before turning, which forgets what the file says
            deep = deep or read_gray(image, stored)
            if deep is not None:
                image = with_orientation_of(image, deep.to_pixels(self._white))
            return to_rgb(turn_upright(image), high_bytes=stored.is_deep_color and deep is None)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything at all on broken bytes
            raise UndecodedError(reason_of(error)) from error


def read_deep_image(encoded: bytes, max_pixels: int = 50_000_000) -> DeepImage | None:
    """Return the values of an image of 9 to 16 bits; None for one of 8, or one that is broken.

    Color of 16 bits is read by imagecodecs or tifffile; without them its high bytes are returned.
    """
    kind = format_of(encoded[:FIRST_BYTES])
    if kind is NPY or is_color_by_pages(encoded, kind):
        bands = read_deep_bands(encoded, 3, max_pixels)
        return DeepImage(bands.as_color(3).values, bands.top) if bands else None
    if kind not in MAY_BE_DEEP:
        return None
    try:
        image = _open(encoded, kind, max_pixels)
        check_size(image.size, max_pixels)
        if kind is TIFF:
            check_samples(image, 3)
        stored = read_stored(image)
        if not stored.is_deep_color:
            return read_gray(image, stored)  # which loads no other
        deep = read_deep_color(encoded, kind, max_pixels)
        return deep or DeepImage(np.asarray(image.convert("RGB")).astype(np.uint16) << 8, WHITE_16)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - broken in whatever way: decoding says it
        with contextlib.suppress(ImageError):
            page = read_tiff_page(encoded, max_pixels) if kind is TIFF else None
            return page if page is not None and page.values.dtype == np.uint16 else None
        return None


def image_size(encoded: bytes, max_pixels: int = 50_000_000) -> tuple[int, int]:
    """Return (height, width) of an image that can be decoded, of whatever number of channels.

    Raises:
        ImageError: Same as `decode_image`.
    """
    return image_shape(encoded, max_pixels)[:2]


def image_shape(encoded: bytes, max_pixels: int = 50_000_000) -> tuple[int, int, int]:
    """Return (height, width, channels) of an image that can be decoded; all color and gray is RGB.

    Raises:
        ImageError: Same as `decode_image`.
    """
    kind = format_of(encoded[:FIRST_BYTES])
    decoder = ImageDecoder(max_pixels)
    try:
        height, width, channels = decoder.decode(encoded).shape
    except ImageError:
        if kind not in (NPY, TIFF):
            raise
        height, width, channels = read_bands(encoded, kind, 0, max_pixels).values.shape
        check_size((width, height), max_pixels, decoder.min_side)
    return height, width, channels


def image_decoder(
    channels: int, white: float | list[float], max_pixels: int = 50_000_000
) -> ImageDecoder:
    """Return the decoder that a config or the card of an encoder describes."""
    level = tuple(map(float, white)) if isinstance(white, list) else float(white)
    return ImageDecoder(max_pixels, white=level, channels=channels)


DEFAULT_DECODER: Final = ImageDecoder()


def decode_image(
    encoded: bytes, max_pixels: int = 50_000_000, min_side: int = 2, white: float = 0
) -> Pixels:
    """Return the pixels of one encoded image as people see it, uint8 [H, W, 3], contiguous.

    JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, JPEG 2000 and PPM/PGM/PBM; HEIC and DICOM where pi-heif
    and pydicom are installed, and TIFF that Pillow does not read where tifffile is. EXIF
    orientation is applied, transparency is laid over white, of an animation the first frame
    counts, of a TIFF the first page, unless it has three gray ones; CMYK, palette, gray and bilevel
    become RGB. Gray of more than 8 bits is scaled by its bits. Safe to call from many threads.

    Args:
        encoded: The bytes of the file.
        max_pixels: As in `ImageDecoder`, as all that follow.
        min_side: In pixels.
        white: Value of 9 to 16 bits.

    Raises:
        ImageError: With the reason: `empty`, `not an image`, `broken header`, `truncated`,
            `undecodable`, `too many pixels: WxH`, `too small: WxH`, `values of float32 have no
            known range`, `4 channels, data.channels=3`, `HEIC (install simclr-ray[heic])`.
    """
    return ImageDecoder(max_pixels, min_side, white).decode(encoded)


def evaluation_view(pixels: Pixels, size: int) -> Pixels:
    """Return the one view of an image that evaluation uses, uint8 [size, size, C].

    The authors' evaluation (google-research/simclr, `preprocess_for_eval`): up to 32 px the whole
    image; above, the central square of 0.875 of the shorter side; then bicubic resizing, here
    with Pillow's antialiasing.

    Args:
        pixels: uint8 [H, W, C].
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
    planes = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0)
    images = (Image.fromarray(np.ascontiguousarray(plane)) for plane in planes)
    resized = [i.resize((size, size), Image.Resampling.BICUBIC, box=box) for i in images]
    views = [np.asarray(image) for image in resized]
    return views[0] if pixels.shape[2] == 3 else np.dstack(views)


def _open(encoded: bytes, kind: Format | None, max_pixels: int) -> Image.Image:
    """Return the image with its header read and its pixels not."""
    if kind is None:
        raise no_image(encoded)
    if kind.open is None:
        return open_by_extra(encoded, kind, max_pixels)
    if kind is WEBP:
        check_size(webp_size(encoded), max_pixels)  # Pillow's constructor takes a whole canvas
    try:
        image: Image.Image = kind.open(io.BytesIO(encoded))
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodedError(BROKEN_HEADER) from error
    if kind is TIFF:
        check_tile(image.tag_v2.get, max_pixels)  # type: ignore[attr-defined] # a TIFF's
    return image
