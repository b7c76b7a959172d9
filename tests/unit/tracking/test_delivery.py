"""A run's log reaches MLflow: each point once, whatever fails on the way; nobody waits for it."""

from __future__ import annotations

import collections
import json
import logging
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from simclr_ray.config.experiment import TrackingConfig
from simclr_ray.errors import TrackingError
from simclr_ray.storage.metrics_log import append_record, read_records
from simclr_ray.tracking import delivery as module
from simclr_ray.tracking.delivery import STATE, Delivery, DeliveryCounts
from simclr_ray.tracking.runs import MetricPoint, TrackedRun, Tracker
from simclr_ray.tracking.sender import Sender, sending

LOG = "metrics.jsonl"
AGAIN = "simclr-ray run sync RUN"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """Return one store for the module: the first opening of a store takes seconds."""
    return Tracker.open(TrackingConfig(), str(tmp_path_factory.mktemp("delivery")))


@pytest.fixture
def run(tracker: Tracker) -> TrackedRun:
    return tracker.start_run("run", params={}, tags={})


def again(run: TrackedRun) -> TrackedRun:
    """Return the run as another process has it."""
    return TrackedRun(run.uri, run.run_id, run.experiment_id, resumed=True)


def log_steps(folder: Path, steps: Sequence[int]) -> None:
    for step in steps:
        record = {"step": step, "epoch": step / 10, "train/loss": 1 / (1 + step), "train/lr": 0.1}
        append_record(folder / LOG, record)


def stored(run: TrackedRun, key: str = "train/loss") -> list[int]:
    """Return the steps of a metric's history, repeated ones as often as they are there."""
    history = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, key)
    return sorted(metric.step for metric in history)


def deliver(run: TrackedRun, folder: Path) -> int:
    """Deliver all; return the number of points."""
    delivery, points = Delivery(run, folder, (LOG,)), 0
    while (sent := delivery.send()) is not None:
        points += sent
    return points


class Failing(TrackedRun):
    """A run whose store refuses what `fails` says, before or after it has taken it."""

    fails: collections.deque[str]

    @classmethod
    def of(cls, run: TrackedRun, *fails: str) -> Failing:
        made = cls(run.uri, run.run_id, run.experiment_id, resumed=run.is_resumed)
        made.fails = collections.deque(fails)
        return made

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        how = self.fails.popleft() if self.fails else ""
        if how == "before":
            raise TrackingError("no answer")
        super().log_points(points)
        if how == "after":
            raise TrackingError("no answer")


def test_a_log_is_delivered_in_few_requests_and_then_from_where_it_stood(
    run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    log_points = TrackedRun.log_points

    def counting(run: TrackedRun, points: Sequence[MetricPoint]) -> None:
        calls.append(len(points))
        log_points(run, points)

    monkeypatch.setattr(TrackedRun, "log_points", counting)
    log_steps(tmp_path, range(700))
    assert deliver(run, tmp_path) == 1400
    assert calls == [1000, 400]
    log_steps(tmp_path, range(700, 710))
    assert deliver(again(run), tmp_path) == 20
    assert deliver(again(run), tmp_path) == 0
    assert stored(run) == list(range(710))


def test_a_point_has_the_time_at_which_it_was_logged(run: TrackedRun, tmp_path: Path) -> None:
    log_steps(tmp_path, [3])
    (record,) = read_records((tmp_path / LOG).read_text())
    deliver(run, tmp_path)
    (metric,) = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, "train/lr")
    assert abs(metric.timestamp - 1000 * record["time"]) <= 1
    assert (metric.step, metric.value) == (3, 0.1)


def test_steps_that_a_restart_repeats_are_delivered_once(run: TrackedRun, tmp_path: Path) -> None:
    log_steps(tmp_path, range(6))
    deliver(run, tmp_path)
    log_steps(tmp_path, range(3, 9))  # of another process, from the checkpoint of step 2
    assert deliver(again(run), tmp_path) == 6
    log_steps(tmp_path, [7, 8, 9, 9])
    assert deliver(run, tmp_path) == 2
    assert stored(run) == list(range(10))


def test_what_an_earlier_release_left_out_is_filled_in(run: TrackedRun, tmp_path: Path) -> None:
    for step in (0, 1, 4, 5):
        run.log_metrics({"train/loss": 1.0}, step)
    log_steps(tmp_path, range(7))
    (tmp_path / STATE).write_text("{torn")  # counts as none
    assert deliver(again(run), tmp_path) == 3 + 7
    assert stored(run) == list(range(7))


def test_a_line_that_is_cut_off_is_left_until_it_is_whole_or_another_follows(
    run: TrackedRun, tmp_path: Path
) -> None:
    log_steps(tmp_path, [0])
    whole = (tmp_path / LOG).read_bytes()
    with (tmp_path / LOG).open("ab") as file:
        file.write(whole[:20])
    assert deliver(run, tmp_path) == 2
    log_steps(tmp_path, [1])
    assert (tmp_path / LOG).read_bytes().startswith(whole + whole[:20] + b"\n{")
    assert deliver(run, tmp_path) == 2
    assert stored(run) == [0, 1]


def test_what_is_no_point_and_what_is_not_finite_stops_nothing(
    run: TrackedRun, tmp_path: Path
) -> None:
    lines = ["[]", "nonsense", '{"a/b": 1}', '{"step": "x", "a/b": 1}', '{"step": 1, "a/b": "x"}']
    (tmp_path / LOG).write_text("\n".join(lines) + "\n")
    append_record(tmp_path / LOG, {"step": 2, "a/nan": math.nan, "a/up": math.inf, "a/b?": 1})
    assert deliver(run, tmp_path) == 3
    values = MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.metrics
    assert math.isnan(values["a/nan"])
    assert values["a/b_"] == 1


def test_a_log_that_was_begun_anew_is_read_from_its_start(run: TrackedRun, tmp_path: Path) -> None:
    log_steps(tmp_path, range(5))
    deliver(run, tmp_path)
    (tmp_path / LOG).unlink()
    log_steps(tmp_path, [5])
    assert deliver(again(run), tmp_path) == 2
    other = TrackedRun(run.uri, run.run_id, run.experiment_id, resumed=True)
    assert Delivery(other, tmp_path, (LOG,)).undelivered() == (0, 0, "")


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((0, 0, ""), ""),
        ((0, 0, "KILLED"), "the status KILLED"),
        ((1, 2, ""), "1 point and 2 other writes"),
        ((1_200, 1, "FINISHED"), "1,200 points, 1 other write and the status FINISHED"),
    ],
)
def test_counts_are_the_end_of_a_sentence(counts: tuple[int, int, str], text: str) -> None:
    assert str(DeliveryCounts(*counts)) == text


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_request_that_fails_loses_and_repeats_nothing(
    how: str, run: TrackedRun, tmp_path: Path
) -> None:
    log_steps(tmp_path, range(5))
    delivery = Delivery(Failing.of(run, how), tmp_path, (LOG,))
    with pytest.raises(TrackingError):
        delivery.send()
    assert delivery.undelivered().points == 10  # not known to be there
    while delivery.send() is not None:
        pass
    assert stored(run) == list(range(5))
    assert stored(run, "train/lr") == list(range(5))


def test_an_outage_is_one_line_when_it_begins_and_one_when_it_ends(
    run: TrackedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with sending(Delivery(Failing.of(run, "before", "after"), tmp_path, (LOG,)), AGAIN) as sender:
        log_steps(tmp_path, range(4))
        sender.wake()
        wait_for(lambda: "again" in caplog.text)
        log_steps(tmp_path, range(4, 6))
        sender.wake()
    begins, ends = [r.getMessage() for r in caplog.records]
    assert begins == "no answer; the run goes on, and its points are delivered later"
    # those that had arrived are looked up, and not sent again
    assert ends == "MLflow takes the run's points again: 0 points delivered later"
    assert stored(run) == list(range(6))


def wait_for(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_at_the_end_what_is_left_is_one_line_with_the_command_that_delivers_it(
    run: TrackedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    delivery = Delivery(Failing.of(run, *["before"] * 99), tmp_path, (LOG,))
    with sending(delivery, AGAIN) as sender:
        sender.patience_s = 0.3
        log_steps(tmp_path, range(4))
        delivery.enqueue("text", text="table", file="scores.md")
        delivery.set_status("FINISHED")
        sender.wake()
        wait_for(lambda: sender.error)  # else the end may come before the first refusal
    # on a busy machine it had failed before the end was near, and said so
    *_, said = [r.getMessage() for r in caplog.records]
    assert said == (
        "not in MLflow yet: 8 points, 1 other write and the status FINISHED (no answer); "
        f"to deliver it: {AGAIN}"
    )
    client = MlflowClient(tracking_uri=run.uri)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert deliver(again(run), tmp_path) == 8
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["scores.md"]
    assert deliver(again(run), tmp_path) == 0
    assert stored(run) == list(range(4))


def test_a_request_that_never_ends_is_left_behind_and_changes_nothing_afterwards(
    run: TrackedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = threading.Event()

    class Hanging(TrackedRun):
        def log_points(self, points: Sequence[MetricPoint]) -> None:
            ends.wait()
            super().log_points(points)

    hanging = Hanging(run.uri, run.run_id, run.experiment_id, resumed=False)
    log_steps(tmp_path, range(3))
    sender = Sender(Delivery(hanging, tmp_path, (LOG,)), AGAIN)
    sender.patience_s = 0.3
    sender.start()
    began = time.monotonic()
    assert not sender.close()
    assert time.monotonic() - began < 20
    assert "6 points (no answer in 0.3 s)" in caplog.text
    assert deliver(again(run), tmp_path) == 6
    before = (tmp_path / STATE).read_text()
    ends.set()
    sender._thread.join()
    assert (tmp_path / STATE).read_text() == before
    assert stored(run) == [0, 1, 2]  # the same point is stored once


def test_a_locked_database_delays_no_record_and_loses_none(run: TrackedRun, tmp_path: Path) -> None:
    slowest = 0.0
    with (
        closing(sqlite3.connect(run.uri.removeprefix("sqlite:///"), isolation_level=None)) as other,
        sending(Delivery(run, tmp_path, (LOG,)), AGAIN) as sender,
    ):
        other.execute("BEGIN EXCLUSIVE")
        for step in range(20):
            began = time.monotonic()
            log_steps(tmp_path, [step])
            sender.wake()
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.1)
        assert not (tmp_path / STATE).exists()  # nothing has arrived
        other.execute("ROLLBACK")
    assert slowest < 3  # SQLite waits for five
    assert stored(run) == list(range(20))


KILLED = """
import os, signal, sys
from pathlib import Path
from simclr_ray.tracking.delivery import Delivery
from simclr_ray.tracking.runs import TrackedRun

uri, run_id, folder = sys.argv[1:]
log_points, calls = TrackedRun.log_points, []

def dying(run, points):
    log_points(run, points)
    calls.append(len(points))
    if len(calls) == 3:  # MLflow has them, and the position does not say so
        os.kill(os.getpid(), signal.SIGKILL)

TrackedRun.log_points = dying
delivery = Delivery(TrackedRun(uri, run_id, "", resumed=True), Path(folder), ("metrics.jsonl",))
while delivery.send() is not None:
    pass
"""


def test_a_process_that_is_killed_while_it_delivers_leaves_the_rest_to_the_next(
    run: TrackedRun, tmp_path: Path
) -> None:
    log_steps(tmp_path, range(2500))
    command = [sys.executable, "-c", KILLED, run.uri, run.run_id, str(tmp_path)]
    killed = subprocess.run(command, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert stored(run) == list(range(1500))
    state = json.loads((tmp_path / STATE).read_text())
    assert 0 < state["positions"][LOG] < (tmp_path / LOG).stat().st_size
    log_steps(tmp_path, range(2400, 2600))  # the run goes on from a checkpoint
    assert deliver(again(run), tmp_path) == 2 * (2600 - 1500)
    for key in ("train/loss", "train/lr"):
        assert stored(run, key) == list(range(2600))


def test_a_state_that_cannot_be_written_is_said_and_stops_nothing(
    run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module.DeliveryState, "write", full)
    log_steps(tmp_path, range(3))
    assert deliver(run, tmp_path) == 6
    assert deliver(again(run), tmp_path) == 0
