"""Crop, resize and blur as products with small-integer matrices, exact in float32.

A floating-point product may round differently in another batch, on another kernel or device, and
then a view would depend on where it was made. Here weights are multiples of 1/2048 and pixels,
between passes, of 1/8 gray level, so every partial sum is an integer below 2²⁴, which float32
holds exactly: the result is the same in any order of summation. (TF32, which a process may have
switched on, is off meanwhile.)
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIT = 2048  # weights are integers over this
FINE = 8  # steps of a gray level kept between passes
FULL = 255 * FINE  # 1.0 in those steps
TABLE_SIDE = 64  # up to here the weights of every crop fit a table: 33 MiB at 64 px


def bicubic_weights(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], size_in: int, size_out: int
) -> Tensor:
    """Return one resampling matrix an image: float32 integers over UNIT, [n, size_out, size_in].

    Antialiased bicubic (a = −1/2) of the pixels [start, start + length) to `size_out`, edges
    clamped to the crop, as Pillow resizes a cropped image.
    """
    scale = (lengths / size_out)[:, None]  # input pixels an output pixel
    reach = np.maximum(scale, 1.0)
    centre = starts[:, None] + (np.arange(size_out) + 0.5) * scale  # [n, size_out]
    taps = 2 * math.ceil(2 * float(reach.max())) + 1  # all that lies within 2·reach of a centre
    pixel = np.floor(centre).astype(np.int64)[..., None] + np.arange(taps) - taps // 2
    weights = _cubic(np.abs(pixel + 0.5 - centre[..., None]) / reach[..., None])
    first, last = starts[:, None, None], (starts + lengths)[:, None, None]
    band = _quantised(np.where((pixel >= first) & (pixel < last), weights, 0.0))
    # taps beyond the edges are zero; they fall into a margin that is cut off
    padded = torch.zeros(len(starts), size_out, size_in + 2 * taps)
    padded.scatter_(2, torch.from_numpy(pixel + taps), band)
    return padded[..., taps : taps + size_in]


def crop_weights(
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    size_in: int,
    size_out: int,
    device: torch.device,
) -> Tensor:
    """Return what `bicubic_weights` does, on `device`; of small images from a table."""
    if size_in > TABLE_SIDE or size_out > TABLE_SIDE:
        return bicubic_weights(starts, lengths, size_in, size_out).to(device)
    crop = starts * size_in - starts * (starts - 1) // 2 + lengths - 1
    return _table(size_in, size_out, device)[torch.from_numpy(crop).to(device)]


@functools.lru_cache(maxsize=4)
def _table(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Return the weights of every crop of `size_in` pixels, by start and then by length."""
    starts, ends = np.triu_indices(size_in)
    return bicubic_weights(starts, ends - starts + 1, size_in, size_out).to(device)


def blur_kernels(sigmas: NDArray[np.float64], taps: int) -> Tensor:
    """Return one normalised Gaussian an image: float32 integers over UNIT, [n, taps]."""
    offset = np.arange(taps) - taps // 2
    kernel = np.exp(-(offset[None] ** 2) / (2.0 * sigmas[:, None] ** 2))
    return _quantised(kernel[:, None, :])[:, 0]


def blur_weights(sigmas: NDArray[np.float64], taps: int, size: int) -> Tensor:
    """Return one Gaussian band matrix an image: float32 integers over UNIT, [n, size, size].

    `taps` wide, normalised, zero-padded at the edges as the authors' depthwise convolution is.
    """
    radius, kernels = taps // 2, blur_kernels(sigmas, taps)
    band = torch.zeros(len(sigmas), size, size + 2 * radius)
    for tap in range(taps):
        band.diagonal(tap, 1, 2)[:, :size] = kernels[:, tap, None]
    return band[:, :, radius : radius + size].contiguous()


def resize(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return images resampled by one matrix along each axis.

    Args:
        images: uint8 [n, 3, H, W].
        rows: [n, S, H] from `bicubic_weights`.
        columns: [n, S, W] likewise.

    Returns:
        uint8 [n, 3, S, S].
    """
    n, channels, height, width = images.shape
    flat = images.to(columns.dtype).reshape(n, channels * height, width)
    across = _product(flat, columns.transpose(1, 2))  # [n, 3H, S], below 2²⁰
    across = across.mul_(FINE / UNIT).round_()
    whole = _down(across.view(n, channels, height, -1), rows, UNIT * FINE)
    return whole.clamp_(0, 255).to(torch.uint8)


def blur(images: Tensor, band: Tensor) -> Tensor:
    """Return images blurred by `band` [n, S, S] along both axes.

    In and out are float32 [n, c, S, S], whole steps of 1/FINE gray level in [0, FULL].
    """
    n, channels, height, width = images.shape
    flat = images.reshape(n, channels * height, width)
    across = _product(flat, band.transpose(1, 2)).mul_(1 / UNIT).round_()
    return _down(across.view(n, channels, height, width), band, UNIT)


def _down(images: Tensor, rows: Tensor, unit: int) -> Tensor:
    """Return the product along the vertical axis, divided by `unit` and rounded."""
    n, channels, height, width = images.shape
    flat = images.transpose(1, 2).reshape(n, height, channels * width)
    down = _product(rows, flat).mul_(1 / unit).round_()
    return down.view(n, -1, channels, width).transpose(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the batched product in whole float32: TF32 would round what has 11 bits and more."""
    if not a.is_cuda:
        return torch.bmm(a, b)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return torch.bmm(a, b)
    finally:
        torch.set_float32_matmul_precision(before)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = −1/2 at |x|."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _quantised(weights: NDArray[np.float64]) -> Tensor:
    """Return rows that sum to exactly UNIT, as integers; what rounding lost goes to the largest."""
    total = np.cumsum(weights, axis=2)[..., -1:]  # one after the other, as native.c adds
    whole = np.rint(weights / total * UNIT)
    lost = UNIT - whole.sum(axis=2)
    largest = whole.argmax(axis=2)
    i, j = np.indices(largest.shape, sparse=True)
    whole[i, j, largest] += lost
    return torch.from_numpy(whole.astype(np.float32))
