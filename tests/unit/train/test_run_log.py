"""The log of a run in a bucket that fails for a while, and of one that is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CollapseError, RunError, StorageError
from simclr_ray.storage import log_pieces
from simclr_ray.storage.filesystem import write_whole
from simclr_ray.storage.log_pieces import BucketLog
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.train import driver, run_log, stop
from simclr_ray.train.run_log import RunLog

RECORD = {"step": 1, "epoch": 0.1, "total": 10, "train/mean_loss": 1.0}


class Clock:
    """Stands for the module `time`; to wait takes none."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_log, "time", clock)
    return clock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Give a folder that is remote as far as a log knows."""
    monkeypatch.setattr(RunFolder, "local", None)
    (tmp_path / "r-1").mkdir()
    return RunFolder(tmp_path.as_uri(), "r-1")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Give a list whose first item says whether the store fails now."""
    fails = [True]

    def write(files: fs.FileSystem, path: str, data: bytes) -> None:
        if fails[0]:
            raise OSError("AWS Error NETWORK_CONNECTION")
        write_whole(files, path, data)

    monkeypatch.setattr(log_pieces, "write_whole", write)
    return fails


def upload_if_due(log: RunLog) -> None:
    """Have a log uploaded if that is due, and wait for it."""
    log.upload_if_due()
    if log._thread is not None:
        log._thread.join()


def test_a_store_that_fails_for_a_while_ends_no_run(
    folder: RunFolder, failing: list[bool], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLog(folder) as log:
        log.append(METRICS, RECORD)
        for _ in range(10):
            clock.now += 61
            upload_if_due(log)
        assert caplog.text.count("the log of the run cannot be uploaded") == 10
        assert folder.read_text(METRICS) is None
        failing[0] = False
        upload_if_due(log)  # not yet due
        assert folder.read_text(METRICS) is None
        clock.now += 61
        upload_if_due(log)
        assert folder.read_text(METRICS) is not None


def test_a_store_that_fails_for_half_an_hour_ends_it(
    folder: RunFolder, failing: list[bool], clock: Clock
) -> None:
    assert failing == [True]

    def run() -> None:
        with RunLog(folder) as log:
            clock.now += 9000  # held up for long: it has not failed for so long
            log.append(METRICS, RECORD)
            upload_if_due(log)
            while clock.now < 12600:
                clock.now += 61
                upload_if_due(log)

    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        run()
    assert 1800 < clock.now - 9000 < 1930


def test_at_the_end_it_is_tried_again_and_said_then(
    folder: RunFolder, failing: list[bool], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="cannot be uploaded"), RunLog(folder) as log:
        log.append(METRICS, RECORD)
    assert clock.now == 0  # of what is written after a run
    patient = RunLog(folder, is_patient=True)
    with pytest.raises(RunError, match="cannot be uploaded"), patient as log:
        log.append(METRICS, RECORD)
    assert clock.now == sum(run_log.END_PAUSES_S)

    def mend(_: float) -> None:
        failing[0] = False

    monkeypatch.setattr(clock, "sleep", mend)
    with RunLog(folder, is_patient=True) as log:
        log.append(METRICS, RECORD)
    assert folder.read_text(METRICS) is not None


def test_a_store_that_is_slow_holds_up_nobody_and_ends_the_run_after_half_an_hour(
    folder: RunFolder, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, began = threading.Event(), threading.Event()
    uploads, bring_up = list[str](), BucketLog.bring_up

    def slow(self: BucketLog, local: Path, *, is_last: bool = False) -> None:
        uploads.append(local.name)
        began.set()
        assert answers.wait(20)
        bring_up(self, local, is_last=is_last)

    monkeypatch.setattr(BucketLog, "bring_up", slow)
    monkeypatch.setattr(run_log, "WAIT_S", 0.01)
    with RunLog(folder) as log:
        log.append(METRICS, RECORD)
        for _ in range(20):
            clock.now += 61
            log.upload_if_due()  # which returns at once
        assert began.wait(20)
        assert uploads == [METRICS]  # one at a time
        with pytest.raises(OSError, match="does not end"):
            log.upload()
        clock.now += 1800
        with pytest.raises(OSError, match="no answer for 49 minutes"):
            log.upload_if_due()
        log.append(METRICS, RECORD)
        answers.set()
        assert log._thread is not None
        log._thread.join()
    assert (folder.read_text(METRICS) or "").count("\n") == 2  # at the end what came since


@pytest.mark.parametrize("error", [StorageError("the bucket is full"), ValueError("of\nArrow")])
def test_what_an_upload_beside_the_run_meets_reaches_who_watches_it(
    folder: RunFolder, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with RunLog(folder) as log, monkeypatch.context() as patch:
        patch.setattr(BucketLog, "bring_up", fail)
        log.append(METRICS, RECORD)
        clock.now += 61
        upload_if_due(log)
        with pytest.raises(OSError, match=r"the bucket is full|be uploaded: of Arrow"):
            log.upload_if_due()
        upload_if_due(log)  # once


def test_a_kill_costs_a_minute_and_the_next_start_goes_on_with_the_same_log(
    folder: RunFolder, clock: Clock
) -> None:
    killed = RunLog(folder).__enter__()  # whose end never comes
    for step in range(3):
        killed.append(METRICS, {"step": step})
        clock.now += 61
        upload_if_due(killed)
    killed.append(METRICS, {"step": 3})
    with RunLog(folder) as log:
        assert [record["step"] for record in log.records(METRICS)] == [0, 1, 2]
        log.append(METRICS, {"step": 9})
    steps = [record["step"] for record in read_records(folder.read_text(METRICS) or "")]
    assert steps == [0, 1, 2, 9]
    killed._scratch.close()


def test_where_a_bucket_does_not_say_whether_to_stop_a_run_that_ended_early_was_stopped(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not driver._is_stop_requested(folder)

    def fail(_: object) -> bool:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(stop, "is_requested", fail)
    assert driver._is_stop_requested(folder)


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_collapse_at_the_last_step_ends_the_same_command_again(policy: str) -> None:
    tree = {
        "name": "t",
        "data": {"train": "x"},
        "batch_size": 64,
        "health": {"on_collapse": policy},
    }
    collapsed = {
        "step": 900, "epoch": 9.0, "eval/effective_rank": 1.02, "eval/feature_std": 0.001,
        "eval/weight_norm": 27.0, "eval/margin": 0.0, "eval/pair_top1": 0.02,
        "eval/effective_rank_z": 1.0, "eval/feature_std_z": 0.0,
    }  # fmt: skip
    start = {key.replace("eval/", "start/"): 4.0 for key in collapsed if "/" in key}
    views = {"start/equal_views": 0.0, "start/blank_views": 0.0, "start/copied_images": 0.0}
    records = [{"step": 0, "epoch": 0.0, **start, **views}, collapsed]
    resolved: Any = SimpleNamespace(config=cfg.validate(Experiment, tree), warmup_steps=10)
    tracked: Any = SimpleNamespace(log=SimpleNamespace(records=lambda _: records))
    if policy == "warn":
        driver._check_ended_well(resolved, tracked)
        return
    with pytest.raises(CollapseError, match=r"effective rank is 1\.02"):
        driver._check_ended_well(resolved, tracked)
