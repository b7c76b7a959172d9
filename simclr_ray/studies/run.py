"""Running a study by Ray Tune: with `search`, the one door to it.

A Tune trial is a small actor that starts one run (`trial.run_trial`) as a Ray task of its own and
reports the run's epoch ends, so that a scheduler can compare and end it. Nothing of Tune's own
state is needed to go on after a kill. Trials that have an outcome are not run again; where a
scheduler or a search has to see them, they report once more what is stored, in the same order, and
the rest follows: the same decisions, without training.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import ray
import torch
from ray import tune
from ray.util.queue import Empty, Queue

from simclr_ray import config as cfg
from simclr_ray.cluster import check_cluster, connect, cpus_wanted, is_local
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, Mistake, RunError
from simclr_ray.experiment import Experiment
from simclr_ray.machine import version_of
from simclr_ray.studies.definition import Study, label_of
from simclr_ray.studies.folder import FINAL, Outcome, StudyFolder
from simclr_ray.studies.search import (
    EPOCH,
    optuna_search,
    random_points,
    scheduler_of,
    searched_space,
)
from simclr_ray.studies.trial import Job, outcome_of, run_name, run_trial, tag
from simclr_ray.studies.trials import (
    Trial,
    base_tree,
    digest_of_study,
    make_trials,
    points_of,
    study_folder,
)
from simclr_ray.tracking import TrackedRun, Tracker

DRIVER_CPUS = 0.01  # of the actor that reports; Tune refuses 0
WAIT_S = 1.0
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESTORE_RETRY_NUM": "0",
}


def run_study(
    study: Study, *, command: str = "", on_connected: Callable[[], None] | None = None
) -> StudyFolder:
    """Run a study to its end, or go on with one that was stopped; return its folder.

    Args:
        study: What to run.
        command: The command line, to be shown in the report.
        on_connected: Called when Ray is up, which sets signal handlers of its own.

    Raises:
        ConfigError: A trial cannot be, or the name is taken by another definition.
        ClusterError: The cluster cannot hold one trial.
        DataError: The pictures cannot be used.
        RunError: Another driver is at it.
    """
    folder = StudyFolder(*study_folder(study))
    tree = base_tree(study)
    base, trials = cfg.validate(Experiment, tree), plan(study, tree)
    digest = digest_of_study(study, base)
    folder.check(digest)
    fingerprint = _checked_pictures(folder, base)
    _start_cluster(study, trials)
    with folder.locked():
        folder.define(study, base, digest)
        folder.update_state(fingerprint=fingerprint)
        tracker = Tracker.open(base.tracking, base.storage)
        if on_connected is not None:
            on_connected()
        parent = _parent_run(study, folder, tracker)
        tracker.end_left_running(parent.run_id)
        folder.take_back_stop()
        folder.update_state(command=command, versions=_versions())
        status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
        try:
            is_whole = _tune(study, folder, tree, trials, parent.run_id)
            status = "FINISHED" if is_whole else "KILLED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            tracker.end_left_running(parent.run_id)
            parent.finish(status)
    return folder


def plan(study: Study, tree: dict[str, Any]) -> list[Trial]:
    """Return the trials of a study; for optuna, one for each end of the space, to be checked."""
    dims = study.space
    if study.search.name == "grid":
        return make_trials(study, tree, points_of(study))
    if study.search.name == "random":
        return make_trials(study, tree, random_points(study))
    ends = ({name: label_of(dim.values[at]) for name, dim in dims.items()} for at in (0, -1))
    return make_trials(study, tree, ends)


def concurrency_of(study: Study, trials: Sequence[Trial]) -> int:
    """Return how many trials the cluster at hand holds at a time, decoding included.

    On one machine logical CPUs are shared by time, and cores count: one for each worker.
    """
    largest = max((t.experiment for t in trials), key=cpus_wanted)
    if study.concurrency:
        return study.concurrency
    if is_local():
        return max(1, (os.cpu_count() or 1) // largest.scaling.num_workers)
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    holds = [(cluster.get("CPU", 0.0) - 1) / (cpus_wanted(largest) + DRIVER_CPUS)]
    gpus = largest.scaling.num_workers * largest.scaling.gpus_per_worker
    if gpus:
        holds.append(cluster.get("GPU", 0.0) / gpus)
    return max(1, math.floor(min(holds)))


def _start_cluster(study: Study, trials: Sequence[Trial]) -> None:
    largest = max((t.experiment for t in trials), key=cpus_wanted)
    copies = study.concurrency or max(1, (os.cpu_count() or 1) // largest.scaling.num_workers)
    connect(largest, copies=copies)
    for trial in trials:
        check_cluster(trial.experiment)


def _versions() -> dict[str, str]:
    names = ("simclr-ray", "ray", "torch", "mlflow", "numpy")
    return {name: version_of(name) for name in names} | {"machine": _machine()}


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {capability}, {gpu}"


def _checked_pictures(folder: StudyFolder, base: Experiment) -> str:
    """Return the fingerprint of the pictures; raise where they changed since the study began."""
    data = base.data
    fingerprint = Source.open(data.train, data.columns, data.limit).fingerprint
    known = folder.state().get("fingerprint", fingerprint)
    if known != fingerprint:
        told = f"{data.train} has changed since {folder.uri} was begun; give the study another name"
        raise ConfigError([Mistake("data.train", told)])
    return fingerprint


def _parent_run(study: Study, folder: StudyFolder, tracker: Tracker) -> TrackedRun:
    state = folder.state()
    known = state.get("mlflow_run_id", "") if state.get("tracking_uri") == tracker.uri else ""
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
        resume_id=known,
    )
    folder.update_state(mlflow_run_id=run.run_id, tracking_uri=tracker.uri)
    return run


def _tune(
    study: Study, folder: StudyFolder, tree: dict[str, Any], trials: Sequence[Trial], parent: str
) -> bool:
    """Run what has no outcome yet; return whether all trials have one now."""
    searched = study.search.name == "optuna"
    comparing = searched or study.scheduler.name != "none"
    known = {o.trial for o in folder.outcomes() if o.status in FINAL}
    todo = {t.name: t for t in trials if comparing or t.name not in known}
    if not todo:
        return True
    job = Job(study, folder.files.storage, folder.files.name, parent)

    def trial_of(config: dict[str, Any]) -> Trial:
        return make_trials(study, tree, [config])[0] if searched else todo[config["trial"]]

    def report(config: dict[str, Any]) -> None:
        _report(job, trial_of(config))

    def named(trial: Any) -> str:
        name = trial_of(trial.config).name
        return f"{name}-{trial.trial_id}" if searched else name  # it may suggest a point twice

    watch = _Watch(study, folder, trial_of)
    with _quiet():
        tune.Tuner(
            tune.with_resources(report, {"CPU": DRIVER_CPUS}),
            param_space=searched_space(study)
            if searched
            else {"trial": tune.grid_search(list(todo))},
            tune_config=tune.TuneConfig(
                metric=study.metric if comparing else None,
                mode=study.mode if comparing else None,
                scheduler=scheduler_of(study, trials),
                search_alg=optuna_search(study) if searched else None,
                num_samples=study.search.trials if searched else 1,
                max_concurrent_trials=concurrency_of(study, trials),
                reuse_actors=False,
                trial_name_creator=named,
                trial_dirname_creator=named,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder.uri,
                stop=watch,
                callbacks=[watch],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
    return not watch.is_stopping


class _Watch(tune.Callback, tune.Stopper):
    """Stops the study when asked or out of time; stores what a scheduler has ended."""

    def __init__(
        self, study: Study, folder: StudyFolder, trial_of: Callable[[dict[str, Any]], Trial]
    ) -> None:
        self.study, self.folder, self.trial_of = study, folder, trial_of
        self.is_stopping = False
        hours = study.budget.hours
        self._ends_at = time.monotonic() + 3600 * hours if hours else math.inf
        self._asked_at = 0.0

    def __call__(self, *_: Any) -> bool:
        """Return whether one trial is to end: that is the scheduler's to say."""
        return False

    def stop_all(self) -> bool:
        """Return whether the study is to stop now."""
        now = time.monotonic()
        if not self.is_stopping and now - self._asked_at > WAIT_S:
            self._asked_at = now
            self.is_stopping = now > self._ends_at or self.folder.is_to_stop()
        return self.is_stopping

    def on_trial_complete(
        self,
        iteration: int,  # noqa: ARG002 - Tune's
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        **_: Any,
    ) -> None:
        """Store the outcome of a trial that the scheduler has ended."""
        ours = self.trial_of(trial.config)
        known = self.folder.outcome(ours.name)
        if self.is_stopping or (known is not None and known.status in FINAL):
            return
        epoch = int(trial.last_result[EPOCH])
        reason = f"{self.study.scheduler.name}: others were better at epoch {epoch}"
        run = self.folder.run(run_name(ours.experiment))
        outcome = outcome_of(ours, run, "stopped", reason=reason, last_epoch=epoch)
        tag(outcome, self.study.name)
        tracked = TrackedRun.attach(outcome.run["tracking_uri"], outcome.run["mlflow_run_id"])
        tracked.finish("KILLED")
        self.folder.write_outcome(outcome)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune's own tables and handlers away while it runs: ours show the study."""
    before = {key: os.environ.get(key) for key in QUIET}
    os.environ.update(QUIET)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _report(job: Job, trial: Trial) -> None:
    """Be one Tune trial: report what is stored, then what a run of its own tells.

    The last epoch is reported when the outcome is stored: a scheduler may end the trial there.
    """
    stored = job.folder.outcome(trial.name)
    compared = job.study.scheduler.name != "none"
    told = 0
    for epoch, values in (stored.curve if stored and compared else {}).items():
        if epoch < trial.experiment.epochs:
            tune.report({**values, EPOCH: epoch})  # comes back when the trial may go on
            told = epoch
    if stored is None or stored.status not in FINAL:
        stored = _run(job, trial, told if compared else trial.experiment.epochs)
    worst = -math.inf if job.study.mode == "max" else math.inf
    last = stored.curve[max(stored.curve)] if stored.curve else {}
    values = {**last, **stored.metrics}
    value = values.get(job.study.metric, worst) if stored.status == "finished" else worst
    tune.report({**values, job.study.metric: value, EPOCH: trial.experiment.epochs})


def _run(job: Job, trial: Trial, told: int) -> Outcome:
    """Start the run and report its epochs beyond `told`; return its outcome."""
    inbox = Queue(actor_options={"num_cpus": 0})
    ref = _run_remotely.options(scheduling_strategy="SPREAD").remote(job, trial, inbox)
    is_done = False
    while not is_done:
        is_done = bool(ray.wait([ref], timeout=0)[0])  # before draining: nothing told is missed
        with suppress(Empty):
            while True:
                epoch, values = inbox.get(timeout=0.01 if is_done else WAIT_S)
                if told < epoch < trial.experiment.epochs:
                    tune.report({**values, EPOCH: epoch})
                    told = epoch
    inbox.shutdown(force=True)
    outcome: Outcome = ray.get(ref)
    if outcome.status == "failed":
        raise RunError(outcome.reason)
    return outcome


@ray.remote(num_cpus=0, max_retries=0)
def _run_remotely(job: Job, trial: Trial, inbox: Queue) -> Outcome:
    """Run one trial in a process of its own, which looks like that of a command."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    return run_trial(job, trial, lambda epoch, values: inbox.put((epoch, values)))
