"""From a folder of photographs to their nearest neighbours, by the commands of the first guide.

As somebody does it who has installed the package and reads `docs/start.md`: nothing is made
smaller. Ten minutes of two idle cores are the most that it may take.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.long.photographs import write_photographs
from tests.ray.driver import own_ray
from tests.shell_blocks import ROOT, blocks

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

CLASSES = ["airplanes", "Faces", "Motorbikes", "watch", "Leopards", "bonsai", "car_side", "ketch"]
MOST_COMMANDS, MOST_S = 5, 600.0


def test_the_first_guide_ends_in_a_sheet_of_neighbours_within_ten_minutes(
    tmp_path: Path, image_root: Path
) -> None:
    assert write_photographs(image_root, tmp_path / "photos", CLASSES, 125, flat=True) >= 500
    (script,) = (b for b in blocks("docs/start.md") if "model search" in b)
    commands = [line for line in script.splitlines() if line.startswith("simclr-ray")]
    assert len(commands) <= MOST_COMMANDS
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = own_ray() | {"PATH": programs, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-4000:]
    assert took < MOST_S
    with Image.open(tmp_path / "neighbours.png") as sheet:
        assert sheet.width > 11 * 100
    assert "<canvas" in (tmp_path / "map.html").read_text(encoding="utf-8")
