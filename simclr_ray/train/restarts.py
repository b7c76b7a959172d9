"""Why all ranks start again, told to the driver, which counts (`RunMonitor`).

Ray counts the failures of a whole run; the driver those since the newest checkpoint. And Ray counts
a start that finds no room like one whose processes die: here it waits for the one without end, and
not for the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
import ray.train
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from simclr_ray.distributed.ray_cluster import PickledQueue
from simclr_ray.train.failures import cause_of, will_recur
from simclr_ray.train.heartbeat import RanksFailed
from simclr_ray.train.requests import have_moved

BEFORE = "its process ended before it was up"
# of a start; those of running workers come with their ranks
DEATHS = (WorkerGroupStartupFailedError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)


class FailureReport(ray.train.UserCallback):
    """Tells the driver why ranks have ended, before Ray starts them again."""

    def __init__(self, inbox: PickledQueue) -> None:
        self.inbox = inbox

    def after_exception(
        self,
        run_context: Any,  # noqa: ARG002 - Ray's interface
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Send the last line of each error; Ray calls this in its own process."""
        if not have_moved(worker_exceptions.values()):
            report(self.inbox, _failed(worker_exceptions))


class RestartPolicy(DefaultFailurePolicy):
    """Ray's policy, which tells the driver of what no rank can report."""

    def __init__(self, failure_config: FailureConfig, inbox: PickledQueue) -> None:
        super().__init__(failure_config)
        self.inbox = inbox

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Return to start again, or to end the run."""
        if not is_open(self.inbox):
            return FailureDecision.RAISE  # nobody would count
        if have_moved(getattr(training_failed_error, "worker_failures", {}).values()):
            return FailureDecision.RETRY  # nothing has failed
        decision = super().make_decision(training_failed_error)
        failure = getattr(training_failed_error, "controller_failure", None)
        if isinstance(failure, DEATHS):
            cause = f"{BEFORE}: {cause_of(failure.__cause__ or failure)}"
            report(self.inbox, RanksFailed({"a worker": cause}))
            is_last = self.failure_config.max_failures == 0
            return FailureDecision.RAISE if is_last else FailureDecision.RETRY
        if getattr(training_failed_error, "drain_timed_out", False):
            gone = "its node was taken away before all had saved"
            report(self.inbox, RanksFailed({"a rank": gone}))
        return decision


class BackendEnd(BackendSetupCallback):
    """Ray's end of the process group, which goes wrong where a worker's node is out of memory.

    Ray 2.60 passes over a worker that has died otherwise; of this it made the end of the run.
    """

    def before_execution_group_shutdown(self, execution_group: Any) -> None:
        """Leave the process group, in the workers that there still are."""
        with suppress(ray.exceptions.RayError):
            super().before_execution_group_shutdown(execution_group)


def _failed(errors: Mapping[int, Exception]) -> RanksFailed:
    """Return what ranks failed by; first what comes again, which others then wait for in vain."""
    recurring = {rank: will_recur(error) for rank, error in errors.items()}
    ranks = sorted(errors, key=lambda rank: (not recurring[rank], rank))
    causes = {f"rank {rank}": cause_of(errors[rank]) for rank in ranks}
    return RanksFailed(causes, any(recurring.values()))


def is_open(inbox: PickledQueue) -> bool:
    """Return whether the inbox is there."""
    try:
        inbox.size()
    except ray.exceptions.RayError:
        return False
    return True


def report(inbox: PickledQueue, failed: RanksFailed) -> None:
    """Send the causes to the driver, where there still is one."""
    with suppress(ray.exceptions.RayError):
        inbox.put(failed)
