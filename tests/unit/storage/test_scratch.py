"""Folders for copies: removed at the end, and those of killed processes by the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simclr_ray.storage.scratch import scratch_folder

KILLED = """
import os
from simclr_ray.storage.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "copy").write_text("x")
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_folder_goes_with_its_block_and_others_stay(temporary: Path) -> None:
    with scratch_folder() as first, scratch_folder() as second:
        assert first != second
        assert first.parent == temporary
        assert first.is_dir()
        assert second.is_dir()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_when_the_next_needs_one(temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED], capture_output=True, text=True, check=False
    )
    left = Path(done.stdout.strip())
    assert (left / "copy").exists(), done.stderr
    (temporary / "simclr_ray-scratch-new").mkdir()  # of one that is just being made
    with scratch_folder():
        assert not left.exists()
    assert [path.name for path in temporary.iterdir()] == ["simclr_ray-scratch-new"]
