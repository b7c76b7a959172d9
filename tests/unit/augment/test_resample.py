"""Resampling and blur: exact whatever the order of summation, and what they claim to compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_ray.augment.resample import (
    FINE,
    FULL,
    UNIT,
    bicubic_weights,
    blur,
    blur_weights,
    crop_weights,
    resize,
)

Floats = NDArray[np.float64]


def weights(start: int, length: int, size_in: int, size_out: int) -> Tensor:
    return bicubic_weights(np.array([start]), np.array([length]), size_in, size_out)


def sample_images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def reference_weights(length: int, size_out: int) -> Floats:
    """Antialiased bicubic over [0, length), one output pixel after another, in float64."""
    out = np.zeros((size_out, length))
    scale = length / size_out
    reach = max(scale, 1.0)
    for i in range(size_out):
        for j in range(length):
            x = abs(j + 0.5 - (i + 0.5) * scale) / reach
            if x < 1:
                out[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                out[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        out[i] /= out[i].sum()
    return out


def gaussian(sigma: float, taps: int) -> Floats:
    offset = np.arange(taps) - taps // 2
    kernel: Floats = np.exp(-0.5 * (offset / sigma) ** 2)
    normal: Floats = kernel / kernel.sum()
    return normal


@pytest.mark.parametrize(
    ("start", "length", "size_in", "size_out"),
    [(0, 32, 32, 32), (3, 17, 32, 32), (0, 500, 500, 96), (7, 1, 40, 32), (0, 3, 3, 224)],
)
def test_rows_of_weights_sum_to_the_unit_exactly_and_stay_inside_the_crop(
    start: int, length: int, size_in: int, size_out: int
) -> None:
    w = weights(start, length, size_in, size_out)[0]
    assert w.shape == (size_out, size_in)
    assert w.dtype == torch.float32
    assert (w == w.round()).all()
    assert (w.sum(1) == UNIT).all()
    assert (w[:, :start] == 0).all()
    assert (w[:, start + length :] == 0).all()


def test_a_crop_of_the_right_size_is_copied() -> None:
    assert torch.equal(weights(5, 20, 32, 20)[0, :, 5:25], UNIT * torch.eye(20))
    images = sample_images(2, 32, 32)
    same = weights(0, 32, 32, 32).expand(2, -1, -1)
    assert torch.equal(resize(images, same, same), images)


@pytest.mark.parametrize(("length", "size_out"), [(17, 32), (32, 17), (200, 96), (2, 32), (90, 30)])
def test_weights_are_antialiased_bicubic(length: int, size_out: int) -> None:
    ours = weights(0, length, length, size_out)[0].double().numpy() / UNIT
    error = np.abs(ours - reference_weights(length, size_out))
    taps = (ours != 0).sum(axis=1).max()
    # half a step of rounding each, and one weight a row makes up for the sum of the others
    assert np.sort(error, axis=1)[:, :-1].max() <= 0.5001 / UNIT
    assert error.max() <= 0.5 * taps / UNIT


def test_weights_of_several_images_are_those_of_each_alone() -> None:
    starts, lengths = np.array([0, 3, 10]), np.array([32, 9, 1])
    together = bicubic_weights(starts, lengths, 32, 24)
    for i in range(3):
        assert torch.equal(together[i], weights(int(starts[i]), int(lengths[i]), 32, 24)[0])


@pytest.mark.parametrize(("size_in", "size_out"), [(32, 32), (5, 24), (64, 20), (65, 32)])
def test_weights_from_the_table_are_those_made_for_the_crop(size_in: int, size_out: int) -> None:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, size_in, 50)
    lengths = rng.integers(1, size_in - starts + 1)
    starts[:3], lengths[:3] = [0, size_in - 1, 0], [size_in, 1, 1]
    found = crop_weights(starts, lengths, size_in, size_out, torch.device("cpu"))
    assert torch.equal(found, bicubic_weights(starts, lengths, size_in, size_out))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (41, 23, 32), (300, 200, 96), (2, 640, 96)]
)
def test_the_result_is_the_same_in_float32_and_float64(height: int, width: int, size: int) -> None:
    images = sample_images(3, height, width, seed=1)
    images[0] = (images[0] > 127).to(torch.uint8) * 255  # extremes overshoot the most
    rows = bicubic_weights(np.array([0, 0, 1]), np.array([height, 1, height - 1]), height, size)
    columns = bicubic_weights(np.array([0, 1, 0]), np.array([width, 2, width]), width, size)
    single = resize(images, rows, columns)
    double = resize(images, rows.double(), columns.double())
    assert torch.equal(single, double)
    steps = single.float() * FINE
    band = blur_weights(np.array([0.1, 1.0, 2.0]), 9, size)
    assert torch.equal(blur(steps, band).double(), blur(steps.double(), band.double()))


def test_the_result_is_the_same_in_any_batch_and_order() -> None:
    images = sample_images(5, 40, 28, seed=2)
    rows = bicubic_weights(np.array([0, 1, 2, 3, 4]), np.array([40, 30, 20, 10, 1]), 40, 32)
    columns = bicubic_weights(np.array([0, 1, 2, 3, 4]), np.array([28, 20, 9, 4, 24]), 28, 32)
    together = resize(images, rows, columns)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(resize(images[order], rows[order], columns[order]), together[order])
    for i in range(5):
        part = slice(i, i + 1)
        assert torch.equal(resize(images[part], rows[part], columns[part]), together[part])


def test_a_flat_image_stays_flat() -> None:
    images = torch.full((1, 3, 37, 53), 201, dtype=torch.uint8)
    out = resize(images, weights(2, 30, 37, 32), weights(5, 41, 53, 32))
    assert (out == 201).all()


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (32, 3)])
def test_blur_is_a_zero_padded_convolution_with_a_normalised_gaussian(size: int, taps: int) -> None:
    sigmas = np.array([0.1, 0.7, 2.0])
    images = sample_images(3, size, size, seed=3)[:, :1].float() * FULL / 255
    band = blur_weights(sigmas, taps, size)
    out = blur(images, band)
    for i, sigma in enumerate(sigmas.tolist()):
        kernel = band[i, size // 2, size // 2 - taps // 2 :][:taps].double().numpy() / UNIT
        lost = 0.5 * taps / UNIT  # by rounding; the largest weight makes up for all of it
        assert np.abs(kernel - gaussian(sigma, taps)).max() <= lost
        x = images[i, 0].double().numpy()
        across = np.stack([np.convolve(row, kernel, mode="same") for row in x])
        expected = np.stack([np.convolve(c, kernel, mode="same") for c in across.T]).T
        error = np.abs(out[i, 0].double().numpy() - expected) * 255 / FULL
        assert error.max() <= 1 / 8 + 1e-9  # each pass is rounded by half of 1/8 gray level


def test_blur_weights_sum_to_the_unit_away_from_the_edges_and_less_at_them() -> None:
    band = blur_weights(np.array([1.5]), 9, 32)[0]
    assert (band.sum(1)[4:-4] == UNIT).all()
    assert (band.sum(1)[:4] < UNIT).all()
    assert torch.equal(band, band.flip(0, 1))  # symmetric


def test_one_tap_is_no_blur() -> None:
    images = sample_images(1, 8, 8).float()
    assert torch.equal(blur(images, blur_weights(np.array([1.0]), 1, 8)), images)
