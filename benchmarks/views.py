"""Two views of each image, ours against per-image libraries: images a second on one process.

    python -m benchmarks.views PARQUET [--size 32] [--strength 0.5] [--blur 0] [--seconds 4]

From encoded bytes, and, for images of one size, from decoded pixels in memory. Rounds take turns,
one thread each; what is counted are source images, of which each gives two views. Peers that are
not installed are left out and named. Writes `benchmarks/results/views_SIZE.json`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.record import portable, store
from simclr_ray.augment.decode import decode_image
from simclr_ray.augment.views import TwoViews
from simclr_ray.distributed.malloc import keep_freed_memory

Pixels = NDArray[np.uint8]
Make = Callable[[Sequence[Any]], object]
Pair = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
IMAGES, ROUNDS = 512, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Settings(argparse.Namespace):
    """The command line."""

    parquet: str
    size: int
    strength: float
    blur: float
    seconds: float
    batch: int


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--blur", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each form and round")
    parser.add_argument("--batch", type=int, default=256)
    settings = parser.parse_args(namespace=Settings())
    torch.set_num_threads(1)
    keep_freed_memory()  # as a decode actor does; the others' large blocks gain by it as well
    table = pq.read_table(settings.parquet, columns=["image"]).slice(0, IMAGES)
    encoded: list[bytes] = table["image"].to_pylist()
    decoded = [decode_image(e) for e in encoded]
    sources: dict[str, Sequence[Any]] = {"encoded": encoded}
    if len({p.shape for p in decoded}) == 1:
        sources["decoded"] = decoded
    rates_of: dict[str, dict[str, float]] = {}
    for kind, images in sources.items():
        forms = {"simclr_ray": ours(settings), **peers(settings, encoded=kind == "encoded")}
        rates_of[kind] = _rates(forms, images, settings)
        print(kind, json.dumps(rates_of[kind]), flush=True)
    result = {
        "command": "python -m benchmarks.views " + " ".join(map(portable, sys.argv[1:])),
        "threads": 1,
        "size": settings.size,
        "images_per_s": rates_of,
        "ratio": {
            kind: {n: round(rates["simclr_ray"] / r, 2) for n, r in rates.items()}
            for kind, rates in rates_of.items()
        },
    }
    store(f"views_{settings.size}", result)


def ours(settings: Settings) -> Make:
    """Return our pipeline and, for comparison, the others' normalisation to float32."""
    views = TwoViews.simclr(settings.size, settings.strength, settings.blur)
    turn = iter(range(2**31))
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def make(images: Sequence[Any]) -> object:
        pair = views(images, np.arange(len(images)), next(turn))
        return [v.float().sub_(mean).div_(std) for v in pair]  # what the others hand over

    return make


def peers(settings: Settings, *, encoded: bool) -> dict[str, Make]:
    """Return the pipelines of other libraries, each image by itself as they work."""
    forms: dict[str, Make] = {}
    for name, build in (("albumentations", albumentations_pair), ("torchvision", torchvision_pair)):
        try:
            pair = build(settings.size, settings.strength, settings.blur, encoded=encoded)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
        else:
            forms[name] = partial(_stacked, pair)
    return forms


def _stacked(pair: Pair, images: Sequence[Any]) -> object:
    return [torch.stack(v) for v in zip(*map(pair, images), strict=True)]


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


def _rates(forms: dict[str, Make], images: Sequence[Any], settings: Settings) -> dict[str, float]:
    """Return the median images a second of each form; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in forms}
    batches = [images[i : i + settings.batch] for i in range(0, len(images), settings.batch)]
    for turn in range(ROUNDS + 1):
        for name, make in forms.items():
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < settings.seconds / (1 if turn else 4):
                for batch in batches:
                    make(batch)
                    done += len(batch)
            if turn:
                rates[name].append(done / (time.perf_counter() - began))
    return {name: round(statistics.median(rates), 1) for name, rates in rates.items()}


if __name__ == "__main__":
    main()
