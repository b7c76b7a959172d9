"""How long a step takes, by some steps of the experiment itself in this process; no Ray.

A step stands for the run's: its model, views, loss and optimizer, and one worker's part of the
batch, or less of it where that would take long or not fit. Where the decoded images of the set are
kept, as `data.cache_gib` has room for them, an epoch but the first decodes none: the same steps
are made a second time, of images that are kept by then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import local_builder
from simclr_ray.data.source import Source
from simclr_ray.nn.build import SimCLRModel, build_loss, build_model
from simclr_ray.train import loop
from simclr_ray.train.meter import StepMeter
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.worker import prepare_process, prepare_training
from simclr_ray.train.worker_batches import finish_batches

STEPS: Final = (3, 50)  # least and most; the first is not counted: it opens files and allocates
STEPS_S: Final = 1.5  # for more than the least; as long again for steps that do not decode
LEAST_GAIN: Final = 0.02  # of a step's time, to be worth steps that do not decode
MOST_IMAGES: Final = {"cpu": 64, "cuda": 512}  # of a step, so that all of them take seconds
AT_SIDE: Final = 224  # of so large views; of smaller ones as many more as there are fewer pixels
NEVER: Final = 10**9


class StepSeconds(NamedTuple):
    """What one worker takes for an image of a step.

    Attributes:
        model: That was trained, where it was.
        views_s: To make its views, and to decode it where that is done in each epoch.
        update_s: For all else: forward and backward pass, loss and update.
        images: Of each step that was timed.
        steps: That count.
        decode_s: To read and decode it, where that is done once; else 0.
    """

    model: SimCLRModel
    views_s: float
    update_s: float
    images: int
    steps: int
    decode_s: float = 0.0

    def image_s(self, scaling: ScalingConfig, *, decodes: bool = False) -> float:
        """Return the seconds of an image by one worker with its data actors.

        With a GPU the views are made beside the step, by processes of their own, and the slower
        of the two counts; cores are shared by time.

        Args:
            scaling: Of the worker.
            decodes: Count `decode_s`, as of the first epoch.
        """
        views_s = self.views_s + self.decode_s * decodes
        if not scaling.gpus_per_worker:
            return views_s + self.update_s
        return max(self.update_s, views_s / max(1, scaling.data_actors_per_worker))


def step_seconds(resolved: ResolvedExperiment, most: int = NEVER) -> StepSeconds:
    """Train for some seconds, and return what a worker takes.

    Args:
        resolved: The experiment; nothing is written.
        most: Images of a step at most.

    Raises:
        DataError: The images cannot be read.
        DivergedError: A loss is not finite, as in code of the user's own.
    """
    whole, source = resolved.config, resolved.source
    small = shortened(whole, most)
    device = torch.device("cuda" if whole.scaling.gpus_per_worker else "cpu")
    prepare_process(whole, whole.scaling.max_workers)
    model = build_model(small)
    optimizer = prepare_training(model, small, device)
    passes = _Passes(small, source)
    records: list[loop.Metrics] = []
    schedule = loop.StepSchedule(NEVER, NEVER, 0, 0.0, small.batch_size, log_every=1)
    meter = StepMeter(device, schedule)
    loop.train(
        model,
        build_loss(small),
        optimizer,
        finish_batches(small, source, meter.timed(iter(passes)), device),
        schedule,
        loop.Callbacks(records.append, lambda *_: None, lambda *_: None),
        precision=small.precision,
        num_groups=min(2, whole.num_groups),
        meter=meter,
    )
    first, second = records[1 : passes.num_first], records[passes.num_first + 1 :]
    counted = [*first, *second]
    update_s = _mean([(1 - m.data_wait_fraction) / m.images_per_s for m in counted])
    views_s = _mean([m.data_wait_fraction / m.images_per_s for m in second or first])
    all_views_s = _mean([m.data_wait_fraction / m.images_per_s for m in first])
    decode_s = max(0.0, all_views_s - views_s)
    return StepSeconds(model, views_s, update_s, small.batch_size, len(counted), decode_s)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


class _Passes:
    """Batches of some steps, and where it pays of the same again, whose images are kept by then.

    Attributes:
        num_first: Batches of the first pass, once that has ended.
    """

    def __init__(self, experiment: Experiment, source: Source) -> None:
        self.num_first = 0
        self._experiment, self._source = experiment, source

    def __iter__(self) -> Iterator[Batch]:
        builder = local_builder(self._experiment, self._source, STEPS[1])  # has the images
        began, making_s = time.perf_counter(), 0.0
        for step in range(STEPS[1]):
            if step >= STEPS[0] and time.perf_counter() - began > STEPS_S:
                break
            before = time.perf_counter()
            batch = builder.make(step)
            making_s += time.perf_counter() - before
            self.num_first = step + 1
            yield batch
        is_worth_it = making_s > LEAST_GAIN * (time.perf_counter() - began)
        if not (is_worth_it and builder.reader.cache.would_hold_all()):
            return
        again, began = local_builder(self._experiment, self._source, STEPS[1]), time.perf_counter()
        for step in range(self.num_first):
            if step >= STEPS[0] and time.perf_counter() - began > STEPS_S:
                return
            yield again.make(step)


def shortened(experiment: Experiment, most: int = NEVER) -> Experiment:
    """Return an experiment whose steps take as long for an image, and hold no more of them.

    One worker's part of a batch; of a batch in groups, two of them. Views have their full size.

    Args:
        experiment: The whole one.
        most: Images of a step at most.
    """
    scaling = experiment.scaling
    usual = MOST_IMAGES["cuda" if scaling.gpus_per_worker else "cpu"]
    usual = int(usual * max(1.0, (AT_SIDE / experiment.augment.size) ** 2))
    size = math.ceil(experiment.batch_size / scaling.max_workers)
    if experiment.num_groups > 1:
        size = 2 * math.ceil(size / experiment.num_groups)
    changes: dict[str, Any] = {
        "batch_size": max(2, min(usual, most, size)),
        "epochs": STEPS[1],
        "scaling": scaling.model_copy(update={"num_workers": 1}),
    }
    if isinstance(experiment.augment, SimCLRViewsConfig):
        changes["augment"] = experiment.augment.model_copy(update={"start_size": 0})
    return experiment.model_copy(update=changes)
