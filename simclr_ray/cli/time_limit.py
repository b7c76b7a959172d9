"""Calls that may never return: of stores that drop what they are sent, whose clients wait on.

They go on in threads. Such a process cannot end as usual: Arrow's own end waits for what is open.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, TypeVar

T = TypeVar("T")
_threads: Final[list[threading.Thread]] = []


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Return what a call will give or raise, and go on."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    _threads.append(thread)
    thread.start()
    return future


def result_until(future: Future[T], until: float, otherwise: T) -> T:
    """Return what a call has given by then (`time.monotonic`), else `otherwise`.

    Raises:
        Exception: What the call has raised.
    """
    if not wait([future], max(0.0, until - time.monotonic())).done:
        return otherwise
    return future.result()


def is_waiting() -> bool:
    """Return whether a call of this process has not returned."""
    return any(thread.is_alive() for thread in _threads)
