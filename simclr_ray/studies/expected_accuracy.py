"""What accuracy to expect of a length that was not run: a law fitted to one study, with intervals.

Points of a study share the shape of the law, in images seen; each setting has a level of its own:

    power         accuracy        = level - slope * images^-c          (error falls to a floor)
    logit power   logit(accuracy) = level - slope * images^-c
    logit log     logit(accuracy) = level + slope * log(images)
    hyperbola     accuracy        = level - slope / (1 + images / half)   (it ends sooner)

The form is the one that predicts held-out runs best. An interval is the spread that the fit claims,
times the factor of it that held-out points needed (conformal inference, weighted by the spread: Lei
et al. 2018, section 5.2). The spread has the noise of seeds, what the fit leaves open, and how far
the forms are apart, so it grows where nothing was measured. Beyond the longest length the factor is
that of the longest points, predicted from shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import t as student

from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Float64s

Place = Literal["yes", "beyond", "below"]

LEVEL = 0.9
FEWEST_POINTS = 3
ONE_LENGTH = 1.5  # lengths within this factor are one: epochs of whole batches differ a bit
EDGE = 1e-4  # accuracies are kept this far from 0 and 1, whose logit is infinite
# Of levels, against the points': runs of a setting decide its level, all but a hundredth of one
# run's weight, while a setting that is held out gets the mean.
LEVEL_PRECISION = 0.01
NO_PRECISION = 1e-6  # lets the rest be solved where one length leaves a slope open
# What bends a law, before any point is seen, normal in its logarithm; it decides where a study has
# too few lengths to. An exponent: 0.13 to 2 with a chance of 95 %. Of a hyperbola, the typical
# length over that which is half of the way: 0.05 to 20.
EXPONENT, EXPONENT_DEVIATION, EXPONENT_BOUNDS = 0.5, 0.7, (0.05, 3.0)
HALVES, HALVES_DEVIATION, HALVES_BOUNDS = 1.0, 1.5, (0.01, 100.0)
COARSE = {"xatol": 0.01}  # of log c: a hundredth of the exponent, far below what data decide
AS_GOOD = 1.5  # a form counts whose held-out error is within this factor of the best


class Measured(NamedTuple):
    """What a setting reads after some images: one run, or the mean of several."""

    setting: str
    run: str  # points with the same one are held out together: a setting with a seed
    images: float  # seen: epochs x images
    value: float  # in [0, 1]
    num_seeds: int = 1
    deviation: float = 0.0  # over the seeds, of the sample


class Expected(NamedTuple):
    """What one more run is expected to read, and where it lies with a chance of `LEVEL`."""

    value: float
    low: float
    high: float
    measured: Place  # whether the length lies within those that were measured


class Form(NamedTuple):
    """A law of accuracy in images seen."""

    name: str
    is_logit: bool
    shape: Literal["power", "log", "hyperbola", "level"]

    @property
    def has_bend(self) -> bool:
        """Whether one number more than level and slope is fitted."""
        return self.shape in ("power", "hyperbola")

    @property
    def prior(self) -> tuple[float, float, tuple[float, float]]:
        """The bend before any point is seen, the deviation of its logarithm, and its bounds."""
        if self.shape == "power":
            return EXPONENT, EXPONENT_DEVIATION, EXPONENT_BOUNDS
        return HALVES, HALVES_DEVIATION, HALVES_BOUNDS

    def link(self, value: float) -> float:
        """Return an accuracy on the scale of the law."""
        return float(logit(min(max(value, EDGE), 1 - EDGE))) if self.is_logit else value

    def unlink(self, value: float) -> float:
        """Return the accuracy, within [0, 1]."""
        return float(expit(value)) if self.is_logit else min(max(value, 0.0), 1.0)

    def steepness(self, value: float) -> float:
        """Return by how much the link grows with the accuracy, there."""
        kept = min(max(value, EDGE), 1 - EDGE)
        return 1 / (kept * (1 - kept)) if self.is_logit else 1.0


POWER = Form("power", is_logit=False, shape="power")
LOGIT_POWER = Form("logit power", is_logit=True, shape="power")
LOGIT_LOG = Form("logit log", is_logit=True, shape="log")
HYPERBOLA = Form("hyperbola", is_logit=False, shape="hyperbola")
FLAT = Form("level", is_logit=False, shape="level")
FORMS = (POWER, LOGIT_POWER, LOGIT_LOG, HYPERBOLA)


class FittedCurve(NamedTuple):
    """One form as fitted, in x = images / `unit`; `_rows` has the shapes."""

    form: Form
    settings: list[str]
    unit: float
    bend: float  # exponent, or `unit` over half of the way; 0: none
    weights: Float64s  # mean level, slope, then by how much each setting's level differs
    covariance: Float64s  # of the weights, and of the bend's logarithm where there is one
    noise: float  # deviation of one run, on the form's scale
    level_deviation: float  # of settings from each other, on that scale

    def value(self, setting: str, images: float) -> float:
        """Return the accuracy; of a setting that was not seen that of their mean level."""
        return self.form.unlink(self.linked(setting, images)[0])

    def linked(self, setting: str, images: float) -> tuple[float, float]:
        """Return the mean on the form's scale, and the variance that the fit leaves it."""
        x = np.array([images / self.unit])
        (row,) = _rows(self.form, _is_of(self.settings, [setting]), x, self.bend)
        mean = float(row @ self.weights)
        if self.form.has_bend:
            row = np.append(row, self.weights[1] * _shape_slope(self.form, x, self.bend))
        unseen = 0.0 if setting in self.settings else self.level_deviation**2
        return mean, float(row @ self.covariance @ row) + unseen


class AccuracyFit(NamedTuple):
    """All that is needed to say what to expect of a study's settings."""

    curves: list[FittedCurve]  # the best first, then the others that are as good
    held_out_error: dict[str, float]  # form -> root mean square, in accuracy
    shortest: float  # images
    longest: float
    factor: float  # of the spread, within the lengths that were measured
    factor_beyond: float
    has_lengths: bool  # else nothing can be said of another length

    def expect(self, setting: str, images: float, seeds: int = 1) -> Expected:
        """Return what one more run of a setting is expected to read after some images.

        Args:
            setting: One of the study's; of another the mean is expected.
            images: That it sees, epochs x images.
            seeds: Of so many runs their mean instead, whose interval is narrower.

        Raises:
            ValueError: All points have one length, and this is another.
        """
        within = images <= self.longest * (1 + 1e-9)
        place: Place = "beyond" if not within else "yes"
        if images < self.shortest * (1 - 1e-9):
            place = "below"
        if not self.has_lengths:
            if not self.longest / ONE_LENGTH <= images <= self.shortest * ONE_LENGTH:
                raise ValueError("all runs have one length: no other can be expected from them")
            place = "yes"
        mean, spread = _spread(self.curves, setting, images, seeds)
        width = (self.factor if place == "yes" else self.factor_beyond) * spread
        unlink = self.curves[0].form.unlink
        return Expected(unlink(mean), unlink(mean - width), unlink(mean + width), place)


def fit_accuracy(points: Sequence[Measured]) -> AccuracyFit:
    """Return what to expect of the settings of one study.

    Args:
        points: Of one metric, one network and one data set; shapes are shared over all of them.

    Raises:
        ValueError: There are fewer than three points, or fewer than two that can be held out; or
            all have one length and no setting has two seeds, so that nothing tells their noise.

    Example:
        >>> points = [
        ...     Measured("a", f"a-{n}", float(n), 0.6 - 2.0 * n**-0.5) for n in (100, 200, 400, 800)
        ... ]
        >>> fit = fit_accuracy(points)
        >>> round(fit.expect("a", 400.0).value, 2)
        0.5
    """
    runs = list(_folds(points, lambda point: point.run))
    if len(points) < FEWEST_POINTS or len(runs) < 2:
        number = counted(len({point.run for point in points}), "run")
        raise ValueError(f"{counted(len(points), 'point')} of {number} are too few to fit")
    has_lengths = _has_lengths(points)
    if not has_lengths and not _has_seeds(points):
        raise ValueError("how far seeds differ was not measured: no setting has two runs")
    forms = list(FORMS) if has_lengths else [FLAT]
    errors = dict.fromkeys((form.name for form in forms), 0.0)
    fitted = [({form: fit_curve(rest, form) for form in forms}, out) for rest, out in runs]
    for form in forms:
        away = [c[form].value(p.setting, p.images) - p.value for c, out in fitted for p in out]
        errors[form.name] = math.sqrt(sum(number**2 for number in away) / len(away))
    least = AS_GOOD * min(errors.values())
    forms = [f for f in sorted(forms, key=lambda f: errors[f.name]) if errors[f.name] <= least]
    scores = [score for c, out in fitted for score in _scores([c[form] for form in forms], out)]
    scores += _scores_of_folds(_cells(points), forms)
    factor = quantile_of(scores, LEVEL)
    images = [point.images for point in points]
    return AccuracyFit(
        [fit_curve(points, form) for form in forms],
        errors,
        min(images),
        max(images),
        factor,
        max(factor, _factor_beyond(points, forms)),
        has_lengths,
    )


def fit_curve(points: Sequence[Measured], form: Form) -> FittedCurve:
    """Return a form fitted by weighted least squares, its bend by a search over the rest.

    Args:
        points: At least one.
        form: Of the law.
    """
    settings = sorted({point.setting for point in points})
    images = np.array([point.images for point in points])
    unit = math.exp(float(np.log(images).mean()))
    levels = _is_of(settings, [point.setting for point in points])
    values = np.array([form.link(point.value) for point in points])
    seeds = np.array([float(point.num_seeds) for point in points])
    within = sum(
        (p.num_seeds - 1) * (p.deviation * form.steepness(p.value)) ** 2 for p in points
    )  # what the deviations over seeds say of the noise, beside how the means scatter
    degrees = int(seeds.sum())
    prior = np.diag([0.0, NO_PRECISION, *[LEVEL_PRECISION] * len(settings)])

    start, deviation, bounds = form.prior

    def solve(bend: float) -> tuple[Float64s, Float64s, float]:
        rows = _rows(form, levels, images / unit, bend)
        precision = rows.T @ (seeds[:, None] * rows) + prior
        weights = np.linalg.solve(precision, rows.T @ (seeds * values))
        rest = values - rows @ weights
        return rows, weights, float(seeds @ rest**2) + within

    def loss(log_bend: float) -> float:
        away = (log_bend - math.log(start)) / deviation
        return degrees * math.log(solve(math.exp(log_bend))[2] + 1e-12) + away**2

    bend = 0.0
    if form.has_bend:
        ends = tuple(map(math.log, bounds))
        best = minimize_scalar(loss, bounds=ends, method="bounded", options=COARSE)
        bend = math.exp(best.x)
    rows, weights, squares = solve(bend)
    fixed = len(settings) + (form.shape != "level") + form.has_bend
    variance = (squares + 1e-12) / max(degrees - fixed, 1)
    levels_apart = float(weights[2:].std(ddof=1)) if len(settings) > 1 else math.sqrt(variance)
    if form.has_bend:
        rows = np.column_stack([rows, weights[1] * _shape_slope(form, images / unit, bend)])
        prior = np.diag([*np.diag(prior), variance / deviation**2])
    precision: Float64s = rows.T @ (seeds[:, None] * rows) + prior
    covariance = np.asarray(variance * np.linalg.inv(precision), dtype=np.float64)
    return FittedCurve(
        form, settings, unit, bend, weights, covariance, math.sqrt(variance), levels_apart
    )


def quantile_of(scores: Sequence[float], level: float) -> float:
    """Return the conformal quantile; of fewer scores than it needs at least Student's.

    Args:
        scores: |error| / spread of held-out points.
        level: The chance that a further score lies below.
    """
    place = math.ceil(level * (len(scores) + 1))
    if place <= len(scores):
        return sorted(scores)[place - 1]
    return max([*scores, float(student.ppf((1 + level) / 2, max(len(scores) - 1, 1)))])


def _is_of(settings: list[str], of: Sequence[str]) -> Float64s:
    """Return 1.0 where a point (row) is of a setting (column)."""
    return np.array([[float(setting == other) for other in settings] for setting in of])


def _rows(form: Form, levels: Float64s, x: Float64s, bend: float) -> Float64s:
    """Return what the weights are multiplied with, a row a point."""
    if form.shape == "power":
        shape = -np.expm1(-bend * np.log(x)) / bend
    elif form.shape == "hyperbola":
        shape = x / (1 + bend * x)
    else:
        shape = np.log(x) * (form.shape == "log")
    return np.column_stack([np.ones_like(x), shape, levels])


def _shape_slope(form: Form, x: Float64s, bend: float) -> Float64s:
    """Return by how much the shape grows with the logarithm of the bend."""
    if form.shape == "hyperbola":
        return -bend * (x / (1 + bend * x)) ** 2
    power = x**-bend
    return power * np.log(x) - (1 - power) / bend


def _spread(
    curves: Sequence[FittedCurve], setting: str, images: float, seeds: int = 1
) -> tuple[float, float]:
    """Return mean and spread of the mean of some seeds, on the scale of the first form."""
    first = curves[0]
    mean, variance = first.linked(setting, images)
    others = [first.form.link(c.value(setting, images)) - mean for c in curves[1:]]
    apart = sum(other**2 for other in others) / max(len(others), 1)
    return mean, math.sqrt(variance + first.noise**2 / seeds + apart)


def _scores_of_folds(
    folds: Sequence[tuple[list[Measured], list[Measured]]], forms: Sequence[Form]
) -> list[float]:
    return [
        score
        for rest, out in folds
        for score in _scores([fit_curve(rest, form) for form in forms], out)
    ]


def _scores(curves: Sequence[FittedCurve], out: Sequence[Measured]) -> list[float]:
    """Return |error| / spread of each point, none of which the curves were fitted to."""
    scores = []
    for point in out:
        mean, spread = _spread(curves, point.setting, point.images, point.num_seeds)
        scores.append(abs(curves[0].form.link(point.value) - mean) / spread)
    return scores


def _folds(
    points: Sequence[Measured], group_of: Callable[[Measured], object]
) -> Iterator[tuple[list[Measured], list[Measured]]]:
    """Yield what is left and what is held out, a group at a time; nothing is left of one group."""
    for group in dict.fromkeys(map(group_of, points)):
        rest = [point for point in points if group_of(point) != group]
        if rest:
            yield rest, [point for point in points if group_of(point) == group]


def _cells(points: Sequence[Measured]) -> list[tuple[list[Measured], list[Measured]]]:
    """Return the folds of a setting at a length with all seeds, where none reads on elsewhere."""
    lengths: dict[str, set[float]] = {}
    for point in points:
        lengths.setdefault(point.run, set()).add(point.images)
    if not _has_lengths(points) or any(len(seen) > 1 for seen in lengths.values()):
        return []
    return list(_folds(points, lambda point: (point.setting, point.images)))


def _factor_beyond(points: Sequence[Measured], forms: Sequence[Form]) -> float:
    """Return the factor that the longest points need when predicted from the shorter ones.

    Where too few lengths are left for that, Student's for one degree of freedom.
    """
    cut = max(point.images for point in points) / ONE_LENGTH
    shorter = [point for point in points if point.images <= cut]
    if len(shorter) < FEWEST_POINTS or not _has_lengths(shorter):
        return float(student.ppf((1 + LEVEL) / 2, 1))
    longer = [point for point in points if point.images > cut]
    return quantile_of(_scores_of_folds([(shorter, longer)], forms), LEVEL)


def _has_seeds(points: Sequence[Measured]) -> bool:
    settings = [point.setting for point in points]
    return any(p.num_seeds > 1 for p in points) or len(settings) > len(set(settings))


def _has_lengths(points: Sequence[Measured]) -> bool:
    images = [point.images for point in points]
    return max(images) > ONE_LENGTH * min(images)
