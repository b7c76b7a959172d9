"""How numbers and keys are told in messages: `1 worker`, `2 workers`, `1:05`, `columns.image=`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

MIB: Final = 2**20
GIB: Final = 2**30
_COLUMNS_PREFIX = ContextVar("columns prefix", default="data.columns.")


def column_key(role: str) -> str:
    """Return the key that names the column of a role, as the verb at hand takes it."""
    return f"{_COLUMNS_PREFIX.get()}{role}"


@contextmanager
def column_keys(prefix: str) -> Iterator[None]:
    """Have messages name columns by another prefix than a config's, while the block runs."""
    token = _COLUMNS_PREFIX.set(prefix)
    try:
        yield
    finally:
        _COLUMNS_PREFIX.reset(token)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun: `1 worker`, `1,200 workers`; `plural` where it is not +s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def clock(seconds: float) -> str:
    """Return a time as `h:mm:ss`, or `m:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
