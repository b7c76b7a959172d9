"""Gray and color of 8, 12 and 16 bits, against decoders that share no code with Pillow's."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from simclr_ray.augment.decode import ImageError, Pixels, decode_image

HEIGHT, WIDTH = 21, 34


def gray(bits: int) -> Any:
    """All of a range, from black on the left to white on the right, with some noise."""
    ramp = np.linspace(0, 2**bits - 1, WIDTH)[None, :].repeat(HEIGHT, 0)
    noise = np.random.default_rng(bits).normal(0, 2 ** (bits - 5), (HEIGHT, WIDTH))
    noise[:, [0, -1]] = 0
    values = np.clip(ramp + noise, 0, 2**bits - 1).round()
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def color(bits: int) -> Any:
    return np.stack([gray(bits), gray(bits)[:, ::-1], gray(bits)[::-1]], 2)


def tiff(values: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


def packed_tiff(values: Any, order: str, photometric: int, orientation: int = 1) -> bytes:
    """12 bits a value without a gap between them, as scanners and microscopes write."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(HEIGHT, WIDTH, 2), axis=2)
    rows = np.packbits(bits[:, :, 4:].reshape(HEIGHT, -1), axis=1).tobytes()
    tags = [
        (256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, 12), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (274, 3, orientation), (277, 3, 1), (278, 3, HEIGHT), (279, 4, len(rows)),
    ]  # fmt: skip
    body = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}HH", v, 0) if kind == 3 else struct.pack(f"{order}I", v))
        for tag, kind, v in tags
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}I", 8 + len(rows))
    return head + rows + struct.pack(f"{order}H", len(tags)) + body + b"\0" * 4


def png(values: Any, *, transparent: int | None = None, about: bytes = b"") -> bytes:
    """A PNG of 16 bits, written here: Pillow is what is tested."""
    kind = 0 if values.ndim == 2 else {2: 4, 3: 2, 4: 6}[values.shape[2]]
    deep = values.dtype == np.uint16
    raw = values.astype(">u2" if deep else np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in raw)
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16 if deep else 8, kind, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), about]
    if transparent is not None:
        chunks.append(chunk(b"tRNS", struct.pack(">H", transparent)))
    chunks += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def pgm(values: Any, top: int) -> bytes:
    raw: bytes = values.astype(">u2").tobytes()
    return f"P5\n{WIDTH} {HEIGHT}\n{top}\n".encode() + raw


def seen(values: Any, bits: int) -> Pixels:
    """Return what people see: values over the largest, as uint8 [H, W, 3]."""
    scaled: Pixels = np.rint(values.astype(np.float64) * 255 / (2**bits - 1)).astype(np.uint8)
    return scaled if scaled.ndim == 3 else scaled[:, :, None].repeat(3, 2)


def over_white(values: Any, alpha: Any, bits: int) -> Pixels:
    part = alpha.astype(np.float64)[:, :, None] / (2**bits - 1)
    rgb = seen(values, bits).astype(np.float64)
    laid: Pixels = np.rint(rgb * part + 255 * (1 - part)).astype(np.uint8)
    return laid


def cases() -> dict[str, tuple[Callable[[], bytes], Callable[[], Pixels]]]:
    alpha = gray(16)[::-1]
    return {
        "tiff 8": (lambda: tiff(gray(8)), lambda: seen(gray(8), 8)),
        "tiff 8, white is zero": (
            lambda: tiff(gray(8), photometric="miniswhite"),
            lambda: seen(255 - gray(8), 8),
        ),
        "tiff 16": (lambda: tiff(gray(16)), lambda: seen(gray(16), 16)),
        "tiff 16, big-endian": (
            lambda: tiff(gray(16), byteorder=">"),
            lambda: seen(gray(16), 16),
        ),
        "tiff 16, white is zero": (
            lambda: tiff(gray(16), photometric="miniswhite"),
            lambda: seen(65535 - gray(16), 16),
        ),
        "tiff 16, white is zero, big-endian": (
            lambda: tiff(gray(16), photometric="miniswhite", byteorder=">"),
            lambda: seen(65535 - gray(16), 16),
        ),
        "tiff 16, deflated": (
            lambda: tiff(gray(16), compression="zlib"),
            lambda: seen(gray(16), 16),
        ),
        "tiff 16, tiles": (lambda: tiff(gray(16), tile=(16, 16)), lambda: seen(gray(16), 16)),
        "bigtiff 16": (lambda: tiff(gray(16), bigtiff=True), lambda: seen(gray(16), 16)),
        "tiff rgb 8": (lambda: tiff(color(8)), lambda: color(8)),
        "tiff rgb 16": (lambda: tiff(color(16)), lambda: seen(color(16), 16)),
        "tiff rgb 16, big-endian": (
            lambda: tiff(color(16), byteorder=">"),
            lambda: seen(color(16), 16),
        ),
        "tiff rgb 8, planes": (
            lambda: tiff(color(8).transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
            lambda: color(8),
        ),
        "tiff rgba 8": (
            lambda: tiff(
                np.dstack([color(8), gray(8)[::-1]]), photometric="rgb", extrasamples=["unassalpha"]
            ),
            lambda: over_white(color(8), gray(8)[::-1], 8),
        ),
        "tiff 12, packed": (lambda: packed_tiff(gray(12), "<", 1), lambda: seen(gray(12), 12)),
        "tiff 12, packed, big-endian": (
            lambda: packed_tiff(gray(12), ">", 1),
            lambda: seen(gray(12), 12),
        ),
        "tiff 12, packed, white is zero": (
            lambda: packed_tiff(gray(12), "<", 0),
            lambda: seen(4095 - gray(12), 12),
        ),
        "png 16": (lambda: png(gray(16)), lambda: seen(gray(16), 16)),
        "png 16, a value transparent": (
            lambda: png(gray(16), transparent=0),
            lambda: seen(np.where(gray(16) == 0, 65535, gray(16)), 16),
        ),
        "png rgb 16": (lambda: png(color(16)), lambda: seen(color(16), 16)),
        "png gray and alpha 16": (
            lambda: png(np.dstack([gray(16), alpha])),
            lambda: over_white(gray(16), alpha, 16),
        ),
        "png rgba 16": (
            lambda: png(np.dstack([color(16), alpha])),
            lambda: over_white(color(16), alpha, 16),
        ),
        "pgm 16": (lambda: pgm(gray(16), 65535), lambda: seen(gray(16), 16)),
        "pgm 12": (lambda: pgm(gray(12), 4095), lambda: seen(gray(12), 12)),
    }


@pytest.mark.parametrize("name", cases())
def test_deep_images_are_within_one_level_of_their_values(name: str) -> None:
    write, right = cases()[name]
    encoded = write()
    pixels, expected = decode_image(encoded), right()
    difference = np.abs(pixels.astype(int) - expected.astype(int))
    # Pillow cuts the low bytes of color and of transparency off, which is 1 each
    assert difference.max() <= 1
    if name.startswith(("tiff", "bigtiff")):  # what was written is what another decoder reads
        other = tifffile.imread(io.BytesIO(encoded))
        assert other.shape[:2] == (HEIGHT, WIDTH) or "planes" in name


def test_a_fraction_of_the_range_is_white_where_white_says_so() -> None:
    encoded = png(gray(12))  # 12 bits in a file of 16
    assert decode_image(encoded).max() == 16
    pixels = decode_image(encoded, white=4095)
    assert np.abs(pixels.astype(int) - seen(gray(12), 12)).max() <= 1
    assert decode_image(encoded, white=2000).max() == 255  # what is above is white
    eight = png(gray(8))
    np.testing.assert_array_equal(decode_image(eight, white=100), decode_image(eight))


ABOUT = {
    "a compressed text of 1.2 MB": chunk(b"zTXt", b"w\0\0" + zlib.compress(b"x" * 1_200_000)),
    "70 texts of 1 MB": chunk(b"zTXt", b"w\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "an international text": chunk(
        b"iTXt", b"w\0\1\0\0\0" + zlib.compress(b"x" * 1_200_000)
    ),
    "a profile that is none": chunk(b"iCCP", b"p\0\0" + zlib.compress(b"x" * 2_000_000)),
    "a text whose sum is wrong": chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",
    "a profile cut short": chunk(b"iCCP", b"p\0\0abc"),
    "gamma of no bytes": chunk(b"gAMA", b""),
    "sizes of three bytes": chunk(b"pHYs", b"abc"),
}  # fmt: skip


@pytest.mark.parametrize("about", ABOUT)
def test_what_a_png_says_about_its_pixels_never_costs_them(about: str) -> None:
    np.testing.assert_array_equal(decode_image(png(color(8), about=ABOUT[about])), color(8))


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize(
    "about",
    [
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\x00"),
        segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        segment(0xE2, b"ICC_PROFILE\0\5\1abc"),
        segment(0xFE, b""),
    ],
    ids=["photoshop", "exif", "mpf", "profile", "comment"],
)
def test_what_a_jpeg_says_about_its_pixels_never_costs_them(about: bytes) -> None:
    out = io.BytesIO()
    Image.fromarray(color(8)).save(out, "JPEG")
    plain = out.getvalue()
    spoken = plain[:2] + about + plain[2:]
    np.testing.assert_array_equal(decode_image(spoken), decode_image(plain))


@pytest.mark.parametrize("values", [gray(16).astype(np.float32), gray(16).astype(np.int32)])
def test_values_without_a_range_are_refused_and_said(values: Any) -> None:
    with pytest.raises(ImageError, match="known range"):
        decode_image(tiff(values))


def dicom(values: Any, photometric: str, bits: int, **tags: Any) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, generate_uid()
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PhotometricInterpretation = photometric
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype("<u2").tobytes()
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize("bits", [12, 16])
def test_a_dicom_is_stretched_over_its_values_and_turned_where_white_is_zero(bits: int) -> None:
    values = gray(bits)
    for photometric, expected in (
        ("MONOCHROME2", seen(values, bits)),
        ("MONOCHROME1", 255 - seen(values, bits)),
    ):
        pixels = decode_image(dicom(values, photometric, bits))
        assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


def test_a_dicom_is_shown_through_its_window() -> None:
    values = gray(12)
    pixels = decode_image(dicom(values, "MONOCHROME2", 12, WindowCenter=1000, WindowWidth=400))
    assert (pixels[values < 790] == 0).all()
    assert (pixels[values > 1210] == 255).all()
    inside = pixels[(values > 900) & (values < 1100)]
    assert inside.min() > 40
    assert inside.max() < 215


@pytest.mark.parametrize(
    ("first", "name", "package"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC (install simclr-ray[heic])", "pi_heif"),
        (b"\0" * 128 + b"DICM", "DICOM (install simclr-ray[dicom])", "pydicom"),
    ],
)
def test_what_needs_a_package_says_which(
    first: bytes, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImageError) as refusal:
        decode_image(first + b"\0" * 100)
    assert str(refusal.value) == name


def test_a_jpeg_that_is_mended_keeps_its_orientation() -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.fromarray(color(8)).save(out, "JPEG", exif=exif)
    plain = out.getvalue()
    broken = plain[:2] + segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\x00") + plain[2:]
    assert decode_image(plain).shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_array_equal(decode_image(broken), decode_image(plain))


def test_values_of_more_than_16_bits_are_refused() -> None:
    with pytest.raises(ImageError):
        decode_image(tiff(gray(12).astype(np.uint32)))


def test_a_dicom_in_color_is_scaled_by_its_bits_and_looked_up_in_its_palette() -> None:
    deep = dicom(gray(16), "RGB", 16, SamplesPerPixel=3, PlanarConfiguration=0, Columns=WIDTH)
    data = pydicom.dcmread(io.BytesIO(deep))
    data.PixelData = color(16).astype("<u2").tobytes()
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True)
    difference = decode_image(out.getvalue()).astype(int) - seen(color(16), 16).astype(int)
    assert np.abs(difference).max() <= 1
    tables: dict[str, Any] = {}
    for at, name in enumerate(("Red", "Green", "Blue")):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
        entries = np.array([65535 if k == at else 0 for k in range(4)], "<u2")
        tables[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    indices = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16) % 4
    pixels = decode_image(dicom(indices, "PALETTE COLOR", 16, **tables))
    expected = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)[indices]
    np.testing.assert_array_equal(pixels, expected)


FEW = range(40)
MANY = [pytest.param(seed, marks=pytest.mark.long) for seed in range(40, 240)]


@pytest.mark.parametrize("seed", [*FEW, *MANY])
def test_any_deep_image_is_within_one_level_of_what_another_decoder_reads(seed: int) -> None:
    """Random bits, byte order, photometric, compression, layout, transparency and white."""
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([8, 12, 16]))
    channels = int(rng.choice([1, 1, 3, 4]))
    top = int(rng.integers(2 ** (bits - 1), 2**bits))  # a fraction of the range
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    values = rng.integers(0, top + 1, shape).astype(np.uint8 if bits == 8 else np.uint16)
    stored_bits = 8 if bits == 8 else 16
    white = int(rng.choice([0, top])) if bits > 8 else 0
    if rng.random() < 0.5:
        encoded = png(values)
        read = imagecodecs.png_decode(encoded)
    else:
        options: dict[str, Any] = {
            "byteorder": str(rng.choice(["<", ">"])),
            "compression": [None, "zlib", "lzw", "packbits"][int(rng.integers(4))],
            "photometric": "rgb" if channels > 1 else str(rng.choice(["minisblack", "miniswhite"])),
            "bigtiff": bool(rng.random() < 0.3),
        }
        if rng.random() < 0.3:
            options["tile"] = (16, 16)
        if channels == 4:
            options["extrasamples"] = ["unassalpha"]
        encoded = tiff(values, **options)
        read = tifffile.imread(io.BytesIO(encoded))
        if options["photometric"] == "miniswhite":
            read = (2**stored_bits - 1) - read
    largest = white or 2**stored_bits - 1
    levels = np.clip(np.rint(read.astype(np.float64) * 255 / largest), 0, 255)
    if channels == 4:
        opaque = read[:, :, 3:].astype(np.float64) / (2**stored_bits - 1)
        levels = np.rint(levels[:, :, :3] * opaque + 255 * (1 - opaque))
    expected = levels if channels > 1 else levels[:, :, None].repeat(3, 2)
    pixels = decode_image(encoded, white=white)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


ORIENTATION = 274  # the tag; what each value asks for, as Pillow turns it
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["16-bit color with white", "16-bit color", "16-bit gray"])
def test_a_deep_tiff_is_turned_as_it_says(kind: str, orientation: int) -> None:
    values = gray(16) if kind == "16-bit gray" else color(16)
    tag = [(ORIENTATION, "H", 1, orientation, True)]
    encoded = tiff(values, extratags=tag)
    upright = Image.fromarray(seen(values, 16))
    turn = TURNED[orientation]
    expected = np.asarray(upright if turn is None else upright.transpose(turn)).astype(int)
    pixels = decode_image(encoded, white=65535 if "white" in kind else 0)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_a_packed_tiff_that_pillow_refuses_is_turned_too() -> None:
    packed = packed_tiff(gray(12), ">", 1)
    plain = decode_image(packed)
    turned = packed_tiff(gray(12), ">", 1, orientation=6)
    np.testing.assert_array_equal(decode_image(turned), np.rot90(plain, -1))
