"""What ranks report, taken one by one: into the run's log, then shown; and what ends the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from simclr_ray.config.wording import counted
from simclr_ray.data.row_reader import UnusableRow
from simclr_ray.errors import (
    CollapseError,
    RestartsError,
    RunError,
    SimclrRayError,
    StorageError,
    TooManyBadImages,
    UnhealthyRunError,
)
from simclr_ray.storage.last_error import RESTART, LastError
from simclr_ray.storage.metrics_log import FIRST_BATCH
from simclr_ray.storage.run_folder import BAD_ROWS, METRICS
from simclr_ray.storage.run_status import newest_whole_step
from simclr_ray.train import stop
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.heartbeat import (
    Beat,
    RankFinished,
    RanksFailed,
    RanksMove,
    RankStarted,
    RankWatch,
)
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.rollback import CheckpointKeeper, keeps_good
from simclr_ray.train.tracked import Tracked

log = logging.getLogger(__name__)

Record = dict[str, float]
OnProgress = Callable[[Record], None]
MISSING_CLASSES = "start/knn_missing_classes"


class WorkerReady(NamedTuple):
    """A worker has built its model and waits for its first batch."""

    rank: int
    num_workers: int


class RunRecorder:
    """Takes the records of a run's ranks.

    Attributes:
        fatal: What the run is to end by, once there is such a thing.
    """

    def __init__(
        self,
        tracked: Tracked,
        on_progress: OnProgress | None,
        resolved: ResolvedExperiment,
        health: HealthWatch,
    ) -> None:
        self.log, self.sender = tracked.log, tracked.sender
        self.on_progress, self.resolved = on_progress, resolved
        self.fatal: SimclrRayError | None = None
        self.health, self._has_warned = health, False
        self._keeper = CheckpointKeeper(resolved) if keeps_good(resolved.config) else None
        self.ranks = RankWatch(resolved.config.scaling)
        self._restarts = 0  # without a new checkpoint
        self._recurred = 0  # of them, by an error that comes again
        self._kept = 0
        self._kept = self._newest_step()  # at the last restart
        self._began = time.monotonic()
        self._ready: set[int] = set()
        self._bad = {int(row["id"]): _unusable_row(row) for row in self.log.records(BAD_ROWS)}

    def interrupt(self) -> None:
        """End what runs now: `fatal` is set."""

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Have the run end by what keeps the block from writing its log."""
        try:
            yield
        except StorageError as error:
            self._end(error)
        except OSError as error:
            self._end(RunError(f"the log of the run cannot be written: {error}"))

    def take_all(self, items: Sequence[Any]) -> None:
        """Take what has come; then look at the rows that are no images, and at the log."""
        for item in items:
            self.take(item)
        self._check_bad_rows()
        self.log.upload_if_due()

    def take(self, item: Any) -> None:
        """Take what a rank sends: metrics, a row that is no image, an error, or its own state."""
        if isinstance(item, SimclrRayError):
            self._end(item)
        elif isinstance(item, dict):
            self._take_bad(item) if "reason" in item else self._take_metrics(item)
        elif item is not None:
            self._take_message(item)

    def _take_message(self, message: Any) -> None:
        """Take what a rank, or Ray for it, says of itself."""
        takers: dict[type, Callable[[Any], None]] = {
            WorkerReady: self._tell_ready,
            RankStarted: self.ranks.take_start,
            Beat: self.ranks.take,
            RankFinished: self.ranks.take_end,
            RanksMove: self._take_move,
            RanksFailed: self._take_failure,
        }
        takers[type(message)](message)

    def _tell_ready(self, worker: WorkerReady) -> None:
        """Say so when all workers are ready; after a restart, again."""
        self._ready.add(worker.rank)
        if len(self._ready) == worker.num_workers:
            self._ready.clear()
            log.info(
                "%d of %s ready after %.0f s",
                worker.num_workers,
                counted(worker.num_workers, "worker"),
                time.monotonic() - self._began,
            )

    def _take_move(self, move: RanksMove) -> None:
        """Say why all is started again, where that is no failure."""
        if self.fatal is not None:
            return  # nothing is
        self._start_over()
        why = "another number of workers has room"
        if move.taken:
            why = f"{counted(len(move.taken), 'node')} will be taken away"
        log.info(
            "%s: all %d ranks have saved step %s and start again",
            why, move.num_workers, f"{move.step:,}",
        )  # fmt: skip

    def _start_over(self) -> None:
        stop.workers_are_gone()
        self.ranks.forget()
        self._ready.clear()
        self._began = time.monotonic()

    def _take_failure(self, failed: RanksFailed) -> None:
        """Say why all is started again; end the run where that brings it no further."""
        if self.fatal is not None:
            return  # nothing is
        self._start_over()
        kept, most = self._newest_step(), self.resolved.config.scaling.max_failures
        if kept > self._kept:
            self._restarts = self._recurred = 0
        self._restarts += 1
        self._recurred += failed.will_recur
        self._kept = kept
        who, cause = next(iter(failed.causes.items()), ("a rank", "for no reason given"))
        if self._restarts > most:
            if most:  # without restarts whoever started it ends the run
                self._end(self._too_many(f"(scaling.max_failures={most}), last {who}: {cause}"))
            return
        LastError.of(RESTART, f"{who} failed: {cause}").write(self.resolved.folder)
        log.warning(
            "%s failed: %s; all ranks start again after step %d (%d of %d times without a "
            "further checkpoint)", who, cause, kept, self._restarts, most,
        )  # fmt: skip

    def _too_many(self, last: str) -> RunError:
        """Return what ends a run that failed too often; of the same code it fails at once again."""
        times = f"failed {self._restarts} times after step {self._kept:,}"
        failed = f"{times} without a further checkpoint"
        if self._recurred == self._restarts:
            return RunError(f"{failed}, each time by an error that comes again {last}")
        return RestartsError(f"{failed} {last}; the same command goes on from there")

    def _newest_step(self) -> int:
        """Return the step of the newest whole checkpoint; where none can be seen, as it was."""
        try:
            return newest_whole_step(self.resolved.folder)
        except OSError as error:  # of a bucket, at the moment that ranks failed for it
            log.debug("%s cannot be listed: %s", self.resolved.folder.uri, error)
            return self._kept

    def _take_metrics(self, item: Record) -> None:
        if FIRST_BATCH in item:
            log.info("first batch after %.0f s", time.monotonic() - self._began)
            stop.workers_can_save()
        if item.get(MISSING_CLASSES):
            log.warning(
                "eval/knn_top1: of %d classes of the test images no image is in the bank, so it "
                "cannot name them; data.eval_train names a set in mixed order, and a larger "
                "evaluation.eval_train_limit takes more", item[MISSING_CLASSES],
            )  # fmt: skip
        self.log.append(METRICS, item)
        self.sender.wake()
        if self.on_progress is not None:
            try:
                self.on_progress(item)
            except SimclrRayError as error:  # who watches may end a run
                self._end(error)
        self._check_health(item)

    def _check_health(self, item: Record) -> None:
        """End the run, or say so once, where it does not learn."""
        try:
            self.health(item)
        except CollapseError as error:
            if self.resolved.config.health.on_collapse != "warn":
                self._end(error)
            elif not self._has_warned:
                self._has_warned = True
                log.warning("%s (health.on_collapse=warn)", error)
        except UnhealthyRunError as error:
            self._end(error)
        if self._keeper is not None:
            with suppress(OSError):  # of a store that does not answer now: after the next one
                self._keeper.keep(self.health)

    def _take_bad(self, item: dict[str, Any]) -> None:
        if item["id"] not in self._bad:
            self._bad[item["id"]] = _unusable_row(item)
            self.log.append(BAD_ROWS, item)

    def _check_bad_rows(self) -> None:
        """End the run when more rows are unusable than `data.max_bad_fraction` allows; name all."""
        rows = self.resolved.source.num_rows
        max_fraction = self.resolved.config.data.max_bad_fraction
        if len(self._bad) <= max_fraction * rows:
            return
        reasons = "; ".join(sorted({bad.reason for bad in self._bad.values()})[:5])
        names = [bad.path or f"id {row_id}" for row_id, bad in sorted(self._bad.items())]
        self._end(
            TooManyBadImages(
                f"{len(self._bad)} of {rows} rows cannot be used, as far as it has come, more than "
                f"data.max_bad_fraction={max_fraction:g} allows; reasons: {reasons}; first: "
                f"{', '.join(names[:10])}; all: {self.resolved.folder.below(BAD_ROWS)}"
            )
        )

    def say_bad_rows(self) -> None:
        """Say how many rows could not be used, where there are any and the run goes on."""
        if self._bad and self.fatal is None:
            log.warning(
                "%s of %s could not be used, and others stood in for them: %s",
                counted(len(self._bad), "image"), f"{self.resolved.source.num_rows:,}",
                self.resolved.folder.below(BAD_ROWS),
            )  # fmt: skip

    def _end(self, error: SimclrRayError) -> None:
        """Have the run end, once: no retry can mend it."""
        if self.fatal is None:
            if isinstance(error, UnhealthyRunError):
                error = self.health.explained(error)
            self.fatal = error
            self.interrupt()


def _unusable_row(record: dict[str, Any]) -> UnusableRow:
    """Return the row that a record of `BAD_ROWS` is of."""
    return UnusableRow(int(record["id"]), str(record["reason"]), str(record.get("path", "")))
