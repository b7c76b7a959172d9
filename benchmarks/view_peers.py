"""The paper's two views of one image, as other libraries make them; for `benchmarks.views`."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Pair = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MEAN, _SCALE = 255 * torch.tensor(MEAN).view(3, 1, 1), 1 / (255 * torch.tensor(STD).view(3, 1, 1))
JITTER, GRAY = 0.8, 0.2  # probabilities


def albumentations_pair(size: int, strength: float, blur: float, *, encoded: bool) -> Pair:
    """Return albumentations' two views of one image: float32 [3, size, size] each."""
    a: Any = importlib.import_module("albumentations")
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(0)
    s = 0.8 * strength
    steps = [
        a.RandomResizedCrop(size=(size, size), scale=(0.08, 1.0)),
        a.HorizontalFlip(p=0.5),
        a.ColorJitter((1 - s, 1 + s), (1 - s, 1 + s), (1 - s, 1 + s), (-s / 4, s / 4), p=0.8),
        a.ToGray(p=0.2),
    ]
    if blur:
        taps = size // 20 * 2 + 1
        steps.append(a.GaussianBlur(blur_limit=(taps, taps), sigma_limit=(0.1, 2.0), p=blur))
    transform = a.Compose([*steps, a.Normalize(MEAN, STD)])

    def view(pixels: Pixels) -> torch.Tensor:
        out: Pixels = transform(image=pixels)["image"]
        return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1)))

    def pair(image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = image
        if encoded:
            raw = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
            pixels = cv2.cvtColor(raw, cv2.COLOR_BGR2RGB)
        return view(pixels), view(pixels)

    return pair


def torchvision_pair(size: int, strength: float, blur: float, *, encoded: bool) -> Pair:
    """Return torchvision's two views of one image, through Pillow: float32 [3, size, size]."""
    t: Any = importlib.import_module("torchvision.transforms.v2")
    s = 0.8 * strength
    steps = [
        t.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
        t.RandomHorizontalFlip(0.5),
        t.RandomApply([t.ColorJitter(s, s, s, s / 4)], 0.8),
        t.RandomGrayscale(0.2),
    ]
    if blur:
        steps.append(t.RandomApply([t.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))], blur))
    transform = t.Compose(
        [*steps, t.PILToTensor(), t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)]
    )

    def pair(image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        opened = Image.open(io.BytesIO(image)) if encoded else Image.fromarray(image)
        image = opened.convert("RGB")
        return transform(image), transform(image)

    return pair


def opencv_pair(size: int, strength: float, blur: float, *, encoded: bool) -> Pair:
    """Return two views of one image by OpenCV's own calls: float32 [3, size, size] each."""
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(0)
    decode, random = _opencv_decoder(), np.random.default_rng(0)
    s, taps = 0.8 * strength, size // 20 * 2 + 1

    def view(pixels: Pixels) -> torch.Tensor:
        top, left, height, width = _crop(random, *pixels.shape[:2])
        crop = pixels[top : top + height, left : left + width]
        kind = cv2.INTER_AREA if min(height, width) > size else cv2.INTER_CUBIC
        out = cv2.resize(crop, (size, size), interpolation=kind)
        if random.random() < 0.5:
            out = cv2.flip(out, 1)
        if random.random() < JITTER:
            out = _jittered(
                cv2, out, random.uniform(1 - s, 1 + s, 3), random.uniform(-s / 4, s / 4)
            )
        if random.random() < GRAY:
            out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if random.random() < blur:
            out = cv2.GaussianBlur(out, (taps, taps), random.uniform(0.1, 2.0))
        return _normalized(out)

    def pair(image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = decode(image) if encoded else image
        return view(pixels), view(pixels)

    return pair


def kornia_rs_pair(size: int, strength: float, blur: float, *, encoded: bool) -> Pair:
    """Return two views of one image by kornia-rs: float32 [3, size, size] each."""
    kornia: Any = importlib.import_module("kornia_rs")
    decode, random, ops = _kornia_decoder(), np.random.default_rng(0), kornia.imgproc
    s, taps = 0.8 * strength, size // 20 * 2 + 1
    jitter = kornia.augmentations.ColorJitter(s, s, s, s / 4)

    def view(pixels: Pixels) -> torch.Tensor:
        top, left, height, width = _crop(random, *pixels.shape[:2])
        out = ops.resize(ops.crop(pixels, left, top, width, height), (size, size), "bicubic")
        if random.random() < 0.5:
            out = ops.horizontal_flip(out)
        if random.random() < JITTER:
            out = np.asarray(
                jitter(kornia.image.Image.from_numpy(np.ascontiguousarray(out))).numpy()
            )
        if random.random() < GRAY:
            out = ops.rgb_from_gray(ops.gray_from_rgb(out))
        if random.random() < blur:
            sigma = random.uniform(0.1, 2.0)
            out = ops.gaussian_blur(out, (taps, taps), (sigma, sigma))
        return _normalized(np.asarray(out))

    def pair(image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = decode(image) if encoded else image
        return view(pixels), view(pixels)

    return pair


def _crop(random: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width, as torchvision draws them."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.integers(height - h + 1), random.integers(width - w + 1), h, w
    return 0, 0, height, width


def _jittered(cv2: Any, out: Pixels, factors: NDArray[np.float64], hue: float) -> Pixels:
    """Return brightness and contrast by a table, saturation and hue in HSV."""
    mean = factors[0] * float(out.mean())
    levels = (np.arange(256) * factors[0] - mean) * factors[1] + mean
    out = cv2.LUT(out, np.clip(levels, 0, 255).astype(np.uint8))
    h, s, v = cv2.split(cv2.cvtColor(out, cv2.COLOR_RGB2HSV))
    turned = ((np.arange(256) + 180 * hue) % 180).astype(np.uint8)
    scaled = np.clip(np.arange(256) * factors[2], 0, 255).astype(np.uint8)
    hsv = cv2.merge([cv2.LUT(h, turned), cv2.LUT(s, scaled), v])
    jittered: Pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return jittered


def _normalized(pixels: Pixels) -> torch.Tensor:
    floats = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
    return floats.sub_(_MEAN).mul_(_SCALE)


def _opencv_decoder() -> Callable[[bytes], Pixels]:
    cv2: Any = importlib.import_module("cv2")

    def decode(image: bytes) -> Pixels:
        raw = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
        rgb: Pixels = cv2.cvtColor(raw, cv2.COLOR_BGR2RGB)
        return rgb

    return decode


def _kornia_decoder() -> Callable[[bytes], Pixels]:
    kornia: Any = importlib.import_module("kornia_rs")

    def decode(image: bytes) -> Pixels:
        if image[:2] != b"\xff\xd8":
            return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        pixels: Pixels = np.asarray(kornia.io.decode_image_jpegturbo(image, "rgb"))
        return pixels

    return decode


PEERS = {
    "albumentations": albumentations_pair,
    "torchvision": torchvision_pair,
    "opencv": opencv_pair,
    "kornia-rs": kornia_rs_pair,
}
DECODERS = (("opencv", "cv2", _opencv_decoder), ("kornia-rs", "kornia_rs", _kornia_decoder))
