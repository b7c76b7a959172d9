"""A run in its driver's own process: what fails is tried again, or ends it, and no thread stays."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CollapseError, RunError, StorageError
from simclr_ray.storage.metrics_log import read_series
from simclr_ray.storage.run_folder import METRICS
from simclr_ray.train.driver import train_resolved
from simclr_ray.train.outcome import Run
from simclr_ray.train.resolve import enter
from simclr_ray.train.scaling import can_train_in_process
from simclr_ray.train.worker import TrainWorker
from tests.ray.images import write_splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("in_process"), 40)


def experiment(folder: Path, storage: Path, **changes: Any) -> Experiment:
    tree = {
        "name": "t",
        "data": {n: str(folder / f"{n}.parquet") for n in ("train", "test")},
        "augment": {"size": 16},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125},
        "head": {"name": "mlp", "dim": 8},
        "batch_size": 16,
        "epochs": 3,
        "schedule": {"warmup_epochs": 1.0},
        "checkpoint": {"every_epochs": 1},
        "scaling": {"threads_per_worker": 1},
        "tracking": {"system_metrics": False},
        "storage": str(storage),
        **changes,
    }
    return cfg.validate(Experiment, tree)


def run_of(made: Experiment, **options: Any) -> Run:
    return enter(made, train_resolved, in_process=True, **options)


def failing(monkeypatch: pytest.MonkeyPatch, errors: list[BaseException]) -> None:
    """Have a rank fail by these errors in turn, each after its first checkpoint."""
    whole = TrainWorker.save

    def save(self: TrainWorker, step: int) -> None:
        whole(self, step)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(TrainWorker, "save", save)


def series_of(run: Run) -> dict[str, dict[int, float]]:
    """Return what a run has logged at each step, but for times and speeds."""
    series = read_series((Path(run.folder) / METRICS).read_text())
    return {k: v for k, v in series.items() if not k.endswith(("images_per_s", "fraction", "_s"))}


@pytest.mark.parametrize("saved", [{"every_epochs": 1}, {"every_steps": 1}])
def test_what_fails_goes_on_from_its_checkpoint_to_the_same_numbers(
    saved: dict[str, int],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A report is due at the end of an epoch, so one of the checkpoints lies before it."""
    undisturbed = run_of(experiment(folder, tmp_path / "whole", checkpoint=saved))
    failing(monkeypatch, [RuntimeError("the stream lost a step"), MemoryError("a page")])
    again = run_of(experiment(folder, tmp_path / "again", checkpoint=saved))
    assert series_of(again) == series_of(undisturbed)
    assert len(series_of(again)["train/mean_loss"]) == 3
    assert "rank 0 failed: RuntimeError: the stream lost a step" in caplog.text
    assert "rank 0 failed: MemoryError: a page" in caplog.text


def test_it_ends_after_as_many_failures_as_are_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainWorker, "run", lambda _: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RunError, match=r"failed 3 times after step 0 .* comes again"):
        run_of(experiment(folder, tmp_path, scaling={"max_failures": 2}))
    with pytest.raises(RunError, match="training failed: RuntimeError: no"):
        run_of(experiment(folder, tmp_path / "once", scaling={"max_failures": 0}))


def test_what_no_restart_mends_ends_it_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []

    def full(_: TrainWorker) -> None:
        starts.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrainWorker, "run", full)
    with pytest.raises(StorageError):
        run_of(experiment(folder, tmp_path))
    assert len(starts) == 1


def test_who_watches_ends_it_by_an_error_and_no_thread_of_the_rank_stays(
    folder: Path, tmp_path: Path
) -> None:
    before = {thread.name for thread in threading.enumerate()}

    def end(record: dict[str, float]) -> None:
        if record["step"] >= 2:
            raise CollapseError("seen enough")

    with pytest.raises(CollapseError, match="seen enough"):
        run_of(experiment(folder, tmp_path), on_progress=end)
    for thread in threading.enumerate():
        if thread.name in {"heartbeat", "requests"} - before:
            thread.join(timeout=10)
            assert not thread.is_alive(), thread.name


def test_one_worker_on_any_cpu_can_train_in_process(folder: Path, tmp_path: Path) -> None:
    for scaling, expected in [
        ({}, True),
        ({"num_workers": 1, "threads_per_worker": 2}, True),
        ({"num_workers": 2}, False),
        ({"num_workers": [1, 2]}, False),
        ({"gpus_per_worker": 1.0}, False),
        ({"data_label_selector": {"node-group": "data"}}, False),
        ({"worker_label_selector": {"node-group": "train"}}, False),
    ]:
        made = experiment(folder, tmp_path, scaling=scaling)
        assert can_train_in_process(made) == expected, scaling
