"""Copies of images are found, look-alikes and images of one color are not taken for them."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_ray.augment.decode import Pixels, decode_image
from simclr_ray.data import duplicates
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.duplicates import (
    NearCopies,
    flat,
    linked,
    near_copies,
    same_digests,
    thumbnail,
)
from simclr_ray.data.shapes import render
from simclr_ray.data.source import Source
from tests.reference.copies import KINDS, copy_of, detail_correlation, plant


def compare(images: list[Pixels], first_query: int = 0) -> NearCopies:
    thumbnails = np.stack([thumbnail(Image.fromarray(image)) for image in images])
    sides = np.array([min(image.shape[:2]) for image in images])
    return near_copies(thumbnails, sides, first_query=first_query)


def drawn(seed: int, height: int = 96, width: int = 128) -> Pixels:
    """Return colored noise that falls off with frequency, as that of photographs does."""
    rng = np.random.default_rng(seed)
    fall = 1 / np.maximum(
        np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))), 0.01
    )
    waves = np.fft.fft2(rng.normal(size=(3, height, width))) * fall**1.2
    waves[1:] = 0.4 * waves[1:] + 0.6 * waves[0]
    image = np.fft.ifft2(waves).real
    image = (image - image.mean()) / image.std() * 50 + 128
    return np.ascontiguousarray(image.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def recall_and_others(images: list[Pixels], count: int) -> tuple[float, set[tuple[int, int]]]:
    """Plant copies; return the share that is found, and the pairs that were not planted."""
    copies, about = plant(images, count, seed=1)
    pairs = {tuple(pair) for pair in compare([*images, *map(decode_image, copies)]).pairs.tolist()}
    planted = {(row, len(images) + at) for at, (row, _) in enumerate(about)}
    return len(pairs & planted) / count, pairs - planted


def test_planted_copies_of_drawn_images_are_found_and_nothing_else() -> None:
    recall, others = recall_and_others([drawn(seed) for seed in range(120)], 60)
    assert recall >= 0.95
    assert others == set()


def test_planted_copies_of_photographs_are_found_and_others_are_true_copies(
    image_root: Path,
) -> None:
    source = Source.open(str(image_root / "caltech101" / "train"))
    images = [decode_image(image or b"") for image in source.read_group(0).images]
    recall, others = recall_and_others(images, 100)
    assert recall >= 0.95
    assert len(others) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_measure_of_the_long_test_tells_copies_from_others(kind: str) -> None:
    images = [Image.fromarray(drawn(seed)) for seed in (1, 2)]
    copied = copy_of(drawn(1), kind, np.random.default_rng(0))
    copied_image = Image.fromarray(decode_image(copied))
    assert detail_correlation(images[0], copied_image) > 0.95
    assert detail_correlation(images[1], copied_image) < 0.5


def test_brighter_and_paler_copies_are_found_and_other_colors_and_negatives_are_not() -> None:
    image = drawn(3).astype(np.float64)
    paler = (image * 0.75 + 50).clip(0, 255).astype(np.uint8)
    recolored = image[..., [2, 0, 1]].astype(np.uint8)
    negative = 255 - drawn(3)
    pairs = compare([drawn(3), paler, recolored, negative]).pairs
    assert pairs.tolist() == [[0, 1]]


def test_drawn_shapes_that_differ_in_color_alone_are_no_copies() -> None:
    assert len(compare([render(index, seed=0).pixels for index in range(300)]).pairs) == 0


def test_a_crop_that_keeps_half_is_no_copy() -> None:
    image = drawn(4)
    assert len(compare([image, np.ascontiguousarray(image[:, :64])]).pairs) == 0


def test_order_of_the_images_does_not_matter() -> None:
    images = [drawn(seed) for seed in range(12)]
    copies, about = plant(images, 6, seed=2)
    every = [*images, *map(decode_image, copies)]
    order = np.random.default_rng(0).permutation(len(every))
    place = np.argsort(order)
    wanted = {
        frozenset((int(place[row]), int(place[12 + at]))) for at, (row, _) in enumerate(about)
    }
    shuffled = compare([every[row] for row in order]).pairs
    assert {frozenset(pair) for pair in shuffled.tolist()} == wanted
    assert (shuffled[:, 0] < shuffled[:, 1]).all()


def test_queries_are_compared_with_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(duplicates, "COLUMNS_AT_ONCE", 2)
    rng = np.random.default_rng(0)
    base = [drawn(seed) for seed in range(5)]
    copies = [decode_image(copy_of(base[row], "jpeg", rng)) for row in (3, 3, 0, 1)]
    assert compare([*base, *copies], first_query=5).pairs.tolist() == [
        [3, 5],
        [3, 6],
        [0, 7],
        [1, 8],
    ]
    within = {tuple(pair) for pair in compare([*base, *copies]).pairs.tolist()}
    assert within == {(3, 5), (3, 6), (0, 7), (1, 8), (5, 6)}


def test_images_of_one_color_are_named_and_sides_may_be_unlike() -> None:
    white = np.full((40, 60, 3), 255, np.uint8)
    noise = np.random.default_rng(0).integers(250, 256, (40, 60, 3)).astype(np.uint8)
    thumbnails = np.stack(
        [thumbnail(Image.fromarray(i)) for i in (white, noise, drawn(0), white[:2])]
    )
    assert flat(thumbnails).tolist() == [True, True, False, True]
    assert flat(thumbnails[:0]).tolist() == []


def jpegs(count: int) -> list[Pixels]:
    """Return near copies of one image."""
    image, out = Image.fromarray(drawn(7)), []
    for at in range(count):
        stream = io.BytesIO()
        image.resize((128 + at % 7, 96)).save(stream, "JPEG", quality=60 + at % 31)
        out.append(decode_image(stream.getvalue()))
    return out


def test_many_copies_of_one_image_are_one_group_and_few_pairs() -> None:
    images = [*jpegs(100), drawn(8)]
    copies = compare(images)
    assert len(copies.pairs) <= duplicates.MOST_LOOKALIKES * len(images)
    assert copies.num_crowded == 100 - duplicates.MOST_LOOKALIKES - 1
    (group,) = linked(len(images), copies.pairs)
    assert group.tolist() == list(range(100))


def test_blocks_of_any_size_give_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [*jpegs(14), *(drawn(seed) for seed in range(10))]
    whole = compare(images)
    for rows, columns in itertools.product((1, 7), (1, 16)):
        monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", rows)
        monkeypatch.setattr(duplicates, "COLUMNS_AT_ONCE", columns)
        parts = compare(images)
        assert sorted(parts.pairs.tolist()) == sorted(whole.pairs.tolist())
        assert parts.num_crowded == whole.num_crowded


def test_no_image_and_one_image_have_no_copies() -> None:
    for count in (0, 1):
        copies = near_copies(np.zeros((count, 32, 32, 3), np.uint8), np.full(count, 32))
        assert copies.pairs.shape == (0, 2)
        assert linked(count, copies.pairs) == []


def test_rows_are_grouped_by_digest_and_by_what_links_them() -> None:
    groups = same_digests([b"a", b"", b"b", b"a", b"", b"b", b"c", b"a"])
    assert [group.tolist() for group in groups] == [[0, 3, 7], [2, 5]]
    pairs: Int64s = np.array([[0, 4], [5, 6], [4, 2]])
    assert [group.tolist() for group in linked(8, pairs)] == [[0, 2, 4], [5, 6]]
