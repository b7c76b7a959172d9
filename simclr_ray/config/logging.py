"""Logging: one named logger for the package, never the root logger.

Ray captures the root handlers of its workers, and a library that clears them breaks its host;
so only `simclr_ray` is configured, and only by the command line.

With `SIMCLR_RAY_LOG_FORMAT=json` each line is an object: `time`, `level`, `rank`, `node`, `run`,
`message`. The command line writes its own, on stderr. Those of workers and actors Ray writes, by
its `LoggingConfig`, into its own log files, with these keys added to Ray's.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from simclr_ray.config.uris import hide_passwords
from simclr_ray.errors import ConfigError

FORMAT_VARIABLE: Final = "SIMCLR_RAY_LOG_FORMAT"
_process: dict[str, Any] = {"rank": None, "node": platform.node(), "run": None}


def configure(handler: logging.Handler) -> None:
    """Send the package's log lines to a handler, from INFO on. Idempotent."""
    logger = logging.getLogger("simclr_ray")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(handler)
    logger.propagate = False


def is_json() -> bool:
    """Return whether lines are to be JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def check_format() -> None:
    """Raise `ConfigError` where $SIMCLR_RAY_LOG_FORMAT is neither `text` nor `json`."""
    value = os.environ.get(FORMAT_VARIABLE, "")
    if value not in {"", "text", "json"}:
        raise ConfigError.of(FORMAT_VARIABLE, f"got {value!r}, not text or json")


def name_process(run: str, rank: int | None = None) -> None:
    """Add run, rank and node to what this process logs as JSON, by whatever handlers it has.

    Args:
        run: Name of the run.
        rank: That this process is, or works for; None: it is the driver.
    """
    _process.update(run=run, rank=rank)
    if not is_json():
        return
    # at the handlers: fields that a record has from its start, `extra=` of others may not name
    for logger in (logging.getLogger(), logging.getLogger("ray")):
        for handler in logger.handlers:
            if _name_record not in handler.filters:
                handler.addFilter(_name_record)


def _name_record(record: logging.LogRecord) -> bool:
    """Add the fields of this process to a record that is to be written."""
    for key, value in _fields(record.created, record.levelname).items():
        record.__dict__.setdefault(key, value)
    return True


@contextmanager
def process_named(run: str) -> Iterator[None]:
    """Name this process while the block runs: a notebook or a study goes on to others."""
    before = dict(_process)
    name_process(run)
    try:
        yield
    finally:
        _process.update(before)


def _fields(created: float, level: str) -> dict[str, Any]:
    at = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
    return {"time": at, "level": level, **_process}


def json_line(message: str, level: str = "INFO", created: float | None = None) -> str:
    """Return a line of the log as JSON; it holds no password of a URI.

    Args:
        message: What is said.
        level: Of the record.
        created: Seconds since 1970; None: now.
    """
    created = time.time() if created is None else created
    return json.dumps({**_fields(created, level), "message": hide_passwords(message)})


@functools.lru_cache(maxsize=1024)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, the first time in this process: datasets are opened many times."""
    logger.warning("%s", message)


@contextmanager
def held_back(names: tuple[str, ...], level: int) -> Iterator[None]:
    """Let loggers of other libraries say nothing below `level` while the block runs."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
