"""Running a study, from its definition to the last outcome; the same call goes on with it."""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Sequence
from typing import Literal

import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ColumnsConfig, DataConfig, Experiment
from simclr_ray.config.imports import IMPORT_PATH, imports_in, permit_code
from simclr_ray.config.protocols import PROBE, protocol_named
from simclr_ray.data.source import Source
from simclr_ray.distributed.demand import wait_for_room
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.ray_cluster import (
    check_machine,
    connect,
    is_local,
)
from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.storage.lease import is_lost
from simclr_ray.storage.provenance import versions_of
from simclr_ray.studies.baselines import StudyBaselines
from simclr_ray.studies.concurrency import (
    Concurrency,
    concurrency_of,
    largest_of,
    per_machine,
)
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import OUTCOMES, StudyFolder
from simclr_ray.studies.plan import (
    Trial,
    base_tree,
    check_labels,
    study_folder,
)
from simclr_ray.studies.planned_power import lack_of_power, planned_powers
from simclr_ray.studies.settings import digest_of_study
from simclr_ray.studies.trial_runner import Job
from simclr_ray.studies.trials import plan
from simclr_ray.studies.tune import run_trials
from simclr_ray.tracking.runs import TrackedRun, Tracker
from simclr_ray.train.head_start import with_cluster
from simclr_ray.train.scaling import can_train_in_process

log = logging.getLogger(__name__)
LOOKED_AT_S = 2.0  # whoever asks how the study stands holds its lock for a moment


def run_study(study: Study, *, command: str = "", isolated: bool = False) -> StudyFolder:
    """Run a study to its end, or go on with one that was stopped; return its folder.

    Args:
        study: What to run.
        command: The command line, to be shown in the report where it begins the study.
        isolated: Have each trial, and all that it starts, in processes of its own. Else those
            that one process can train (`can_train_in_process`) share processes, in turn.

    Raises:
        ConfigError: A trial cannot be, or the name is taken by another definition.
        ClusterError: The cluster cannot hold one trial.
        DataError: The images cannot be used.
        RunError: Another driver is at it.
        TrackingError: MLflow refuses or cannot be reached.
    """
    began = time.monotonic()
    folder = StudyFolder(*study_folder(study))
    before = seconds_before(folder)
    tree = base_tree(study)
    base, trials = cfg.validate(Experiment, tree), plan(study, tree)
    digest = digest_of_study(study, base)
    fingerprints = check_startable(study, trials)
    if lack := lack_of_power(planned_powers(study)):
        log.warning("%s", lack)
    with folder.files.lock(LOOKED_AT_S):
        folder.withdraw_stop()
        concurrency, tracker = with_cluster(
            lambda: start_cluster(study, trials),
            lambda: Tracker.open(base.tracking, base.storage),
        )
        folder.write_definition(study, base, digest, command)
        parent = _parent_run(study, folder, tracker)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
        try:
            tracker.end_left_running(parent.run_id)
            folder.update_state(
                fingerprints=fingerprints,
                versions=_versions(folder.state().get("versions", {})),
                is_complete=False,
                seconds=before,
                began_at=time.time(),
            )
            are_small = can_share_processes(trials)
            in_process = are_small and not isolated
            job = Job(study, folder.files.storage, folder.files.name, parent.run_id, in_process)
            # of larger encoders and sets they would take the head of a cluster for an hour
            baselines = StudyBaselines(study, base, folder) if are_small else None
            is_complete = run_trials(job, tree, trials, concurrency)
            if is_complete:
                status = "FINISHED"
                folder.update_state(is_complete=True)
            if baselines is not None:
                baselines.store(wait=is_complete)
        except Exception:
            status = "FAILED"
            raise
        finally:
            if not is_lost(folder.uri):  # else they are of the driver that has the study now
                seconds = round(before + time.monotonic() - began, 1)
                folder.update_state(seconds=seconds, began_at=None)
                try:
                    tracker.end_left_running(parent.run_id)
                finally:
                    parent.finish(status)
    return folder


def seconds_before(folder: StudyFolder) -> float:
    """Return what earlier starts took; of one that was killed, until its last trial ended."""
    state = folder.state()
    seconds, began_at = float(state.get("seconds") or 0.0), float(state.get("began_at") or 0.0)
    written_at = folder.files.written_at(OUTCOMES) if began_at else None
    if written_at is None:
        return seconds
    return round(seconds + max(0.0, written_at.timestamp() - began_at), 1)


def check_startable(study: Study, trials: Sequence[Trial]) -> dict[str, str]:
    """Return the fingerprints of the splits, if nothing stands against running this study.

    Raises:
        ConfigError: The name is taken, the metric needs labels, images have changed, or a file
            names code that nobody has permitted.
        ClusterError: This machine cannot hold a trial, or no cluster answers.
        DataError: A split cannot be read.
        RunError: Another driver is at it.
    """
    folder = StudyFolder(*study_folder(study))
    base = cfg.validate(Experiment, base_tree(study))
    folder.check(digest_of_study(study, base))
    folder.files.ensure_unlocked()
    _check_code(study, trials)
    if study.search.learns and importlib.util.find_spec("optuna") is None:
        problem = "optuna is not installed: pip install 'simclr-ray[optuna]'"
        raise ConfigError.of("search.name", problem)
    check_labels(study, trials)
    copies = _copies(study, largest_of(trials))
    distinct = {repr((t.experiment.scaling, t.experiment.evaluation)): t for t in trials}
    for trial in distinct.values():  # each asks the cluster
        check_machine(trial.experiment, copies)
    return checked_images(folder, [base, *(trial.experiment for trial in trials)])


def _check_code(study: Study, trials: Sequence[Trial]) -> None:
    """Raise `ConfigError` for code that nobody has permitted, and protocols that are not there."""
    trees = [cfg.to_tree(trial.experiment) for trial in trials]
    permit_code(trees, trees, f"study {study.name}")
    for name in study.protocols:
        if name != PROBE:
            protocol_named(name).load()


def has_code(study: Study, trials: Sequence[Trial]) -> bool:
    """Return whether a study or its trials name code of the user's own."""
    return any(imports_in([trial.experiment for trial in trials])) or any(
        IMPORT_PATH.fullmatch(name) for name in study.protocols
    )


def _copies(study: Study, largest: Experiment) -> int:
    """Return for how many trials a cluster on this machine would be made."""
    return study.concurrency or per_machine(largest)


def start_cluster(study: Study, trials: Sequence[Trial]) -> Concurrency:
    """Connect, or start a cluster on this machine; return how many trials it runs at a time.

    Raises:
        ClusterError: No cluster answers, or it cannot hold one trial.
    """
    largest = largest_of(trials)
    connect(
        largest,
        copies=_copies(study, largest),
        others=[trial.experiment for trial in trials],
        paths=[name for name in study.protocols if IMPORT_PATH.fullmatch(name)],
    )
    for trial in trials:
        wait_for_room(trial.experiment)
    return concurrency_of(study, trials)


def can_share_processes(trials: Sequence[Trial]) -> bool:
    """Return whether each of some trials can be trained by one process, after another."""
    return all(can_train_in_process(trial.experiment) for trial in trials)


def shared_cores(trials: Sequence[Trial]) -> float:
    """Return the cores that workers share by time: this machine's, where the cluster is no more."""
    on_gpus = any(trial.experiment.scaling.gpus_per_worker for trial in trials)
    return float(cores()) if is_local() and not on_gpus else math.inf


def _versions(before: dict[str, str]) -> dict[str, str]:
    """Return what runs the study now, after what ran it before."""
    names = ("simclr-ray", "ray", "torch", "mlflow", "numpy")
    now = versions_of(names) | {"machine": _machine()}
    earlier_versions = {name: before.get(name, "").split("; ") for name in now}
    earlier = {name: text for name, text in before.items() if name not in now}
    return earlier | {
        name: "; ".join([*(v for v in earlier_versions[name] if v and v != value), value])
        for name, value in now.items()
    }


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores()} cores, {capability}, {gpu}"


def checked_images(folder: StudyFolder, experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return the fingerprints of the splits; raise where one changed since the study began.

    Args:
        folder: Of the study.
        experiments: Its base, and those of its trials, whose images may be others.
    """
    uris: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    sets = list(dict.fromkeys(experiment.data for experiment in experiments))
    own = _images_of(sets[0])
    for number, data in enumerate(sets):  # a study that is moved has them elsewhere, in this order
        for name, images in _images_of(data).items():
            key = name if images == own.get(name) else f"{name} {number}"
            if key not in fingerprints:
                uris[key], fingerprints[key] = images[0], Source.open(*images).fingerprint
    stored = folder.state().get("fingerprints", fingerprints)
    # of a study that an earlier release began, its base's alone are there
    changed = [name for name, was in stored.items() if fingerprints.get(name) != was]
    if changed:
        problem = f"has changed since {folder.uri} was begun; give the study another name"
        issues = [
            ConfigIssue(f"data.{name.partition(' ')[0]}", f"{uris.get(name, '')} {problem}".strip())
            for name in changed
        ]
        raise ConfigError(issues)
    return fingerprints


def _images_of(data: DataConfig) -> dict[str, tuple[str, ColumnsConfig, int]]:
    """Return name of each split -> what `Source.open` takes."""
    splits = {"train": (data.train, data.columns, data.limit)}
    splits |= {name: (getattr(data, name), data.columns, 0) for name in ("eval_train", "test")}
    return {name: images for name, images in splits.items() if images[0]}


def _parent_run(study: Study, folder: StudyFolder, tracker: Tracker) -> TrackedRun:
    state = folder.state()
    resume_id = state.get("mlflow_run_id", "")
    if resume_id and not tracker.has_run(resume_id):
        resume_id = ""
    run = tracker.start_run(
        study.name,
        params={
            "question": study.question,
            "metric": study.metric,
            "seeds": str(study.seeds),
            "search": study.search.name,
            "scheduler": study.scheduler.name,
            **{f"space.{k}": str(d.values) for k, d in study.space.items()},
        },
        tags={"study": study.name, "digest": state["digest"], "storage": folder.uri},
        resume_id=resume_id,
    )
    folder.update_state(mlflow_run_id=run.run_id, tracking_uri=tracker.uri)
    return run
