"""How a run stands is read off its folder: time left, ranks, and the error that it ended by."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from simclr_ray.errors import DivergedError, RunError
from simclr_ray.storage.checkpoint import RECORD
from simclr_ray.storage.last_error import ERROR, RESTART, LastError, recorded
from simclr_ray.storage.metrics_log import (
    FIRST_BATCH,
    RECENT_S,
    TAIL_BYTES,
    append_record,
    newest_record,
    read_series,
    seconds_left,
)
from simclr_ray.storage.rank_states import RANKS, RankState, RankStates
from simclr_ray.storage.run_folder import CONFIG_FILE, METRICS, RunFolder
from simclr_ray.storage.run_status import LOG_BYTES, status_of_run

Record = dict[str, Any]


def start(at: float, step: int) -> Record:
    return {"time": at, "step": step, "total": 1000, FIRST_BATCH: 2.0}


def report(at: float, step: int, total: int = 1000) -> Record:
    return {"time": at, "step": step, "total": total, "train/loss": 5.0}


def test_time_left_is_that_of_the_pace_so_far() -> None:
    records = [start(100, 0), *(report(100 + 2.0 * step, step) for step in range(10, 210, 10))]
    assert seconds_left(records) == pytest.approx(2.0 * 800)
    # what lies between two reports counts: evaluations and checkpoints are made in between
    records += [{"time": 560.0, "step": 200, "eval/knn_top1": 0.5}, report(600, 210)]
    assert seconds_left(records) == pytest.approx((600 - 120) / 200 * 790)


def test_time_left_follows_the_last_half_hour_alone() -> None:
    slow = [report(10.0 * step, step) for step in range(0, 500, 10)]
    begin = slow[-1]["time"]
    fast = [report(begin + 5.0 * n, 490 + n) for n in range(10, 500, 10)]
    assert fast[-1]["time"] - begin > RECENT_S
    assert seconds_left([*slow, *fast]) == pytest.approx(5.0 * (1000 - fast[-1]["step"]))


def test_reports_that_are_far_apart_give_a_pace() -> None:
    records = [report(0, 100), report(4000, 200), report(9000, 300)]
    assert seconds_left(records) == pytest.approx(5000 / 100 * 700)


def test_after_a_resumption_only_what_came_since_counts() -> None:
    before = [start(0, 0), *(report(10.0 * step, step) for step in range(10, 110, 10))]
    resumed = [start(90_000, 80), report(90_010, 90), report(90_030, 110), report(90_050, 130)]
    assert seconds_left([*before, *resumed[:2]]) is None  # one report is no pace
    assert seconds_left([*before, *resumed]) == pytest.approx(40 / 40 * 870)


def test_after_a_rollback_the_steps_that_were_left_do_not_count() -> None:
    records = [report(10.0 * step, step) for step in range(10, 510, 10)]
    records += [report(5100, 110), report(5120, 120), report(5140, 130)]  # from a checkpoint
    assert seconds_left(records) == pytest.approx(2.0 * 870)


def test_there_is_no_time_left_where_nothing_was_logged_or_all_is_done() -> None:
    assert seconds_left([]) is None
    assert seconds_left([start(0, 0)]) is None
    assert seconds_left([report(0, 990), report(10, 1000)]) == 0
    broken: list[Record] = [
        {"step": "x", "train/loss": 1},
        {"train/loss": 2},
        report(1, 3) | {"time": None},
        report(2, 4) | {"step": math.nan},
    ]
    assert seconds_left(broken) is None


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Give a run that has logged two reports of a thousand steps."""
    made = RunFolder.of(str(tmp_path), "small-0123")
    made.write_text(CONFIG_FILE, "name: small\n")
    lines = [json.dumps(record) for record in (report(0, 100), report(50, 200))]
    made.write_text(METRICS, "\n".join(lines) + "\n")
    return made


RANKS_UP = [RankState(0, "10.0.0.2", "step", 210, 0.4), RankState(1, "10.0.0.3", "data", 210, 9.0)]


def test_a_running_run_says_where_its_ranks_stand_and_how_long_it_takes(folder: RunFolder) -> None:
    folder.write_text(RANKS, RankStates.now(RANKS_UP).text)
    with folder.lock():
        status = status_of_run(folder)
    assert status.state == "running"
    assert status.seconds_left == pytest.approx(0.5 * 800)
    assert status.ranks.ranks == tuple(RANKS_UP)
    assert time.time() - status.ranks.at < 60
    stopped = status_of_run(folder)
    assert (stopped.state, stopped.seconds_left) == ("stopped", None)


def test_a_remote_run_runs_while_its_driver_holds_it(folder: RunFolder) -> None:
    remote = RunFolder.at(f"file://{folder.uri}")  # no folder of ours to lock
    assert remote.local is None
    assert status_of_run(remote).state == "stopped"
    with remote.lock():
        assert status_of_run(remote).state == "running"
    assert status_of_run(remote).state == "stopped"


@pytest.mark.parametrize("value", [None, "x", math.nan, math.inf, [1]])
def test_of_a_record_only_numbers_count(folder: RunFolder, value: Any) -> None:
    spoiled = dict.fromkeys(("step", "total", "epoch", "train/loss"), value)
    lines = [report(50, 200) | {"epoch": 2.0}, spoiled]
    text = "\n".join(map(json.dumps, lines))
    folder.write_text(METRICS, text)
    status = status_of_run(folder)
    if isinstance(value, float):  # such a loss is shown, and such a step is none
        assert (status.step, status.total_steps, status.epoch) == (0, 0, 0)
        assert repr(status.metrics["train/loss"]) == repr(value)
    else:
        assert (status.step, status.total_steps, status.epoch) == (200, 1000, 2.0)
        assert read_series(text)["train/loss"] == {200: lines[0]["train/loss"]}


@pytest.mark.parametrize("tree", [[], {"ranks": 3}, {"ranks": [{"rank": "x"}]}, {"ranks": [5]}])
def test_broken_files_count_as_absent(folder: RunFolder, tree: Any) -> None:
    folder.write_text(RANKS, json.dumps(tree))
    folder.write_text(ERROR, json.dumps(tree))
    status = status_of_run(folder)
    assert (status.ranks.ranks, status.error) == ((), None)


def test_an_error_is_recorded_until_the_run_ends_well_and_a_stop_is_none(folder: RunFolder) -> None:
    with pytest.raises(DivergedError), recorded(folder):
        raise DivergedError("the loss is not finite\nat step 3, s3://me:secret@bucket")
    error = status_of_run(folder).error
    assert error is not None
    assert error.kind == "DivergedError"
    assert error.message == "the loss is not finite at step 3, s3://me:***@bucket"
    assert time.time() - error.at < 60
    with pytest.raises(KeyboardInterrupt), recorded(folder):
        raise KeyboardInterrupt
    assert status_of_run(folder).error == error
    with recorded(folder):
        pass
    assert status_of_run(folder).error is None


def test_a_run_that_an_error_ended_has_failed_until_it_goes_on(folder: RunFolder) -> None:
    LastError.of(RESTART, "rank 1 was lost").write(folder)
    assert status_of_run(folder).state == "stopped"  # a restart has not ended it
    LastError.of("RunError", "the disk is full").write(folder)
    assert status_of_run(folder).state == "failed"
    with folder.lock():
        assert status_of_run(folder).state == "running"
    later = report(time.time() + 60, 300)
    folder.write_text(METRICS, f"{folder.read_text(METRICS)}{json.dumps(later)}\n")
    assert status_of_run(folder).state == "stopped"  # by someone, after it had gone on
    spoiled = {**later, "time": "yesterday"}
    folder.write_text(METRICS, f"{folder.read_text(METRICS)}{json.dumps(spoiled)}\n")
    assert status_of_run(folder).state == "failed"


def saved(folder: RunFolder, step: int) -> Path:
    """Leave a checkpoint in the folder; return its record."""
    record = Path(folder.uri) / f"step-{step:08d}-00000000" / RECORD
    record.parent.mkdir()
    record.touch()
    return record


def test_a_run_has_finished_by_a_checkpoint_of_its_last_step_that_is_whole(
    folder: RunFolder,
) -> None:
    saved(folder, 200)
    last = saved(folder, 1000)
    last.unlink()  # killed while it was copied
    status = status_of_run(folder)
    assert (status.state, status.step) == ("stopped", 200)
    assert status.checkpoints == ["step-00000200-00000000"]
    last.touch()
    assert status_of_run(folder).state == "finished"


def test_a_checkpoint_alone_does_not_say_that_it_is_the_last(folder: RunFolder) -> None:
    saved(folder, 200)
    folder.remove(METRICS)  # a bucket has the log a minute late
    status = status_of_run(folder)
    assert (status.state, status.step, status.total_steps) == ("stopped", 200, 0)
    folder.write_text(METRICS, json.dumps({"step": 200, "train/mean_loss": 0.5}))  # frozen
    assert status_of_run(folder).state == "finished"


def test_the_error_itself_is_raised_where_nothing_can_be_written(folder: RunFolder) -> None:
    shutil.rmtree(folder.uri)
    Path(folder.uri).write_text("a file in its place")
    with pytest.raises(RunError, match="itself"), recorded(folder):
        raise RunError("itself")


def test_of_a_long_log_the_end_is_read(folder: RunFolder) -> None:
    many = LOG_BYTES // len(json.dumps(report(0, 1))) + 1000
    with (Path(folder.uri) / METRICS).open("a") as log:
        for step in range(201, 201 + many):
            log.write(json.dumps(report(50 + step, step, 10**6)) + "\n")
    status = status_of_run(folder)
    assert (status.step, status.total_steps) == (200 + many, 10**6)
    text = folder.read_text(METRICS, 100) or ""
    assert len(text) == 100
    assert (folder.read_text(METRICS) or "").endswith(text)
    assert folder.read_text(CONFIG_FILE, 10**6) == "name: small\n"


def test_the_newest_record_of_a_kind_is_read_from_the_end_however_far(tmp_path: Path) -> None:
    log = tmp_path / "other_metrics.jsonl"
    assert newest_record(log) == {}
    append_record(log, {"step": 6, "system/cpu": 1.0})
    append_record(log, {"step": 7, "system/cpu": 1.0})
    for step in range(2000):
        append_record(log, {"step": step, "final/knn_top1": 0.5, "final/linear_top1": 0.25})
    assert log.stat().st_size > 2 * TAIL_BYTES
    assert newest_record(log)["step"] == 1999
    assert newest_record(log, "system/")["step"] == 7
    assert newest_record(log, "gpu/") == {}
