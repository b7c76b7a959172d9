"""What a run's log of records (`metrics.jsonl`) says: one JSON object a line, newest last."""

from __future__ import annotations

import json
import logging
from typing import Any

log = logging.getLogger(__name__)


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
    """Return the last value of each name in a log."""
    last: dict[str, float] = {}
    for record in read_records(lines):
        last.update(record)
    return last


def read_series(lines: str) -> dict[str, dict[int, float]]:
    """Return name -> step -> value of a log; the last of a repeated step counts."""
    series: dict[str, dict[int, float]] = {}
    for record in read_records(lines):
        for key, value in record.items():
            if "/" in key:
                series.setdefault(key, {})[int(record["step"])] = float(value)
    return series
