"""What a rank exports through Ray while it trains: numbers of its reports, and its own times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from simclr_ray.data.bytes_read import BYTES_READ
from simclr_ray.distributed.ray_metrics import RunMetrics
from simclr_ray.train.heartbeat import Heartbeat

# name in the run's log -> exported name; `start/…` are the model's before the first step
LOGGED: Final[Mapping[str, str]] = {
    "train/loss": "simclr_loss",
    "train/images_per_s": "simclr_images_per_second",
    "start/effective_rank": "simclr_effective_rank",
    "eval/effective_rank": "simclr_effective_rank",
    "eval/knn_top1": "simclr_knn_top1_ratio",
}


class RankMetrics:
    """Exports what one rank reports.

    Args:
        run: Name of the run.
        rank: Of this process.
        heartbeat: Of the rank, which knows how long it was in each phase.
        start: Steps that were done when this process began.
    """

    def __init__(self, run: str, rank: int, heartbeat: Heartbeat, start: int) -> None:
        self._metrics, self._heartbeat = RunMetrics(run, rank), heartbeat
        self._step, self._spent = start, heartbeat.spent_s()

    def logged(self, epoch: float, values: Mapping[str, float]) -> None:
        """Export what rank 0 logs for all."""
        self._metrics.set("simclr_epoch", epoch)
        for name, value in values.items():
            if name in LOGGED:
                self._metrics.set(LOGGED[name], value)

    def reported(self, step: int) -> None:
        """Export where this rank's time went since the report before, and what it has read."""
        before, self._spent = self._spent, self._heartbeat.spent_s()
        steps, self._step = step - self._step, step
        waited = self._spent["data"] - before["data"]
        seconds = waited + self._spent["step"] - before["step"]
        if steps > 0 < seconds:  # a report may come twice for a step
            self._metrics.set("simclr_step_seconds", seconds / steps)
            self._metrics.set("simclr_data_wait_ratio", waited / seconds)
        self._metrics.add("simclr_read_bytes_total", BYTES_READ.take())

    def saved(self, seconds: float) -> None:
        """Export how long a checkpoint took."""
        self._metrics.set("simclr_checkpoint_seconds", seconds)
