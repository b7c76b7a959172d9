"""What `study advise` tries, and what its trials say of what it has not tried.

24 settings are the product of four factors. Half of them are trained, of each pair of levels as
many, so that the effect of a level is read off all trials. Effects are taken to add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from simclr_ray.config.experiment import Experiment, SimCLRViewsConfig
from simclr_ray.errors import ConfigError

SLOWER: Final = 3.0  # times slower is the other rate that is tried
NO_COLOR: Final = {"augment.strength": 0.0, "augment.grayscale": 0.0}
DEFAULT: Final = "as it is"  # the name of the setting that the experiment has

Setting = dict[str, str]  # factor -> the name of its level
Levels = dict[str, dict[str, Any]]  # name of a level -> path of the experiment -> value


class LevelEffect(NamedTuple):
    """What a level of a factor gives, against the mean of its levels.

    Attributes:
        factor: Name of the factor.
        level: Name of the level.
        effect: In the unit of what was measured.
        error: Its standard error.
    """

    factor: str
    level: str
    effect: float
    error: float


class AdditiveFit(NamedTuple):
    """What trials say where the effects of factors add up.

    Attributes:
        effects: Of each level of each factor.
        predicted: Of every setting, by its name.
        deviation: Of one trial from what is predicted; NaN where there are as many effects.
        freedom: Its degrees of freedom.
        num_trials: That say so.
    """

    effects: list[LevelEffect]
    predicted: dict[str, float]
    deviation: float
    freedom: int
    num_trials: int


def factors_of(experiment: Experiment) -> dict[str, Levels]:
    """Return what is varied about an experiment: factor -> level -> path -> value.

    Raises:
        ConfigError: Its views or its loss have no such settings.
    """
    if not isinstance(experiment.augment, SimCLRViewsConfig):
        raise ConfigError.of("augment.name", "must be simclr: its crops are varied")
    if not experiment.loss.fixed_temperature:
        problem = f"must have a temperature that is not learned, got {experiment.loss.name}"
        raise ConfigError.of("loss.name", problem)
    rate = experiment.schedule.learning_rate
    rates = (rate, float(f"{rate / SLOWER:.3g}"))
    colors: Levels = {"none": NO_COLOR} if experiment.data.channels == 3 else {}
    colors |= {f"{s:g}": {"augment.strength": s} for s in (0.5, 1.0)}
    return {
        "color": colors,
        "temperature": {f"{t:g}": {"loss.temperature": t} for t in (0.1, 0.5)},
        "smallest crop": {f"{a:g}": {"augment.min_area": a} for a in (0.08, 0.3)},
        "rate": {f"{r:g}": {"schedule.learning_rate": r} for r in rates},
    }


def settings_of(factors: Mapping[str, Levels]) -> list[Setting]:
    """Return every setting, the first factor slowest."""
    names = list(factors)
    return [
        dict(zip(names, levels, strict=True)) for levels in itertools.product(*factors.values())
    ]


def tried_of(factors: Mapping[str, Levels]) -> list[Setting]:
    """Return every other setting, of each level and of each pair of levels as many.

    The sum of the levels' numbers is even. Of three levels the middle one changes sides with the
    others, so that no effect of one factor is mixed up with that of two others throughout. Of two
    factors every setting: half of them would not say what each level gives.
    """
    if len(factors) < 3:
        return settings_of(factors)
    number = {
        name: {level: at for at, level in enumerate(levels)} for name, levels in factors.items()
    }
    return [s for s in settings_of(factors) if sum(number[f][v] for f, v in s.items()) % 2 == 0]


def name_of(setting: Setting) -> str:
    """Return a setting as text: its levels, with their factors."""
    return ", ".join(f"{factor} {level}" for factor, level in setting.items())


def values_of(setting: Setting, factors: Mapping[str, Levels]) -> dict[str, Any]:
    """Return path -> value of a setting."""
    return {p: v for factor, level in setting.items() for p, v in factors[factor][level].items()}


def fit_effects(factors: Mapping[str, Levels], measured: Mapping[str, float]) -> AdditiveFit:
    """Return what settings give if effects add up, by least squares.

    Args:
        factors: As `factors_of` returns them.
        measured: Name of a setting (`name_of`) -> what its trial gave; the others are predicted.

    Raises:
        ConfigError: Too few settings are measured to say what each level gives.
    """
    settings = {name_of(setting): setting for setting in settings_of(factors)}
    rows = {name: _contrasts(setting, factors) for name, setting in settings.items()}
    x = np.array([rows[name] for name in measured])
    y = np.array(list(measured.values()), dtype=np.float64)
    if len(y) == 0 or np.linalg.matrix_rank(x) < x.shape[1]:
        problem = f"{len(y)} trials gave a result: too few to say what each level gives"
        raise ConfigError.of("study advise", problem)
    inverse = np.linalg.inv(x.T @ x)
    weights = inverse @ x.T @ y
    freedom = len(y) - x.shape[1]
    residuals = y - x @ weights
    deviation = math.sqrt(float(residuals @ residuals) / freedom) if freedom else math.nan
    effects = []
    for (factor, level), row in _level_rows(factors).items():
        error = deviation * math.sqrt(float(row @ inverse @ row))
        effects.append(LevelEffect(factor, level, float(row @ weights), error))
    predicted = {name: float(np.array(row) @ weights) for name, row in rows.items()}
    return AdditiveFit(effects, predicted, deviation, freedom, len(y))


def _contrasts(setting: Setting, factors: Mapping[str, Levels]) -> list[float]:
    """Return a setting in numbers: 1, and for each level but a factor's last 1, 0, or -1 there."""
    row = [1.0]
    for factor, levels in factors.items():
        names = list(levels)
        last = setting[factor] == names[-1]
        row += [-1.0 if last else float(setting[factor] == name) for name in names[:-1]]
    return row


def _level_rows(factors: Mapping[str, Levels]) -> dict[tuple[str, str], Any]:
    """Return for each level the row that gives its effect alone."""
    rows, start = {}, 1
    width = 1 + sum(len(levels) - 1 for levels in factors.values())
    for factor, levels in factors.items():
        for at, level in enumerate(levels):
            row = np.zeros(width)
            if at < len(levels) - 1:
                row[start + at] = 1.0
            else:
                row[start : start + len(levels) - 1] = -1.0
            rows[factor, level] = row
        start += len(levels) - 1
    return rows


def predicted_best(
    fit: AdditiveFit, factors: Mapping[str, Levels], number: int
) -> Sequence[Setting]:
    """Return the settings that are predicted to be best, the best first."""
    order = sorted(fit.predicted, key=lambda name: -fit.predicted[name])
    settings = {name_of(setting): setting for setting in settings_of(factors)}
    return [settings[name] for name in order[:number]]
