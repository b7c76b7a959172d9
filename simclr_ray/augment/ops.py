"""The composition study's transformations (SimCLR §3, Fig. 4), and the broader set (App. B.2).

Each is a class of settings whose call takes a batch and the draws of its images, and which says how
many draws an image needs: so what it does is a pure function of (seed, epoch, id, view). To add
one: a class here, and its config class in `config.sections.views`, which names it.

Images are float32 [n, C, S, S] in [0, 1], before and after, RGB where the config has not checked
that an op takes others. Where the paper gives no parameters
(noise, cutout, Sobel) the source of ours is named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr_ray.augment import color
from simclr_ray.augment.resample import FULL, blur, blur_weights
from simclr_ray.augment.views import AMOUNTS, jitter_params

Uniforms = NDArray[np.float64]  # [n, k] in [0, 1)


@runtime_checkable
class Op(Protocol):
    """What a pipeline asks of a transformation."""

    def num_draws(self, size: int) -> int:
        """Return the uniform draws of an image of `size` px."""

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images transformed, each by its own draws."""


@dataclass(frozen=True)
class Flip:
    """Left-right flip."""

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 0."""
        return 0

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return the images flipped."""
        return images.flip(3)


@dataclass(frozen=True)
class Rotate:
    """Rotation by 90, 180 or 270 degrees, counter-clockwise, each as likely."""

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 1."""
        return 1

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images rotated."""
        turns = 1 + (3 * u[:, 0]).astype(np.int64)
        out = images.clone()
        for k in (1, 2, 3):
            rows = torch.from_numpy(np.flatnonzero(turns == k))
            out[rows] = images[rows].rot90(k, (2, 3))
        return out


@dataclass(frozen=True)
class Cutout:
    """A square of mid-gray, its centre anywhere (DeVries & Taylor 2017: 16 px of 32)."""

    side: float = 0.5  # of the image's
    fill: float = 0.5

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 2."""
        return 2

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images with a hole; at the border it is cut off."""
        size = images.shape[-1]
        side = round(self.side * size)
        first = torch.from_numpy((u * size).astype(np.int64) - side // 2)  # [n, 2]
        place = torch.arange(size)
        inside = (place >= first[..., None]) & (place < first[..., None] + side)  # [n, 2, S]
        hole = inside[:, 0, :, None] & inside[:, 1, None, :]
        return images.masked_fill(hole[:, None].to(images.device), self.fill)


@dataclass(frozen=True)
class Jitter:
    """Brightness, contrast, saturation and hue, in a random order (App. A); all times strength."""

    strength: float = 1.0
    brightness: float = AMOUNTS[0]
    contrast: float = AMOUNTS[1]
    saturation: float = AMOUNTS[2]
    hue: float = AMOUNTS[3]  # of a full circle

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 5."""
        return 5

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images jittered, clipped after each of the four."""
        everyone = np.ones(len(u), np.bool_)
        amounts = (self.brightness, self.contrast, self.saturation, self.hue)
        draws = jitter_params(u[:, :4], u[:, 4], everyone, self.strength, amounts)
        return color.jitter(images, draws)


@dataclass(frozen=True)
class ChannelJitter:
    """Brightness and contrast of each channel by itself: jitter of images that are no RGB."""

    channels: int
    strength: float = 1.0
    brightness: float = AMOUNTS[0]
    contrast: float = AMOUNTS[1]

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return two a channel, and one of the order."""
        return 2 * self.channels + 1

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images jittered, clipped after each of both."""
        everyone = np.ones(len(u), np.bool_)
        amounts = (self.brightness, self.contrast)
        draws = color.channel_params(u[:, 1:], u[:, 0], everyone, self.strength, amounts)
        return color.jitter_channels(images, draws)


@dataclass(frozen=True)
class Grayscale:
    """Color dropped: luma in three equal channels."""

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 0."""
        return 0

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return the images in gray."""
        return color.grayscale(images).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class ColorDistortion:
    """The paper's color distortion: jitter, then grayscale, each by chance (App. A)."""

    strength: float = 1.0
    jitter: float = 0.8
    grayscale: float = 0.2

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 7."""
        return 7

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images distorted."""
        draws = jitter_params(u[:, :4], u[:, 4], u[:, 5] < self.jitter, self.strength)
        out = color.jitter(images, draws)
        gray = torch.from_numpy(np.flatnonzero(u[:, 6] < self.grayscale))
        out[gray] = color.grayscale(out[gray]).expand(-1, 3, -1, -1)
        return out


@dataclass(frozen=True)
class Noise:
    """Gaussian noise, the same deviation for all (the paper gives none), clipped to [0, 1]."""

    sigma: float = 0.1

    def num_draws(self, size: int) -> int:
        """Return two for each number."""
        return 2 * 3 * size**2

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images with noise; Box-Muller of two draws each."""
        radius, angle = np.split(u, 2, axis=1)
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)
        noise = torch.from_numpy(normal.astype(np.float32)).view(images.shape)
        return (images + self.sigma * noise.to(images.device)).clamp_(0, 1)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur, σ uniform, the kernel a tenth of the side, zeros around (App. A)."""

    min_sigma: float = 0.1  # px
    max_sigma: float = 2.0
    kernel: float = 0.1  # of the side

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 1."""
        return 1

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images blurred."""
        size = images.shape[-1]
        sigma = self.min_sigma + u[:, 0] * (self.max_sigma - self.min_sigma)
        taps = 2 * (int(self.kernel * size) // 2) + 1
        band = blur_weights(sigma, taps if taps <= size else taps - 2, size)
        return blur((images * FULL).round_(), band.to(images.device)).mul_(1 / FULL)


@dataclass(frozen=True)
class Sobel:
    """Length of the luma's gradient by Sobel's kernels, a full edge 1, in three channels."""

    KERNEL: ClassVar = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 0."""
        return 0

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return the edges."""
        across = torch.tensor(self.KERNEL, device=images.device) / 4
        kernels = torch.stack([across, across.T])[:, None]  # [2, 1, 3, 3]
        luma = F.pad(color.grayscale(images), (1, 1, 1, 1), mode="reflect")
        edges: Tensor = torch.linalg.vector_norm(F.conv2d(luma, kernels), dim=1, keepdim=True)
        return edges.clamp_(0, 1).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Solarize:
    """Everything above the threshold inverted."""

    threshold: float = 0.5

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 0."""
        return 0

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return the images solarised."""
        return torch.where(images >= self.threshold, 1 - images, images)


@dataclass(frozen=True)
class Equalize:
    """Each channel's histogram made flat, torchvision's form."""

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 0."""
        return 0

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return the images equalised."""
        from torchvision.transforms.functional import equalize  # seconds to import

        out: Tensor = equalize(_bytes(images))
        return out / 255


@dataclass(frozen=True)
class AutoAugment:
    """torchvision's AutoAugment (Cubuk et al. 2019), its generator seeded for each image."""

    policy: str = "imagenet"  # cifar10, svhn

    def num_draws(self, size: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 1, the seed."""
        return 1

    def __call__(self, images: Tensor, u: Uniforms) -> Tensor:
        """Return the images augmented."""
        from torchvision import transforms  # seconds to import

        apply = transforms.AutoAugment(transforms.AutoAugmentPolicy(self.policy))
        out = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(_bytes(images), u[:, 0], strict=True):
                torch.manual_seed(int(seed * 2**32))
                out.append(apply(image))
        return torch.stack(out) / 255


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round_().to(torch.uint8)
