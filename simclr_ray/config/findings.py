"""What a check says: one thing that was looked at, and what to do about it."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from simclr_ray.errors import last_line

MOST_CHARS: Final = 300  # of what an error says
CheckStatus = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One thing that was looked at, and, unless all is well, what to do about it."""

    check: str
    status: CheckStatus
    detail: str
    advice: str = ""


Findings = list[Finding]


def detail_of(error: Exception) -> str:
    """Return what a finding says of an error: its last line, cut where it is long."""
    return last_line(error)[:MOST_CHARS]
