"""How a study stands, read from its folder: by whoever asks, whether it runs or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from simclr_ray.pretrain import METRICS
from simclr_ray.records import read_records
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import Outcome, StudyFolder, curve_of
from simclr_ray.studies.results import shown, values_at
from simclr_ray.studies.trials import Trial

OPEN = ("waiting", "running", "open")


class TrialStatus(NamedTuple):
    """One line of the table."""

    name: str
    state: str  # waiting, running, open (its driver is gone), or the outcome's
    epoch: float
    epochs: int
    metric: str  # as text; of the last epoch where the end is still open


class StudyStatus(NamedTuple):
    """The study as a whole."""

    trials: list[TrialStatus]
    metric: str

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return sum(t.state not in OPEN for t in self.trials)

    @property
    def epochs_done(self) -> float:
        """Epochs that have been trained."""
        return sum(t.epoch for t in self.trials)

    @property
    def epochs_left(self) -> float:
        """Epochs that may still be trained."""
        return sum(t.epochs - t.epoch for t in self.trials if t.state in OPEN)


def status_of(study: Study, folder: StudyFolder, trials: Sequence[Trial]) -> StudyStatus:
    """Return how the trials of a study stand."""
    outcomes = {o.trial: o for o in folder.outcomes()}
    runs = folder.runs()
    lines = [_status(study, folder, t, outcomes.get(t.name), runs) for t in trials]
    planned = {t.name for t in trials}
    lines += [_ended(study, o) for o in outcomes.values() if o.trial not in planned]
    return StudyStatus(lines, study.metric)


def _ended(study: Study, outcome: Outcome) -> TrialStatus:
    values, last = values_at(outcome), max(outcome.curve, default=0)
    text = shown(study.metric, values[study.metric]) if study.metric in values else "-"
    return TrialStatus(outcome.trial, outcome.status, last, last, text)


def _status(
    study: Study, folder: StudyFolder, trial: Trial, outcome: Outcome | None, runs: Sequence[str]
) -> TrialStatus:
    epochs, metric = trial.experiment.epochs, study.metric
    if outcome is not None:
        return _ended(study, outcome)._replace(epochs=epochs)
    run = next((name for name in runs if name.rpartition("-")[0] == trial.name), "")
    log = (folder.run(run).read_text(METRICS) or "") if run else ""
    records = read_records(log)
    curve = curve_of(log)
    values = curve[max(curve)] if curve else {}
    text = shown(metric, values[metric]) if metric in values else "-"
    epoch = float(records[-1]["epoch"]) if records else 0.0
    state = ("running" if folder.is_held() else "open") if run else "waiting"
    return TrialStatus(trial.name, state, epoch, epochs, text)
