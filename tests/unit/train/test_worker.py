"""Errors of ours come out of whatever Ray wraps them in; a run is trained by one driver."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from importlib import import_module
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayTaskError

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed import collectives
from simclr_ray.errors import (
    ConfigError,
    DataError,
    DivergedError,
    RunError,
    StorageError,
    TrackingError,
)
from simclr_ray.storage import checkpoint, retries, run_lock
from simclr_ray.storage.checkpoint import RECORD
from simclr_ray.storage.run_folder import BAD_ROWS, RunFolder
from simclr_ray.storage.space import writing
from simclr_ray.tracking.runs import TrackedRun
from simclr_ray.train.context import SingleRankContext
from simclr_ray.train.failures import unwrap_error
from simclr_ray.train.finetune import _frozen, _num_bad
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.recorder import RunRecorder
from simclr_ray.train.resolve import resolve
from simclr_ray.train.worker import (
    TrainWorker,
    WorkerInput,
    check_storage,
    prepare_process,
    train_rank,
)
from tests.ray.images import write_shapes


def raised_in_a_task(error: Exception) -> BaseException:
    """Return what `ray.get` raises."""
    raised = RayTaskError("f", "Traceback ...", error)  # type: ignore[no-untyped-call] # Ray's
    found: BaseException = raised.as_instanceof_cause()  # type: ignore[no-untyped-call] # Ray's
    return found


def test_an_error_of_ours_that_a_task_raised_is_found_with_its_own_text() -> None:
    own = DataError("train.parquet is no parquet")
    raised = raised_in_a_task(own)
    assert isinstance(raised, DataError)  # and a RayTaskError, whose text is a traceback
    assert unwrap_error(raised) is own
    outer = RuntimeError("outer")
    outer.__cause__ = raised
    assert unwrap_error(outer) is own


def test_an_error_that_is_not_ours_is_not_found() -> None:
    assert unwrap_error(raised_in_a_task(ValueError("x"))) is None


@pytest.mark.parametrize("shared", [True, False])
def test_a_worker_takes_from_the_config_what_carries_small_vectors(
    monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    monkeypatch.setattr(collectives, "_shared_memory_allowed", not shared)
    scaling = {"shared_memory": shared, "threads_per_worker": torch.get_num_threads()}
    tree = {"name": "t", "data": {"train": "x"}, "scaling": scaling}
    experiment = cfg.validate(Experiment, tree)
    prepare_process(experiment, 1)
    assert collectives._shared_memory_allowed == shared
    assert experiment.digest() == cfg.validate(Experiment, tree | {"scaling": {}}).digest()


def test_what_ended_a_run_is_told_where_mlflow_does_not_answer_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = _small_experiment(tmp_path)
    driver = import_module("simclr_ray.train.driver")

    def diverge(*_: object) -> None:
        raise DivergedError("the loss is not finite at step 3")

    def lock(*_: object) -> None:
        raise TrackingError("end the run: database is locked")

    for name in ("connect", "wait_for_room", "check_machine"):
        monkeypatch.setattr(driver, name, lambda *_: None)
    monkeypatch.setattr(driver, "_trained", diverge)
    monkeypatch.setattr(TrackedRun, "finish", lock)
    monkeypatch.setattr("simclr_ray.tracking.sender.PATIENCE_S", 0.5)
    with pytest.raises(DivergedError, match="not finite at step 3"):
        driver.pretrain(experiment)
    (said,) = [r.getMessage() for r in caplog.records if r.name.endswith("sender")]
    assert "the status FAILED (end the run: database is locked)" in said
    assert f"simclr-ray run sync {tmp_path}/runs/" in said


def test_a_weight_that_is_not_finite_before_the_first_step_is_not_laid_on_the_rate() -> None:
    weights = {"encoder.stem.weight": torch.tensor([1.0, float("nan")])}
    check = TrainWorker._check_finite
    with pytest.raises(DivergedError, match=r"weight is not .* before the first step") as early:
        check(TrainWorker.__new__(TrainWorker), 0, weights)
    with pytest.raises(DivergedError, match=r"not finite at step 7$") as late:
        check(TrainWorker.__new__(TrainWorker), 7, weights)
    assert (early.value.rate_may_help, late.value.rate_may_help) == (False, True)
    health = HealthWatch(cfg.validate(Experiment, {"name": "t", "data": {"train": "x"}}))
    assert health.explained(early.value) is early.value
    assert "probably" in str(health.explained(late.value))


def test_a_worker_ends_the_run_where_its_folder_is_not_that_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simclr_ray.train.worker.STORAGE_S", 0.0)
    folder = RunFolder.of(str(tmp_path / "mine"), "r-1")
    other = RunFolder.of(str(tmp_path / "another machine's"), "r-1")
    with folder.lock():
        assert folder.local is not None
        driver = run_lock.text_of(folder.local)
        check_storage(folder, driver)
        for at in ("there is none", "held by a driver of its own"):
            if at.startswith("held"):
                other.write_text(run_lock.HOLDER, "process 7 on node-2")
            with pytest.raises(ConfigError, match=rf"^storage.*is not that of {driver}"):
                check_storage(other, driver)
        check_storage(other, "")  # of a process on the driver's machine
        check_storage(RunFolder("s3://bucket/runs", "r-1"), driver)  # everyone's
    inbox: Queue[object] = Queue()
    resolved = resolve(_small_experiment(tmp_path))
    worker_input = WorkerInput(resolved, inbox, driver="process 7 on node-2")
    with resolved.folder.lock(), pytest.raises(ConfigError, match="not that of process 7"):
        train_rank(worker_input, SingleRankContext(resolved.folder, keep=None))
    assert any(isinstance(item, ConfigError) for item in inbox.queue)  # what the driver ends by


def test_a_checkpoint_is_uploaded_again_where_storage_fails_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("simclr_ray.storage.retries.time.sleep", waits.append)
    left = [OSError(errno.ESTALE, "Stale file handle"), OSError("AWS Error NETWORK_CONNECTION")]
    put = RunFolder.put_checkpoint

    def fails_twice(folder: RunFolder, local: Path, name: str) -> None:
        if left:
            with writing(folder.uri):
                raise left.pop(0)
        put(folder, local, name)

    monkeypatch.setattr(RunFolder, "put_checkpoint", fails_twice)
    worker = TrainWorker.__new__(TrainWorker)
    worker.folder, worker.uploaded = RunFolder.of(str(tmp_path / "runs"), "r-1"), threading.Event()
    written = tmp_path / "written"
    checkpoint.write(written, 8, {"w": torch.ones(2)}, {})
    name = checkpoint.new_name(8)
    worker._upload(written, name)
    assert worker.folder.checkpoints() == [name]
    assert waits == list(retries.WAITS_S[:2])
    assert len([r for r in caplog.records if "again in" in r.getMessage()]) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_a_disk_does_not_take_is_not_written_again(number: int) -> None:
    calls: list[int] = []

    def write() -> None:
        calls.append(number)
        with writing("/data/runs"):
            raise OSError(number, "no")

    with pytest.raises(StorageError):
        retries.with_retries(write, "step-1", (0.0,))
    assert len(calls) == 1


@pytest.mark.parametrize("reason", ["taken", "resize", "stop", ""])
def test_ranks_that_end_at_an_epoch_wait_for_its_checkpoint(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed: list[str] = []
    monkeypatch.setattr(collectives, "broadcast_text", agreed.append)
    worker = TrainWorker.__new__(TrainWorker)
    worker.saved, worker.uploaded = 8, threading.Event()
    worker.requests = SimpleNamespace(reason=reason)  # type: ignore[assignment] # all that is read of it
    if not reason:
        worker.save(8)  # the run goes on, and does not wait
        return
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(worker.save, 8)
        _, waiting = wait([ended], timeout=0.1)
        assert waiting
        assert agreed == []
        worker.uploaded.set()
        ended.result()
    assert agreed == [""]


def test_checkpoints_of_one_run_in_two_storages_have_names_of_their_own(tmp_path: Path) -> None:
    prefixes = set()
    for storage in ("a", "b"):
        worker = TrainWorker.__new__(TrainWorker)
        worker.folder = RunFolder.of(str(tmp_path / storage), "run-0123")
        prefixes.add(worker._scratch_prefix)
    assert len(prefixes) == 2
    assert all(prefix.startswith("simclr_ray-run-0123-") for prefix in prefixes)


def test_a_bucket_that_cannot_be_listed_leaves_the_newest_step_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OSError("SlowDown")

    recorder, folder = RunRecorder.__new__(RunRecorder), RunFolder.of(str(tmp_path), "run")
    for step in (8, 9):
        (tmp_path / "run" / f"step-0000000{step}-00000000").mkdir(parents=True)
    (tmp_path / "run" / "step-00000008-00000000" / RECORD).touch()
    recorder.resolved = SimpleNamespace(folder=folder)  # type: ignore[assignment] # all that is read of it
    recorder._kept = 4
    assert recorder._newest_step() == 8  # the one of step 9 is half uploaded
    monkeypatch.setattr(RunFolder, "_entries", away)
    assert recorder._newest_step() == 4


def test_a_spoiled_line_of_bad_rows_counts_as_none(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "run")
    folder.write_text(BAD_ROWS, '{"id": 3}\n{"id": 3}\n{"id"\n[]\n{"id": 5}\n')
    assert _num_bad(folder) == 2


def test_a_frozen_encoder_has_nothing_to_go_back_for(tmp_path: Path) -> None:
    tree = {"name": "t", "scaling": {}, "health": {"on_collapse": "rollback"}}
    assert (tree | _frozen(tree, RunFolder.of(str(tmp_path), "run"), "1pct"))["health"] == {}


def test_a_second_driver_of_the_same_run_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = _small_experiment(tmp_path)
    name = resolve(experiment).run_name
    driver = import_module("simclr_ray.train.driver")  # the package has a function of that name
    monkeypatch.setattr(driver, "HELD_S", 0.0)
    monkeypatch.setattr(driver, "connect", lambda _: pytest.fail("a cluster was started"))
    with (
        RunFolder.of(str(tmp_path / "runs"), name).lock(),
        ThreadPoolExecutor(1) as pool,  # a thread that holds a folder may hold it again
        pytest.raises(RunError, match="is being run by process"),
    ):
        pool.submit(driver.pretrain, experiment).result()


def _small_experiment(folder: Path) -> Experiment:
    write_shapes(folder / "train.parquet", 40)
    given = {"data.train": folder / "train.parquet", "storage": folder / "runs"}
    sizes = {"batch_size": 16, "epochs": 1}
    overrides = [f"{key}={value}" for key, value in (given | sizes).items()]
    return Experiment.load("cifar10_study_cpu", *overrides, "data.test=''")
