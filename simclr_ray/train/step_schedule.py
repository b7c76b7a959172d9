"""The arithmetic of a run: which step ends an epoch, and what its learning rate is."""

from __future__ import annotations

from dataclasses import dataclass

from simclr_ray.config.experiment import ScheduleConfig
from simclr_ray.optim import COSINE, learning_rate_at


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

    def saves_within_epoch(self, done: int) -> bool:
        """Return whether a checkpoint is due after so many steps, which end no epoch."""
        every = self.checkpoint_every
        return bool(every) and done % every == 0 and done % self.steps_per_epoch != 0

    def learning_rate(self, step: int) -> float:
        """Return the rate of `step`."""
        return learning_rate_at(
            step,
            self.peak_learning_rate,
            self.warmup_steps,
            self.total_steps,
            self.config,
        )
