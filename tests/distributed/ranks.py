"""What the spawned ranks run: loss, batch norm, exchanges and evaluation, on uneven shares."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.data.source import Source
from simclr_ray.distributed import collectives, shared_memory
from simclr_ray.evaluation.online import OnlineEvaluation
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import build_model
from simclr_ray.nn.losses import BatchMetrics, NTXentLoss, contrastive_metrics
from simclr_ray.train.meter import Metrics, ReportInterval, StepMeter
from simclr_ray.train.step_schedule import StepSchedule

Array = NDArray[np.float64]


class Shares(NamedTuple):
    """What one rank has to show; arrays, since tensors do not outlive their process."""

    loss: float
    z1_gradient: Array
    z2_gradient: Array
    accuracy: float
    entropy: float
    bn_output: Array
    bn_input_gradient: Array
    bn_weight_gradient: Array
    bn_running: tuple[Array, Array]


def loss_and_norm(
    rank: int, views: tuple[Array, Array], bn_case: tuple[Array, Array, Array], temperature: float
) -> Shares:
    """Return loss, metrics and batch norm of this rank's rows of the global arrays."""
    first, last = collectives.partition(len(views[0]), rank, collectives.world_size())
    z1, z2 = (torch.from_numpy(v[first:last].copy()).requires_grad_() for v in views)
    loss = NTXentLoss(temperature, global_batch_size=len(views[0]))(z1, z2)
    assert loss.equal(NTXentLoss(temperature)(z1, z2))  # which asks the ranks for their counts
    loss.backward()
    logged = contrastive_metrics(z1, z2, temperature)
    rows, upstream, gamma = (torch.from_numpy(a) for a in bn_case)
    first, last = collectives.partition(len(rows), rank, collectives.world_size())
    x = rows[first:last].clone().requires_grad_()
    norm = GlobalBatchNorm(len(gamma)).double()
    norm.weight.data.copy_(gamma)
    y = norm(x)
    y.backward(upstream[first:last])
    assert z1.grad is not None
    assert z2.grad is not None
    assert x.grad is not None
    assert norm.weight.grad is not None
    weight_gradient = collectives.all_reduce_sum(norm.weight.grad)
    return Shares(
        loss.item(),
        z1.grad.numpy().copy(),
        z2.grad.numpy().copy(),
        logged.top1.item(),
        logged.entropy.item(),
        y.detach().numpy().copy(),
        x.grad.numpy().copy(),
        weight_gradient.numpy().copy(),
        (norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()),
    )


def rank_zero_says(rank: int, numbers: list[int]) -> list[int]:
    """Return what a rank hears while rank 0 says `numbers` and the others something else."""
    signal = collectives.RankZeroSignal(timeout_s=60)
    heard = [signal.say(number if rank == 0 else 9) for number in numbers]
    signal.close()
    return heard


def small_exchanges(rank: int, *, shared: bool = True) -> list[str]:
    """Return what went wrong when small vectors of many sizes and dtypes were exchanged."""
    collectives.allow_shared_memory(allowed=shared)
    wrong = []
    rng = np.random.default_rng(rank)
    for call in range(300):
        length = 1 + (call * 37) % 700
        dtype = (torch.float32, torch.float64, torch.int64)[call % 3]
        mine = torch.arange(length).to(dtype) + 1000 * rank + call
        torch.ones(int(rng.integers(1, 300)), 300).sum()  # ranks come at different times
        everyone = collectives.all_gather_vector(mine)
        expected = [torch.arange(length).to(dtype) + 1000 * r + call for r in range(len(everyone))]
        if not torch.equal(everyone, torch.stack(expected)):
            wrong.append(f"gather {call}")
        if not torch.equal(collectives.all_reduce_sum(mine.clone()), torch.stack(expected).sum(0)):
            wrong.append(f"sum {call}")
    if list(Path(shared_memory.FOLDER).glob(f"simclr_ray-{os.getpid()}-*")):
        wrong.append("a file of this process is left behind")
    large = torch.full((20_000,), float(rank))  # 80 KB: the process group carries it
    if collectives.all_reduce_sum(large)[0] != sum(range(collectives.world_size())):
        wrong.append("large")
    if (collectives._mail.mailbox is not None) != (shared and shared_memory.is_supported()):
        wrong.append("carried by the other of the two")
    return wrong


def loss_and_norm_without_shared_memory(
    rank: int, views: tuple[Array, Array], bn_case: tuple[Array, Array, Array], temperature: float
) -> Shares:
    """Same as `loss_and_norm`, with the process group carrying everything."""
    collectives.allow_shared_memory(allowed=False)
    shares = loss_and_norm(rank, views, bn_case, temperature)
    assert collectives._mail.mailbox is None
    return shares


def ends_while_awaited(rank: int) -> str:
    """Return how rank 0 hears of a rank that ends; that rank's locks go with its file."""
    collectives.all_gather_vector(torch.zeros(1))
    mailbox = collectives._mail.mailbox  # what a killed process leaves: a closed file
    assert mailbox is not None
    if rank:
        mailbox.file.close()
        return ""
    try:
        collectives.all_gather_vector(torch.zeros(1))
    except ConnectionError as error:
        return str(error)
    return "nothing"


def lengths_differ(rank: int) -> str:
    """Return what a rank hears when ranks are at different calls."""
    try:
        collectives.all_gather_vector(torch.zeros(1 + rank))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def mean_loss_of_halves(rank: int) -> tuple[Metrics, Metrics]:
    """Return what is reported over steps that a resume lies between, and without it."""
    generator = torch.Generator().manual_seed(rank)
    losses = torch.rand(7, generator=generator, dtype=torch.float64)
    cpu, schedule = torch.device("cpu"), StepSchedule(7, 7, 0, 0.1, 6)
    ids = torch.arange(2)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    whole, first = StepMeter(cpu, schedule), StepMeter(cpu, schedule)
    meters = [whole, first]
    for step, loss in enumerate(losses):
        if step == 5:
            interval = first.interval()
            assert interval is not None
            meters[1] = StepMeter(
                cpu, schedule, ReportInterval.of(json.loads(json.dumps(interval.record)))
            )
        for meter in meters:
            meter.add(Batch(step, images, images, ids, ids[: step % 2]), loss)
    of_batch, one = BatchMetrics(torch.tensor(0.5), torch.tensor(0.1)), torch.tensor(1.0)
    reports = [meter.read(7, of_batch, one) for meter in reversed(meters)]
    resumed, expected = (m._replace(images_per_s=0.0, data_wait_fraction=0.0) for m in reports)
    return resumed, expected


def evaluate_online(rank: int, experiment: Experiment) -> tuple[dict[str, float], tuple[int, ...]]:
    """Return the scores of an untrained model, and how many images of each split this rank has."""
    data = experiment.data
    source, cpu = Source.open(data.train), torch.device("cpu")
    online = OnlineEvaluation(experiment, source, rank, collectives.world_size(), cpu)
    assert online.bank is not None
    held = tuple(len(part.images) for part in (online.probe, online.bank, online.test))
    return online(build_model(experiment).eval()), held
