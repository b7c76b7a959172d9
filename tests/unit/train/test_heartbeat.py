"""The driver's watch on its ranks: who is named, who is ended, and who is spared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ray

from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.train import heartbeat
from simclr_ray.train.heartbeat import Beat, Heartbeat, RankFinished, RankStarted, RankWatch


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Inbox:
    """Keeps what is put into it."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    monkeypatch.setattr(heartbeat, "nodes", list)
    monkeypatch.setattr(heartbeat, "free_nodes", list)
    return clock


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(ray, "kill", names.append)
    return names


def watch(num: int = 2) -> RankWatch:
    ranks = RankWatch(ScalingConfig(num_workers=num))
    for rank in range(num):
        ranks.take_start(RankStarted(rank, f"10.0.0.{rank}", f"actor {rank}"))
    return ranks


def beat(rank: int, phase: Any = "step", seconds: float = 1.0, limit_s: float = 120.0) -> Beat:
    return Beat(rank, phase, 7, seconds, limit_s)


def test_a_silent_rank_is_named_once_and_again_when_it_answers(
    clock: Clock, ended: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = watch()
    ranks.take(beat(1))
    for _ in range(6):
        clock.now += 5
        ranks.take(beat(0))
        ranks.check()
    said = [r.message for r in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("rank 1 on 10.0.0.1 has not answered for 20 s (it was at step 7, in")
    assert said[0].endswith("its node is gone")  # there is none
    ranks.take(beat(1))
    assert "rank 1 on 10.0.0.1 answers again" in caplog.text
    assert ended == []


def test_the_rank_that_is_silent_for_good_is_ended_and_not_those_that_wait_for_it(
    clock: Clock, ended: list[str]
) -> None:
    ranks = watch(3)
    for seconds in range(0, 200, 5):
        for rank in (0, 2):
            ranks.take(beat(rank, "step", seconds))
        ranks.check()
        if ended:
            break
        clock.now += 5
    assert ended == ["actor 1"]
    assert seconds == pytest.approx(125, abs=5)


def test_of_ranks_that_all_answer_the_one_that_waits_for_data_keeps_the_others(
    clock: Clock, ended: list[str]
) -> None:
    ranks = watch()
    ranks.take(beat(0, "step", 130))
    ranks.take(beat(1, "data", 130))
    ranks.check()
    assert ended == ["actor 1"]


@pytest.mark.parametrize(("phases", "named"), [(("step", "data"), 1), (("step", "step"), 0)])
def test_a_wait_far_longer_than_those_before_is_said_once(
    clock: Clock, ended: list[str], caplog: pytest.LogCaptureFixture, phases: Any, named: int
) -> None:
    ranks = watch()
    for seconds in (4.0, 9.0, 14.0, 19.0, 24.0):
        for rank, phase in enumerate(phases):
            ranks.take(beat(rank, phase, seconds)._replace(slow_s=15.0))
        ranks.check()
    said = [r.message for r in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"rank {named} on 10.0.0.{named} has been in {phases[named]} at step")
    assert "7 for 19 s, far longer than before" in said[0]
    assert said[0].endswith("the limit is 120 s")
    assert ended == []


def test_who_waits_for_a_silent_rank_or_for_an_evaluation_is_not_called_slow(
    clock: Clock, ended: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = watch()
    ranks.take(beat(0, "step", 20)._replace(slow_s=15.0))
    ranks.take(beat(1, "evaluation", 20, 600))
    ranks.check()
    assert caplog.text == ""
    clock.now += 20
    ranks.take(beat(0, "step", 40)._replace(slow_s=15.0))
    ranks.check()
    assert [r.message.partition(" on ")[0] for r in caplog.records] == ["rank 1"]


def test_ranks_stuck_in_one_step_are_all_ended(clock: Clock, ended: list[str]) -> None:
    ranks = watch()
    for rank in range(2):
        ranks.take(beat(rank, "step", 130))
    ranks.check()
    assert ended == ["actor 0", "actor 1"]
    ranks.take(beat(0, "step", 140))  # a late word of one that was given up
    ranks.check()
    assert len(ended) == 2


def test_what_takes_long_by_itself_is_no_rank_that_is_stuck(
    clock: Clock, ended: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = watch()
    for rank, phase in enumerate(("evaluation", "checkpoint")):
        ranks.take(beat(rank, phase, 500, 600))
    ranks.check()
    for rank in range(2):
        ranks.take_end(RankFinished(rank))
    clock.now += 1000
    ranks.check()
    assert ended == []
    assert caplog.text == ""


def test_without_a_rank_it_is_said_what_the_cluster_lacks_and_not_too_often(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = watch()
    ranks.forget()
    for _ in range(24):
        clock.now += 5
        ranks.check()
    said = [r.message for r in caplog.records]
    assert len(said) == 2
    assert said[0].startswith(
        "no worker is up for 15 s: 0 nodes with 0 CPUs and 0 GPUs, 0 and 0 of"
    )
    assert "the run takes 2 and 0" in said[0]
    assert said[0].endswith("waiting for a node to join")


def test_a_phase_is_stuck_after_ten_times_its_median_and_its_first_by_the_start(
    clock: Clock,
) -> None:
    inbox: Any = Inbox()
    rank = Heartbeat(inbox, 1, ScalingConfig(stalled_s=120, startup_s=600))
    assert rank.limit_s("step") == 600
    assert rank.slow_s("step") == math.inf
    for step in range(5):
        rank.enter("step", step)
        clock.now += 1 if step < 3 else 30
        rank.enter("data", step)
    assert rank.limit_s("step") == 120
    assert rank.slow_s("step") == 15
    for step in range(20):
        rank.enter("step", step)
        clock.now += 30
        rank.enter("data", step)
    assert rank.limit_s("step") == rank.slow_s("step") == 300
    rank.enter("evaluation", 20)
    clock.now += 100
    rank.enter("data", 20)
    assert rank.limit_s("evaluation") == 1000
    rank.stop()
    assert inbox.items == [RankFinished(1)]


def test_a_rank_knows_how_long_it_was_in_each_phase(clock: Clock) -> None:
    rank = Heartbeat(Inbox(), 0, ScalingConfig())
    for phase, seconds in (("start", 3), ("step", 2), ("data", 5), ("step", 4), ("data", 0.5)):
        rank.enter(phase, 0)  # type: ignore[arg-type] # of the list above
        clock.now += seconds
    assert rank.spent_s() == {
        "start": 3, "data": 5.5, "step": 6, "evaluation": 0, "checkpoint": 0,
    }  # fmt: skip
    rank.stop()
