"""Runs one `simclr-ray pretrain` command and stores what came out: time, scores, machine.

    python -m benchmarks.recipe NAME PRESET [key.path=value ...]

Writes `benchmarks/results/NAME.json`. Paths below SIMCLR_RAY_DATA are stored as $SIMCLR_RAY_DATA.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import median, portable, store


def main() -> None:
    """Run the command of the arguments and store its result."""
    name, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "simclr_ray", "pretrain", *arguments]
        began = time.perf_counter()
        done = subprocess.run([*command, f"storage={storage}"], check=False)
        wall_s = time.perf_counter() - began
        (scores,) = Path(storage).glob("*/scores.json")
        lines = (scores.parent / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        result = {
            "command": "simclr-ray pretrain " + " ".join(map(portable, arguments)),
            "exit_code": done.returncode,
            "wall_s": round(wall_s, 1),
            "scores": json.loads(scores.read_text()),
            "curve": [_short(r) for r in records if "eval/uniformity" in r],
            "loss": [[r["step"], r["train/mean_loss"]] for r in records if "train/loss" in r],
            "images_per_s": median([r["train/images_per_s"] for r in records if "train/loss" in r]),
            "data_wait_share": median(
                [r["train/data_wait_fraction"] for r in records if "train/loss" in r]
            ),
        }
    store(name, result)
    print(json.dumps({k: result[k] for k in ("command", "wall_s", "scores")}, indent=1))


def _short(record: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 5) for k, v in record.items()}


if __name__ == "__main__":
    main()
