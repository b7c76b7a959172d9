"""Two views of each image, ours against per-image libraries: images a second on one process.

    python -m benchmarks.views PARQUET [--size 32] [--strength 0.5] [--blur 0] [--seconds 4]

From encoded bytes, and, for images of one size, from decoded pixels in memory; and the rates of
decoding alone, which no pipeline exceeds. Rounds take turns, one thread each; what is counted are
source images, of which each gives two views. Peers that are not installed are left out and named.
Writes `benchmarks/results/views_SIZE.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from benchmarks.record import portable, store
from benchmarks.view_peers import DECODERS, MEAN, PEERS, STD, Pair
from simclr_ray.augment.decode import ImageDecoder, Library, decode_image
from simclr_ray.augment.views import TwoViews
from simclr_ray.distributed.malloc import keep_freed_memory

Make = Callable[[Sequence[Any]], object]
IMAGES, ROUNDS = 512, 5
CACHED = 2**18  # floats that stay in cache between two passes, as one image does for the others


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
        forms = {"simclr_ray": own_form(settings), **peers(settings, encoded=kind == "encoded")}
        if kind == "encoded" and importlib.util.find_spec("simplejpeg"):
            forms["simclr_ray, turbo"] = own_form(settings, "turbo")
        rates_of[kind] = _rates(forms, images, settings)
        print(kind, json.dumps(rates_of[kind]), flush=True)
    decode_alone = _rates(decoders(), encoded, settings)
    print("decoding alone", json.dumps(decode_alone), flush=True)
    result = {
        "command": "python -m benchmarks.views " + " ".join(map(portable, sys.argv[1:])),
        "threads": 1,
        "size": settings.size,
        "images_per_s": rates_of,
        "decoding_alone_images_per_s": decode_alone,
        "ratio": {
            kind: {n: round(rates["simclr_ray"] / r, 2) for n, r in rates.items()}
            for kind, rates in rates_of.items()
        },
    }
    store(f"views_{settings.size}", result)


def decoders() -> dict[str, Make]:
    """Return what decodes and no more: what no pipeline can be faster than."""
    installed = importlib.util.find_spec("simplejpeg") is not None
    libraries: tuple[Library, ...] = ("pillow", "turbo") if installed else ("pillow",)
    forms: dict[str, Make] = {
        library: partial(_each, ImageDecoder(library=library).decode) for library in libraries
    }
    for name, package, build in DECODERS:
        if importlib.util.find_spec(package):
            forms[name] = partial(_each, build())
    return forms


def _each(decode: Callable[[bytes], object], images: Sequence[Any]) -> object:
    return [decode(image) for image in images]


def own_form(settings: Settings, library: Library = "pillow") -> Make:
    """Return our pipeline and, for comparison, the others' normalisation to float32."""
    decoder = ImageDecoder(library=library)
    views = TwoViews.simclr(settings.size, settings.strength, settings.blur)
    turn = iter(range(2**31))
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    scale = 1 / std

    def normalized(view: torch.Tensor) -> torch.Tensor:
        out = torch.empty(view.shape)
        some = max(1, CACHED // view[0].numel())
        for part, images in zip(torch.split(out, some), torch.split(view, some), strict=True):
            torch.sub(images, mean, out=part).mul_(scale)
        return out

    def make(images: Sequence[Any]) -> object:
        pixels = [decoder.decode(i) if isinstance(i, bytes) else i for i in images]
        pair = views(pixels, np.arange(len(images)), next(turn))
        return [normalized(v) for v in pair]  # what the others hand over

    return make


def peers(settings: Settings, *, encoded: bool) -> dict[str, Make]:
    """Return the pipelines of other libraries, each image by itself as they work."""
    forms: dict[str, Make] = {}
    for name, build in PEERS.items():
        try:
            pair = build(settings.size, settings.strength, settings.blur, encoded=encoded)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
        else:
            forms[name] = partial(_stacked, pair)
    return forms


def _stacked(pair: Pair, images: Sequence[Any]) -> object:
    return [torch.stack(v) for v in zip(*map(pair, images), strict=True)]


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
