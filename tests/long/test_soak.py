"""A short soak samples every process, goes on after an interruption, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.record import RESULTS
from tests.shell_blocks import ROOT

pytestmark = pytest.mark.long
NAME = "soak_trial"


def test_a_short_soak_samples_all_goes_on_and_leaves_nothing(
    image_root: Path, tmp_path: Path
) -> None:
    words = ["--minutes", "3", "--every", "2", "--folder", str(tmp_path / "soak"), "--name", NAME]
    program = [sys.executable, "-m", "benchmarks.soak", *words]
    environment = os.environ | {"SIMCLR_RAY_DATA": str(image_root)}
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path / "soak" / "samples.jsonl"
    first = subprocess.Popen(program, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 300
    while not log.is_file() or len(log.read_text().splitlines()) < 20:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1)
    first.send_signal(signal.SIGINT)
    first.wait(timeout=300)
    try:
        subprocess.run(program, cwd=ROOT, env=environment, check=False, timeout=900)
        result = json.loads((RESULTS / f"{NAME}.json").read_text())
    finally:
        (RESULTS / f"{NAME}.json").unlink(missing_ok=True)
    assert result["sessions"] == 2
    assert result["exit_code"] == 75
    assert not any(result["left"].values()), result["left"]
    roles = {process["role"] for process in result["processes"]}
    assert {"driver", "raylet", "RayTrainWorker"} <= roles
