"""How often the intervals of `study plan` hold a point that was held out, and how wide they are.

    python -m benchmarks.study_plan [FOLDER ...]

Of every study (by default the kept ones, `docs/studies`) points are held out in three ways, and the
interval is made from what is left, its form and factors included, so that nothing of a held-out run
is on both sides:

    run       one setting with one seed; of results that were kept without their seeds, the mean of
              more than two, held against the interval of a mean of as many
    point     one setting at one length, with all of its seeds, where lengths are runs of their own
    longest   everything within a factor of 1.5 of the longest run, predicted from shorter runs

Writes `benchmarks/results/study_plan.json`. The aim is that 9 of 10 held-out points lie in their
interval, whose median width is at most 8 points: over the runs of all studies, and over studies
with several lengths. The verdict of those is one for each way, since they hold out the same points,
and says where there are fewer than 20.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.record import store
from benchmarks.studies import KEPT
from simclr_ray.errors import ConfigError
from simclr_ray.studies.expected_accuracy import LEVEL, ONE_LENGTH, Measured, fit_accuracy
from simclr_ray.studies.report import DATA
from simclr_ray.studies.stored_points import StoredStudy, read_stored

WAYS = ("run", "point", "longest")
ENOUGH_POINTS = 20
WIDEST = 0.08


class HeldOut(NamedTuple):
    """A point and the interval that was made without it."""

    study: str
    has_lengths: bool  # of the study
    way: str
    value: float
    expected: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        """Whether the interval holds the point."""
        return self.low <= self.value <= self.high


def held_out(study: StoredStudy) -> Iterator[HeldOut]:
    """Yield what the rest of a study expects of each point, where the rest is enough to fit."""
    points = study.points
    has_lengths = has_several_lengths(points)
    for way in WAYS if has_lengths else WAYS[:1]:
        for out in folds(points, way):
            rest = [point for point in points if point not in out]
            try:
                fit = fit_accuracy(rest)
                expected = [fit.expect(p.setting, p.images, p.num_seeds) for p in out]
            except ValueError:
                continue
            for point, e in zip(out, expected, strict=True):
                yield HeldOut(study.name, has_lengths, way, point.value, e.value, e.low, e.high)


def folds(points: Sequence[Measured], way: str) -> list[list[Measured]]:
    """Return the points that are held out together."""
    if way == "longest":
        cut = max(point.images for point in points) / ONE_LENGTH
        return [[point for point in points if point.images > cut]]
    if way == "run":
        runs = dict.fromkeys(point.run for point in points)
        return [[point for point in points if point.run == run] for run in runs]
    places = {(point.run, point.images) for point in points}
    if len(places) > len({run for run, _ in places}):
        return []  # a run is read at several lengths: its other lengths would be on the other side
    cells = dict.fromkeys((point.setting, point.images) for point in points)
    return [[point for point in points if (point.setting, point.images) == cell] for cell in cells]


def has_several_lengths(points: Sequence[Measured]) -> bool:
    """Return whether a study's runs have more than one length."""
    images = [point.images for point in points]
    return bool(images) and max(images) > ONE_LENGTH * min(images)


def summary(results: Sequence[HeldOut]) -> dict[str, Any]:
    """Return how many points were held out, how many lay inside, and the median width."""
    if not results:
        return {"held_out": 0}
    return {
        "held_out": len(results),
        "inside": sum(result.is_inside for result in results),
        "coverage": round(sum(result.is_inside for result in results) / len(results), 4),
        "median_width": round(statistics.median(r.high - r.low for r in results), 4),
        "median_error": round(statistics.median(abs(r.value - r.expected) for r in results), 4),
    }


def verdict_of(results: Sequence[HeldOut]) -> str:
    """Return whether the aim is met by points that were held out in one way."""
    counts = summary(results)
    number = counts["held_out"]
    if not number:
        return "nothing could be held out"
    text = f"{counts['inside']} of {number} inside, median width {counts['median_width']:.3f}"
    if number < ENOUGH_POINTS:
        return f"too few points to say, {ENOUGH_POINTS} are needed: {text}"
    is_met = counts["coverage"] >= LEVEL and counts["median_width"] <= WIDEST
    return f"{'met' if is_met else 'not met'}: {text}"


def main(folders: list[str]) -> None:
    """Hold out, print and store."""
    paths = folders or [str(path.parent) for path in sorted(KEPT.glob(f"*/{DATA}"))]
    results: list[HeldOut] = []
    studies: dict[str, Any] = {}
    for folder in paths:
        name = folder.rstrip("/").rpartition("/")[2]  # two scales of a study have one name
        try:
            study = read_stored(folder)
        except ConfigError as error:
            studies[name] = {"left_out": str(error)}
            continue
        of_study = list(held_out(study))
        results += of_study
        studies[name] = {
            "points": len(study.points),
            "has_several_lengths": has_several_lengths(study.points),
            **{way: summary([r for r in of_study if r.way == way]) for way in WAYS},
        }
        print(name, studies[name], flush=True)
    runs = [result for result in results if result.way == "run"]
    lengths = [result for result in results if result.has_lengths]
    record = {
        "command": " ".join(["python -m benchmarks.study_plan", *folders]),
        "level": LEVEL,
        "with_several_lengths": sorted({result.study for result in lengths}),
        "verdict": verdict_of(runs),
        "verdict_with_several_lengths": {
            way: verdict_of([r for r in lengths if r.way == way]) for way in WAYS
        },
        "all_studies_by_run": summary(runs),
        "studies": studies,
    }
    print(record["verdict"], record["verdict_with_several_lengths"], sep="\n")
    store("study_plan", record)


if __name__ == "__main__":
    main(sys.argv[1:])
