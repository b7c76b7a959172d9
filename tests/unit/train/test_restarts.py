"""What the driver is told of failures, and which of them Ray may meet without end."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import (
    ControllerError,
    PreemptionError,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.v2.api.preemption import PreemptionInfo

from simclr_ray.train.failures import cause_of
from simclr_ray.train.heartbeat import RanksFailed
from simclr_ray.train.requests import RanksMoved
from simclr_ray.train.restarts import FailureReport, RestartPolicy


class Inbox:
    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)

    def size(self) -> int:
        return len(self.items)


def dead_at_start() -> ControllerError:
    failure = WorkerGroupStartupFailedError("One of the worker actors failed to initialize")
    failure.__cause__ = RayActorError()
    return ControllerError(failure)


def decide(
    error: TrainingFailedError, max_failures: int = -1
) -> tuple[FailureDecision, list[RanksFailed]]:
    inbox: Any = Inbox()
    policy = RestartPolicy(FailureConfig(max_failures=max_failures), inbox)
    return policy.make_decision(error), inbox.items


def test_a_process_that_dies_before_it_is_up_counts_as_a_failure() -> None:
    decision, said = decide(dead_at_start())
    assert decision == FailureDecision.RETRY
    assert [list(word.causes) for word in said] == [["a worker"]]
    assert said[0].causes["a worker"].startswith("its process ended before it was up: ")
    assert decide(dead_at_start(), max_failures=0)[0] == FailureDecision.RAISE


@pytest.mark.parametrize("max_failures", [0, -1])
def test_a_start_that_finds_no_room_is_waited_for(max_failures: int) -> None:
    error = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert decide(error, max_failures) == (FailureDecision.RETRY, [])


def test_a_node_that_goes_before_its_ranks_have_saved_is_told() -> None:
    taken = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]})
    late = PreemptionError(taken, drain_timed_out=True)
    assert decide(late)[0] == FailureDecision.RETRY
    assert [dict(word.causes) for word in decide(late)[1]] == [
        {"a rank": "its node was taken away before all had saved"}
    ]
    assert decide(PreemptionError(taken)) == (FailureDecision.RETRY, [])


OOM = """Task was killed due to the node running low on memory.
Top 10 memory users:
PID	MEM(GB)	COMMAND
8718	15.86	/usr/bin/python train.py
1412	0.89	ray::RayTrainWorker

Refer to the documentation on how to address the out of memory issue: https://docs.ray.io"""


def test_a_node_out_of_memory_is_said_in_a_line_and_counts_as_a_failure() -> None:
    error = OutOfMemoryError(OOM)  # type: ignore[no-untyped-call] # Ray's
    said = (
        "its node has run out of memory, and Ray has ended it; most has process 8718, 15.86 GB: "
        "/usr/bin/python train.py"
    )
    assert cause_of(error) == cause_of(WorkerHealthCheckFailedError("gone", error)) == said
    decision, words = decide(ControllerError(error))
    assert decision == FailureDecision.RETRY
    assert words[0].causes["a worker"].endswith(said)
    assert decide(ControllerError(error), max_failures=0)[0] == FailureDecision.RAISE


def test_without_a_driver_that_counts_nothing_starts_again() -> None:
    class Gone(Inbox):
        def size(self) -> int:
            raise RayActorError

    inbox: Any = Gone()
    policy = RestartPolicy(FailureConfig(max_failures=-1), inbox)
    assert policy.make_decision(WorkerGroupError("", {0: ValueError()})) == FailureDecision.RAISE


@pytest.mark.parametrize("max_failures", [0, -1])
def test_ranks_that_move_have_not_failed(max_failures: int) -> None:
    moved: dict[int, Exception] = {rank: RanksMoved("after step 7") for rank in range(2)}
    error = WorkerGroupError("", moved)
    assert decide(error, max_failures) == (FailureDecision.RETRY, [])
    inbox: Any = Inbox()
    FailureReport(inbox).after_exception(None, moved)
    assert inbox.items == []
    FailureReport(inbox).after_exception(None, moved | {1: ValueError("broken")})
    causes = {"rank 1": "broken", "rank 0": "after step 7"}
    assert inbox.items == [RanksFailed(causes, will_recur=True)]
    assert list(inbox.items[0].causes) == ["rank 1", "rank 0"], "what comes again is told first"
    one_failed = WorkerGroupError("", moved | {1: ValueError("broken")})
    expected = FailureDecision.RETRY if max_failures else FailureDecision.RAISE
    assert decide(one_failed, max_failures) == (expected, [])  # `FailureReport` tells it
