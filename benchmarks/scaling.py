"""How step time grows with workers and global batch, and the loss's time and memory with N.

    python -m benchmarks.scaling [--quick] [--workers 1,2,4] [--rounds 2]

The step is the loop's own, fed from memory: ResNet-18 of a quarter width with a strided stem and
the authors' head, views of 32 px, float32, one thread a worker, gloo. Above 256 images gradient
caching keeps batch norm's groups at 256. Worker counts take turns, and what is stored is the median
of steps. The loss is taken alone, on one process with one thread; exponents are fitted from
N = 1,024 on. Writes `benchmarks/results/scaling.json` and `docs/figures/growth.png`; `--quick`
takes a minute or two and writes both to the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.loss import DIM, RETURN_MEMORY, TEMPERATURE
from benchmarks.record import RESULTS, machine
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.nn.losses import NTXentLoss
from simclr_ray.nn.precision import prepare_model
from simclr_ray.optim import build_optimizer
from simclr_ray.train import loop

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
GROUP, FIT_FROM = 256, 1024
STEP_BATCHES, LOSS_BATCHES = (256, 512, 1024, 2048, 4096, 8192), tuple(2**k for k in range(8, 15))
QUICK_STEP_BATCHES, QUICK_LOSS_BATCHES = (256, 512), (256, 1024, 2048, 4096)
Rows = list[dict[str, Any]]


def main() -> None:
    """Measure, store and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of each round; small batches: more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batches = QUICK_STEP_BATCHES if arguments.quick else STEP_BATCHES
    workers = [int(w) for w in arguments.workers.split(",")]
    began = time.perf_counter()
    steps = measure_steps(workers, batches, arguments.rounds, arguments.steps)
    losses = measure_loss(QUICK_LOSS_BATCHES if arguments.quick else LOSS_BATCHES)
    result = {
        "command": "python -m benchmarks.scaling " + " ".join(sys.argv[1:]),
        "wall_s": round(time.perf_counter() - began),
        "threads_per_worker": 1,
        "batch_norm_images": GROUP,
        "oversubscribed_workers": [w for w in workers if w > (os.cpu_count() or 1)],
        "steps": steps,
        "loss": losses,
        "loss_fit": fit(losses),
        **machine(),
    }
    print(json.dumps(result["loss_fit"]))
    scratch = Path(tempfile.gettempdir())
    stored = (scratch if arguments.quick else RESULTS) / "scaling.json"
    stored.write_text(json.dumps(result, indent=1) + "\n")
    image = (scratch if arguments.quick else FIGURES) / "growth.png"
    draw(result, image)
    print(f"{stored}\n{image}")


def experiment(batch_size: int, num_workers: int) -> Experiment:
    """Return the experiment of one point."""
    return Experiment.load(
        "cifar10_resnet18",
        f"batch_size={batch_size}",
        f"batch_norm.group_size={GROUP}",
        "encoder.width=0.25",
        "encoder.stem=strided",
        "precision=float32",
        f"scaling.num_workers={num_workers}",
        "scaling.gpus_per_worker=0",
    )


def measure_steps(workers: list[int], batches: tuple[int, ...], rounds: int, steps: int) -> Rows:
    """Return one row for each number of workers and global batch."""
    taken: dict[tuple[int, int], list[float]] = {(w, n): [] for w in workers for n in batches}
    for _ in range(rounds):
        for w in workers:
            step_seconds = spawn(step_times, w, batches, steps)[0]  # ranks keep in step
            for n, seconds in step_seconds.items():
                taken[w, n] += seconds
    rows: Rows = []
    for (w, n), seconds in taken.items():
        step_s = statistics.median(seconds)
        row: dict[str, Any] = {
            "workers": w,
            "batch_size": n,
            "groups": n // GROUP,
            "measured_steps": len(seconds),
            "step_s": round(step_s, 4),
            "fastest_s": round(min(seconds), 4),
            "slowest_s": round(max(seconds), 4),
            "images_per_s": round(n / step_s, 1),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def step_times(rank: int, batches: tuple[int, ...], steps: int) -> dict[int, list[float]]:
    """Return the seconds of some steps at each global batch, seen from this rank. A collective."""
    keep_freed_memory()  # as a worker of a run does
    return {
        n: _step_times(rank, experiment(n, collectives.world_size()), max(steps, 1024 // n))
        for n in batches
    }


def _step_times(rank: int, exp: Experiment, steps: int) -> list[float]:
    model = build_model(exp)
    prepare_model(model, torch.device("cpu"), exp.precision)
    batch = _batch(exp.local_batch_size(rank), exp.augment.size, seed=rank)
    requests: list[float] = []  # when the loop asks for a batch, it has ended a step

    def batches() -> Iterator[Batch]:
        for step in range(steps + 1):  # the first one warms up
            requests.append(time.perf_counter())
            yield batch._replace(step=step)
        requests.append(time.perf_counter())

    never = 10**9  # reports sweep all pairs once more; a run has one in ten steps or fewer
    loop.train(
        collectives.data_parallel(model),
        build_loss(exp),
        build_optimizer(model, exp.optimizer),
        batches(),
        loop.StepSchedule(never, never, 0, 0.1, exp.batch_size, log_every=never),
        loop.Callbacks(lambda _: None, lambda *_: None, lambda _: None),
        precision=exp.precision,
        seed=exp.seed,
        num_groups=exp.num_groups,
    )
    return [end - start for start, end in pairwise(requests)][1:]


def _batch(num_images: int, size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 3, size, size)
    a, b = (torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in "ab")
    return Batch(0, a, b, torch.arange(num_images), torch.empty(0, dtype=torch.int64))


def measure_loss(batches: tuple[int, ...]) -> Rows:
    """Return one row for each N: time forward and backward, peak memory above the inputs."""
    rows = []
    for n in batches:
        row = {"n": n, "step_s": round(_loss_s(n), 5), "peak_mib": _loss_peak_mib(n)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _loss_s(n: int) -> float:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(n, DIM, generator=generator).requires_grad_() for _ in range(2))
    loss = NTXentLoss(TEMPERATURE)
    taken = []
    for _ in range(2 + max(3, min(10, 2 * 4096 // n))):
        began = time.perf_counter()
        loss(z1, z2).backward()
        taken.append(time.perf_counter() - began)
        z1.grad = z2.grad = None
    return statistics.median(taken[2:])  # the first ones warm up


def _loss_peak_mib(n: int) -> float:
    command = [sys.executable, "-m", "benchmarks.loss", "--threads", "1"]
    command += ["--peak", "simclr_ray", str(n)]
    done = subprocess.run(
        command, env=os.environ | RETURN_MEMORY, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def fit(rows: Rows) -> dict[str, float]:
    """Return the exponents of N in time and memory, and memory as a straight line in N.

    Memory has a part that does not grow, the tiles, so its exponent is the p of a + b·N^p that fits
    best; the plain slope of the logarithms, which takes a for 0, stands beside it.
    """
    fitted = [row for row in rows if row["n"] >= FIT_FROM]
    n, seconds, mib = (np.array([row[k] for row in fitted]) for k in ("n", "step_s", "peak_mib"))
    powers = np.arange(0.3, 2.5, 0.01)
    left = [np.polyfit(n**p, mib, 1, full=True)[1] for p in powers]  # squares, [] for two points
    slope, fixed = np.polyfit(n, mib, 1)
    return {
        "from_n": FIT_FROM,
        "time_exponent": round(float(np.polyfit(np.log(n), np.log(seconds), 1)[0]), 3),
        "memory_exponent": round(float(powers[np.argmin([r.sum() for r in left])]), 2),
        "memory_log_slope": round(float(np.polyfit(np.log(n), np.log(mib), 1)[0]), 3),
        "memory_fixed_mib": round(float(fixed), 2),
        "memory_kib_per_image": round(float(slope) * 1024, 3),
        "memory_line_r2": round(float(np.corrcoef(n, mib)[0, 1] ** 2), 5),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure: images/s, step time, and the loss's growth."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    speed, step, loss = figure.subplots(1, 3)
    _draw_steps(speed, result, "images_per_s", "images/s")
    _draw_steps(step, result, "step_s", "step time (s)")
    step.set_yscale("log")
    speed.set_ylim(bottom=0)
    _draw_loss(loss, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_steps(axis: Axes, result: dict[str, Any], key: str, label: str) -> None:
    cores = result["hardware"]["cores"]
    for w in sorted({row["workers"] for row in result["steps"]}):
        rows = [row for row in result["steps"] if row["workers"] == w]
        name = f"{w} worker{'s' if w > 1 else ''}"
        if w in result["oversubscribed_workers"]:
            name += f" (oversubscribed: {cores} cores)"
        line = "--" if w in result["oversubscribed_workers"] else "-"
        axis.plot([r["batch_size"] for r in rows], [r[key] for r in rows], f"o{line}", label=name)
    axis.set(xlabel="global batch (images)", ylabel=label)
    axis.set_title("ResNet-18 x 0.25, 32 px, one thread a worker", fontsize=10)
    _log2(axis, [row["batch_size"] for row in result["steps"]])
    axis.legend(fontsize=8)


def _draw_loss(axis: Axes, result: dict[str, Any]) -> None:
    rows, fitted = result["loss"], result["loss_fit"]
    n = np.array([row["n"] for row in rows])
    fixed, kib = fitted["memory_fixed_mib"], fitted["memory_kib_per_image"]
    last = rows[-1]
    time_label = f"time, N^{fitted['time_exponent']:.2f} from N = {FIT_FROM:,}"
    memory = axis.twinx()
    lines = [
        *axis.plot(n, [r["step_s"] for r in rows], "o-", color="tab:blue", label=time_label),
        *axis.plot(n, last["step_s"] * (n / n[-1]) ** 2, ":", color="tab:blue", label="N²"),
        *memory.plot(n, [r["peak_mib"] for r in rows], "o-", color="tab:orange", label="memory"),
        *memory.plot(
            n,
            fixed + kib / 1024 * n,
            ":",
            color="tab:orange",
            label=f"{fixed:.1f} MiB + N · {kib:.2f} KiB",
        ),
    ]
    axis.set_yscale("log")
    memory.set_ylim(bottom=0)
    axis.set(xlabel="N (images)", ylabel="loss forward and backward (s)")
    memory.set_ylabel("peak memory above the inputs (MiB)")
    axis.set_title(f"NT-Xent alone, D = {DIM}, one process", fontsize=10)
    _log2(axis, n.tolist())
    axis.legend(handles=lines, fontsize=8)


def _log2(axis: Axes, values: list[int]) -> None:
    ticks = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{v:,}" for v in ticks], fontsize=8)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
