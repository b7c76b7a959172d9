"""The terminal: progress that is one live line there and plain lines elsewhere, and tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
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


class Progress(_Line):
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
        left = _clock((time.monotonic() - self.began) / done * (total - step)) if done else "?"
        line = (
            f"epoch {record['epoch']:6.2f}  step {step}/{total}  "
            f"loss {record['train/mean_loss']:.4f}  "
            f"acc {record['train/accuracy']:.2f}  "
            f"{record['train/images_per_s']:,.0f} images/s  "
            f"left {left}  data wait {record['train/data_wait_share']:.0%}{self.scores}"
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


def show_pairs(rows: Mapping[str, str]) -> None:
    """Print name and value, a line each."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        out.print(f"{name:<{width}}  {value}", soft_wrap=True, markup=False)


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
