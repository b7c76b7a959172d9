"""How long a run of 16 steps takes whose machine has kept nothing of an earlier one.

    python -m benchmarks.cold_start $SIMCLR_RAY_DATA/cifar10/train $SIMCLR_RAY_DATA/cifar10/test
    python -m benchmarks.cold_start … --other ../at-an-earlier-commit --runs 3

Times `simclr-ray pretrain` from its start to the first report of a loss and to its exit, scores of
the untrained encoder and of raw pixels included, with a cache and a storage that are empty. With
`--other`, a checkout with its compiled views, runs of both alternate: ratios then hold on a noisy
machine, and the scores of both stand beside each other. Processor seconds are those of the whole
machine, which has to be idle. Writes `benchmarks/results/cold_start.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import median, portable, store

CHECKOUT = Path(__file__).parents[1]
LOOK_S = 0.05
OVERRIDES = ("data.limit=4096", "batch_size=256", "epochs=1")


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--other", type=Path, help="A checkout to take turns with.")
    args = parser.parse_args()
    sources = {"this": CHECKOUT} | ({"other": args.other.resolve()} if args.other else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for _ in range(args.runs):
        for name, source in sources.items():
            runs[name].append(cold_run(source, args.train, args.test))
            print(name, json.dumps(runs[name][-1]), flush=True)
    medians = {
        name: {key: median((run[key] for run in of), 1) for key in ("first_s", "all_s", "cpu_s")}
        for name, of in runs.items()
    }
    command = portable(f"python -m benchmarks.cold_start {args.train} {args.test}")
    result: dict[str, object] = {"command": command, "median": medians, "runs": runs}
    if args.other:
        result["other_commit"] = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"],
            cwd=args.other, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    store("cold_start", result)


def cold_run(source: Path, train: str, test: str) -> dict[str, Any]:
    """Run once by the code of a checkout; return seconds and scores."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        env |= {"PYTHONPATH": str(source), "XDG_CACHE_HOME": str(root / "cache")}
        words = ["simclr-ray", "pretrain", "cifar10_study_cpu", *OVERRIDES]
        words += [f"data.train={train}", f"data.test={test}", f"storage={root / 'runs'}"]
        cpu, began, first_s = _cpu_s(), time.monotonic(), 0.0
        with (root / "said").open("w") as log:
            running = subprocess.Popen(words, env=env, cwd=root, stdout=log, stderr=log)
        while running.poll() is None:
            time.sleep(LOOK_S)
            if not first_s and any("train/loss" in p.read_text() for p in _logs(root)):
                first_s = time.monotonic() - began
        seconds, cpu = time.monotonic() - began, _cpu_s() - cpu
        if running.returncode:
            raise SystemExit((root / "said").read_text())
        (scores,) = root.glob("runs/*/scores.json")
        rows = json.loads(scores.read_text())
        return {
            "first_s": round(first_s, 1),
            "all_s": round(seconds, 1),
            "cpu_s": round(cpu, 1),
            "scores": {row["name"]: [row["knn_top1"], row["linear_top1"]] for row in rows},
        }


def _logs(root: Path) -> list[Path]:
    return list(root.glob("runs/*/metrics.jsonl"))


def _cpu_s() -> float:
    """Return the processor seconds of the machine, waiting aside, since it was started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


if __name__ == "__main__":
    main()
