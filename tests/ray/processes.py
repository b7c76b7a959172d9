"""Processes that this test session has started: another session may run beside it."""

from __future__ import annotations

import psutil


def named(part: str) -> list[int]:
    """Return the pids of those whose command line, as Ray sets it, contains `part`, by age."""
    return [p.pid for p in psutil.Process().children(recursive=True) if part in _command_line(p)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # ended since it was listed; a zombie is one of these
        return ""
