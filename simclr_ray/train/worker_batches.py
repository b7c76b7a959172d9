"""What is left of a batch to the worker: color and blur where its device makes them, and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from simclr_ray.augment.views import TwoViews, ViewPair
from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import build_two_views
from simclr_ray.data.source import Source
from simclr_ray.nn.build import SimCLRModel
from simclr_ray.nn.precision import as_input
from simclr_ray.nn.pretrained import load_teacher


def apply_color(views: TwoViews, batch: Batch, epoch: int, device: torch.device) -> ViewPair:
    """Return the views whose crops are in `batch`: uint8 [n, C, S, S] each, on `device`."""
    crops = torch.cat([batch.a, batch.b]).to(device)
    ids_b = None if batch.ids_b is None else batch.ids_b.numpy()
    draws = views.draw_both_views(batch.ids.numpy(), epoch, ids_b)
    return ViewPair(*views.with_size(crops.shape[-1]).distort(crops, draws).chunk(2))


def finish_batches(
    experiment: Experiment, source: Source, batches: Iterable[Batch], device: torch.device
) -> Iterable[Batch]:
    """Yield batches with what is left to the worker: color and blur, if so asked, and labels."""
    if experiment.scaling.color_augment_on == "worker":
        batches = add_color(experiment, source, batches, device)
    if experiment.distillation:
        teacher = load_teacher(experiment).to(device)
        return (batch._replace(labels=teacher_logits(teacher, batch, device)) for batch in batches)
    return add_labels(source, batches) if experiment.takes_labels else batches


def add_color(
    experiment: Experiment, source: Source, batches: Iterable[Batch], device: torch.device
) -> Iterator[Batch]:
    """Yield batches of crops with color and blur applied on `device`."""
    config = experiment.augment
    assert isinstance(config, SimCLRViewsConfig)  # checked by the config
    views = build_two_views(config, experiment.seed, experiment.data.channels)
    per_epoch = experiment.steps_per_epoch(source.num_pairs)
    for batch in batches:
        a, b = apply_color(views, batch, batch.step // per_epoch, device)
        yield batch._replace(a=a, b=b)


def add_labels(source: Source, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches with the labels that the dataset has for their ids."""
    label_of = source.label_of()
    for batch in batches:
        yield batch._replace(labels=torch.from_numpy(label_of(batch.ids.numpy())))


@torch.no_grad()
def teacher_logits(teacher: SimCLRModel, batch: Batch, device: torch.device) -> Tensor:
    """Return a teacher's class scores of both views: float32 [n, 2, K]."""
    views = (batch.a, batch.b)
    return torch.stack([teacher(as_input(v, device, "float32")).z for v in views], 1)
