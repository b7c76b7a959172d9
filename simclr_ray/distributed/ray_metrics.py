"""A run's metrics for Ray, which serves those of all processes of a node to Prometheus.

Ray puts `ray_` before each name, and node and session beside the labels `run` and `rank`. In the
Ray that a run starts for itself nobody collects them: to set one then costs a microsecond, else
seven (Ray 2.60), and it is done once a report. Gauges go 20 s after the process that set them,
counters stay. There is no histogram: Ray passes on the middles of its buckets, not what was
observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from ray.util.metrics import Counter, Gauge

PREFIX: Final = "ray_"  # Ray's, before each name
LABELS: Final = ("run", "rank")


class Definition(NamedTuple):
    """What is exported under a name: a counter, which only grows, or the newest value."""

    kind: type[Gauge] | type[Counter]
    description: str


METRICS: Final[Mapping[str, Definition]] = MappingProxyType(
    {
        "simclr_epoch": Definition(Gauge, "Epochs done (rank 0)."),
        "simclr_loss": Definition(Gauge, "Loss of the last step's global batch (rank 0)."),
        "simclr_images_per_second": Definition(
            Gauge, "Images of all ranks a second, since the report before (rank 0)."
        ),
        "simclr_effective_rank": Definition(
            Gauge, "Effective rank of the features at the last evaluation (rank 0)."
        ),
        "simclr_knn_top1_ratio": Definition(
            Gauge, "kNN's top-1 accuracy at the last evaluation, 0 to 1 (rank 0)."
        ),
        "simclr_step_seconds": Definition(
            Gauge, "Seconds of a step, the wait for its batch included, since the report before."
        ),
        "simclr_data_wait_ratio": Definition(
            Gauge, "Part of a step's time that was waiting for its batch, 0 to 1."
        ),
        "simclr_checkpoint_seconds": Definition(
            Gauge, "Seconds that training stood still for the last checkpoint."
        ),
        "simclr_read_bytes_total": Definition(
            Counter, "Bytes read of datasets, by a rank and by what makes its batches."
        ),
    }
)


class RunMetrics:
    """The metrics that one process exports for a rank of a run."""

    def __init__(self, run: str, rank: int) -> None:
        self.run, self.rank = run, rank
        self._labels = dict(zip(LABELS, (run, str(rank)), strict=True))
        self._made: dict[str, Gauge | Counter] = {}

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        metric = self._metric(name)
        assert isinstance(metric, Gauge), name
        metric.set(value)

    def add(self, name: str, value: float) -> None:
        """Add to a counter; of nothing there is nothing to do."""
        metric = self._metric(name)
        assert isinstance(metric, Counter), name
        if value > 0:
            metric.inc(value)

    def _metric(self, name: str) -> Gauge | Counter:
        """Return a metric, made when it is first needed: Prometheus shows no zero before that."""
        if name not in self._made:
            definition = METRICS[name]
            metric = definition.kind(name, definition.description, LABELS)
            self._made[name] = metric.set_default_tags(self._labels)
        return self._made[name]
