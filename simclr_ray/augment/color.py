"""Color distortion on whole batches with per-image parameters (SimCLR App. A).

Forms are torchvision's (the paper's PyTorch pseudo-code names `ColorJitter`); order and clipping
are the authors': the four jitter operations in a random order per image, clipped to [0, 1] after
each. Everything is elementwise except the mean of contrast, which is summed over integers, so a
image's result does not depend on the batch it sits in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
MEAN_STEPS = 4096.0  # resolution of the exact mean

# Operations in the order of `JitterParams.factors`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class JitterParams(NamedTuple):
    """Parameters of color jitter for n images."""

    factors: Tensor  # float32 [n, 4]: brightness, contrast, saturation, hue
    order: Tensor  # int64 [n, 4]: which operation comes first, second, ...
    apply: Tensor  # bool [n]


def jitter(images: Tensor, draws: JitterParams) -> Tensor:
    """Return images after color jitter where `draws.apply`; float32 [n, 3, S, S] in [0, 1].

    The draws are on CPU: which images an operation is for is known without asking the device.
    """
    out = images.clone()
    for slot in range(4):
        for op, function in enumerate(OPERATIONS):
            chosen = (draws.apply & (draws.order[:, slot] == op)).nonzero().squeeze(1)
            if len(chosen):
                factor = draws.factors[chosen, op].view(-1, 1, 1, 1).to(images.device)
                rows = chosen.to(images.device)
                out[rows] = function(out[rows], factor).clamp_(0, 1)
    return out


def jitter_channels(images: Tensor, draws: JitterParams) -> Tensor:
    """Return images after brightness and contrast of each channel, where `draws.apply`.

    Args:
        images: float32 [n, C, S, S] in [0, 1], whatever the channels are.
        draws: Of n images on CPU, but factors [n, 2·C]: of brightness, then of contrast; and order
            [n, 2].
    """
    n, channels = images.shape[:2]
    out = images.clone()
    factors = draws.factors.view(n, 2, channels, 1, 1)
    for slot in range(2):
        for op, function in enumerate((brightness, channel_contrast)):
            chosen = (draws.apply & (draws.order[:, slot] == op)).nonzero().squeeze(1)
            if len(chosen):
                rows = chosen.to(images.device)
                factor = factors[chosen, op].to(images.device)
                out[rows] = function(out[rows], factor).clamp_(0, 1)
    return out


def channel_params(
    u: NDArray[np.float64],
    order: NDArray[np.float64],
    chosen: NDArray[np.bool_],
    strength: float,
    amounts: tuple[float, float],
) -> JitterParams:
    """Return the parameters of jitter of strength s, ±0.8s, of each channel by itself.

    Args:
        u: [n, 2·C], of the factors.
        order: [n], of the order.
        chosen: [n], which images are jittered.
        strength: s.
        amounts: Of brightness and contrast at s = 1.
    """
    reach = np.repeat(np.array(amounts) * strength, u.shape[1] // 2)  # [2·C]
    low, high = np.maximum(0.0, 1 - reach), 1 + reach
    contrast_first = (order >= 0.5).astype(np.int64)
    return JitterParams(
        torch.from_numpy((low + u * (high - low)).astype(np.float32)),
        torch.from_numpy(np.stack([contrast_first, 1 - contrast_first], axis=1)),
        torch.from_numpy(chosen & (strength > 0)),
    )


def channel_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return the blend of each channel with its own mean; factor [n, C, 1, 1]."""
    steps = (images * MEAN_STEPS).round()
    pixels = images.shape[2] * images.shape[3]
    mean = steps.sum((2, 3), keepdim=True, dtype=torch.float64) / (MEAN_STEPS * pixels)
    return factor * images + (1 - factor) * mean.to(images.dtype)


def grayscale(images: Tensor) -> Tensor:
    """Return luma as one channel: [n, 1, S, S] for [n, 3, S, S]."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).unsqueeze(1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return images times factor (the `simclrv2` form of the authors' code)."""
    return images * factor


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return the blend of images with their mean luma."""
    steps = (grayscale(images) * MEAN_STEPS).round()
    mean = steps.sum((1, 2, 3), dtype=torch.float64) / (MEAN_STEPS * steps[0].numel())
    return factor * images + (1 - factor) * mean.to(images.dtype).view(-1, 1, 1, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return the blend of images with their luma."""
    return factor * images + (1 - factor) * grayscale(images)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Return images with hue turned by `shift` of a full circle, through HSV."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    u = sector + shift.view(-1, 1, 1) * 6.0
    u = u - torch.floor(u * (1 / 6)) * 6.0  # sixths of the circle, in [0, 6]
    shares = (
        (u - 3.0).abs() - 1.0,
        2.0 - (u - 2.0).abs(),
        2.0 - (u - 4.0).abs(),
    )
    return torch.stack([share.clamp_(0, 1) * chroma + least for share in shares], 1)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    brightness,
    contrast,
    saturation,
    hue,
)
