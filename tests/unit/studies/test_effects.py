"""The effect of a claim: intervals that hold the truth, the power, and what may be said."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp

from simclr_ray.data.arrays import Float64s
from simclr_ray.studies.effects import (
    MAX_EXACT_SEEDS,
    effect_of,
    holm,
    interval_of,
    power_of,
    seeds_for_width,
    seeds_needed,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], Float64s]


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Float64s:
    return rng.normal(size=shape)


def skewed(rng: np.random.Generator, shape: tuple[int, int]) -> Float64s:
    """Return a gamma of shape 4 less its mean, whose skewness is 1."""
    return rng.gamma(4, size=shape) - 4


# 0.93 and not 0.95: a skewness of 1 costs Student's interval a point and a half at five seeds. The
# samples put 1.5 (five seeds) to 3 (ten) standard errors between the limit and what is expected.
@pytest.mark.parametrize("draw", [normal, skewed])
@pytest.mark.parametrize(("num", "samples"), [(5, 4000), (8, 1000), (10, 1000)])
def test_intervals_hold_the_truth_of_normal_and_of_skewed_differences(
    draw: Draw, num: int, samples: int
) -> None:
    rows = draw(np.random.default_rng(1), (samples, num))
    intervals = [interval_of(row.tolist()) for row in rows]
    assert np.mean([low <= 0 <= high for low, high in intervals]) >= 0.93


def enumerated(differences: list[float]) -> tuple[float, float]:
    """Return the expanded percentile interval over all n^n resamples, written out."""
    num = len(differences)
    means = np.sort([np.mean(s) for s in itertools.product(differences, repeat=num)])
    tail = norm.cdf(-math.sqrt(num / (num - 1)) * t.ppf(0.975, num - 1))
    at = math.ceil(tail * len(means)) - 1
    return float(means[at]), float(means[-1 - at])


@pytest.mark.parametrize("num", [3, 5, 6])
def test_the_interval_is_that_of_all_resamples_or_student_s_where_that_is_wider(num: int) -> None:
    differences = np.random.default_rng(num).gamma(1.5, size=num).tolist()
    student = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    low, high = enumerated(differences)
    expected = (min(low, student.low), max(high, student.high))
    assert interval_of(differences) == pytest.approx(expected, rel=1e-12)


def test_what_is_drawn_of_many_seeds_is_close_to_all_resamples_and_repeats() -> None:
    num = MAX_EXACT_SEEDS + 1
    differences = np.random.default_rng(0).exponential(size=num).tolist()
    samples = list(itertools.combinations_with_replacement(range(num), num))
    ways = [
        math.factorial(num) / math.prod(map(math.factorial, Counter(s).values())) for s in samples
    ]
    means = np.array([np.mean([differences[i] for i in s]) for s in samples])
    order = np.argsort(means)
    tail = norm.cdf(-math.sqrt(num / (num - 1)) * t.ppf(0.975, num - 1))
    highest = means[order][np.searchsorted(np.cumsum(np.array(ways)[order]) / num**num, 1 - tail)]
    high = interval_of(differences).high
    assert interval_of(differences).high == high
    student = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert highest > student.high  # else the next line says nothing of resamples
    assert high - np.mean(differences) == pytest.approx(highest - np.mean(differences), rel=0.05)


@pytest.mark.parametrize("num", [2, 4, 9, 14])
def test_intervals_move_scale_and_turn_with_the_differences(num: int) -> None:
    values = np.random.default_rng(num).normal(size=num)
    low, high = interval_of(values.tolist())
    assert interval_of((3 * values + 7).tolist()) == pytest.approx((3 * low + 7, 3 * high + 7))
    turned = interval_of((-values).tolist())
    # the draw of many seeds is not symmetric; of few all resamples count
    assert turned == pytest.approx((-high, -low), rel=1e-9 if num <= MAX_EXACT_SEEDS else 0.1)


@pytest.mark.parametrize(
    ("effect", "num"), [(0.0, 5), (0.5, 5), (1.0, 8), (2.0, 3), (1.5, 5), (0.5, 34)]
)
def test_the_power_is_how_often_the_t_test_finds_the_effect(effect: float, num: int) -> None:
    samples = 20_000  # a standard error of 0.0035 at most
    rows = np.random.default_rng(0).normal(effect, 1.0, (samples, num))
    found = float((ttest_1samp(rows, 0.0, axis=1).pvalue < 0.05).mean())
    assert power_of(effect, 1.0, num) == pytest.approx(found, abs=0.012)


# Cohen (1988) and G*Power 3.1: matched pairs, two-sided 5 %, power 0.8.
@pytest.mark.parametrize(("size", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_seeds_needed_are_those_of_the_textbook(size: float, pairs: int) -> None:
    assert seeds_needed(size, 1.0) == pairs
    assert power_of(size, 1.0, pairs) >= 0.8 > power_of(size, 1.0, pairs - 1)


def test_the_power_of_large_and_of_certain_effects_is_one() -> None:
    assert power_of(1e6, 1.0, 5) == power_of(0.1, 0.0, 2) == 1.0
    assert seeds_needed(0.1, 0.0) == 2
    assert power_of(0.3, 1.0, 9) == power_of(-0.3, 1.0, 9)


def test_an_interval_as_narrow_as_the_effect_cannot_hold_none_and_it() -> None:
    num = seeds_for_width(1.0, 1.0)
    widths = [2 * t.ppf(0.975, n - 1) / math.sqrt(n) for n in (num - 1, num)]
    assert widths[1] < 1.0 <= widths[0]


@pytest.mark.parametrize(
    ("differences", "smallest", "outcome"),
    [
        ([0.02, 0.03, 0.04, 0.03, 0.02], 0.0, "appears"),
        ([-0.02, -0.03, -0.04, -0.03, -0.02], 0.01, "is reversed"),
        ([0.001, -0.001, 0.002, -0.002, 0.0], 0.02, "does not appear"),
        ([0.001, -0.001, 0.002, -0.002, 0.0], 0.0, "cannot be said"),  # absence of what?
        ([0.03, -0.03, 0.04, -0.04, 0.0], 0.02, "cannot be said"),
        ([0.03], 0.02, "cannot be said"),
        ([0.03, 0.02], 0.02, "cannot be said"),  # two of a sign are a coin
    ],
)
def test_what_may_be_said(differences: list[float], smallest: float, outcome: str) -> None:
    assert effect_of(differences, smallest).outcome == outcome


def test_what_cannot_be_said_names_the_seeds_that_would_decide() -> None:
    weak = effect_of([0.03, -0.03, 0.04, -0.04, 0.0], 0.02)
    assert weak.power < 0.8
    assert weak.seeds_needed == seeds_for_width(0.02, weak.deviation)
    assert weak.seeds_needed > seeds_needed(0.02, weak.deviation) > 5
    assert effect_of([0.02, 0.03, 0.04, 0.03, 0.02], 0.01).seeds_needed == 0


@pytest.mark.parametrize("mean", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_with_the_seeds_that_are_named_it_is_decided(mean: float) -> None:
    def drawn(num: int) -> list[float]:
        values = np.random.default_rng(3).normal(size=num)
        return list(mean + 0.96 * (values - values.mean()) / values.std(ddof=1))

    first = effect_of(drawn(7), 1.2)
    assert first.outcome == "cannot be said"
    assert first.seeds_needed > 7
    assert effect_of(drawn(first.seeds_needed), 1.2).outcome != "cannot be said"


def test_a_p_value_is_that_of_a_paired_t_test_and_several_are_corrected() -> None:
    differences = [0.4, 1.1, 0.2, 0.9, -0.1, 0.7]
    assert effect_of(differences).p == pytest.approx(ttest_1samp(differences, 0.0).pvalue)
    assert effect_of([1.0]).p == 1.0
    assert effect_of([0.0, 0.0]).p == 1.0
    # Holm (1979), by hand: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 no smaller than that
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_few_equal_differences_tell_no_deviation_and_decide_nothing() -> None:
    """Two accuracies of 1,000 images often agree; six of six of one sign are not chance."""
    few = effect_of([0.81 - 0.80, 0.71 - 0.70], smallest_effect=0.005)  # 1e-17 apart
    assert few.outcome == "cannot be said"
    assert (few.low, few.high, few.p, few.seeds_needed) == (-math.inf, math.inf, 1.0, 6)
    assert few.words == "cannot be said at this budget: needs 6 seeds"
    assert effect_of([0.0] * 5, smallest_effect=0.005).outcome == "cannot be said"
    enough = effect_of([0.01] * 6, smallest_effect=0.005)
    assert enough.outcome == "appears"
    assert enough.p == 2 / 2**6
    assert effect_of([0.0] * 6, smallest_effect=0.005).outcome == "does not appear"


def test_accuracies_of_few_images_are_not_told_apart_more_often_than_five_in_a_hundred() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.binomial(1000, 0.6, size=(2000, 2, 2)) / 1000
    outcomes = [effect_of(list(a - b), 0.005).outcome for a, b in drawn]
    assert sum(o in {"appears", "is reversed"} for o in outcomes) / len(outcomes) < 0.06


def test_power_that_is_enough_and_an_interval_that_holds_both_need_more_seeds() -> None:
    differences = [0.02 + x for x in (-0.0145, -0.0145, 0.0, 0.0145, 0.0145)]
    effect = effect_of([d - 0.0095 for d in differences], 0.025)
    assert effect.outcome == "cannot be said"
    assert effect.power >= 0.8
    assert effect.seeds_needed == max(6, seeds_for_width(0.025, effect.deviation))


def test_more_seeds_than_are_counted_are_said_so() -> None:
    words = effect_of([1.0, -1.0, 1.0, -1.0, 0.0], 1e-5).words
    assert words == "cannot be said at this budget: needs more than 100,000 seeds"


def test_absence_is_rarely_said_of_an_effect_that_is_there() -> None:
    rows = np.random.default_rng(3).normal(0.02, 0.01, (600, 8))  # as large as is of interest
    said = [effect_of(row.tolist(), 0.02).outcome == "does not appear" for row in rows]
    assert np.mean(said) <= 0.045  # a tail of 2.5 %, and three standard errors of the sample
