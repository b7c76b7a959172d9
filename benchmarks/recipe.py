"""Runs one `simclr-ray pretrain` command and stores what came out: time, scores, machine.

    python -m benchmarks.recipe NAME PRESET [key.path=value ...]

Writes `benchmarks/results/NAME.json`. Paths below SIMCLR_RAY_DATA are stored as $SIMCLR_RAY_DATA.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from simclr_ray.export import code_commit

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("simclr-ray", "torch", "ray", "mlflow", "numpy", "pyarrow")


def main() -> None:
    """Run the command of the arguments and store its result."""
    name, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "simclr_ray.cli", "pretrain", *arguments]
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
            "images_per_s": _median(
                [r["train/images_per_s"] for r in records if "train/loss" in r]
            ),
            "data_wait_share": _median(
                [r["train/data_wait_share"] for r in records if "train/loss" in r]
            ),
            **machine(),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("command", "wall_s", "scores")}, indent=1))


def machine() -> dict[str, object]:
    """Return what a number depends on besides the command."""
    return {
        "commit": code_commit(),
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "versions": {n: metadata.version(n) for n in LIBRARIES}
        | {"python": platform.python_version()},
    }


def portable(argument: str) -> str:
    """Return the argument with the folder of pictures by the name of its variable."""
    data = os.environ.get("SIMCLR_RAY_DATA", "")
    return argument.replace(data.rstrip("/"), "$SIMCLR_RAY_DATA") if data else argument


def _short(record: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 5) for k, v in record.items()}


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return round(ordered[len(ordered) // 2], 4)


if __name__ == "__main__":
    main()
