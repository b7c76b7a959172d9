"""SimCLR's Algorithm 1 (Chen et al. 2020, arXiv:2002.05709) in torch: no Ray, no MLflow.

The paper's lines, and beside each where it is done. N images in the global batch, n of them on this
rank; views 2k-1 and 2k are those of image k; h has F numbers, z has D.

input: N, tau, f, g, T                        `batch_size`, `loss.temperature`, `encoder`, `head`,
                                              `augment` of the config (config.experiment)
for sampled minibatch {x_k}, k = 1..N:        `stream`: data.plan says which images, data.batches
    for all k in 1..N:                        makes their views, data.stream brings them
        draw t, t' from T                     augment.views.TwoViews, or augment.pipeline
        first view:  x~_2k-1 = t(x_k)         `batch.a`: one row for each of this rank's images
        second view: x~_2k   = t'(x_k)        `batch.b`: likewise (color perhaps: train.worker)
        representation: h = f(x~)             `forward_views`: f is model.encoder, g is model.head
        projection:     z = g(h)              (nn.build); z1 is of view a and z2 of view b, in
                                              the batch's order or, with caching, the groups'
    for all i, j in 1..2N:                    `loss`, here nn.losses.NTXentLoss, whose arithmetic
        s_ij = z_i.z_j / (|z_i| |z_j|)        is in nn.ntxent (there s is s_ij/tau); it gathers z
                                              of all ranks; other losses have other terms
    l(i,j) = -log( exp(s_ij/tau) / sum_{m=1..2N, m!=i} exp(s_im/tau) )
    L = 1/(2N) sum_{k=1..N} [ l(2k-1,2k) + l(2k,2k-1) ]
    update f and g to minimise L              `plain_step` or `cached_step`: the gradient, which DDP
                                              (collectives.data_parallel) averages over ranks within
                                              the backward pass; `optimizer.step` at the rate of
                                              `schedule` (optim.learning_rate_at); momentum and
                                              LARS's ratios are the optimizer's (optim)
return f, throw g away                        inference.embed.load_encoder, from a checkpoint

Not in Algorithm 1, and marked where they come: gradient caching, clipping, bf16, reports,
evaluation and checkpoints. The loop is given all of this and plain functions to call at the right
times. It runs alone, under torchrun (benchmarks/step.py), and under Ray Train (train.worker).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.nn.batchnorm import frozen_statistics
from simclr_ray.nn.losses import Loss
from simclr_ray.nn.precision import Precision, as_input, autocast
from simclr_ray.nn.stochastic import DropoutKeys, KeyedLayer, draw_for, keyed_layers
from simclr_ray.optim import clip_gradients
from simclr_ray.train.gradient_cache import averaging_over_ranks, group_rows
from simclr_ray.train.meter import Metrics, StepMeter
from simclr_ray.train.step_schedule import StepSchedule

__all__ = [
    "Callbacks",
    "Metrics",
    "StepOutput",
    "StepSchedule",
    "cached_step",
    "plain_step",
    "train",
]

Forward = Callable[[int, slice], tuple[Tensor, Tensor]]  # group number, rows -> z1, z2 [m, D]
LossOfViews = Callable[[Tensor, Tensor], Tensor]  # z1, z2 -> scalar


Request = Literal["", "stop"]


@dataclass(frozen=True)
class Callbacks:
    """Plain functions that the loop calls on every rank; they may be collectives."""

    report: Callable[[Metrics], None]
    epoch_end: Callable[[int, int], None]  # evaluate and save: (epochs done, steps done)
    checkpoint: Callable[[int], None]  # (steps done), within an epoch
    request: Callable[[], Request] = lambda: ""  # after each step: to save and end


class StepOutput(NamedTuple):
    """What one step leaves besides the parameters' gradients; nothing of it has a graph."""

    loss: Tensor  # scalar; its mean over ranks is L (the contract is in `nn.losses`)
    z1: Tensor  # [n, D], of view a
    z2: Tensor  # [n, D], of view b, row by row the same images; z1 again for a loss of one view


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
    clip_norm: float = 0.0,
    meter: StepMeter | None = None,
) -> None:
    """Train until the stream ends. A collective: every rank streams the same steps.

    Args:
        model: Maps images [m, 3, S, S] to (h, z); with several ranks wrapped in
            `collectives.data_parallel`, which averages their gradients.
        loss: Of z1, z2, and the labels where it takes them.
        optimizer: Over the model's parameters; its rate is set here at each step.
        stream: Batches of consecutive steps, from where the run stands; what of it waits for
            data is in `meter.timed`.
        schedule: The run's arithmetic.
        callbacks: What to call and when.
        precision: float64, float32, or bf16 autocast around the model.
        seed: Of what the model itself draws, such as dropout: by (seed, step, id, view, layer).
        num_groups: Above 1: gradient caching in so many groups, batch norm's statistics of each.
        clip_norm: Longest gradient that is stepped by, of all parameters as one vector; 0: any.
        meter: Of this start; its caller keeps what it has summed in checkpoints.

    It ends with the stream, or where it is asked to stop, after a checkpoint of its last step.

    Raises:
        DivergedError: The loss was not finite; looked at when metrics or a checkpoint are due, so
            the weights have moved since.
        RunError: Ranks stand at different steps; looked at when metrics are due.
    """
    meter = meter or StepMeter(next(model.parameters()).device, schedule)
    # where this rank's images lie in the global batch, over whose places the groups are spread
    rank, num_ranks = collectives.rank(), collectives.world_size()
    first, last = collectives.partition(schedule.global_batch_size, rank, num_ranks)
    groups = group_rows(last - first, first, num_groups)
    layers = keyed_layers(model)
    model.train()
    for batch in stream:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(batch.step)  # warm-up, then decay
        labels = batch.labels.to(meter.device) if batch.labels is not None else None
        forward = partial(
            forward_views, model, batch,
            one_view=loss.one_view, precision=precision, seed=seed, num_groups=num_groups,
            layers=layers,
        )  # fmt: skip
        if num_groups == 1:
            output = plain_step(forward, partial(loss, labels=labels))
        else:
            if labels is not None:
                labels = torch.cat([labels[rows] for rows in groups])
            output = cached_step(model, forward, partial(loss, labels=labels), groups)
        done = batch.step + 1
        epoch_ends = done % schedule.steps_per_epoch == 0
        is_due = done % schedule.log_every == 0 or epoch_ends
        grad_norm = clip_gradients(model, clip_norm) if clip_norm or is_due else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add(batch, output.loss)

        # once in a while a report, which stops the run if a loss was not finite or ranks disagree
        if grad_norm is not None and is_due:
            metrics = loss.metrics(output.z1, output.z2, labels)
            callbacks.report(meter.read(done, metrics, grad_norm))
        if epoch_ends:
            callbacks.epoch_end(done // schedule.steps_per_epoch, done)
            model.train()  # evaluation has left it in eval mode
            meter.restart()  # that was no training time
        request = callbacks.request()  # made elsewhere: by a signal, or for a node that goes
        if schedule.saves_within_epoch(done) or (request and done < schedule.total_steps):
            meter.check_finite(done)
            with meter.paused():
                callbacks.checkpoint(done)
        if request:
            break
    draw_for(layers, None)


def plain_step(forward: Forward, loss: LossOfViews) -> StepOutput:
    """Add the gradient of one batch, with all its activations kept. Collective."""
    z1, z2 = forward(0, slice(None))  # one group, all rows: [n, D] each
    value = loss(z1, z2)  # a contrastive loss gathers z of all ranks
    value.backward()  # type: ignore[no-untyped-call] # DDP averages over ranks in here
    return StepOutput(value.detach(), z1.detach(), z2.detach())


def cached_step(
    model: nn.Module, forward: Forward, loss: LossOfViews, groups: list[slice]
) -> StepOutput:
    """Add the gradient of one batch, with the activations of one group at a time. Collective.

    Gradient caching (Gao et al. 2021, arXiv:2101.06983): every group passes once without a graph,
    the loss is taken over all of the global batch and gives the gradient to each z, and every
    group passes again, with a graph, to take its part of it. So this is no gradient accumulation:
    negatives are those of the whole batch. It costs a second forward pass. Batch norm's running
    statistics move in the first pass alone.

    Args:
        model: Whose parameters `forward` uses; with several ranks in `collectives.data_parallel`.
        forward: Must draw the same numbers when it is called again.
        loss: Of z1, z2 in the order of the groups.
        groups: Rows of this rank's batch, group by group.
    """
    with torch.no_grad():
        parts = [forward(g, rows) for g, rows in enumerate(groups)]
    z1, z2 = (torch.cat(z).requires_grad_() for z in zip(*parts, strict=True))  # [n, D] each
    value = loss(z1, z2)
    value.backward()  # type: ignore[no-untyped-call] # to z1 and z2: no parameter is reached yet
    sizes = [len(z) for z, _ in parts]
    # a loss of one view leaves the other without a gradient
    gradients = (torch.zeros_like(z) if z.grad is None else z.grad for z in (z1, z2))
    upstream = list(zip(*(torch.split(g, sizes) for g in gradients), strict=True))
    del parts
    with frozen_statistics(model):
        for g, rows in enumerate(groups):
            with averaging_over_ranks(model, enabled=g == len(groups) - 1):
                torch.autograd.backward(forward(g, rows), upstream[g])
    return StepOutput(value.detach(), z1.detach(), z2.detach())


def forward_views(
    model: nn.Module,
    batch: Batch,
    group: int,
    rows: slice,
    *,
    one_view: bool,
    precision: Precision,
    seed: int,
    num_groups: int,
    layers: Sequence[KeyedLayer],
) -> tuple[Tensor, Tensor]:
    """Return z1, z2 [m, D] of some rows of a batch: the same numbers each time it is called.

    Both views pass together, so that batch norm's statistics are joint. A loss of one view gets z1
    twice.

    Args:
        model: Maps images to (h, z).
        batch: This rank's part of the global batch.
        group: Number of the group that the rows are.
        rows: Of the batch.
        one_view: View b is not looked at.
        precision: Same as `train`.
        seed: Same as `train`.
        num_groups: Same as `train`.
        layers: Of the model, those that draw by image.
    """
    views = [batch.a] if one_view else [batch.a, batch.b]
    images = torch.cat([view[rows] for view in views])  # uint8 [2m, 3, S, S]
    device = next(model.parameters()).device
    if layers:
        ids = batch.ids[rows].to(device, non_blocking=True)
        draw_for(layers, DropoutKeys.of_views(seed, batch.step, ids, len(views)))
    # whatever else a model draws is the same in a second pass, and in a resumed run of as many
    # ranks and groups
    turn = batch.step * collectives.world_size() + collectives.rank()
    torch.manual_seed((seed << 32) + turn * num_groups + group)
    with autocast(device, precision):  # bf16 has float32's range, so no loss is scaled
        _h, z = model(as_input(images, device, precision))  # h = f(x~) [2m, F], z = g(h) [2m, D]
    parts = z.chunk(len(views))
    return parts[0], parts[-1]
