"""The same parts on a GPU, where only torch and torchvision are installed; under ten minutes.

    python -m benchmarks.gpu [--device cuda] [--quick]

Parity: loss, batch norm and views on the device against the CPU (`benchmarks.gpu_parity`). Loss:
ours against the lean dense form, time and peak memory; and ours by the side of its tiles. Views:
images a second of batches that lie on the device. Step: the loop's own of ResNet-18 at 32 px and
ResNet-50 at 224 px in bf16, plain and compiled, with views made on the device at each step and with
views that are ready: images a second, share of the device's peak operations, peak memory, seconds
to the first report.
Writes `benchmarks/results/gpu.json`; with `--device cpu` it only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_parity import parity
from benchmarks.loss import lean_dense
from benchmarks.record import median, store
from simclr_ray.augment import TwoViews, ViewPair
from simclr_ray.data.batch import Batch
from simclr_ray.nn import ntxent, precision
from simclr_ray.nn.heads import mlp_head
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.resnet import ResNet
from simclr_ray.optim import LARS
from simclr_ray.train import loop

DIM, TEMPERATURE = 128, 0.1
TILES = (1024, 2048, 4096, 8192)
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, by the makers' data sheets


class Case(NamedTuple):
    """A training step."""

    name: str
    depth: int
    stem: Literal["imagenet", "cifar", "strided"]
    size: int
    batch: int
    strength: float
    blur: float
    layers: int  # of the head


CASES = (
    Case("ResNet-18, 32 px", 18, "cifar", 32, 512, 0.5, 0.0, 3),
    Case("ResNet-50, 224 px", 50, "imagenet", 224, 256, 1.0, 0.5, 2),
)
QUICK = (Case("ResNet-10, 32 px", 10, "strided", 32, 16, 0.5, 0.5, 2),)


class Model(nn.Module):
    """Encoder and head: images -> (h, z)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.encoder: nn.Module = ResNet(case.depth, 1.0, case.stem)
        width = 512 if case.depth < 50 else 2048
        self.head = mlp_head(width, DIM, case.layers)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and z."""
        h = self.encoder(images)
        return h, self.head(h)


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device, quick = torch.device(arguments.device), arguments.quick
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"command": f"python -m benchmarks.gpu --device {device}"}
    parts: dict[str, Callable[[], Any]] = {
        "parity": partial(parity, device),
        "loss": lambda: [loss(device, n) for n in ((256,) if quick else (4096, 16384, 65536))],
        "tiles": lambda: [tiles(device, n) for n in ((256,) if quick else (4096, 65536))],
        "views": lambda: [views(device, case, quick=quick) for case in (QUICK if quick else CASES)],
        "step": lambda: [
            step(device, case, quick=quick, compiled=compiled)
            for case in (QUICK if quick else CASES)
            for compiled in (False, True)
        ],
    }
    for name, part in parts.items():
        began = time.perf_counter()
        result[name] = part()
        print(name, f"{time.perf_counter() - began:.0f} s", json.dumps(result[name]), flush=True)
        if device.type == "cuda" and not quick:  # what is measured stays if the rest is cut off
            store("gpu", result)


def loss(device: torch.device, n: int) -> dict[str, Any]:
    """Return seconds and MiB of forward and backward over N images, of each form that fits."""
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "simclr_ray": NTXentLoss(TEMPERATURE, global_batch_size=n),
        "dense": lean_dense,
    }
    measured: dict[str, Any] = {"n": n}
    for name, form in forms.items():
        z1, z2 = (torch.randn(n, DIM, device=device, requires_grad=True) for _ in "ab")

        def turn(
            form: Callable[[Tensor, Tensor], Tensor] = form, z1: Tensor = z1, z2: Tensor = z2
        ) -> None:
            z1.grad = z2.grad = None
            form(z1, z2).backward()  # type: ignore[no-untyped-call] # torch's

        try:
            seconds, mib = timed(turn, device)
            measured[name] = {"step_s": seconds, "peak_mib": mib}
        except torch.OutOfMemoryError:
            measured[name] = "out of memory"
    return measured


def tiles(device: torch.device, n: int) -> dict[str, Any]:
    """Return seconds and MiB of the loss by the side of its tiles."""
    before, measured = ntxent.TILE, {}
    for side in TILES:
        ntxent.TILE = side
        z1, z2 = (torch.randn(n, DIM, device=device, requires_grad=True) for _ in "ab")
        form = NTXentLoss(TEMPERATURE, global_batch_size=n)

        def turn(form: NTXentLoss = form, z1: Tensor = z1, z2: Tensor = z2) -> None:
            z1.grad = z2.grad = None
            form(z1, z2).backward()

        seconds, mib = timed(turn, device, 3)
        measured[str(side)] = {"step_s": seconds, "peak_mib": mib}
    ntxent.TILE = before
    return {"n": n, **measured}


def views(device: torch.device, case: Case, *, quick: bool) -> dict[str, Any]:
    """Return images a second, both views, from images that lie on the device."""
    side = case.size if case.size <= 64 else 256
    shape = (case.batch, 3, side, side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    pipeline = TwoViews.simclr(case.size, case.strength, case.blur)
    ids, epochs = np.arange(case.batch), iter(range(10**6))
    seconds, mib = timed(lambda: pipeline(pixels, ids, next(epochs)), device, 2 if quick else 10)
    return {"case": case.name, "images_per_s": round(case.batch / seconds, 1), "peak_mib": mib}


def step(device: torch.device, case: Case, *, quick: bool, compiled: bool) -> dict[str, Any]:
    """Return images a second of the loop, views made on the device at each step, and ready."""
    torch.manual_seed(0)
    model = Model(case)
    precision.prepare_model(model, device, "bf16")
    operations = _operations(model, case, device)
    if compiled:
        model.encoder = torch.compile(model.encoder)  # type: ignore[assignment] # a module as well
    side = case.size if case.size <= 64 else 256
    shape = (case.batch, 3, side, side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    pipeline, ids = TwoViews.simclr(case.size, case.strength, case.blur), np.arange(case.batch)
    steps = 6 if quick else 60
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ready, first_report_s = _rate(model, case, [pipeline(pixels, ids, 0)] * steps, every=steps // 6)
    made = (pipeline(pixels, ids, k) for k in range(steps))
    rate, _ = _rate(model, case, made, every=steps // 6)
    peak = next((p for name, p in PEAK_BF16.items() if name in _name(device)), None)
    return {
        "case": case.name,
        "compiled": compiled,
        "images_per_s": rate,
        "images_per_s_views_ready": ready,
        "flop_utilisation": peak and round(ready / case.batch * operations / peak, 4),
        "first_report_s": round(first_report_s, 1),
        "peak_mib": _peak_mib(device),
    }


def _rate(
    model: Model, case: Case, pairs: Iterable[ViewPair], *, every: int
) -> tuple[float, float]:
    """Return the median images a second of the loop, and the seconds to its first report."""
    steps = 6 * every
    ids, nothing = torch.arange(case.batch), torch.empty(0, dtype=torch.int64)
    reports: list[tuple[float, float]] = []
    began = time.perf_counter()
    loop.train(
        model,
        NTXentLoss(TEMPERATURE, global_batch_size=case.batch),
        LARS(model.parameters(), 0.1),
        (Batch(k, *pair, ids, nothing) for k, pair in enumerate(pairs)),
        loop.StepSchedule(steps, steps, 0, 0.1, case.batch, every),
        loop.Callbacks(
            lambda m: reports.append((time.perf_counter(), m.images_per_s)),
            lambda *_: None,
            lambda _: None,
        ),
        precision="bf16",
    )
    return median([rate for _, rate in reports[1:]], 1), reports[0][0] - began


def _operations(model: Model, case: Case, device: torch.device) -> float:
    """Return the floating-point operations of a step: of two images, times as many as there are."""
    counter = FlopCounterMode(display=False)
    with counter:
        x = torch.zeros(2, 3, case.size, case.size, device=device)
        model(x)[1].sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) * case.batch  # two views an image, two images counted


def timed(
    turn: Callable[[], object], device: torch.device, rounds: int = 10
) -> tuple[float, float]:
    """Return the median seconds of a call, the first two left out, and the peak MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(rounds + 2):
        _wait(device)
        began = time.perf_counter()
        turn()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return median(taken[2:], 6), _peak_mib(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_mib(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
