"""Loss, views and a training step of two commits, in interleaved pairs on one machine.

    python -m benchmarks.paired OLD_COMMIT [NEW_COMMIT] [--pairs 12]

Without NEW_COMMIT, the working tree is measured. Each measurement is a process of its own with one
torch thread, old and new in turn, the first of a pair alternating; what counts is the ratio of
speeds within a pair. Writes `benchmarks/results/paired.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import probe
from tests.golden.compare import ROOT, lay_out

REPEATS = 5


def best(action: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some calls, after one that counts for nothing."""
    action()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def time_loss() -> float:
    """Return the seconds of NT-Xent forward and backward at N = 1,024, D = 128."""
    losses = importlib.import_module("simclr_ray.nn.losses")
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(1024, 128, generator=generator).requires_grad_() for _ in "ab")
    loss = losses.NTXentLoss(0.1)
    return best(lambda: loss(z1, z2).backward())


def time_views(size: int, num: int) -> float:
    """Return the seconds of both views of `num` images at `size` px."""
    images = [probe.find("render")(index, 3, size + 16).pixels for index in range(num)]
    ids = np.arange(num, dtype=np.int64)
    views = probe.find("TwoViews").simclr(size, seed=1)
    return best(lambda: views(images, ids, 0))


def time_step(scratch: Path) -> float:
    """Return the seconds of ten steps of the loop: ResNet-10 x 0.25, 160 images, batch 32."""
    data = scratch / "images.parquet"
    probe.write_images(data)
    tree = probe.tree_of(data, precision="float32")
    tree["encoder"] = {**tree["encoder"], "width": 0.25}
    return best(lambda: probe.train(tree, data, 10))


def measure() -> dict[str, float]:
    """Return the seconds of each part, of whichever simclr_ray is imported."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        return {
            "loss": time_loss(),
            "views_32": time_views(32, 512),
            "views_224": time_views(224, 24),
            "step": time_step(Path(scratch)),
        }


def child(package: Path) -> dict[str, float]:
    """Return what `measure` gives in a fresh process that imports the package in a folder."""
    path = os.pathsep.join((str(package), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).resolve()), "--child"]
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def compare(old: Path, new: Path, pairs: int) -> dict[str, Any]:
    """Return median and range of old seconds over new seconds of each part."""
    ratios: dict[str, list[float]] = {}
    for number in range(pairs):
        order = [("old", old), ("new", new)]
        if number % 2:
            order.reverse()
        seconds = {name: child(package) for name, package in order}
        for part, value in seconds["new"].items():
            ratios.setdefault(part, []).append(seconds["old"][part] / value)
        print(number, {part: round(values[-1], 3) for part, values in ratios.items()}, flush=True)
    return {
        part: {
            "median": round(statistics.median(values), 4),
            "least": round(min(values), 4),
            "most": round(max(values), 4),
        }
        for part, values in ratios.items()
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commits", nargs="*")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure()))
        return
    if not arguments.commits:
        parser.error("name the old commit; the new one is the working tree unless it is named, too")
    with tempfile.TemporaryDirectory() as scratch:
        commits = [*arguments.commits, ""][:2]
        old, new = (lay_out(commit, Path(scratch) / (commit or "tree")) for commit in commits)
        result = compare(old, new, arguments.pairs)
    record = {
        "command": f"python -m benchmarks.paired {' '.join(filter(None, commits))}",
        "old": commits[0],
        "new": commits[1] or "working tree",
        "pairs": arguments.pairs,
    }
    # Here and not above: a child imports an older package, which may lack what the record needs.
    from benchmarks.record import store

    store("paired", {**record, "speed_of_new_over_old": result})


if __name__ == "__main__":
    main()
