"""Images in labelled rows, as one HTML file that needs nothing else or as one image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from simclr_ray.augment.decode import Pixels
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.storage.filesystem import (
    filesystem,
    make_parent,
    open_whole,
    write_text_whole,
)
from simclr_ray.storage.page import render_page

# A thumbnail takes about 4 kB as text: a page of 500 of them 2 MB.
THUMBNAIL_SIDE, JPEG_QUALITY = 112, 75
PAGE, DRAWN = (".html",), (".png", ".jpg", ".jpeg")  # endings of what a sheet becomes
MARGIN, LINE, TITLE = 8, 13, 18  # px of a drawn one: around images, of a caption's line, of a title
MOST_LINES: Final = 2  # of a caption
MOST_PX: Final = 65_000  # that JPEG holds


class Thumbnail(NamedTuple):
    """An image on the sheet, and what it is called.

    Attributes:
        name: First line of its caption.
        note: Second line.
        image: Of at most `THUMBNAIL_SIDE` px; None where it cannot be had.
    """

    name: str
    note: str
    image: Image.Image | None

    @property
    def uri(self) -> str:
        """Return the URI that holds it; empty where there is no image."""
        return "" if self.image is None else data_uri(self.image)


class Section(NamedTuple):
    """A heading, what it says, and rows of images that belong together."""

    title: str
    says: str
    rows: list[tuple[str, list[Thumbnail]]]


def check_output(out: str, option: str, endings: Sequence[str] = PAGE + DRAWN) -> None:
    """Make the folder of a file that is to be written, before there is work to be lost.

    Raises:
        ConfigError: It has another ending than those.
        DataError: As in `filesystem`.
        OSError: The folder cannot be made, or not be written to.
    """
    if not out.partition("?")[0].lower().endswith(tuple(endings)):
        named = ", ".join(endings)
        raise ConfigError.of(option, f"got {out}; it must end in {named}")
    make_parent(out)


def write_sheet(
    out: str,
    title: str,
    sections: Sequence[Section],
    facts: Mapping[str, str],
    *,
    reasons: Sequence[tuple[str, int, str]] = (),
    classes: Sequence[tuple[str, str, int]] = (),
) -> None:
    """Write a sheet; one that is drawn has its rows alone.

    Args:
        out: Path or URI, whose ending says what it becomes; of an unknown one a page.
        title: Of the page.
        sections: Those without rows are left out.
        facts: Name -> value, at the head of the page.
        reasons: Of images that cannot be used: reason, how many, some names.
        classes: Label, class and how many images, at the foot.

    Raises:
        DataError: There are more rows than an image can hold.
        OSError: The file cannot be written.
    """
    filled = [section for section in sections if section.rows]
    fs, path = filesystem(out)
    ending = f".{path.rpartition('.')[2].lower()}"
    if ending in DRAWN:
        drawn = _drawn([row for section in filled for row in section.rows])
        with open_whole(fs, path) as stream:
            stream.write(_encoded(drawn, "PNG" if ending == ".png" else "JPEG"))
        return
    page = render_page(
        "data",
        "contact_sheet.html.j2",
        title=title,
        facts=facts,
        reasons=reasons,
        classes=classes,
        sections=filled,
    )
    write_text_whole(fs, path, page)


def thumbnail_of(pixels: Pixels, side: int = THUMBNAIL_SIDE) -> Image.Image:
    """Return an image of at most `side` px a side, of pixels uint8 [H, W, 3]."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return image


def data_uri(image: Image.Image) -> str:
    """Return an image as a URI that holds it."""
    encoded = base64.b64encode(_encoded(image, "JPEG")).decode()
    return f"data:image/jpeg;base64,{encoded}"


def _encoded(image: Image.Image, form: str) -> bytes:
    out = io.BytesIO()
    image.save(out, form, quality=JPEG_QUALITY)
    return out.getvalue()


def _drawn(rows: Sequence[tuple[str, list[Thumbnail]]]) -> Image.Image:
    """Return an image of the rows, one below the other, captions below the images."""
    cell_height = THUMBNAIL_SIDE + MOST_LINES * LINE + MARGIN
    columns = max((len(images) for _, images in rows), default=1)
    width = MARGIN + columns * (THUMBNAIL_SIDE + MARGIN)
    height = max(cell_height, MARGIN + sum(cell_height + TITLE * bool(says) for says, _ in rows))
    if max(width, height) > MOST_PX:
        raise DataError(
            f"{len(rows):,} rows of up to {columns:,} images are no image of {MOST_PX:,} px a "
            "side; write an .html page, or fewer"
        )
    sheet = Image.new("RGB", (width, height), "white")
    if not rows:
        ImageDraw.Draw(sheet).text((MARGIN, MARGIN), "none", "#555", ImageFont.load_default(11))
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(11), MARGIN
    for says, images in rows:
        if says:
            draw.text((MARGIN, top), _cut(says, font, width - MARGIN), "#555", font)
            top += TITLE
        for place, shown in enumerate(images):
            left = MARGIN + place * (THUMBNAIL_SIDE + MARGIN)
            if shown.image is not None:
                sheet.paste(_enlarged(shown.image), (left, top))
            else:
                draw.rectangle((left, top, left + THUMBNAIL_SIDE, top + THUMBNAIL_SIDE), "#eee")
            for line, text in enumerate((shown.name, shown.note)):
                at = (left, top + THUMBNAIL_SIDE + line * LINE)
                draw.text(at, _cut(text, font, THUMBNAIL_SIDE), "#222", font)
        top += cell_height
    return sheet


def _enlarged(image: Image.Image) -> Image.Image:
    """Return an image of few pixels as large ones, so that it is seen beside others."""
    times = THUMBNAIL_SIDE // max(image.size)
    whole = image.width * times, image.height * times
    return image.resize(whole, Image.Resampling.NEAREST) if times > 1 else image


def _cut(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> str:
    """Return the end of a text that is wider than there is room: of a path what tells it apart."""
    while len(text) > 2 and font.getlength(text) > width:
        text = f"…{text[2:]}"
    return text
