"""Pixels of any mode and depth as uint8 RGB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from .formats import Pixels, UndecodedError
from .metadata import ORIENTATION, ORIENTED

WHITE_16: Final = 65535
BLOCK_VALUES: Final = 2**18  # that are floats at a time
_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF


class DeepImage(NamedTuple):
    """An image of 9 to 16 bits, as its file holds it.

    Attributes:
        values: Unsigned integers [H, W] of gray, [H, W, 3] of RGB, [H, W, 4] with transparency;
            0 is black.
        top: The largest value that its bits hold.
        clear: The gray that is transparent, if one is.
        is_premultiplied: Whether color is over black already by its transparency.
    """

    values: npt.NDArray[Any]
    top: int
    clear: int | None = None
    is_premultiplied: bool = False

    def to_pixels(self, white: float) -> Pixels:
        """Return uint8 [H, W, 3]; `white` is 255, as what is above.

        Where it is 0, or the image has up to 8 bits, `top` is.
        """
        full = white if white and self.values.dtype.itemsize > 1 else self.top
        if self.values.ndim == 2:
            gray = scaled_gray(self.values, full)
            if self.clear is not None:
                gray[self.values == self.clear] = 255
            return np.repeat(gray[:, :, None], 3, axis=2)
        color = scaled_gray(self.values[:, :, :3], full)
        if self.values.shape[2] == 3:
            return color
        for rows in blocks_of_rows(self.values):
            opaque = self.values[rows, :, 3:] / self.top
            if self.is_premultiplied:  # no color is more than its transparency lets through
                lit = np.minimum(self.values[rows, :, :3] / full, opaque)
                color[rows] = np.rint(255 * (lit + 1 - opaque))
            else:
                color[rows] = np.rint(color[rows] * opaque + 255 * (1 - opaque))
        return color


class Stored(NamedTuple):
    """How a file stores its pixels, which Pillow forgets once it has loaded them."""

    raw_mode: str  # Pillow's: `RGB;16B`
    most: int  # the largest value of a PGM; 0: it states none

    @property
    def is_deep_color(self) -> bool:
        """Whether several values of 16 bits are a pixel, of which Pillow keeps the high bytes."""
        return self.raw_mode.endswith((";16B", ";16L", ";16N")) and not self.raw_mode.startswith(
            "I;"
        )


EIGHT_BITS: Final = Stored("", 0)


def read_stored(image: Image.Image) -> Stored:
    """Return how the file of an image that is not loaded yet stores its pixels."""
    tiles = getattr(image, "tile", None)  # None: its decoder has made the pixels
    args = tiles[0].args if tiles else ""
    parts = args if isinstance(args, tuple) else (args,)
    raw_mode = parts[0] if parts and isinstance(parts[0], str) else ""
    most = parts[1] if image.format == "PPM" and len(parts) > 1 else 0
    return Stored(raw_mode, int(most))


def to_rgb(image: Image.Image, *, high_bytes: bool = False) -> Pixels:
    """Return a loaded image of any mode as uint8 [H, W, 3].

    Args:
        image: Pillow's.
        high_bytes: Its values are the upper halves of 16 bits.
    """
    if image.mode in ("I", "F"):
        raise UndecodedError(f"pixels of mode {image.mode} have no known range")
    if has_transparency(image):
        rgba = image.convert("RGBA")
        return _lay_deep_over_white(rgba) if high_bytes else _lay_over_white(rgba)
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # which copies whatever it is
    return np.array(rgb, dtype=np.uint8, order="C")


def has_transparency(image: Image.Image) -> bool:
    """Return whether an image says how transparent its pixels are, by a channel or by a color."""
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")


def read_gray(image: Image.Image, stored: Stored) -> DeepImage | None:
    """Return the values of gray of 9 to 16 bits; None for other images, which are not loaded."""
    is_wide = image.mode.startswith("I;16")
    if not is_wide and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        return None
    values, top = np.asarray(image), WHITE_16
    clear = image.info.get("transparency") if image.format == "PNG" else None
    if image.format == "TIFF":
        tags: Any = image
        top = 2 ** int(tags.tag_v2.get(_BITS, (16,))[0]) - 1
        if tags.tag_v2.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds up to 8 bits
            values = top - values
    elif stored.most:  # Pillow has stretched them over 16 bits
        values, top = np.rint(values * (stored.most / WHITE_16)).astype(np.uint16), stored.most
    return DeepImage(values, top, clear if isinstance(clear, int) else None)


def with_orientation_of(image: Image.Image, pixels: Pixels) -> Image.Image:
    """Return pixels as an image that says of its orientation what `image` says."""
    out = Image.fromarray(pixels)
    out.info = {key: image.info[key] for key in ORIENTED if key in image.info}
    if image.format == "TIFF":
        out.getexif().update({ORIENTATION: image.getexif().get(ORIENTATION, 1)})
        out.info["exif"] = out.getexif().tobytes()
    return out


def scaled_gray(values: npt.NDArray[Any], white: float) -> Pixels:
    """Return values in [0, white] as uint8; what is above is white."""
    # 65535 / 255 is 257 without rounding
    pixels = np.empty(values.shape, np.uint8)
    for rows in blocks_of_rows(values):
        pixels[rows] = np.clip(np.rint(values[rows] / (white / 255)), 0, 255)
    return pixels


def blocks_of_rows(values: npt.NDArray[Any]) -> Iterator[slice]:
    """Yield slices of rows that hold few values: floats of a whole image take 8 times its bytes."""
    step = max(1, BLOCK_VALUES // max(values[:1].size, 1))
    return (slice(first, first + step) for first in range(0, len(values), step))


def _lay_over_white(rgba: Image.Image) -> Pixels:
    canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    canvas.alpha_composite(rgba)
    return np.array(canvas.convert("RGB"), dtype=np.uint8, order="C")


def _lay_deep_over_white(rgba: Image.Image) -> Pixels:
    """Return what `_lay_over_white` does of high bytes, each taken for the middle of its range."""
    laid = np.empty((rgba.height, rgba.width, 3), np.uint8)
    stored = np.asarray(rgba)
    for rows in blocks_of_rows(stored):
        high = stored[rows].astype(np.float64)
        values = high + (127.5 - high) / 257
        opaque = values[:, :, 3:] / 255
        over = values[:, :, :3] * opaque + 255 * (1 - opaque)
        laid[rows] = np.clip(np.rint(over), 0, 255)
    return laid
