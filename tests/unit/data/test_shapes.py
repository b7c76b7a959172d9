"""The class of an image of `shapes` is its form, and nothing cheaper tells it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from simclr_ray.augment.decode import Pixels
from simclr_ray.data.shapes import CLASS_NAMES, render

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NUM_TRAIN, NUM_TEST = 3000, 2000
CHANCE = 1 / len(CLASS_NAMES)
# Three standard deviations of the accuracy of a coin with ten sides on the test images.
NOISE = 3 * math.sqrt(CHANCE * (1 - CHANCE) / NUM_TEST)


def draw(count: int, seed: int) -> tuple[Pixels, Int64s]:
    drawn = [render(i, seed) for i in range(count)]
    return np.stack([d.pixels for d in drawn]), np.array([d.label for d in drawn])


@pytest.fixture(scope="module")
def train() -> tuple[Pixels, Int64s]:
    return draw(NUM_TRAIN, seed=0)


@pytest.fixture(scope="module")
def test() -> tuple[Pixels, Int64s]:
    return draw(NUM_TEST, seed=1)


def histograms(images: Pixels) -> Floats:
    """The joint color histogram, 4 levels a channel, and each channel's own of 16 levels."""
    coarse = (images // 64).astype(int)
    joint = coarse @ np.array([16, 4, 1])
    fine = (images // 16).astype(int)
    rows = [
        np.concatenate(
            [np.bincount(j.ravel(), minlength=64)]
            + [np.bincount(f[..., c].ravel(), minlength=16) for c in range(3)]
        )
        for j, f in zip(joint, fine, strict=True)
    ]
    return np.stack(rows) / images[0, :, :, 0].size


def test_an_image_is_a_pure_function_of_seed_and_index() -> None:
    for index in (0, 7, 12_345_678_901):
        first, again = render(index, 3), render(index, 3)
        np.testing.assert_array_equal(first.pixels, again.pixels)
        assert first.label == again.label == index % 10
    assert not np.array_equal(render(5, 0).pixels, render(5, 1).pixels)
    assert not np.array_equal(render(5, 0).pixels, render(15, 0).pixels)


@pytest.mark.parametrize("size", [8, 32, 33, 96])
def test_images_are_uint8_rgb_of_the_size_asked_for(size: int) -> None:
    pixels = render(4, 0, size).pixels
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8


def test_a_larger_image_shows_the_same_scene(train: tuple[Pixels, Int64s]) -> None:
    large = np.stack([render(i, 0, 96).pixels for i in range(20)]).astype(float)
    averaged = large.reshape(20, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    assert np.abs(averaged - train[0][:20]).mean() < 2.0  # the edges are anti-aliased differently


def test_arguments_out_of_range_are_refused() -> None:
    for index, seed, size in ((-1, 0, 32), (0, -1, 32), (0, 0, 7)):
        with pytest.raises(ValueError, match="index >= 0, seed >= 0, size >= 8"):
            render(index, seed, size)


def test_there_are_ten_classes_and_any_prefix_is_balanced(train: tuple[Pixels, Int64s]) -> None:
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 10
    np.testing.assert_array_equal(np.bincount(train[1]), [NUM_TRAIN // 10] * 10)


def test_the_generator_is_frozen() -> None:
    """Mean colors written down when it was fixed; half a level allows for another libm."""
    frozen = [
        (133.62, 126.76, 153.83),
        (141.40, 113.69, 181.81),
        (147.26, 134.36, 97.07),
        (73.92, 130.22, 77.31),
        (61.90, 47.59, 21.59),
        (67.87, 49.86, 119.14),
        (209.52, 169.25, 234.98),
        (117.38, 91.99, 129.80),
        (98.98, 165.89, 133.00),
        (124.08, 145.11, 152.84),
    ]
    means = [render(i, 0).pixels.mean(axis=(0, 1)) for i in range(10)]
    np.testing.assert_allclose(means, frozen, atol=0.5)


def test_form_and_ground_differ_in_luminance_in_every_image(test: tuple[Pixels, Int64s]) -> None:
    gray = test[0] @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(gray.reshape(len(gray), -1), [3, 97], axis=1)
    assert (high - low).min() > 0.2 * 255


def test_color_histograms_leave_a_logistic_regression_at_chance(
    train: tuple[Pixels, Int64s], test: tuple[Pixels, Int64s]
) -> None:
    model = LogisticRegression(max_iter=300).fit(histograms(train[0]), train[1])
    assert abs(model.score(histograms(test[0]), test[1]) - CHANCE) < NOISE


def test_brightness_and_share_of_foreground_say_little(
    train: tuple[Pixels, Int64s], test: tuple[Pixels, Int64s]
) -> None:
    """The share is what a threshold between the two brightness levels finds."""

    def features(images: Pixels) -> Floats:
        gray = images.mean(axis=3).reshape(len(images), -1)
        middle = (gray.min(axis=1) + gray.max(axis=1)) / 2
        fraction = (gray > middle[:, None]).mean(axis=1)
        return np.stack(
            [np.minimum(fraction, 1 - fraction), gray.mean(axis=1), gray.std(axis=1)], axis=1
        )

    model = KNeighborsClassifier(100).fit(features(train[0]), train[1])
    assert model.score(features(test[0]), test[1]) < 2 * CHANCE


def test_nearest_neighbours_in_pixels_are_poor(
    train: tuple[Pixels, Int64s], test: tuple[Pixels, Int64s]
) -> None:
    def unit(images: Pixels) -> Floats:
        flat = images.reshape(len(images), -1).astype(np.float32)
        normed: Floats = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        return normed

    model = KNeighborsClassifier(200, weights="distance").fit(unit(train[0]), train[1])
    assert CHANCE < model.score(unit(test[0]), test[1]) < 0.45
