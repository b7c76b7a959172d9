"""What a run's log of records (`metrics.jsonl`) says: one JSON object a line, newest last."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

TIME = "time"  # of a record, in seconds since 1970
FIRST_BATCH = "start/first_batch_s"  # logged once at each start, the first and every other
RECENT_S = 1800.0  # that the pace of a run is taken from: an evaluation more or less counts little
TAIL_BYTES = 2**16  # of a log, which hold its last record as a rule
log = logging.getLogger(__name__)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record, with the time, to a local log: it is with the system when this returns.

    Where a kill has cut the last line off, the record starts on a new one.

    Raises:
        OSError: It cannot be written.
    """
    line = json.dumps({TIME: round(time.time(), 3), **record}).encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = b"\n" + line
        file.write(line)  # once: what others read is whole, or the last line


def read_records(lines: str) -> list[dict[str, Any]]:
    """Return the records of a log; a line that a kill or a disk has spoiled is passed over."""
    records = []
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            log.debug("no record: %s", line[:80])
    return records


def newest_record(path: Path, prefix: str = "") -> dict[str, Any]:
    """Return the last whole record of a local log, read from its end; empty: there is none.

    Args:
        path: Of the log.
        prefix: Of a name that the record has to have.
    """
    tail_bytes = TAIL_BYTES
    while True:
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - tail_bytes))
                tail = file.read()
        except FileNotFoundError:
            return {}
        records = reversed(read_records(tail.decode(errors="replace")))
        newest = next((r for r in records if any(key.startswith(prefix) for key in r)), None)
        if newest is not None or tail_bytes >= size:
            return newest or {}
        tail_bytes *= 16


def last_values(lines: str) -> dict[str, float]:
    """Return the last value of each name in a log, the time aside."""
    return last_of(read_records(lines))


def last_of(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last number of each name in records, the time aside; NaN is one."""
    last: dict[str, float] = {}
    for record in records:
        last.update({key: v for key, v in record.items() if isinstance(v, int | float)})
    last.pop(TIME, None)
    return last


def seconds_left(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how long the steps that are left take, at the pace of the last half hour of training.

    Of a run that was started again, or went back to a checkpoint, the records since then count.
    None where there are less than two of them.

    Args:
        records: Of a run's log, oldest first.
    """
    since: list[tuple[float, float]] = []  # time and step of the reports since the last start
    total = 0.0
    for record in records:
        if FIRST_BATCH in record:
            since = []
        at, step, of = (record.get(key) for key in (TIME, "step", "total"))
        if "train/loss" not in record or not (is_number(at) and is_number(step)):
            continue
        if since and (step <= since[-1][1] or at < since[-1][0]):
            since = []
        since.append((at, step))
        total = of if is_number(of) else total
    if len(since) < 2:
        return None
    at, step = since[-1]
    recent = [report for report in since[:-1] if at - report[0] <= RECENT_S] or [since[-2]]
    began, first = recent[0]
    return float((at - began) / (step - first) * max(total - step, 0))


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value of a record is a number, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_series(lines: str) -> dict[str, dict[int, float]]:
    """Return name -> step -> number of a log; the last of a repeated step counts."""
    series: dict[str, dict[int, float]] = {}
    for record in read_records(lines):
        step = record.get("step")
        if not is_number(step):
            continue
        for key, value in record.items():
            if "/" in key and isinstance(value, int | float):
                series.setdefault(key, {})[int(step)] = float(value)
    return series
