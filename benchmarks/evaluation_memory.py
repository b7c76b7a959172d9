"""What the scores of a run on ImageNet take of the driver's memory, in parts.

    python -m benchmarks.evaluation_memory PARQUET [--parts deep,wide,scores] [--folder DIR]

`deep`: a hundredth of its training images by a ResNet-50, `wide`: a tenth by a ResNet-10 of a
quarter of the width; both by Ray Data's actors, at 224 pixels. Images are those of PARQUET, its
rows repeated. `scores`: kNN and the linear probe of one epoch on drawn features of full size,
[1,281,167, 2,048] in a file of 10.5 GB below TMPDIR, asked about 2,000 rows. Sampled is the
proportional set size of the driver alone, four times a second. Each part is a process of its own.
Writes `benchmarks/results/evaluation_memory.json`; a part that is not asked for stays as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.record import RESULTS, portable, store
from benchmarks.soak import memory_of
from simclr_ray import config as cfg
from simclr_ray.config.experiment import EvaluationConfig, Experiment, LinearConfig
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import connect
from simclr_ray.evaluation.encoded_splits import EvaluatedRows
from simclr_ray.evaluation.feature_file import BLOCK_BYTES, FeatureFile
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.evaluation.ray_features import extract
from simclr_ray.nn.resnet import ResNet
from simclr_ray.train.evaluation_plan import plan_of

IMAGENET: Final = (1_281_167, 50_000)  # training and validation images
CLASSES, WIDTH, QUERIES, SIZE = 1_000, 2_048, 2_000, 224
POLL_S: Final = 0.25
MIB: Final = 2**20


def main() -> None:
    """Measure each part in a process of its own; or, as that, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/evaluation_memory"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with peak_of_this_process() as peak:
            row = PARTS[args.parts](args.parquet, args.folder)
        print("ROW " + json.dumps(row | {"peak_mib": round(peak[0] / MIB)}), flush=True)
        os._exit(0)
    stored = RESULTS / "evaluation_memory.json"
    parts = json.loads(stored.read_text())["parts"] if stored.is_file() else {}
    for name in args.parts.split(","):
        parts[name] = child(name, args)
        print(name, parts[name], flush=True)
    command = "python -m benchmarks.evaluation_memory " + " ".join(map(portable, sys.argv[1:]))
    store("evaluation_memory", {"command": command, "plan": whole_plan(), "parts": parts})


def child(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a process of its own printed of a part."""
    arguments = [str(args.parquet), "--folder", str(args.folder), "--parts", name, "--child"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluation_memory", *arguments],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    row: dict[str, Any] = json.loads(rows[-1].removeprefix("ROW "))
    return row


@contextmanager
def peak_of_this_process() -> Iterator[list[int]]:
    """Give a list whose one number becomes the most memory that this process had, in bytes."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_S):
            peak[0] = max(peak[0], memory_of(os.getpid())["pss"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def encoded(parquet: Path, folder: Path, name: str, num: int, network: ResNet) -> dict[str, Any]:
    """Encode so many images by actors, one a device, and return the rate."""
    where = folder / name
    if not where.is_dir():
        where.mkdir(parents=True)
        images = pq.read_table(parquet, columns=["image", "label"]).combine_chunks()
        for first in range(0, num, len(images)):
            part = images.slice(0, min(len(images), num - first))
            pq.write_table(part, where / f"{first:08d}.parquet", row_group_size=128)
    connect()
    began = time.monotonic()
    encoded_split = extract(
        Source.open(str(where)), [network], SIZE, EvaluationConfig(batch_size=64)
    )
    seconds = time.monotonic() - began
    rows = encoded_split.features[0]
    return {
        "images": len(encoded_split.labels),
        "features": list(rows.shape),
        "in_a_file": isinstance(rows, FeatureFile),
        "images_per_s": round(len(encoded_split.labels) / seconds, 1),
    }


def deep(parquet: Path, folder: Path) -> dict[str, Any]:
    """Encode a hundredth of the training images by a ResNet-50."""
    return encoded(parquet, folder, "deep", IMAGENET[0] // 100, ResNet(50, 1.0, "imagenet"))


def wide(parquet: Path, folder: Path) -> dict[str, Any]:
    """Encode a tenth of the training images by a small ResNet-10."""
    return encoded(parquet, folder, "wide", IMAGENET[0] // 10, ResNet(10, 0.25, "imagenet"))


def scores(_parquet: Path, _folder: Path) -> dict[str, Any]:
    """Score drawn features of full size: classes with a mean each, and noise about it."""
    num = IMAGENET[0]
    rng = np.random.default_rng(0)
    means = rng.standard_normal((CLASSES, WIDTH), np.float32)
    labels = rng.integers(0, CLASSES, num)
    file = FeatureFile(num, WIDTH)
    step = BLOCK_BYTES // (4 * WIDTH)
    for first in range(0, num, step):
        places = np.arange(first, min(num, first + step))
        file.write(places, drawn(rng, means, labels[places]))
    truth = rng.integers(0, CLASSES, QUERIES)
    queries = torch.from_numpy(drawn(rng, means, truth))
    bank_labels, answers = torch.from_numpy(labels), torch.from_numpy(truth)
    row: dict[str, Any] = {"features": list(file.shape), "queries": QUERIES}
    began = time.monotonic()
    votes = knn_scores(file, bank_labels, queries, 200, 0.1, CLASSES)
    row |= {"knn_s": round(time.monotonic() - began), "knn_top1": top_k_accuracy(votes, answers)}
    began = time.monotonic()
    probe = fit_linear(file, bank_labels, CLASSES, LinearConfig(epochs=1), seed=0)
    top1 = top_k_accuracy(probe.logits(queries), answers)
    return row | {"linear_s": round(time.monotonic() - began), "linear_top1": top1}


def drawn(rng: np.random.Generator, means: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return features of some labels, float32 [m, F]."""
    rows = rng.standard_normal((len(labels), WIDTH), np.float32)
    rows *= 8
    rows += means[labels]
    return rows


def whole_plan() -> str:
    """Return the line of the dry run for the whole of ImageNet by its preset."""
    config = cfg.validate(Experiment, *cfg.read_tree("imagenet_resnet50"))
    return plan_of(config, EvaluatedRows(sum(IMAGENET), by_actors=True, actors=0)).text


PARTS: Final[dict[str, Callable[[Path, Path], dict[str, Any]]]] = {
    "deep": deep,
    "wide": wide,
    "scores": scores,
}

if __name__ == "__main__":
    main()
