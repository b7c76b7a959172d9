"""How a command is stopped, and the exit code that says by whom."""

from __future__ import annotations

import signal
import sys
import threading

from simclr_ray.cli.console import command, say

STOPPED_BY_SYSTEM = 75  # EX_TEMPFAIL: schedulers and shells take it as "try again"
STOPPED_BY_USER = 130

_terminated = threading.Event()


def listen() -> None:
    """Turn SIGTERM into an interrupt."""
    signal.signal(signal.SIGTERM, _terminate)


def exit_code_of_stop() -> int:
    """Say how to go on, and return the exit code of a command that was interrupted."""
    by = " by the system" if _terminated.is_set() else ""
    say(f"stopped{by}; to continue: {command(*sys.argv[1:])}")
    return STOPPED_BY_SYSTEM if _terminated.is_set() else STOPPED_BY_USER


def _terminate(*_: object) -> None:
    # Ray's blocking calls let KeyboardInterrupt through and swallow everything else
    _terminated.set()
    raise KeyboardInterrupt
