"""What every benchmark needs: where results go, and what a number depends on besides the command.

Knows neither Ray nor MLflow, so that the GPU section runs where only torch is installed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from simclr_ray.storage.provenance import version_of

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "simclr-ray", "torch", "ray", "mlflow", "numpy", "pyarrow",
    "lightly", "timm", "albumentations", "torchvision",
)  # fmt: skip


def store(name: str, result: Mapping[str, object]) -> None:
    """Write `benchmarks/results/NAME.json`, with machine and versions beside what was measured."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**result, **machine()}, indent=1) + "\n")


def machine() -> dict[str, object]:
    """Return commit, hardware and versions."""
    return {
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "versions": {n: v for n in LIBRARIES if (v := version_of(n)) != "absent"}
        | {"python": platform.python_version()},
    }


def portable(argument: str) -> str:
    """Return the argument with the folder of images by the name of its variable."""
    data = os.environ.get("SIMCLR_RAY_DATA", "")
    return argument.replace(data.rstrip("/"), "$SIMCLR_RAY_DATA") if data else argument


def median(values: Iterable[float], digits: int = 4) -> float:
    """Return the median, rounded."""
    return round(statistics.median(values), digits)


def _commit() -> str:
    """Return the checkout's commit, `+changes` where files differ from it.

    A copy without git says by SIMCLR_RAY_COMMIT what it is a copy of; else it is empty.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "..", ":!results", ":!../docs")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SIMCLR_RAY_COMMIT", "")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
