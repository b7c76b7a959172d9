"""What the driver makes of what workers send: bad rows counted whole, collapse, and restarts."""

from __future__ import annotations

import _thread
import json
import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util.queue import Empty

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import (
    CollapseError,
    DivergedError,
    RestartsError,
    RunError,
    SimclrRayError,
    TooManyBadImages,
)
from simclr_ray.storage.last_error import LastError
from simclr_ray.storage.metrics_log import FIRST_BATCH
from simclr_ray.storage.rank_states import RANKS, RankStates
from simclr_ray.storage.run_folder import BAD_ROWS
from simclr_ray.train import stop
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.heartbeat import Beat, RanksFailed, RanksMove, RankStarted
from simclr_ray.train.monitor import RunMonitor
from simclr_ray.train.recorder import OnProgress, RunRecorder, WorkerReady
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from simclr_ray.train.tracked import open_tracker, tracked_run
from tests.ray.images import write_shapes


class Inbox(queue.Queue[Any]):
    """Stands for Ray's queue."""

    def get(self, *args: Any, **options: Any) -> Any:
        try:
            return super().get(*args, **options)
        except queue.Empty:
            raise Empty from None

    def shutdown(self, *, force: bool) -> None:
        assert force


@pytest.fixture(autouse=True)
def interrupts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(_thread, "interrupt_main", lambda: calls.append("interrupt"))
    return calls


def resolved(folder: Path, *overrides: str) -> ResolvedExperiment:
    write_shapes(folder / "train.parquet", 40)
    given = {"data.train": folder / "train.parquet", "storage": folder / "runs", "batch_size": 16}
    changes = [f"{key}={value}" for key, value in given.items()]
    return resolve(Experiment.load("cifar10_study_cpu", *changes, "data.test=''", *overrides))


def fate(
    run: ResolvedExperiment, items: list[Any], on_progress: OnProgress | None = None
) -> SimclrRayError | None:
    """Return what ends a run whose workers send these items at once."""
    inbox: Any = Inbox()
    for item in items:
        inbox.put(item)
    with tracked_run(run, open_tracker(run)) as tracked:
        health = HealthWatch(run.config, run.warmup_steps)
        watcher = RunMonitor(inbox, tracked, on_progress, run, health)
        with watcher:
            pass
        watcher.say_bad_rows()
    return watcher.fatal


def bad(row: int) -> dict[str, Any]:
    return {"step": 1, "id": row, "reason": "truncated", "path": f"{row}.png"}


def test_all_rows_that_were_found_unusable_are_named(tmp_path: Path) -> None:
    run = resolved(tmp_path, "data.max_bad_fraction=0.1")
    error = fate(run, [*map(bad, range(23)), bad(3)])
    assert isinstance(error, TooManyBadImages)
    assert str(error).startswith("23 of 40 rows cannot be used")
    assert "0.png, 1.png" in str(error)
    assert str(error).endswith(f"all: {run.folder.uri}/{BAD_ROWS}")
    lines = (run.folder.read_text(BAD_ROWS) or "").splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(23))


def test_rows_that_others_stood_in_for_are_said_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fate(resolved(tmp_path, "data.max_bad_fraction=0.1"), [bad(1), bad(7)]) is None
    assert "2 images of 40 could not be used, and others stood in for them" in caplog.text


def test_a_collapse_ends_a_run_or_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"step": 10 * epoch, "epoch": epoch, "total": 90, "eval/effective_rank": 1.02}
        for epoch in (1, 2)
    ]
    assert isinstance(fate(resolved(tmp_path), records), CollapseError)
    assert fate(resolved(tmp_path, "health.on_collapse=warn", "seed=5"), records) is None
    assert caplog.text.count("(health.on_collapse=warn)") == 1


def test_a_worker_s_error_is_told_with_what_the_records_say_of_it(tmp_path: Path) -> None:
    steady = {"train/mean_loss": 2.5, "train/grad_norm": 3.0, "total": 90}
    records = [{"step": step, "epoch": step / 2, **steady} for step in (10, 20, 30)]
    error = fate(resolved(tmp_path), [*records, DivergedError("the loss is not finite at step 40")])
    assert isinstance(error, DivergedError)
    assert str(error).startswith("the loss is not finite at step 40; probably a single bad value")


def test_restarts_without_a_further_checkpoint_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failed = RanksFailed({"rank 1": "connection reset by peer"})
    run = resolved(tmp_path, "scaling.max_failures=2")
    assert fate(run, [failed, failed]) is None
    assert "rank 1 failed: connection reset by peer; all ranks start again after" in caplog.text
    error = fate(run, [failed] * 3)
    assert isinstance(error, RestartsError)
    assert error.exit_code == 75


def test_an_error_that_comes_again_ends_a_run_for_good(tmp_path: Path) -> None:
    """Whoever starts a run again at a 75 would do so for ever."""
    full = RanksFailed({"rank 1": "CUDA out of memory"}, will_recur=True)
    run = resolved(tmp_path, "scaling.max_failures=2")
    error = fate(run, [full] * 3)
    assert isinstance(error, RunError)
    assert error.exit_code == 1
    assert "each time by an error that comes again" in str(error)
    assert "last rank 1: CUDA out of memory" in str(error)
    lost = RanksFailed({"rank 1": "connection reset by peer"})
    assert isinstance(fate(run, [full, lost, full]), RestartsError)


def test_ranks_that_move_are_told_why_and_count_as_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "simclr_ray")
    run = resolved(tmp_path, "scaling.max_failures=1")
    nothing: Any = SimpleNamespace(
        log=SimpleNamespace(
            records=lambda _: [], append=lambda *_: None, upload_if_due=lambda: None
        ),
        sender=SimpleNamespace(wake=lambda: None),
    )
    recorder = RunRecorder(nothing, None, run, HealthWatch(run.config, run.warmup_steps))
    up = [RankStarted(rank, f"10.0.0.{rank}", "actor") for rank in range(3)]
    ready = [WorkerReady(rank, 3) for rank in range(3)]
    reasons = {
        "another number of workers has room": [],
        "1 node will be taken away": ["n1"],
        "2 nodes will be taken away": ["n1", "n2"],
    }
    for why, taken in reasons.items():
        recorder.take_all([*up, *ready[:2], {"step": 1, "epoch": 0.1, FIRST_BATCH: 0.5}])
        assert len(recorder.ranks.states()) == 3
        recorder.take(RanksMove(1200, 3, taken))
        assert caplog.messages[-1] == f"{why}: all 3 ranks have saved step 1,200 and start again"
        assert recorder.ranks.states() == []
        assert not stop.defer()  # no worker trains that would save: a signal ends the run at once
    assert "workers ready after" not in caplog.text  # those who were ready before do not count
    failed = RanksFailed({"rank 1": "reset"})
    recorder.take_all([failed, RanksMove(1200, 3, [])])
    ended = recorder.fatal
    assert ended is None
    recorder.take(failed)  # and no further checkpoint between them
    assert isinstance(recorder.fatal, RestartsError)
    told = len(caplog.messages)
    recorder.take(RanksMove(1200, 3, []))
    assert len(caplog.messages) == told  # of a run that ends nothing starts again


def test_what_fails_in_the_thread_ends_the_run_by_its_cause(tmp_path: Path) -> None:
    """Nobody would write the log any more, and a worker may wait for that."""

    def show(record: dict[str, float]) -> None:
        raise KeyError("images_per_s")

    error = fate(resolved(tmp_path), [{"step": 1, "epoch": 0.1, "total": 9}], show)
    assert isinstance(error, RunError)
    assert str(error) == "what watches the run has failed: KeyError: 'images_per_s'"


def test_where_the_ranks_stand_is_in_the_run_folder_while_they_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(tmp_path)
    monkeypatch.setattr("simclr_ray.train.monitor.WAIT_S", 0.05)
    inbox: Any = Inbox()
    for rank in (1, 0):
        inbox.put(RankStarted(rank, f"10.0.0.{rank}", "actor"))
    inbox.put(Beat(1, "data", 7, 3.0, 120.0))
    with tracked_run(run, open_tracker(run)) as tracked:
        health = HealthWatch(run.config, run.warmup_steps)
        with RunMonitor(inbox, tracked, None, run, health):
            deadline = time.monotonic() + 30
            while len(RankStates.read(run.folder).ranks) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            first, second = RankStates.read(run.folder).ranks
    assert (first.rank, first.node, first.phase, first.step) == (0, "10.0.0.0", "start", 0)
    assert (second.rank, second.node, second.phase, second.step) == (1, "10.0.0.1", "data", 7)
    assert second.seconds >= 3.0
    assert run.folder.read_text(RANKS) is None


def test_ranks_that_told_of_themselves_while_nobody_listened_are_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, stopped, goes_on = resolved(tmp_path), threading.Event(), threading.Event()
    clock: Any = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def show(_: object) -> None:  # as a terminal after Ctrl-S
        stopped.set()
        assert goes_on.wait(30)

    monkeypatch.setattr("simclr_ray.train.monitor.WAIT_S", 0.2)
    monkeypatch.setattr("simclr_ray.train.heartbeat.time", clock)
    inbox: Any = Inbox()
    inbox.put(RankStarted(0, "10.0.0.0", "actor"))
    inbox.put({"step": 1, "epoch": 0.1, "total": 9})
    with tracked_run(run, open_tracker(run)) as tracked:
        health = HealthWatch(run.config, run.warmup_steps)
        with RunMonitor(inbox, tracked, show, run, health):
            assert stopped.wait(30)
            clock.now = 1000.0  # of the ranks' watch; the monitor itself takes a moment as long
            time.sleep(0.3)
            inbox.put(Beat(0, "data", 7, 1.0, 120.0))
            goes_on.set()
    assert "has not answered" not in caplog.text


def test_why_ranks_started_again_is_the_last_error(tmp_path: Path) -> None:
    run = resolved(tmp_path, "scaling.max_failures=2")
    assert fate(run, [RanksFailed({"rank 1 on 10.0.0.1": "out of memory"})]) is None
    error = LastError.read(run.folder)
    assert error is not None
    assert (error.kind, error.message) == ("restart", "rank 1 on 10.0.0.1 failed: out of memory")
