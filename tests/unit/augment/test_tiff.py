"""TIFF of random bits, samples and layout, against the values that were written."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from simclr_ray.augment.decode import (
    ImageDecoder,
    ImageError,
    decode_image,
    image_size,
    read_deep_image,
)
from simclr_ray.augment.decode.channels import read_bands
from simclr_ray.augment.decode.formats import TIFF
from simclr_ray.augment.decode.tiff import count_pages

HEIGHT, WIDTH = 21, 34
UNSPECIFIED, PREMULTIPLIED, TRANSPARENCY = 0, 1, 2
EXTRAS = [(), (), (0,), (1,), (2,), (0, 0), (2, 0), (1, 0), (0, 2), (0, 0, 0), (0,) * 4]
FORMATS = ["int8", "int16", "int32", "uint32", "uint64", "float16", "float32", "float64"]
COMPRESSIONS: list[dict[str, Any]] = [
    {}, {}, {"compression": "zlib"}, {"compression": "lzw"}, {"compression": "packbits"},
    {"compression": "zlib", "predictor": True},
]  # fmt: skip


class Case(NamedTuple):
    """A TIFF, and what is stored in it."""

    encoded: bytes
    values: NDArray[Any]  # [H, W, samples]
    photometric: str
    extra: tuple[int, ...]
    bits: int

    @property
    def alpha(self) -> int | None:
        """The sample that is transparency, if one is."""
        first = self.values.shape[2] - len(self.extra)
        return next((first + at for at, kind in enumerate(self.extra) if kind), None)

    @property
    def color(self) -> list[int]:
        """The samples that are seen; of other numbers than 1 and 3 the image is not RGB."""
        bands = [at for at in range(self.values.shape[2]) if at != self.alpha]
        return [0, 1, 2] if self.photometric == "rgb" else bands

    def seen(self, white: float) -> NDArray[np.float64]:
        """Return what people see: [H, W, 3], up to 255."""
        top = 2**self.bits - 1
        stored = self.values.astype(np.float64)
        color = stored[..., self.color]
        color = top - color if self.photometric == "miniswhite" else color
        color = np.minimum(color / (white if white and self.bits > 8 else top), 1)
        color = color.repeat(3, 2) if color.shape[2] == 1 else color
        if self.alpha is not None:
            opaque = stored[..., [self.alpha]] / top
            kind = self.extra[self.alpha - self.values.shape[2]]
            lit = np.minimum(color, opaque) if kind == PREMULTIPLIED else color * opaque
            color = lit + 1 - opaque
        seen: NDArray[np.float64] = color * 255
        return seen


def layout(rng: np.random.Generator) -> dict[str, Any]:
    """Return how a TIFF is written, but for its samples."""
    options: dict[str, Any] = dict(COMPRESSIONS[int(rng.integers(len(COMPRESSIONS)))])
    options["byteorder"] = str(rng.choice(["<", ">"]))
    options["bigtiff"] = bool(rng.random() < 0.3)
    pieces: list[dict[str, Any]] = [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}]
    return options | pieces[int(rng.integers(3))]


def written(values: NDArray[Any], extra: tuple[int, ...], **options: Any) -> bytes:
    """Return a TIFF of values [H, W, samples]; other readers than ours find them in it."""
    out = io.BytesIO()
    if values.shape[2] == 1:
        del options["planarconfig"]
        stored = values[..., 0]
    else:
        apart = options["planarconfig"] == "separate"
        stored = np.ascontiguousarray(np.moveaxis(values, 2, 0)) if apart else values
        options |= {"extrasamples": extra} if extra else {}
    tifffile.imwrite(out, stored, **options)
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(out.getvalue())), stored)
    return out.getvalue()


def case_of(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([8, 16]))
    photometric = str(rng.choice(["minisblack", "miniswhite", "rgb"]))
    extra = EXTRAS[int(rng.integers(len(EXTRAS)))]
    num = (3 if photometric == "rgb" else 1) + len(extra)
    values = rng.integers(0, 2**bits, (HEIGHT, WIDTH, num))
    if PREMULTIPLIED in extra:
        alpha = num - len(extra) + extra.index(PREMULTIPLIED)
        values[..., :alpha] = np.minimum(values[..., :alpha], values[..., [alpha]])
    values = values.astype(np.uint8 if bits == 8 else np.uint16)
    planes = str(rng.choice(["contig", "separate"]))
    encoded = written(values, extra, photometric=photometric, planarconfig=planes, **layout(rng))
    return Case(encoded, values, photometric, extra, bits)


FEW = range(60)
MANY = [pytest.param(seed, marks=pytest.mark.long) for seed in range(60, 3000)]


@pytest.mark.parametrize("seed", [*FEW, *MANY])
def test_any_tiff_is_what_is_stored_whatever_its_layout(seed: int) -> None:
    case = case_of(seed)
    num = case.values.shape[2]
    for white in (0, 40_000):
        decoder = ImageDecoder(white=white)
        if len(case.color) not in (1, 3):
            with pytest.raises(ImageError, match=r"\d channels, data\.channels=3"):
                decoder.decode(case.encoded)
            continue
        pixels, expected = decoder.decode(case.encoded), case.seen(white)
        # Pillow cuts the low bytes off, of color by transparency those of both
        cut = 2.5 if case.bits == 16 and case.alpha and not white else 1.01
        assert np.abs(pixels - expected).max() <= cut
        gray = decoder._replace(channels=1).decode(case.encoded)
        np.testing.assert_array_equal(
            gray[..., 0], np.asarray(Image.fromarray(pixels).convert("L"))
        )
    assert image_size(case.encoded) == (HEIGHT, WIDTH)
    deep = read_deep_image(case.encoded)
    assert (deep is not None) == (case.bits == 16 and len(case.color) in (1, 3))
    if num not in (1, 3):  # as bands, which are as they are stored
        bands = ImageDecoder(channels=num).decode(case.encoded)
        top = 2**case.bits - 1
        stored = case.values.astype(np.float64)
        if case.photometric == "miniswhite":
            stored = np.where(np.arange(num) == case.alpha, stored, top - stored)
        np.testing.assert_array_equal(bands, np.rint(stored / (top / 255)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num", [1, 3, 4])
def test_values_without_a_range_are_refused_by_their_name(name: str, num: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 100, (HEIGHT, WIDTH, num)).astype(name)
        options = layout(rng)
        if "predictor" in options and values.dtype.itemsize == 8:
            del options["predictor"]
        planes = "separate" if seed % 2 else "contig"
        photometric = "rgb" if num > 1 else "minisblack"
        extra = (TRANSPARENCY,) if num == 4 else ()
        encoded = written(values, extra, photometric=photometric, planarconfig=planes, **options)
        for channels in (1, 3, 4):
            with pytest.raises(ImageError) as caught:
                ImageDecoder(channels=channels, white=100).decode(encoded)
            assert str(caught.value) == f"values of {name} have no known range"
        assert read_deep_image(encoded) is None


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("num", [1, 3])
def test_packed_values_are_white_at_the_largest_of_their_bits(bits: int, num: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH, num), np.uint16)
    out = io.BytesIO()
    stored = values if num == 3 else values[..., 0]
    photometric = "rgb" if num == 3 else "minisblack"
    tifffile.imwrite(out, stored, bitspersample=bits, photometric=photometric)
    pixels = decode_image(out.getvalue())
    assert np.abs(pixels - values * 255.0 / (2**bits - 1)).max() <= 0.51


def many_pages(num: int) -> bytes:
    """Return a TIFF of small gray pages that share their pixels: 114 bytes of directory each."""
    tags = {
        256: 2, 257: 2, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 4,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    size, first = 2 + len(entries) + 4, 12
    starts = [first + size * page for page in range(1, num)] + [0]
    pages = (struct.pack("<H", len(tags)) + entries + struct.pack("<I", at) for at in starts)
    return struct.pack("<2sHI4B", b"II", 42, first, 10, 20, 30, 40) + b"".join(pages)


@pytest.mark.parametrize("channels", [1, 3])
def test_of_thousands_of_pages_few_are_looked_at(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, loads = many_pages(4000), []
    load = TiffImagePlugin.ImageFileDirectory_v2.load

    def counted(directory: Any, file: Any) -> None:
        loads.append(file.tell())
        load(directory, file)

    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", counted)
    decoder = ImageDecoder(channels=channels)
    assert decoder.decode(encoded)[..., 0].tolist() == [[10, 20], [30, 40]]
    assert decoder.leaves_pages_out(encoded)
    assert len(loads) < 40
    with pytest.raises(ImageError, match="more than 16 pages"):
        read_bands(encoded, TIFF, 0, 100)
    assert len(loads) < 100


def test_pages_are_counted_to_one_more_than_matter_and_the_current_one_stays() -> None:
    for num in (1, 2, 3, 4):
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(many_pages(num)))
        image.seek(num - 1)
        assert [count_pages(image, most) for most in (1, 2, 3)] == [
            min(num, most + 1) for most in (1, 2, 3)
        ]
        assert image.tell() == num - 1
        assert image.n_frames == num


def test_pages_that_are_not_gray_planes_are_never_taken_for_them() -> None:
    """Of a page of gray planes Pillow gives the first, without an error."""
    values = np.random.default_rng(0).integers(0, 256, (2, 4, HEIGHT, WIDTH), np.uint8)
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as file:
        for page in values:
            file.write(page, photometric="minisblack", planarconfig="separate", compression="zlib")
    with pytest.raises(ImageError, match="page 1 is not gray"):
        ImageDecoder(channels=2).decode(out.getvalue())
    pages = io.BytesIO()
    tifffile.imwrite(pages, values[:, 0].astype(np.int8), photometric="minisblack", metadata=None)
    with pytest.raises(ImageError, match="values of int8 have no known range"):
        ImageDecoder(channels=2).decode(pages.getvalue())


def test_color_that_is_coded_otherwise_is_read_by_pillow_or_refused_by_its_name() -> None:
    rng = np.random.default_rng(0)
    ink = rng.integers(0, 256, (HEIGHT, WIDTH, 4)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(ink, "CMYK").convert("RGB"))
    deep = ink.astype(np.uint16) * 257
    for planes in ("contig", "separate"):
        for compression in (None, "zlib"):
            options = {"planarconfig": planes, "compression": compression}
            encoded = written(ink, (), photometric="separated", **options)
            np.testing.assert_array_equal(decode_image(encoded), expected)
            encoded = written(deep, (), photometric="separated", **options)
            if (planes, compression) == ("separate", None):
                with pytest.raises(ImageError, match="TIFF of 4 planes of uint16"):
                    decode_image(encoded)
            else:
                np.testing.assert_array_equal(decode_image(encoded), expected)
    half = written(
        (deep // 2).astype(np.float16), (), photometric="separated", planarconfig="contig"
    )
    with pytest.raises(ImageError, match="values of float16 have no known range"):
        decode_image(half)
    lab = written(deep[..., :3], (), photometric="cielab", planarconfig="contig")
    with pytest.raises(ImageError, match="TIFF of cielab"):
        decode_image(lab)


def test_what_needs_tifffile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((HEIGHT, WIDTH, 3), np.uint16)
    encoded = written(values, (), photometric="rgb", planarconfig="separate")
    monkeypatch.setitem(sys.modules, "tifffile", None)  # as if it were not installed
    with pytest.raises(ImageError) as refusal:
        decode_image(encoded)
    assert str(refusal.value) == "TIFF of 3 planes of uint16 (install simclr-ray[tiff])"
    assert read_deep_image(encoded) is None


def test_damaged_tags_are_a_broken_image() -> None:
    """Every byte of a header changed: a reason, or an image; nothing else, and no memory."""
    values = np.zeros((8, 8, 4), np.uint8)
    for planes in ("contig", "separate"):
        plain = written(values, (TRANSPARENCY,), photometric="rgb", planarconfig=planes)
        for at in range(4, len(plain) - values.size):
            for value in (0, 1, 3, 255):
                broken = plain[:at] + bytes([value]) + plain[at + 1 :]
                for channels in (3, 4):
                    with contextlib.suppress(ImageError):
                        ImageDecoder(10**6, channels=channels).decode(broken)
