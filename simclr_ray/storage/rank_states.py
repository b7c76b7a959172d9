"""`ranks.json`: where each rank of a run stands, as its driver saw it last.

Written beside the logs every few seconds; in a bucket it is at most a minute old.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from simclr_ray.storage.run_folder import RunFolder

RANKS: Final = "ranks.json"


class RankState(NamedTuple):
    """What a rank is doing, and on which node."""

    rank: int
    node: str  # its address
    phase: str  # start, data, step, evaluation or checkpoint
    step: int  # done
    seconds: float  # in this phase


class RankStates(NamedTuple):
    """The ranks that are up, and when that was seen."""

    ranks: tuple[RankState, ...] = ()
    at: float = 0.0  # seconds since 1970, by the driver's clock

    @classmethod
    def now(cls, ranks: Sequence[RankState]) -> RankStates:
        """Return these ranks as they are now."""
        return cls(tuple(ranks), round(time.time(), 3))

    @property
    def text(self) -> str:
        """The content of the file."""
        return json.dumps({"time": self.at, "ranks": [rank._asdict() for rank in self.ranks]})

    @classmethod
    def read(cls, folder: RunFolder) -> RankStates:
        """Return what a run folder says; no ranks where there is no such file, or a broken one."""
        tree = folder.read_json(RANKS, dict) or {}
        try:
            ranks = [_rank(row) for row in tree.get("ranks", [])]
            return cls(tuple(ranks), float(tree.get("time", 0.0)))
        except (TypeError, ValueError, KeyError, OverflowError):
            return cls()


def _rank(row: dict[str, Any]) -> RankState:
    return RankState(
        int(row["rank"]), str(row["node"]), str(row["phase"]), int(row["step"]),
        float(row["seconds"]),
    )  # fmt: skip
