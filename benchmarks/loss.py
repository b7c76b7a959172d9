"""NT-Xent forward and backward against the forms that others use: time, memory, error.

    python -m benchmarks.loss [--batches 1024,4096,8192] [--threads 2] [--rounds 5] [--largest N]

Times are medians of rounds in which every form takes its turn, in one process. Memory is the
high-water mark above the inputs, each form in a process of its own whose freed blocks go back at
once. Peers that are not installed are left out and named. Writes `benchmarks/results/loss.json`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import store
from simclr_ray.nn.losses import NTXentLoss

Loss = Callable[[Tensor, Tensor], Tensor]
DIM, TEMPERATURE = 128, 0.1
# freed blocks go back to the system at once, so that the high-water mark is what is alive
RETURN_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def dense(z1: Tensor, z2: Tensor) -> Tensor:
    """The textbook: a masked 2N x 2N matrix and a cross entropy."""
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(s, (torch.arange(2 * n) + n) % (2 * n))


def lean_dense(z1: Tensor, z2: Tensor) -> Tensor:
    """The matrix once, its diagonal written in place, and a log-sum-exp."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z / TEMPERATURE) @ z.T
    s.fill_diagonal_(float("-inf"))
    a, b = z.chunk(2)
    return torch.logsumexp(s, 1).mean() - (a * b).sum(1).mean() / TEMPERATURE


class _Tiles(torch.autograd.Function):
    """All tiles forward and again backward, as Inf-CL (arXiv:2410.17243) does on GPUs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, tile: int) -> Tensor:
        lse = torch.full((len(z),), float("-inf"))
        for i in range(0, len(z), tile):
            for j in range(0, len(z), tile):
                s = _tile(z, i, j, tile)
                lse[i : i + tile] = torch.logaddexp(lse[i : i + tile], s.logsumexp(1))
        ctx.save_for_backward(z, lse)
        ctx.tile = tile  # type: ignore[attr-defined] # torch declares none
        return lse

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        z, lse = ctx.saved_tensors  # type: ignore[attr-defined] # torch declares none
        tile: int = ctx.tile  # type: ignore[attr-defined] # torch declares none
        scaled, gradient = z / TEMPERATURE, torch.zeros_like(z)
        for i in range(0, len(z), tile):
            for j in range(0, len(z), tile):
                s = _tile(z, i, j, tile)
                p = s.sub_(lse[i : i + tile, None]).exp_().mul_(upstream[i : i + tile, None])
                gradient[i : i + tile] += p @ scaled[j : j + tile]
                gradient[j : j + tile] += p.T @ scaled[i : i + tile]
        return gradient, None


def _tile(z: Tensor, i: int, j: int, tile: int) -> Tensor:
    s = (z[i : i + tile] / TEMPERATURE) @ z[j : j + tile].T
    return s.fill_diagonal_(float("-inf")) if i == j else s


def tiled(z1: Tensor, z2: Tensor) -> Tensor:
    """Tiles with recomputation, without the symmetry."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    a, b = z.chunk(2)
    lse: Tensor = _Tiles.apply(z, 1024)
    return lse.mean() - (a * b).sum(1).mean() / TEMPERATURE


@cache
def forms() -> dict[str, Loss]:
    """Return every form that can run here."""
    losses: dict[str, Loss] = {
        "simclr_ray": NTXentLoss(TEMPERATURE),
        "dense": dense,
        "lean_dense": lean_dense,
        "tiled": tiled,
    }
    try:
        losses["lightly"] = importlib.import_module("lightly.loss").NTXentLoss(TEMPERATURE)
    except ImportError:
        print("lightly is not installed: left out", file=sys.stderr)
    return losses


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="256,1024,4096,8192")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--largest", type=int, default=65536, help="N of one more, its memory alone"
    )
    parser.add_argument("--peak", nargs=2, metavar=("FORM", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        form, n = arguments.peak
        print(_peak_mib(forms()[form], int(n)))
        return
    rows: list[dict[str, Any]] = []
    for n in map(int, arguments.batches.split(",")):
        times = _times(n, arguments.rounds)
        for name in times:
            row = {"form": name, "n": n, "step_s": times[name], "peak_mib": _peak(name, n)}
            row |= _errors(forms()[name], n) if n <= 1024 else {}
            rows.append(row)
            print(json.dumps(row), flush=True)
    largest = arguments.largest
    rows.append({"form": "simclr_ray", "n": largest, "peak_mib": _peak("simclr_ray", largest)})
    result = {
        "command": "python -m benchmarks.loss " + " ".join(sys.argv[1:]),
        "threads": arguments.threads,
        "dim": DIM,
        "rows": rows,
        "ratios": {
            f"{n}": {o: _ratio(rows, n, o) for o in forms() if o != "simclr_ray"}
            for n in map(int, arguments.batches.split(","))
        },
    }
    store("loss", result)


def _ratio(rows: list[dict[str, Any]], n: int, other: str) -> float:
    seconds = {r["form"]: r["step_s"] for r in rows if r["n"] == n and "step_s" in r}
    return round(float(seconds["simclr_ray"] / seconds[other]), 3)


def _inputs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, DIM, generator=generator)
    return a.requires_grad_(), (
        a.detach() + torch.randn(n, DIM, generator=generator)
    ).requires_grad_()


def _times(n: int, rounds: int) -> dict[str, float]:
    z1, z2 = _inputs(n)
    taken: dict[str, list[float]] = {name: [] for name in forms()}
    for turn in range(rounds + 1):  # the first round warms up
        for name, loss in forms().items():
            z1.grad = z2.grad = None
            began = time.perf_counter()
            loss(z1, z2).backward()  # type: ignore[no-untyped-call] # torch's
            if turn:
                taken[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(t), 5) for name, t in taken.items()}


def _errors(loss: Loss, n: int) -> dict[str, float]:
    z1, z2 = _inputs(n)
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    reference = lean_dense(*exact)
    reference.backward()  # type: ignore[no-untyped-call] # torch's
    value = loss(z1, z2)
    value.backward()  # type: ignore[no-untyped-call] # torch's
    gradient, exact_gradient = (
        torch.cat([z.grad.double() for z in p if z.grad is not None]) for p in ((z1, z2), exact)
    )
    return {
        "loss_error": abs(value.item() - reference.item()),
        "gradient_error": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
    }


def _peak(form: str, n: int) -> float:
    command = [sys.executable, "-m", "benchmarks.loss", "--peak", form, str(n)]
    done = subprocess.run(
        command, env=os.environ | RETURN_MEMORY, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])  # peers print while they are imported


def _peak_mib(loss: Loss, n: int) -> float:
    small = _inputs(64)
    for _ in range(2):
        loss(*small).backward()  # type: ignore[no-untyped-call] # torch's
    z1, z2 = _inputs(n)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    loss(z1, z2).backward()  # type: ignore[no-untyped-call] # torch's
    return round(_status_mib("VmHWM") - before, 1)


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
