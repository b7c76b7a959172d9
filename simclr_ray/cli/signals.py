"""How a command is stopped, and the exit code that says by whom."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

from simclr_ray.cli.console import say, to_continue
from simclr_ray.train import stop

STOPPED_BY_SYSTEM = 75  # EX_TEMPFAIL: schedulers and shells take it as "try again"
STOPPED_BY_USER = 130

AGAIN_S = 0.1

_terminated = threading.Event()


def listen() -> None:
    """Turn SIGTERM and SIGHUP into an interrupt, and remember that there was one.

    While workers train the interrupt waits for a checkpoint of their step (`train.stop`).
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not where `nohup` has it ignored
        signal.signal(signal.SIGHUP, _hang_up)
    sys.unraisablehook = _again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupt)


def exit_code_of_stop() -> int:
    """Say how to go on, and return the exit code of a command that was interrupted."""
    by = " by the system" if _terminated.is_set() else ""
    say(f"stopped{by}; to continue: {to_continue()}")
    return STOPPED_BY_SYSTEM if _terminated.is_set() else STOPPED_BY_USER


def _terminate(*_: object) -> None:
    # Ray's blocking calls let KeyboardInterrupt through and swallow everything else
    _terminated.set()
    if not stop.defer():
        _interrupt()


def _hang_up(*_: object) -> None:
    """Go on as after SIGTERM; what is written to a terminal that is gone would fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream.isatty():
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    _terminate()


def _again(unraisable: sys.UnraisableHookArgs) -> None:
    """Interrupt once more where an interrupt fell into code that cannot be left, as a `__del__`."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if _terminated.is_set() else signal.SIGINT
        main = threading.main_thread().ident
        assert main is not None  # it runs
        later = threading.Timer(AGAIN_S, signal.pthread_kill, (main, number))  # not in this hook
        later.daemon = True
        try:
            later.start()
        except KeyboardInterrupt:  # it fired before this was left, as on a busy machine
            _again(unraisable)
        return
    sys.__unraisablehook__(unraisable)


def _interrupt(*_: object) -> None:
    stop.note_interrupt()
    raise KeyboardInterrupt
