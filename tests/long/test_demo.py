"""What the README promises of the demo: thresholds fixed before the first training run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


@pytest.mark.timeout(1500)
def test_the_demo_learns_forms_and_its_encoder_embeds_an_image(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "simclr_ray"]
    done = subprocess.run(
        [*program, "demo", "--folder", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (stored,) = (tmp_path / "demo" / "runs").glob("*/scores.json")
    knn = {row["name"]: row["knn_top1"] for row in json.loads(stored.read_text())}
    assert knn["trained encoder"] >= 0.80
    assert knn["trained encoder"] - knn["raw pixels"] >= 0.25
    assert knn["trained encoder"] - knn["untrained encoder"] >= 0.15
    (line,) = (text for text in done.stdout.splitlines() if text.split()[:1] == ["embed"])
    arguments = line.partition(" simclr_ray ")[2].split()
    embedded = subprocess.run(
        [*program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert embedded.returncode == 0, embedded.stderr
    path, *numbers = embedded.stdout.rstrip("\n").split("\t")
    assert path.endswith("shape.png")
    assert len([float(n) for n in numbers]) == 128
