"""Whether a run still learns: the loss and the features of an encoder that has collapsed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Final

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import imports_in
from simclr_ray.errors import CollapseError
from simclr_ray.nn.build import build_loss

# RankMe of features that all point one way is 1. An untrained ResNet-10 has 2.3
# (`benchmarks/results/cifar10_cpu.json`), so that 1.1 is no healthy start either.
COLLAPSED_RANK: Final = 1.1
# NT-Xent of embeddings that are all equal is ln(2N − 1). Trained at τ = 1 it is about 1 below.
STUCK_FRACTION: Final = 0.998
STUCK_AFTER_EPOCHS: Final = 2  # beyond warm-up: before, a healthy loss may still lie there
log = logging.getLogger(__name__)


class HealthWatch:
    """Looks at each record of a run's metrics, and raises where the encoder has collapsed.

    Args:
        experiment: Its loss tells which level only a collapsed model has, and how long it warms up.
        min_steps: Before so many no loss tells anything.
    """

    def __init__(self, experiment: Experiment, min_steps: int = 0) -> None:
        self._schedule, self._min_steps = experiment.schedule, min_steps
        self._level = None  # of imported code, which need not be here any more: none is known
        if not any(where == "loss" for where, _ in imports_in(experiment)):
            # 0 for D or K: no level that depends on them tells a collapsed model (`only_collapsed`)
            self._level = build_loss(experiment).chance_level(experiment.batch_size, 0)
        self.collapsed_at = 0  # the epoch whose end is the last that counts; 0: all do

    def __call__(self, record: Mapping[str, float]) -> None:
        """Take one record of metrics.

        Raises:
            CollapseError: All images look alike to the encoder.
        """
        rank = record.get("eval/effective_rank", math.inf)
        if rank < COLLAPSED_RANK:
            self.collapsed_at = round(record["epoch"])
            raise CollapseError(
                f"collapsed: the features' effective rank is {rank:.2f} after epoch "
                f"{record['epoch']:.0f}; all images look alike to the encoder"
            )
        # a healthy loss may lie at a level that is not `only_collapsed`
        if self._level is None or not self._level.only_collapsed:
            return
        if record["step"] < self._min_steps:
            return
        stuck, loss = self._level.value, record.get("train/mean_loss", -math.inf)
        schedule, epoch = self._schedule, record["epoch"]
        warmup = schedule.warmup_epochs
        if schedule.warmup_steps:
            warmup = schedule.warmup_steps * epoch / max(record["step"], 1)
        if epoch > warmup + STUCK_AFTER_EPOCHS and loss > STUCK_FRACTION * stuck:
            self.collapsed_at = max(1, math.floor(epoch))
            raise CollapseError(
                f"stuck: the loss is {loss:.4f} after epoch {epoch:.2f}, that of "
                f"embeddings that are all equal ({stuck:.4f})"
            )
