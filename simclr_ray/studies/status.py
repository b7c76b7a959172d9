"""State of a study, read from its folder, whether it runs or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome, curve_of
from simclr_ray.studies.plan import Trial
from simclr_ray.studies.readings import epochs_of, shown, values_at

OPEN = ("waiting", "running", "open")


class TrialStatus(NamedTuple):
    """One line of the table."""

    name: str
    state: str  # waiting, running, open (its driver is gone), or the outcome's
    epoch: float
    epochs: int
    metric: str  # as text; of the last epoch where the end is still open

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.state in OPEN


class StudyStatus(NamedTuple):
    """The study as a whole."""

    trials: list[TrialStatus]
    metric: str
    unknown: int = 0  # trials that a search has not suggested yet

    @property
    def num_trials(self) -> int:
        """All there are to be."""
        return len(self.trials) + self.unknown

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return sum(not t.is_open for t in self.trials)

    @property
    def epochs_done(self) -> float:
        """Epochs that have been trained."""
        return sum(t.epoch for t in self.trials)

    @property
    def epochs_left(self) -> float:
        """Epochs that may still be trained; an unknown trial counts as many as the others."""
        open_epochs = sum(t.epochs - t.epoch for t in self.trials if t.is_open)
        usual = sum(t.epochs for t in self.trials) / max(1, len(self.trials))
        return open_epochs + self.unknown * usual


def status_of(study: Study, folder: StudyFolder, trials: Sequence[Trial]) -> StudyStatus:
    """Return how the trials of a study stand; those of a search that learns are what there is."""
    outcomes = {o.trial: o for o in folder.outcomes()}
    runs = folder.runs()
    learns = study.search.learns
    planned = {t.name: t.experiment.epochs for t in ([] if learns else trials)}
    usual = max((t.experiment.epochs for t in trials), default=0)
    names = dict.fromkeys([*planned, *outcomes, *runs])
    lines = [
        _ended(study, outcomes[name], planned.get(name, 0))
        if name in outcomes
        else _open(study, folder, name, runs.get(name), planned.get(name, usual))
        for name in names
    ]
    unknown = max(0, study.search.trials - len(lines)) if learns else 0
    return StudyStatus(lines, study.metric, unknown)


def _ended(study: Study, outcome: TrialOutcome, epochs: int) -> TrialStatus:
    values, last = values_at(outcome), epochs_of(outcome)
    text = shown(study.metric, values[study.metric]) if study.metric in values else "-"
    return TrialStatus(outcome.trial, outcome.status, last, epochs or math.ceil(last), text)


def _open(
    study: Study, folder: StudyFolder, name: str, run: RunFolder | None, epochs: int
) -> TrialStatus:
    log = (run.read_text(METRICS) or "") if run else ""
    records = read_records(log)
    curve = curve_of(log)
    values = curve[max(curve)] if curve else {}
    text = shown(study.metric, values[study.metric]) if study.metric in values else "-"
    epoch = float(records[-1]["epoch"]) if records else 0.0
    state = ("running" if folder.may_be_running() else "open") if run else "waiting"
    return TrialStatus(name, state, epoch, epochs, text)
