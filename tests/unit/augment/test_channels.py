"""Images of other channels than RGB: read from each format, and made into views."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, WebPImagePlugin

from simclr_ray.augment import native
from simclr_ray.augment.decode import (
    ImageDecoder,
    ImageError,
    evaluation_view,
    image_size,
    read_deep_image,
)
from simclr_ray.augment.views import TwoViews


def values(channels: int, dtype: Any = np.uint16) -> NDArray[Any]:
    rng = np.random.default_rng(channels)
    return rng.integers(0, np.iinfo(dtype).max, (20, 30, channels), dtype, endpoint=True)


def npy(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, photometric="minisblack", **options)
    return out.getvalue()


def eight_bits(array: NDArray[Any], white: Any) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = np.minimum(np.round(array * 255.0 / np.array(white)), 255)
    return scaled


@pytest.mark.parametrize("channels", [2, 4, 13, 16])
def test_arrays_and_tiffs_of_the_same_values_are_the_same_pixels(channels: int) -> None:
    deep = values(channels)
    planes = deep.transpose(2, 0, 1)
    files = [
        npy(deep),
        npy(planes),
        npy(np.asfortranarray(deep)),
        npy(deep.astype(">u2")),
        tiff(np.ascontiguousarray(planes), planarconfig="separate"),
        tiff(deep, planarconfig="contig"),
        tiff(np.ascontiguousarray(planes)[:, None], metadata=None),
    ]
    white = tuple(float(1000 * (c + 1)) for c in range(channels))
    for file in files:
        assert image_size(file) == (20, 30)
        pixels = ImageDecoder(channels=channels).decode(file)
        assert np.array_equal(pixels, eight_bits(deep, 65535))
        pixels = ImageDecoder(channels=channels, white=white).decode(file)
        assert np.array_equal(pixels, eight_bits(deep, white))
    shallow = values(channels, np.uint8)
    assert np.array_equal(
        ImageDecoder(channels=channels, white=white).decode(npy(shallow)), shallow
    )


def test_gray_is_one_channel_and_color_becomes_luma() -> None:
    decoder = ImageDecoder(channels=1, white=4095)
    gray = values(1) % 4096
    out = io.BytesIO()
    Image.fromarray(gray[..., 0]).save(out, "PNG")
    for file in (out.getvalue(), npy(gray), npy(gray[..., 0]), tiff(gray[..., 0])):
        assert np.array_equal(decoder.decode(file), eight_bits(gray, 4095))
        rgb = ImageDecoder(white=4095).decode(file)
        assert np.array_equal(rgb, np.repeat(eight_bits(gray, 4095), 3, axis=2))
    image = Image.fromarray(values(3, np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    assert np.array_equal(decoder.decode(out.getvalue())[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize(
    ("file", "channels", "reason"),
    [
        (npy(values(4)), 3, "4 channels, data.channels=3"),
        (npy(values(4)), 5, "4 channels, data.channels=5"),
        (tiff(values(5), planarconfig="contig"), 4, "5 channels, data.channels=4"),
        (npy(values(4))[:-1], 4, "truncated"),
        (npy(values(4))[:40], 4, "broken header"),
        (npy(values(4).astype(np.float32)), 4, "values of float32 have no known range"),
        (npy(np.array([{}], object)), 4, "values of object have no known range"),
        (npy(values(1)[:1]), 1, "too small: 30x1"),
        (b"", 4, "empty"),
        (b"GIF", 4, "not an image"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_numbers(
    file: bytes, channels: int, reason: str
) -> None:
    with pytest.raises(ImageError) as caught:
        ImageDecoder(channels=channels).decode(file)
    assert str(caught.value) == reason


def test_the_size_in_a_header_is_checked_before_memory_is_taken() -> None:
    header = io.BytesIO()
    form = np.lib.format
    form.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 4)}
    )
    with pytest.raises(ImageError, match="too many pixels: 1000000x1000000"):
        ImageDecoder(channels=4).decode(header.getvalue())


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_views_are_those_of_torch_and_depend_on_the_key_alone(channels: int) -> None:
    rng = np.random.default_rng(0)
    sides = [(32, 32), (1, 40), (90, 61), (32, 32)]
    images = [rng.integers(0, 256, (*side, channels), dtype=np.uint8) for side in sides]
    ids = np.arange(4) * 7 - 5
    forms = [TwoViews(20, blur=0.6, seed=3, channels=channels, compiled=c) for c in (True, False)]
    compiled, torchs = (views(images, ids, 5) for views in forms)
    assert compiled.a.shape == (4, channels, 20, 20)
    if native.available():
        for first, second in zip(compiled, torchs, strict=True):
            assert torch.equal(first, second)
    alone = forms[0](images[2:3], ids[2:3], 5)
    assert torch.equal(alone.a, compiled.a[2:3])
    assert torch.equal(alone.b, compiled.b[2:3])
    rgb = TwoViews(20, seed=3).draw(ids, 5, 0)
    assert np.array_equal(forms[0].draw(ids, 5, 0).crop, rgb.crop)  # crops are those of RGB


def test_a_channel_does_not_depend_on_the_others() -> None:
    images = [np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)]
    other = [images[0].copy()]
    other[0][..., 2:] = 9
    views = TwoViews(24, seed=1, channels=4, jitter=1.0)
    first, second = (views(given, np.array([4]), 0).a for given in (images, other))
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.equal(first[:, 2:], second[:, 2:])


@pytest.mark.parametrize("size", [24, 48])
def test_an_evaluation_view_of_three_channels_is_that_of_each(size: int) -> None:
    pixels = values(3, np.uint8).repeat(3, axis=0)
    four = np.dstack([pixels, pixels[..., :1]])
    assert np.array_equal(evaluation_view(four, size)[..., :3], evaluation_view(pixels, size))


def header(shape: tuple[int, ...]) -> bytes:
    """An .npy file that claims a shape and holds a few values."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return out.getvalue() + b"x" * 40


@pytest.mark.parametrize(
    "shape", [(4, 5, -1), (4, -5, 3), (0, 5, 3), (2, 2, 2**62), (4, 5, 17), (2**40, 2**40, 3)]
)
def test_an_array_that_claims_what_it_cannot_hold_is_a_bad_image(shape: tuple[int, ...]) -> None:
    for channels in (1, 3, 4):
        with pytest.raises(ImageError):
            ImageDecoder(channels=channels).decode(header(shape))


def test_crops_of_other_channels_never_reach_the_code_for_three() -> None:
    if not native.available():
        return  # torch takes any
    one = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    draws = TwoViews(8).draw_both_views(np.array([3]), 0)
    with pytest.raises(ValueError, match=r"are not \[n, 3, S, S\]"):
        TwoViews(8).distort(one, draws)
    with pytest.raises(ValueError, match=r"not torch\.uint8"):
        TwoViews(8).distort(torch.zeros(2, 3, 8, 8), draws)


def test_headers_of_arrays_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # CPython before 3.11.9 raises SystemError now and then where two threads parse at once
    parse, inside = np.lib.format.read_array_header_1_0, threading.Lock()

    def alone(stream: io.BytesIO) -> object:
        assert inside.acquire(blocking=False)
        try:
            time.sleep(0.002)
            return parse(stream)
        finally:
            inside.release()

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", alone)
    encoded = npy(np.zeros((4, 4, 3), np.uint8))
    with ThreadPoolExecutor(8) as pool:
        shapes = {image.shape for image in pool.map(ImageDecoder().decode, [encoded] * 40)}
    assert shapes == {(4, 4, 3)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_of_four_channels_is_turned_upright(orientation: int, dtype: Any) -> None:
    stored = values(4, dtype)
    exif = Image.Exif()
    exif[274] = orientation
    out = io.BytesIO()
    if dtype is np.uint8:
        Image.fromarray(stored).save(out, "PNG", exif=exif)
        encoded = out.getvalue()
    else:
        block = exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = b"eXIf" + block
        chunk = struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        encoded = bytes(imagecodecs.png_encode(stored))
        encoded = encoded[:33] + chunk + encoded[33:]  # after the header
    plane = Image.fromarray(stored[..., 0].astype(np.int32))
    plane.getexif()[274] = orientation
    upright = np.asarray(ImageOps.exif_transpose(plane))
    pixels = ImageDecoder(channels=4).decode(encoded)
    assert np.array_equal(pixels[..., 0], eight_bits(upright, np.iinfo(dtype).max))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


CLEAR = Image.fromarray(values(4, np.uint8))
OPAQUE = Image.fromarray(np.dstack([values(3, np.uint8), np.full((20, 30), 255, np.uint8)]))
FEW = OPAQUE.convert("RGB").quantize(8)
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[274] = 6


@pytest.mark.parametrize(
    ("encoded", "refused"),
    [
        (saved(CLEAR, "PNG"), ""),
        (saved(CLEAR, "WEBP", lossless=True, exact=True), ""),
        (saved(CLEAR, "AVIF"), ""),
        (saved(OPAQUE, "PNG"), ""),
        (saved(OPAQUE, "WEBP", lossless=True), ""),  # which stores RGB
        (saved(OPAQUE, "WEBP", exif=ON_ITS_SIDE), ""),
        (saved(OPAQUE, "AVIF"), ""),
        (saved(FEW, "PNG", transparency=bytes([0, 128, *[255] * 6])), ""),
        (saved(FEW, "GIF", transparency=0), ""),
        (saved(OPAQUE.convert("RGB"), "PNG", transparency=(1, 2, 3)), ""),
        (saved(CLEAR.convert("LA"), "PNG"), ""),
        (saved(OPAQUE.convert("RGB"), "PNG"), "3 channels, data.channels=4"),
        (saved(FEW, "PNG"), "3 channels, data.channels=4"),
        (saved(OPAQUE.convert("L"), "PNG"), "1 channel, data.channels=4"),
        (saved(OPAQUE.convert("RGB"), "JPEG"), "3 channels, data.channels=4"),
        (saved(OPAQUE.convert("CMYK"), "JPEG"), "3 channels, data.channels=4"),
        (bytes(imagecodecs.png_encode(values(3))), "3 channels, data.channels=4"),
    ],
)  # fmt: skip
def test_transparency_is_a_fourth_channel_of_files_and_of_opened_images(
    encoded: bytes, refused: str
) -> None:
    decoder, image = ImageDecoder(channels=4), Image.open(io.BytesIO(encoded))
    if refused:
        with pytest.raises(ImageError, match=refused):
            decoder.decode(encoded)
        with pytest.raises(ImageError, match=refused):
            decoder.convert(image)
        return
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    assert np.array_equal(decoder.decode(encoded), expected)
    assert np.array_equal(decoder.convert(Image.open(io.BytesIO(encoded))), expected)
    if image.mode == "RGB" and "transparency" not in image.info:
        assert (expected[..., 3] == 255).all()


def test_gray_with_transparency_is_two_channels() -> None:
    gray = CLEAR.convert("LA")
    decoder = ImageDecoder(channels=2)
    assert np.array_equal(decoder.decode(saved(gray, "PNG")), np.asarray(gray))
    assert np.array_equal(decoder.convert(gray), np.asarray(gray))
    deep = values(2)
    assert np.array_equal(
        decoder.decode(bytes(imagecodecs.png_encode(deep))), eight_bits(deep, 65535)
    )


def test_a_webp_that_is_too_large_is_refused_before_its_canvas_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = saved(OPAQUE, "WEBP")
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "_open", None)
    for channels in (3, 4):
        with pytest.raises(ImageError, match="too many pixels: 30x20"):
            ImageDecoder(100, channels=channels).decode(encoded)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_three_gray_pages_are_three_channels_and_of_others_the_first_counts(dtype: Any) -> None:
    stored, top = values(3, dtype), np.iinfo(dtype).max
    planes = np.ascontiguousarray(stored.transpose(2, 0, 1))
    pages = tiff(planes[:, None], metadata=None)
    decoder = ImageDecoder()
    assert np.array_equal(decoder.decode(pages), eight_bits(stored, top))
    assert image_size(pages) == (20, 30)
    assert not decoder.leaves_pages_out(pages)
    deep = read_deep_image(pages)
    assert (deep is None) == (dtype is np.uint8)
    assert deep is None or np.array_equal(deep.values, stored)
    assert np.array_equal(ImageDecoder(channels=1).decode(pages), eight_bits(stored[..., :1], top))
    assert ImageDecoder(channels=1).leaves_pages_out(pages)
    smaller = io.BytesIO()  # copies at other sizes are no channels
    with tifffile.TiffWriter(smaller) as file:
        for step in (1, 2, 4):
            file.write(planes[0][::step, ::step], photometric="minisblack", metadata=None)
    for encoded in (tiff(planes[:2, None], metadata=None), smaller.getvalue()):
        first = np.repeat(eight_bits(stored[..., :1], top), 3, axis=2)
        assert np.array_equal(decoder.decode(encoded), first)
        assert decoder.leaves_pages_out(encoded)
    assert not decoder.leaves_pages_out(npy(stored))
