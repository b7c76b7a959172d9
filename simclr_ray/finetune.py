"""Fine-tuning with a share of the labels (SimCLR §B.5), and distillation: other settings.

A fine-tuning is a run of its own, by Ray Train like any other, that starts from a run's encoder and
classifies: Nesterov SGD, rate 0.05·B/256, no warm-up, no decay, crop and flip alone, 60 epochs of
1 % of the labels and 30 of more. In MLflow it lies under the run whose encoder it judges.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.data.source import Source
from simclr_ray.data.subset import write_subset
from simclr_ray.errors import ConfigError, DataError, Mistake
from simclr_ray.evaluation.scoring import Classification
from simclr_ray.experiment import Experiment, absolute_path
from simclr_ray.judge import experiment_of, score_classifier
from simclr_ray.pretrain import RUN_FILE, Progress, Run, pretrain
from simclr_ray.storage import RunFolder
from simclr_ray.tracking import TrackedRun

FEW_LABELS, EPOCHS_OF_FEW, EPOCHS = 0.01, 60, 30
SCORES = "classification.json"


class FineTuned(NamedTuple):
    """A finished fine-tuning."""

    run: Run
    scores: Classification  # of the test split
    num_labels: int


def finetune(
    run: str,
    share: float,
    *overrides: str,
    from_random: bool = False,
    on_progress: Progress | None = None,
) -> FineTuned:
    """Train a classifier from a run's encoder on a share of its labelled rows, and test it.

    Args:
        run: Folder or URI of a pretraining run.
        share: Of the labelled rows of `data.train`, class-balanced, in (0, 1].
        overrides: Of the fine-tuning's config.
        from_random: Start from random weights instead, for comparison.
        on_progress: As of `pretrain`.

    Raises:
        ConfigError: `run` is no run folder, or the share or an override cannot be.
        DataError: There are no labels, too few of them, or no labelled test split.
    """
    experiment, parent = prepare(run, share, *overrides, from_random=from_random)
    done = pretrain(experiment, on_progress=on_progress)
    scores = score_classifier(done.checkpoint, experiment)
    _log(done, parent, experiment.name, scores)
    return FineTuned(done, scores, Source.open(experiment.data.train).num_rows)


def distill(
    teacher: str, *overrides: str, on_progress: Progress | None = None
) -> tuple[Run, Classification]:
    """Train a student on what a classifier says of pictures, which need no labels (SimCLRv2).

    LARS at 0.1·√B, crop and flip alone, the teacher's encoder unless `encoder` is overridden,
    from random weights unless `start.weights` is.

    Args:
        teacher: Folder or URI of a run that has a classifier, such as a fine-tuning.
        overrides: Of the student's config: `data.train=...`, `encoder.width=...`.
        on_progress: As of `pretrain`.

    Raises:
        ConfigError: `teacher` is no such run, or an override cannot be.
        DataError: There is no labelled test split.
    """
    folder = RunFolder.at(teacher)
    tree, stored = _record(folder, teacher)
    settings = tree | {
        "name": f"{tree['name']}-distilled",
        "head": {"name": "classifier"},
        "start": {},
        "loss": {"name": "distillation", "teacher": folder.uri},
        "optimizer": {"name": "lars", "weight_decay": 1e-4},
        "schedule": {"learning_rate": 0.1, "scaling": "sqrt", "warmup_epochs": 1.0},
        "tracking": tree["tracking"] | {"parent_run": stored["mlflow_run_id"]},
    }
    chosen = cfg.validate(Experiment, cfg.apply_overrides(settings, overrides, Experiment))
    _check_test(chosen)
    done = pretrain(chosen, on_progress=on_progress)
    scores = score_classifier(done.checkpoint, chosen)
    _log(done, stored, chosen.name, scores)
    return done, scores


def prepare(
    run: str, share: float, *overrides: str, from_random: bool = False
) -> tuple[Experiment, dict[str, str]]:
    """Return the experiment of a fine-tuning, its rows written, and the record of the run it is of.

    Arguments and errors as of `finetune`.
    """
    if not 0 < share <= 1:
        raise ConfigError([Mistake("labels", f"got {share:g}; it must be above 0 and at most 1")])
    folder = RunFolder.at(run)
    tree, stored = _record(folder, run)
    settings = _settings(tree, folder, share, from_random=from_random)
    settings["tracking"] |= {"parent_run": stored["mlflow_run_id"]}
    chosen = cfg.validate(Experiment, cfg.apply_overrides(settings, overrides, Experiment))
    _check_test(chosen)
    data = chosen.data
    source = Source.open(data.train, data.columns, data.limit)
    rows = write_subset(source, share, chosen.seed, absolute_path(chosen.storage))
    update = {"train": rows, "limit": 0, "columns": type(data.columns)()}
    subset = Source.open(rows)
    size = min(chosen.batch_size, subset.num_rows)
    chosen = chosen.model_copy(update={"data": data.model_copy(update=update), "batch_size": size})
    return cfg.validate(Experiment, cfg.to_tree(chosen)), stored


def _record(folder: RunFolder, shown: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config tree of a run's newest checkpoint, and where the run is tracked."""
    text = folder.read_text(RUN_FILE)
    with tempfile.TemporaryDirectory() as scratch:
        newest = folder.newest(Path(scratch)) if text else None
        if text is None or newest is None:
            raise ConfigError([Mistake(shown, "is no run folder with a whole checkpoint")])
        return cfg.to_tree(experiment_of(newest)), json.loads(text)


def _check_test(experiment: Experiment) -> None:
    where = experiment.data.test
    if not where:
        raise ConfigError(
            [Mistake("data.test", "is empty: a classifier needs a split to be tested")]
        )
    if not Source.open(where, experiment.data.columns).has_labels:
        raise DataError(f"{where} has no labels to test a classifier by")


def _settings(
    tree: dict[str, Any], folder: RunFolder, share: float, *, from_random: bool
) -> dict[str, Any]:
    """Return the paper's settings of fine-tuning, on the run's encoder, data and placement."""
    start = "random" if from_random else "tuned"
    name = f"{tree['name']}-{start}-{100 * share:g}pct".replace("%", "")
    few = share <= FEW_LABELS
    return tree | {
        "name": name,
        "augment": {
            "size": tree["augment"]["size"],
            "strength": 0.0,
            "blur": 0.0,
            "jitter": 0.0,
            "grayscale": 0.0,
        },
        "head": {"name": "classifier"},
        "start": {"weights": "" if from_random else folder.uri},
        "batch_norm": tree["batch_norm"] | {"images": 0},
        "loss": {"name": "cross_entropy"},
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
        "schedule": {"learning_rate": 0.05, "warmup_epochs": 0.0},
        "epochs": EPOCHS_OF_FEW if few else EPOCHS,
        "evaluation": tree["evaluation"] | {"every_epochs": 0},
        "checkpoint": {"every_epochs": 10, "keep": 1},
        "scaling": tree["scaling"] | {"colour_on": "data"},
        "tracking": tree["tracking"] | {"parent_run": ""},
        "register_as": {},
    }


def _log(run: Run, parent: dict[str, str], name: str, scores: Classification) -> None:
    """Store the scores with the fine-tuning, and with the run whose encoder it judges."""
    folder = RunFolder.at(run.folder)
    folder.write_text(SCORES, json.dumps(scores._asdict(), indent=1))
    stored = json.loads(folder.read_text(RUN_FILE) or "{}")
    step = int(run.metrics.get("step", 0))
    own = {f"test/{key}": value for key, value in scores._asdict().items()}
    TrackedRun.attach(stored["tracking_uri"], run.mlflow_run_id).log_metrics(own, step)
    for_parent = {f"{name}/{key}": value for key, value in scores._asdict().items()}
    TrackedRun.attach(parent["tracking_uri"], parent["mlflow_run_id"]).log_metrics(for_parent, step)
