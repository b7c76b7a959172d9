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

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageError
from simclr_ray.config.experiment import DataConfig, Experiment
from simclr_ray.config.wording import counted
from simclr_ray.data.decoding import evaluation_decoder
from simclr_ray.data.image_groups import open_grouped
from simclr_ray.data.sample import Sample
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.studies.advice_results import (
    SETTING,
    Finalist,
    finalists_of,
    mean_of,
    values_by_setting,
)
from simclr_ray.studies.advice_space import (
    DEFAULT,
    AdditiveFit,
    Levels,
    Setting,
    factors_of,
    finalists,
    fit_effects,
    name_of,
    tried_of,
    values_of,
)
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.plan import Trial, base_tree
from simclr_ray.studies.step_timing import TRIAL_S, Pace
from simclr_ray.studies.trials import plan

NUM_FINALISTS: Final = 2
FINAL_SEEDS: Final = 2
LONGER: Final = 2  # times as long are trials of the second study
FEWEST_STEPS: Final = 40  # of a short trial: with fewer, settings differ by how they begin
FEWEST_BATCHES: Final = 4  # in an epoch
MOST_ROWS: Final = 10_000  # unless there is time for more epochs of them than `ENOUGH_EPOCHS`
ENOUGH_EPOCHS: Final = 16
WITH_LABELS, WITHOUT = "eval/knn_top1", "eval/effective_rank"
SMALL, PHOTOS = "cifar10_laptop", "photos_cpu"  # presets
SMALL_SIDE: Final = 64  # pixels; of the median of `SIDES_OF` images of a row group
SIDES_OF: Final = 8

RunStudy = Callable[[Study], StudyFolder]


class Budget(NamedTuple):
    """How long the trials are.

    Attributes:
        rows: Images of the training set that are used, of each epoch.
        epochs: Of a short trial.
        seconds: What both studies should take.
    """

    rows: int
    epochs: int
    seconds: float


class Advice(NamedTuple):
    """What to change.

    Attributes:
        metric: By which settings were evaluated.
        rows: Images that were used.
        epochs: Of a short trial.
        fit: What each level gives, by the short trials.
        finalists: The best first.
        longer: What twice the epochs give the settings of the second study, on the mean; NaN if
            none of them was in the first.
        values: Path of the experiment -> value that is advised; empty: it is well as it is.
        cost_fraction: Of what it takes to train every setting once as long as the experiment.
    """

    metric: str
    rows: int
    epochs: int
    fit: AdditiveFit
    finalists: list[Finalist]
    longer: float
    values: dict[str, Any]
    cost_fraction: float


class Question(NamedTuple):
    """What is asked about: an experiment, and what is varied about it."""

    name: str
    base: str  # preset or YAML file
    set: dict[str, Any]  # path -> value
    experiment: Experiment
    factors: dict[str, Levels]
    metric: str
    num_rows: int


def question_of(name: str, base: str, overrides: Sequence[str]) -> Question:
    """Return what is asked about an experiment.

    Args:
        name: Of the studies, which end in -short and -long.
        base: Preset or YAML file; empty: a preset by the size of the images.
        overrides: `path=value`; `data.train` is among them unless the file names it.

    Raises:
        ConfigError: The experiment cannot be, has no such settings, or its set is too small.
        DataError: The images cannot be read.
    """
    given, issues = cfg.parse_overrides(overrides)
    if issues:
        raise ConfigError(issues)
    base = base or _usual_base(Experiment.load(SMALL, *overrides).data)
    experiment = Experiment.load(base, *overrides)
    factors = factors_of(experiment)
    data = experiment.data
    num_rows = open_grouped(data.train, data.columns, data.limit).num_pairs
    needed = FEWEST_BATCHES * experiment.batch_size
    if num_rows < needed:
        problem = (
            f"{counted(num_rows, 'image')} are too few to tell settings apart: an epoch should "
            f"hold {FEWEST_BATCHES} batches of {experiment.batch_size}, {needed:,} images; lower "
            "batch_size, or take a setting from another set"
        )
        raise ConfigError([ConfigIssue("data.train", problem)])
    metric = WITH_LABELS if _has_labels(experiment) else WITHOUT
    if metric == WITHOUT:  # distortion lowers the effective rank, whether it helps or not
        factors = {name: factors[name] for name in ("temperature", "rate")}
    return Question(name, base, dict(given), experiment, factors, metric, num_rows)


def _usual_base(data: DataConfig) -> str:
    """Return the preset for images of such a size: small encoders, since settings are compared."""
    source = Source.open(data.train, data.columns, data.limit)
    decoder = evaluation_decoder(data)
    sides = []
    for some in Sample(source):
        for encoded in filter(None, some.images[:SIDES_OF]):
            try:
                sides.append(min(decoder.decode(encoded).shape[:2]))
            except ImageError:  # `resolve` counts them
                continue
    return SMALL if not sides or statistics.median(sides) <= SMALL_SIDE else PHOTOS


def _has_labels(experiment: Experiment) -> bool:
    data = experiment.data
    splits = (data.eval_train or data.train, data.test)
    return bool(data.test) and all(Source.open(split, data.columns).has_labels for split in splits)


def short_study(question: Question, rows: int, epochs: int) -> Study:
    """Return the study of half of the settings."""
    settings = tried_of(question.factors)
    return _study(question, "short", _cases(settings, question.factors), rows, epochs, [0])


def long_study(question: Question, rows: int, epochs: int, fit: AdditiveFit) -> Study:
    """Return the study of the settings that should be best, and of the experiment as it is."""
    best = finalists(fit, question.factors, NUM_FINALISTS)
    cases = _cases(best, question.factors) | {DEFAULT: {}}
    seeds = list(range(1, 1 + FINAL_SEEDS))  # others than those by which they were chosen
    return _study(question, "long", cases, rows, LONGER * epochs, seeds)


def _cases(settings: Sequence[Setting], factors: Mapping[str, Levels]) -> dict[str, dict[str, Any]]:
    return {name_of(setting): values_of(setting, factors) for setting in settings}


def _study(
    question: Question,
    length: str,
    cases: dict[str, dict[str, Any]],
    rows: int,
    epochs: int,
    seeds: list[int],
) -> Study:
    experiment = question.experiment
    warmup = (
        {}
        if experiment.schedule.warmup_steps
        else {"schedule.warmup_epochs": min(experiment.schedule.warmup_epochs, epochs / 4)}
    )
    tree = {
        "name": f"{question.name}-{length}",
        "question": "Which settings suit these images?",
        "base": question.base,
        "set": {
            **question.set,
            "data.limit": rows,
            "epochs": epochs,
            "evaluation.every_epochs": epochs,
            "checkpoint.every_epochs": epochs,
            "checkpoint.keep": 1,
            **_one_worker(experiment),
            **warmup,
        },
        "space": {SETTING: {"cases": cases}},
        "seeds": seeds,
        "metric": question.metric,
        "protocols": [],
        "figure": {"kind": "bars", "x": SETTING},
    }
    return cfg.validate(Study, tree, "study advise")


def _one_worker(experiment: Experiment) -> dict[str, Any]:
    """Return what lets trials share processes, a core each, where there is no GPU."""
    if experiment.scaling.gpus_per_worker:
        return {}
    return {"scaling.num_workers": 1, "scaling.threads_per_worker": 1}


def budget_of(question: Question, minutes: float, at_a_time: int, pace: Pace) -> Budget:
    """Return how many images and epochs fit into some minutes.

    Args:
        question: What is asked about.
        minutes: Of both studies.
        at_a_time: Trials that the cluster runs at a time.
        pace: Of the short study with one epoch of all images, or `MOST_ROWS`.

    Raises:
        ConfigError: Not even the fewest steps of a short trial fit.
    """
    experiment = question.experiment
    num_short = len(tried_of(question.factors))
    num_long = (NUM_FINALISTS + 1) * FINAL_SEEDS
    num_trials = num_short + num_long
    rows = min(question.num_rows, MOST_ROWS)
    image_s = pace.device_seconds / (
        num_short * rows // experiment.batch_size * experiment.batch_size
    )
    beside_s = pace.evaluation / num_short + TRIAL_S
    lengths = num_short + LONGER * num_long  # all trials, in short ones
    room_s = (60 * minutes - 2 * pace.start) * at_a_time - num_trials * beside_s
    images = room_s / (lengths * image_s)  # of a short trial
    if images > ENOUGH_EPOCHS * rows:
        rows = min(question.num_rows, int(images / ENOUGH_EPOCHS))
    least = FEWEST_STEPS * experiment.batch_size
    fewest_rows = FEWEST_BATCHES * experiment.batch_size
    if images < least:
        fits = (least * lengths * image_s + num_trials * beside_s) / at_a_time + 2 * pace.start
        steps = max(0, int(images // experiment.batch_size))
        problem = (
            f"in {minutes:g} minutes a trial has {counted(steps, 'step')} of "
            f"{experiment.batch_size} images; {FEWEST_STEPS} take {math.ceil(fits / 60)} minutes"
        )
        raise ConfigError([ConfigIssue("--minutes", problem)])
    if images < 2 * rows:  # two epochs at least, of fewer images
        rows = max(fewest_rows, int(images / 2))
    epochs = max(1, int(images / rows))
    seconds = (lengths * epochs * rows * image_s + num_trials * beside_s) / at_a_time
    return Budget(rows, epochs, seconds + 2 * pace.start)


def advise(question: Question, budget: Budget, run: RunStudy) -> Advice:
    """Run both studies, or go on with them, and return what to change.

    Args:
        question: What is asked about.
        budget: As `budget_of` returns it.
        run: Runs a study to its end and returns its folder.

    Raises:
        ConfigError: Too few trials gave a result.
        Same as `studies.driver.run_study`.
    """
    short = run(short_study(question, budget.rows, budget.epochs))
    measured = {
        name: mean_of(values) for name, values in values_by_setting(short, question.metric).items()
    }
    fit = fit_effects(question.factors, measured)
    long = run(long_study(question, budget.rows, budget.epochs, fit))
    ends = finalists_of(long, question.metric, fit)
    best = ends[0]
    settings = {name_of(s): s for s in finalists(fit, question.factors, NUM_FINALISTS)}
    values = values_of(settings[best.name], question.factors) if best.name != DEFAULT else {}
    both = [end.value - measured[end.name] for end in ends if end.name in measured]
    return Advice(
        question.metric,
        budget.rows,
        budget.epochs,
        fit,
        ends,
        statistics.fmean(both) if both else math.nan,
        values,
        _cost_fraction(question, budget, len(measured)),
    )


def _cost_fraction(question: Question, budget: Budget, num_short: int) -> float:
    """Return what was trained over what every setting takes once, in images."""
    trained = budget.rows * budget.epochs * (num_short + LONGER * (NUM_FINALISTS + 1) * FINAL_SEEDS)
    settings = math.prod(len(levels) for levels in question.factors.values())
    return trained / (settings * question.num_rows * question.experiment.epochs)


def trials_of(study: Study) -> list[Trial]:
    """Return the trials of a study."""
    return plan(study, base_tree(study))
