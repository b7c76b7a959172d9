"""How long a study will take: steps of each kind of trial, timed on the cluster before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import ray
import torch

from simclr_ray import config as cfg
from simclr_ray import loop
from simclr_ray.data.maker import local_batches
from simclr_ray.data.source import Source
from simclr_ray.errors import ClusterError, RunError
from simclr_ray.experiment import Experiment
from simclr_ray.model import build_loss, build_model, build_optimizer
from simclr_ray.resolve import resolved
from simclr_ray.studies.trials import Trial
from simclr_ray.worker import labelled, our_error

STEPS: Final = 3  # the first is not counted
MOST_IMAGES: Final = {"cpu": 64, "cuda": 512}  # of a step; larger ones are not faster by much
NEVER: Final = 10**9
FREE_S: Final = 300  # for a worker's share of the cluster to come free, and its steps


class Pace(NamedTuple):
    """What trials take by themselves: without start, checkpoints and evaluation."""

    seconds: float  # of all trials, one after the other
    device_seconds: float  # of all their workers


def pace_of(trials: Sequence[Trial]) -> Pace:
    """Return what trials take, timing each kind of them once, in a worker's share of the cluster.

    Raises:
        ClusterError: No worker's share of the cluster comes free.
        ConfigError: A model cannot be made as configured.
        DataError: The pictures cannot be read.
        RunError: A step fails, as for want of memory.
    """
    known: dict[str, float] = {}
    seconds = device_s = 0.0
    for trial in trials:
        experiment, data = trial.experiment.absolute(), trial.experiment.data
        source = Source.open(data.train, data.columns, data.limit)
        kind = _kind_of(experiment)
        if kind not in known:
            known[kind] = _timed(resolved(experiment, source))
        images = experiment.total_steps(source.num_rows) * experiment.batch_size
        device_s += images * known[kind]
        seconds += images * known[kind] / experiment.scaling.num_workers
    return Pace(seconds, device_s)


def _timed(experiment: Experiment) -> float:
    scaling = experiment.scaling
    task = ray.remote(
        num_cpus=scaling.cpus_per_worker, num_gpus=scaling.gpus_per_worker, max_retries=0
    )(seconds_per_image)
    try:
        seconds: float = ray.get(task.remote(cfg.to_tree(experiment)), timeout=FREE_S)
    except ray.exceptions.GetTimeoutError:
        told = f"no worker's share of it came free in {FREE_S} s to time steps in"
        raise ClusterError(f"the cluster is busy: {told}") from None
    except ray.exceptions.RayTaskError as error:
        raise our_error(error) or RunError(f"a step of {experiment.name}: {error.cause}") from error
    return seconds


def seconds_per_image(tree: dict[str, Any]) -> float:
    """Return the seconds that one worker takes for a picture: its views, and its part of a step.

    With a GPU the views are made beside the step, by processes of their own, and the slower of the
    two counts; cores are shared by time.

    Args:
        tree: Of the experiment.
    """
    whole = cfg.validate(Experiment, tree)
    scaling = whole.scaling
    small = _small(whole)
    device = torch.device("cuda" if scaling.gpus_per_worker else "cpu")
    if scaling.threads_per_worker:
        torch.set_num_threads(scaling.threads_per_worker)
    model = build_model(small)
    loop.place(model, device, small.precision)
    source = Source.open(small.data.train, small.data.columns, small.data.limit)
    batches = local_batches(small, source, range(STEPS))
    told: list[loop.Metrics] = []
    loop.train(
        model,
        build_loss(small),
        build_optimizer(model, small.optimizer),
        labelled(small, source, batches, device),
        loop.Timetable(NEVER, NEVER, 0, 0.0, small.batch_size, log_every=1),
        loop.Hooks(told.append, lambda *_: None, lambda *_: None),
        precision=small.precision,
        num_groups=min(2, whole.num_groups),
    )
    counted = told[1:]
    both = sum(1 / m.images_per_s for m in counted) / len(counted)
    views = sum(m.data_wait_share / m.images_per_s for m in counted) / len(counted)
    if device.type == "cpu":
        return both
    return max(both - views, views / max(1, scaling.data_actors_per_worker))


def _small(experiment: Experiment) -> Experiment:
    """Return an experiment whose steps are short, and take as long for a picture."""
    scaling = experiment.scaling
    most = MOST_IMAGES["cuda" if scaling.gpus_per_worker else "cpu"]
    size = min(most, math.ceil(experiment.batch_size / scaling.num_workers))
    alone = scaling.model_copy(update={"num_workers": 1})
    return experiment.model_copy(
        update={"batch_size": max(2, size), "epochs": STEPS, "scaling": alone}
    )


def _kind_of(experiment: Experiment) -> str:
    """Return the digest of what decides a trial's speed."""
    parts = ("data", "augment", "encoder", "head", "optimizer", "scaling", "precision")
    tree = cfg.to_tree(_small(experiment))
    same = {part: tree[part] for part in (*parts, "batch_size")}
    groups = min(2, experiment.num_groups)
    return cfg.digest_of({**same, "loss": experiment.loss.name, "groups": groups})
