"""How long a study will take: steps and evaluation of each kind of trial, timed before it runs.

On the cluster at hand, in the processes that would train, as many at a time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import ray
from ray.exceptions import RayError

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.distributed.malloc import one_arena
from simclr_ray.errors import ClusterError, RunError
from simclr_ray.evaluation.cost import EvaluationSeconds, evaluation_seconds
from simclr_ray.studies.plan import Trial, images_of
from simclr_ray.train.failures import cause_of, unwrap_error
from simclr_ray.train.resolve import ResolvedExperiment, enter
from simclr_ray.train.step_seconds import shortened, step_seconds
from simclr_ray.train.worker import threads_of

# Of a trial on a local disk, tracked in SQLite: its run folder, MLflow run and checkpoints. An
# estimate: 20 trials, two at a time, left 5 to 9 s that neither start nor arithmetic explain.
TRIAL_S: Final = 0.7
FREE_S: Final = 300  # for a worker's share of the cluster to come free; the timing itself has none


class TrialSeconds(NamedTuple):
    """What one worker takes for trials of a kind."""

    image: float  # of a step: its views, forward and backward pass
    decoding: float  # of all images, once for all trials of them; 0: `image` has it
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
    start = max(s.began + s.evaluation.read + s.decoding for s in of_kind.values())
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

    Args:
        tree: An experiment's.
        protocols: By which it is scored after training.
        submitted_at: When this was asked for, by the clock of `time.time`.

    Raises:
        ConfigError: The model cannot be made as configured.
        DataError: The images cannot be read.
    """
    began = max(0.0, time.time() - submitted_at)  # another node's clock may be another
    timed = enter(cfg.validate(Experiment, tree), _seconds_of, protocols)
    return timed._replace(began=began)


def _seconds_of(resolved: ResolvedExperiment, protocols: Sequence[str]) -> TrialSeconds:
    timed = step_seconds(resolved)
    evaluation = evaluation_seconds(resolved.config, resolved.source, timed.model, protocols)
    scaling = resolved.config.scaling
    image = timed.image_s(scaling)
    decoding = (timed.image_s(scaling, decodes=True) - image) * resolved.source.num_rows
    return TrialSeconds(image, decoding, evaluation, began=0.0)


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
