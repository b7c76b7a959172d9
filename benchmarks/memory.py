"""Peak memory of one training step by gradient caching, against a plain step on one group.

    python -m benchmarks.memory [--batch 8192] [--images 256] [--width 1.0] [--threads 2]

Both steps are the loop's own, with its report: the preset cifar10_resnet18 on one CPU worker in
float32, once with `batch_size` = BATCH and `batch_norm.group_size` = IMAGES, once with
`batch_size` = IMAGES. The peak is the process's high-water mark, of all it holds: libraries,
weights, gradients, LARS's momenta, and the step's uint8 views. Each case has a process of its own,
after one small step, and freed blocks go back at once; `--keep-freed` keeps them, as a worker of a
run does.
Writes `benchmarks/results/memory.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss import RETURN_MEMORY
from benchmarks.record import store
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.nn.precision import prepare_model
from simclr_ray.optim import build_optimizer
from simclr_ray.train import loop

LIMIT_MIB = 1024  # what the large batch may take above the small one
CACHED_COST = 4 / 3  # passes: forward twice and backward, of forward once and backward


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep-freed", action="store_true")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        torch.set_num_threads(arguments.threads)
        if arguments.keep_freed:
            keep_freed_memory()
        print(json.dumps(peak(experiment(arguments.case, arguments.images, arguments.width))))
        return
    small = _in_a_process(arguments.images)
    print(json.dumps(small))
    estimate_s = small["step_s"] * arguments.batch / arguments.images * CACHED_COST
    print(
        f"the step of {arguments.batch} images takes at least {estimate_s / 60:.1f} min", flush=True
    )
    large = _in_a_process(arguments.batch)
    print(json.dumps(large))
    above = large["peak_mib"] - small["peak_mib"]
    result = {
        "command": "python -m benchmarks.memory " + " ".join(sys.argv[1:]),
        "threads": arguments.threads,
        "width": arguments.width,
        "freed_memory": "kept" if arguments.keep_freed else "given back",
        "rows": [small, large],
        "above_one_group_mib": round(above, 1),
        "limit_mib": LIMIT_MIB,
        "within_limit": above <= LIMIT_MIB,
    }
    store("memory_kept" if arguments.keep_freed else "memory", result)
    print(json.dumps({k: result[k] for k in ("above_one_group_mib", "limit_mib", "within_limit")}))


def experiment(batch_size: int, images: int, width: float) -> Experiment:
    """Return the preset on one CPU worker."""
    return Experiment.load(
        "cifar10_resnet18",
        f"batch_size={batch_size}",
        f"batch_norm.group_size={images}",
        f"encoder.width={width}",
        "precision=float32",
        "scaling.num_workers=1",
        "scaling.gpus_per_worker=0",
    )


def peak(exp: Experiment) -> dict[str, Any]:
    """Return memory and time of one step of `exp` in this process."""
    model = build_model(exp)
    prepare_model(model, torch.device("cpu"), exp.precision)
    optimizer = build_optimizer(model, exp.optimizer)
    reports: list[tuple[float, float]] = []  # (time, peak so far), after each step
    measured: dict[str, Any] = {"batch_size": exp.batch_size, "groups": exp.num_groups}

    def batches() -> Iterator[Batch]:
        # allocates momenta and wakes the libraries' own buffers; two images a group
        yield _batch(0, 2 * exp.num_groups, exp.augment.size)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        measured["before_mib"] = _status_mib("VmRSS")
        batch = _batch(1, exp.batch_size, exp.augment.size)
        measured["views_mib"] = round((batch.a.nbytes + batch.b.nbytes) / 2**20, 1)
        measured["began"] = time.perf_counter()
        yield batch

    loop.train(
        model,
        build_loss(exp),
        optimizer,
        batches(),
        loop.StepSchedule(2, 2, 0, exp.peak_learning_rate(), exp.batch_size, log_every=1),
        loop.Callbacks(
            lambda _: reports.append((time.perf_counter(), _status_mib("VmHWM"))),
            lambda *_: None,
            lambda _: None,
        ),
        precision=exp.precision,
        seed=exp.seed,
        num_groups=exp.num_groups,
    )
    ended, measured["peak_mib"] = reports[-1]
    return measured | {"step_s": round(ended - measured.pop("began"), 2)}


def _batch(step: int, num_images: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    shape = (num_images, 3, size, size)
    a, b = (torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in "ab")
    return Batch(step, a, b, torch.arange(num_images), torch.empty(0, dtype=torch.int64))


def _in_a_process(batch_size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--case", str(batch_size)]
    kept = "--keep-freed" in sys.argv
    environment = os.environ | ({} if kept else RETURN_MEMORY)
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(round(int(v.split()[1]) / 1024, 1) for v in lines if v.startswith(key))


if __name__ == "__main__":
    main()
