"""SimCLR's Algorithm 1 as a page of torch: no Ray, no MLflow.

The loop is given a stream of view pairs, a model, a loss and an optimizer, and plain functions to
call at the right times. It runs alone, under torchrun, and under Ray Train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives as dist
from simclr_ray.errors import DivergedError, RunError
from simclr_ray.nn.losses import BatchMetrics, Loss
from simclr_ray.nn.precision import Precision, as_input, autocast
from simclr_ray.optim import learning_rate_at
from simclr_ray.train.gradient_cache import grad_cache_step, group_rows

_NOT_FINITE = (
    "the loss is not finite at step {step} (mean since the last report: {mean}); "
    "lower schedule.learning_rate, or lengthen the warm-up"
)


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
    constant: bool = False  # the rate after warm-up; else a cosine to zero

    def learning_rate(self, step: int) -> float:
        """Return the rate of `step`."""
        return learning_rate_at(
            step,
            self.peak_learning_rate,
            self.warmup_steps,
            self.total_steps,
            constant=self.constant,
        )


class Metrics(NamedTuple):
    """What one report holds: means over ranks, and over the steps since the last report."""

    step: int  # steps done
    epoch: float
    loss: float  # of the last step: the paper's L over the global batch
    mean_loss: float
    learning_rate: float
    top1: float  # of picking the partner, or the class
    entropy: float  # of that choice, nats
    images_per_s: float
    data_wait_fraction: float  # of the wall time
    bad_rows: int  # ids replaced since the last report, all ranks


@dataclass(frozen=True)
class Callbacks:
    """Plain functions that the loop calls on every rank; they may be collectives."""

    report: Callable[[Metrics], None]
    epoch_end: Callable[[int, int], None]  # (epochs done, steps done)
    checkpoint: Callable[[int], None]  # (steps done), within an epoch


def train(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    stream: Iterable[Batch],
    schedule: StepSchedule,
    callbacks: Callbacks,
    *,
    precision: Precision = "float32",
    seed: int = 0,
    num_groups: int = 1,
) -> None:
    """Train until the stream ends. A collective: every rank streams the same steps.

    Args:
        model: Maps images [2n, 3, S, S] to (h, z); may be wrapped in `dist.data_parallel`.
        loss: Of z1, z2, and the labels where it takes them.
        optimizer: Over the model's parameters; its rate is set here at each step.
        stream: Batches of consecutive steps, from where the run stands.
        schedule: The run's arithmetic.
        callbacks: What to call and when.
        precision: float64, float32, or bf16 autocast around the model.
        seed: Of what the model itself draws, such as dropout.
        num_groups: Above 1, a step's images pass the model in so many groups, by gradient caching;
            batch norm's statistics are those of a group.

    Raises:
        DivergedError: The loss is not finite.
        RunError: Ranks stand at different steps.
    """
    device = next(model.parameters()).device
    meter = _Meter(device, schedule)
    model.train()
    for batch in meter.timed(stream):
        step = batch.step
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        labels = batch.labels.to(device) if batch.labels is not None else None
        project = _Projector(model, batch, device, precision, seed, num_groups, loss.one_view)
        if num_groups == 1:
            z1, z2 = project(0, slice(None))
            value = loss(z1, z2, labels)
            value.backward()
        else:
            first, _ = dist.share(schedule.global_batch_size, dist.rank(), dist.world_size())
            groups = group_rows(len(batch.a), first, num_groups)
            if labels is not None:
                labels = torch.cat([labels[rows] for rows in groups])
            value, z1, z2 = grad_cache_step(model, project, partial(loss, labels=labels), groups)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add(batch, value.detach())

        done = step + 1
        epoch_ends = done % schedule.steps_per_epoch == 0
        if done % schedule.log_every == 0 or epoch_ends:
            callbacks.report(meter.read(done, loss.metrics(z1.detach(), z2.detach(), labels)))
        if epoch_ends:
            callbacks.epoch_end(done // schedule.steps_per_epoch, done)
            model.train()
            meter.restart()
        elif schedule.checkpoint_every and done % schedule.checkpoint_every == 0:
            meter.check_finite(done)
            callbacks.checkpoint(done)
            meter.restart()


@dataclass(frozen=True)
class _Projector:
    """z1 and z2 of some rows of a batch: the same numbers each time it is asked."""

    model: nn.Module
    batch: Batch
    device: torch.device
    precision: Precision
    seed: int
    num_groups: int
    one_view: bool

    def __call__(self, group: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return z1, z2 [m, D]. Both views pass together: batch norm's statistics are joint.

        A loss of one view gets z1 twice.
        """
        # a backbone may have dropout: keyed, a resumed run and a second pass draw the same
        turn = self.batch.step * dist.world_size() + dist.rank()
        torch.manual_seed((self.seed << 32) + turn * self.num_groups + group)
        views = [self.batch.a] if self.one_view else [self.batch.a, self.batch.b]
        images = torch.cat([view[rows] for view in views])  # [2m, 3, S, S]
        with autocast(self.device, self.precision):
            _, z = self.model(as_input(images, self.device, self.precision))
        parts = z.chunk(len(views))
        return parts[0], parts[-1]


class _Meter:
    """Sums on the device between reports, so that a step never waits for the host."""

    def __init__(self, device: torch.device, schedule: StepSchedule) -> None:
        self.device, self.schedule = device, schedule
        self.restart()

    def restart(self) -> None:
        """Start a new interval: what is done between steps does not count as training time."""
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.last_loss = self.loss_sum
        self.bad_rows = 0

    def timed(self, stream: Iterable[Batch]) -> Iterable[Batch]:
        """Yield from the stream, adding up the time spent waiting for it."""
        iterator = iter(stream)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def add(self, batch: Batch, value: Tensor) -> None:
        """Count one step."""
        self.steps += 1
        self.last_loss = value.double()
        self.loss_sum = self.loss_sum + self.last_loss
        self.bad_rows += len(batch.bad)

    def check_finite(self, done: int) -> None:
        """Raise `DivergedError` on all ranks if a loss was not finite. Collective."""
        total = dist.all_reduce_sum(self.loss_sum.clone())
        if not torch.isfinite(total):
            raise DivergedError(
                _NOT_FINITE.format(step=done, mean=float(self.loss_sum) / self.steps)
            )

    def read(self, done: int, of_batch: BatchMetrics) -> Metrics:
        """Return the interval's metrics and start the next. Collective."""
        # reading the loss waits for the device: only then is the interval's work done
        mine = [float(done), float(self.last_loss), float(self.loss_sum) / self.steps]
        elapsed = time.perf_counter() - self.began
        mine += [self.waited / elapsed, float(self.bad_rows)]
        gathered = dist.all_gather_vector(
            torch.tensor(mine, dtype=torch.float64, device=self.device)
        ).cpu()  # [R, 5]
        if (gathered[:, 0] != done).any():
            raise RunError(f"ranks stand at different steps: {gathered[:, 0].int().tolist()}")
        _, last, mean, wait, _ = gathered.mean(0).tolist()
        if not torch.isfinite(gathered[:, 1:3]).all():
            raise DivergedError(_NOT_FINITE.format(step=done, mean=mean))
        images = self.steps * self.schedule.global_batch_size
        metrics = Metrics(
            step=done,
            epoch=done / self.schedule.steps_per_epoch,
            loss=last,
            mean_loss=mean,
            learning_rate=self.schedule.learning_rate(done - 1),
            top1=float(of_batch.top1),
            entropy=float(of_batch.entropy),
            images_per_s=images / elapsed,
            data_wait_fraction=wait,
            bad_rows=int(gathered[:, 4].sum()),
        )
        self.restart()
        return metrics
