"""Two views of each image by each compiled form of `native.c`, in pairs with -march=native.

    python -m benchmarks.native [--rounds 30]

Each round runs every form on the same images, forwards and backwards in turn; a ratio is of times
within a round. Times are of the processor, so that other load counts less. Uniform noise, so that
no data set is needed: 32 px from 32 x 32 and 224 px from 375 x 500, strength 1, blur for half of
the views. The bytes of every form are compared with those of torch.
Writes `benchmarks/results/native.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import store
from simclr_ray.augment import native, native_build
from simclr_ray.augment.views import TwoViews

CASES = {32: (512, (32, 32)), 224: (16, (375, 500))}  # view size: images, their shape
Images = list[NDArray[np.uint8]]
Forms = dict[str, native.Native]


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        forms = compiled_forms(Path(folder))
        sizes = {str(size): measured(size, forms, rounds) for size in CASES}
    result = {"command": "python -m benchmarks.native " + " ".join(sys.argv[1:]), "threads": 1}
    store("native", {**result, "rounds": rounds, "size_px": sizes})
    print(json.dumps(sizes, indent=1))


def compiled_forms(folder: Path) -> Forms:
    """Return -march=native and each level that this processor can run."""
    compiler = native_build.find_compiler()
    if compiler is None:
        raise SystemExit("no C compiler")
    tunings: dict[str, tuple[str, ...]] = {"native": ("-march=native",)}
    tunings |= {k: v for k, v in native_build.X86_LEVELS.items() if native_build.runs_here(k)}
    forms: Forms = {}
    for name, tuning in tunings.items():
        path = folder / f"{name}.so"
        native_build.compile_library(compiler, tuning, path)
        forms[name] = native.Native(ctypes.CDLL(str(path)), name)
    return forms


def measured(size: int, forms: Forms, rounds: int) -> dict[str, dict[str, object]]:
    """Return of each form its milliseconds, its speed over -march=native's and its equality."""
    num, shape = CASES[size]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(num)]
    oracle = views(size, images, 0, compiled=False)
    times: dict[str, list[float]] = {name: [] for name in forms}
    same: dict[str, bool] = {}
    for turn in range(-1, rounds):
        for name in list(forms) if turn % 2 else reversed(forms):
            with mock.patch.object(native, "loaded", lambda name=name: forms[name]):
                began = time.process_time()
                made = views(size, images, max(turn, 0))
                spent = time.process_time() - began
            if turn < 0:  # warms up
                same[name] = torch.equal(made, oracle)
            else:
                times[name].append(spent)
    return {
        name: {
            "ms": round(1000 * statistics.median(spent), 2),
            "speed": round(_speed(times["native"], spent), 3),
            "bytes_of_torch": same[name],
        }
        for name, spent in times.items()
    }


def views(size: int, images: Images, epoch: int, *, compiled: bool = True) -> torch.Tensor:
    """Return both views of all images: uint8 [2n, 3, S, S]."""
    pipeline = TwoViews(size, compiled=compiled)
    return torch.cat(pipeline(images, np.arange(len(images)), epoch))


def _speed(of_native: list[float], spent: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of_native, spent, strict=True))


if __name__ == "__main__":
    main()
