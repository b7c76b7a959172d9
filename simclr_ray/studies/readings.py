"""What the trials of a study read: every metric of each point with each seed, from outcomes."""

from __future__ import annotations

import json
from typing import NamedTuple

from simclr_ray.config import Scalar
from simclr_ray.config.metrics import is_fraction
from simclr_ray.storage.filesystem import split_address
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import TrialOutcome
from simclr_ray.studies.plan import RUNS, Point


class Reading(NamedTuple):
    """What one trial reads at one of its points."""

    trial: str
    point: Point
    seed: int
    value: float  # of the study's metric
    values: dict[str, float]  # of every metric, that one among them
    cost: dict[str, float]
    run: str  # runs/NAME of the study's folder, or the run's id in MLflow


def readings_of(study: Study, outcome: TrialOutcome) -> list[Reading]:
    """Return what a finished trial says: a value for each of its points."""
    readings = []
    run = _run_of(outcome)
    for cell in outcome.cells:
        epoch = int(cell["epoch"])
        # of a shared run that collapsed later, those before are as runs of their own give them
        if outcome.status != "finished" and not (
            outcome.status == "collapsed" and 0 < epoch <= last_good_epoch(outcome)
        ):
            continue
        values = values_at(outcome, epoch)
        if study.metric not in values:
            continue
        fraction = epoch / epochs_of(outcome) if epoch else 1.0
        cost = {key: fraction * value for key, value in outcome.cost.items()}
        value = values[study.metric]
        readings.append(
            Reading(outcome.trial, cell["point"], outcome.seed, value, values, cost, run)
        )
    return readings


def epochs_of(outcome: TrialOutcome) -> float:
    """Return the epochs that a trial's cost is of, the last in part where it ended there.

    Its curve may end before: at the last evaluation, and where a trial collapsed before that one.
    """
    return outcome.cost.get("epochs") or float(max(outcome.curve, default=0))


def shown_epochs(epochs: float) -> str:
    """Return epochs as every table has them: `12`, `2.5`."""
    return f"{epochs:,.1f}".removesuffix(".0")


def last_good_epoch(outcome: TrialOutcome) -> int:
    """Return the last epoch that a collapsed trial was well at the end of.

    Of an earlier release's outcome, which does not say it, the one before the last of its curve.
    """
    return outcome.last_good or max(outcome.curve, default=0) - 1


def _run_of(outcome: TrialOutcome) -> str:
    """Return where a trial's run is: below the study's folder, which may be moved, or in MLflow."""
    name = split_address(outcome.run.get("folder", ""))[1]
    return f"{RUNS}/{name}" if name else outcome.run.get("mlflow_run_id", "")


def values_at(outcome: TrialOutcome, epoch: int = 0) -> dict[str, float]:
    """Return all metrics of a trial after an epoch; 0: at the end, with what is known then."""
    if epoch:
        return outcome.curve.get(epoch, {})
    last = outcome.curve[max(outcome.curve)] if outcome.curve else {}
    return {**last, **outcome.metrics}


def shown(metric: str, value: float) -> str:
    """Return a value of a metric as text, without its unit."""
    return f"{100 * value:.1f}" if is_fraction(metric) else f"{value:.3f}"


def key_of(point: dict[str, Scalar]) -> str:
    """Return a text that is the same for equal points."""
    return json.dumps(point, sort_keys=True)
