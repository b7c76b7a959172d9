"""How well two thumbnails show the same image, after one was laid on the other.

A copy that was cropped shows a part of the original: laid on it without scaling, edges miss by up
to three of 32 pixels, and no comparison in place tells a copy from a look-alike. So scale and shift
of both axes are fitted first (Lucas and Kanade 1981, with gain and offset of the gray values as in
Baker and Matthews 2004), coarse to fine, and the worst block decides: two motorbikes before the
same backdrop agree in most blocks, two copies in all. NumPy alone, for many pairs at once.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from simclr_ray.data.arrays import Float32s

SIDE: Final = 32  # of a thumbnail, in pixels
GRAY_BLOCKS, COLOR_BLOCKS = 8, 4  # along a side; JPEG stores color at half the resolution
# Of a side of 2: a crop that keeps 90 % of the area cuts 0.2 at most, and scales by 0.9 to 1.11.
MAX_SCALE_CHANGE, MAX_SHIFT = 0.13, 0.13
GRAY: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L
# Blurs in pixels of the level, with steps each; measured on Caltech-101: half as many lose 1 %.
COARSE: Final = ((1.5, 6), (0.75, 5))  # at half the side
FINE: Final = ((0.7, 4),)
LEAST_COARSE: Final = 0.9  # correlation of the halved thumbnails, below which none is a copy
# In pixels: how finely copies were sampled differs, and does not count. Images of few pixels have
# more of JPEG's noise in a thumbnail.
BLUR, BLUR_OF_FEW, FEW_PIXELS = 0.7, 1.0, 64
# Of 1,349 copies planted among Caltech-101 98.6 % lie below, of those among CIFAR-10 97 %; the next
# pairs that are none (motorbikes of one studio) lie just above.
MOST_MISFIT: Final = 0.1
MOST_COLOR: Final = 12.0  # of 255, in the mean of a block: blue and red motorbikes
MOST_STOPS: Final = 0.75  # by which contrast differs, a stop being a factor of two


class _Warp(NamedTuple):
    """How the first image of each pair is sampled to lie on the second."""

    rows: Float32s  # [p, side, side], weights of source rows
    columns: Float32s  # [p, side, side], weights of source columns, transposed
    inside: Float32s  # [p, side, side], 1 where the first image has pixels


def are_copies(
    first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], sides: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.bool], Float32s]:
    """Return which pairs of thumbnails show one image, bool [p], and how far they are from it.

    That misfit, float32 [p], is the largest mean squared difference among 64 blocks over the
    variance of gray, after scale, shift, gain and offset were fitted: 0 for the same pixels,
    infinite where even halved thumbnails do not agree.

    Args:
        first: uint8 [p, 32, 32, 3], RGB.
        second: The other of each pair, the same shape.
        sides: int [p], the shortest side of both images in pixels, before they were thumbnails.
    """
    misfits = np.full(len(first), np.inf, np.float32)
    affine = np.zeros((len(first), 4), np.float32)
    gray = [_normalized(images.astype(np.float32) @ GRAY) for images in (first, second)]
    small = [_halved(images) for images in gray]
    for blur, steps in COARSE:
        affine = _fit(_blurred(small[0], blur), _blurred(small[1], blur), affine, steps)
    alike = np.flatnonzero(_correlation(small[0], small[1], affine) >= LEAST_COARSE)
    gray, affine = [images[alike] for images in gray], affine[alike]
    for blur, steps in FINE:
        affine = _fit(_blurred(gray[0], blur), _blurred(gray[1], blur), affine, steps)
    for blur, chosen in (
        (BLUR, sides[alike] >= FEW_PIXELS),
        (BLUR_OF_FEW, sides[alike] < FEW_PIXELS),
    ):
        rows = alike[chosen]
        if len(rows):
            misfits[rows] = _worst_block(first[rows], second[rows], affine[chosen], blur)
    return misfits <= MOST_MISFIT, misfits


def _normalized(gray: Float32s) -> Float32s:
    """Return images [p, s, s] of mean 0 and variance 1."""
    centered = gray - gray.mean((1, 2), keepdims=True)
    normalized: Float32s = centered / np.maximum(centered.std((1, 2), keepdims=True), 1e-3)
    return normalized


def _halved(gray: Float32s) -> Float32s:
    half = gray.shape[1] // 2
    small: Float32s = gray.reshape(len(gray), half, 2, half, 2).mean((2, 4))
    return small


def _blurred(images: Float32s, sigma: float) -> Float32s:
    """Return images [p, s, s] under a Gaussian whose weights at the border sum to 1 as well."""
    at = np.arange(images.shape[1], dtype=np.float32)
    kernel = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum(1, keepdims=True)
    blurred: Float32s = kernel @ images @ kernel.T
    return blurred


def _centers(side: int) -> Float32s:
    """Return where pixels lie, along a side that reaches from -1 to 1."""
    return (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1


def _sampling(
    scale_change: Float32s, shift: Float32s, side: int
) -> tuple[Float32s, npt.NDArray[np.bool]]:
    """Return weights [p, side, side] of source pixels, linear, and which are inside [p, side]."""
    at = _centers(side)
    source = ((1 + scale_change[:, None]) * at + shift[:, None] + 1) * (side / 2) - 0.5
    inside = (source >= -0.5) & (source <= side - 0.5)
    distance = np.abs(source.clip(0, side - 1)[:, :, None] - np.arange(side, dtype=np.float32))
    weights: Float32s = np.maximum(0, 1 - distance, dtype=np.float32)
    return weights, inside


def _warp(affine: Float32s, side: int) -> _Warp:
    columns, inside_x = _sampling(affine[:, 0], affine[:, 1], side)
    rows, inside_y = _sampling(affine[:, 2], affine[:, 3], side)
    inside = (inside_y[:, :, None] & inside_x[:, None, :]).astype(np.float32)
    return _Warp(rows, columns.transpose(0, 2, 1), inside)


def _moved(images: Float32s, warp: _Warp) -> Float32s:
    """Return images [p, s, s] laid on their partners, less their mean, 0 where there is none."""
    return _centered(_sampled(images, warp), warp.inside)


def _sampled(images: Float32s, warp: _Warp) -> Float32s:
    sampled: Float32s = np.matmul(warp.rows @ images, warp.columns, dtype=np.float32)
    return sampled


def _centered(images: Float32s, inside: Float32s) -> Float32s:
    """Return images less their mean over what is inside, and 0 outside."""
    count = inside.sum((1, 2), keepdims=True)
    centered: Float32s = (images - (images * inside).sum((1, 2), keepdims=True) / count) * inside
    return centered


def _gain(first: Float32s, second: Float32s) -> Float32s:
    """Return the factor [p, 1, 1] by which centered `first` is nearest to `second`."""
    product = (first * second).sum((1, 2), keepdims=True)
    gain: Float32s = product / np.maximum((first * first).sum((1, 2), keepdims=True), 1e-6)
    return gain


def _fit(first: Float32s, second: Float32s, affine: Float32s, steps: int) -> Float32s:
    """Return scale and shift of both axes [p, 4], after Gauss-Newton steps from `affine`."""
    num_pairs, side, _ = first.shape
    at = _centers(side)
    slope_x = np.gradient(first, 2 / side, axis=2)
    slope_y = np.gradient(first, 2 / side, axis=1)
    limit = np.array([MAX_SCALE_CHANGE, MAX_SHIFT] * 2, np.float32)
    for _ in range(steps):
        warp = _warp(affine, side)
        moved, target = _moved(first, warp), _centered(second, warp.inside)
        gain = _gain(moved, target)
        by_x = gain * _moved(slope_x, warp)
        by_y = gain * _moved(slope_y, warp)
        slopes = np.stack([by_x * at, by_x, by_y * at[:, None], by_y], 1)  # [p, 4, s, s]
        slopes = slopes.reshape(num_pairs, 4, side * side)
        hessian = slopes @ slopes.transpose(0, 2, 1)
        damping = 1e-3 * np.trace(hessian, axis1=1, axis2=2) + 1e-6
        hessian += damping[:, None, None] * np.eye(4, dtype=np.float32)
        wanted = slopes @ (target - gain * moved).reshape(num_pairs, side * side, 1)
        step = np.linalg.solve(hessian, wanted)[:, :, 0]
        affine = np.clip(affine + step, -limit, limit).astype(np.float32)
    return affine


def _correlation(first: Float32s, second: Float32s, affine: Float32s) -> Float32s:
    warp = _warp(affine, first.shape[1])
    moved, target = _moved(first, warp), _centered(second, warp.inside)
    norms = np.sqrt((moved**2).sum((1, 2)) * (target**2).sum((1, 2)))
    correlation: Float32s = (moved * target).sum((1, 2)) / np.maximum(norms, 1e-6)
    return correlation


def _worst_block(
    first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], affine: Float32s, blur: float
) -> Float32s:
    """Return the worst misfit of a block in gray; infinite where color or contrast differ."""
    warp = _warp(affine, SIDE)
    inside = warp.inside
    left, right = _gray_and_color(first, blur), _gray_and_color(second, blur)
    moved, target = _moved(left[0], warp), _centered(right[0], inside)
    gain = _gain(moved, target)
    variance = (target**2).sum((1, 2)) / inside.sum((1, 2))
    worst = _block_means((target - gain * moved) ** 2, inside, GRAY_BLOCKS).max((1, 2))
    red, blue = (
        _block_means((t - gain * _sampled(c, warp)) * inside, inside, COLOR_BLOCKS)
        for c, t in zip(left[1:], right[1:], strict=True)
    )
    is_one = np.hypot(red, blue).max((1, 2)) <= MOST_COLOR
    is_one &= np.abs(np.log2(np.maximum(gain[:, 0, 0], 1e-6))) <= MOST_STOPS
    return np.where(is_one, worst / np.maximum(variance, 1e-6), np.inf).astype(np.float32)


def _gray_and_color(
    images: npt.NDArray[np.uint8], blur: float
) -> tuple[Float32s, Float32s, Float32s]:
    """Return blurred gray, red less gray and blue less gray of RGB images, [p, 32, 32] each."""
    gray = images.astype(np.float32) @ GRAY
    return _blurred(gray, blur), images[..., 0] - gray, images[..., 2] - gray


def _block_means(images: Float32s, inside: Float32s, blocks: int) -> Float32s:
    """Return means over what is inside of each block, [p, blocks, blocks]."""
    shape = (len(images), blocks, SIDE // blocks, blocks, SIDE // blocks)
    count = np.maximum(inside.reshape(shape).sum((2, 4)), 1)
    means: Float32s = images.reshape(shape).sum((2, 4)) / count
    return means
