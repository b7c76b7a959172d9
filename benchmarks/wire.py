"""Bytes on the wire of one NT-Xent step over gloo processes, against gathering with gradient.

    python -m benchmarks.wire [--batches 1024,4096,1023] [--ranks 4] [--steps 2] [--rounds 3]

What is counted is the kernel's: the loopback interface's byte counter over some steps of forward
and backward, less that of the same barriers without steps, TCP's and IP's own bytes included. As
root (or under `unshare -rn`) the processes live in a network namespace of their own, where nobody
else's traffic counts; elsewhere the machine's loopback is read, and the result says so. Ours is
counted with shared memory off, as between machines, and on.

Every form must also give the loss and gradient of one process, in float64. Peers that are not
installed are left out and named. Writes `benchmarks/results/wire.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import importlib
import json
import os
import socket
import statistics
import struct
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as td
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.loss import DIM, TEMPERATURE, Loss, lean_dense
from benchmarks.record import store
from simclr_ray.distributed import collectives, shared_memory
from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.losses import NTXentLoss

BASE, OWN_FORMS = "gather with gradient", ("simclr_ray", "simclr_ray, batch known")
# From the kernel's sched.h, sockios.h and if.h.
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1


class Share(NamedTuple):
    """One rank's measures of one form at one batch; arrays: tensors die with the process."""

    bytes_per_step: float  # all ranks together
    loss: float  # float64, this rank's part
    gradient: NDArray[np.float64]  # [2, n, D], R times the global mean's
    autocast_difference: float  # relative; NaN for others' forms


def gather_with_gradient(n: int) -> Loss:
    """Every rank takes the whole loss of z gathered with autograd; uneven ranks pad and cut."""
    from torch.distributed.nn.functional import all_gather

    shares = [
        collectives.partition(n, r, collectives.world_size())
        for r in range(collectives.world_size())
    ]
    counts = [last - first for first, last in shares]

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.stack([z1, z2]), dim=2)  # [2, n, D]
        padded = F.pad(z, (0, 0, 0, max(counts) - len(z1)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # to be renamed in a later torch
            everyone = all_gather(padded)  # type: ignore[no-untyped-call] # torch's
        parts = [part[:, :count] for part, count in zip(everyone, counts, strict=True)]
        return lean_dense(*torch.cat(parts, 1))

    return loss


def forms(n: int) -> dict[str, Loss]:
    """Return every form that can take a global batch of `n` here."""
    losses: dict[str, Loss] = {
        "simclr_ray": NTXentLoss(TEMPERATURE),
        "simclr_ray, batch known": NTXentLoss(TEMPERATURE, global_batch_size=n),
        BASE: gather_with_gradient(n),
    }
    with suppress(ImportError):
        lightly = importlib.import_module("lightly.loss").NTXentLoss
        if n % collectives.world_size() == 0:  # its gather takes equal ranks only
            losses["lightly"] = lightly(TEMPERATURE, gather_distributed=True)
    return losses


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1024,4096,1023")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    batches = [int(n) for n in arguments.batches.split(",")]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a network of one's own has no names
    private = enter_private_network()
    rows = []
    for shared in (False, True):
        ranks = spawn(
            measure, arguments.ranks, batches, arguments.steps, arguments.rounds, shared=shared
        )
        for n in batches:
            rows += summary(n, [rank[n] for rank in ranks], shared=shared)
    for row in rows:
        print(json.dumps(row))
    peers = _peers(batches, arguments.ranks)
    print(json.dumps(peers))
    result = {
        "command": "python -m benchmarks.wire " + " ".join(sys.argv[1:]),
        "counted": "loopback of a network namespace of its own"
        if private
        else "the machine's loopback: others' traffic counts too",
        "ranks": arguments.ranks,
        "dim": DIM,
        "rows": rows,
        "peers": peers,
    }
    store("wire", result)


def enter_private_network() -> bool:
    """Move this process to a network with nothing but loopback; return whether that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    return True


def measure(
    rank: int, batches: list[int], steps: int, rounds: int, *, shared: bool
) -> dict[int, dict[str, Share]]:
    """Return what this rank measured, by batch and form; with `shared` memory, of ours only."""
    collectives.allow_shared_memory(allowed=shared)
    if shared and not shared_memory.is_supported():
        raise RuntimeError("shared memory is not supported here")
    shares = {}
    for n in batches:
        first, last = collectives.partition(n, rank, collectives.world_size())
        z1, z2 = (z[first:last].clone().requires_grad_() for z in inputs(n))
        chosen = {name: loss for name, loss in forms(n).items() if not shared or name in OWN_FORMS}
        counts: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(rounds + 1):  # the first round opens connections
            idle = _bytes(None, z1, z2, steps)
            for name, loss in chosen.items():
                sent = _bytes(loss, z1, z2, steps) - idle
                if turn:
                    counts[name].append(sent / steps)
        shares[n] = {
            name: Share(
                statistics.median(counts[name]),
                *_in_float64(loss, z1, z2),
                _autocast_difference(loss, z1, z2) if name in OWN_FORMS else float("nan"),
            )
            for name, loss in chosen.items()
        }
    return shares


def inputs(n: int) -> tuple[Tensor, Tensor]:
    """Return the global z1, z2 [n, D], unequal along n."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(n, DIM, generator=generator) * torch.linspace(0.5, 2, n)[:, None]
    return z1, z1 + torch.randn(n, DIM, generator=generator)


def summary(n: int, ranks: list[dict[str, Share]], *, shared: bool) -> list[dict[str, Any]]:
    """Return one row a form: bytes, their ratio, and differences to one process in float64."""
    one_process = _step(NTXentLoss(TEMPERATURE), *_double(inputs(n)))
    dense = _step(lean_dense, *_double(inputs(n)))
    base = ranks[0][BASE].bytes_per_step if not shared else float("nan")
    rows = []
    for name in ranks[0]:
        shares = [rank[name] for rank in ranks]
        loss = statistics.mean(share.loss for share in shares)
        gradient = np.concatenate([share.gradient for share in shares], 1) / len(ranks)
        row: dict[str, Any] = {"form": name, "n": n, "shared_memory": shared}
        row["bytes_per_step"] = round(shares[0].bytes_per_step)
        if not shared:
            row["ratio"] = round(shares[0].bytes_per_step / base, 4)
        for key, (value, expected) in {"one_process": one_process, "dense": dense}.items():
            error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
            row[f"loss_difference_{key}"] = abs(loss - value)
            row[f"gradient_difference_{key}"] = float(error)
        if name in OWN_FORMS:
            row["autocast_difference"] = max(share.autocast_difference for share in shares)
        rows.append(row)
    return rows


def _peers(batches: list[int], ranks: int) -> dict[str, str]:
    """Return what stands for whom: a version, or why there is no row."""
    try:
        version = {"lightly": metadata.version("lightly")}
    except metadata.PackageNotFoundError:
        return {"lightly": "not installed: left out"}
    uneven = [n for n in batches if n % ranks]
    return version | {f"lightly at {n}": "left out: its gather takes equal ranks" for n in uneven}


def _bytes(loss: Loss | None, z1: Tensor, z2: Tensor, steps: int) -> int:
    td.barrier()
    before = _loopback_bytes()
    td.barrier()
    for _ in range(steps if loss else 0):
        assert loss is not None
        loss(z1, z2).backward()  # type: ignore[no-untyped-call] # torch's
    td.barrier()
    return _loopback_bytes() - before


def _loopback_bytes() -> int:
    """Return the bytes that loopback has received; what it sent is the same number."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")


def _double(views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    z1, z2 = (z.detach().double().requires_grad_() for z in views)
    return z1, z2


def _in_float64(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[float, NDArray[np.float64]]:
    return _step(loss, *_double((z1, z2)))


def _step(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[float, NDArray[np.float64]]:
    """Return the loss and its gradient [2, n, D]."""
    value = loss(z1, z2)
    gradients = torch.autograd.grad(value, (z1, z2))
    return value.item(), torch.stack(gradients).double().numpy()


def _autocast_difference(loss: Loss, z1: Tensor, z2: Tensor) -> float:
    """Return the larger relative difference of loss and gradient, forward and backward inside."""
    steps = []
    contexts: list[AbstractContextManager[object]] = [
        nullcontext(),
        torch.autocast("cpu", torch.bfloat16),
    ]
    for context in contexts:
        with context:
            steps.append(_step(loss, z1, z2))
    (plain, gradient), (value, other) = steps
    error = float(np.linalg.norm(gradient - other) / np.linalg.norm(gradient))
    return max(abs(plain - value) / abs(plain), error)


if __name__ == "__main__":
    main()
