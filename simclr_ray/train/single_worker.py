"""The process of a run's only worker, on the machine of its driver."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ray

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.ahead import BATCHES_AHEAD, ahead, started
from simclr_ray.data.batch import Batch
from simclr_ray.data.source import Source
from simclr_ray.storage.metrics_log import newest_record, read_records
from simclr_ray.storage.run_folder import BAD_ROWS, METRICS, RunFolder
from simclr_ray.train.context import SingleRankContext, Upload
from simclr_ray.train.heartbeat import Inbox, RankStarted
from simclr_ray.train.rollback import kept_by_ray
from simclr_ray.train.worker import WorkerInput, train_rank

STORED_S: Final = 0.005  # so often, whether the driver has written its log
STORED_MOST_S: Final = 10.0  # a driver that is killed is outlived by less
log = logging.getLogger(__name__)


@ray.remote
class SingleWorker:
    """Ray's actor of the worker; its import of this module is most of its start."""

    def pid(self) -> int:
        """Return the number of its process."""
        return os.getpid()

    def train(self, worker_input: WorkerInput) -> None:
        """Train from the newest checkpoint to the end, or until a stop."""
        resolved, inbox = worker_input.experiment, StoredInbox(worker_input.inbox)
        context = _Context(resolved.folder, kept_by_ray(resolved.config), inbox)
        train_rank(worker_input._replace(inbox=inbox), context)


class StoredInbox:
    """The driver's inbox, which knows what was put into it last."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._last: dict[str, dict[str, Any]] = {}  # by the log that it goes into

    def put(self, item: Any) -> None:
        """Put one item."""
        if isinstance(item, dict):
            self._last[BAD_ROWS if "reason" in item else METRICS] = item
        self._inbox.put(item)

    def is_stored(self, folder: Path) -> bool:
        """Return whether all records that were put are in the run's logs."""
        record, row = self._last.get(METRICS), self._last.get(BAD_ROWS)
        if record is not None:
            newest = newest_record(folder / METRICS)
            if newest.get("step") != record["step"] or not record.keys() <= newest.keys():
                return False
        if row is not None:
            file = folder / BAD_ROWS
            rows = read_records(file.read_text(encoding="utf-8")) if file.is_file() else []
            if not any(one.get("id") == row["id"] for one in rows):
                return False
        self._last.clear()
        return True


class _Context(SingleRankContext):
    """A rank whose driver is another process of the machine."""

    def __init__(self, folder: RunFolder, keep: int | None, inbox: StoredInbox) -> None:
        super().__init__(folder, keep)
        self._inbox = inbox

    def save(
        self, step: int, written: Path | None, name: str, upload: Upload, *, wait: bool
    ) -> None:
        """Keep a checkpoint once the driver has stored what came before it.

        A worker outlives a driver that is killed, by moments in which it takes steps: a run that
        goes on after one of them would lack its records.
        """
        assert self._folder.local is not None
        until = time.monotonic() + STORED_MOST_S
        while not self._inbox.is_stored(self._folder.local):
            if time.monotonic() > until:  # the driver lives, and is slow
                log.warning("step %d is kept before all records up to it are written", step)
                break
            time.sleep(STORED_S)
        super().save(step, written, name, upload, wait=wait)

    def begin(self, inbox: Inbox) -> None:
        """Tell the driver where this process is, and how to end it."""
        inbox.put(RankStarted.here(self.rank))

    def batches(
        self, experiment: Experiment, source: Source, steps: range, run: str
    ) -> Iterator[Batch]:
        """Return the batches, which a thread makes ahead, from now on."""
        return started(ahead(super().batches(experiment, source, steps, run), BATCHES_AHEAD))
