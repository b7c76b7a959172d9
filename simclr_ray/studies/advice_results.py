"""What the trials of `study advise` gave: values by setting and seed, and the finalists' gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from simclr_ray.config.wording import counted
from simclr_ray.errors import RunError
from simclr_ray.studies.advice_space import DEFAULT, AdditiveFit
from simclr_ray.studies.effects import student_quantile
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.readings import values_at

SETTING: Final = "setting"  # the one dimension of both studies


class Finalist(NamedTuple):
    """A setting of the second study.

    Attributes:
        name: Its levels, or `DEFAULT`.
        value: Mean of the metric over the seeds that the experiment as it is has as well.
        gain: Above the experiment as it is, paired by seed.
        error: Standard error of the gain; NaN where nothing is left to tell it from.
        is_clear: Whether the gain is not by chance: at 5 %, of all finalists together.
        images: That its trials were trained on.
        seconds: That its trials took, one after the other.
    """

    name: str
    value: float
    gain: float
    error: float
    is_clear: bool
    images: float
    seconds: float


def ensure_none_failed(folder: StudyFolder) -> None:
    """Raise `RunError` where a trial failed, which the next call tries again; collapsing is none.

    Its value would change what is chosen, and with it a study that is begun.
    """
    failed = [outcome for outcome in folder.outcomes() if outcome.status == "failed"]
    if failed:
        first = failed[0]
        raise RunError(
            f"{counted(len(failed), 'trial')} of {folder.uri} failed, and the same command tries "
            f"again; {first.trial}: {first.reason}"
        )


def values_by_setting(folder: StudyFolder, metric: str) -> dict[str, dict[int, float]]:
    """Return setting -> seed -> value, of trials that gave one that is a number."""
    values: dict[str, dict[int, float]] = {}
    for outcome in folder.outcomes():
        value = values_at(outcome).get(metric, math.nan)
        if outcome.status == "finished" and math.isfinite(value):
            for name in _settings(outcome):
                values.setdefault(name, {})[outcome.seed] = value
    return values


def _settings(outcome: TrialOutcome) -> Iterator[str]:
    """Yield the settings of a trial: settings that are one experiment share it."""
    for cell in outcome.cells:
        yield str(cell["point"][SETTING])


def images_trained(folder: StudyFolder) -> float:
    """Return how many images all trials of a study were trained on."""
    return sum(outcome.cost["images"] for outcome in folder.outcomes())


def finalists_of(folder: StudyFolder, metric: str, fit: AdditiveFit) -> list[Finalist]:
    """Return the settings of the second study, the best first; a tie is won by what it is now.

    Args:
        folder: Of the second study.
        metric: By which it was evaluated.
        fit: Of the first study.

    Raises:
        RunError: The experiment as it is gave no result, so there is nothing to gain on.
    """
    values = values_by_setting(folder, metric)
    before = values.get(DEFAULT)
    if not before:
        raise RunError(f"the experiment as it is gave no result: see {folder.report}")
    gains = {n: [v[s] - before[s] for s in v if s in before] for n, v in values.items()}
    # a setting that is the experiment as it is shares its trials, and says nothing of chance
    same = {name for o in folder.outcomes() if DEFAULT in _settings(o) for name in _settings(o)}
    others = [gain for name, gain in gains.items() if name not in same and gain]
    deviation, freedom = _deviation(others, fit)
    costs = _costs(folder)
    ends = []
    for name, gain in gains.items():
        if not gain:
            continue
        mean = statistics.fmean(gain)
        error = 0.0 if name == DEFAULT else deviation / math.sqrt(len(gain))
        is_clear = bool(others) and mean > _quantile(freedom, len(others)) * error
        value = statistics.fmean(values[name][seed] for seed in values[name] if seed in before)
        ends.append(Finalist(name, value, mean, error, is_clear, *costs[name]))
    return sorted(ends, key=lambda end: (-end.gain, end.name != DEFAULT))


def _deviation(gains: Sequence[Sequence[float]], fit: AdditiveFit) -> tuple[float, int]:
    """Return the standard deviation of a gain of one seed by all that says something of it.

    Differences of paired seeds are few; a trial's distance from what adds up says more. It holds
    what does not add up as well, and no benefit of paired seeds.

    Returns:
        The deviation and its degrees of freedom; NaN and 0 where nothing says anything.
    """
    squares = sum(statistics.variance(gain) * (len(gain) - 1) for gain in gains if len(gain) > 1)
    freedom = sum(len(gain) - 1 for gain in gains if len(gain) > 1)
    if fit.freedom:
        squares += 2 * fit.deviation**2 * fit.freedom  # of a difference, twice that of one
        freedom += fit.freedom
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def _quantile(freedom: int, comparisons: int) -> float:
    """Return how many errors above 0 a gain must lie, one of several compared; NaN: no telling."""
    return student_quantile(freedom, 0.025 / comparisons) if freedom and comparisons else math.nan


def _costs(folder: StudyFolder) -> dict[str, tuple[float, float]]:
    """Return setting -> images and seconds of its trials."""
    costs: dict[str, tuple[float, float]] = {}
    for outcome in folder.outcomes():
        for name in _settings(outcome):
            images, seconds = costs.get(name, (0.0, 0.0))
            costs[name] = images + outcome.cost["images"], seconds + outcome.cost["seconds"]
    return costs
