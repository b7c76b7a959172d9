"""CIFAR-10 on one GPU, the whole set in its memory and views made there: accuracy by the minute.

    python -m benchmarks.headline --pack FOLDER               # where the parquet is
    python -m benchmarks.headline FOLDER [--epochs 100] [--minutes 9]   # where the GPU is

ResNet-18, bf16, batch 512, the settings of the preset `cifar10_resnet18`; the loop alone, without
Ray. kNN after each tenth of the run and a linear probe at the end, on the test split. The run has
to end by itself, since the rate falls with a cosine: `--minutes` only stops what would be cut off.
On the device machine, pydantic and ruamel.yaml have to be on PYTHONPATH (the probe's settings), and
the pack, three files of 50 MiB, is carried there in as many calls.
Writes `benchmarks/results/headline.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import Case, Model
from benchmarks.record import store
from simclr_ray.augment import TwoViews
from simclr_ray.augment.decode import decode_image
from simclr_ray.config.experiment import LinearConfig
from simclr_ray.data.batch import Batch
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy
from simclr_ray.evaluation.linear import fit_linear
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.precision import as_input, autocast, prepare_model
from simclr_ray.optim import LARS
from simclr_ray.train import loop

BATCH, TEMPERATURE, RATE, DECAY, WARMUP_EPOCHS = 512, 0.5, 1.0, 1e-4, 10
CASE = Case("ResNet-18, 32 px", 18, "cifar", 32, BATCH, 0.5, 0.0, 3)
CLASSES, PACKED = 10, 20_000


class OutOfTimeError(Exception):
    """The run would be cut off."""


def main() -> None:
    """Pack the images, or train on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.folder)
    else:
        train(arguments)


def pack(folder: Path) -> None:
    """Write the encoded images and labels of both splits, so many to a file."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        table = pq.read_table(
            Path(os.environ["SIMCLR_RAY_DATA"]) / "cifar10" / split, columns=["image", "label"]
        )
        for first in range(0, len(table), PACKED):
            part = table.slice(first, PACKED)
            images = [i["bytes"] if isinstance(i, dict) else i for i in part["image"].to_pylist()]
            file = folder / f"{split}-{first:06d}.pt"
            torch.save((images, part["label"].to_pylist()), file)
            print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def train(arguments: argparse.Namespace) -> None:
    """Train, judge, store."""
    device, began = torch.device(arguments.device), time.perf_counter()
    splits = {
        split: _decoded(arguments.folder, split, arguments.limit, device)
        for split in ("train", "test")
    }
    pixels, _ = splits["train"]
    per_epoch = len(pixels) // BATCH
    torch.manual_seed(0)
    model = Model(CASE)
    prepare_model(model, device, "bf16")
    curve: list[dict[str, float]] = []
    decoded_s = time.perf_counter() - began

    def epoch_end(epoch: int, step: int) -> None:
        del step
        if epoch % max(1, arguments.epochs // 10) == 0 or epoch == arguments.epochs:
            minutes = (time.perf_counter() - began) / 60
            curve.append({"epoch": epoch, "minutes": round(minutes, 2), "knn": _knn(model, splits)})
            print(curve[-1], flush=True)
            if minutes > arguments.minutes:
                raise OutOfTimeError

    try:
        loop.train(
            model,
            NTXentLoss(TEMPERATURE, global_batch_size=BATCH),
            _optimizer(model),
            _batches(pixels, arguments.epochs, per_epoch),
            loop.StepSchedule(
                per_epoch,
                per_epoch * arguments.epochs,
                WARMUP_EPOCHS * per_epoch,
                RATE * BATCH / 256,
                BATCH,
                50,
            ),
            loop.Callbacks(lambda m: print(m, flush=True), epoch_end, lambda _: None),
            precision="bf16",
        )
    except OutOfTimeError:
        print("out of time: the rate has not fallen to zero, and the figure says less", flush=True)
    trained_s = time.perf_counter() - began
    result = {
        "command": "python -m benchmarks.headline " + " ".join(sys.argv[1:]),
        "images": len(pixels),
        "decoding_s": round(decoded_s, 1),
        "minutes": round(trained_s / 60, 2),
        "curve": curve,
        "finished": bool(curve) and curve[-1]["epoch"] == arguments.epochs,
        "knn": curve[-1]["knn"] if curve else None,
        "linear": _linear(model, splits),
    }
    if device.type == "cuda":
        store("headline", result)
    print(result)


def _decoded(folder: Path, split: str, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return uint8 [N, 3, 32, 32] and labels [N] on the device."""
    images: list[bytes] = []
    labels: list[int] = []
    for file in sorted(folder.glob(f"{split}-*.pt")):
        found = torch.load(file, weights_only=True)
        images += found[0]
        labels += found[1]
    chosen = images[: limit or len(images)]
    pixels = np.stack([decode_image(image) for image in chosen])
    stacked = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return stacked.to(device), torch.tensor(labels[: len(chosen)], device=device)


def _batches(pixels: Tensor, epochs: int, per_epoch: int) -> Iterator[Batch]:
    views = TwoViews.simclr(CASE.size, CASE.strength, CASE.blur)
    nothing = torch.empty(0, dtype=torch.int64)
    for epoch in range(epochs):
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(epoch))
        for k in range(per_epoch):
            ids = order[k * BATCH : (k + 1) * BATCH]
            pair = views(pixels[ids.to(pixels.device)], ids.numpy(), epoch)
            yield Batch(epoch * per_epoch + k, *pair, ids, nothing)


def _optimizer(model: Model) -> LARS:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": other, "weight_decay": 0.0, "adapt": False},
    ]
    return LARS(groups, 0.0, weight_decay=DECAY)


@torch.no_grad()
def _features(model: Model, pixels: Tensor) -> Tensor:
    model.eval()
    parts = []
    for part in torch.split(pixels, 2048):
        with autocast(pixels.device, "bf16"):
            parts.append(model.encoder(as_input(part, pixels.device, "bf16")).float())
    model.train()
    return torch.cat(parts)


def _knn(model: Model, splits: dict[str, tuple[Tensor, Tensor]]) -> float:
    (bank, bank_labels), (queries, labels) = splits["train"], splits["test"]
    scores = knn_scores(
        _features(model, bank), bank_labels, _features(model, queries), 200, 0.1, CLASSES
    )
    return round(top_k_accuracy(scores, labels), 4)


def _linear(model: Model, splits: dict[str, tuple[Tensor, Tensor]]) -> float:
    (bank, bank_labels), (queries, labels) = splits["train"], splits["test"]
    probe = fit_linear(
        _features(model, bank).cpu(), bank_labels.cpu(), CLASSES, LinearConfig(), seed=0
    )
    scores = probe.logits(_features(model, queries).cpu())
    return round(top_k_accuracy(scores, labels.cpu()), 4)


if __name__ == "__main__":
    main()
