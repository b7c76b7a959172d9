"""What a run's log of records (`metrics.jsonl`) says: one JSON object a line, newest last."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIME = "time"  # of a record, in seconds since 1970
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


def last_values(lines: str) -> dict[str, float]:
    """Return the last value of each name in a log, the time aside."""
    last: dict[str, float] = {}
    for record in read_records(lines):
        last.update(record)
    last.pop(TIME, None)
    return last


def read_series(lines: str) -> dict[str, dict[int, float]]:
    """Return name -> step -> value of a log; the last of a repeated step counts."""
    series: dict[str, dict[int, float]] = {}
    for record in read_records(lines):
        for key, value in record.items():
            if "/" in key:
                series.setdefault(key, {})[int(record["step"])] = float(value)
    return series
