"""From parquet to the worker's tensors: through Ray Data, and through a torch DataLoader.

    python -m benchmarks.stream PARQUET [--epochs 3] [--batch 256] [--rounds 5]

`simclr_ray` is the stream of a rank as a worker takes it, with two data actors. `dataloader, ours`
is a DataLoader of two workers whose item is a whole batch of the same views, made by the same code;
`dataloader, albumentations` one with the fastest peer's transform, image by image. All start
from the same encoded parquet, hand over host tensors, and their consumer does nothing else. Every
form has a process of its own; rounds take turns. Rates are of all batches after the first;
an epoch's gap is the longest wait for the first batch of a later epoch. `run` is the median of
short training runs, for how long their first batch is waited for when all else is ready. Peers that
are not installed are left out and named. Writes `benchmarks/results/stream.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.record import portable, store
from benchmarks.view_peers import albumentations_pair
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import BatchBuilder, build_plan, view_builder
from simclr_ray.data.source import Source
from simclr_ray.distributed.malloc import keep_freed_memory

ACTORS = 2
LONG_PLAN = 200_000  # steps
RUNS = 3
FORMS = ("simclr_ray", "dataloader, ours", "dataloader, albumentations")
Row = dict[str, float]


class Settings(argparse.Namespace):
    """The command line."""

    parquet: str
    epochs: int
    batch: int
    rounds: int
    child: str


def main() -> None:
    """Measure and store; or, as a child, run one form once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    settings = parser.parse_args(namespace=Settings())
    torch.set_num_threads(1)
    if settings.child:
        print("ROW " + json.dumps(CHILDREN[settings.child](settings)), flush=True)
        os._exit(0)  # loaders take seconds to end
    rounds: dict[str, list[Row]] = {form: [] for form in FORMS}
    for _ in range(settings.rounds):
        for form in FORMS:
            rounds[form].append(one(form))
            print(form, json.dumps(rounds[form][-1]), flush=True)
    runs = [one("run") for _ in range(RUNS)]
    rates = {f: round(statistics.median(r["images_per_s"] for r in rounds[f])) for f in FORMS}
    result = {
        "command": "python -m benchmarks.stream " + " ".join(map(portable, sys.argv[1:])),
        "images_per_s": rates,
        "ratio": {form: round(rates["simclr_ray"] / rate, 3) for form, rate in rates.items()},
        "rounds": rounds,
        "long_plan": one("long plan"),
        "run": {key: statistics.median(run[key] for run in runs) for key in runs[0]},
        "runs": runs,
    }
    store("stream", result)
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


def one(form: str) -> Row:
    """Run one form in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stream", *sys.argv[1:], "--child", form]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        raise SystemExit(f"{form} failed:\n{done.stderr[-4000:]}")
    row: Row = json.loads(rows[-1].removeprefix("ROW "))
    return row


def experiment(settings: Settings, **changes: Any) -> Experiment:
    """Return what is streamed."""
    tree: dict[str, Any] = {
        "name": "stream",
        "data": {"train": settings.parquet},
        "augment": {"size": 32, "strength": 0.5, "blur": 0.0},
        "batch_size": settings.batch,
        "epochs": settings.epochs,
        "scaling": {"data_actors_per_worker": ACTORS},
    }
    return cfg.validate(Experiment, tree | changes)


def clocked(batches: Iterator[Any], images: int, per_epoch: int) -> Row:
    """Return the rate, the first wait, and the longest wait at the start of a later epoch."""
    began = time.perf_counter()
    times, waits = [], []
    waiting_since = began
    for _ in batches:
        now = time.perf_counter()
        waits.append(now - waiting_since)
        times.append(now)
        waiting_since = time.perf_counter()
    later = waits[per_epoch::per_epoch]
    return {
        "images_per_s": round(images * (len(times) - 1) / (times[-1] - times[0]), 1),
        "first_batch_s": round(times[0] - began, 2),
        "epoch_gap_s": round(max(later, default=0.0), 4),
        "longest_wait_s": round(max(waits[1:]), 4),
    }


def through_ray(settings: Settings) -> Row:
    """Stream as a worker does."""
    trained = experiment(settings)
    source = Source.open(settings.parquet)
    return _streamed(trained, source, range(trained.total_steps(source.num_rows)))


def long_plan(settings: Settings) -> Row:
    """Open a plan of very many steps and take some batches."""
    source = Source.open(settings.parquet)
    per_epoch = experiment(settings).steps_per_epoch(source.num_rows)
    trained = experiment(settings, epochs=-(-LONG_PLAN // per_epoch))
    return _streamed(trained, source, range(LONG_PLAN), take=20)


def _streamed(trained: Experiment, source: Source, steps: range, take: int = 0) -> Row:
    import ray

    from simclr_ray.data.stream import stream

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR,
        log_to_driver=False,
    )  # fmt: skip
    keep_freed_memory()  # as a worker does
    up = time.perf_counter()
    batches = stream(trained, source, steps, 0, 1)
    if take:
        batches = (batch for _, batch in zip(range(take), batches, strict=False))
    row = clocked(batches, trained.batch_size, trained.steps_per_epoch(source.num_rows))
    row["first_batch_after_init_s"] = row["first_batch_s"]
    row["wall_s"] = round(time.perf_counter() - up, 2)
    row["actors_mib"] = _actors_mib()
    ray.shutdown()  # what its actors have decoded is gone before the next form
    return row


def _actors_mib() -> float:
    """Return the memory that the data actors hold alone, in MiB: shared pages count once."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                total += process.memory_full_info().pss / 2**20
        except psutil.Error:
            continue
    return round(total, 1)


class Batches(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Whole batches of our views by step."""

    def __init__(self, trained: Experiment, source: Source) -> None:
        self.trained, self.source = trained, source
        self.builder: BatchBuilder | None = None

    def __len__(self) -> int:
        return self.trained.total_steps(self.source.num_rows)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.builder is None:  # in the loader's worker
            keep_freed_memory()
            plan, views = build_plan(self.trained, self.source), view_builder(self.trained)
            places = (0, self.trained.batch_size)
            self.builder = BatchBuilder(self.source, plan, views, self.trained.data, places)
        batch = self.builder.make(step)
        return batch.a, batch.b, batch.ids


def own_loader(settings: Settings) -> Row:
    """Make the same batches in a DataLoader."""
    trained = experiment(settings)
    source = Source.open(settings.parquet)
    loader = DataLoader(
        Batches(trained, source), batch_size=None, num_workers=ACTORS, prefetch_factor=4
    )
    return clocked(iter(loader), settings.batch, trained.steps_per_epoch(source.num_rows))


class Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Encoded images, transformed one by one, twice."""

    def __init__(self, settings: Settings) -> None:
        source = Source.open(settings.parquet)
        groups = range(len(source.row_groups))
        self.encoded = [e for g in groups for e in source.read_group(g).images if e is not None]
        self.pair = albumentations_pair(32, 0.5, 0.0, encoded=True)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(self.encoded[index])


def loader_of_albumentations(settings: Settings) -> Row:
    """Make views with albumentations in a DataLoader."""
    loader = DataLoader(
        Images(settings),
        batch_size=settings.batch,
        shuffle=True,
        num_workers=ACTORS,
        prefetch_factor=4,
        drop_last=True,
        persistent_workers=True,
    )

    def epochs() -> Iterator[Any]:
        for _ in range(settings.epochs):
            yield from loader

    return clocked(epochs(), settings.batch, len(loader))


def short_run(settings: Settings) -> Row:
    """Train a small network for a few steps; return what starting took."""
    import ray

    from simclr_ray.train.driver import pretrain

    source = Source.open(settings.parquet)
    with tempfile.TemporaryDirectory() as storage:
        trained = experiment(
            settings,
            storage=storage,
            epochs=1,
            encoder={"name": "resnet", "depth": 10, "width": 0.25, "stem": "strided"},
            evaluation={"every_epochs": 0},
            tracking={"log_every_steps": 10},
            data={"train": settings.parquet, "limit": min(20 * settings.batch, source.num_rows)},
            scaling={"num_workers": 2, "threads_per_worker": 1},
        )
        up: list[float] = []
        first: list[tuple[float, float]] = []

        def watch() -> None:
            while not ray.is_initialized():
                time.sleep(0.01)
            up.append(time.perf_counter())

        def on_progress(record: dict[str, float]) -> None:
            if "start/first_batch_s" in record:
                first.append((time.perf_counter() - up[0], record["start/first_batch_s"]))

        threading.Thread(target=watch, daemon=True).start()
        run = pretrain(trained, on_progress=on_progress)
        records = (Path(run.folder) / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(r).get("train/data_wait_fraction") for r in records]
    return {
        "first_batch_after_init_s": round(first[0][0], 2),
        "first_batch_when_model_is_ready_s": round(first[0][1], 2),
        "data_wait_share": round(float(np.median([s for s in shares if s is not None])), 4),
    }


CHILDREN = {
    "simclr_ray": through_ray,
    "dataloader, ours": own_loader,
    "dataloader, albumentations": loader_of_albumentations,
    "long plan": long_plan,
    "run": short_run,
}


if __name__ == "__main__":
    main()
