"""Progress of runs and studies: bars and tables on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Self

from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from simclr_ray.cli.console import err, is_live, say, text_table
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.config.wording import clock, counted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from simclr_ray.studies.status import StudyStatus

PLAIN_EVERY_S = 10.0  # without a terminal: a line each, no more often
SPEED_OVER_S = 120.0  # the time left follows the speed of the last two minutes


class _Bar:
    """One bar on a terminal; in a log, a line now and then."""

    def __init__(self, unit: str) -> None:
        self.shown_at = float("-inf")
        self._task: TaskID | None = None
        self.bar: Progress | None = None
        if is_live():
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{unit}  left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=err,
                refresh_per_second=4,
                speed_estimate_period=SPEED_OVER_S,
            )

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, what: str, done: int, total: int, detail: str, plain: str) -> None:
        """Move the bar; in a log print `plain` when a line is due, and at the end."""
        if self.bar is None:
            if done == total or time.monotonic() - self.shown_at >= PLAIN_EVERY_S:
                self.shown_at = time.monotonic()
                say(plain)
        elif self._task is None:  # begins where a continued run stands: no speed is made of that
            self._task = self.bar.add_task(what, total=total, completed=done, detail=detail)
        else:
            self.bar.update(self._task, description=what, completed=done, detail=detail)


class RunProgress(_Bar):
    """Shows records of a run: epoch, step, loss, images/s, time left, waiting for data, kNN."""

    def __init__(self) -> None:
        super().__init__("steps")
        self.began, self.first_step = time.monotonic(), -1
        self.knn = ""

    def __call__(self, record: Mapping[str, float]) -> None:
        """Show one record of metrics."""
        names = (k for k in record if k.startswith("eval/") and k in EPOCH_METRICS)
        scores = {name.removeprefix("eval/"): record[name] for name in names}
        if scores:
            text = "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
            self.knn = f"  knn {scores['knn_top1']:.1%}" if "knn_top1" in scores else ""
            say(f"epoch {record['epoch']:.0f}  {text}")
        elif "train/loss" in record:
            self._step(record)

    def _step(self, record: Mapping[str, float]) -> None:
        step, total = int(record["step"]), int(record["total"])
        if self.first_step < 0:
            self.first_step, self.began = step, time.monotonic()
        done = step - self.first_step
        left = (time.monotonic() - self.began) / done * (total - step) if done else math.nan
        shown = "" if math.isnan(left) else f"left {clock(left)}  "
        top1 = next((value for key, value in record.items() if key.endswith("_top1")), math.nan)
        epoch = f"epoch {record['epoch']:6.2f}"
        detail = (
            f"loss {record['train/mean_loss']:.4f}  top-1 {top1:.2f}  "
            f"{record['train/images_per_s']:,.0f} images/s"
        )
        rest = f"data wait {record['train/data_wait_fraction']:.0%}{self.knn}"
        line = f"{epoch}  step {step}/{total}  {detail}  {shown}{rest}"
        self.show(epoch, step, total, f"{detail}  {rest}", line)


class CountProgress(_Bar):
    """Shows how many of something are done, how many a second, and the time left.

    Args:
        what: Name of the work.
        unit: What is counted, plural.
    """

    def __init__(self, what: str, unit: str) -> None:
        super().__init__(unit)
        self.what, self.unit = what, unit
        self.began, self.first = time.monotonic(), -1

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done; speed is counted from the first call on."""
        if self.first < 0:
            self.first, self.began = done, time.monotonic()
        took, more = time.monotonic() - self.began, done - self.first
        speed = f"{more / took:,.0f} {self.unit}/s" if more and took else ""
        left = f", {speed}, left {clock(took / more * (total - done))}" if speed else ""
        plain = f"{self.what}: {done:,} of {total:,} {self.unit}{left}"
        self.show(self.what, done, total, speed, plain)


class StageProgress:
    """Shows work of several stages, each as `CountProgress` does, one after the other."""

    def __init__(self) -> None:
        self._bar: CountProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__()

    def __call__(self, what: str, unit: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage are done."""
        if self._bar is None or (self._bar.what, self._bar.unit) != (what, unit):
            self.__exit__()
            self._bar = CountProgress(what, unit).__enter__()
        self._bar(done, total)


class StudyProgress:
    """Shows how a study stands, again and again: a table on a terminal, elsewhere lines.

    Args:
        read: Returns the status; called in a thread of its own while the block runs.
    """

    EVERY_S, LINES_EVERY_S = 2.0, 30.0

    def __init__(self, read: Callable[[], StudyStatus]) -> None:
        self.read = read
        self.live = Live(console=err, refresh_per_second=2) if is_live() else None
        self.began, self.first_epochs = time.monotonic(), -1.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._ended: set[str] = set()

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=30)
        if self.live is not None:
            self.live.stop()

    def _watch(self) -> None:
        last = False
        shown_at = float("-inf")
        last_status: StudyStatus | None = None
        while not last:
            last = self._end.wait(self.EVERY_S)
            try:
                status = self.read()
            except OSError:  # a storage that does not answer now
                continue
            if self.live is not None:
                self.live.update(study_table(status, self._left(status)))
                continue
            self._say_ended(status)
            due = time.monotonic() - shown_at >= self.LINES_EVERY_S
            if last or (due and status != last_status):
                shown_at, last_status = time.monotonic(), status
                running = [t for t in status.trials if t.state == "running"]
                now = "; ".join(f"{t.name} epoch {t.epoch:.1f}/{t.epochs}" for t in running)
                say(f"{_done(status)}, left {self._left(status)}" + (f"; {now}" if now else ""))

    def _say_ended(self, status: StudyStatus) -> None:
        """Print a line for each trial that has ended since."""
        for trial in status.trials:
            if trial.is_open or trial.name in self._ended:
                continue
            self._ended.add(trial.name)
            say(f"{trial.name}: {trial.state}, {status.metric} {trial.metric}")

    def _left(self, status: StudyStatus) -> str:
        # trials that go on from a checkpoint may stand before where their last start ended
        if self.first_epochs < 0 or status.epochs_done < self.first_epochs:
            self.began, self.first_epochs = time.monotonic(), status.epochs_done
        done = status.epochs_done - self.first_epochs
        if not status.epochs_left:
            return clock(0)
        return clock((time.monotonic() - self.began) / done * status.epochs_left) if done else "?"


def study_table(status: StudyStatus, left: str = "") -> Table:
    """Return the table of trials, those that wait only counted."""
    title = _done(status) + (f", left {left}" if left else "")
    rows = [
        [trial.name, trial.state, f"{trial.epoch:.1f}/{trial.epochs}", trial.metric]
        for trial in status.trials
        if trial.state != "waiting"
    ]
    waiting = sum(t.state == "waiting" for t in status.trials) + status.unknown
    if waiting:
        rows.append([f"{waiting} more", "waiting", "", ""])
    return text_table(title, ("trial", "state", "epoch", status.metric), rows, left=2)


def _done(status: StudyStatus) -> str:
    return f"{status.done} of {counted(status.num_trials, 'trial')}"
