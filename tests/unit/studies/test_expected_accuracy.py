"""Lengths that were not run: laws are recovered, and intervals hold as many runs as they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from simclr_ray.studies.expected_accuracy import (
    FLAT,
    LOGIT_LOG,
    LOGIT_POWER,
    ONE_LENGTH,
    POWER,
    Measured,
    fit_accuracy,
    fit_curve,
    quantile_of,
)

LENGTHS = (2e4, 4e4, 8e4, 16e4)
LEVELS = {"a": 0.80, "b": 0.83, "c": 0.78}
NOISE = 0.006


def law(setting: str, images: float) -> float:
    """Return a known law: a floor of each setting, one slope and one exponent."""
    return LEVELS[setting] - 20 * math.pow(images, -0.4)


def hyperbola(setting: str, images: float) -> float:
    """Return a law that ends sooner than powers do."""
    return LEVELS[setting] - 0.5 / (1 + images / 5e4)


def logarithm(setting: str, images: float) -> float:
    """Return a law without a floor of the error."""
    return 1 / (1 + math.exp(-LEVELS[setting] - 0.4 * math.log(images / 5e4)))


def drawn(
    seed: int,
    lengths: Sequence[float] = LENGTHS,
    seeds: int = 2,
    noise: float = NOISE,
    law: Callable[[str, float], float] = law,
) -> list[Measured]:
    """Return runs of the law, each length a run of its own."""
    rng = np.random.default_rng(seed)
    return [
        Measured(s, f"{s}-{n}-{k}", n, law(s, n) + noise * rng.standard_normal())
        for s in LEVELS
        for n in lengths
        for k in range(seeds)
    ]


def test_level_slope_and_exponent_of_a_power_law_are_recovered() -> None:
    curve = fit_curve(drawn(0, [1e4 * 2**k for k in range(8)], 2, 1e-4), POWER)
    assert curve.bend == pytest.approx(0.4, rel=0.05)
    for setting, level in LEVELS.items():
        floor = curve.value(setting, 1e15)
        assert floor == pytest.approx(level, abs=0.01)
        assert curve.value(setting, 5e4) == pytest.approx(law(setting, 5e4), abs=5e-4)
    assert curve.noise == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize("form", [LOGIT_POWER, LOGIT_LOG], ids=lambda form: form.name)
def test_laws_of_the_logit_are_recovered_and_chosen(form: object) -> None:
    def value(n: float) -> float:
        logit = 0.4 * math.log(n / 5e4) if form is LOGIT_LOG else 1.5 - 30 * n**-0.35
        return 1 / (1 + math.exp(-logit))

    lengths = [1e4 * 3**k for k in range(7)]
    points = [Measured("a", f"a-{n}", n, value(n)) for n in lengths]
    fit = fit_accuracy(points)
    assert fit.curves[0].value("a", 7e4) == pytest.approx(value(7e4), abs=2e-3)
    assert min(fit.held_out_error.values()) < 0.3 * fit.held_out_error[POWER.name]


@pytest.mark.parametrize("law", [law, hyperbola, logarithm], ids=lambda law: law.__name__)
def test_intervals_hold_nine_of_ten_new_runs_within_and_beyond_the_lengths(
    law: Callable[[str, float], float],
) -> None:
    inside: dict[float, list[bool]] = {6e4: [], 64e4: []}
    for trial in range(30):
        fit = fit_accuracy(drawn(trial, law=law))
        rng = np.random.default_rng(1000 + trial)
        for images, hits in inside.items():
            for setting in LEVELS:
                for value in law(setting, images) + NOISE * rng.standard_normal(20):
                    expected = fit.expect(setting, images)
                    hits.append(expected.low <= value <= expected.high)
    assert np.mean(inside[6e4]) >= 0.87
    assert np.mean(inside[64e4]) >= 0.87


@pytest.mark.parametrize("seed", [3, 4, 6])
def test_an_interval_is_wider_the_further_it_is_beyond_what_was_measured(seed: int) -> None:
    fit = fit_accuracy(drawn(seed))
    at = [fit.expect("a", images) for images in (8e4, 16e4, 17e4, 64e4, 256e4)]
    widths = [expected.high - expected.low for expected in at]
    assert [expected.measured for expected in at] == ["yes", "yes", "beyond", "beyond", "beyond"]
    assert widths[1] < widths[2] < widths[3] < widths[4]
    assert widths[3] > 1.3 * max(widths[:2])
    assert widths[4] > 1.9 * max(widths[:2])
    assert fit.expect("a", 1e4).measured == "below"


def test_noisier_seeds_make_wider_intervals() -> None:
    def width(noise: float) -> float:
        expected = fit_accuracy(drawn(5, noise=noise)).expect("a", 8e4)
        return expected.high - expected.low

    assert width(0.02) > 2 * width(0.005)
    # of a mean of many seeds the noise is that of one of them, by the deviation
    means = [Measured(s, f"{s}-{n}", n, law(s, n), 5, 0.02) for s in LEVELS for n in LENGTHS]
    assert fit_curve(means, POWER).noise == pytest.approx(0.02, rel=0.25)


def test_a_setting_that_was_not_seen_is_expected_at_the_mean_with_a_wider_interval() -> None:
    fit = fit_accuracy(drawn(7))
    seen, other = fit.expect("a", 8e4), fit.expect("new", 8e4)
    assert other.high - other.low > 1.5 * (seen.high - seen.low)
    assert other.value == pytest.approx(np.mean([law(s, 8e4) for s in LEVELS]), abs=0.01)


def test_one_length_is_not_extrapolated() -> None:
    fit = fit_accuracy(drawn(1, [8e4], 3))
    assert not fit.has_lengths
    assert fit.curves[0].form is FLAT
    assert fit.expect("b", 8e4).value == pytest.approx(law("b", 8e4), abs=0.01)
    with pytest.raises(ValueError, match="one length"):
        fit.expect("b", 8e4 * ONE_LENGTH * 1.01)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="2 points of 2 runs are too few"):
        fit_accuracy(drawn(1)[:2])
    with pytest.raises(ValueError, match="no setting has two runs"):
        fit_accuracy(drawn(1, [8e4], 1))
    one_run = [point._replace(run="one") for point in drawn(1)]
    with pytest.raises(ValueError, match="24 points of 1 run are too few"):
        fit_accuracy(one_run)


def test_expected_values_stay_fractions() -> None:
    points = [Measured("a", f"{n}-{k}", n, 0.99 - 0.1 / k) for n in (1e4, 4e4) for k in (1, 2, 3)]
    fit = fit_accuracy(points)
    for images in (1.0, 1e4, 1e12):
        expected = fit.expect("a", images)
        assert 0 <= expected.low <= expected.value <= expected.high <= 1


def test_the_conformal_quantile_needs_nine_scores_for_nine_of_ten() -> None:
    scores = [float(k) for k in range(1, 10)]
    assert quantile_of(scores, 0.9) == 9
    assert quantile_of([*scores, 10.0], 0.9) == 10
    assert quantile_of([float(k) for k in range(1, 20)], 0.9) == 18
    assert quantile_of([0.1, 0.2], 0.9) == pytest.approx(6.3138, abs=1e-3)  # t of one degree
    assert quantile_of([7.0, 0.2], 0.9) == 7
