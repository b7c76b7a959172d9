"""What a check says: one thing that was looked at, and what to do about it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One thing that was looked at, and, unless all is well, what to do about it."""

    check: str
    status: Status
    detail: str
    advice: str = ""


Findings = list[Finding]
