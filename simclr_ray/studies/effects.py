"""The effect of a claim over paired seeds: its size, its interval, the power, and what may be said.

A p value alone says neither how large a difference is nor whether the seeds could have shown one.
The interval is the expanded percentile bootstrap of Hesterberg (2015, arXiv:1411.5279, section 4):
the percentile bootstrap is too narrow by sqrt((n - 1) / n) and by normal in place of Student's
quantiles, so its tail is Φ(-sqrt(n / (n - 1)) t) instead of 2.5 %. No resample of five seeds lies
outside of them, and that interval holds the truth in 91.9 % of normal samples and 90.9 % of skewed
ones (gamma of shape 4); it is therefore never narrower than Student's, and then holds it in 94.9
and 93.5 %. From eight seeds on both agree (`tests/unit/studies/test_effects.py`).
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, Literal, NamedTuple

import numpy as np

from simclr_ray.data.arrays import Float64s

CONFIDENCE: Final = 0.95
ENOUGH_POWER: Final = 0.8  # the custom (Cohen 1988)
ROUNDING: Final = 1e-9  # differences of accuracies that are nearer than this are equal
MAX_EXACT_SEEDS: Final = 8  # 6,435 different resamples; of 10 there are 92,378, a second to sort
RESAMPLES: Final = 20_000  # of more seeds, drawn with a fixed seed
FEWEST_EQUAL: Final = 6  # differences without any deviation: by their signs alone, 2 / 2 ** 6 < 5 %
MAX_SEEDS: Final = 100_000  # more that would be needed are not counted

Outcome = Literal["appears", "does not appear", "is reversed", "cannot be said"]
UNDECIDED: Final = "cannot be said"


class Interval(NamedTuple):
    """Where the mean of differences lies, at 95 % confidence."""

    low: float
    high: float


class Effect(NamedTuple):
    """The difference that a claim is about, over paired seeds, in the unit of the metric.

    Attributes:
        mean: Of the differences; above 0 is as claimed.
        low: Lower end of the interval; minus infinity of one seed, or of fewer than six that are
            equal: accuracies are multiples of one image, and agree by chance.
        high: Upper end.
        deviation: Standard deviation of the differences, of the sample; NaN where there is no
            interval.
        num_seeds: How many differences there are.
        smallest_effect: The smallest that is of interest; 0: none is given.
        power: Chance that the test finds `smallest_effect`, in [0, 1]; NaN where unknown.
        seeds_needed: Seeds that would decide at this deviation; 0: decided, or unknown.
        outcome: What may be said of the claim.
    """

    mean: float
    low: float
    high: float
    deviation: float
    num_seeds: int
    smallest_effect: float
    power: float
    seeds_needed: int
    outcome: Outcome

    @property
    def p(self) -> float:
        """Of Student's paired test that the mean is 0, two-sided; 1 where there is no interval."""
        from scipy.stats import t

        if math.isnan(self.deviation):
            return 1.0
        if self.deviation <= ROUNDING:
            return 2.0 ** (1 - self.num_seeds) if self.mean else 1.0
        statistic = abs(self.mean) / self.deviation * math.sqrt(self.num_seeds)
        return float(2 * t.sf(statistic, self.num_seeds - 1))

    @property
    def words(self) -> str:
        """The outcome as a report says it, no stronger than the seeds allow."""
        if self.outcome == "appears" and self.high < self.smallest_effect:
            return "appears, but smaller than is of interest"
        if self.outcome != UNDECIDED:
            return self.outcome
        most = "more than " * (self.seeds_needed >= MAX_SEEDS)
        why = f"needs {most}{self.seeds_needed:,} seeds"
        if self.num_seeds < 2:
            why = "one seed has no interval"
        elif not self.smallest_effect:
            why = "no smallest effect is given"
        return f"cannot be said at this budget: {why}"


def effect_of(differences: Sequence[float], smallest_effect: float = 0.0) -> Effect:
    """Return the effect of paired differences, one a seed; there must be one at least.

    Args:
        differences: Of each seed, better minus worse.
        smallest_effect: The smallest that is of interest, in the same unit; 0: none is given.

    Examples:
        >>> effect = effect_of([0.021, 0.034, 0.026, 0.030, 0.019], smallest_effect=0.01)
        >>> effect.outcome, round(effect.mean, 3), round(effect.low, 3), round(effect.high, 3)
        ('appears', 0.026, 0.018, 0.034)
    """
    num, mean = len(differences), statistics.fmean(differences)
    is_equal = max(differences) - min(differences) <= ROUNDING
    if num < 2 or (is_equal and num < FEWEST_EQUAL):
        interval, deviation, power = Interval(-math.inf, math.inf), math.nan, math.nan
    else:
        interval, deviation = interval_of(differences), statistics.stdev(differences)
        power = power_of(smallest_effect, deviation, num) if smallest_effect else math.nan
    outcome = _outcome(interval, smallest_effect, power)
    needed = 0
    if outcome == UNDECIDED and smallest_effect and math.isnan(deviation):
        needed = FEWEST_EQUAL if num > 1 else 0
    elif outcome == UNDECIDED and smallest_effect:
        # power alone does not decide: the interval may still hold both none and the smallest
        enough = seeds_needed(smallest_effect, deviation)
        needed = max(num + 1, enough, seeds_for_width(smallest_effect, deviation))
    return Effect(
        mean, *interval, deviation, num, smallest_effect, power, needed, outcome
    )  # fmt: skip


def _outcome(interval: Interval, smallest_effect: float, power: float) -> Outcome:
    """Return what an interval allows to say; without enough power absence is never said."""
    if interval.low > 0:
        return "appears"
    if interval.high < 0:
        return "is reversed"
    if interval.high < smallest_effect and power >= ENOUGH_POWER:
        return "does not appear"
    return UNDECIDED


def interval_of(differences: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of two differences or more.

    All resamples count, each by how many of the n^n are equal to it, up to 8 differences; of more
    20,000 are drawn with a fixed seed.
    """
    from scipy.stats import norm

    num = len(differences)
    values = np.asarray(differences, dtype=np.float64)
    quantile = _student(num)
    tail = float(norm.cdf(-math.sqrt(num / (num - 1)) * quantile))
    shares, chances = _resamples(num)
    centre = float(values.mean())
    means = shares @ (values - centre)
    half = quantile * float(values.std(ddof=1)) / math.sqrt(num)
    below = min(_quantile(means, chances, tail), -half)
    above = max(-_quantile(-means, chances, tail), half)
    return Interval(centre + below, centre + above)


def _quantile(means: Float64s, chances: Float64s, tail: float) -> float:
    """Return the smallest mean up to which there is as much chance as `tail`."""
    order = np.argsort(means, kind="stable")
    at = int(np.searchsorted(np.cumsum(chances[order]), tail))
    return float(means[order[min(at, len(order) - 1)]])


@cache
def _resamples(num: int) -> tuple[Float64s, Float64s]:
    """Return how much of each difference is in each resample, and the resample's chance."""
    if num > MAX_EXACT_SEEDS:
        rng = np.random.default_rng(0)
        counts = rng.multinomial(num, [1 / num] * num, size=RESAMPLES)
        return counts / num, np.full(RESAMPLES, 1 / RESAMPLES)
    bars = np.array(list(itertools.combinations(range(2 * num - 1), num - 1)))  # between the stars
    ends = np.full((len(bars), 1), -1), np.full((len(bars), 1), 2 * num - 1)
    counts = np.diff(np.hstack((ends[0], bars, ends[1])), axis=1) - 1
    factorials = np.array([math.factorial(k) for k in range(num + 1)], dtype=np.float64)
    chances = factorials[num] / factorials[counts].prod(axis=1) / float(num) ** num
    return counts / num, chances


def power_of(effect: float, deviation: float, num_seeds: int) -> float:
    """Return the chance that a two-sided paired t test at 5 % finds an effect.

    Args:
        effect: True mean of the differences.
        deviation: Their standard deviation, in the same unit.
        num_seeds: Pairs, at least two.
    """
    from scipy.stats import nct  # takes a second that the light verbs do without

    if deviation <= 0:
        return 1.0
    freedom, limit = num_seeds - 1, _student(num_seeds)
    shift = abs(effect) / deviation * math.sqrt(num_seeds)
    # of the wrong sign there is less than 1e-8 beyond a shift of 5, where scipy often gives NaN
    other = nct.cdf(-limit, freedom, shift) if shift < 5 else 0.0
    return float(nct.sf(limit, freedom, shift) + other)


def seeds_needed(effect: float, deviation: float, power: float = ENOUGH_POWER) -> int:
    """Return the fewest seeds with which a paired t test at 5 % has a power; at most 100,000.

    Examples:
        >>> seeds_needed(0.5, 1.0)
        34
    """
    return _fewest(lambda num: power_of(effect, deviation, num) >= power)


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values of tests that are made together (Holm 1979): none of them below its own.

    At most 5 % of such groups have one below 0.05 where nothing is so.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    scaled = (min(1.0, (len(ps) - rank) * ps[at]) for rank, at in enumerate(order))
    corrected = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [corrected[at] for at in range(len(ps))]


def seeds_for_width(width: float, deviation: float) -> int:
    """Return the fewest seeds whose interval is narrower: it cannot hold both 0 and `width`."""
    return _fewest(lambda num: 2 * _student(num) * deviation / math.sqrt(num) < width)


@cache
def _student(num: int) -> float:
    """Return the quantile of Student's t that leaves 2.5 % above, for as many differences."""
    return student_quantile(num - 1, (1 - CONFIDENCE) / 2)


def student_quantile(freedom: int, above: float) -> float:
    """Return the quantile of Student's t that leaves a chance above.

    Args:
        freedom: Degrees of freedom.
        above: In (0, 0.5).
    """
    from scipy.stats import t

    return float(t.isf(above, freedom))


def _fewest(is_enough: Callable[[int], bool]) -> int:
    """Return the fewest seeds, two or more, that are enough: what is so for some is for more."""
    return 2 + bisect.bisect_left(range(2, MAX_SEEDS), True, key=is_enough)  # noqa: FBT003
