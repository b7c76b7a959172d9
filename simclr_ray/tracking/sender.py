"""The thread that delivers a run's logs to MLflow while the run goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from simclr_ray.config.wording import counted
from simclr_ray.errors import TrackingError
from simclr_ray.tracking import store
from simclr_ray.tracking.delivery import Delivery

SEND_EVERY_S = 1.0  # what is logged meanwhile goes into one request
LONGEST_WAIT_S = 30.0  # between two tries; the first is after a second, and each doubles
PATIENCE_S = 30.0  # at the end, without any progress
IN_VAIN = (
    3  # failures, after which an answer is no progress: a full disk is read, and takes nothing
)
log = logging.getLogger(__name__)


class Sender:
    """Thread that sends what a `Delivery` holds; it waits for MLflow, and nobody for it.

    Args:
        delivery: What to send.
        again: Command that delivers what is left at the end, for the message.

    Attributes:
        patience_s: How long `close` waits without progress.
        error: Why MLflow takes nothing now, or None.
    """

    def __init__(self, delivery: Delivery, again: str) -> None:
        self.delivery, self.again = delivery, again
        self.patience_s = PATIENCE_S
        self.error: Exception | None = None
        self._has_warned = False  # that it takes nothing
        self._late = 0  # points since it takes some again
        self._wait_s = 1.0
        self._in_vain = 0  # failures since it had all
        self._stop, self._wake = threading.Event(), threading.Event()
        self._progress_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="delivery")

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something new; returns at once."""
        self._wake.set()

    def close(self) -> bool:
        """Deliver what is left and end; return whether MLflow has all of it.

        After `patience_s` without progress it is given up: one line says what is left, and how it
        is delivered.
        """
        self._progress_at = time.monotonic()
        self._stop.set()
        self._wake.set()
        try:
            while self._thread.is_alive():
                if time.monotonic() > self._progress_at + self.patience_s:
                    break
                self._thread.join(0.05)
            else:
                return True
        finally:
            self.delivery.give_up()
        left = str(self.delivery.undelivered())
        reason = self.error or f"no answer in {self.patience_s:g} s"
        if left:
            log.warning("not in MLflow yet: %s (%s); to deliver it: %s", left, reason, self.again)
        return not left

    def _run(self) -> None:
        while not self.delivery.is_abandoned:
            self._wake.clear()
            is_last = self._stop.is_set()  # read before sending: nothing said before is missed
            try:
                sent = self.delivery.send()
            except Exception as error:  # noqa: BLE001 - a thread that dies would deliver nothing
                self._failed(error)
                continue
            self._in_vain = 0 if sent else self._in_vain
            if self._in_vain < IN_VAIN:
                self._progress()
            if sent is not None:
                self._late += sent
                continue
            self._caught_up()
            if is_last:
                return
            self._wake.wait()
            self._stop.wait(SEND_EVERY_S)

    def _progress(self) -> None:
        self._wait_s = 1.0
        self._progress_at = time.monotonic()

    def _failed(self, error: Exception) -> None:
        """Say so once, then wait: longer each time, but not while the run waits for its end."""
        if not self._has_warned and not self._stop.is_set():  # at the end, the end says it
            text = str(error) if isinstance(error, TrackingError) else repr(error)
            log.warning("%s; the run goes on, and its points are delivered later", text)
            self._has_warned, self._late = True, 0
        self.error = error
        self._in_vain += 1
        if self._stop.is_set():
            time.sleep(min(self._wait_s, 1.0))
        else:
            self._stop.wait(self._wait_s)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def _caught_up(self) -> None:
        if self._has_warned:
            late = counted(self._late, "point")
            log.info("MLflow takes the run's points again: %s delivered later", late)
        self._has_warned, self._late, self.error = False, 0, None
        self._in_vain = 0


@contextmanager
def sending(delivery: Delivery, again: str) -> Iterator[Sender]:
    """Send while the block runs, and what is left at its end within bounds; see `Sender.close`.

    Enter it in the main thread: what MLflow's own loggers say is held back for its time.
    """
    with store.delivering():
        sender = Sender(delivery, again)
        sender.start()
        try:
            yield sender
        finally:
            sender.close()
