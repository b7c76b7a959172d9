"""How long a study will take: steps of each kind of trial, timed on the cluster before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.data.batches import local_batches
from simclr_ray.distributed.malloc import one_arena
from simclr_ray.errors import ClusterError, RunError, last_line
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.studies.plan import Trial, images_of
from simclr_ray.train import loop
from simclr_ray.train.failures import unwrap_error
from simclr_ray.train.resolve import ResolvedExperiment, enter
from simclr_ray.train.worker import (
    prepare_process,
    prepare_training,
    threads_of,
)
from simclr_ray.train.worker_batches import finish_batches

STEPS: Final = 3  # the first is not counted: it decodes, allocates and compiles
MOST_IMAGES: Final = {"cpu": 64, "cuda": 512}  # of a step, so that all of them take seconds
NEVER: Final = 10**9
FREE_S: Final = 300  # for a worker's share of the cluster to come free, and its steps


class Pace(NamedTuple):
    """What training takes by itself: no start, checkpoint, evaluation, or word between nodes."""

    seconds: float  # of all trials, with so many at a time
    device_seconds: float  # of all their workers


def pace_of(trials: Sequence[Trial], at_a_time: int, cores: float = math.inf) -> Pace:
    """Return what trials take, timing each kind of them once, in a worker's share of the cluster.

    Args:
        trials: Of a study.
        at_a_time: How many trials the cluster runs at a time; as many kinds are timed at a time.
        cores: That all workers share by time; not those of machines with a GPU.

    Raises:
        ClusterError: No worker's share of the cluster comes free.
        ConfigError: A model cannot be made as configured.
        DataError: The images cannot be read.
        RunError: A step fails, as for want of memory.
    """
    kinds = {kind_of(trial.experiment): trial.experiment for trial in trials}
    seconds_of_kind: dict[str, float] = {}
    while len(seconds_of_kind) < len(kinds):
        wave = [kind for kind in kinds if kind not in seconds_of_kind][:at_a_time]
        seconds_of_kind |= zip(wave, _timed([kinds[kind] for kind in wave]), strict=True)
    images = images_of(trials)
    device_s = [images[t.name] * seconds_of_kind[kind_of(t.experiment)] for t in trials]
    whole = [s / t.experiment.scaling.max_workers for s, t in zip(device_s, trials, strict=True)]
    busy = sum(s * threads_of(t.experiment) for s, t in zip(device_s, trials, strict=True))
    seconds = max(max(whole), sum(whole) / min(at_a_time, len(trials)), busy / cores)
    return Pace(seconds, sum(device_s))


def _timed(experiments: Sequence[Experiment]) -> list[float]:
    """Return the seconds an image takes in each of some experiments, timed side by side."""
    refs = []
    for experiment in experiments:
        scaling = experiment.scaling
        task = ray.remote(
            num_cpus=scaling.cpus_per_worker,
            num_gpus=scaling.gpus_per_worker,
            runtime_env={"env_vars": one_arena()},
            max_retries=0,
        )(seconds_per_image)
        refs.append(task.remote(cfg.to_tree(experiment)))
    try:
        seconds: list[float] = ray.get(refs, timeout=FREE_S)
    except GetTimeoutError:
        message = (
            f"no worker's share of the cluster came free within {FREE_S} s, or no {STEPS} steps"
        )
        raise ClusterError(f"{message} fit in them; is it busy?") from None
    except RayError as error:
        reason = last_line(getattr(error, "cause", None) or error)
        raise unwrap_error(error) or RunError(f"a step could not be timed: {reason}") from error
    finally:
        _, left = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in left:  # cancelling what has just ended can bring this process down (Ray 2.60)
            ray.cancel(ref, force=True)
    return seconds


def seconds_per_image(tree: dict[str, Any]) -> float:
    """Return the seconds that one worker takes for an image: its views, and its part of a step.

    With a GPU the views are made beside the step, by processes of their own, and the slower of the
    two counts; cores are shared by time.

    Args:
        tree: An experiment's.

    Raises:
        ConfigError: The model cannot be made as configured.
        DataError: The images cannot be read.
    """
    return enter(cfg.validate(Experiment, tree), _seconds_per_image)


def _seconds_per_image(resolved: ResolvedExperiment) -> float:
    whole, source = resolved.config, resolved.source
    scaling, small = whole.scaling, shortened(whole)
    device = torch.device("cuda" if scaling.gpus_per_worker else "cpu")
    prepare_process(whole, scaling.max_workers)
    model = build_model(small)
    optimizer = prepare_training(model, small, device)
    batches = local_batches(small, source, range(STEPS))
    records: list[loop.Metrics] = []
    loop.train(
        model,
        build_loss(small),
        optimizer,
        finish_batches(small, source, batches, device),
        loop.StepSchedule(NEVER, NEVER, 0, 0.0, small.batch_size, log_every=1),
        loop.Callbacks(records.append, lambda *_: None, lambda *_: None),
        precision=small.precision,
        num_groups=min(2, whole.num_groups),
    )
    counted = records[1:]
    both_s = sum(1 / m.images_per_s for m in counted) / len(counted)
    views_s = sum(m.data_wait_fraction / m.images_per_s for m in counted) / len(counted)
    if device.type == "cpu":
        return both_s
    return max(both_s - views_s, views_s / max(1, scaling.data_actors_per_worker))


def shortened(experiment: Experiment) -> Experiment:
    """Return an experiment whose steps take as long for an image, and hold no more of them.

    One worker's part of a batch; of a batch in groups, two of them. Views have their full size.
    """
    scaling = experiment.scaling
    most = MOST_IMAGES["cuda" if scaling.gpus_per_worker else "cpu"]
    size = math.ceil(experiment.batch_size / scaling.max_workers)
    if experiment.num_groups > 1:
        size = 2 * math.ceil(size / experiment.num_groups)
    changes: dict[str, Any] = {
        "batch_size": max(2, min(most, size)),
        "epochs": STEPS,
        "scaling": scaling.model_copy(update={"num_workers": 1}),
    }
    if isinstance(experiment.augment, SimCLRViewsConfig):
        changes["augment"] = experiment.augment.model_copy(update={"start_size": 0})
    return experiment.model_copy(update=changes)


def kind_of(experiment: Experiment) -> str:
    """Return the digest of what decides a trial's speed: trials of one kind are timed once."""
    tree = cfg.to_tree(shortened(experiment))
    same = {part: tree[part] for part in ("data", "encoder", "head", "scaling", "precision")}
    loss, augment = tree["loss"], tree["augment"]
    if isinstance(experiment.augment, SimCLRViewsConfig):  # what is drawn more often takes longer
        views = {"size": augment["size"], "blurs": augment["blur"] > 0}
    else:
        lists = ("shared", "a", "b")
        views = {k: [s["name"] for s in augment[k] or []] for k in lists}
        views["size"] = augment["size"]
    costs = {
        "batch_size": tree["batch_size"],
        "groups": min(2, experiment.num_groups),
        "optimizer": tree["optimizer"]["name"],
        "loss": {key: loss[key] for key in ("name", "views", "teacher") if key in loss},
    }
    return cfg.digest_of({**same, **costs, "augment": views})
