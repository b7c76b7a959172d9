"""Copies of images as people make them, and an independent measure of whether two are copies."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from scipy.optimize import minimize

from simclr_ray.augment.decode import Pixels

KINDS = ("jpeg", "scale", "crop", "all")
RESAMPLED = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
LEAST_AREA, QUALITY, LARGEST_SCALE = 0.9, (30, 95), 2.0

SIDE = 96  # at which detail is compared
MOST_TRIMMED = 0.12  # of a side
COPY_FROM = 0.98  # on Caltech-101 copies lie above 0.985, photographs of one studio below 0.96


def copy_of(pixels: Pixels, kind: str, rng: np.random.Generator) -> bytes:
    """Return a copy, encoded: JPEG of quality 30 to 95, scaled by 0.5 to 2, 90 % of the area."""
    image = Image.fromarray(pixels)
    if kind in ("crop", "all"):
        area = rng.uniform(LEAST_AREA, 1)
        fraction = rng.uniform(area, 1)
        width = min(image.width, int(np.ceil(image.width * fraction)))
        height = min(image.height, int(np.ceil(image.height * area / fraction)))
        x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        image = image.crop((int(x), int(y), int(x) + width, int(y) + height))
    if kind in ("scale", "all"):
        scale = LARGEST_SCALE ** rng.uniform(-1, 1)
        size = (max(2, round(image.width * scale)), max(2, round(image.height * scale)))
        image = image.resize(size, RESAMPLED[rng.integers(len(RESAMPLED))])
    out = io.BytesIO()
    if kind in ("jpeg", "all"):
        image.save(out, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def plant(
    images: Sequence[Pixels], count: int, seed: int
) -> tuple[list[bytes], list[tuple[int, str]]]:
    """Return copies of `count` distinct images, and of each which it is of and its kind."""
    rng = np.random.default_rng(seed)
    sources = [int(row) for row in rng.permutation(len(images))[:count]]
    about = [(row, KINDS[at % len(KINDS)]) for at, row in enumerate(sources)]
    return [copy_of(images[row], kind, rng) for row, kind in about], about


def detail_correlation(first: Image.Image, second: Image.Image) -> float:
    """Return how well the detail of two images agrees once their edges are trimmed to fit best.

    The images themselves at 96 px, searched by Powell's method; nothing of `simclr_ray`.
    """
    gray = [image.convert("L") for image in (first, second)]

    def trimmed(image: Image.Image, trims: npt.NDArray[np.float64], blur: float) -> Image.Image:
        left, top, right, bottom = trims.clip(0, MOST_TRIMMED).tolist()
        width, height = image.size
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        return image.filter(ImageFilter.GaussianBlur(blur))

    def values(trims: npt.NDArray[np.float64], blur: float) -> list[npt.NDArray[np.float64]]:
        pairs = zip(gray, (trims, -trims), strict=True)  # what one side has more, the other lacks
        return [np.asarray(trimmed(image, t, blur), np.float64) for image, t in pairs]

    def correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    best = np.zeros(4)
    for blur in (3.0, 1.0):
        found = minimize(
            lambda trims, blur=blur: -correlation(*values(trims, blur)),
            best,
            method="Powell",
            bounds=[(-MOST_TRIMMED, MOST_TRIMMED)] * 4,
            options={"maxiter": 4, "xtol": 1e-3, "ftol": 1e-6},
        )
        best = found.x
    fine, coarse = values(best, 1.0), values(best, 4.0)
    return correlation(fine[0] - coarse[0], fine[1] - coarse[1])
