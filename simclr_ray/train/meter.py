"""What a run measures of itself between two reports: losses, speed, waiting for data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.errors import DivergedError, RunError
from simclr_ray.nn.losses import BatchMetrics
from simclr_ray.train.step_schedule import StepSchedule

INTERVAL: Final = "report_interval"  # in a checkpoint's record
_GRADIENT = "the gradient is not finite at step {step}, while the loss is ({loss})"
_NOT_FINITE = "the loss is not finite at step {step} (mean since the last report: {mean})"


class Metrics(NamedTuple):
    """What one report holds: means over ranks, and over the steps since the last report."""

    step: int  # steps done
    epoch: float
    loss: float  # of the last step: the paper's L over the global batch
    mean_loss: float
    learning_rate: float
    grad_norm: float  # of all parameters, at the last step, before it is clipped
    top1: float  # of picking the partner, or the class
    entropy: float  # of that choice, nats
    images_per_s: float
    data_wait_fraction: float  # of the wall time
    bad_rows: int  # ids replaced since the last report, all ranks


class ReportInterval(NamedTuple):
    """The sums since the last report, which a checkpoint keeps: the next one is over all steps."""

    steps: int
    loss_sums: Sequence[float]  # of each rank
    bad_rows: int  # of all ranks

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ReportInterval | None:
        """Return what a checkpoint's record says; None: it came with a report, or is an old one."""
        tree = record.get(INTERVAL)
        return cls(tree["steps"], tree["loss_sums"], tree["bad_rows"]) if tree else None

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint's record says of it."""
        return {INTERVAL: self._asdict()}


class StepMeter:
    """Sums on the device between reports, so that a step never waits for the host.

    Args:
        device: Of the losses.
        schedule: The run's arithmetic.
        begun: The interval that an earlier start of the run began.
    """

    def __init__(
        self, device: torch.device, schedule: StepSchedule, begun: ReportInterval | None = None
    ) -> None:
        self.device, self.schedule = device, schedule
        self.restart()
        if begun is not None:
            self._resume(begun)

    def _resume(self, begun: ReportInterval) -> None:
        """Go on with an interval; among another number of ranks each takes the mean of theirs."""
        sums = begun.loss_sums
        is_same = len(sums) == collectives.world_size()
        own = sums[collectives.rank()] if is_same else sum(sums) / len(sums)
        self.steps = self.untimed_steps = begun.steps
        self.loss_sum = torch.tensor(own, dtype=torch.float64, device=self.device)
        self.bad_rows = 0 if collectives.rank() else begun.bad_rows

    def restart(self) -> None:
        """Start a new interval: what is done between steps does not count as training time."""
        self.began, self.waited = time.perf_counter(), 0.0
        self.steps = self.untimed_steps = 0  # untimed: an earlier start has taken them
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.last_loss = self.loss_sum
        self.bad_rows = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count what is done in the block as no training time; the interval goes on."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def timed(self, stream: Iterable[Batch]) -> Iterable[Batch]:
        """Yield from a stream of data, adding up the time spent waiting for it.

        What the worker itself does to a batch comes after it: on a GPU that waits for the step
        before, and would count as data.
        """
        iterator = iter(stream)
        while True:
            wait_began = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - wait_began
            yield batch

    def add(self, batch: Batch, value: Tensor) -> None:
        """Count one step."""
        self.steps += 1
        self.last_loss = value.double()
        self.loss_sum = self.loss_sum + self.last_loss
        self.bad_rows += len(batch.bad)

    def interval(self) -> ReportInterval | None:
        """Return the sums since the last report, or None right after it. Collective."""
        if not self.steps:
            return None
        mine = torch.tensor(
            [float(self.loss_sum), float(self.bad_rows)], dtype=torch.float64, device=self.device
        )
        loss_sums, bad_rows = collectives.all_gather_vector(mine).T.tolist()  # [R] each
        return ReportInterval(self.steps, loss_sums, int(sum(bad_rows)))

    def check_finite(self, done: int) -> None:
        """Raise `DivergedError` on all ranks if a loss was not finite. Collective."""
        total = collectives.all_reduce_sum(self.loss_sum.clone())
        if not torch.isfinite(total):
            raise DivergedError(
                _NOT_FINITE.format(step=done, mean=float(self.loss_sum) / self.steps)
            )

    def read(self, done: int, of_batch: BatchMetrics, grad_norm: Tensor) -> Metrics:
        """Return the interval's metrics and start the next. Collective.

        Args:
            done: Steps.
            of_batch: Of the last one.
            grad_norm: Of the last one, the same on all ranks.
        """
        # reading the loss waits for the device: only then is the interval's work done
        mine = [float(done), float(self.last_loss), float(self.loss_sum) / self.steps]
        elapsed = time.perf_counter() - self.began
        mine += [self.waited / elapsed, float(self.bad_rows)]
        gathered = collectives.all_gather_vector(
            torch.tensor(mine, dtype=torch.float64, device=self.device)
        ).cpu()  # [R, 5]
        if (gathered[:, 0] != done).any():
            raise RunError(f"ranks stand at different steps: {gathered[:, 0].int().tolist()}")
        _, last, mean, wait, _ = gathered.mean(0).tolist()
        if not torch.isfinite(gathered[:, 1:3]).all():
            raise DivergedError(_NOT_FINITE.format(step=done, mean=mean))
        if not math.isfinite(float(grad_norm)):
            raise DivergedError(_GRADIENT.format(step=done, loss=last))
        images = (self.steps - self.untimed_steps) * self.schedule.global_batch_size
        metrics = Metrics(
            step=done,
            epoch=done / self.schedule.steps_per_epoch,
            loss=last,
            mean_loss=mean,
            learning_rate=self.schedule.learning_rate(done - 1),
            grad_norm=float(grad_norm),
            top1=float(of_batch.top1),
            entropy=float(of_batch.entropy),
            images_per_s=images / elapsed,
            data_wait_fraction=wait,
            bad_rows=int(gathered[:, 4].sum()),
        )
        self.restart()
        return metrics
