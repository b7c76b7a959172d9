"""Lists of transformations: order, probability, shared stages, and draws by key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from simclr_ray.augment import ops
from simclr_ray.augment.pipeline import MAX_STAGES, Crop, Pipelines, Stage
from simclr_ray.config.sections import views as sections

NUM, SIZE = 12, 24
IDS = np.arange(100, 100 + NUM)
CROP = Stage("crop", Crop())
COLOR = Stage("color", ops.ColorDistortion(0.5))
SOBEL = Stage("sobel", ops.Sobel())


def drawn(num: int = NUM) -> list[NDArray[np.uint8]]:
    """Return images of several sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + i % 5, 40 - i % 7, 3), np.uint8) for i in range(num)]


def test_a_view_is_a_pure_function_of_seed_epoch_and_id() -> None:
    views = Pipelines(SIZE, [], [CROP, COLOR], [CROP, COLOR], seed=1)
    whole = views(drawn(), IDS, 3)
    order = np.random.default_rng(1).permutation(NUM)
    shuffled = views([drawn()[i] for i in order], IDS[order], 3)
    assert torch.equal(shuffled.a, whole.a[order])
    assert torch.equal(shuffled.b, whole.b[order])
    alone = views(drawn()[4:5], IDS[4:5], 3)
    assert torch.equal(alone.a, whole.a[4:5])
    for other in (views(drawn(), IDS, 4), views(drawn(), IDS + 1000, 3)):
        assert not torch.equal(other.a, whole.a)
    again = Pipelines(SIZE, [], [CROP, COLOR], [CROP, COLOR], seed=2)(drawn(), IDS, 3)
    assert not torch.equal(again.a, whole.a)
    assert not torch.equal(whole.a, whole.b)


def test_one_branch_is_transformed_and_the_other_is_the_shared_crop() -> None:
    views = Pipelines(SIZE, [CROP], [SOBEL], [])
    a, b = views.trace(drawn(), IDS, 0)
    assert [step.name for step in a] == ["crop", "sobel"]
    assert [step.name for step in b] == ["crop"]
    assert torch.equal(a[0].images, b[0].images)
    pair = views(drawn(), IDS, 0)
    assert torch.equal(pair.b, b[0].images)
    expected = ops.Sobel()(pair.b.float() / 255, np.empty((NUM, 0)))
    assert torch.equal(pair.a, (expected * 255).round().byte())


def test_the_order_of_stages_is_the_order_in_which_they_act() -> None:
    dark, inverted = (
        Stage("cutout", ops.Cutout(2.0, fill=0.2)),
        Stage("solarize", ops.Solarize(0.1)),
    )
    first = Pipelines(SIZE, [CROP], [dark, inverted], [])(drawn(), IDS, 0).a
    second = Pipelines(SIZE, [CROP], [inverted, dark], [])(drawn(), IDS, 0).a
    assert (first == 204).all()
    assert (second == 51).all()


def test_a_crop_after_another_stage_crops_what_that_made() -> None:
    views = Pipelines(SIZE, [CROP], [Stage("sobel", ops.Sobel()), CROP], [])
    a, b = views.trace(drawn(), IDS, 0)
    assert a[2].images.shape == (NUM, 3, SIZE, SIZE)
    assert (a[2].images.amax(1) == a[2].images.amin(1)).all()  # still without color
    assert a[2].draws is None
    assert b[0].draws is not None


def test_a_stage_acts_as_often_as_its_probability_says() -> None:
    small = drawn(1) * 2000
    ids = np.arange(2000)
    views = Pipelines(16, [CROP], [Stage("solarize", ops.Solarize(0.0), 0.3)], [])
    pair = views(small, ids, 0)
    acted = int((pair.a != pair.b).flatten(1).any(1).sum())
    assert stats.binomtest(acted, 2000, 0.3).pvalue > 0.001


def test_the_whole_image_is_a_crop_of_area_1() -> None:
    whole = Stage("crop", Crop(min_area=1.0, flip=0.0))
    square = [np.random.default_rng(2).integers(0, 256, (SIZE, SIZE, 3), np.uint8)]
    pair = Pipelines(SIZE, [], [whole], [whole])(square, IDS[:1], 0)
    assert torch.equal(pair.a[0].permute(1, 2, 0), torch.from_numpy(square[0]))


def test_noise_of_large_views_is_drawn_by_more_than_one_key() -> None:
    views = Pipelines(224, [CROP], [Stage("noise", ops.Noise(0.05))], [])
    pair = views(drawn(1), IDS[:1], 0)
    noise = pair.a.double() - pair.b.double()
    assert 8 < noise.std() < 14  # 12.75 levels, less what was clipped
    flat = noise.flatten().numpy()
    half = len(flat) // 2
    assert abs(np.corrcoef(flat[:half], flat[half : 2 * half])[0, 1]) < 0.02


def test_views_of_another_size_and_lists_that_cannot_be() -> None:
    views = Pipelines(SIZE, [], [CROP], [CROP])
    assert views.with_size(16)(drawn(), IDS, 0).a.shape == (NUM, 3, 16, 16)
    for shared, a in (([], [COLOR]), ([], []), ([Stage("crop", Crop(), 0.5)], [])):
        with pytest.raises(ValueError, match="begin with a crop"):
            Pipelines(SIZE, shared, a, a)
    assert MAX_STAGES == sections.MAX_STAGES == 32
    with pytest.raises(ValueError, match="32 stages"):
        Pipelines(SIZE, [], [CROP, *[COLOR] * 32], [CROP])
