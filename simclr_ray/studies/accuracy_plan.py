"""What a budget of device-hours is expected to give: the best setting of a study at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from simclr_ray.studies.expected_accuracy import AccuracyFit, Expected, fit_accuracy
from simclr_ray.studies.stored_points import StoredStudy


class PlanRow(NamedTuple):
    """A budget, and what the setting that is best there is expected to read."""

    device_hours: float
    images: float  # seen: epochs x images
    epochs: float  # 0: not known
    setting: str
    expected: Expected


class AccuracyPlan(NamedTuple):
    """What to expect of the settings of one study."""

    study: StoredStudy
    fit: AccuracyFit | None  # None: too few points, as `note` says
    rows: list[PlanRow]
    note: str  # what limits it, or nothing


def plan_of(study: StoredStudy, hours: Sequence[float], images_per_s: float = 0.0) -> AccuracyPlan:
    """Return what to expect of a study's settings for budgets.

    Of a study whose runs have one length there is one row, at that length.

    Args:
        study: What was measured.
        hours: Device-hours of one run, each above 0.
        images_per_s: Of one device; 0: what each setting's stored runs show.
    """
    if images_per_s:
        speeds = dict.fromkeys((point.setting for point in study.points), images_per_s)
    else:
        finished = {point.setting for point in study.points}  # nothing is known of the others
        speeds = {s: speed for s, speed in study.images_per_s.items() if s in finished}
    try:
        fit = fit_accuracy(study.points)
    except ValueError as error:
        return AccuracyPlan(study, None, [], str(error))
    if not speeds:
        return AccuracyPlan(study, fit, [], "no stored run tells its speed: give --images-per-s")
    if not fit.has_lengths:
        note = "cannot be extrapolated: all of its runs have one length"
        rows = [_best(study, fit, dict.fromkeys(speeds, fit.longest), speeds)]
        return AccuracyPlan(study, fit, rows, note)
    rows = [
        _best(study, fit, {s: 3600 * budget * speed for s, speed in speeds.items()}, speeds)
        for budget in hours
    ]
    return AccuracyPlan(study, fit, rows, "")


def _best(
    study: StoredStudy, fit: AccuracyFit, images: dict[str, float], speeds: dict[str, float]
) -> PlanRow:
    """Return the setting that is expected to be best, each at its own number of images."""
    of_each = {setting: fit.expect(setting, number) for setting, number in images.items()}
    best = max(of_each, key=lambda setting: of_each[setting].value)
    seen = images[best]
    epochs = seen / study.images_per_epoch if study.images_per_epoch else 0.0
    return PlanRow(seen / speeds[best] / 3600, seen, epochs, best, of_each[best])
