"""Images a second of whole runs while MLflow is slow, gone or locked, interleaved with others.

    python -m benchmarks.tracking_faults [--rounds 5] [--store server|file]

The runs are those of `benchmarks.cost`. A server is disturbed at the proxy before it, from the
first timed step to the last: each answer takes 10 s, or there is none; the database of the other
runs is locked. Each is compared with the undisturbed run of its round and store. Writes
`benchmarks/results/tracking_faults.json`.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.cost import images_per_s
from benchmarks.record import store
from tests.golden.compare import ROOT
from tests.mlflow_server import Proxy, between, free_port, serving

DELAY_S = 10.0


@contextmanager
def locked(storage: Path) -> Iterator[None]:
    """Hold the lock of a run's database."""
    with closing(sqlite3.connect(storage / "mlflow.db", isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def failing(proxy: Proxy, fault: str) -> Iterator[None]:
    """Let a server be `slow` or `gone`."""
    proxy.delay_s = DELAY_S if fault == "slow" else 0.0
    proxy.is_gone = fault == "gone"
    try:
        yield
    finally:
        proxy.delay_s, proxy.is_gone = 0.0, False


def measured(data: Path, round_number: int, proxy: Proxy, store: str) -> dict[str, float]:
    """Return the speed under each fault of a store, or of both, in an order of the round's own."""
    uri = f"tracking.uri={proxy.uri}"
    runs = {
        "server": lambda: images_per_s(ROOT, data, uri),
        "server, slow": lambda: images_per_s(
            ROOT, data, uri, disturbed=lambda _: failing(proxy, "slow")
        ),
        "server, gone": lambda: images_per_s(
            ROOT, data, uri, disturbed=lambda _: failing(proxy, "gone")
        ),
        "file": lambda: images_per_s(ROOT, data),
        "file, locked": lambda: images_per_s(ROOT, data, disturbed=locked),
    }
    runs = {name: run for name, run in runs.items() if name.startswith(store)}
    order = list(runs)[round_number % len(runs) :] + list(runs)[: round_number % len(runs)]
    return {name: runs[name]() for name in order}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", choices=("server", "file"), default="")
    args = parser.parse_args()
    data = Path(os.environ["SIMCLR_RAY_DATA"])
    speeds: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch), free_port()) as uri,
        between(uri) as proxy,
    ):
        for number in range(args.rounds):
            for name, speed in measured(data, number, proxy, args.store).items():
                speeds[name].append(speed)
            print(number, {name: round(v[-1], 1) for name, v in speeds.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    only = f" --store {args.store}" if args.store else ""
    store(f"tracking_faults{only.replace(' --store ', '_')}", {
        "command": f"python -m benchmarks.tracking_faults --rounds {args.rounds}{only}",
        "delay_s": DELAY_S, "rounds": args.rounds,
        "images_per_s": {k: [round(v, 1) for v in values] for k, values in speeds.items()},
        "of_the_undisturbed": {
            name: round(median / medians[name.partition(",")[0]], 4)
            for name, median in medians.items() if "," in name
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()
