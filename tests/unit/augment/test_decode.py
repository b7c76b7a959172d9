"""Any image becomes upright RGB, or an `ImageError` that says in a few words why not."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr_ray.augment.decode import (
    DEFAULT_DECODER,
    ImageDecoder,
    ImageError,
    Pixels,
    decode_image,
    evaluation_view,
)
from simclr_ray.data.shapes import render

# What the README of the `odd` images says each file is; a string is the reason it is refused.
ODD: dict[str, tuple[int, int] | str] = {
    "ok.jpg": (178, 300),
    "truncated_half.jpg": "truncated",
    "truncated_header.jpg": "broken header",
    "truncated_last_bytes.jpg": "truncated",
    "corrupt_middle.jpg": (178, 300),
    "zero_bytes.jpg": "empty",
    "text.jpg": "not an image",
    "html.jpg": "not an image",
    "cmyk.jpg": (178, 300),
    "gray16.png": (178, 300),
    "rgb16.png": (178, 300),
    "rgba.png": (178, 300),
    "bilevel.png": (178, 300),
    "gray.jpg": (178, 300),
    "gray_real.jpg": (274, 300),
    "animated.gif": (90, 120),
    "1x1.png": "too small: 1x1",
    "1x1.jpg": "too small: 1x1",
    "20000x10.jpg": (10, 20000),
    "exif_orientation6.jpg": (300, 178),
    "progressive.jpg": (178, 300),
    "jpeg_named.png": (178, 300),
    "bmp.bmp": (64, 64),
    "tiff.tif": (64, 64),
    "bomb_30000x30000.png": "too many pixels: 30000x30000",
    "bomb_12000x12000.png": "too many pixels: 12000x12000",
}


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def image(height: int = 24, width: int = 40, seed: int = 0) -> Pixels:
    """A smooth image whose four corners differ, so that turns and mirrors show."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG header that claims a size, followed by almost nothing: what a bomb looks like."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


@pytest.mark.parametrize("name", sorted(ODD))
def test_every_odd_image_is_decoded_or_refused_for_its_reason(name: str, image_root: Path) -> None:
    encoded = (image_root / "odd" / name).read_bytes()
    expected = ODD[name]
    if isinstance(expected, str):
        with pytest.raises(ImageError) as refusal:
            decode_image(encoded)
        assert str(refusal.value) == expected
        return
    pixels = decode_image(encoded)
    assert pixels.shape == (*expected, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.std() > 5


@pytest.mark.parametrize("name", sorted(ODD))
def test_an_image_decoded_small_looks_like_the_whole_one(name: str, image_root: Path) -> None:
    encoded = (image_root / "odd" / name).read_bytes()
    expected = ODD[name]
    if isinstance(expected, str):
        with pytest.raises(ImageError) as refusal:
            DEFAULT_DECODER.decode_small(encoded, 24)
        assert str(refusal.value) == expected
        return
    small = DEFAULT_DECODER.decode_small(encoded, 24)
    is_jpeg = encoded[:2] == b"\xff\xd8" and min(expected) > 10
    factors = {-(-whole // side) for whole, side in zip(expected, small.shape, strict=False)}
    factor = (2 if min(expected) < 4 * 48 else 4) if is_jpeg else 1
    assert factors == {factor}
    whole = np.asarray(Image.fromarray(decode_image(encoded)).resize((24, 24)), float)
    shrunk = np.asarray(Image.fromarray(small).resize((24, 24)), float)
    assert np.abs(whole - shrunk).mean() < 5


def test_the_list_of_odd_images_is_complete(image_root: Path) -> None:
    names = {p.name for p in (image_root / "odd").iterdir()}
    assert {n for n in names if not n.endswith((".parquet", ".md"))} == set(ODD)


def test_odd_encodings_of_one_photograph_look_alike(image_root: Path) -> None:
    odd = image_root / "odd"
    truth = decode_image((odd / "ok.jpg").read_bytes()).astype(float)
    for name in ("cmyk.jpg", "rgb16.png", "progressive.jpg", "jpeg_named.png"):
        other = decode_image((odd / name).read_bytes()).astype(float)
        assert np.abs(other - truth).mean() < 3, name  # JPEG at quality 75 loses about 1 level
    turned = decode_image((odd / "exif_orientation6.jpg").read_bytes()).astype(float)
    assert np.abs(np.rot90(turned, 1) - truth).mean() < 3
    gray = decode_image((odd / "gray.jpg").read_bytes()).astype(float)
    gray16 = decode_image((odd / "gray16.png").read_bytes()).astype(float)
    assert np.abs(gray - gray16).mean() < 3


TURBO = ImageDecoder(library="turbo")
# what a JPEG is written with -> how it may differ
WRITTEN: dict[str, dict[str, Any]] = {
    "halved colors": {"quality": 75, "subsampling": 2},
    "whole colors": {"quality": 95, "subsampling": 0},
    "colors halved across": {"quality": 30, "subsampling": 1},
    "progressive": {"quality": 60, "progressive": True},
    "low quality": {"quality": 5},
}


@pytest.mark.parametrize("name", [*WRITTEN, "gray", "cmyk", *(f"turned {n}" for n in range(1, 9))])
def test_turbo_decodes_a_jpeg_within_two_levels_of_pillow(name: str) -> None:
    image = Image.fromarray(render(3, 5).pixels).resize((90, 61))
    options: dict[str, Any] = WRITTEN.get(name, {})
    if name in ("gray", "cmyk"):
        image = image.convert({"gray": "L", "cmyk": "CMYK"}[name])
    if name.startswith("turned"):
        exif = Image.Exif()
        exif[274] = int(name[-1])
        options = {"exif": exif}
    encoded = encode(image, "JPEG", **options)
    pillow, turbo = decode_image(encoded), TURBO.decode(encoded)
    assert turbo.shape == pillow.shape
    assert turbo.flags.c_contiguous
    assert np.abs(turbo.astype(int) - pillow).max() <= 2


def outcome(decoder: ImageDecoder, encoded: bytes) -> Pixels | str:
    """Return the pixels, or why there are none."""
    try:
        return decoder.decode(encoded)
    except ImageError as error:
        return str(error)


def test_turbo_finds_what_pillow_finds(image_root: Path) -> None:
    for path in sorted((image_root / "odd").iterdir()):
        pillow, turbo = (outcome(d, path.read_bytes()) for d in (DEFAULT_DECODER, TURBO))
        if isinstance(pillow, str) or isinstance(turbo, str):
            assert turbo == pillow, path.name
        else:
            assert np.abs(turbo.astype(int) - pillow).max() <= 2, path.name


def test_turbo_refuses_what_the_limits_refuse() -> None:
    encoded = encode(Image.new("RGB", (40, 24)), "JPEG")
    with pytest.raises(ImageError, match="too many pixels: 40x24"):
        TURBO._replace(max_pixels=959).decode(encoded)
    with pytest.raises(ImageError, match="too small: 40x24"):
        TURBO._replace(min_side=25).decode(encoded)
    for end in (3, 200, len(encoded) // 2):
        cut = encoded[:end]
        assert outcome(TURBO, cut) == outcome(DEFAULT_DECODER, cut)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_lossless_encodings_come_back_to_the_byte(kind: str, options: dict[str, object]) -> None:
    pixels = image()
    again = decode_image(encode(Image.fromarray(pixels), kind, **options))
    np.testing.assert_array_equal(again, pixels)
    assert again.flags.c_contiguous
    assert again.flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    pixels = image(64, 96)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    again = decode_image(encode(Image.fromarray(pixels), kind, exif=exif, **options))
    assert again.shape == upright.shape
    assert np.abs(again.astype(float) - upright).mean() < 2  # JPEG's loss


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, once per process
def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    encoded = encode(Image.fromarray(image()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01")
    assert decode_image(encoded).shape == (24, 40, 3)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[..., 0], rgba[:, :4, 3], rgba[:, 4:, 3] = 200, 255, 0
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        pixels = decode_image(encode(Image.fromarray(rgba), kind, **options))
        assert (pixels[:, :4] == [200, 0, 0]).all()
        assert (pixels[:, 4:] == 255).all()
    half = decode_image(encode(Image.new("LA", (4, 4), (0, 128)), "PNG"))
    assert np.abs(half.astype(int) - 127).max() <= 1


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, 3, 6))
    pixels = decode_image(encode(image, "PNG", transparency=0))
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 3:] == [40, 50, 60]).all()


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        pixels = decode_image(encode(Image.fromarray(values), kind))
        np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257).astype(np.uint8))
        assert (pixels == pixels[..., :1]).all()
    assert sys.byteorder == "little"  # what the arrays above were written in


def test_bilevel_gray_and_palette_become_rgb() -> None:
    checker = (np.indices((8, 8)).sum(0) % 2).astype(bool)
    one_bit = decode_image(encode(Image.fromarray(checker), "PNG"))
    np.testing.assert_array_equal(one_bit, np.repeat(checker[..., None] * 255, 3, axis=2))
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    decoded = decode_image(encode(Image.fromarray(gray), "PNG"))
    np.testing.assert_array_equal(decoded, np.repeat(gray[..., None], 3, axis=2))


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (12, 8), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
        if kind == "WEBP":
            options["lossless"] = True
        assert (decode_image(encode(frames[0], kind, **options)) == [255, 0, 0]).all(), kind


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "JPEG", "TIFF"])
def test_an_image_cut_anywhere_is_refused_and_nothing_else_escapes(kind: str) -> None:
    encoded = encode(Image.fromarray(image(64, 64)), kind)
    for end in range(0, len(encoded) * 9 // 10, max(len(encoded) // 60, 1)):
        with pytest.raises(ImageError, match=r"^.{5,60}$"):
            decode_image(encoded[:end])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "JPEG", "TIFF"])
def test_flipped_bytes_give_pixels_or_an_image_error(kind: str) -> None:
    rng = np.random.default_rng(5)
    encoded = encode(Image.fromarray(image(16, 16)), kind)
    for _ in range(60):
        broken = bytearray(encoded)
        for at in rng.integers(0, len(broken), 3):
            broken[at] = rng.integers(256)
        try:
            pixels = decode_image(bytes(broken), max_pixels=10**6)
        except ImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)


def test_size_is_judged_by_the_header_before_any_pixel_is_decoded() -> None:
    with pytest.raises(ImageError, match=r"^too many pixels: 100000x60000$"):
        decode_image(png_of_size(100_000, 60_000))
    webp = encode(Image.fromarray(image()), "WEBP", lossless=True)
    with pytest.raises(ImageError, match=r"^too many pixels: 40x24$"):
        decode_image(webp, max_pixels=959)
    assert decode_image(webp, max_pixels=960).shape == (24, 40, 3)
    lossy = encode(Image.fromarray(image()), "WEBP", quality=50)
    with pytest.raises(ImageError, match=r"^too many pixels: 40x24$"):
        decode_image(lossy, max_pixels=959)


def test_a_raised_limit_admits_large_images_without_a_warning() -> None:
    large = encode(Image.new("1", (9_500, 9_500)), "PNG")  # above Pillow's own warning limit
    assert decode_image(large, max_pixels=100_000_000).shape == (9_500, 9_500, 3)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (encode(Image.new("RGB", (1, 9)), "PNG"), "too small: 1x9"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "values of float32 have no known range"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(encoded: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as refusal:
        decode_image(encoded)
    assert str(refusal.value) == reason


def test_threads_decode_the_same_pixels() -> None:
    many = [encode(Image.fromarray(image(seed=s)), "WEBP", lossless=True) for s in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for a, b in zip(pool.map(decode_image, many), map(decode_image, many), strict=True):
            np.testing.assert_array_equal(a, b)


def test_small_evaluation_views_show_the_whole_image() -> None:
    same = image(32, 32)
    np.testing.assert_array_equal(evaluation_view(same, 32), same)
    pixels = image(48, 64)
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(evaluation_view(pixels, 32), np.asarray(expected))


def test_large_evaluation_views_show_the_centre_as_the_authors_crop_it() -> None:
    pixels = image(256, 320)
    view = evaluation_view(pixels, 224)  # 0.875 * 256 = 224: the crop needs no resizing
    np.testing.assert_array_equal(view, pixels[16:240, 48:272])
    assert evaluation_view(image(91, 77), 96).shape == (96, 96, 3)
    assert evaluation_view(image(2, 2), 64).shape == (64, 64, 3)
