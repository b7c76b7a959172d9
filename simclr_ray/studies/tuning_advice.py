"""What to change about an experiment for some images: short trials, fewer longer ones, a table.

Two studies like any other, so that both can be looked at, stopped and gone on with. The first
trains half of all settings for a short time with one seed and reads off what each level of each
factor gives (`studies.advice_space`); the second trains the settings that should be best, and the
experiment as it is, twice as long with two seeds. The time is shared out before anything runs.

Where images have labels, trials are evaluated by the kNN of their last epoch, from 5,000 images at
most. Without, by the effective rank of h, which says that an encoder has not collapsed and little
more: views that distort less may have a higher one, so they are left as they are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder, ImageError
from simclr_ray.config.experiment import DataConfig, Experiment
from simclr_ray.config.wording import counted
from simclr_ray.data.sample import Sample
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, RunError
from simclr_ray.studies.advice_results import (
    SETTING,
    Finalist,
    ensure_none_failed,
    finalists_of,
    images_trained,
    values_by_setting,
)
from simclr_ray.studies.advice_space import (
    DEFAULT,
    AdditiveFit,
    Levels,
    Setting,
    factors_of,
    fit_effects,
    name_of,
    predicted_best,
    settings_of,
    tried_of,
    values_of,
)
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.plan import Trial, base_tree, study_folder
from simclr_ray.studies.step_timing import TRIAL_S, makespan
from simclr_ray.studies.time_forecast import TimeForecast, forecast_time
from simclr_ray.studies.trials import plan

NUM_FINALISTS: Final = 2
FINAL_SEEDS: Final = (1, 2)  # others than the one by which they were chosen
EPOCH_FACTOR: Final = 2  # times as long are trials of the second study
FEWEST_STEPS: Final = 40  # of a short trial: with fewer, settings differ by how they begin
FEWEST_BATCHES: Final = 4  # in an epoch
MOST_ROWS: Final = 10_000  # unless there is time for more epochs of them than `ENOUGH_EPOCHS`
ENOUGH_EPOCHS: Final = 16
LABELLED_METRIC, LABEL_FREE_METRIC = "eval/knn_top1", "eval/effective_rank"
SMALL, PHOTOS = "cifar10_laptop", "photos_cpu"  # presets
SMALL_SIDE: Final = 64  # pixels; of the median of `SIDES_OF` images of a row group
SIDES_OF: Final = 8

RunStudy = Callable[[Study], StudyFolder]


class AdviceTask(NamedTuple):
    """An experiment on some images, and what is varied about it.

    Attributes:
        name: Of the studies, which end in -short and -long.
        base: Preset or YAML file.
        values: Path -> value, for all trials.
        experiment: What both make.
        factors: As `factors_of` returns them.
        metric: By which trials are evaluated.
        note: Why they are not evaluated by labels; empty: they are.
        num_rows: Images of the training set.
    """

    name: str
    base: str
    values: dict[str, Any]
    experiment: Experiment
    factors: dict[str, Levels]
    metric: str
    note: str
    num_rows: int


class TrialLengths(NamedTuple):
    """How long trials are.

    Attributes:
        rows: Images of the training set that are used, in each epoch.
        epochs: Of a short trial.
        seconds: What both studies should take; NaN where they were begun earlier.
    """

    rows: int
    epochs: int
    seconds: float


class Advice(NamedTuple):
    """What to change.

    Attributes:
        metric: By which settings were evaluated.
        rows: Images that were used.
        fit: What each level gives, by the short trials.
        finalists: The best first.
        gain_of_longer: What twice the epochs give the settings of the second study, on the mean,
            by other seeds; low, since those settings were chosen by what the first one read. NaN
            if none of them was in it.
        values: Path of the experiment -> value that is advised; empty: it is well as it is.
        cost_fraction: Of what it takes to train every setting once as long as the experiment.
    """

    metric: str
    rows: int
    fit: AdditiveFit
    finalists: list[Finalist]
    gain_of_longer: float
    values: dict[str, Any]
    cost_fraction: float


def advice_task(name: str, base: str, overrides: Sequence[str]) -> AdviceTask:
    """Return what advice is wanted on.

    Args:
        name: Of the studies, which end in -short and -long.
        base: Preset or YAML file; empty: a preset by the size of the images.
        overrides: `path=value`; `data.train` is among them unless the file names it.

    Raises:
        ConfigError: The experiment cannot be, has no such settings or no number of workers, or its
            set is too small.
        DataError: The images cannot be read.
    """
    values, issues = cfg.parse_overrides(overrides)
    if issues:
        raise ConfigError(issues)
    base = base or _usual_base(Experiment.load(SMALL, *overrides).data)
    experiment = Experiment.load(base, *overrides).check_num_workers()
    factors, data = factors_of(experiment), experiment.data
    if data.columns.group:
        problem = "pairs of a group's images are not varied by the views of one: leave it empty"
        raise ConfigError.of("data.columns.group", problem)
    num_rows = Source.open(data.train, data.columns, data.limit).num_rows
    needed = FEWEST_BATCHES * experiment.batch_size
    if num_rows < needed:
        problem = (
            f"{counted(num_rows, 'image')} are too few to tell settings apart: an epoch should "
            f"hold {FEWEST_BATCHES} batches of {experiment.batch_size}, {needed:,} images; lower "
            "batch_size, or take a setting from another set"
        )
        raise ConfigError.of("data.train", problem)
    note = _unlabelled(data)
    metric = LABEL_FREE_METRIC if note else LABELLED_METRIC
    if note:  # distortion lowers the effective rank, whether it helps or not
        factors = {factor: factors[factor] for factor in ("temperature", "rate")}
    return AdviceTask(name, base, dict(values), experiment, factors, metric, note, num_rows)


def _usual_base(data: DataConfig) -> str:
    """Return the preset for images of such a size: small encoders, since settings are compared."""
    decoder = ImageDecoder(max_pixels=data.max_pixels, channels=data.channels)
    sides = []
    for some in Sample(Source.open(data.train, data.columns, data.limit)):
        for encoded in filter(None, some.images[:SIDES_OF]):
            try:
                sides.append(min(decoder.decode(encoded).shape[:2]))
            except ImageError:  # `resolve` counts them
                continue
    return SMALL if not sides or statistics.median(sides) <= SMALL_SIDE else PHOTOS


def _unlabelled(data: DataConfig) -> str:
    """Return which split lacks the labels by which trials would be evaluated; empty: none."""
    if not data.test:
        return "there are no labelled test images (--test)"
    for key, uri in (("data.eval_train", data.eval_train or data.train), ("data.test", data.test)):
        if not Source.open(uri, data.columns).has_labels:
            labelled = "; data.eval_train names labelled images" if "eval" in key else ""
            return f"{uri} ({key}) has no labels{labelled}"
    return ""


def short_study(task: AdviceTask, rows: int, epochs: int) -> Study:
    """Return the study of half of the settings."""
    return _study(task, "short", _cases(tried_of(task.factors), task.factors), rows, epochs, [0])


def long_study(task: AdviceTask, rows: int, epochs: int, fit: AdditiveFit) -> Study:
    """Return the study of the settings that should be best, and of the experiment as it is."""
    best = predicted_best(fit, task.factors, NUM_FINALISTS)
    cases = {DEFAULT: {}, **_cases(best, task.factors)}
    return _study(task, "long", cases, rows, EPOCH_FACTOR * epochs, list(FINAL_SEEDS))


def _cases(settings: Sequence[Setting], factors: Mapping[str, Levels]) -> dict[str, dict[str, Any]]:
    return {name_of(setting): values_of(setting, factors) for setting in settings}


def _study(
    task: AdviceTask,
    length: str,
    cases: dict[str, dict[str, Any]],
    rows: int,
    epochs: int,
    seeds: list[int],
) -> Study:
    experiment = task.experiment
    tree = {
        "name": f"{task.name}-{length}",
        "question": "Which settings suit these images?",
        "base": task.base,
        "set": {
            **task.values,
            "data.limit": rows,
            "epochs": epochs,
            "evaluation.every_epochs": epochs,
            "checkpoint.every_epochs": epochs,
            "checkpoint.keep": 1,
            **_warmup(experiment, rows, epochs),
            **_one_worker(experiment),
        },
        "space": {SETTING: {"cases": cases}},
        "seeds": seeds,
        "metric": task.metric,
        "protocols": [],
        "figure": {"kind": "bars", "x": SETTING},
    }
    return cfg.validate(Study, tree, "study advise")


def _warmup(experiment: Experiment, rows: int, epochs: int) -> dict[str, Any]:
    """Return a warm-up of a quarter of a trial at most: beyond it the rate is what is compared."""
    schedule = experiment.schedule
    if schedule.warmup_steps:
        steps = epochs * (rows // experiment.batch_size)
        return {"schedule.warmup_steps": min(schedule.warmup_steps, max(1, steps // 4))}
    return {"schedule.warmup_epochs": min(schedule.warmup_epochs, epochs / 4)}


def _one_worker(experiment: Experiment) -> dict[str, Any]:
    """Return what lets trials share processes, a core each, where there is no GPU."""
    if on_gpus(experiment):
        return {}
    return {"scaling.num_workers": 1, "scaling.threads_per_worker": 1}


def on_gpus(experiment: Experiment) -> bool:
    """Return whether trials run on GPUs, each with its workers in processes of their own."""
    return experiment.scaling.gpus_per_worker > 0


def begun_lengths(task: AdviceTask) -> TrialLengths | None:
    """Return the lengths with which the studies of this name were begun; None: they were not."""
    folder = StudyFolder(*study_folder(short_study(task, task.num_rows, 1)))
    if not folder.state():
        return None
    _, tree = folder.definition()
    return TrialLengths(tree["data"]["limit"], tree["epochs"], math.nan)


def timed_lengths(task: AdviceTask, minutes: float) -> TrialLengths:
    """Return how long trials may be, by steps that are timed on the cluster at hand.

    Raises:
        ConfigError: The minutes are too few.
        SimclrRayError: What `time_forecast.forecast_time` raises.
    """
    study = short_study(task, _timed_rows(task), 1)
    return lengths_within(task, minutes, forecast_time(study, trials_of(study)))


def _timed_rows(task: AdviceTask) -> int:
    return min(task.num_rows, max(MOST_ROWS, FEWEST_BATCHES * task.experiment.batch_size))


def lengths_within(task: AdviceTask, minutes: float, timed: TimeForecast) -> TrialLengths:
    """Return how many images and epochs fit into some minutes.

    Args:
        task: What advice is wanted on.
        minutes: Of both studies, and of the timing.
        timed: Of the short study with one epoch of all images, or of `_timed_rows`.

    Raises:
        ConfigError: Not even the fewest steps of a short trial fit.
    """
    batch, num_short = task.experiment.batch_size, len(tried_of(task.factors))
    num_long = (NUM_FINALISTS + 1) * len(FINAL_SEEDS)
    pace, at_a_time = timed.pace, timed.at_a_time
    in_turn = makespan([1.0] * num_short, at_a_time), makespan([1.0] * num_long, at_a_time)
    steps_in_turn = in_turn[0] + EPOCH_FACTOR * in_turn[1]  # of short trials
    timed_steps = _timed_rows(task) // batch  # of an epoch
    workers = task.experiment.scaling.max_workers if on_gpus(task.experiment) else 1
    step_s = pace.device_seconds / workers / (num_short * timed_steps)
    process_s = pace.start - timed.started_s  # of each study, the cluster being there
    trial_s = pace.evaluation / num_short + TRIAL_S
    starts_s = 2 * process_s
    if on_gpus(task.experiment):  # trials share no process: each has a start of its own
        starts_s, trial_s = 0.0, trial_s + process_s
    fixed_s = timed.seconds_spent + starts_s + sum(in_turn) * trial_s
    steps = math.floor((60 * minutes - fixed_s) / (steps_in_turn * step_s))
    if steps < FEWEST_STEPS:
        least = math.ceil((fixed_s + FEWEST_STEPS * steps_in_turn * step_s) / 60)
        problem = (
            f"in {minutes:g} minutes a trial has {counted(max(0, steps), 'step')} of {batch} "
            f"images; {FEWEST_STEPS} take {least} minutes"
        )
        raise ConfigError.of("--minutes", problem)
    most = task.num_rows // batch  # steps of an epoch
    if steps <= ENOUGH_EPOCHS * timed_steps:
        most = min(most, timed_steps)
    # two epochs at least: whole ones, or one more of fewer images, whichever fills the time better
    whole, more = max(2, steps // most), max(2, math.ceil(steps / most))
    choices = [(whole, min(most, steps // whole)), (more, steps // more)]
    epochs, per_epoch = max(choices, key=math.prod)
    seconds = fixed_s + steps_in_turn * epochs * per_epoch * step_s
    return TrialLengths(per_epoch * batch, epochs, seconds)


def ensure_classes(task: AdviceTask, rows: int) -> None:
    """Raise `ConfigError` where the first images, which are used, lack classes of the others."""
    data = task.experiment.data
    source = Source.open(data.train, data.columns, data.limit)
    if rows >= source.num_rows or not source.has_labels:
        return
    labels = source.labels()
    seen, there = (len(np.unique(part[part >= 0])) for part in (labels[:rows], labels))
    if seen < 0.9 * there:
        problem = (
            f"the first {rows:,} of {source.num_rows:,} images hold {seen} of "
            f"{counted(there, 'class', 'classes')}: they are in the order of their classes; "
            "`simclr-ray prepare` writes them in mixed order"
        )
        raise ConfigError.of("data.train", problem)


def advise(task: AdviceTask, lengths: TrialLengths, run: RunStudy) -> Advice:
    """Run both studies, or go on with them, and return what to change.

    Args:
        task: What advice is wanted on.
        lengths: As `timed_lengths` or `begun_lengths` returns them.
        run: Runs a study to its end and returns its folder.

    Raises:
        ConfigError: Too few trials gave a result.
        RunError: A trial failed, or the experiment as it is gave no result.
        SimclrRayError: What `run` raises.
    """
    short = run(short_study(task, lengths.rows, lengths.epochs))
    ensure_none_failed(short)
    means = {
        name: statistics.fmean(values.values())
        for name, values in values_by_setting(short, task.metric).items()
    }
    if not means:
        raise RunError(f"no trial of {short.uri} gave a result: all of them collapsed")
    # what collapsed is as bad as the worst: left out, its levels would be read off the others
    worst = min(means.values())
    names = [name_of(setting) for setting in tried_of(task.factors)]
    fit = fit_effects(task.factors, {name: means.get(name, worst) for name in names})
    long = run(long_study(task, lengths.rows, lengths.epochs, fit))
    ensure_none_failed(long)
    ends = finalists_of(long, task.metric, fit)
    best = ends[0].name
    settings = {name_of(setting): setting for setting in settings_of(task.factors)}
    both = [end.value - means[end.name] for end in ends if end.name in means]
    whole = len(settings) * task.num_rows * task.experiment.epochs
    return Advice(
        task.metric,
        lengths.rows,
        fit,
        ends,
        statistics.fmean(both) if both else math.nan,
        {} if best == DEFAULT else values_of(settings[best], task.factors),
        (images_trained(short) + images_trained(long)) / whole,
    )


def trials_of(study: Study) -> list[Trial]:
    """Return the trials of a study."""
    return plan(study, base_tree(study))
