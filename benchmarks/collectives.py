"""A batch-norm-sized message between ranks of one machine: through gloo and through shared memory.

    python -m benchmarks.collectives [--ranks 2] [--floats 129]

Each call follows 5 ms of arithmetic, as in a training step, since what costs is waking threads
on busy cores. Writes `benchmarks/results/collectives.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as td

from benchmarks.record import store
from simclr_ray.distributed import collectives
from simclr_ray.distributed.spawn import spawn

CALLS, BLOCKS = 60, 5


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--floats", type=int, default=129)
    arguments = parser.parse_args()
    taken = spawn(measure, arguments.ranks, arguments.floats)[0]
    result = {
        "command": "python -m benchmarks.collectives " + " ".join(sys.argv[1:]),
        "ranks": arguments.ranks,
        "floats": arguments.floats,
        "added_us": {name: round(1e6 * s) for name, s in taken.items()},
    }
    store("collectives", result)
    print(json.dumps(result["added_us"]))


def measure(rank: int, floats: int) -> dict[str, float]:
    """Return the median seconds that one exchange adds to a block of arithmetic."""
    del rank
    vector, square = torch.randn(floats), torch.randn(600, 600)

    def gloo() -> None:
        td.all_reduce(vector.clone())

    def shared() -> None:
        collectives.all_reduce_sum(vector.clone())

    forms: dict[str, Callable[[], None]] = {"nothing": lambda: None, "gloo": gloo, "shared": shared}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(BLOCKS):
        for name, form in forms.items():
            td.barrier()
            began = time.perf_counter()
            for _ in range(CALLS):
                square @ square
                form()
            taken[name].append((time.perf_counter() - began) / CALLS)
    medians = {name: statistics.median(t) for name, t in taken.items()}
    return {name: medians[name] - medians["nothing"] for name in ("gloo", "shared")}


if __name__ == "__main__":
    main()
