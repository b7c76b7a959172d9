"""The arithmetic of a run: which step ends an epoch, and what its learning rate is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simclr_ray.config.experiment import ScheduleConfig
from simclr_ray.optim import COSINE, learning_rate_at

if TYPE_CHECKING:  # the loop runs where only torch is installed
    from simclr_ray.train.resolve import ResolvedExperiment


@dataclass(frozen=True)
class StepSchedule:
    """Which step is what: a pure function of the step, shared by all ranks."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float
    global_batch_size: int
    log_every: int = 10
    checkpoint_every: int = 0  # steps, besides the ends of epochs; 0: none
    config: ScheduleConfig = COSINE  # what the rate does after warm-up
    halved_at: tuple[int, ...] = ()  # steps from which on the rate is half of what it was

    def saves_within_epoch(self, done: int) -> bool:
        """Return whether a checkpoint is due after so many steps, which end no epoch."""
        every = self.checkpoint_every
        return bool(every) and done % every == 0 and done % self.steps_per_epoch != 0

    def learning_rate(self, step: int) -> float:
        """Return the rate of `step`."""
        rate = learning_rate_at(
            step,
            self.peak_learning_rate,
            self.warmup_steps,
            self.total_steps,
            self.config,
        )
        return rate * 0.5 ** sum(first <= step for first in self.halved_at)


def schedule_of(resolved: ResolvedExperiment, halved_at: tuple[int, ...] = ()) -> StepSchedule:
    """Return the arithmetic of a run; `halved_at` of the times that it was rolled back."""
    experiment = resolved.config
    return StepSchedule(
        steps_per_epoch=resolved.steps_per_epoch,
        total_steps=resolved.total_steps,
        warmup_steps=resolved.warmup_steps,
        peak_learning_rate=experiment.peak_learning_rate(),
        global_batch_size=experiment.batch_size,
        log_every=experiment.tracking.log_every_steps,
        checkpoint_every=experiment.checkpoint.every_steps,
        config=experiment.schedule,
        halved_at=halved_at,
    )
