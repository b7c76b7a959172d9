"""How a command is stopped, and the exit code that says by whom."""

from __future__ import annotations

import signal
import sys
import threading

from simclr_ray.cli.console import command, say

STOPPED_BY_SYSTEM = 75  # EX_TEMPFAIL: schedulers and shells take it as "try again"
STOPPED_BY_USER = 130

_terminated = threading.Event()
_interrupted = threading.Event()


def listen() -> None:
    """Turn SIGTERM into an interrupt, and remember that there was one."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupt)


def was_stopped() -> bool:
    """Return whether a signal asked the process to stop.

    What fails after that fails for it: an interrupt within the import of an extension module, for
    one, comes out of it as an ImportError.
    """
    return _interrupted.is_set()


def exit_code_of_stop() -> int:
    """Say how to go on, and return the exit code of a command that was interrupted."""
    by = " by the system" if _terminated.is_set() else ""
    say(f"stopped{by}; to continue: {command(*sys.argv[1:])}")
    return STOPPED_BY_SYSTEM if _terminated.is_set() else STOPPED_BY_USER


def _terminate(*_: object) -> None:
    # Ray's blocking calls let KeyboardInterrupt through and swallow everything else
    _terminated.set()
    _interrupt()


def _interrupt(*_: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt
