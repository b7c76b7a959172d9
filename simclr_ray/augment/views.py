"""Two views of each image: parameters drawn by key, pixels made on whole batches.

SimCLR (Chen et al. 2020, arXiv:2002.05709) §2.1 and App. A: crop and resize, flip, color jitter,
grayscale, blur. The pixels of a view are a pure function of (seed, epoch, id, view).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_ray.augment import color, native
from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.augment.philox import uniforms
from simclr_ray.augment.resample import (
    FULL,
    bicubic_weights,
    blur,
    blur_kernels,
    blur_weights,
    crop_weights,
    resize,
)

CROP_ATTEMPTS = 10  # as torchvision; then the whole image, as the authors
ORDERS = np.array(list(permutations(range(4))), dtype=np.int64)  # [24, 4]
SIGMAS = (0.1, 2.0)  # blur, App. A
AMOUNTS = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue at strength 1, App. A
ASPECTS = (3 / 4, 4 / 3)  # relative to the image's own aspect, App. A

Pixels = NDArray[np.uint8]
Ids = NDArray[np.int64]
Images = Sequence[bytes] | Sequence[Pixels] | Tensor


class ViewPair(NamedTuple):
    """Two views of the same images, row by row: uint8 [n, C, S, S] each."""

    a: Tensor
    b: Tensor


class AugmentParams(NamedTuple):
    """All parameters of n views."""

    crop: NDArray[np.float64]  # [n, 4]: height and width share, vertical and horizontal place
    flip: NDArray[np.bool_]  # [n]
    jitter: color.JitterParams
    gray: NDArray[np.bool_]  # [n]
    blur: NDArray[np.bool_]  # [n]
    sigma: NDArray[np.float64]  # [n], pixels

    @classmethod
    def of_crops(cls, crop: NDArray[np.float64], flip: NDArray[np.bool_]) -> AugmentParams:
        """Return the parameters of views that are cropped and flipped and no more."""
        num = len(flip)
        never = np.zeros(num, np.bool_)
        still = jitter_params(np.full((num, 4), 0.5), np.zeros(num), never, 0.0)
        return cls(crop, flip, still, never, never, np.ones(num))


class Boxes(NamedTuple):
    """Crops in pixels: int64 [n] each."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]


class StageImages(NamedTuple):
    """The images of one view after one stage."""

    name: str
    images: Tensor  # uint8 [n, C, S, S]
    draws: AugmentParams | None  # of a crop of the original


class TwoViews:
    """Callable that makes the paper's two views of each image: images, ids, epoch -> `ViewPair`.

    SimCLR (Chen et al. 2020, arXiv:2002.05709) §2.1 and App. A; differences from the authors' code
    are in `docs/paper_ledger.md`. A view depends on (seed, epoch, id, view) alone: not on the
    batch, its order, the worker or the machine. There is no state, so an epoch can be repeated.

    Args:
        size: Side S of a view in pixels.
        strength: Color strength s >= 0: brightness, contrast, saturation ±0.8s, hue ±0.2s of a full
            circle. The paper has 1 for ImageNet, 0.5 for CIFAR-10.
        blur: Probability of Gaussian blur, sigma 0.1 to 2 px, kernel a tenth of S.
        seed: From 0 to 2³² − 1.
        min_area: Smallest fraction of the image's area that a crop covers, above 0.
        flip: Probability of a left-right flip.
        jitter: Probability of color jitter.
        grayscale: Probability of dropping color.
        channels: C of the images. Where they are no RGB, each channel gets a brightness and a
            contrast of its own, ±0.8s, and there is neither saturation nor hue nor grayscale.
        compiled: On CPU, use `native.c` where it is available: the same bytes in less time.

    Raises:
        ConfigError: $SIMCLR_RAY_NATIVE is none of off, package, build.

    Examples:
        >>> import numpy as np
        >>> from simclr_ray.augment import TwoViews
        >>> images = [np.zeros((48, 64, 3), np.uint8), np.full((32, 32, 3), 200, np.uint8)]
        >>> views = TwoViews(32, strength=0.5, blur=0.0, seed=7)
        >>> a, b = views(images, np.array([10, 11]), epoch=0)
        >>> a.shape, a.dtype
        (torch.Size([2, 3, 32, 32]), torch.uint8)

        Image 11 alone, later, elsewhere: the same pixels.

        >>> again = views(images[1:], np.array([11]), epoch=0)
        >>> torch.equal(again.a, a[1:]), torch.equal(again.b, b[1:])
        (True, True)
    """

    def __init__(
        self,
        size: int,
        *,
        strength: float = 1.0,
        blur: float = 0.5,
        seed: int = 0,
        min_area: float = 0.08,
        flip: float = 0.5,
        jitter: float = 0.8,
        grayscale: float = 0.2,
        channels: int = 3,
        compiled: bool = True,
    ) -> None:
        self.size, self.strength, self.blur, self.seed = size, strength, blur, seed
        self.min_area, self.flip = min_area, flip
        self.jitter, self.grayscale, self.channels = jitter, grayscale, channels
        self.compiled = compiled
        if compiled:
            native.check_setting()

    @classmethod
    def simclr(cls, size: int, strength: float = 1.0, blur: float = 0.5, seed: int = 0) -> TwoViews:
        """Return the paper's ImageNet pipeline; for CIFAR-10 pass strength=0.5, blur=0 (B.9).

        Args:
            size: Same as `TwoViews`, as all arguments.
            strength: Color strength s.
            blur: Probability of Gaussian blur.
            seed: From 0 to 2³² − 1.
        """
        return cls(size, strength=strength, blur=blur, seed=seed)

    def with_size(self, size: int) -> TwoViews:
        """Return the same pipeline for views of side `size`, in pixels."""
        other = copy.copy(self)
        other.size = size
        return other

    def __call__(self, images: Images, ids: Ids, epoch: int, ids_b: Ids | None = None) -> ViewPair:
        """Return both views of each image, uint8 [n, C, S, S] in 0 to 255 each: RGB where C is 3.

        Args:
            images: n encoded images (`decode_image` has the formats), n decoded ones (uint8
                [H, W, C] each, of any sizes), or a tensor, uint8 [n, C, H, W]. A tensor on a GPU
                is augmented there; all else on CPU.
            ids: Key of each image, which its draws depend on. Shape [n], int64.
            epoch: From 0.
            ids_b: Where view b is of other images: their keys, int64 [n]; `images` are then 2n,
                those of view a first.

        Raises:
            ImageError: An image cannot be decoded.
        """
        draws = self.draw_both_views(ids, epoch, ids_b)
        return ViewPair(*self.distort(self.cropped(images, draws), draws).chunk(2))

    def crops(self, images: Images, ids: Ids, epoch: int, ids_b: Ids | None = None) -> ViewPair:
        """Return the first stage alone: crop, resize and flip. Same arguments as a call."""
        return ViewPair(*self.cropped(images, self.draw_both_views(ids, epoch, ids_b)).chunk(2))

    def trace(
        self, images: Images, ids: NDArray[np.int64], epoch: int
    ) -> tuple[list[StageImages], list[StageImages]]:
        """Return each view's images after each stage, a list a view. Same arguments as a call."""
        return self._traced(images, ids, epoch, 0), self._traced(images, ids, epoch, 1)

    def _traced(
        self, images: Images, ids: NDArray[np.int64], epoch: int, view: int
    ) -> list[StageImages]:
        draws = self.draw(ids, epoch, view)
        never = np.zeros(len(ids), np.bool_)
        crops = self.cropped(images, draws)
        stages = [StageImages("crop", crops, draws)]
        later = [("grayscale", draws._replace(blur=never)), ("blur", draws)]
        jittered = ("jitter", draws._replace(gray=never, blur=never))
        for name, so_far in [jittered, *later[self.channels != 3 :]]:
            stages.append(StageImages(name, self.distort(crops, so_far), None))
        return stages

    def cropped(self, images: Images, draws: AugmentParams) -> Tensor:
        """Return the crops of n images by k draws, k a multiple of n: uint8 [k, C, S, S].

        Draw i is of image i mod n.
        """
        if isinstance(images, Tensor) and images.device.type != "cpu":
            times = len(draws.flip) // len(images)
            return self._crop_stack(images.repeat(times, 1, 1, 1), draws)
        decoded = _decoded(images, self.channels)
        if self.compiled and native.available():
            times = len(draws.flip) // max(1, len(decoded))
            heights, widths = (np.array([p.shape[d] for p in decoded] * times) for d in (0, 1))
            boxes = np.stack(self.boxes(draws, heights, widths), axis=1)
            return native.crop_views(decoded, boxes, draws.flip, self.size, self.channels)
        return self._crop_by_shape(decoded, draws)

    def distort(self, crops: Tensor, draws: AugmentParams) -> Tensor:
        """Return the second stage: jitter, grayscale and blur of uint8 [n, C, S, S], on its device.

        Args:
            crops: The first stage's.
            draws: Of these n views.
        """
        taps = 2 * ((self.size // 10) // 2) + 1  # the authors': 23 at 224, 3 at 32
        if crops.device.type == "cpu" and self.compiled and native.available():
            kernels = np.zeros((len(draws.blur), taps), np.float32)
            if draws.blur.any():
                kernels[draws.blur] = blur_kernels(draws.sigma[draws.blur], taps)
            factors, order, jitter = (t.numpy() for t in draws.jitter)
            if self.channels != 3:
                return native.distort_channels(
                    crops, factors, order, jitter, blur=draws.blur, kernels=kernels
                )
            return native.distort_color(
                crops, factors, order, jitter, draws.gray, blur=draws.blur, kernels=kernels
            )
        jittered = color.jitter if self.channels == 3 else color.jitter_channels
        x = jittered(crops.float().mul_(1 / 255), draws.jitter)
        gray = torch.from_numpy(np.flatnonzero(draws.gray)).to(crops.device)
        if len(gray):
            x[gray] = color.grayscale(x[gray]).expand(-1, 3, -1, -1)
        chosen = np.flatnonzero(draws.blur)
        if len(chosen):
            band = blur_weights(draws.sigma[chosen], taps, self.size).to(crops.device)
            rows = torch.from_numpy(chosen).to(crops.device)
            x[rows] = blur(x[rows].mul_(FULL).round_(), band).mul_(1 / FULL)
        return x.mul_(255).round_().to(torch.uint8)

    def least_sides(self, ids: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the height and width of each image below which a crop of it is enlarged: [n, 2].

        An image may be decoded at a smaller scale that leaves as much: its crops are fractions.
        """
        fractions = self.draw_both_views(ids, epoch).crop[:, :2].reshape(2, len(ids), 2).min(0)
        least: NDArray[np.int64] = np.ceil(self.size / fractions).astype(np.int64)
        return least

    def draw_both_views(self, ids: Ids, epoch: int, ids_b: Ids | None = None) -> AugmentParams:
        """Return the parameters of view 0 of all ids, then of view 1, of `ids_b` where given."""
        both = np.concatenate([ids, ids if ids_b is None else ids_b])
        return self.draw(both, epoch, np.repeat([0, 1], len(ids)))

    def draw(
        self, ids: NDArray[np.int64], epoch: int, view: int | NDArray[np.int64]
    ) -> AugmentParams:
        """Return the parameters of view 0 or 1, of all ids or [n], of each id in an epoch."""
        num, is_rgb = 14 + 2 * CROP_ATTEMPTS, self.channels == 3
        more = 0 if is_rgb else 2 * self.channels  # more draws of a key leave the first as they are
        u = uniforms(ids, num + more, seed=self.seed, epoch=epoch, sub=view, purpose="views")
        how = (u[:, 7], u[:, 8] < self.jitter, self.strength)
        if is_rgb:
            jitter = jitter_params(u[:, 0:4], *how)
        else:
            jitter = color.channel_params(u[:, num:], *how, AMOUNTS[:2])
        return AugmentParams(
            crop=np.concatenate([crop_fractions(u[:, 14:num], self.min_area), u[:, 4:6]], axis=1),
            flip=u[:, 6] < self.flip,
            jitter=jitter,
            gray=(u[:, 9] < self.grayscale) & is_rgb,
            blur=u[:, 10] < self.blur,
            sigma=SIGMAS[0] + u[:, 11] * (SIGMAS[1] - SIGMAS[0]),
        )

    def boxes(
        self, draws: AugmentParams, height: int | NDArray[np.int64], width: int | NDArray[np.int64]
    ) -> Boxes:
        """Return the crops, in pixels, of images of these sizes (one for all, or [n])."""
        box_height = np.maximum(1, np.rint(draws.crop[:, 0] * height)).astype(np.int64)
        box_width = np.maximum(1, np.rint(draws.crop[:, 1] * width)).astype(np.int64)
        top = np.floor(draws.crop[:, 2] * (height - box_height + 1)).astype(np.int64)
        left = np.floor(draws.crop[:, 3] * (width - box_width + 1)).astype(np.int64)
        return Boxes(top, left, box_height, box_width)

    def _crop_by_shape(self, images: Sequence[Pixels], draws: AugmentParams) -> Tensor:
        """Return the crops of images of any sizes, with torch; 2n draws for n images."""
        num, side = len(draws.flip), self.size
        out = torch.empty(num, self.channels, side, side, dtype=torch.uint8)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for row in range(len(out)):
            shapes.setdefault(images[row % len(images)].shape, []).append(row)
        for shape, rows in shapes.items():
            # above 64 px one image a product is faster than a batch of sparse matrices
            parts = [rows] if max(shape[:2]) <= 64 else [[row] for row in rows]
            for part in parts:
                stacked = np.stack([images[row % len(images)] for row in part])
                pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2)
                out[part] = self._crop_stack(pixels, _taken(draws, part))
        return out

    def _crop_stack(self, pixels: Tensor, draws: AugmentParams) -> Tensor:
        """Return one crop of each of n images of one size, uint8 [n, C, H, W], on its device."""
        height, width = pixels.shape[2:]
        box = self.boxes(draws, height, width)
        if len(pixels) == 1:  # a large photograph: touch only what the crop shows
            t, e, h, w = (int(side[0]) for side in box)
            pixels = pixels[:, :, t : t + h, e : e + w]
            zero = np.zeros(1, np.int64)
            rows = bicubic_weights(zero, box.height, h, self.size).to(pixels.device)
            columns = bicubic_weights(zero, box.width, w, self.size).to(pixels.device)
        else:
            rows = crop_weights(box.top, box.height, height, self.size, pixels.device)
            columns = crop_weights(box.left, box.width, width, self.size, pixels.device)
        mirrored = torch.from_numpy(draws.flip).to(pixels.device)[:, None, None]
        return resize(pixels, rows, torch.where(mirrored, columns.flip(1), columns))


def crop_fractions(
    u: NDArray[np.float64], min_area: float, max_area: float = 1.0
) -> NDArray[np.float64]:
    """Return the share of height and width that each crop takes: [n, 2].

    The first of ten draws that fits; area uniform, aspect log-uniform.

    Args:
        u: [n, 2·CROP_ATTEMPTS].
        min_area: Least share of the area.
        max_area: Largest.
    """
    tries = u.reshape(len(u), CROP_ATTEMPTS, 2)
    area = min_area + tries[..., 0] * (max_area - min_area)
    low, high = np.log(ASPECTS)
    aspect = np.exp(low + tries[..., 1] * (high - low))
    shares = np.sqrt(np.stack([area / aspect, area * aspect], axis=-1))  # [n, attempts, 2]
    fits = (shares <= 1.0).all(axis=-1)
    first = fits.argmax(axis=1)
    picked: NDArray[np.float64] = shares[np.arange(len(u)), first]
    return np.where(fits.any(axis=1, keepdims=True), picked, 1.0)


def jitter_params(
    u: NDArray[np.float64],
    order: NDArray[np.float64],
    chosen: NDArray[np.bool_],
    strength: float,
    amounts: tuple[float, float, float, float] = AMOUNTS,
) -> color.JitterParams:
    """Return the parameters of color jitter of strength s: ±0.8s, hue ±0.2s (App. A).

    Args:
        u: [n, 4], of the factors.
        order: [n], of the order.
        chosen: [n], which images are jittered.
        strength: s.
        amounts: Of brightness, contrast, saturation and hue at s = 1.
    """
    reach = np.array([amount * strength for amount in amounts])
    reach[3] = min(0.5, reach[3])
    low, high = (
        np.append(np.maximum(0.0, 1 - reach[:3]), -reach[3]),
        np.append(1 + reach[:3], reach[3]),
    )
    factors = low + u * (high - low)
    return color.JitterParams(
        torch.from_numpy(factors.astype(np.float32)),
        torch.from_numpy(ORDERS[(order * len(ORDERS)).astype(np.int64)]),
        torch.from_numpy(chosen & (strength > 0)),
    )


def _taken(draws: AugmentParams, rows: list[int]) -> AugmentParams:
    """Return the parameters of some views."""
    jitter = color.JitterParams(*(t[rows] for t in draws.jitter))
    rest = {name: getattr(draws, name)[rows] for name in ("crop", "flip", "gray", "blur", "sigma")}
    return AugmentParams(jitter=jitter, **rest)


def _decoded(images: Images, channels: int) -> list[Pixels]:
    """Return n images, uint8 [H, W, C] each."""
    if isinstance(images, Tensor):
        return list(images.permute(0, 2, 3, 1).contiguous().numpy())
    decoder = ImageDecoder(channels=channels)
    return [decoder.decode(i) if isinstance(i, bytes) else i for i in images]
