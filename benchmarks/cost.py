"""Images a second of whole runs of two commits, in interleaved pairs: what surviving costs.

    python -m benchmarks.cost OLD_COMMIT [NEW_COMMIT] [--pairs 5]

Each is a `pretrain` of two workers with a Ray of its own, with checkpoints, MLflow and everything
that watches a run. What is timed is from step 40 to 200 as the log gets them, so all
that is done between two steps counts. Writes `benchmarks/results/cost.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.record import store
from tests.faults.curves import last_step
from tests.golden.compare import lay_out

FIRST, LAST, BATCH = 40, 200, 256
WAIT_S = 600.0


def settings(data: Path, storage: Path) -> list[str]:
    """Return the run: a ResNet-10 of a quarter of the width, a checkpoint every 20 steps."""
    return [
        "cifar10_study_cpu", f"data.train={data}/cifar10/train", "data.test=''",
        f"storage={storage}", f"batch_size={BATCH}", "epochs=6", "encoder.width=0.25",
        "evaluation.every_epochs=0", "checkpoint.every_steps=20", "tracking.log_every_steps=2",
        "scaling.num_workers=2", "registry.name=''",
    ]  # fmt: skip


def step_of(storage: Path) -> int:
    """Return the last step that the log of the only run has."""
    return max(map(last_step, storage.glob("*-*")), default=0)


def images_per_s(
    package: Path,
    data: Path,
    *overrides: str,
    disturbed: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Return the speed of a run by the package in a folder, disturbed from its first step on."""
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch) / "runs"
        env = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "simclr_ray", "pretrain", *settings(data, storage),
                   *overrides]  # fmt: skip
        with (Path(scratch) / "log").open("w") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=scratch)
        try:
            first = _when(run, storage, FIRST)
            with disturbed(storage):
                last = _when(run, storage, LAST)
        finally:
            run.terminate()
            run.wait()
    return BATCH * (LAST - FIRST) / (last - first)


def _when(run: subprocess.Popen[bytes], storage: Path, step: int) -> float:
    deadline = time.monotonic() + WAIT_S
    while step_of(storage) < step:
        if run.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no step {step}")
        time.sleep(0.02)
    return time.monotonic()


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commits", nargs="+")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    commits = [*args.commits, ""][:2]
    data = Path(os.environ["SIMCLR_RAY_DATA"])
    speeds: dict[str, list[float]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as scratch:
        packages = {
            name: lay_out(commit, Path(scratch) / name)
            for name, commit in zip(speeds, commits, strict=True)
        }
        for number in range(args.pairs):
            for name in list(speeds)[:: -1 if number % 2 else 1]:
                speeds[name].append(images_per_s(packages[name], data))
            print(
                number, {name: round(values[-1], 1) for name, values in speeds.items()}, flush=True
            )
    ratios = [new / old for old, new in zip(speeds["old"], speeds["new"], strict=True)]
    store("cost", {
        "command": f"python -m benchmarks.cost {' '.join(filter(None, commits))}",
        "old": commits[0], "new": commits[1] or "working tree", "pairs": args.pairs,
        "images_per_s": {k: [round(v, 1) for v in values] for k, values in speeds.items()},
        "new_over_old": {"median": round(statistics.median(ratios), 4),
                         "least": round(min(ratios), 4), "most": round(max(ratios), 4),
                         "of_medians": round(statistics.median(speeds["new"])
                                             / statistics.median(speeds["old"]), 4)},
    })  # fmt: skip


if __name__ == "__main__":
    main()
