"""A view is a pure function of (seed, epoch, id, view), and shows what the paper's does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from simclr_ray.augment.decode import ImageError, decode_image
from simclr_ray.augment.views import ORDERS, SIGMAS, AugmentParams, TwoViews

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
CHI_SQUARED_999 = {1: 10.83, 9: 27.88, 23: 49.73}  # 99.9 % points, degrees of freedom -> value
NUM_DRAWS = 20_000


def photographs(*sizes: tuple[int, int], seed: int = 0) -> list[Pixels]:
    """Return smooth random images of (height, width), with some texture, as photographs have."""
    rng = np.random.default_rng(seed)
    out = []
    for height, width in sizes:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int64)
        out.append(np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8))
    return out


def png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def only_crop(size: int, seed: int = 0) -> TwoViews:
    return TwoViews(size, strength=0, blur=0, flip=0, jitter=0, grayscale=0, seed=seed)


def draws_of(views: TwoViews) -> AugmentParams:
    return views.draw(np.arange(NUM_DRAWS), 0, 0)


def kolmogorov_smirnov(sample: Floats, low: float, high: float) -> float:
    """Return √n·D of a sample against the uniform distribution on [low, high]."""
    x = np.sort((sample - low) / (high - low))
    n = len(x)
    above, below = np.arange(1, n + 1) / n - x, x - np.arange(n) / n
    return float(np.sqrt(n) * max(above.max(), below.max()))


def chi_squared(counts: Sequence[int] | NDArray[np.int64], expected: Sequence[float]) -> float:
    return float(sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)))


KS_999 = 1.95  # the 99.9 % point of √n·D


@pytest.mark.parametrize("sizes", [[(32, 32)] * 9, [(150, 200), (90, 300), (64, 64), (31, 47)] * 2])
def test_an_image_gives_the_same_views_alone_in_a_batch_and_in_any_order(
    sizes: list[tuple[int, int]],
) -> None:
    images = photographs(*sizes)
    ids = np.array([7, -3, 2**40, 1, 0, 12, 99, 5, 6])[: len(images)]
    views = TwoViews.simclr(32, seed=4)
    together = views(images, ids, 2)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = views([images[i] for i in order], ids[order], 2)
    for place, i in enumerate(order.tolist()):
        alone = views([images[i]], ids[i : i + 1], 2)
        for view in range(2):
            assert torch.equal(alone[view][0], together[view][i])
            assert torch.equal(shuffled[view][place], together[view][i])


def test_views_are_the_same_with_any_number_of_threads() -> None:
    images, ids = photographs(*[(40, 56)] * 6), np.arange(6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = TwoViews.simclr(32)(images, ids, 0)
        torch.set_num_threads(2)
        two = TwoViews.simclr(32)(images, ids, 0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)


def test_epoch_view_seed_and_id_each_change_the_pixels() -> None:
    images, ids = photographs(*[(32, 32)]) * 4, np.arange(4)
    base = TwoViews.simclr(32, seed=1)(images, ids, 0)
    others = [
        base.b,
        TwoViews.simclr(32, seed=1)(images, ids, 1).a,
        TwoViews.simclr(32, seed=2)(images, ids, 0).a,
        TwoViews.simclr(32, seed=1)(images, ids + 4, 0).a,
    ]
    for other in others:
        assert all(not torch.equal(base.a[i], other[i]) for i in range(4))
    again = TwoViews.simclr(32, seed=1)(images, ids, 0)
    assert torch.equal(base.a, again.a)
    assert torch.equal(base.b, again.b)


def test_encoded_decoded_and_stacked_images_give_the_same_views() -> None:
    images, ids = photographs(*[(40, 40)] * 3), np.arange(3)
    views = TwoViews.simclr(32)
    decoded = views(images, ids, 0)
    encoded = views([png(pixels) for pixels in images], ids, 0)
    stacked = views(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), ids, 0)
    for other in (encoded, stacked):
        assert torch.equal(decoded.a, other.a)
        assert torch.equal(decoded.b, other.b)
    with pytest.raises(ImageError):
        views([b"no image"], np.array([0]), 0)


def test_views_are_bytes_of_the_size_asked_for() -> None:
    for size in (8, 33, 96):
        pair = TwoViews.simclr(size)(photographs((50, 70), (20, 20)), np.array([1, 2]), 0)
        for view in pair:
            assert view.dtype == torch.uint8
            assert view.shape == (2, 3, size, size)


@pytest.mark.parametrize("size", [32, 96])
def test_a_crop_is_the_one_that_pillow_resizes(size: int) -> None:
    images = photographs((120, 160), (200, 75), (60, 60), (32, 32), (97, 301))
    images = [(32 + pixels * 0.75).astype(np.uint8) for pixels in images]  # nothing to clip
    ids, views = np.arange(len(images)), only_crop(size)
    pair = views(images, ids, 0)
    for view in range(2):
        for i, pixels in enumerate(images):
            box = views.boxes(views.draw(ids[i : i + 1], 0, view), *pixels.shape[:2])
            top, left, height, width = (int(side[0]) for side in box)
            crop = Image.fromarray(pixels[top : top + height, left : left + width])
            theirs = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.int64)
            ours = pair[view][i].permute(1, 2, 0).numpy().astype(np.int64)
            assert np.abs(ours - theirs).max() <= 2  # Pillow rounds between its passes, and clips


def bicubic(crop: Pixels, size: int) -> Floats:
    """Return a crop resized in float64: antialiased bicubic (a = -1/2), clamped at the end."""
    out = crop.astype(np.float64)
    for axis in (0, 1):
        length = out.shape[axis]
        scale = length / size
        reach = max(scale, 1.0)
        x = np.abs(np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / reach
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        w = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        w /= w.sum(axis=1, keepdims=True)
        out = np.moveaxis(np.tensordot(w, out, axes=(1, axis)), 0, axis)
    return np.clip(out, 0, 255)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_crop_is_bicubic_to_one_gray_level_and_a_flip_is_its_mirror(flip: float) -> None:
    images, ids = photographs((120, 160), (45, 33), (60, 60), seed=5), np.arange(3)
    views = TwoViews(32, strength=0, blur=0, flip=flip, jitter=0, grayscale=0, seed=3)
    pair = views(images, ids, 1)
    for view in range(2):
        for i, pixels in enumerate(images):
            box = views.boxes(views.draw(ids[i : i + 1], 1, view), *pixels.shape[:2])
            top, left, height, width = (int(side[0]) for side in box)
            expected = bicubic(pixels[top : top + height, left : left + width], 32)
            expected = expected[:, ::-1] if flip else expected
            ours = pair[view][i].permute(1, 2, 0).numpy().astype(np.float64)
            assert np.abs(ours - expected).max() <= 1.0


@pytest.mark.parametrize("min_area", [0.08, 0.2])
def test_crops_take_the_papers_share_of_area_and_aspect(min_area: float) -> None:
    crop = draws_of(TwoViews(32, min_area=min_area)).crop
    area, aspect = crop[:, 0] * crop[:, 1], crop[:, 1] / crop[:, 0]
    assert crop[:, :2].max() <= 1.0
    assert area.min() >= min_area
    assert np.abs(np.log(aspect)).max() <= np.log(4 / 3) + 1e-12
    # below the area of 3/4 every aspect fits, so no draw is rejected and both are as drawn
    small = area < 0.74
    assert kolmogorov_smirnov(area[small], min_area, 0.74) < KS_999
    assert kolmogorov_smirnov(np.log(aspect[small]), -np.log(4 / 3), np.log(4 / 3)) < KS_999


def test_the_place_of_a_crop_and_the_width_of_the_blur_are_uniform() -> None:
    draws = draws_of(TwoViews.simclr(32))
    for place in draws.crop[:, 2:].T:
        assert kolmogorov_smirnov(place, 0, 1) < KS_999
    assert kolmogorov_smirnov(draws.sigma, *SIGMAS) < KS_999


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_color_factors_are_uniform_in_the_papers_ranges(strength: float) -> None:
    factors = draws_of(TwoViews.simclr(32, strength)).jitter.factors.double().numpy()
    for op in range(3):
        assert kolmogorov_smirnov(factors[:, op], 1 - 0.8 * strength, 1 + 0.8 * strength) < KS_999
    assert kolmogorov_smirnov(factors[:, 3], -0.2 * strength, 0.2 * strength) < KS_999


def test_extreme_strength_keeps_factors_valid() -> None:
    factors = draws_of(TwoViews.simclr(32, 2.0)).jitter.factors
    assert factors[:, :3].min() >= 0
    assert factors[:, 3].abs().max() <= 0.4
    assert not draws_of(TwoViews.simclr(32, 0.0)).jitter.apply.any()


def test_each_operation_happens_as_often_as_in_the_paper() -> None:
    draws = draws_of(TwoViews.simclr(32, blur=0.5))
    for happened, share in (
        (draws.flip, 0.5),
        (draws.jitter.apply.numpy(), 0.8),
        (draws.gray, 0.2),
        (draws.blur, 0.5),
    ):
        count = int(happened.sum())
        expected = [NUM_DRAWS * share, NUM_DRAWS * (1 - share)]
        assert chi_squared([count, NUM_DRAWS - count], expected) < CHI_SQUARED_999[1]


def test_all_24_orders_of_color_operations_are_equally_likely() -> None:
    order = draws_of(TwoViews.simclr(32)).jitter.order.numpy()
    index = [ORDERS.tolist().index(row) for row in order.tolist()]
    counts = np.bincount(index, minlength=24)
    assert chi_squared(counts, [NUM_DRAWS / 24] * 24) < CHI_SQUARED_999[23]


def test_draws_of_one_view_tell_nothing_about_each_other_or_the_other_view() -> None:
    views = TwoViews.simclr(32)
    columns = []
    for view in range(2):
        d = views.draw(np.arange(NUM_DRAWS), 0, view)
        columns += [d.crop[:, 0] * d.crop[:, 1], d.crop[:, 2], d.crop[:, 3], d.flip, d.gray]
        columns += [d.blur, d.sigma, d.jitter.apply.numpy(), *d.jitter.factors.numpy().T]
    correlation = np.corrcoef(np.array(columns, dtype=np.float64))
    assert np.abs(correlation - np.eye(len(columns))).max() < 5 / np.sqrt(NUM_DRAWS)


def test_probabilities_of_zero_and_one_are_never_and_always() -> None:
    never = draws_of(TwoViews(32, blur=0, flip=0, jitter=0, grayscale=0))
    always = draws_of(TwoViews(32, blur=1, flip=1, jitter=1, grayscale=1))
    for draws, value in ((never, False), (always, True)):
        for happened in (draws.blur, draws.flip, draws.gray, draws.jitter.apply.numpy()):
            assert (happened == value).all()


def test_gray_views_have_three_equal_channels() -> None:
    views = TwoViews(32, grayscale=1, seed=2)
    pair = views(photographs(*[(32, 32)] * 4), np.arange(4), 0)
    for view in pair:
        assert (view == view[:, :1]).all()


def test_boxes_lie_inside_images_of_any_shape() -> None:
    views = TwoViews.simclr(32)
    draws = draws_of(views)
    for height, width in ((2, 2), (2, 900), (700, 3), (32, 32), (375, 500)):
        box = views.boxes(draws, height, width)
        assert min(box.height.min(), box.width.min()) >= 1
        assert min(box.top.min(), box.left.min()) >= 0
        assert (box.top + box.height).max() <= height
        assert (box.left + box.width).max() <= width
        assert (box.top + box.height).max() == height  # every edge is reached
        assert box.left.min() == 0


@pytest.mark.parametrize("shape", [(2, 2), (2, 300), (300, 2), (1, 40), (3, 10_000)])
def test_thin_images_make_views(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    pair = TwoViews.simclr(32)([pixels] * 8, np.arange(8), 0)
    assert pair.a.float().std() > 0


def test_a_plain_image_stays_plain_without_color_and_blur() -> None:
    plain = np.broadcast_to(np.array([10, 200, 90], np.uint8), (50, 40, 3)).copy()
    pair = only_crop(32)([plain], np.array([3]), 0)
    expected = torch.tensor([10, 200, 90], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    assert torch.equal(pair.a[0], expected)


def test_photographs_of_different_sizes_go_through_one_call(image_root: Path) -> None:
    names = ["ok.jpg", "gray_real.jpg", "cmyk.jpg", "exif_orientation6.jpg", "bmp.bmp", "rgba.png"]
    encoded = [(image_root / "odd" / name).read_bytes() for name in names]
    pair = TwoViews.simclr(96)(encoded, np.arange(6), 0)
    for i, data in enumerate(encoded):
        alone = TwoViews.simclr(96)([decode_image(data)], np.array([i]), 0)
        assert torch.equal(alone.a[0], pair.a[i])
        assert torch.equal(alone.b[0], pair.b[i])
