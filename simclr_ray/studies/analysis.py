"""What a study found, from its stored outcomes alone: means, deviations, claims, and the paper.

Claims are tested in `studies.claims`; here points are gathered over seeds, and the whole is stored.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.studies.claims import Verdict, verdict_of, verdict_tree
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import Baselines, TrialOutcome
from simclr_ray.studies.plan import Point
from simclr_ray.studies.readings import Reading, epochs_of, key_of, readings_of
from simclr_ray.studies.space import is_same, label_of

CURVE_METRIC = "eval/knn_top1"  # of studies whose own is known at the end alone


class Row(NamedTuple):
    """A point over its seeds."""

    point: Point
    mean: float
    deviation: float  # standard, of the sample; 0 for one seed
    num_seeds: int
    extra_metrics: dict[str, float]  # means of the other metrics
    images: float  # mean of one trial
    seconds: float
    device_hours: float
    paper: float | None  # of the setting that it stands for
    runs: dict[int, str]  # seed -> runs/NAME of the study's folder, or the run's id in MLflow
    value_by_seed: dict[int, float]  # that `mean` is of


class PointCurve(NamedTuple):
    """A metric of a point over its epochs, as far as all of its seeds went."""

    point: Point  # of a run that passes through several lengths: the longest
    epochs: list[int]
    means: list[float]
    deviations: list[float]  # standard, of the sample; 0 for one seed
    num_seeds: int


class Agreement(NamedTuple):
    """How alike the order of our points is to the paper's."""

    tau: float  # Kendall's, in [-1, 1]
    p: float
    num_points: int


class Results(NamedTuple):
    """All that the report shows."""

    study: Study
    rows: list[Row]
    verdicts: list[Verdict]
    agreement: Agreement | None
    others: list[TrialOutcome]  # trials that did not finish, or that finished with a warning
    num_trials: int
    epochs: float
    images: float
    seconds: float  # of training, one trial after the other
    device_hours: float
    curves: list[PointCurve]
    baselines: Baselines

    @property
    def curve_metric(self) -> str:
        """The metric of `curves`."""
        return curve_metric_of(self.study)

    @property
    def unfinished(self) -> list[TrialOutcome]:
        """The trials that did not finish."""
        return [outcome for outcome in self.others if outcome.status != "finished"]

    @property
    def best(self) -> Row | None:
        """The best point, of those that finished with all seeds if there are any such."""
        whole = [r for r in self.rows if r.num_seeds == len(self.study.seeds)] or self.rows
        if not whole:
            return None
        choose = max if self.study.mode == "max" else min
        return choose(whole, key=lambda row: row.mean)


def results_of(
    study: Study, outcomes: Sequence[TrialOutcome], baselines: Baselines | None = None
) -> Results:
    """Return the results of the outcomes that there are.

    Args:
        study: What was run.
        outcomes: Of its trials.
        baselines: What its points are held against, as `StudyFolder.baselines` reads it.
    """
    readings = [r for outcome in outcomes for r in readings_of(study, outcome)]
    rows = _rows(study, readings)
    return Results(
        study,
        rows,
        [verdict_of(study, comparison, readings) for comparison in study.comparisons],
        _agreement(study, rows),
        [o for o in outcomes if o.reason or not readings_of(study, o)],
        len(outcomes),
        sum(map(epochs_of, outcomes)),
        sum(o.cost["images"] for o in outcomes),
        sum(o.cost["seconds"] for o in outcomes),
        sum(o.cost["device_seconds"] for o in outcomes) / 3600,
        _curves(study, outcomes),
        baselines or {},
    )


def best_outcome(results: Results, outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
    """Return the best trial of the best point. There must be one that finished."""
    assert results.best is not None
    study, point = results.study, results.best.point
    candidates = [(r.value, o) for o in outcomes for r in readings_of(study, o) if r.point == point]
    choose = max if study.mode == "max" else min
    return choose(candidates, key=lambda pair: pair[0])[1]


def _rows(study: Study, readings: Sequence[Reading]) -> list[Row]:
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(key_of(reading.point), []).append(reading)
    rows = []
    for group in groups.values():
        values = [r.value for r in group]
        names = [n for n in study.extra_metrics if all(n in r.values for r in group)]
        rows.append(
            Row(
                group[0].point,
                statistics.fmean(values),
                statistics.stdev(values) if len(values) > 1 else 0.0,
                len(values),
                {n: statistics.fmean(r.values[n] for r in group) for n in names},
                statistics.fmean(r.cost["images"] for r in group),
                statistics.fmean(r.cost["seconds"] for r in group),
                statistics.fmean(r.cost["device_seconds"] for r in group) / 3600,
                paper_value(study, group[0].point),
                {r.seed: r.run for r in group},
                {r.seed: r.value for r in group},
            )
        )
    return sorted(rows, key=lambda row: _place(study, row.point))


def curve_metric_of(study: Study) -> str:
    """Return the metric whose curves a report draws: the study's, if it is known after epochs."""
    return study.metric if study.metric in EPOCH_METRICS else CURVE_METRIC


def _curves(study: Study, outcomes: Sequence[TrialOutcome]) -> list[PointCurve]:
    """Return the curve of each point; where its seeds end early, the mean of fewer is not drawn."""
    metric = curve_metric_of(study)
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        if any(metric in values for values in outcome.curve.values()):
            groups.setdefault(key_of(outcome.cells[-1]["point"]), []).append(outcome)
    curves = []
    for group in groups.values():
        values = {
            epoch: [o.curve[epoch][metric] for o in group]
            for epoch in group[0].curve
            if all(metric in o.curve.get(epoch, {}) for o in group)
        }
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
        means = list(map(statistics.fmean, values.values()))
        point = group[0].cells[-1]["point"]
        curves.append(PointCurve(point, list(values), means, deviations, len(group)))
    return sorted(curves, key=lambda curve: _place(study, curve.point))


def _place(study: Study, point: Point) -> list[tuple[int, float]]:
    """Return where a point stands in the order in which the space lists its values."""
    place = []
    for name, dim in study.space.items():
        listed = [label_of(value) for value in dim.listed]
        value = point.get(name)
        at = listed.index(value) if value in listed else len(listed)
        place.append((at, float(value) if isinstance(value, int | float) else 0.0))
    return place


def paper_value(study: Study, point: Point) -> float | None:
    """Return the paper's value of the setting that a point stands for, or None."""
    paper = study.paper
    wanted = []
    for name in paper.columns:
        if name not in point:
            return None
        wanted.append(paper.setting(name, point[name]))
    for row in paper.rows:
        if all(map(is_same, row[:-1], wanted)):
            return float(row[-1])
    return None


def _agreement(study: Study, rows: Sequence[Row]) -> Agreement | None:
    """Compare orders; what the paper's numbers do not tell apart is averaged."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.paper is not None:
            key = key_of({k: row.point[k] for k in study.paper.columns})
            groups.setdefault(key, []).append(row)
    pairs = [(statistics.fmean(r.mean for r in g), g[0].paper) for g in groups.values()]
    if len(pairs) < 3:
        return None
    from scipy.stats import kendalltau  # half a second, of which `study status` needs none

    correlation = kendalltau([a for a, _ in pairs], [b for _, b in pairs])
    if np.isnan(correlation.statistic):
        return None
    return Agreement(float(correlation.statistic), float(correlation.pvalue), len(pairs))


def as_json(
    results: Results,
    command: str = "",
    wall_s: float = 0.0,
    *,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the results as JSON: rows, claims, curves, and what figures and findings are made of.

    Args:
        results: Of a study.
        command: That ran it.
        wall_s: From its start to its end, starts included; 0: nobody has measured.
        settings: That it was run with, as `settings_of` gives them; None: they are not known.
    """
    study = results.study
    tree = {
        "study": study.name,
        "scale": study.scale,
        "question": study.question,
        "answers": study.answers,
        "command": command,
        **({"settings": settings} if settings else {}),
        "seeds": study.seeds,
        "metric": study.metric,
        "paper": {"source": study.paper.source, "metric": study.paper.metric},
        "rows": [row._asdict() for row in results.rows],
        "claims": [verdict_tree(verdict) for verdict in results.verdicts],
        "agreement": results.agreement._asdict() if results.agreement else None,
        "baselines": results.baselines,
        "curve_metric": results.curve_metric,
        "curves": [curve._asdict() for curve in results.curves],
        "not_finished": [
            {
                "trial": o.trial,
                "status": o.status,
                "reason": o.reason,
                "epochs": epochs_of(o),
            }
            for o in results.unfinished
        ],
        "num_trials": results.num_trials,
        "epochs": results.epochs,
        "images": results.images,
        "seconds": results.seconds,
        "wall_seconds": wall_s,
        "device_hours": results.device_hours,
    }
    return json.dumps(tree, indent=1)
