"""One trial as Ray Tune's actor sees it: it has the run made, and reports the run's epoch ends.

An actor serves trial after trial. Where one process is enough for a trial (`train/in_process.py`)
it trains and evaluates in the actor itself, which has all imported and keeps images decoded:
starting processes for it takes longer than the trial. Else, and where trials are to be isolated,
each is a task of Ray's own, and the actor only reports.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.queue import Empty

from simclr_ray.data.image_cache import keep_newest
from simclr_ray.distributed.ray_cluster import PickledQueue, driver_queue
from simclr_ray.distributed.worker_exit import skip_destructors
from simclr_ray.errors import RunError
from simclr_ray.evaluation.decoded import DECODED
from simclr_ray.evaluation.encoded_splits import VIEWS_BYTES
from simclr_ray.storage.run_folder import METRICS
from simclr_ray.studies.folder import FINAL, Curve, TrialOutcome, curve_of
from simclr_ray.studies.plan import Trial
from simclr_ray.studies.search import EPOCH
from simclr_ray.studies.trial_runner import Job, run_trial

WAIT_S: Final = 1.0  # for a report of the run
# What a trial without a value is told to have: finite, since ASHA takes percentiles.
WORST: Final = 1e9
ENDED: Final = "ended"  # in a trial's last report: its run has, and has an outcome


class Ends:
    """Which runs are to end, and which run: between the study's driver and the trials'."""

    def __init__(self) -> None:
        skip_destructors()
        self.requested: set[str] = set()
        self.running: set[str] = set()

    def request(self, trial: str) -> None:
        """Ask a trial's run to end."""
        self.requested.add(trial)

    def begin(self, trial: str) -> None:
        """Count a trial's run as running."""
        self.running.add(trial)

    def end(self, trial: str) -> None:
        """Count it as ended."""
        self.running.discard(trial)

    def is_requested(self, trial: str) -> bool:
        """Return whether a trial's run is to end."""
        return trial in self.requested

    def is_running(self, trial: str) -> bool:
        """Return whether it runs."""
        return trial in self.running


def report_trial(job: Job, trial: Trial, ends: Any) -> None:
    """Report one Tune trial: the stored epochs, then those of a run of its own.

    The last epoch is reported when the outcome is stored: a scheduler may end the trial there.
    """
    last = trial.experiment.epochs
    stored = job.folder.outcome(trial.name)
    is_final = stored is not None and stored.status in FINAL
    reported_epoch = 0
    if job.study.scheduler.name != "none":
        curve = stored.curve if stored is not None and is_final else _logged(job, trial)
        for epoch, values in curve.items():
            if epoch < last:
                tune.report({**values, EPOCH: epoch})  # comes back when the trial may go on
                reported_epoch = epoch
    else:
        reported_epoch = last  # nobody compares
    if stored is None or not is_final:
        run = _run_here if job.in_process else _run
        stored = run(job, trial, reported_epoch, ends)
    if stored.status == "stopped":
        return  # by other trials than those of now; it is not trained again
    worst = -WORST if job.study.mode == "max" else WORST
    values = {**(stored.curve[max(stored.curve)] if stored.curve else {}), **stored.metrics}
    value = values.get(job.study.metric, worst) if stored.status == "finished" else worst
    epoch = last if stored.status == "finished" else max(stored.curve, default=0) + 1
    tune.report({**values, job.study.metric: value, EPOCH: epoch, ENDED: 1.0})


def _logged(job: Job, trial: Trial) -> Curve:
    """Return what the run of an open trial has logged before it was stopped."""
    folder = job.folder.run_of(trial.name)
    return curve_of((folder.read_text(METRICS) or "") if folder else "")


def _run_here(job: Job, trial: Trial, reported_epoch: int, ends: Any) -> TrialOutcome:  # noqa: ARG001
    """Run a trial in this process and report its epochs beyond `reported_epoch`.

    A scheduler ends it there: what reports does not come back, and its thread ends.
    """

    def on_epoch(epoch: int, values: dict[str, float]) -> None:
        if reported_epoch < epoch < trial.experiment.epochs:
            tune.report({**values, EPOCH: epoch})

    keep_newest()
    DECODED.keep(VIEWS_BYTES)
    return run_trial(job, trial, on_epoch)


def _run(job: Job, trial: Trial, reported_epoch: int, ends: Any) -> TrialOutcome:
    """Start the run and report its epochs beyond `reported_epoch`; return its outcome."""
    inbox = driver_queue()
    env = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    ref = _run_remotely.options(scheduling_strategy="SPREAD", runtime_env={"env_vars": env}).remote(
        job, trial, inbox, ends
    )
    is_done = False
    while not is_done:
        is_done = bool(ray.wait([ref], timeout=0)[0])  # before draining: nothing told is missed
        with suppress(Empty):
            while True:
                epoch, values = inbox.get(timeout=0.01 if is_done else WAIT_S)
                if reported_epoch < epoch < trial.experiment.epochs:
                    tune.report({**values, EPOCH: epoch})
                    reported_epoch = epoch
    inbox.shutdown(force=True)
    outcome: TrialOutcome = ray.get(ref)
    if outcome.status == "failed":
        raise RunError(outcome.reason)
    return outcome


@ray.remote(num_cpus=0, max_retries=0)
def _run_remotely(job: Job, trial: Trial, inbox: PickledQueue, ends: Any) -> TrialOutcome:
    """Run one trial in a process of its own, which looks like that of a command."""
    skip_destructors()

    def on_epoch(epoch: int, values: dict[str, float]) -> None:
        inbox.put((epoch, values))

    if ends is None:  # nobody ends trials
        return run_trial(job, trial, on_epoch)

    def check() -> None:
        with suppress(RayError):  # the driver's node is gone, and nobody waits for an answer
            if ray.get(ends.is_requested.remote(trial.name)):
                raise RunError("the study's scheduler has ended it")

    with suppress(RayError):
        ray.get(ends.begin.remote(trial.name))
    try:
        return run_trial(job, trial, on_epoch, check)
    finally:
        with suppress(RayError):
            ray.get(ends.end.remote(trial.name))
