"""CIFAR-10 on one GPU, the whole set in memory: accuracy by the minute, and what it is worth.

    python -m benchmarks.headline --pack FOLDER               # where the parquet is
    python -m benchmarks.headline FOLDER [--epochs 100] [--minutes 9]   # where the GPU is

ResNet-18, bf16, batch 512, the settings of the preset `cifar10_resnet18`; the loop alone, without
Ray. Views are made by `--makers` processes, or with 0 on the device, within the step. kNN after
each tenth of the run; at the end kNN and a linear probe on the test split beside the untrained
encoder and raw pixels, by the code of `evaluate`. The rate falls with a cosine, so the run has to
come to its end: what `--minutes` stops is continued by the same command from `--state`.
On the device machine, pydantic and ruamel.yaml have to be on PYTHONPATH, and the pack, 101 MiB, is
carried there in two calls. Writes `benchmarks/results/headline.json`.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.gpu import Case, Model
from benchmarks.record import median, store
from simclr_ray.augment import TwoViews, native
from simclr_ray.augment.decode import decode_image
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.evaluation.features import Features, Split, extract_features
from simclr_ray.evaluation.knn import knn_scores, top_k_accuracy
from simclr_ray.evaluation.scores import PIXELS, TRAINED, RawPixelEncoder, Score, score_features
from simclr_ray.nn import precision
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.optim import LARS
from simclr_ray.storage import checkpoint
from simclr_ray.train import loop

BATCH, TEMPERATURE, RATE, DECAY, WARMUP_EPOCHS = 512, 0.5, 1.0, 1e-4, 10
CASE = Case("ResNet-18, 32 px", 18, "cifar", 32, BATCH, 0.5, 0.0, 3)
CLASSES, PACKED, SEED = 10, 10_000, 0
PRESET = "cifar10_resnet18"


class OutOfTimeError(Exception):
    """The command would be cut off."""


class Splits(NamedTuple):
    """Both splits, decoded, on the CPU."""

    train: Split
    test: Split


def main() -> None:
    """Pack the images, or train on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--state", type=Path, default=Path("headline.pt"))
    parser.add_argument("--makers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--name", default="headline", help="of the result")
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.folder)
        return
    began = time.perf_counter()
    run = Run(arguments, began)
    if run.train():
        result = {**run.result(), **run.evaluated()}
        print(result, flush=True)
        if run.device.type == "cuda":
            store(arguments.name, result)


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
            joined = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8)
            lengths = torch.tensor([len(image) for image in images])
            torch.save((joined, lengths, torch.tensor(part["label"].to_pylist())), file)
            print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


class Run:
    """A run, from its beginning or from where an earlier command left it."""

    def __init__(self, arguments: argparse.Namespace, began: float) -> None:
        self.arguments, self.began = arguments, began
        self.device = torch.device(arguments.device)
        torch.backends.cudnn.benchmark = True
        self.splits = Splits(
            *(decoded(arguments.folder, s, arguments.limit) for s in Splits._fields)
        )
        self.per_epoch = len(self.splits.train.images) // BATCH
        self.decoding_s = time.perf_counter() - began
        torch.manual_seed(SEED)
        self.model = Model(CASE)
        self.untrained = copy.deepcopy(self.model.encoder)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.earlier_s, self.commands = 0.0, 1
        self.images = _Images(self.splits.train.images)

    def train(self) -> bool:
        """Return whether the run came to its end; its state is kept where it did not."""
        arguments, total = self.arguments, self.per_epoch * self.arguments.epochs
        state = self._earlier()
        stream = _batches(self.images, range(self.step, total), arguments.makers, self.device)
        precision.prepare_model(self.model, self.device, "bf16")
        self.evaluated_encoder = copy.deepcopy(self.model.encoder)  # stays as it is when compiled
        optimizer = _optimizer(self.model)
        if state:
            checkpoint.unpack(state["tensors"], self.model, optimizer)
        if arguments.compile:
            self.model.compile()
        peak = RATE * BATCH / 256
        warmup = WARMUP_EPOCHS * self.per_epoch
        try:
            loop.train(
                self.model,
                NTXentLoss(TEMPERATURE, global_batch_size=BATCH),
                optimizer,
                stream,
                loop.StepSchedule(self.per_epoch, total, warmup, peak, BATCH, self.per_epoch),
                loop.Callbacks(self._report, self._epoch_end, lambda _: None),
                precision="bf16",
            )
        except OutOfTimeError:
            self._keep(optimizer)
            print(f"stopped after {self.step} of {total} steps; go on by the same command")
            return False
        return True

    def result(self) -> dict[str, Any]:
        """Return what the training was."""
        arguments = self.arguments
        return {
            "command": "python -m benchmarks.headline " + " ".join(sys.argv[1:]),
            "commands": self.commands,
            "seed": SEED,
            "images": len(self.splits.train.images),
            "epochs": arguments.epochs,
            "compiled": arguments.compile,
            "makers": arguments.makers,
            "decoding_s": round(self.decoding_s, 1),
            "minutes": round(self._minutes(), 2),
            "images_per_s": median(self.rates, 1),
            "curve": self.curve,
        }

    def evaluated(self) -> dict[str, Any]:
        """Return the scores of the trained encoder, of the untrained one, and of raw pixels."""
        experiment = Experiment.load(PRESET)
        train, test = self.splits
        networks = {TRAINED: self.model.encoder, "untrained encoder": self.untrained}
        scores: list[Score] = []
        for name, network in networks.items():
            self.evaluated_encoder.load_state_dict(network.state_dict())
            bank, test_features = self._features(train), self._features(test)
            scores.append(score_features(name, bank, test_features, experiment))
            print(scores[-1], flush=True)
        bank, test_features = (
            self._on_device(extract_features(RawPixelEncoder(), s.images), s.labels)
            for s in (train, test)
        )
        scores.append(score_features(PIXELS, bank, test_features, experiment))
        return {"scores": [score.as_tree() for score in scores]}

    def _earlier(self) -> dict[str, Any] | None:
        """Return an earlier command's state, if there is one, and stand where it stood."""
        if not self.arguments.state.is_file():
            return None
        state: dict[str, Any] = torch.load(self.arguments.state, weights_only=True)
        if state["epochs"] != self.arguments.epochs:
            raise SystemExit(f"{self.arguments.state} is of a run of {state['epochs']} epochs")
        self.step, self.curve, self.rates = state["step"], state["curve"], state["rates"]
        self.earlier_s, self.commands = state["seconds"], state["commands"] + 1
        print(f"goes on from step {self.step}", flush=True)
        return state

    def _keep(self, optimizer: LARS) -> None:
        state = {
            "tensors": checkpoint.pack(self.model, optimizer),
            "epochs": self.arguments.epochs,
            "step": self.step,
            "curve": self.curve,
            "rates": self.rates,
            "seconds": self.earlier_s + time.perf_counter() - self.began,
            "commands": self.commands,
        }
        torch.save(state, self.arguments.state)

    def _report(self, metrics: loop.Metrics) -> None:
        self.rates.append(metrics.images_per_s)
        self.last = metrics
        if round(metrics.epoch) % 20 == 2:
            print(metrics, flush=True)

    def _epoch_end(self, epoch: int, step: int) -> None:
        self.step = step
        tenth = max(1, self.arguments.epochs // 10)
        if epoch % tenth == 0 or epoch == self.arguments.epochs:
            row = {
                "epoch": epoch,
                "minutes": round(self._minutes(), 2),
                "loss": round(self.last.mean_loss, 4),
                "knn": self._knn(),
            }
            self.curve.append(row)
            print(row, flush=True)
        seconds = time.perf_counter() - self.began
        if seconds > 60 * self.arguments.minutes and epoch < self.arguments.epochs:
            raise OutOfTimeError

    def _minutes(self) -> float:
        return (self.earlier_s + time.perf_counter() - self.began) / 60

    def _knn(self) -> float:
        self.evaluated_encoder.load_state_dict(self.model.encoder.state_dict())
        bank, test = (self._features(split) for split in self.splits)
        scores = knn_scores(bank.rows, bank.labels, test.rows, 200, 0.1, CLASSES)
        return round(top_k_accuracy(scores, test.labels), 4)

    def _features(self, split: Split) -> Features:
        """Return h of a split, by the encoder that is evaluated."""
        h = extract_features(self.evaluated_encoder, split.images, 2048, self.device, "bf16")
        return self._on_device(h, split.labels)

    def _on_device(self, rows: Tensor, labels: Tensor) -> Features:
        return Features(rows.to(self.device), labels.to(self.device))


def decoded(folder: Path, split: str, limit: int) -> Split:
    """Return the images of a pack."""
    images: list[bytes] = []
    labels: list[Tensor] = []
    for file in sorted(folder.glob(f"{split}-*.pt")):
        joined, lengths, of_file = torch.load(file, weights_only=True)
        images += [part.numpy().tobytes() for part in joined.split(lengths.tolist())]
        labels.append(of_file)
    chosen = images[: limit or len(images)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = np.stack(list(pool.map(decode_image, chosen, chunksize=256)))
    stacked = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, torch.cat(labels)[: len(chosen)], torch.arange(len(chosen)), [])


class _Images(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Step -> both views of its images, and their ids: a pure function of the step."""

    def __init__(self, images: Tensor) -> None:
        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.per_epoch = len(images) // BATCH
        self.views = TwoViews.simclr(CASE.size, CASE.strength, CASE.blur)

    def ids(self, step: int) -> Tensor:
        """Return the images of a step."""
        epoch, k = divmod(step, self.per_epoch)
        return _order(len(self.pixels), epoch)[k * BATCH : (k + 1) * BATCH]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.ids(step)
        pixels = [self.pixels[i] for i in ids.tolist()]
        return *self.views(pixels, ids.numpy(), step // self.per_epoch), ids


@lru_cache(maxsize=2)
def _order(num: int, epoch: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(epoch))


def _batches(images: _Images, steps: range, makers: int, device: torch.device) -> Iterator[Batch]:
    """Return the batches of some steps; processes begin at once, before CUDA does."""
    native.available()  # compiled once, before there are many
    if not makers and device.type == "cuda":
        return _made_there(images, steps, device)
    loader: Any = DataLoader(
        images,
        batch_size=None,
        sampler=steps,
        num_workers=makers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if makers else None,
    )
    return _moved(iter(loader), steps, device)


def _moved(made: Iterator[Any], steps: range, device: torch.device) -> Iterator[Batch]:
    nothing = torch.empty(0, dtype=torch.int64)
    for step, (a, b, ids) in zip(steps, made, strict=True):
        a, b = a.to(device, non_blocking=True), b.to(device, non_blocking=True)
        yield Batch(step, a, b, ids, nothing)


def _made_there(images: _Images, steps: range, device: torch.device) -> Iterator[Batch]:
    nothing = torch.empty(0, dtype=torch.int64)
    pixels = torch.from_numpy(images.pixels).to(device).permute(0, 3, 1, 2).contiguous()
    for step in steps:
        ids = images.ids(step)
        pair = images.views(pixels[ids.to(device)], ids.numpy(), step // images.per_epoch)
        yield Batch(step, *pair, ids, nothing)


def _optimizer(model: nn.Module) -> LARS:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": other, "weight_decay": 0.0, "adapt": False},
    ]
    return LARS(groups, 0.0, weight_decay=DECAY)


if __name__ == "__main__":
    main()
