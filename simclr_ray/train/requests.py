"""What all ranks are asked for between two steps, each time with a checkpoint of their step first.

To end, by a file in the run's folder (`stop`); to make room for another number of workers
(`elastic`); or because a node that holds ranks is about to be taken away, as Ray tells it. Rank 0
hears of the first two and tells the others (`collectives.RankZeroSignal`): nobody waits for that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from typing import Final, Literal, Self

from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.distributed.collectives import RankZeroSignal
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.context import TrainContext
from simclr_ray.train.loop import Request
from simclr_ray.train.stop import RESIZE, STOP, FileWatch

# Ray's own, off where one machine is the cluster. It looks every 5 s whether a node is taken away.
WATCHER, LOOK_S = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", 5.0
BITS: Final = {STOP: 1, RESIZE: 2}  # of what rank 0 says
LOOK: Final = 4
Reason = Literal["", "stop", "resize", "taken"]


class RanksMoved(RuntimeError):  # noqa: N818 - no fault, but only an error has Ray start anew
    """All ranks have saved and start again, as another number of them or on other nodes."""


def have_moved(errors: Collection[BaseException]) -> bool:
    """Return whether ranks have ended to start again, by their errors."""
    return bool(errors) and all(isinstance(error, RanksMoved) for error in errors)


class Requests:
    """What one rank is asked while it trains; a context manager.

    Making one is a collective, and so is `ask`.

    Attributes:
        reason: Why the ranks were asked to end; empty while they were not.
    """

    def __init__(self, folder: RunFolder, context: TrainContext, scaling: ScalingConfig) -> None:
        self._context = context
        self.reason: Reason = ""
        self.taken: list[str] = []  # nodes
        files = (STOP, RESIZE) if scaling.is_elastic else (STOP,)
        self._files = FileWatch(folder, files) if context.rank == 0 else None
        self._signal = RankZeroSignal(scaling.collective_timeout_s)
        self._looks = os.environ.get(WATCHER, "1") != "0"
        self._looked_at = time.monotonic()

    def __enter__(self) -> Self:
        """Return the requests themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Look for files no more."""
        if self._files is not None:
            self._files.close()

    def ask(self) -> Request:
        """Return what is asked of all ranks alike after a step. A collective."""
        heard = self._signal.say(self._wanted())
        if heard & BITS[RESIZE]:
            self.reason = "resize"
        if heard & LOOK:
            taken = self._context.nodes_taken()
            if taken is not None:
                self.reason, self.taken = "taken", taken
        if heard & BITS[STOP]:
            self.reason = "stop"
        return "stop" if self.reason else ""

    def close(self) -> None:
        """Let the last word arrive. A collective."""
        self._signal.close()

    def _wanted(self) -> int:
        """Return what rank 0 wants all ranks to hear after the next step."""
        if self._files is None:
            return 0
        wanted = sum(BITS[name] for name in self._files.seen)
        if self._looks and time.monotonic() - self._looked_at > LOOK_S:
            self._looked_at = time.monotonic()
            wanted |= LOOK
        return wanted
