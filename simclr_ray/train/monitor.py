"""What workers of other processes report, taken by a thread of the driver.

MLflow is not waited for: a sender of its own reads the log (`train/tracked.py`).
"""

from __future__ import annotations

import _thread
import math
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.queue import Empty

from simclr_ray.distributed.ray_cluster import PickledQueue
from simclr_ray.errors import RunError, last_line
from simclr_ray.storage.rank_states import RANKS, RankStates
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.recorder import OnProgress, RunRecorder
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.tracked import Tracked

WAIT_S = 5.0  # for a record; what comes is taken at once


class RunMonitor(RunRecorder):
    """Thread that stores the workers' records in the run's log, and calls `on_progress`."""

    def __init__(
        self,
        inbox: PickledQueue,
        tracked: Tracked,
        on_progress: OnProgress | None,
        resolved: ResolvedExperiment,
        health: HealthWatch,
    ) -> None:
        super().__init__(tracked, on_progress, resolved, health)
        self.inbox = inbox
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._written = -math.inf  # when the ranks were last written

    def __enter__(self) -> RunMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with suppress(ray.exceptions.RayError):
            self.inbox.put(None)  # so that the thread need not wait for a record
        self._thread.join(timeout=60)
        self.inbox.shutdown(force=True)

    def interrupt(self) -> None:
        """Have `fit`, in this process's main thread, raise `KeyboardInterrupt`."""
        if not self._stop.is_set():
            _thread.interrupt_main()

    def _watch(self) -> None:
        while True:
            last = self._stop.is_set()  # read before draining: nothing put before is missed
            try:
                with self.ended_by_errors():
                    self._take_what_came(last=last)
                    if not last:
                        self.ranks.check()
                    self._write_ranks(last=last)
            except Exception as error:  # noqa: BLE001 - of `on_progress`: nobody else would hear of it
                cause = f"{type(error).__name__}: {last_line(error)}"
                self._end(RunError(f"what watches the run has failed: {cause}"))
            if last:
                return

    def _take_what_came(self, *, last: bool) -> None:
        """Take what has come; where that took long, what came meanwhile too.

        A terminal that is stopped, or a disk, may hold this thread for minutes: ranks that told of
        themselves all the while are not silent.
        """
        items, began = self._drain() if last else self._arrived(), time.monotonic()
        self.take_all(items)
        if time.monotonic() - began > WAIT_S:
            self.take_all(self._drain())

    def _write_ranks(self, *, last: bool) -> None:
        """Write where the ranks stand, every few seconds; at the end nothing of it stays."""
        now = time.monotonic()
        if last:
            self.log.remove(RANKS)
        elif now - self._written > WAIT_S:
            self._written = now
            self.log.replace(RANKS, RankStates.now(self.ranks.states()).text)

    def _arrived(self) -> list[Any]:
        """Return what has come, after waiting for it: asking again and again costs CPU."""
        try:
            return [self.inbox.get(timeout=WAIT_S), *self._drain()]
        except Empty:
            return []
        except ray.exceptions.RayError:  # the queue is gone, and the run is about to end
            self._stop.wait(1.0)
            return []

    def _drain(self) -> list[Any]:
        items = []
        try:
            while True:
                items.append(self.inbox.get_nowait())
        except (Empty, ray.exceptions.RayError):
            return items
