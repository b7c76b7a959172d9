"""Every transformation against an independent form, on real images, and its draws' law."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage, stats
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from simclr_ray.augment import ops
from simclr_ray.augment.decode import decode_image
from simclr_ray.config.components import variants
from simclr_ray.config.sections.views import AnyStageConfig

LEVEL = 1 / 255
SIZE = 32


@pytest.fixture(scope="module")
def images(image_root: Path) -> Tensor:
    """Return 16 CIFAR-10 image_root, float32 [16, 3, 32, 32]."""
    path = sorted((image_root / "cifar10" / "train").glob("*.parquet"))[0]
    encoded = pq.read_table(path, columns=["image"])["image"][:16].to_pylist()
    pixels = np.stack([decode_image(e) for e in encoded])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def uniforms(op: ops.Op, num: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((num, op.num_draws(SIZE)))


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def none(op: ops.Op, images: Tensor) -> Tensor:
    return op(images, uniforms(op, len(images)))


def test_flip_is_pillows(images: Tensor) -> None:
    for ours, image in zip(none(ops.Flip(), images), images, strict=True):
        torch.testing.assert_close(ours, tensor(ImageOps.mirror(pillow(image))))


def test_rotations_are_pillows_each_a_third_of_the_time(images: Tensor) -> None:
    op = ops.Rotate()
    u = uniforms(op, len(images))
    for ours, image, draw in zip(op(images, u), images, u[:, 0], strict=True):
        degrees = (90, 180, 270)[int(3 * draw)]
        torch.testing.assert_close(ours, tensor(pillow(image).rotate(degrees)))


def test_cutout_is_a_square_that_may_leave_the_image(images: Tensor) -> None:
    op = ops.Cutout(side=0.5, fill=0.25)
    u = uniforms(op, len(images), seed=1)
    cut = 0
    for ours, image, (y, x) in zip(op(images, u), images, u, strict=True):
        expected = image.clone()
        top, left = int(y * SIZE) - 8, int(x * SIZE) - 8
        expected[:, max(0, top) : max(0, top + 16), max(0, left) : max(0, left + 16)] = 0.25
        assert torch.equal(ours, expected)
        cut += top < 0 or left < 0 or top > 16 or left > 16
    assert cut  # some holes were cut off by the border


def test_gray_and_solarise_are_torchvisions(images: Tensor) -> None:
    gray = tv.rgb_to_grayscale(images, 3)
    torch.testing.assert_close(none(ops.Grayscale(), images), gray, rtol=0, atol=1e-3)
    ours = none(ops.Solarize(0.4), images)
    torch.testing.assert_close(ours, tv.solarize(images, 0.4))


def test_equalise_is_pillows_but_for_rounding(images: Tensor) -> None:
    for ours, image in zip(none(ops.Equalize(), images), images, strict=True):
        theirs = tensor(ImageOps.equalize(pillow(image)))
        assert (ours - theirs).abs().max() <= 1.5 * LEVEL


def test_sobel_is_the_length_of_scipys_gradient(images: Tensor) -> None:
    for ours, image in zip(none(ops.Sobel(), images), images, strict=True):
        luma = np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), 1)
        both = [ndimage.sobel(luma, axis=axis, mode="mirror") / 4 for axis in (0, 1)]
        expected = np.clip(np.hypot(*both), 0, 1)
        for channel in ours.numpy():
            np.testing.assert_allclose(channel, expected, atol=1e-5)


def test_blur_is_torchvisions_but_for_the_border_and_its_fixed_point(images: Tensor) -> None:
    large = torch.nn.functional.interpolate(images, size=64)
    op = ops.Blur(kernel=0.11)  # 7 taps of 64
    u = np.random.default_rng(3).random((len(large), 1))
    inside = (slice(None), slice(4, -4), slice(4, -4))
    for ours, image, draw in zip(op(large, u), large, u[:, 0], strict=True):
        theirs = tv.gaussian_blur(image, [7, 7], [0.1 + 1.9 * draw])
        assert (ours[inside] - theirs[inside]).abs().max() < 0.5 * LEVEL


def test_noise_has_the_law_that_it_is_said_to_have() -> None:
    op = ops.Noise(0.05)
    gray = torch.full((64, 3, SIZE, SIZE), 0.5)
    noise = (op(gray, uniforms(op, 64)) - 0.5).double().numpy().ravel() / 0.05
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert abs(noise.std() - 1) < 0.01
    pixels = noise.reshape(64, -1)
    assert abs(np.corrcoef(pixels[:, 0], pixels[:, 1])[0, 1]) < 0.4  # of 64; none is built in


def test_jitter_is_clipped_after_each_operation_in_the_order_drawn(images: Tensor) -> None:
    op = ops.Jitter(strength=1.0)
    u = uniforms(op, len(images), seed=5)
    theirs: list[Callable[[Tensor, float], Tensor]] = [
        tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue,
    ]  # fmt: skip
    from simclr_ray.augment.views import ORDERS

    for ours, image, draw in zip(op(images, u), images, u, strict=True):
        factors = [*(0.2 + 1.6 * draw[:3]), -0.2 + 0.4 * draw[3]]
        expected = image
        for index in ORDERS[int(draw[4] * 24)]:
            expected = theirs[index](expected, float(factors[index])).clamp(0, 1)
        assert (ours - expected).abs().max() < 4e-3


def test_color_distortion_jitters_and_drops_color_as_often_as_it_says(images: Tensor) -> None:
    op = ops.ColorDistortion(strength=0.5)
    u = uniforms(op, 4000, seed=6)
    many = images[:1].expand(4000, -1, -1, -1)
    out = op(many, u)
    gray = (out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-6
    same = (out - many).abs().amax((1, 2, 3)) == 0
    for found, share in ((int(gray.sum()), 0.2), (int(same.sum()), 0.2 * 0.8)):
        assert stats.binomtest(found, 4000, share).pvalue > 0.001


@pytest.mark.parametrize("strength", [0.125, 0.5, 1.0])
def test_jitter_factors_are_uniform_over_their_ranges(strength: float) -> None:
    from simclr_ray.augment.views import jitter_params

    u = np.random.default_rng(7).random((5000, 5))
    draws = jitter_params(u[:, :4], u[:, 4], np.ones(5000, np.bool_), strength)
    reach = np.array([0.8, 0.8, 0.8, 0.2]) * strength
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    for column, half, centre in zip(draws.factors.double().numpy().T, reach, middle, strict=True):
        assert stats.kstest((column - centre + half) / (2 * half), "uniform").pvalue > 0.001
    counts = np.unique(draws.order.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert stats.chisquare(counts).pvalue > 0.001


def test_autoaugment_is_torchvisions_by_a_seed_of_each_image(images: Tensor) -> None:
    from torchvision import transforms

    op = ops.AutoAugment("cifar10")
    u = uniforms(op, len(images), seed=8)
    before = torch.get_rng_state()
    ours = op(images, u)
    assert torch.equal(torch.get_rng_state(), before)
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    for row in (0, 5, 11):
        torch.manual_seed(int(u[row, 0] * 2**32))
        expected = theirs((images[row] * 255).round().byte()).float() / 255
        torch.testing.assert_close(ours[row], expected)
    assert (ours - images).abs().amax((1, 2, 3)).gt(0).float().mean() > 0.5


STAGES = {n: c for n, c in variants(AnyStageConfig).items() if n not in ("crop", "import")}


@pytest.mark.parametrize("op", [c().load()() for c in STAGES.values()], ids=list(STAGES))
def test_every_op_keeps_the_range_and_an_image_does_not_depend_on_its_batch(
    op: ops.Op, images: Tensor
) -> None:
    u = uniforms(op, len(images), seed=9)
    kept = images.clone()
    out = op(images, u)
    assert torch.equal(images, kept)  # the input is left as it is
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    for rows in (slice(3, 4), slice(5, 9)):
        torch.testing.assert_close(op(images[rows], u[rows]), out[rows], rtol=0, atol=1e-6)
