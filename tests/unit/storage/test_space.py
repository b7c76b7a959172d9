"""Errors of disks as one line: place, problem, space, remedy; and nothing half written stays."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors import SafetensorError

from simclr_ray.errors import StorageDeniedError, StorageError
from simclr_ray.storage import checkpoint, space
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.space import MENDABLE, Space, bytes_in, space_at, storage_error, writing

FREE = Space(3 * 2**20, None)


@pytest.fixture(autouse=True)
def _disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All disks have 3 MiB free."""
    monkeypatch.setattr(space, "space_at", lambda path: FREE)


@pytest.mark.parametrize("number", MENDABLE)
def test_each_error_of_a_disk_is_a_line_with_place_and_remedy(number: int) -> None:
    problem, remedy = MENDABLE[number]
    with pytest.raises(StorageError) as caught, writing("/runs/a"):
        raise OSError(number, os.strerror(number))
    line = str(caught.value)
    assert line.startswith(f"/runs/a: {problem}")
    assert remedy in line
    assert "\n" not in line
    denied = number in (errno.EACCES, errno.EPERM)
    assert caught.value.exit_code == (2 if denied else 75)
    assert isinstance(caught.value, StorageDeniedError) == denied
    assert str(copy.copy(caught.value)) == line  # as Ray sends it


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("[Errno 28] Error writing bytes to file. Detail: No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_told_with_what_is_free_and_what_is_needed(error: Exception) -> None:
    with pytest.raises(StorageError) as caught, writing("/runs/a", 5 * 2**20):
        raise error
    line = "/runs/a: no space left (3.0 MiB free, 5.0 MiB needed); make room there"
    assert str(caught.value) == line


def test_the_path_that_the_system_names_is_the_place() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/tmp/x.png")
    assert str(storage_error(error, "/runs/a")).startswith("/tmp/x.png: no space left")


def test_the_fuller_disk_is_the_place_where_an_error_has_no_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {tempfile.gettempdir(): Space(0, 0)}
    monkeypatch.setattr(space, "space_at", lambda path: free.get(str(path), FREE))
    error = OSError(errno.ENOSPC, "No space left on device")
    for place in ("/runs/a", "s3://bucket/a"):
        line = str(storage_error(error, place))
        assert line.startswith(f"{tempfile.gettempdir()}: no space left (0.0 MiB free, no more")
        assert line.endswith("make room there, or set TMPDIR")


def test_other_errors_pass_as_they_are() -> None:
    for other in (OSError(errno.ENOENT, "no such file"), ValueError("x"), KeyError(28)):
        with pytest.raises(type(other)) as caught, writing("/runs/a"):
            raise other
        assert caught.value is other
    with pytest.raises(PermissionError), writing("/runs/a", numbers=space.OF_THE_DISK):
        raise PermissionError(errno.EACCES, "denied", "/images/1.png")


def take_only(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the disk take so many bytes of each file that is copied."""

    def copy_part(source: IO[bytes], target: IO[bytes], *_: object) -> None:
        data = source.read()
        target.write(data[:room])
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", copy_part)


@pytest.mark.parametrize("room", [0, 100, 4000])
def test_nothing_stays_of_a_checkpoint_that_the_storage_does_not_take(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its tensors, and within its record, which comes last."""
    made, run = tmp_path / "made", RunFolder.of(str(tmp_path / "runs"), "a")
    checkpoint.write(made, 3, {"model.x": torch.zeros(8)}, {"note": "x" * 5000})
    take_only(room, monkeypatch)
    with pytest.raises(StorageError, match=f"{run.uri}: no space left"):
        run.put_checkpoint(made, checkpoint.new_name(3))
    assert run.checkpoints() == []


def test_nothing_stays_of_a_checkpoint_that_the_scratch_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_sync", fail)
    tensors = {"model.x": torch.zeros(2**20)}
    with pytest.raises(StorageError, match=f"{tmp_path}: no space left .*4.0 MiB needed"):
        checkpoint.write(tmp_path / "step", 3, tensors, {})
    assert not (tmp_path / "step").exists()


def test_what_was_never_finished_goes_at_the_next_start_be_it_the_newest(tmp_path: Path) -> None:
    run = RunFolder.of(str(tmp_path), "a")
    whole, half = (tmp_path / "a" / checkpoint.new_name(step) for step in (3, 4))
    checkpoint.write(whole, 3, {"model.x": torch.zeros(8)}, {})
    half.mkdir()
    (half / checkpoint.STATE).write_bytes(bytes(9))
    left = tmp_path / "a" / ".run.json.12ab34cd.tmp"
    left.write_text("{")
    os.utime(left, (0, 0))  # not one that is being written
    run.prune_checkpoints(2, whole.name)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [whole.name]


def test_the_space_of_a_folder_that_is_not_there_is_that_of_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    assert bytes_in(tmp_path) == 1000
    monkeypatch.undo()
    there, stat = space_at(tmp_path / "not" / "there"), os.statvfs(tmp_path)
    assert abs(there.free - stat.f_bavail * stat.f_frsize) < 2**28  # others write meanwhile
