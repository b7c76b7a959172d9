"""A run's folder: files whole or not at all, the newest checkpoint, Ray's snapshot repaired."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped] # no types

from simclr_ray.errors import CheckpointError, ConfigError, RunError, StorageError
from simclr_ray.storage import checkpoint, run_folder
from simclr_ray.storage.filesystem import filesystem, open_whole
from simclr_ray.storage.run_folder import CONFIG_FILE, RUN_FILE, SNAPSHOT, RunFolder
from simclr_ray.storage.run_lock import HOLDER, LOCK
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import newest_whole_step
from simclr_ray.train.outcome import Run


@pytest.fixture(params=["path", "uri", "uri with options"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    storage = tmp_path / "runs"
    uri = storage.as_uri() + (OPTIONS if "options" in request.param else "")
    return RunFolder.of(str(storage) if request.param == "path" else uri, "r-1")


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r-1"


OPTIONS = "?endpoint_override=http://h:9000&scheme=http"  # as those of a bucket; a disk has none


def add(on_disk: Path, name: str, step: int) -> Path:
    checkpoint.write(on_disk / name, step, {"model.w": torch.arange(4.0)}, {})
    return on_disk / name


def snapshot(on_disk: Path, *names: str) -> None:
    on_disk.mkdir(parents=True, exist_ok=True)
    results = [{"checkpoint_dir_name": n, "metrics": {}} for n in names]
    (on_disk / SNAPSHOT).write_text(json.dumps({"checkpoint_results": results}))


def test_a_local_storage_path_becomes_absolute_and_a_uri_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.of("runs", "a").local == tmp_path / "runs" / "a"
    remote = RunFolder.of("s3://bucket/runs/", "a")
    assert (remote.local, remote.uri) == (None, "s3://bucket/runs/a")
    with_options = RunFolder.of(f"s3://bucket/runs{OPTIONS}", "a")
    assert with_options.uri == f"s3://bucket/runs/a{OPTIONS}"
    assert with_options.below("b/c") == f"s3://bucket/runs/a/b/c{OPTIONS}"
    assert RunFolder.at(with_options.uri) == with_options
    run = Run("a", with_options.uri, "step-1", "", {})
    assert run.checkpoint_uri == f"s3://bucket/runs/a/step-1{OPTIONS}"


def test_text_is_read_back_and_an_absent_file_is_none(folder: RunFolder) -> None:
    assert folder.read_text("a.json") is None
    folder.write_text("a.json", "one é\n")
    assert folder.read_text("a.json") == "one é\n"
    folder.write_text("a.json", "two")
    assert folder.read_text("a.json") == "two"


def test_a_write_that_was_cut_off_leaves_the_old_text(folder: RunFolder, on_disk: Path) -> None:
    folder.write_text("run.json", "old")

    def cut_off() -> None:
        with open_whole(*filesystem(folder.below("run.json"))) as stream:
            stream.write(b"ne")
            raise KeyError

    with pytest.raises(KeyError):
        cut_off()
    assert folder.read_text("run.json") == "old"
    folder.write_text("run.json", "new")
    assert folder.read_text("run.json") == "new"
    assert [p.name for p in on_disk.iterdir()] == ["run.json"]


def test_checkpoints_are_listed_newest_first_and_nothing_else(
    folder: RunFolder, on_disk: Path
) -> None:
    assert folder.checkpoints() == []
    names = ["step-00000002-0000000a", "step-00000010-0000000b", "step-00000002-0000000c"]
    for name in names:
        add(on_disk, name, checkpoint.step_of(name))
    (on_disk / "encoder").mkdir()
    folder.write_text("run.json", "{}")
    assert folder.checkpoints() == [names[1], names[2], names[0]]


def test_the_newest_checkpoint_that_verifies_is_taken_and_the_others_are_named(
    folder: RunFolder,
    on_disk: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("simclr_ray"), "propagate", True)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    add(on_disk, "step-00000001-00000001", 1)
    add(on_disk, "step-00000002-00000002", 2)
    broken = add(on_disk, "step-00000003-00000003", 3)
    (broken / checkpoint.STATE).write_bytes(b"")
    unfinished = add(on_disk, "step-00000004-00000004", 4)
    (unfinished / checkpoint.RECORD).unlink()
    assert [checkpoint.step_of(name) for name in folder.finished_checkpoints()] == [3, 2, 1]
    assert newest_whole_step(folder) == 3
    with folder.newest_checkpoint() as found:
        assert found is not None
        assert checkpoint.read(found).step == 2
        assert (found.parent == on_disk) == (folder.local is not None)
    assert found.is_dir() == (folder.local is not None)  # a copy goes with the block
    assert not list(scratch.iterdir())
    passed = [r.getMessage() for r in caplog.records]
    assert [name for name in (broken.name, unfinished.name) if any(name in m for m in passed)] == [
        broken.name,
        unfinished.name,
    ]


def test_no_checkpoint_that_verifies_is_none(folder: RunFolder, on_disk: Path) -> None:
    with folder.newest_checkpoint() as found:
        assert found is None
    (add(on_disk, "step-00000001-00000001", 1) / checkpoint.STATE).unlink()
    with folder.newest_checkpoint() as found:
        assert found is None


def test_an_error_in_the_block_is_the_blocks_own_and_no_older_checkpoint_is_tried(
    folder: RunFolder, on_disk: Path
) -> None:
    add(on_disk, "step-00000001-00000001", 1)
    add(on_disk, "step-00000002-00000002", 2)
    seen: list[str] = []

    def fail() -> None:
        with folder.newest_checkpoint() as found:
            seen.append(found.name if found else "")
            raise CheckpointError("the block")

    with pytest.raises(CheckpointError, match="the block"):
        fail()
    assert seen == ["step-00000002-00000002"]


def test_a_runs_last_checkpoint_stays_of_a_remote_run_as_one_copy_in_the_cache(
    folder: RunFolder, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for step in (1, 2):
        name = f"step-0000000{step}-0000000a"
        add(on_disk, name, step)
        run = Run(folder.name, folder.uri, name, "", {})
        assert checkpoint.read(run.checkpoint).step == step
        assert run.checkpoint == run.checkpoint
        assert run.checkpoint_uri == folder.below(name)
    kept = [path.name for path in (tmp_path / "cache").rglob("step-*")]
    if folder.local is None:
        assert kept == ["step-00000002-0000000a"]
        with pytest.raises(FileNotFoundError):
            folder.cached_checkpoint("step-00000003-0000000a")
        assert [path.name for path in (tmp_path / "cache").rglob("step-*")] == kept
    else:
        assert kept == []


def test_a_folder_that_another_process_holds_is_refused_until_that_process_is_gone(
    tmp_path: Path,
) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    folder.ensure_unlocked()
    other = hold_elsewhere(folder)
    try:
        with pytest.raises(RunError, match=f"run by process {other.pid} on "):
            folder.ensure_unlocked()
        with pytest.raises(RunError, match=f"run by process {other.pid} on "), folder.lock():
            pass
        threading.Timer(0.5, other.kill).start()
        with folder.lock(wait_s=30):
            assert folder.holder()
    finally:
        other.kill()
        other.communicate()
    assert not folder.holder()


def hold_elsewhere(folder: RunFolder) -> subprocess.Popen[str]:
    program = (
        "import sys, time; from simclr_ray.storage.run_folder import RunFolder\n"
        "with RunFolder(*sys.argv[1:]).lock():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, folder.storage, folder.name],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_to_ask_whether_a_folder_is_locked_disturbs_nobody(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    other = hold_elsewhere(folder)
    try:
        assert all(folder.holder() for _ in range(100))
        with pytest.raises(RunError, match=f"run by process {other.pid} on "):
            folder.ensure_unlocked()
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / "r-1" / HOLDER).exists()  # what a killed process leaves
    assert not folder.holder()
    assert not (tmp_path / "r-1" / HOLDER).exists()
    (tmp_path / "r-1" / LOCK).unlink()
    assert not folder.holder()
    assert not (tmp_path / "r-1" / LOCK).exists()  # from now on, to ask touches no lock


def refused(folder: RunFolder) -> str:
    """Return why another thread may not hold a folder; nothing where it may."""

    def hold() -> str:
        try:
            with folder.lock():
                return ""
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(hold).result()


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.EIO, r"r-1/lock: the disk fails \(input/output error\)"),
        (errno.ENOSPC, "no space left"),
        (errno.EINVAL, "lock cannot be locked: Invalid argument"),
        (errno.ENOTSUP, ""),
    ],
)
def test_a_lock_that_fails_is_none_and_where_there_are_none_that_is_said(
    tmp_path: Path,
    number: int,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    folder = RunFolder.of(str(tmp_path), "r-1")
    (tmp_path / "r-1").mkdir()
    (tmp_path / "r-1" / HOLDER).write_text("process 1 on elsewhere")
    monkeypatch.setattr(FileLock, "acquire", fail)
    if not problem:
        with folder.lock():
            pass
        assert "knows no locks; two drivers may meet" in caplog.text
        return
    with pytest.raises(RunError, match=problem) as failed, folder.lock():
        pass
    assert isinstance(failed.value, StorageError) == (number != errno.EINVAL)
    assert folder.holder() == "process 1 on elsewhere"  # who knows
    assert (tmp_path / "r-1" / HOLDER).exists()


def test_a_lock_goes_with_the_block_and_an_error_in_it_too(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r-1")
    for _ in range(2):
        with pytest.raises(KeyError), folder.lock():
            raise KeyError
        assert not folder.holder()
    with folder.lock():
        assert refused(folder).startswith(f"{folder.uri} is being run by process {os.getpid()} on ")
    assert not folder.holder()


def test_a_run_whose_folder_is_moved_stays_locked_until_its_driver_ends(tmp_path: Path) -> None:
    (tmp_path / "a" / "r").mkdir(parents=True)
    moved = RunFolder.at(str(tmp_path / "b" / "r"))
    with RunFolder.at(str(tmp_path / "a" / "r")).lock():
        (tmp_path / "a").rename(tmp_path / "b")
        assert f"process {os.getpid()}" in refused(moved)
        assert moved.holder()
    assert not moved.holder()
    assert not (tmp_path / "a").exists()


def test_a_snapshot_that_names_what_is_there_stays(folder: RunFolder, on_disk: Path) -> None:
    assert folder.repair_snapshot() == []
    add(on_disk, "step-00000001-00000001", 1)
    snapshot(on_disk, "step-00000001-00000001")
    assert folder.repair_snapshot() == []
    assert (on_disk / SNAPSHOT).is_file()


def test_a_snapshot_that_names_a_missing_directory_is_set_aside(
    folder: RunFolder, on_disk: Path
) -> None:
    add(on_disk, "step-00000001-00000001", 1)
    snapshot(on_disk, "step-00000002-00000002", "step-00000001-00000001", "step-00000000-00000000")
    gone = ["step-00000000-00000000", "step-00000002-00000002"]
    assert folder.repair_snapshot() == gone
    assert not (on_disk / SNAPSHOT).exists()
    assert (on_disk / f"{SNAPSHOT}.set-aside").is_file()
    assert folder.repair_snapshot() == []
    snapshot(on_disk, "step-00000009-00000009")  # a second time, over the first one set aside
    assert folder.repair_snapshot() == ["step-00000009-00000009"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"checkpoint_results": 3}', "null"])
def test_a_snapshot_that_cannot_be_read_is_set_aside(
    folder: RunFolder, on_disk: Path, text: str
) -> None:
    on_disk.mkdir(parents=True)
    (on_disk / SNAPSHOT).write_text(text)
    assert folder.repair_snapshot() == ["(an unreadable snapshot)"]
    assert not (on_disk / SNAPSHOT).exists()


def test_a_folder_is_copied_whole(folder: RunFolder, on_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "made"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x.bin").write_bytes(b"\x00\x01")
    folder.write_text("run.json", "{}")
    folder.put_folder(source, "encoder")
    assert (on_disk / "encoder" / "deep" / "x.bin").read_bytes() == b"\x00\x01"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 3}', r"run\.json.*: is no whole record: it lacks digest, fing"),
        ('{"mlflow_run_id": "a"}', "format 1, this release reads 2 and 3"),
    ],
)
def test_what_is_no_record_of_a_run_is_refused(folder: RunFolder, text: str, message: str) -> None:
    folder.write_text(RUN_FILE, text)
    with pytest.raises(ConfigError, match=message):
        RunRecord.find(folder)


@pytest.mark.parametrize("text", ['{"format_ver', "[]", "", "[" * 100_000])
def test_a_record_that_cannot_be_read_counts_as_absent_and_is_said(
    folder: RunFolder, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text(RUN_FILE, text)
    assert RunRecord.find(folder) is None
    assert f"{folder.below(RUN_FILE)} cannot be read and counts as absent" in caplog.text


def test_a_file_that_is_no_text_counts_as_absent(folder: RunFolder, on_disk: Path) -> None:
    folder.write_text(RUN_FILE, "{}")
    (on_disk / RUN_FILE).write_bytes(bytes(range(256)))
    assert folder.read_json(RUN_FILE, dict) is None
    assert folder.read_json("scores.json", list) is None


def test_of_the_checkpoints_the_newest_that_verify_are_kept(
    folder: RunFolder, on_disk: Path
) -> None:
    """The newest is damaged, which a fault of the disk may seem; one was never finished."""
    names = [add(on_disk, checkpoint.new_name(step), step).name for step in (1, 2, 3, 4)]
    unfinished, damaged = (add(on_disk, checkpoint.new_name(step), step).name for step in (2, 5))
    (on_disk / unfinished / checkpoint.RECORD).unlink()
    (on_disk / damaged / checkpoint.STATE).write_bytes(b"")
    for newest in (names[3], names[3], ""):  # without one to go by nothing goes
        folder.prune_checkpoints(2, newest)
        assert folder.checkpoints() == [damaged, names[3], names[2]]


def test_a_checkpoint_is_copied_with_its_record_last(
    folder: RunFolder, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = add(on_disk, checkpoint.new_name(3), 3).name
    (on_disk / name).rename(on_disk.parent / "made")
    written = []

    def noted(files: pafs.FileSystem, path: str) -> object:
        written.append(path.rpartition("/")[2])
        return open_whole(files, path)

    monkeypatch.setattr(run_folder, "open_whole", noted)
    monkeypatch.setattr(run_folder, "open_large", noted)
    folder.put_checkpoint(on_disk.parent / "made", name)
    assert written == [checkpoint.STATE, checkpoint.RECORD]
    with folder.newest_checkpoint() as found:
        assert found is not None
        assert checkpoint.read(found).step == 3


def test_what_fails_halfway_leaves_nothing_in_a_bucket(tmp_path: Path) -> None:
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # no local disk to us
    table = pa.table({"x": list(range(9))})

    def fail_halfway() -> None:
        with (
            open_whole(bucket, "folder.parquet") as stream,
            pq.ParquetWriter(stream, table.schema) as writer,
        ):
            writer.write_table(table)
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    with open_whole(bucket, "folder.parquet") as stream:
        pq.write_table(table, stream)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.parquet"]
    assert pq.read_table(tmp_path / "folder.parquet").num_rows == 9


class SmallCopies(LocalFileSystem):  # type: ignore[misc] # fsspec has no types
    """A disk that copies as S3 does: no object above a size in one request."""

    most = 1000

    def cp_file(self, path1: str, path2: str, **_: object) -> None:
        if Path(path1).stat().st_size > self.most:
            raise OSError(errno.EINVAL, "InvalidRequest: copy source is larger than allowed")
        shutil.copyfile(path1, path2)

    def mv(self, path1: str, path2: str, **_: object) -> None:
        self.cp_file(path1, path2)
        Path(path1).unlink()

    copy = cp_file


def test_checkpoints_of_any_size_are_set_aside_in_a_bucket(
    folder: RunFolder, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = pafs.PyFileSystem(pafs.FSSpecHandler(SmallCopies()))
    monkeypatch.setattr(run_folder, "filesystem", lambda uri: (bucket, filesystem(uri)[1]))
    files = {CONFIG_FILE: 10, "metrics.jsonl": 5000, "step-1/a/state": 9000, "step-1/record": 1000}
    for name, size in files.items():
        (on_disk / name).parent.mkdir(parents=True, exist_ok=True)
        (on_disk / name).write_bytes(bytes([size % 251]) * size)
    folder.set_aside()
    aside = on_disk.with_name("r-1~1")
    stored = {str(p.relative_to(aside)): p.read_bytes() for p in aside.rglob("*") if p.is_file()}
    assert stored == {name: bytes([size % 251]) * size for name, size in files.items()}
    assert list(on_disk.iterdir()) == []
    with open_whole(bucket, f"{on_disk}/large") as stream:
        stream.write(bytes(5000))
    assert [(p.name, p.stat().st_size) for p in on_disk.iterdir()] == [("large", 5000)]


def test_what_another_process_is_writing_is_not_taken_for_left(tmp_path: Path) -> None:
    young, old = tmp_path / ".ranks.json.1.tmp", tmp_path / ".stop.2.tmp"
    for file in (young, old):
        file.write_text("half")
    os.utime(old, (0, 0))
    RunFolder(str(tmp_path.parent), tmp_path.name).prune_checkpoints(1, "")
    assert young.exists()
    assert not old.exists()
