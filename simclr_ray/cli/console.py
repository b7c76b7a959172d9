"""The terminal: progress that is one live line there and plain lines elsewhere, and tables."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from simclr_ray.studies.status import StudyStatus

# a log has no edge, and rich takes 80 columns where it finds none
LOG_COLUMNS = 200
out = Console(
    highlight=False,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS,
)
err = Console(stderr=True, highlight=False)
PLAIN_EVERY_S = 10.0  # without a terminal: a line each, no more often


class _Line:
    """One line that is rewritten on a terminal, and repeated now and then elsewhere."""

    def __init__(self) -> None:
        self.shown_at = float("-inf")
        self.live = Live(console=err, refresh_per_second=4) if err.is_terminal else None

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, text: str, *, last: bool = False) -> None:
        """Show `text` in place of what was there; elsewhere print it when it is due."""
        if self.live is not None:
            self.live.update(Text(text))
        elif last or time.monotonic() - self.shown_at >= PLAIN_EVERY_S:
            self.shown_at = time.monotonic()
            self.keep(text)

    def keep(self, text: str) -> None:
        """Print a line that stays."""
        err.print(text, soft_wrap=True, markup=False)


class RunProgress(_Line):
    """Shows records of a run: epoch, step, loss, images/s, time left, share of waiting for data."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.first_step = time.monotonic(), -1
        self.scores = ""

    def __call__(self, record: Mapping[str, float]) -> None:
        """Show one record of metrics."""
        scores = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
        if scores:
            text = "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
            self.scores = f"  knn {scores['knn_top1']:.1%}" if "knn_top1" in scores else ""
            self.keep(f"epoch {record['epoch']:.0f}  {text}")
        elif "train/loss" in record:
            self._step(record)

    def _step(self, record: Mapping[str, float]) -> None:
        step, total = int(record["step"]), int(record["total"])
        if self.first_step < 0:
            self.first_step, self.began = step, time.monotonic()
        done = step - self.first_step
        left = clock((time.monotonic() - self.began) / done * (total - step)) if done else "?"
        top1 = next((value for key, value in record.items() if key.endswith("_top1")), math.nan)
        line = (
            f"epoch {record['epoch']:6.2f}  step {step}/{total}  "
            f"loss {record['train/mean_loss']:.4f}  "
            f"top-1 {top1:.2f}  "
            f"{record['train/images_per_s']:,.0f} images/s  "
            f"left {left}  data wait {record['train/data_wait_fraction']:.0%}{self.scores}"
        )
        self.show(line, last=step == total)


class ShardProgress(_Line):
    """Shows shards as they are finished."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` shards are finished."""
        self.show(f"{self.target}: {done} of {total} shards", last=done == total)


class StudyProgress:
    """Shows how a study stands, again and again: a table on a terminal, elsewhere lines.

    Args:
        read: Returns the status; called in a thread of its own while the block runs.
    """

    EVERY_S, LINES_EVERY_S = 2.0, 30.0

    def __init__(self, read: Callable[[], StudyStatus]) -> None:
        self.read = read
        self.live = Live(console=err, refresh_per_second=2) if err.is_terminal else None
        self.began, self.first_epochs = time.monotonic(), -1.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._said: set[str] = set()

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
        said: StudyStatus | None = None
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
            if last or (due and status != said):
                shown_at, said = time.monotonic(), status
                running = [t for t in status.trials if t.state == "running"]
                now = "; ".join(f"{t.name} epoch {t.epoch:.1f}/{t.epochs}" for t in running)
                err.print(
                    f"{status.done} of {status.num_trials} trials, left {self._left(status)}"
                    + (f"; {now}" if now else ""),
                    soft_wrap=True,
                    markup=False,
                )

    def _say_ended(self, status: StudyStatus) -> None:
        """Print a line for each trial that has ended since."""
        for trial in status.trials:
            if trial.is_open or trial.name in self._said:
                continue
            self._said.add(trial.name)
            err.print(
                f"{trial.name}: {trial.state}, {status.metric} {trial.metric}",
                soft_wrap=True,
                markup=False,
            )

    def _left(self, status: StudyStatus) -> str:
        if self.first_epochs < 0:
            self.began, self.first_epochs = time.monotonic(), status.epochs_done
        done = status.epochs_done - self.first_epochs
        if not status.epochs_left:
            return clock(0)
        return clock((time.monotonic() - self.began) / done * status.epochs_left) if done else "?"


def study_table(status: StudyStatus, left: str = "") -> Table:
    """Return the table of trials, those that wait only counted."""
    title = f"{status.done} of {status.num_trials} trials" + (f", left {left}" if left else "")
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(("trial", "state", "epoch", status.metric)):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for trial in status.trials:
        if trial.state != "waiting":
            epoch = f"{trial.epoch:.1f}/{trial.epochs}"
            table.add_row(trial.name, trial.state, epoch, trial.metric)
    waiting = sum(t.state == "waiting" for t in status.trials) + status.unknown
    if waiting:
        table.add_row(f"{waiting} more", "waiting", "", "")
    return table


def show_pairs(rows: Mapping[str, str]) -> None:
    """Print name and value, a line each."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        out.print(f"{name:<{width}}  {value}", soft_wrap=True, markup=False)


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def clock(seconds: float) -> str:
    """Return a time as `h:mm:ss`, or `m:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
