"""Progress in a log, where lines stay, and on a terminal, where a bar moves."""

from __future__ import annotations

import io
import logging
import time

import pytest
from rich.console import Console

from simclr_ray.cli import console, progress
from simclr_ray.config.wording import clock, counted
from simclr_ray.studies.status import StudyStatus, TrialStatus


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """Return what is written; the parameter is whether it goes to a terminal."""
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=request.param, width=200, highlight=False)
    monkeypatch.setattr(progress, "err", terminal)
    monkeypatch.setattr(console, "err", terminal)
    return out


def record(step: int, total: int = 40) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / 20,
        "total": total,
        "train/mean_loss": 5.5,
        "train/loss": 5.4,
        "train/contrastive_top1": 0.25,
        "train/images_per_s": 1234.0,
        "train/data_wait_fraction": 0.03,
    }


@pytest.mark.parametrize("shown", [False], indirect=True)
def test_a_log_gets_the_first_and_the_last_record_and_none_in_quick_succession(
    shown: io.StringIO,
) -> None:
    with progress.RunProgress() as seen:
        for step in (10, 20):
            seen(record(step))
        seen({"step": 20, "epoch": 1, "total": 40, "eval/knn_top1": 0.873})
        for step in (30, 40):
            seen(record(step))
    first, scores, last = shown.getvalue().splitlines()
    assert first == (
        "epoch   0.50  step 10/40  loss 5.5000  top-1 0.25  1,234 images/s  data wait 3%"
    )
    assert scores == "epoch 1  knn_top1 0.873"
    assert last.startswith("epoch   2.00  step 40/40  ")
    assert last.endswith("left 0:00  data wait 3%  knn 87.3%")


@pytest.mark.parametrize("shown", [True], indirect=True)
def test_a_terminal_gets_one_bar_with_loss_speed_and_knn_and_log_lines_above_it(
    shown: io.StringIO,
) -> None:
    handler = console.ConsoleHandler()
    with progress.RunProgress() as seen:
        seen(record(10))
        seen({"step": 20, "epoch": 1, "total": 40, "eval/knn_top1": 0.873})
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "disk is slow", None, None))
        seen(record(40))
    text = shown.getvalue()
    for expected in (
        "40/40",
        "loss 5.5000",
        "1,234 images/s",
        "knn 87.3%",
        "warning: disk is slow",
    ):
        assert expected in text
    assert "step 40/40" not in text  # the line of a log


@pytest.mark.parametrize("shown", [False], indirect=True)
def test_what_is_counted_is_shown_with_its_speed_and_the_time_left(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 100.0, 102.0, 120.0])  # begins where an earlier run stood: 500 are no speed
    monkeypatch.setattr(time, "monotonic", lambda: next(now, 120.0))
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with progress.CountProgress("x", "images") as seen:
        for done in (500, 1500, 2500):
            seen(done, 2500)
    first, *_, last = shown.getvalue().splitlines()
    assert first == "x: 500 of 2,500 images"
    assert last == "x: 2,500 of 2,500 images, 100 images/s, left 0:00"


@pytest.mark.parametrize("shown", [True], indirect=True)
def test_stages_have_a_bar_each(shown: io.StringIO) -> None:
    with progress.StageProgress() as seen:
        for unit in ("images", "pairs"):
            for done in (0, 5, 10):
                seen("a/set", unit, done, 10)
    text = shown.getvalue()
    for expected in ("images  left", "pairs  left", "images/s", "pairs/s"):
        assert expected in text


def test_the_time_left_of_a_study_that_goes_on_from_checkpoints_is_of_this_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def status(*epochs: float) -> StudyStatus:
        return StudyStatus([TrialStatus("t", "running", e, 20, "-") for e in epochs], "m")

    seen = progress.StudyProgress(lambda: status(8.0, 9.0))
    assert seen._left(status(8.0, 9.0)) == "?"  # as the last start left them
    now = 130.0
    assert seen._left(status(5.0, 5.0)) == "?"  # from the checkpoints of the fifth epoch
    now = 160.0
    assert seen._left(status(6.0, 7.0)) == clock(30.0 / 3 * (14 + 13))


def test_nouns_agree_with_their_numbers_and_times_are_read_as_times() -> None:
    assert [counted(n, "worker") for n in (0, 1, 2000)] == [
        "0 workers",
        "1 worker",
        "2,000 workers",
    ]
    assert counted(2, "class", "classes") == "2 classes"
    assert [clock(s) for s in (5, 65.9, 3661)] == ["0:05", "1:05", "1:01:01"]


@pytest.mark.parametrize("shown", [False], indirect=True)
def test_libraries_are_named_that_are_still_to_be_loaded(shown: io.StringIO) -> None:
    console.loading("sys", "a_library", "another")
    console.loading("sys")
    assert shown.getvalue() == "loading a_library and another ...\n"


def test_brackets_in_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table("runs [x]", ["a[/b]", "of [red]"], [["a[x]b", "[bold]c"], [":cat:", "\\"]])
    shown = capsys.readouterr().out
    for text in ("runs [x]", "a[/b]", "of [red]", "a[x]b", "[bold]c", ":cat:", "\\"):
        assert text in shown
    trials = [TrialStatus("x[1]", "running", 1.0, 2, "0.5")]
    with console.out.capture() as captured:
        console.out.print(progress.study_table(StudyStatus(trials, "m[0]")))
    assert "x[1]" in captured.get()
    assert "m[0]" in captured.get()
