"""A full disk is told in one line, nothing half written stays, and the same command goes on."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.disk_space import checkpoint_bytes
from simclr_ray.train.resolve import resolve
from tests.faults.test_divergence import env_of
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
WAIT_S = 300.0
BLOCK = 2**16


@pytest.fixture
def disk() -> Iterator[Path]:
    """Give an empty disk of 16 MiB, by a short path: Ray has sockets in temporary folders."""
    place = Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        place.rmdir()
        # a disk of its own takes root; to fill the machine's would hit whatever else runs there
        pytest.skip(f"mount is not permitted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
    place.rmdir()


def fill(place: Path) -> Path:
    """Fill a disk to its last byte with a file, which is returned."""
    ballast = place / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (BLOCK, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return ballast


def config_of(folder: Path, storage: Path, workers: int = 2) -> tuple[list[str], RunFolder, int]:
    """Return a command that trains into `storage`, its run folder, and a checkpoint's bytes."""
    write_splits(folder, 330)
    tree = tree_of(folder, "unused", workers, "float64")
    tree |= {"storage": str(storage), "checkpoint": {"every_steps": 2}}
    (folder / "run.yaml").write_text(cfg.dump_yaml(tree))
    config = cfg.validate(Experiment, tree)
    program = [sys.executable, "-m", "simclr_ray", "pretrain", "run.yaml"]
    return program, resolve(config).folder, checkpoint_bytes(config)


def step_of(run: RunFolder) -> int:
    there = run.local is not None and run.local.exists()
    finished = [n for n in run.checkpoints() if checkpoint.RECORD in run.names(n)] if there else []
    return checkpoint.step_of(finished[0]) if finished else 0


def status_of(run: RunFolder) -> str:
    record = RunRecord.read(run)
    with closing(sqlite3.connect(record.tracking_uri.removeprefix("sqlite:///"))) as store:
        asked = "select status from runs where run_uuid = ?"
        return str(store.execute(asked, (record.mlflow_run_id,)).fetchone()[0])


def filled_while_it_runs(
    program: list[str], folder: Path, disk: Path, is_time: Callable[[], bool],
    env: Mapping[str, str],
) -> tuple[int, list[str]]:  # fmt: skip
    """Return exit code and lines of a run whose disk is filled at some time."""
    said = folder / "said"
    with said.open("w") as stream:
        driver = subprocess.Popen(
            program, cwd=folder, stdout=subprocess.DEVNULL, stderr=stream,
            env=env,
        )  # fmt: skip
        deadline = time.monotonic() + WAIT_S
        while not is_time():
            assert driver.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        fill(disk)
        code = driver.wait(timeout=WAIT_S)
    return code, said.read_text().splitlines()


@pytest.mark.parametrize("workers", [1, 2])
def test_storage_that_is_full_is_told_in_a_line_and_the_run_goes_on_when_there_is_room(
    workers: int, disk: Path, tmp_path: Path, ray_cluster: str
) -> None:
    storage, env = disk / "runs", env_of(workers)
    program, run, size = config_of(tmp_path, storage, workers)
    code, lines = filled_while_it_runs(program, tmp_path, disk, lambda: step_of(run) >= 4, env)
    said = "\n".join(lines)
    assert code == 75, said
    assert "Traceback" not in said
    assert [line for line in lines if "error:" in line] == lines[-1:], said
    assert lines[-1].startswith(f"error: {run.uri}"), said
    assert "no space left (0.0 MiB free" in lines[-1]
    assert lines[-1].endswith(
        "make room there; to continue: python -m simclr_ray pretrain run.yaml"
    )
    for name in run.checkpoints():  # nothing half
        assert checkpoint.RECORD in run.names(name)
    assert not list(Path(tempfile.gettempdir()).glob(f"simclr_ray-{run.name}-*"))

    full = again(program, tmp_path, env)
    assert full.returncode == 2, full.stderr
    assert f"error: storage: {storage} has 0.0 MiB free; 2 checkpoints of" in full.stderr
    half = run.local / checkpoint.new_name(29)  # type: ignore[operator] # of a killed start
    (disk / "ballast").unlink()
    half.mkdir()
    (half / checkpoint.STATE).write_bytes(bytes(size))
    done = again(program, tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert status_of(run) == "FINISHED"
    assert not half.exists()
    assert sorted(losses_of(Path(run.uri))) == list(range(1, 31))


def again(
    program: list[str], folder: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_temporary_folder_that_is_full_is_told_with_its_place(
    workers: int, disk: Path, tmp_path: Path
) -> None:
    """Workers write their checkpoints there first; Ray of its own, since it inherits the place."""
    program, run, _ = config_of(tmp_path, tmp_path / "runs", workers)
    env = env_of(1) | {"TMPDIR": str(disk)}
    code, lines = filled_while_it_runs(program, tmp_path, disk, lambda: step_of(run) >= 4, env)
    said = "\n".join(lines)
    assert code == 75, said
    assert "Traceback" not in said
    own_lines = [line for line in lines if "ray_log_sink" not in line]  # Ray's logs lie there
    assert own_lines[-1].startswith(f"error: {disk}: no space left"), said
    assert "or set TMPDIR; to continue: " in own_lines[-1]
    assert not list(disk.glob(f"simclr_ray-{run.name}-*"))
    for name in run.checkpoints():
        assert checkpoint.RECORD in run.names(name)
