"""What a config means in numbers, before anything runs: `--dry-run`."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from simclr_ray.config.experiment import (
    ClassifierHeadConfig,
    CrossEntropyConfig,
    DCLConfig,
    DistillationConfig,
    Experiment,
    NTXentConfig,
    SupConConfig,
)
from simclr_ray.config.wording import counted
from simclr_ray.data.batches import build_plan
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.nn.ntxent import TILE
from simclr_ray.nn.precision import DTYPES
from simclr_ray.train.resolve import ResolvedExperiment

MIB = 2**20
SAMPLE = 4  # images in the pass that is counted; the result is per image


class StepMemory(NamedTuple):
    """Bytes that one step takes on the rank with the largest local batch."""

    weights: int  # weights, gradients and optimizer state
    activations: int  # kept for backward, both views
    loss: int  # gathered z and one tile

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.activations + self.loss


def derived(resolved: ResolvedExperiment) -> dict[str, str]:
    """Return the run's arithmetic as name -> text."""
    experiment, source = resolved.config, resolved.source
    plan = build_plan(experiment, source)
    ranks = range(experiment.scaling.num_workers)
    local = sorted({experiment.local_batch_size(r) for r in ranks}, reverse=True)
    memory = step_memory(experiment)
    total = resolved.total_steps
    warmup = resolved.warmup_steps
    rows = {
        "run": resolved.run_name,
        "images": f"{source.num_rows:,} in {counted(len(source.files), 'file')}, "
        f"{counted(len(source.row_groups), 'row group')}, {counted(plan.num_lanes, 'lane')}",
        "global batch": f"{experiment.batch_size:,} images, "
        f"{_views(experiment) * experiment.batch_size:,} views",
        **_of_the_loss(experiment),
        "local batch": " or ".join(str(n) for n in local)
        + f" images on {counted(len(ranks), 'worker')}",
        "steps": f"{plan.steps_per_epoch:,} per epoch, {total:,} in "
        f"{counted(experiment.epochs, 'epoch')}",
        "warm-up": counted(warmup, "step"),
        "peak learning rate": f"{experiment.peak_learning_rate():g} "
        f"({experiment.schedule.scaling} scaling of {experiment.schedule.learning_rate:g})",
        "parameters": f"{num_parameters(experiment) / 1e6:,.2f} M",
        "memory of a step": f"{memory.total / MIB:,.0f} MiB on the largest worker: "
        f"activations {memory.activations / MIB:,.0f}, weights {memory.weights / MIB:,.0f}, "
        f"loss {memory.loss / MIB:,.0f}",
    }
    if experiment.num_groups > 1:
        rows["gradient caching"] = (
            f"{experiment.num_groups} groups of {experiment.batch_norm.group_size:,} images "
            "a step, each passed forward twice"
        )
    cores, workers = os.cpu_count() or 1, experiment.scaling.num_workers
    if workers > cores and "RAY_ADDRESS" not in os.environ:
        rows["workers"] = (
            f"{workers} share the {counted(cores, 'core')} of this machine: slower than {cores}"
        )
    if warmup >= total:
        rows["note"] = "warm-up is as long as the run: the rate never reaches its peak"
    return rows


def num_parameters(experiment: Experiment) -> int:
    """Return the parameters of encoder and head together."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(experiment).parameters())


def step_memory(experiment: Experiment) -> StepMemory:
    """Return the memory of one training step, counted on a pass over shapes alone.

    Activations are the distinct tensors that autograd saves, which is what a step holds at its
    peak, allocator slack aside.
    """
    with torch.device("meta"):
        model = build_model(experiment).to(DTYPES[experiment.precision])
        views = _views(experiment)
        images = torch.rand(views * SAMPLE, 3, experiment.augment.size, experiment.augment.size)
        images = images.to(DTYPES[experiment.precision])
    own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that an id is not used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own and id(storage) not in saved:  # a weight's views are no copies
            saved[id(storage)] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, z = model.train()(images)
    largest = max(experiment.local_batch_size(r) for r in range(experiment.scaling.num_workers))
    n = -(-largest // experiment.num_groups)
    halved = 2 if experiment.precision == "bf16" else 1
    element = 8 if experiment.precision == "float64" else 4
    weights = (
        num_parameters(experiment) * element * (4 if experiment.optimizer.name == "adamw" else 3)
    )
    gathered = 2 * experiment.batch_size * z.shape[1] * element
    tile = min(TILE, 2 * experiment.batch_size) ** 2 * element
    return StepMemory(
        weights=weights,
        activations=sum(saved.values()) * n // SAMPLE // halved,
        loss=2 * gathered + 3 * tile,
    )


def _views(experiment: Experiment) -> int:
    """Return the views of an image that pass the model in a step."""
    return 1 if build_loss(experiment).one_view else 2


def _of_the_loss(experiment: Experiment) -> dict[str, str]:
    """Return the negatives of an anchor, and what the loss is where nothing is learned."""
    loss, others = experiment.loss, experiment.batch_size - 1
    if isinstance(loss, CrossEntropyConfig | DistillationConfig):
        assert isinstance(experiment.head, ClassifierHeadConfig)
        classes = experiment.head.num_classes
        return {"classes": f"{classes:,}", "loss without learning": _log(classes, "ln(K)")}
    one_view = getattr(loss, "negatives", "both") == "other"
    rows = {"negatives": f"{others if one_view else 2 * others:,} per anchor"}
    match loss:
        case NTXentConfig() if one_view:
            rows["loss without learning"] = _log(others + 1, "ln(N)")
        case NTXentConfig() | SupConConfig():
            rows["loss without learning"] = _log(2 * others + 1, "ln(2N-1)")
        case DCLConfig():
            rows["loss without learning"] = _log(2 * others, "ln(2N-2)")
    return rows


def _log(number: int, name: str) -> str:
    return f"{math.log(number):.4f} = {name}"
