"""Logging: one named logger for the package, never the root logger.

Ray captures the root handlers of its workers, and a library that clears them breaks its host;
so only `simclr_ray` is configured, and only by the command line.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager


def configure(handler: logging.Handler) -> None:
    """Send the package's log lines to a handler, from INFO on. Idempotent."""
    logger = logging.getLogger("simclr_ray")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(handler)
    logger.propagate = False


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
