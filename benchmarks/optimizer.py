"""A LARS step on ResNet-50's parameters against SGD and other libraries' LARS.

    python -m benchmarks.optimizer [--threads 2] [--rounds 15]

Medians of rounds in which every form takes its turn, in one process. Peers that are not installed
are left out and named. Writes `benchmarks/results/optimizer.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import store
from simclr_ray.config.experiment import ResNetConfig
from simclr_ray.nn.build import build_encoder
from simclr_ray.optim import LARS

RATE, MOMENTUM, DECAY, TRUST = 4.8, 0.9, 1e-6, 1e-3
Build = Callable[[list[Tensor], list[Tensor]], torch.optim.Optimizer]


def forms() -> dict[str, Build]:
    """Return every optimizer that can run here, made from (decayed, other) parameters."""

    def groups(decayed: list[Tensor], other: list[Tensor], **more: object) -> list[dict[str, Any]]:
        return [{"params": decayed}, {"params": other, "weight_decay": 0.0, **more}]

    def sgd(**options: bool) -> Build:
        return lambda d, o: torch.optim.SGD(
            groups(d, o), RATE, MOMENTUM, weight_decay=DECAY, **options
        )

    def lars_of_package(*, fused: bool) -> Build:
        return lambda d, o: LARS(
            groups(d, o, adapt=False),
            RATE,
            MOMENTUM,
            weight_decay=DECAY,
            trust_coefficient=TRUST,
            fused=fused,
        )

    builds: dict[str, Build] = {
        "simclr_ray": lars_of_package(fused=True),
        "simclr_ray, foreach": lars_of_package(fused=False),
        "sgd": sgd(foreach=False),
        "sgd, foreach": sgd(foreach=True),
        "sgd, fused": sgd(fused=True),
    }
    try:
        lars = importlib.import_module("lightly.utils.lars").LARS
        builds["lightly"] = lambda d, o: lars(
            groups(d, o), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST
        )
    except ImportError:
        print("lightly is not installed: left out", file=sys.stderr)
    try:
        timm = partial(
            importlib.import_module("timm.optim").Lars,
            lr=RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            trust_coeff=TRUST,
        )
        builds["timm"] = lambda d, o: timm(groups(d, o), foreach=False)
        builds["timm, foreach"] = lambda d, o: timm(groups(d, o), foreach=True)
    except ImportError:
        print("timm is not installed: left out", file=sys.stderr)
    return builds


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    optimizers = {name: build(*_parameters()) for name, build in forms().items()}
    taken: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(arguments.rounds + 2):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                taken[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(t) for name, t in taken.items()}
    mine = seconds["simclr_ray"]
    result = {
        "command": "python -m benchmarks.optimizer " + " ".join(sys.argv[1:]),
        "threads": arguments.threads,
        "step_ms": {name: round(1e3 * s, 2) for name, s in seconds.items()},
        "ratio": {n: round(mine / s, 3) for n, s in seconds.items() if n != "simclr_ray"},
    }
    store("optimizer", result)
    print(json.dumps({k: result[k] for k in ("step_ms", "ratio")}, indent=1))


def _parameters() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    parameters = list(build_encoder(ResNetConfig(depth=50)).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-2
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


if __name__ == "__main__":
    main()
