"""The power that a study's claims will have at its seeds, said before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError
from simclr_ray.studies.comparisons import Gap
from simclr_ray.studies.definition import Study
from simclr_ray.studies.effects import ENOUGH_POWER, power_of, seeds_needed

UNDERPOWERED: Final = "--underpowered"


class PlannedPower(NamedTuple):
    """What a claim's seeds can find.

    Attributes:
        claim: Its words.
        metric: That `better` is read from.
        smallest_effect: In the metric's unit.
        deviation: That differences between paired seeds are expected to have.
        num_seeds: The study's.
        power: Chance that a two-sided paired t test at 5 % finds `smallest_effect`.
        seeds_needed: For a power of 0.8.
    """

    claim: str
    metric: str
    smallest_effect: float
    deviation: float
    num_seeds: int
    power: float
    seeds_needed: int


def planned_powers(study: Study) -> list[PlannedPower]:
    """Return the power of each claim that has a smallest effect and an expected deviation.

    A difference of differences is expected to deviate √2 times as much as the study's claims do,
    as of two gaps that know nothing of each other, unless the claim says itself.
    """
    num = len(study.seeds)
    planned = []
    for claim in study.comparisons:
        of_gaps = math.sqrt(2) if claim.than != Gap() else 1.0
        deviation = claim.expected_deviation or of_gaps * study.expected_deviation
        smallest = claim.smallest_effect
        if smallest and deviation:
            power = power_of(smallest, deviation, num) if num > 1 else 0.0
            needed = seeds_needed(smallest, deviation)
            metric = claim.metric or study.metric
            planned.append(
                PlannedPower(claim.claim, metric, smallest, deviation, num, power, needed)
            )
    return planned


def check_power(planned: Sequence[PlannedPower]) -> None:
    """Raise `ConfigError`, in one line with the seeds it would need, where a power is below 0.8."""
    lack = lack_of_power(planned)
    if lack:
        problem = f"{lack}; {UNDERPOWERED} runs the study all the same"
        raise ConfigError.of("seeds", problem)


def lack_of_power(planned: Sequence[PlannedPower]) -> str:
    """Return what the seeds cannot say, and how many could; empty where every power is enough."""
    weak = [claim for claim in planned if claim.power < ENOUGH_POWER]
    if not weak:
        return ""
    worst = max(weak, key=lambda claim: claim.seeds_needed)
    others = f" ({len(weak)} of {counted(len(planned), 'claim')})" if len(planned) > 1 else ""
    return (
        f"{counted(worst.num_seeds, 'seed')} cannot say whether {worst.claim!r}{others}: it would "
        f"need {counted(worst.seeds_needed, 'seed')} for a power of {ENOUGH_POWER}"
    )
