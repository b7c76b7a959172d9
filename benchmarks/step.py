"""Whole training steps: a run under Ray Train against the loop alone and against a lightly script.

    python -m benchmarks.step PARQUET [--width 1.0] [--precision float32] [--batch 512]
        [--steps 20] [--log-every 5] [--rounds 3] [--forms ray,torchrun,lightly,lightly_ddp]

`torchrun` is the same loop under torchrun, two ranks, fed with the same views from memory: what Ray
and the stream cost is the difference. `lightly` is a plain script as its documentation has it, with
a DataLoader of two workers on the same parquet, the same encoder, head, batch and precision, in
one process with two threads; `lightly_ddp` the same in two processes with one loader worker each,
with gathered negatives. Every form uses two cores and is a process of its own; rounds take turns.
Counted are source images a second over the same first steps, the median over the reports of a run
without the first, then over rounds. Writes `benchmarks/results/step_WIDTH_PRECISION.json`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as td
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.record import portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batches import BatchBuilder, build_plan, build_views
from simclr_ray.data.source import Source
from simclr_ray.distributed import collectives
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.nn.build import build_model
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.precision import prepare_model
from simclr_ray.nn.resnet import ResNet
from simclr_ray.optim import build_optimizer
from simclr_ray.train import loop
from simclr_ray.train.driver import pretrain

WORKERS = 2
TEMPERATURE = 0.5


class Settings(argparse.Namespace):
    """The command line."""

    parquet: str
    depth: int
    width: float
    stem: Literal["imagenet", "cifar", "strided"]
    size: int
    precision: str
    batch: int
    steps: int
    log_every: int
    rounds: int
    forms: str
    child: str


def main() -> None:
    """Measure and store; or, as a child, run one form once."""
    settings = parse(sys.argv[1:])
    if settings.child:
        CHILDREN[settings.child](settings)
        return
    rounds: dict[str, list[float]] = {form: [] for form in settings.forms.split(",")}
    for _ in range(settings.rounds):
        for form in rounds:
            rounds[form].append(one(form))
            print(form, rounds[form][-1], flush=True)
    medians = {form: round(statistics.median(rates), 2) for form, rates in rounds.items()}
    result = {
        "command": "python -m benchmarks.step " + " ".join(map(portable, sys.argv[1:])),
        "encoder": f"ResNet-{settings.depth} x {settings.width}, {settings.stem} stem",
        "precision": settings.precision,
        "images_per_s": medians,
        "rounds": rounds,
        "ratio": {f: round(medians["ray"] / v, 3) for f, v in medians.items() if "ray" in medians},
    }
    store(f"step_{settings.width:g}_{settings.precision}", result)
    print(json.dumps({k: result[k] for k in ("images_per_s", "ratio")}, indent=1))


def parse(arguments: list[str]) -> Settings:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--stem", default="cifar")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", default="ray,torchrun,lightly,lightly_ddp")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments, namespace=Settings())


def one(form: str) -> float:
    """Run one form in processes of its own and return its images a second."""
    arguments = ["-m", "benchmarks.step", *sys.argv[1:], "--child", form]
    launch = [sys.executable]
    if form in ("torchrun", "lightly_ddp"):
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}"]
    done = subprocess.run(
        [*launch, *arguments], check=False, capture_output=True, text=True, env=_environment(form)
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RATE ")]
    if done.returncode or not lines:
        raise SystemExit(f"{form} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(lines[-1].split()[1])


def _environment(form: str) -> dict[str, str]:
    threads = str(WORKERS if form == "lightly" else 1)
    return os.environ | {"OMP_NUM_THREADS": threads}


def experiment(settings: Settings, storage: str) -> Experiment:
    """Return what every form trains, as ours names it."""
    tree: dict[str, Any] = {
        "name": "step",
        "data": {"train": settings.parquet},
        "augment": {"size": settings.size, "strength": 0.5, "blur": 0.0},
        "encoder": {
            "name": "resnet",
            "depth": settings.depth,
            "width": settings.width,
            "stem": settings.stem,
        },
        "head": {"name": "mlp", "layers": 2, "dim": 128},
        "loss": {"temperature": TEMPERATURE},
        "optimizer": {"name": "lars", "weight_decay": 1e-4},
        "schedule": {"learning_rate": 0.3, "warmup_epochs": 0.0},
        "batch_size": settings.batch,
        "precision": settings.precision,
        "evaluation": {"every_epochs": 0},
        "checkpoint": {"every_epochs": 1000},
        "scaling": {"num_workers": WORKERS, "threads_per_worker": 1},
        "tracking": {"log_every_steps": settings.log_every},
        "storage": storage,
    }
    rows = min(settings.steps * settings.batch, Source.open(settings.parquet).num_rows)
    tree["data"]["limit"] = rows
    per_epoch = cfg.validate(Experiment, tree).steps_per_epoch(rows)
    return cfg.validate(Experiment, tree | {"epochs": -(-settings.steps // per_epoch)})


def ray(settings: Settings) -> None:
    """Train under Ray Train, two workers, as `simclr-ray pretrain` does."""
    with tempfile.TemporaryDirectory() as storage:
        run = pretrain(experiment(settings, storage))
        lines = (Path(run.folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    reports = [r for r in records if "train/images_per_s" in r and r["step"] <= settings.steps]
    say([r["train/images_per_s"] for r in reports])


def torchrun(settings: Settings) -> None:
    """Run the same loop on the same views, made beforehand."""
    td.init_process_group("gloo")
    torch.set_num_threads(1)
    keep_freed_memory()
    trained = experiment(settings, "unused")
    source = Source.open(settings.parquet, limit=trained.data.limit)
    places = collectives.partition(trained.batch_size, collectives.rank(), WORKERS)
    plan = build_plan(trained, source)
    builder = BatchBuilder(source, plan, build_views(trained.augment, 0), trained.data, places)
    made = [builder.make(step) for step in range(min(8, settings.steps))]
    batches = (made[step % len(made)]._replace(step=step) for step in range(settings.steps))
    model = build_model(trained)
    prepare_model(model, torch.device("cpu"), trained.precision)
    rates: list[float] = []
    loop.train(
        collectives.data_parallel(model),
        NTXentLoss(TEMPERATURE, global_batch_size=trained.batch_size),
        build_optimizer(model, trained.optimizer),
        batches,
        loop.StepSchedule(
            settings.steps, settings.steps, 0, 0.6, trained.batch_size, settings.log_every
        ),
        loop.Callbacks(
            lambda metrics: rates.append(metrics.images_per_s), lambda *_: None, lambda _: None
        ),
        precision=trained.precision,
    )
    if collectives.rank() == 0:
        say(rates)


class Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The parquet's encoded images, decoded and transformed one by one, twice."""

    def __init__(self, settings: Settings) -> None:
        transforms: Any = importlib.import_module("lightly.transforms")
        paths = sorted(Path(settings.parquet).rglob("*.parquet")) or [Path(settings.parquet)]
        self.encoded: list[bytes] = [
            e for p in paths for e in pq.read_table(p, columns=["image"])["image"].to_pylist()
        ]
        self.transform = transforms.SimCLRTransform(
            input_size=settings.size, cj_strength=0.5, gaussian_blur=0.0
        )

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.transform(Image.open(io.BytesIO(self.encoded[index])).convert("RGB"))
        return a, b


def lightly(settings: Settings) -> None:
    """Train as lightly's SimCLR example does: DataLoader, NTXentLoss, LARS."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        td.init_process_group("gloo")
    torch.set_num_threads(WORKERS // ranks)
    keep_freed_memory()  # as ours do
    images = Images(settings)
    loader = DataLoader(
        images,
        batch_size=settings.batch // ranks,
        shuffle=ranks == 1,
        sampler=DistributedSampler(images) if ranks > 1 else None,
        num_workers=WORKERS // ranks,
        drop_last=True,
        persistent_workers=True,
    )
    model: nn.Module = _LightlyModel(settings)
    if ranks > 1:
        model = DistributedDataParallel(model)
    criterion: Any = importlib.import_module("lightly.loss").NTXentLoss(
        TEMPERATURE, gather_distributed=ranks > 1
    )
    optimizer: Any = importlib.import_module("lightly.utils.lars").LARS(
        model.parameters(), lr=0.6, momentum=0.9, weight_decay=1e-4
    )
    half = settings.precision == "bf16"
    rates, began = [], time.perf_counter()
    for step, (a, b) in enumerate(_endless(loader), start=1):
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            z1, z2 = model(torch.cat([a, b])).chunk(2)
        criterion(z1.float(), z2.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % settings.log_every == 0:
            now = time.perf_counter()
            rates.append(settings.batch * settings.log_every / (now - began))
            began = now
        if step == settings.steps:
            break
    if int(os.environ.get("RANK", "0")) == 0:
        say(rates)


class _LightlyModel(nn.Module):
    """Our encoder with torch's batch norm, lightly's head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        heads: Any = importlib.import_module("lightly.models.modules.heads")
        self.encoder = ResNet(settings.depth, settings.width, settings.stem, nn.BatchNorm2d)
        width = self.encoder.feature_dim
        self.head = heads.SimCLRProjectionHead(width, width, 128, num_layers=2)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        z: torch.Tensor = self.head(self.encoder(x))
        return z


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def say(rates: list[float]) -> None:
    """Print the run's figure, where the parent looks for it."""
    print(f"RATE {np.median(rates[1:]):.3f}", flush=True)


CHILDREN: dict[str, Callable[[Settings], None]] = {
    "ray": ray,
    "torchrun": torchrun,
    "lightly": lightly,
    "lightly_ddp": lightly,
}


if __name__ == "__main__":
    main()
