"""What a finished run leaves behind, stored with it, so that it answers without being run again."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.source import Source
from simclr_ray.errors import TrackingError
from simclr_ray.evaluation.classification import Classification
from simclr_ray.evaluation.scores import Score
from simclr_ray.storage import checkpoint
from simclr_ray.storage.filesystem import address_below
from simclr_ray.storage.metrics_log import last_values
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import SCORES
from simclr_ray.tracking.moved import has_run, rewrite_moved_store
from simclr_ray.tracking.store import RegisteredEncoder, store_uri
from simclr_ray.train.identity import newest_checkpoint
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.tracked import deliver_queued

OUTCOME = "outcome.json"


class Run(NamedTuple):
    """One pretraining run, finished."""

    name: str  # of the experiment, and eight hex digits of its digest and its images
    folder: str  # path or URI
    checkpoint_name: str  # of the last one, in `folder`
    mlflow_run_id: str
    metrics: dict[
        str, float
    ]  # name -> the last value of each: step, train/mean_loss, eval/knn_top1, …

    @property
    def checkpoint(self) -> Path:
        """A local path of the last checkpoint.

        Of a remote run it is a copy in the user's cache, fetched when first asked for and kept
        until a newer one of the run is (`RunFolder.cached_checkpoint`).
        """
        return RunFolder.at(self.folder).cached_checkpoint(self.checkpoint_name)

    @property
    def checkpoint_uri(self) -> str:
        """The last checkpoint's path or URI, where the run keeps it."""
        return address_below(self.folder, self.checkpoint_name)


class PretrainOutcome(NamedTuple):
    """What one `simclr-ray pretrain` leaves behind."""

    run: Run
    scores: list[Score]
    registered: RegisteredEncoder | None
    classifier: Classification | None  # on the test split, where the head is one
    is_stored: bool = False  # nothing was run: all is from the run's folder


def store_outcome(resolved: ResolvedExperiment, outcome: PretrainOutcome) -> None:
    """Store what a run has left behind, and what it was evaluated on and how."""
    tree = {
        "checkpoint": outcome.run.checkpoint_name,
        "evaluated": evaluation_digest(resolved.config),
        "registry": cfg.to_tree(resolved.config.registry),
        "registered": outcome.registered and outcome.registered._asdict(),
        "classifier": outcome.classifier and outcome.classifier._asdict(),
    }
    resolved.folder.write_text(OUTCOME, json.dumps(tree, indent=1))


def stored_outcome(resolved: ResolvedExperiment) -> PretrainOutcome | None:
    """Return what the run has left behind, or None where something is still to be done.

    That is so where it is unfinished, its last checkpoint is gone or damaged, it was evaluated in
    another way or on other images, or not tracked or registered as is asked for now.
    """
    folder = resolved.folder
    stored, record = folder.read_json(OUTCOME, dict), RunRecord.find(folder)
    scores = folder.read_json(SCORES, list)
    if stored is None or record is None or not scores:
        return None
    expected: dict[str, Any] = {"evaluated": evaluation_digest(resolved.config)}
    if resolved.config.registry.name:
        expected["registry"] = cfg.to_tree(resolved.config.registry)
    if any(stored.get(key) != value for key, value in expected.items()):
        return None
    if record.tracking_uri != store_uri(resolved.config.tracking.uri, resolved.config.storage):
        return None
    if not has_run(record.tracking_uri, record.mlflow_run_id):  # its folder was copied alone
        return None
    name = str(stored.get("checkpoint"))
    if checkpoint.step_of(name) < resolved.total_steps:
        return None
    # a damaged one of the same step, which the run has made good, may lie before it
    if newest_checkpoint(resolved) != name:
        return None
    with suppress(TrackingError):  # a store that cannot be written keeps what it says
        rewrite_moved_store(record.tracking_uri)
    deliver_queued(folder)
    metrics = last_values(folder.read_text(METRICS) or "")
    classifier = stored.get("classifier")
    return PretrainOutcome(
        Run(folder.name, folder.uri, name, record.mlflow_run_id, metrics),
        [Score.from_tree(row) for row in scores],
        _registered_in(stored),
        Classification(**classifier) if classifier else None,
        is_stored=True,
    )


def _registered_in(stored: dict[str, Any]) -> RegisteredEncoder | None:
    """Return the version that an outcome names.

    Earlier ones do not say whether its alias was moved. Without a rule it was; with one nobody
    knows, and the version is named by its number.
    """
    tree, registry = stored.get("registered"), stored.get("registry") or {}
    if not tree:
        return None
    moved = "" if registry.get("require") else registry.get("alias", "")
    return RegisteredEncoder(**{"alias": moved, **tree})


def evaluation_digest(experiment: Experiment) -> str:
    """Return a digest of how a run is evaluated, and on which images."""
    data = experiment.data
    splits = {"eval_train": data.eval_train or data.train, "test": data.test}
    prints = {
        role: Source.open(path, data.columns).fingerprint for role, path in splits.items() if path
    }
    return cfg.digest_of({"how": cfg.to_tree(experiment.evaluation), "on": prints})
