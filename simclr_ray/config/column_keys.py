"""By which keys messages name the columns of a dataset: `data.columns.image`, `columns.image`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_PREFIX = ContextVar("columns prefix", default="data.columns.")


def column_key(role: str) -> str:
    """Return the key that names the column of a role, as the verb at hand takes it."""
    return f"{_PREFIX.get()}{role}"


@contextmanager
def column_keys(prefix: str) -> Iterator[None]:
    """Have messages name columns by another prefix than a config's, while the block runs."""
    token = _PREFIX.set(prefix)
    try:
        yield
    finally:
        _PREFIX.reset(token)
