"""One trial: a whole Ray Train run, watched, evaluated, and its outcome stored.

It runs on any node of the cluster, in the main thread of a process of its own, as a command would;
what was trained on GPUs is evaluated in a task that has one.
A trial that is started again goes on where its run stands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayTaskError

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.config.protocols import PROBE
from simclr_ray.errors import (
    CollapseError,
    RunError,
    SimclrRayError,
    TrackingError,
    UnhealthyRunError,
)
from simclr_ray.evaluation.encoded_splits import evaluated_rows
from simclr_ray.evaluation.evaluate import evaluate_trained, probe_experiment, score_classifier
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.provenance import code_commit
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.studies.definition import EITHER, PROBES, Study
from simclr_ray.studies.folder import (
    FINAL,
    Curve,
    OutcomeStatus,
    StudyFolder,
    TrialOutcome,
    curve_of,
)
from simclr_ray.studies.plan import Trial, task_fractions_of
from simclr_ray.tracking.runs import TrackedRun, Tracker
from simclr_ray.train.driver import train_resolved
from simclr_ray.train.failures import unwrap_error
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.outcome import Run
from simclr_ray.train.recorder import Record
from simclr_ray.train.resolve import ResolvedExperiment, enter
from simclr_ray.train.rollback import Rollbacks

log = logging.getLogger(__name__)

OnEpoch = Callable[[int, dict[str, float]], None]  # epoch, its metrics


class Job(NamedTuple):
    """What all trials of a study share; it pickles."""

    study: Study
    storage: str
    name: str
    parent_run: str  # MLflow run of the study
    in_process: bool = False  # trials train in the process that reports them

    @property
    def folder(self) -> StudyFolder:
        """The study's folder."""
        return StudyFolder(self.storage, self.name)


def run_trial(
    job: Job, trial: Trial, on_epoch: OnEpoch, check: Callable[[], None] = lambda: None
) -> TrialOutcome:
    """Train, evaluate, store and return the outcome; failures are outcomes too.

    Args:
        job: The study.
        trial: What to train.
        on_epoch: Called at each epoch end where the encoder was evaluated.
        check: Called whenever the run logs; a `SimclrRayError` that it raises ends the run.
    """
    experiment = _under(trial.experiment, job.parent_run)
    watch = RunWatch(experiment, on_epoch)
    status: OutcomeStatus = "finished"
    reason = ""
    metrics: dict[str, float] = {}
    try:
        metrics = enter(experiment, _train_and_evaluate, job, trial, watch, check)
        reason = watch.warned  # a bad setting is a point as well, and says so
    except UnhealthyRunError as error:
        status, reason = "collapsed", str(error)
    except SimclrRayError as error:
        status, reason = "failed", str(error)
    except KeyboardInterrupt:
        status, reason = "failed", "its run was stopped"
    except Exception as error:
        log.debug("trial %s", trial.name, exc_info=error)
        status, reason = "failed", f"{type(error).__name__}: {error}"
    outcome = outcome_of(
        trial,
        watch.folder,
        status,
        reason=reason,
        metrics=metrics,
        last_epoch=0 if watch.warned else watch.health.collapsed_at,
    )._replace(last_good=watch.last_good)
    return store_outcome(outcome, job.study.name, job.folder)


def _train_and_evaluate(
    resolved: ResolvedExperiment,
    job: Job,
    trial: Trial,
    watch: RunWatch,
    check: Callable[[], None],
) -> dict[str, float]:
    watch.folder = resolved.folder
    watch.health = HealthWatch(resolved.config, resolved.warmup_steps)
    if Rollbacks.read(resolved.folder).count:
        raise RunError("the run was rolled back, to another rate than the setting's")

    def watched(record: Record) -> None:
        watch(record)
        check()

    watch.replay(resolved.folder.read_text(METRICS) or "")
    run = train_resolved(resolved, on_progress=watched, in_process=job.in_process)
    _check_curve(job.study, trial, resolved)
    return _evaluated(job.study, resolved.config, run)


def _check_curve(study: Study, trial: Trial, resolved: ResolvedExperiment) -> None:
    """Refuse a log without the lengths that are read off it: a bucket has it a minute late.

    Raises:
        RunError: A driver was killed between a checkpoint and the log that belongs to it.
    """
    experiment = resolved.config
    if study.metric not in EPOCH_METRICS or not experiment.evaluation.every_epochs:
        return
    curve = curve_of(resolved.folder.read_text(METRICS) or "")
    wanted = {cell.epoch or experiment.epochs for cell in trial.cells}
    if lost := wanted - set(curve):
        raise RunError(
            f"the log lacks epoch {min(lost)}, lost with a driver that was killed; without "
            f"{resolved.folder.uri} the trial is run again"
        )


def outcome_of(
    trial: Trial,
    folder: RunFolder | None,
    status: OutcomeStatus,
    *,
    reason: str = "",
    metrics: dict[str, float] | None = None,
    curve: Curve | None = None,
    last_epoch: int = 0,
) -> TrialOutcome:
    """Return what became of a trial, read off its run's folder; `curve` if it is known better.

    There is no folder where the trial failed before it had one.
    """
    records = (folder.read_text(METRICS) or "") if folder else ""
    record = RunRecord.find(folder) if folder else None
    return TrialOutcome(
        trial.name,
        status,
        reason,
        [cell._asdict() for cell in trial.cells],
        trial.seed,
        metrics or {},
        curve_of(records, last_epoch) if curve is None else curve,
        _cost(records, trial.experiment),
        {
            "folder": folder.uri if folder else "",
            "checkpoint": next(folder.finished_checkpoints(), "") if folder else "",
            "mlflow_run_id": record.mlflow_run_id if record else "",
            "tracking_uri": record.tracking_uri if record else "",
            "digest": record.digest if record else "",
            "fingerprint": record.fingerprint if record else "",
            "commit": code_commit(),
        },
    )


def _evaluated(study: Study, experiment: Experiment, run: Run) -> dict[str, float]:
    """Evaluate a run, one that was trained on GPUs in a task that has one.

    Several trials on a node would otherwise all take its first. Actors that encode ask for GPUs
    themselves, and find none if the task holds it.
    """
    gpus = min(1.0, experiment.scaling.gpus_per_worker)
    if not gpus or evaluated_rows(experiment).by_actors:
        return evaluate_trial(study, experiment, run)
    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(evaluate_trial)
    try:
        metrics: dict[str, float] = ray.get(task.remote(study, experiment, run))
    except RayTaskError as error:
        raise unwrap_error(error) or error from error
    return metrics


def evaluate_trial(study: Study, experiment: Experiment, run: Run) -> dict[str, float]:
    """Return the metrics after training, and log them in an MLflow run under the trial's."""
    with RunFolder.at(run.folder).fetched(run.checkpoint_name) as checkpoint:
        metrics = _scores(study, experiment, checkpoint)
    try:
        _log_evaluation(study, experiment, run, metrics)
    except TrackingError as error:  # they are in the trial's outcome, and of the trial's run
        log.warning("the evaluation of %s has no MLflow run of its own: %s", run.name, error)
    return metrics


def _log_evaluation(
    study: Study, experiment: Experiment, run: Run, metrics: dict[str, float]
) -> None:
    tracker = Tracker.open(experiment.tracking, experiment.storage)
    evaluated = tracker.start_run(
        f"{run.name}-evaluation",
        params={"protocols": ",".join(study.protocols)},
        tags={"checkpoint": run.checkpoint_name},
        parent_id=run.mlflow_run_id,
    )
    evaluated.log_metrics(metrics, int(run.metrics.get("step", 0)))
    evaluated.finish("FINISHED")


def _scores(study: Study, experiment: Experiment, checkpoint: Path) -> dict[str, float]:
    """Return what the study's protocols say of a checkpoint."""
    metrics: dict[str, float] = {}
    protocols = [name for name in study.protocols if name != PROBE]
    if protocols:
        score = evaluate_trained(experiment, checkpoint, protocols)
        metrics |= {f"final/{key}": value for key, value in score.numbers().items()}
    if PROBE in study.protocols:
        probe_of = {p.target: p for p in probe_experiment(experiment, checkpoint)}
        for name, target in PROBES.items():
            if target not in probe_of:  # without labels
                continue
            metrics |= {
                f"probe/{name}_h": probe_of[target].h,
                f"probe/{name}_z": probe_of[target].z,
            }
    shares = task_fractions_of(experiment)
    if shares is not None:
        metrics |= {f"views/{key}": value for key, value in shares._asdict().items()}
    if experiment.classifier:
        classified = score_classifier(checkpoint, experiment).measures()
        metrics |= {f"final/classifier/{key}": float(value) for key, value in classified.items()}
    either = metrics.get("final/classifier/top1", metrics.get("final/linear_top1"))
    if either is not None:
        metrics[EITHER] = either
    return metrics


def store_outcome(outcome: TrialOutcome, study: str, folder: StudyFolder) -> TrialOutcome:
    """Store an outcome, then say it in MLflow; return it, or the one that was there before.

    A run that a scheduler has ended may live on for a moment and must not have the last word.
    """
    stored = folder.outcome(outcome.trial)
    if stored is not None and stored.status in FINAL:
        return stored
    folder.write_outcome(outcome)
    try:
        tag(outcome, study)
    except SimclrRayError as error:  # the outcome is worth more than its tags
        log.warning("trial %s is not tagged in MLflow: %s", outcome.trial, error)
    return outcome


def tag(outcome: TrialOutcome, study: str) -> None:
    """Say in MLflow of which study and point a run is, and how it ended."""
    if not outcome.run["mlflow_run_id"]:
        return
    run = TrackedRun.attach(outcome.run["tracking_uri"], outcome.run["mlflow_run_id"])
    point = {f"point/{k}": str(v) for k, v in outcome.cells[-1]["point"].items()}
    named = {"study": study, "trial": outcome.trial, "outcome": outcome.status}
    run.set_tags({**named, **point, "reason": outcome.reason})
    if outcome.metrics:
        run.log_metrics(outcome.metrics, max(outcome.curve, default=0))


class RunWatch:
    """Passes epoch ends on, and ends a run that has collapsed, or remembers that.

    Attributes:
        warned: What was wrong, where `health.on_collapse` is `warn`; else empty.
        last_good: The last epoch whose evaluation has not ended the run; 0: there is none.
    """

    def __init__(self, experiment: Experiment, on_epoch: OnEpoch) -> None:
        self.health, self.on_epoch = HealthWatch(experiment), on_epoch
        self.warns, self.warned = experiment.health.on_collapse == "warn", ""
        self.folder: RunFolder | None = None  # where the run is, once that is resolved
        self.training: dict[str, float] = {}
        self.last_good = 0

    def replay(self, lines: str) -> None:
        """Look at what a run had logged before it was stopped; raise as for new records."""
        on_epoch, self.on_epoch = self.on_epoch, lambda *_: None
        for record in read_records(lines):
            self(record)
        self.on_epoch = on_epoch

    def __call__(self, record: Record) -> None:
        """Take one record of metrics."""
        values = {key: value for key, value in record.items() if "/" in key}
        is_evaluation = any(key.startswith("eval/") for key in record)
        if is_evaluation:
            self.on_epoch(round(record["epoch"]), self.training | values)
        else:
            self.training |= values
        try:
            self.health(record)
        except CollapseError as error:
            if not self.warns:
                raise
            self.warned = self.warned or str(error)
        if is_evaluation:
            self.last_good = round(record["epoch"])


def _under(experiment: Experiment, parent_run: str) -> Experiment:
    tracking = experiment.tracking.model_copy(update={"parent_run": parent_run})
    return experiment.model_copy(update={"tracking": tracking})


def _cost(log: str, experiment: Experiment) -> dict[str, float]:
    """Return images, seconds and epochs of training by the records; no step counts twice."""
    records = [record for record in read_records(log) if record.get("train/images_per_s")]
    speeds = {int(record["step"]): float(record["train/images_per_s"]) for record in records}
    epochs = {int(record["step"]): float(record["epoch"]) for record in records}
    images = seconds = 0.0
    before = 0
    for step in sorted(speeds):
        done = (step - before) * experiment.batch_size
        images, seconds, before = images + done, seconds + done / speeds[step], step
    workers = experiment.scaling.max_workers
    return {
        "images": images,
        "seconds": round(seconds, 2),
        "device_seconds": round(seconds * workers, 2),
        "epochs": epochs[max(epochs)] if epochs else 0.0,
    }
