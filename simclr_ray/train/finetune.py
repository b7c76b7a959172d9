"""Fine-tuning with a share of the labels (SimCLR §B.5), and distillation: other settings.

A fine-tuning is a run of its own, by Ray Train like any other, that starts from a run's encoder and
classifies: Nesterov SGD, rate 0.05·B/256, no warm-up, no decay, crop and flip alone, 60 epochs of
1 % of the labels and 30 of more. In MLflow it lies under the run whose encoder it evaluates.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import permit_code
from simclr_ray.data.source import Source
from simclr_ray.data.subset import write_subset
from simclr_ray.errors import ConfigError, ConfigIssue, DataError, TrackingError
from simclr_ray.evaluation.classification import Classification
from simclr_ray.evaluation.evaluate import score_classifier
from simclr_ray.nn.pretrained import experiment_of
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import BAD_ROWS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import CLASSIFIER_SCORES
from simclr_ray.tracking.runs import MetricPoint, TrackedRun
from simclr_ray.train import driver
from simclr_ray.train.outcome import Run
from simclr_ray.train.recorder import OnProgress
from simclr_ray.train.resolve import ResolvedExperiment, enter, resolve_init
from simclr_ray.train.tracked import late_writes

log = logging.getLogger(__name__)

FEW_LABELS, EPOCHS_OF_FEW, EPOCHS = 0.01, 60, 30


class Planned(NamedTuple):
    """What is to be trained, and the record of the run that it is of."""

    experiment: ResolvedExperiment
    parent: RunRecord


class FineTuned(NamedTuple):
    """A finished fine-tuning or distillation."""

    run: Run
    scores: Classification | None  # of the test split, where there is one
    num_images: int  # that it was trained on, without those that could not be used


def plan_finetuning(
    run: str,
    label_fraction: float | None,
    *overrides: str,
    per_class: int = 0,
    frozen: bool = False,
    from_random: bool = False,
) -> Planned:
    """Return the experiment of a fine-tuning, its rows written; nothing has started.

    The batch is the run's, or as many rows as there are; with gradient caching whole groups.
    Without `data.test` the classifier is tested on labelled rows that were not chosen, at most
    10,000 (`data.subset.MOST_TEST_ROWS`).

    Args:
        run: Folder or URI of a pretraining run, whose newest checkpoint is taken.
        label_fraction: Of the labelled rows of `data.train`, class-balanced, in (0, 1]; None with
            `per_class`.
        overrides: Of the fine-tuning's config.
        per_class: Labelled rows of each class, without a fraction; 0: by `label_fraction`.
        frozen: Leave the encoder as it is, and fit a classifier on its features.
        from_random: Start from random weights instead, for comparison.

    Raises:
        ConfigError: `run` is no run folder, or the fraction or an override cannot be.
        DataError: There are no labels, too few of them, or no test split that they fit.
    """
    fraction = _label_fraction(label_fraction, per_class)
    if frozen and from_random:
        problem = "an encoder of random weights is to be trained, so it cannot be frozen"
        raise ConfigError.of("--frozen", problem)
    folder = RunFolder.at(run)
    tree, record = _record(folder, run)
    much = f"{per_class}each" if per_class else f"{100 * fraction:g}pct"
    few = bool(per_class) or fraction <= FEW_LABELS
    settings = _settings(tree, folder, much, few=few, from_random=from_random)
    if frozen:
        settings |= _frozen(tree, folder, much)
    settings["tracking"] |= {"parent_run": record.mlflow_run_id}
    chosen = _validated(settings, overrides)
    data = chosen.data
    if data.limit:
        log.warning("labels are those of the first %d images (data.limit)", data.limit)
    resolve_init(chosen)  # what does not fit is refused before a file is written
    source = Source.open(data.train, data.columns, data.limit)
    write = partial(
        write_subset, source, fraction, chosen.seed, chosen.storage, per_class=per_class
    )
    rows = write()
    num_rows = Source.open(rows, data.columns).num_rows
    size, group = min(chosen.batch_size, num_rows), chosen.batch_norm.group_size
    if frozen:
        size, group = num_rows, 0
    group = group if group <= size else 0
    tuned = cfg.to_tree(chosen)
    tuned["data"] |= {"train": rows, "limit": 0}
    tuned["data"]["test"] = data.test or write(others=True)
    tuned["data"]["columns"]["group"] = ""  # an image's label is of it alone
    tuned["batch_norm"]["group_size"] = group
    tuned["batch_size"] = size // group * group if group else size
    return enter(cfg.validate(Experiment, tuned), _planned, record)


def _label_fraction(fraction: float | None, per_class: int) -> float:
    """Return the fraction of the labels, 0 where `per_class` says how many.

    Raises:
        ConfigError: Both are given, or neither, or it is none.
    """
    if per_class:
        if fraction is None:
            return 0.0
        problem = f"got {fraction:g}, and --per-class {per_class} as well; they exclude each other"
        raise ConfigError.of("--labels", problem)
    if fraction is None or not 0 < fraction <= 1:
        shown = "nothing" if fraction is None else f"{fraction:g}"
        problem = f"got {shown}; it must be above 0 and at most 1"
        raise ConfigError.of("--labels", problem)
    return fraction


def plan_distillation(teacher: str, *overrides: str) -> Planned:
    """Return the experiment of a distillation (SimCLRv2); its images need no labels.

    LARS at 0.1·√B, crop and flip alone, the teacher's encoder unless `encoder` is overridden, from
    random weights unless `init.weights` is.

    Args:
        teacher: Folder or URI of a run that has a classifier, such as a fine-tuning.
        overrides: Of the student's config: `data.train=...`, `encoder.width=...`.

    Raises:
        ConfigError: `teacher` is no such run, or an override cannot be.
        DataError: There is no labelled test split that the teacher's classes fit.
    """
    folder = RunFolder.at(teacher)
    tree, record = _record(folder, teacher)
    if tree["init"]["freeze"]:  # it was made in one step
        tree |= {"epochs": EPOCHS, "checkpoint": {"every_epochs": 10, "keep": 1}}
    settings = tree | {
        "name": f"{tree['name']}-distilled",
        "augment": _crop_and_flip(tree),
        "head": {"name": "classifier"},
        "init": {},
        "loss": {"name": "distillation", "teacher": folder.uri},
        "optimizer": {"name": "lars", "weight_decay": 1e-4},
        "schedule": {"learning_rate": 0.1, "scaling": "sqrt", "warmup_epochs": 1.0},
        "tracking": tree["tracking"] | {"parent_run": record.mlflow_run_id},
        "registry": {},
    }
    chosen = _validated(settings, overrides, needs_test=True)
    if chosen.data.limit:
        log.warning("the images are the first %d (data.limit)", chosen.data.limit)
    return enter(chosen, _planned, record)


def train(planned: Planned, *, on_progress: OnProgress | None = None) -> FineTuned:
    """Train what was planned, test it, and store the scores with it and with the run it is of."""
    experiment, parent = planned
    done = driver.train_resolved(experiment, on_progress=on_progress)
    with late_writes(RunFolder.at(done.folder)) as writes:
        writes.config(experiment.config)
    scores = None
    if experiment.config.data.test:
        with RunFolder.at(done.folder).fetched(done.checkpoint_name) as checkpoint:
            scores = score_classifier(checkpoint, experiment.config)
        _log(done, parent, experiment.config.name, scores)
    return FineTuned(done, scores, experiment.source.num_rows - _num_bad(RunFolder.at(done.folder)))


def _num_bad(folder: RunFolder) -> int:
    """Return how many images of a run could not be used."""
    rows = read_records(folder.read_text(BAD_ROWS) or "")
    return len({row["id"] for row in rows if "id" in row})


def _validated(
    settings: dict[str, Any], overrides: Sequence[str], *, needs_test: bool = False
) -> Experiment:
    """Return the experiment; what neither verb does is refused, not passed over."""
    if any(override.startswith("data.train=") for override in overrides):
        # the run's limit is of its own images
        settings = settings | {"data": settings["data"] | {"limit": 0}}
    whole = cfg.apply_overrides(settings, overrides, Experiment)
    permit_code(whole, settings, "the run")
    chosen = cfg.validate(Experiment, whole)
    issues = []
    if needs_test and not chosen.data.test:
        problem = "is empty: a student needs a split to be tested"
        issues.append(ConfigIssue("data.test", problem))
    if chosen.registry.name:
        problem = "is for pretrain; `simclr-ray model register` takes any run folder"
        issues.append(ConfigIssue("registry.name", problem))
    if issues:
        raise ConfigError(issues)
    return chosen


def _planned(resolved: ResolvedExperiment, parent: RunRecord) -> Planned:
    """Return the plan, where there is something to test by."""
    data = resolved.config.data
    if data.test and not Source.open(data.test, data.columns).has_labels:
        raise DataError(f"{data.test} has no labels to test a classifier by")
    return Planned(resolved, parent)


def _record(folder: RunFolder, shown: str) -> tuple[dict[str, Any], RunRecord]:
    """Return the config tree of a run's newest checkpoint, and where the run is tracked."""
    record = RunRecord.find(folder)
    with folder.newest_checkpoint() as newest:
        if record is None or newest is None:
            raise ConfigError.of(shown, "is no run folder with a whole checkpoint")
        return cfg.to_tree(experiment_of(newest)), record


def _settings(
    tree: dict[str, Any], folder: RunFolder, much: str, *, few: bool, from_random: bool
) -> dict[str, Any]:
    """Return the paper's settings of fine-tuning, on the run's encoder, data and placement."""
    start = "random" if from_random else "tuned"
    return tree | {
        "name": f"{tree['name']}-{start}-{much}",
        "augment": _crop_and_flip(tree),
        "head": {"name": "classifier"},
        "init": {"weights": "" if from_random else folder.uri},
        "loss": {"name": "cross_entropy"},
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
        "schedule": {"learning_rate": 0.05, "warmup_epochs": 0.0},
        "epochs": EPOCHS_OF_FEW if few else EPOCHS,
        "evaluation": tree["evaluation"] | {"every_epochs": 0},
        "checkpoint": {"every_epochs": 10, "keep": 1},
        "scaling": tree["scaling"] | {"color_augment_on": "data"},
        "tracking": tree["tracking"] | {"parent_run": ""},
        "registry": {},
    }


def _frozen(tree: dict[str, Any], folder: RunFolder, much: str) -> dict[str, Any]:
    """Return what is otherwise where the encoder stays as it is: one step, in one process."""
    return {
        "name": f"{tree['name']}-frozen-{much}",
        "init": {"weights": folder.uri, "freeze": True},
        "epochs": 1,
        "health": {},
        "checkpoint": {"every_epochs": 1, "keep": 1},
        "scaling": tree["scaling"] | {"num_workers": 1, "color_augment_on": "data"},
    }


def _crop_and_flip(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the views of fine-tuning, as large as the run's."""
    none = dict.fromkeys(("strength", "blur", "jitter", "grayscale"), 0.0)
    return {"name": "simclr", "size": tree["augment"]["size"], **none}


def _log(run: Run, parent: RunRecord, name: str, scores: Classification) -> None:
    """Store the scores with the fine-tuning, and with the run whose encoder it evaluates."""
    folder = RunFolder.at(run.folder)
    folder.write_text(CLASSIFIER_SCORES, json.dumps(scores._asdict(), indent=1))
    step = int(run.metrics.get("step", 0))
    own = {f"final/classifier/{key}": value for key, value in scores.measures().items()}
    with late_writes(folder) as writes:
        writes.metrics(own, step)
    for_parent = {f"{name}/{key}": value for key, value in scores.measures().items()}
    try:
        tracked = TrackedRun.attach(parent.tracking_uri, parent.mlflow_run_id)
        now_ms = int(1000 * time.time())  # by which another fine-tuning of that name comes later
        tracked.log_points(
            [MetricPoint(key, float(v), step, now_ms) for key, v in for_parent.items()]
        )
    except TrackingError as error:  # of a run that was copied alone, the store is not here
        log.warning("the scores are not logged with the run they are of: %s", error)
