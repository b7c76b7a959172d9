"""What each rank is doing, told to the driver by a thread of its own; and the driver's watch on it.

A rank that is stopped, or whose node is gone, says nothing: Ray notices the one never and the other
after a minute. A rank that says for too long that it waits is stuck, and the others with it.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple, Protocol, get_args

import ray

from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.config.wording import counted
from simclr_ray.distributed.placement import free_nodes, nodes
from simclr_ray.storage.rank_states import RankState

Phase = Literal["start", "data", "step", "evaluation", "checkpoint"]
LONG: Final = ("start", "evaluation", "checkpoint")  # how long they take, their first does not tell
BEAT_S: Final = 5.0
SILENT_S: Final = 15.0  # three beats; then it is said
RESOURCES_S: Final = 15.0  # without a rank; then it is said what the cluster lacks
TIMES: Final = 10  # the median of a phase, and no rank does that by itself
KEPT: Final = 100  # durations of a phase
log = logging.getLogger(__name__)


class Inbox(Protocol):
    """Takes what a rank has to say to its driver."""

    def put(self, item: Any) -> None:
        """Take one item."""
        ...


class Beat(NamedTuple):
    """What a rank is doing."""

    rank: int
    phase: Phase
    step: int  # done
    seconds: float  # in this phase
    limit_s: float  # of it
    slow_s: float = math.inf  # after so long it is said that it takes longer than others did


class RankStarted(NamedTuple):
    """A rank's process is up."""

    rank: int
    address: str  # of its node
    actor: Any  # Ray's handle, to end it by

    @classmethod
    def here(cls, rank: int) -> RankStarted:
        """Return what this process says of itself."""
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call] # Ray's
        return cls(rank, address, ray.get_runtime_context().current_actor)


class RankFinished(NamedTuple):
    """A rank has trained to the end, or to where it was asked to stop."""

    rank: int


class RanksFailed(NamedTuple):
    """What has ended by an error, such as `rank 1` -> the last line of it; all start again.

    Attributes:
        causes: Of each who failed; the first is the one to be told of.
        will_recur: One is an error that comes again, as `failures.will_recur` has it.
    """

    causes: Mapping[str, str]
    will_recur: bool = False


class RanksMove(NamedTuple):
    """All ranks have saved and start again: as another number of them, or on other nodes."""

    step: int
    num_workers: int  # until now
    taken: Sequence[str]  # nodes that are about to be taken away


class Heartbeat:
    """A rank's thread that tells the driver every few seconds in which phase the rank is."""

    def __init__(self, inbox: Inbox, rank: int, scaling: ScalingConfig) -> None:
        self._inbox, self._rank, self._scaling = inbox, rank, scaling
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._spent: dict[str, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._phase: Phase = "start"
        self._step, self._since = 0, time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._tell, daemon=True, name="heartbeat").start()

    def enter(self, phase: Phase, step: int) -> None:
        """Begin a phase, after so many steps."""
        now = time.monotonic()
        self._durations[self._phase].append(now - self._since)
        self._spent[self._phase] += now - self._since
        self._phase, self._step, self._since = phase, step, now

    def spent_s(self) -> dict[str, float]:
        """Return how long the rank was in each phase so far, in the present one until now."""
        spent = dict(self._spent)
        spent[self._phase] += time.monotonic() - self._since
        return spent

    def close(self) -> None:
        """Say nothing more."""
        self._ended.set()

    def stop(self) -> None:
        """Say that the rank has done all that it had to do, and nothing more."""
        self.close()
        self._inbox.put(RankFinished(self._rank))

    def limit_s(self, phase: Phase) -> float:
        """Return after how many seconds a phase is stuck."""
        before = list(self._durations[phase])
        if phase in LONG or not before:
            return max(self._scaling.startup_s, TIMES * max(before, default=0.0))
        return max(self._scaling.stalled_s, TIMES * statistics.median(before))

    def slow_s(self, phase: Phase) -> float:
        """Return after how many seconds a phase takes longer than the same did before."""
        before = list(self._durations[phase])
        if phase in LONG or not before:
            return math.inf
        return max(SILENT_S, TIMES * statistics.median(before))

    def _tell(self) -> None:
        while not self._ended.wait(BEAT_S):
            phase, step, since = self._phase, self._step, self._since
            beat = Beat(
                self._rank, phase, step, time.monotonic() - since,
                self.limit_s(phase), self.slow_s(phase),
            )  # fmt: skip
            with suppress(ray.exceptions.RayError):  # the driver is gone, and Ray ends us
                self._inbox.put(beat)


class _Rank(NamedTuple):
    started: RankStarted
    beat: Beat
    at: float  # when that came

    def seconds(self, now: float) -> float:
        """Return for how long it is in its phase."""
        return self.beat.seconds + now - self.at


def _not_waiting_for_others(ranks: list[_Rank]) -> list[_Rank]:
    """Return the ranks that are late by themselves; in a step each waits for all."""
    return [rank for rank in ranks if rank.beat.phase != "step"] or ranks


class RankWatch:
    """The driver's view of its ranks: says who is silent or stuck, and ends who is so for good."""

    def __init__(self, scaling: ScalingConfig) -> None:
        self._scaling = scaling
        self._ranks: dict[int, _Rank] = {}
        self._silent: set[int] = set()
        self._slow_at = -1  # the last step at which that was said
        self._without = time.monotonic()  # since when no rank is up
        self._logged_at = -float("inf")

    def take_start(self, started: RankStarted) -> None:
        """Count a rank as up."""
        beat = Beat(started.rank, "start", 0, 0.0, self._scaling.startup_s)
        self._ranks[started.rank] = _Rank(started, beat, time.monotonic())
        self._silent.discard(started.rank)

    def take(self, beat: Beat) -> None:
        """Take what a rank says; a late word of one that was given up is passed over."""
        rank = self._ranks.get(beat.rank)
        if rank is None:
            return
        if beat.rank in self._silent:
            self._silent.discard(beat.rank)
            log.warning("%s answers again", _named(rank.started))
        self._ranks[beat.rank] = rank._replace(beat=beat, at=time.monotonic())

    def take_end(self, finished: RankFinished) -> None:
        """Expect nothing more of a rank."""
        self._ranks.pop(finished.rank, None)
        self._silent.discard(finished.rank)
        if not self._ranks:
            self._without = math.inf

    def states(self) -> list[RankState]:
        """Return where the ranks stand, by their number."""
        now = time.monotonic()
        return [
            RankState(
                number, rank.started.address, rank.beat.phase, rank.beat.step,
                round(rank.seconds(now), 1),
            )
            for number, rank in sorted(self._ranks.items())
        ]  # fmt: skip

    def forget(self) -> None:
        """Begin anew: all ranks are being started again."""
        self._ranks.clear()
        self._silent.clear()
        self._slow_at = -1
        self._without = time.monotonic()

    def check(self) -> None:
        """Say what is wrong, once; end the ranks that are stuck, so that all start again."""
        now = time.monotonic()
        if not self._ranks:
            self._say_what_lacks(now)
            return
        for number, rank in self._ranks.items():
            silent_s = now - rank.at
            if silent_s > SILENT_S and number not in self._silent:
                self._silent.add(number)
                log.warning(
                    "%s has not answered for %.0f s (it was at step %d, in %s); %s",
                    _named(rank.started), silent_s, rank.beat.step, rank.beat.phase,
                    "its node is gone" if _is_gone(rank.started) else "waiting for it",
                )  # fmt: skip
        self._say_who_is_slow(now)
        stuck = self._stuck(now)
        if stuck:
            for rank in stuck:
                log.warning(
                    "%s is stuck in %s at step %d for %.0f s: it is ended, and the run goes on "
                    "from its last checkpoint", _named(rank.started), rank.beat.phase,
                    rank.beat.step, rank.seconds(now),
                )  # fmt: skip
                with suppress(Exception):  # of a node that is gone: Ray sees that by itself
                    ray.kill(rank.started.actor)
            self.forget()

    def _say_who_is_slow(self, now: float) -> None:
        """Say, once, who waits for longer than ever: what it waits for may be on a lost node."""
        ranks = list(self._ranks.values())
        if self._silent or any(rank.beat.phase in LONG for rank in ranks):
            return  # said already, or waited for
        late = _not_waiting_for_others([r for r in ranks if r.seconds(now) > r.beat.slow_s])
        if late and late[0].beat.step > self._slow_at:
            self._slow_at = late[0].beat.step
            log.warning(
                "%s has been in %s at step %d for %.0f s, far longer than before%s; the limit is "
                "%.0f s", _named(late[0].started), late[0].beat.phase, late[0].beat.step,
                late[0].seconds(now), f", as {len(late) - 1} more" if late[1:] else "",
                late[0].beat.limit_s,
            )  # fmt: skip

    def _stuck(self, now: float) -> list[_Rank]:
        """Return the ranks that keep the run from going on; those they keep waiting are spared."""
        for_good = max(SILENT_S, self._scaling.stalled_s)
        silent = [rank for rank in self._ranks.values() if now - rank.at > for_good]
        late = [r for r in self._ranks.values() if r.seconds(now) > r.beat.limit_s]
        return silent or _not_waiting_for_others(late)

    def _say_what_lacks(self, now: float) -> None:
        if now - self._without < RESOURCES_S or now - self._logged_at < 4 * RESOURCES_S:
            return
        self._logged_at = now
        alive = [node for node in nodes() if node.is_alive]
        there, needed = sum(node.cpus for node in alive), self._scaling.least_cpus
        gpus, wanted = sum(node.gpus for node in alive), self._scaling.least_gpus
        free = free_nodes()
        cpus_left, gpus_left = sum(node.cpus for node in free), sum(node.gpus for node in free)
        if there < needed or gpus < wanted:
            coming = "a node to join"
        elif cpus_left < needed or gpus_left < wanted:
            coming = "others to end, or Ray to start them"
        else:
            coming = "Ray to start them"
        log.warning(
            "no worker is up for %.0f s: %s with %g CPUs and %g GPUs, %g and %g of them free; the "
            "run takes %g and %g; waiting for %s", now - self._without, counted(len(alive), "node"),
            there, gpus, cpus_left, gpus_left, needed, wanted, coming,
        )  # fmt: skip


def _named(started: RankStarted) -> str:
    return f"rank {started.rank} on {started.address}"


def _is_gone(started: RankStarted) -> bool:
    with suppress(Exception):
        return not any(n.is_alive and n.address == started.address for n in nodes())
    return False
