"""How long a study will take: steps and evaluation of each kind of trial, timed before it runs.

On the cluster at hand, in the processes that would train, as many at a time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import ray
import torch
from ray.exceptions import RayError

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import local_batches
from simclr_ray.distributed.malloc import one_arena
from simclr_ray.errors import ClusterError, RunError
from simclr_ray.evaluation.cost import EvaluationSeconds, evaluation_seconds
from simclr_ray.nn.build import build_loss, build_model
from simclr_ray.studies.plan import Trial, images_of
from simclr_ray.train import loop
from simclr_ray.train.failures import cause_of, unwrap_error
from simclr_ray.train.meter import StepMeter
from simclr_ray.train.resolve import ResolvedExperiment, enter
from simclr_ray.train.worker import (
    prepare_process,
    prepare_training,
    threads_of,
)
from simclr_ray.train.worker_batches import finish_batches

STEPS: Final = (3, 50)  # least and most; the first is not counted: it decodes and allocates
STEPS_S: Final = 3.0  # for more than the least
MOST_IMAGES: Final = {"cpu": 64, "cuda": 512}  # of a step, so that all of them take seconds
AT_SIDE: Final = 224  # of so large views; of smaller ones as many more as there are fewer pixels
# Of a trial on a local disk, tracked in SQLite: its run folder, MLflow run and checkpoints. An
# estimate: 20 trials, two at a time, left 5 to 9 s that neither start nor arithmetic explain.
TRIAL_S: Final = 0.7
NEVER: Final = 10**9
FREE_S: Final = 300  # for a worker's share of the cluster to come free; the timing itself has none


class TrialSeconds(NamedTuple):
    """What one worker takes for trials of a kind."""

    image: float  # of a step: its views, forward and backward pass
    evaluation: EvaluationSeconds
    began: float  # from when its process was asked for until it ran


class Pace(NamedTuple):
    """What trials take, with so many at a time; no word between nodes.

    Attributes:
        seconds: All of them, from when the first process is asked for to the last score.
        device_seconds: Training, of all their workers.
        start: Of `seconds`, until the first trial trains.
        evaluation: Of all trials, one after the other.
    """

    seconds: float
    device_seconds: float
    start: float
    evaluation: float


def pace_of(
    trials: Sequence[Trial],
    at_a_time: int,
    cores: float = math.inf,
    protocols: Sequence[str] = (),
    *,
    baselines: bool = False,
) -> Pace:
    """Return what trials take, timing each kind of them once, in a worker's share of the cluster.

    Args:
        trials: Of a study.
        at_a_time: How many trials the cluster runs at a time; as many kinds are timed at a time.
        cores: That all workers share by time; not those of machines with a GPU.
        protocols: By which encoders are scored after training.
        baselines: Whether those of the first trial's experiment are scored besides, as one trial
            more.

    Raises:
        ClusterError: No worker's share of the cluster comes free.
        ConfigError: A model cannot be made as configured.
        DataError: The images cannot be read.
        RunError: A step fails, as for want of memory.
    """
    kinds = {kind_of(trial.experiment): trial.experiment for trial in trials}
    at_a_time = min(at_a_time, len(trials))
    of_kind: dict[str, TrialSeconds] = {}
    while len(of_kind) < len(kinds):
        wave = [kind for kind in kinds if kind not in of_kind][:at_a_time]
        # on cores that are shared, beside as many others as there will be
        beside = [] if math.isinf(cores) else (wave * at_a_time)[len(wave) : at_a_time]
        timed = _timed([kinds[kind] for kind in (*wave, *beside)], protocols)
        of_kind |= zip(wave, timed, strict=False)
    images = images_of(trials)
    seconds = [of_kind[kind_of(trial.experiment)] for trial in trials]
    device_s = [images[t.name] * s.image for t, s in zip(trials, seconds, strict=True)]
    evaluation = [_evaluation_s(t.experiment, s) for t, s in zip(trials, seconds, strict=True)]
    whole = [
        TRIAL_S + evaluated + s / t.experiment.scaling.max_workers
        for s, evaluated, t in zip(device_s, evaluation, trials, strict=True)
    ]
    if baselines:
        whole.insert(0, seconds[0].evaluation.baselines)
    busy = sum(s * threads_of(t.experiment) for s, t in zip(device_s, trials, strict=True))
    start = max(s.began + s.evaluation.read for s in of_kind.values())
    lasts = max(makespan(whole, at_a_time), busy / cores)
    return Pace(start + lasts, sum(device_s), start, sum(evaluation))


def makespan(seconds: Sequence[float], at_a_time: int) -> float:
    """Return when the last of some trials ends, each begun in turn as soon as there is room.

    Example: trials of 3, 1, 1 and 2 seconds, two at a time: the last ends after 4.
    """
    ends = [0.0] * at_a_time
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def _evaluation_s(experiment: Experiment, seconds: TrialSeconds) -> float:
    """Return what evaluation takes of a trial; several workers share it while they train."""
    every, of = experiment.evaluation.every_epochs, seconds.evaluation
    epochs = -(-experiment.epochs // every) if every else 0
    return (of.start + epochs * of.epoch) / experiment.scaling.max_workers + of.final


def _timed(experiments: Sequence[Experiment], protocols: Sequence[str]) -> list[TrialSeconds]:
    """Return what trials of some experiments take, timed side by side."""
    # Actors, which can be ended at any time: a task that is cancelled while its end is on the way
    # brings this process down (Ray 2.60).
    workers: list[Any] = []
    submitted_at = time.time()
    for experiment in experiments:
        scaling = experiment.scaling
        worker = ray.remote(
            num_cpus=scaling.cpus_per_worker,
            num_gpus=scaling.gpus_per_worker,
            runtime_env={"env_vars": one_arena()},
            max_restarts=0,
        )(_TimingWorker)
        workers.append(worker.remote())
    try:
        begun = [worker.begun.remote() for worker in workers]
        timed = [
            worker.seconds_of.remote(cfg.to_tree(experiment), protocols, submitted_at)
            for worker, experiment in zip(workers, experiments, strict=True)
        ]
        _, late = ray.wait(begun, num_returns=len(begun), timeout=FREE_S)
        if late:
            message = f"no worker's share of the cluster came free within {FREE_S} s; is it busy?"
            raise ClusterError(message)
        seconds: list[TrialSeconds] = ray.get(timed)
    except RayError as error:
        failure = RunError(f"a step could not be timed: {cause_of(error)}")
        raise unwrap_error(error) or failure from error
    finally:
        for worker in workers:
            ray.kill(worker)
    return seconds


class _TimingWorker:
    """Times one trial in a process of its own."""

    def begun(self) -> None:
        """Return as soon as there is a process."""

    def seconds_of(
        self, tree: dict[str, Any], protocols: Sequence[str], submitted_at: float
    ) -> TrialSeconds:
        """Return what the trial takes, as the function of that name."""
        return seconds_of(tree, protocols, submitted_at)


def seconds_of(tree: dict[str, Any], protocols: Sequence[str], submitted_at: float) -> TrialSeconds:
    """Return what one worker takes for an image, its views and its part of a step; and evaluation.

    With a GPU the views are made beside the step, by processes of their own, and the slower of the
    two counts; cores are shared by time.

    Args:
        tree: An experiment's.
        protocols: By which it is scored after training.
        submitted_at: When this was asked for, by the clock of `time.time`.

    Raises:
        ConfigError: The model cannot be made as configured.
        DataError: The images cannot be read.
    """
    began = max(0.0, time.time() - submitted_at)  # another node's clock may be another
    image, evaluation = enter(cfg.validate(Experiment, tree), _seconds_of, protocols)
    return TrialSeconds(image, evaluation, began)


def _seconds_of(
    resolved: ResolvedExperiment, protocols: Sequence[str]
) -> tuple[float, EvaluationSeconds]:
    whole, source = resolved.config, resolved.source
    scaling, small = whole.scaling, shortened(whole)
    device = torch.device("cuda" if scaling.gpus_per_worker else "cpu")
    prepare_process(whole, scaling.max_workers)
    model = build_model(small)
    optimizer = prepare_training(model, small, device)
    batches = _for_some_seconds(local_batches(small, source, range(STEPS[1])))
    records: list[loop.Metrics] = []
    schedule = loop.StepSchedule(NEVER, NEVER, 0, 0.0, small.batch_size, log_every=1)
    meter = StepMeter(device, schedule)
    loop.train(
        model,
        build_loss(small),
        optimizer,
        finish_batches(small, source, meter.timed(batches), device),
        schedule,
        loop.Callbacks(records.append, lambda *_: None, lambda *_: None),
        precision=small.precision,
        num_groups=min(2, whole.num_groups),
        meter=meter,
    )
    counted = records[1:]
    both_s = sum(1 / m.images_per_s for m in counted) / len(counted)
    views_s = sum(m.data_wait_fraction / m.images_per_s for m in counted) / len(counted)
    evaluation = evaluation_seconds(whole, source, model, protocols)
    if device.type == "cpu":
        return both_s, evaluation
    return max(both_s - views_s, views_s / max(1, scaling.data_actors_per_worker)), evaluation


def _for_some_seconds(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the least number of batches, and more until their time is up."""
    began = time.perf_counter()
    for at, batch in enumerate(batches):
        if at >= STEPS[0] and time.perf_counter() - began > STEPS_S:
            return
        yield batch


def shortened(experiment: Experiment) -> Experiment:
    """Return an experiment whose steps take as long for an image, and hold no more of them.

    One worker's part of a batch; of a batch in groups, two of them. Views have their full size.
    """
    scaling = experiment.scaling
    most = MOST_IMAGES["cuda" if scaling.gpus_per_worker else "cpu"]
    most = int(most * max(1.0, (AT_SIDE / experiment.augment.size) ** 2))
    size = math.ceil(experiment.batch_size / scaling.max_workers)
    if experiment.num_groups > 1:
        size = 2 * math.ceil(size / experiment.num_groups)
    changes: dict[str, Any] = {
        "batch_size": max(2, min(most, size)),
        "epochs": STEPS[1],
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
