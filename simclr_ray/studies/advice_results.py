"""What the trials of `study advise` gave: values by setting and seed, and the finalists' gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.studies.advice_space import DEFAULT, AdditiveFit
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.readings import values_at

SETTING: Final = "setting"  # the one dimension of both studies


class Finalist(NamedTuple):
    """A setting of the second study.

    Attributes:
        name: Its levels, or `DEFAULT`.
        value: Mean of the metric over seeds.
        gain: Above the experiment as it is, paired by seed.
        error: Standard error of the gain.
        images: That its trials were trained on.
        seconds: That its trials took, one after the other.
    """

    name: str
    value: float
    gain: float
    error: float
    images: float
    seconds: float


def values_by_setting(folder: StudyFolder, metric: str) -> dict[str, dict[int, float]]:
    """Return setting -> seed -> value, of trials that gave one that is a number."""
    values: dict[str, dict[int, float]] = {}
    for outcome in folder.outcomes():
        value = values_at(outcome).get(metric, math.nan)
        if outcome.status == "finished" and math.isfinite(value):
            values.setdefault(str(outcome.cells[0]["point"][SETTING]), {})[outcome.seed] = value
    return values


def finalists_of(folder: StudyFolder, metric: str, fit: AdditiveFit) -> list[Finalist]:
    """Return the settings of the second study, the best first; a tie is won by what it is now.

    Args:
        folder: Of the second study.
        metric: By which it was evaluated.
        fit: Of the first study.

    Raises:
        ConfigError: The experiment as it is gave no result, so there is nothing to gain on.
    """
    values = values_by_setting(folder, metric)
    before = values.get(DEFAULT)
    if not before:
        problem = "the experiment as it is gave no result in the second study: see its report"
        raise ConfigError([ConfigIssue("study advise", problem)])
    gains = {n: [v[s] - before[s] for s in v if s in before] for n, v in values.items()}
    deviation = _deviation([g for n, g in gains.items() if n != DEFAULT], fit)
    costs = _costs(folder)
    ends = [
        Finalist(
            name,
            mean_of(values[name]),
            statistics.fmean(gain),
            0.0 if name == DEFAULT else deviation / math.sqrt(len(gain)),
            *costs[name],
        )
        for name, gain in gains.items()
        if gain
    ]
    return sorted(ends, key=lambda end: (-end.gain, end.name != DEFAULT))


def _deviation(gains: Sequence[Sequence[float]], fit: AdditiveFit) -> float:
    """Return the standard deviation of a gain of one seed, by all that says something of it.

    Differences of paired seeds are few; a trial's distance from what adds up says more, and too
    much rather than too little, since it holds what does not add up as well.
    """
    squares = sum(statistics.variance(gain) * (len(gain) - 1) for gain in gains if len(gain) > 1)
    freedom = sum(len(gain) - 1 for gain in gains if len(gain) > 1)
    if fit.freedom:
        squares += 2 * fit.deviation**2 * fit.freedom  # of a difference, twice that of one
        freedom += fit.freedom
    return math.sqrt(squares / freedom) if freedom else math.nan


def _costs(folder: StudyFolder) -> dict[str, tuple[float, float]]:
    """Return setting -> images and seconds of its trials."""
    costs: dict[str, tuple[float, float]] = {}
    for outcome in folder.outcomes():
        name = str(outcome.cells[0]["point"][SETTING])
        images, seconds = costs.get(name, (0.0, 0.0))
        costs[name] = images + outcome.cost["images"], seconds + outcome.cost["seconds"]
    return costs


def mean_of(values: Mapping[int, float]) -> float:
    """Return the mean over seeds."""
    return statistics.fmean(values.values())
