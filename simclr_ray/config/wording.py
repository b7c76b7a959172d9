"""How numbers are told in messages: `1 worker`, `2 workers`, `1:05`; units of memory."""

from __future__ import annotations

from typing import Final

MIB: Final = 2**20
GIB: Final = 2**30


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun: `1 worker`, `1,200 workers`; `plural` where it is not +s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def clock(seconds: float) -> str:
    """Return a time as `h:mm:ss`, or `m:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
