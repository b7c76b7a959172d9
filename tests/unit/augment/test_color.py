"""Color operations are torchvision's, in the order drawn, clipped after each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from simclr_ray.augment import color
from simclr_ray.augment.color import JitterParams

TOLERANCE = 1e-3  # torchvision's own float path; luma weights differ in the fifth decimal place
Adjust = Callable[[Tensor, float], Tensor]
THEIRS: tuple[Adjust, ...] = (
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
)
FACTORS = [(0.2, 0.2, 0.2, -0.2), (1.0, 1.0, 1.0, 0.0), (1.8, 1.8, 1.8, 0.2), (0.0, 0.0, 0.0, 0.5)]


def sample_images() -> Tensor:
    """Return random, gray, black, white, plain and two-level images: float32 [8, 3, S, S]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 12, 12, generator=generator)
    x[1] = x[1, :1]  # gray
    x[2] = 0.0
    x[3] = 1.0
    x[4] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    x[5] = torch.tensor([0.2, 0.2, 0.7])[:, None, None]
    x[6] = x[6].round()
    x[7] = (x[7] * 255).round() / 255
    return x


def draws(factors: Tensor, order: list[list[int]], apply: list[bool]) -> JitterParams:
    return JitterParams(factors, torch.tensor(order), torch.tensor(apply))


@pytest.mark.parametrize("op", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("factors", FACTORS)
def test_each_operation_is_that_of_torchvision(op: int, factors: tuple[float, ...]) -> None:
    images = sample_images()
    factor = torch.full((len(images), 1, 1, 1), factors[op])
    ours = color.OPERATIONS[op](images, factor).clamp(0, 1)
    theirs = THEIRS[op](images, factors[op])
    assert (ours - theirs).abs().max() < TOLERANCE


def test_gray_is_that_of_torchvision() -> None:
    images = sample_images()
    theirs = tv.rgb_to_grayscale(images)
    assert (color.grayscale(images) - theirs).abs().max() < TOLERANCE


def test_every_order_of_operations_is_that_order_with_clipping_after_each() -> None:
    from simclr_ray.augment.views import ORDERS

    images = sample_images()[:1].expand(24, -1, -1, -1).contiguous()
    factors = torch.tensor([1.7, 1.6, 0.3, 0.15]).expand(24, -1).contiguous()
    ours = color.jitter(images, draws(factors, ORDERS.tolist(), [True] * 24))
    for row, order in enumerate(ORDERS.tolist()):
        expected = images[row]
        for op in order:
            expected = THEIRS[op](expected, float(factors[row, op]))  # clips by itself
        assert (ours[row] - expected).abs().max() < TOLERANCE
    assert len({tuple(o.flatten().tolist()) for o in ours}) > 20  # the order matters


def test_each_step_is_clipped_not_the_last_alone() -> None:
    white = torch.full((1, 3, 2, 2), 0.8)
    factors = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    bright_then_dark = color.jitter(white, draws(factors, [[0, 1, 2, 3]], [True]))
    assert torch.equal(bright_then_dark, torch.ones_like(white))
    half = torch.tensor([[2.0, 0.5, 1.0, 0.0]])
    mixed = torch.cat([white, torch.zeros(1, 3, 2, 2)], dim=3)
    out = color.jitter(mixed, draws(half, [[0, 1, 2, 3]], [True]))
    assert out[0, 0, 0].tolist() == pytest.approx([0.75, 0.75, 0.25, 0.25], abs=1e-6)


def test_images_that_are_not_chosen_are_left_alone_and_the_input_is_too() -> None:
    images = sample_images()
    before = images.clone()
    factors = torch.tensor([0.3, 1.5, 0.5, 0.1]).expand(8, -1).contiguous()
    apply = [True, False] * 4
    out = color.jitter(images, draws(factors, [[3, 1, 0, 2]] * 8, apply))
    assert torch.equal(images, before)
    assert torch.equal(out[1::2], images[1::2])
    assert not torch.equal(out[0], images[0])


def test_an_image_comes_out_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(1)
    images = sample_images()
    factors = torch.rand(8, 4, generator=generator) + torch.tensor([0.5, 0.5, 0.5, -0.5])
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(8)])
    apply = torch.tensor([True] * 7 + [False])
    together = color.jitter(images, JitterParams(factors, order, apply))
    for i in range(8):
        part = JitterParams(factors[i : i + 1], order[i : i + 1], apply[i : i + 1])
        assert torch.equal(color.jitter(images[i : i + 1], part)[0], together[i])
    backwards = JitterParams(factors.flip(0), order.flip(0), apply.flip(0))
    assert torch.equal(color.jitter(images.flip(0), backwards), together.flip(0))


def test_a_whole_turn_of_hue_is_none() -> None:
    images = sample_images()
    turned = color.hue(images, torch.ones(8, 1, 1, 1))
    assert (turned - images).abs().max() < 1e-5


def test_gray_images_have_no_hue_or_saturation_to_change() -> None:
    gray = sample_images()[1:4]
    factor = torch.full((3, 1, 1, 1), 0.3)
    assert (color.hue(gray, factor) - gray).abs().max() < 1e-6
    assert (color.saturation(gray, factor) - gray).abs().max() < 1e-6
