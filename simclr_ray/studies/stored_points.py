"""What stored studies measured, as points that accuracy is fitted to: of folders and reports.

A folder has every run with its seed, and so have kept results (`results.json` of a report). Those
that earlier releases wrote have means and deviations over seeds; of two seeds those are the two
readings, of more they stay a mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.metrics import EPOCH_METRICS, is_fraction
from simclr_ray.errors import ConfigError
from simclr_ray.storage.filesystem import split_address
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.studies.definition import Study
from simclr_ray.studies.expected_accuracy import Measured
from simclr_ray.studies.folder import DEFINITION, StudyFolder, TrialOutcome
from simclr_ray.studies.plan import EPOCHS, FOLDER, Point
from simclr_ray.studies.readings import epochs_of, last_good_epoch, readings_of
from simclr_ray.studies.report import DATA

APART = 1.4  # of a curve, epochs this factor apart: neighbors say nearly the same
ONE_SETTING = "all runs"


class StoredStudy(NamedTuple):
    """What one study measured, and how fast."""

    where: str
    name: str
    metric: str
    points: list[Measured]
    images_per_s: dict[str, float]  # setting -> of one device
    images_per_epoch: float


def studies_in(storage: str) -> list[str]:
    """Return the folders of the studies of a storage, by name."""
    place = RunFolder.of(storage, FOLDER)
    return [place.below(name) for name in place.folders("")]


def read_stored(where: str) -> StoredStudy:
    """Return what a study measured.

    Args:
        where: Folder or URI of a study, or of a report that was kept.

    Raises:
        ConfigError: It is neither, cannot be read, or its metric is no fraction to be maximized.
    """
    folder, name = split_address(where)
    files = RunFolder.at(folder if name == DATA else where)
    if files.read_text(DEFINITION) is not None:
        study = _of_folder(StudyFolder.at(files.uri), where)
    elif (text := files.read_text(DATA)) is not None:
        study = _of_results(text, where)
    else:
        problem = f"is no study: it has neither {DEFINITION} nor {DATA}"
        raise ConfigError.of(where, problem)
    if not is_fraction(study.metric):
        problem = f"its metric {study.metric} is no accuracy; nothing is planned from it"
        raise ConfigError.of(where, problem)
    return study


def setting_of(point: Point) -> str:
    """Return a point without its length, as text."""
    rest = [f"{name}={value}" for name, value in point.items() if name != EPOCHS]
    return ", ".join(rest) or ONE_SETTING


def _of_folder(folder: StudyFolder, where: str) -> StoredStudy:
    study, base = folder.definition()
    if study.mode != "max":
        problem = f"its metric {study.metric} is to be small; nothing is planned from it"
        raise ConfigError.of(where, problem)
    outcomes = folder.outcomes()
    reads_curve = study.metric in EPOCH_METRICS and _is_constant(study, base)
    points = [p for o in outcomes for p in _points_of(study, o, reads_curve=reads_curve)]
    costs: dict[str, tuple[float, float]] = {}
    for outcome in outcomes:
        setting = _setting_of(outcome)
        images, seconds = costs.get(setting, (0.0, 0.0))
        cost = outcome.cost
        costs[setting] = (images + cost["images"], seconds + cost["device_seconds"])
    epochs = sum(map(epochs_of, outcomes))
    images = sum(o.cost["images"] for o in outcomes if epochs_of(o))
    return StoredStudy(
        where, study.name, study.metric, points, _speeds(costs), images / epochs if epochs else 0.0
    )


def _is_constant(study: Study, base: Mapping[str, Any]) -> bool:
    """Return whether an epoch of a run is what a run of that length gives.

    No rate decays to 0, and views do not grow with the length.
    """
    space = json.dumps(cfg.to_tree(study)["space"])
    varies = any(name in space for name in ("schedule", "start_size"))
    grows = bool(base.get("augment", {}).get("start_size"))
    return not varies and not grows and base.get("schedule", {}).get("decay") == "constant"


def _setting_of(outcome: TrialOutcome) -> str:
    """Return the setting of a trial; of one that stands for several points, that of the last."""
    return setting_of(outcome.cells[-1]["point"])


def _points_of(study: Study, outcome: TrialOutcome, *, reads_curve: bool) -> Iterator[Measured]:
    """Yield the points of a trial: where it is read, or if so asked along its curve."""
    readings = [r for r in readings_of(study, outcome) if r.cost["images"] > 0]
    if not readings:
        return
    setting = _setting_of(outcome)
    if not reads_curve:
        reads_on = len({cell["epoch"] for cell in outcome.cells}) > 1
        # a run that stands for several points has measured once at each length
        for images, value in {r.cost["images"]: r.value for r in readings}.items():
            run = _run_of(setting, images, outcome.seed, reads_on=reads_on)
            yield Measured(setting, run, images, value)
        return
    ahead = math.inf
    is_whole, last = outcome.status == "finished", last_good_epoch(outcome)
    read = [e for e, v in outcome.curve.items() if study.metric in v and (is_whole or e <= last)]
    for epoch in sorted(read, reverse=True):
        if epoch * APART <= ahead:
            ahead = epoch
            images = outcome.cost["images"] * epoch / epochs_of(outcome)
            run = _run_of(setting, images, outcome.seed, reads_on=True)
            yield Measured(setting, run, images, outcome.curve[epoch][study.metric])


def _run_of(setting: str, images: float, seed: int | str, *, reads_on: bool) -> str:
    """Return what readings are held out with: those of one run, whose lengths may be several."""
    return f"{setting}, seed {seed}" if reads_on else f"{setting}, {images:.0f} images, seed {seed}"


def _of_results(text: str, where: str) -> StoredStudy:
    try:
        tree = json.loads(text)
        rows = _measured_once([row for row in tree["rows"] if row["images"] > 0])
        points = [p for row in rows for p in _points_of_row(row, rows)]
        costs: dict[str, tuple[float, float]] = {}
        for row in rows:
            setting, times = setting_of(row["point"]), row["num_seeds"]
            images, seconds = costs.get(setting, (0.0, 0.0))
            seconds += 3600 * row["device_hours"] * times
            costs[setting] = (images + row["images"] * times, seconds)
        per_epoch = tree["images"] / tree["epochs"] if tree["epochs"] else 0.0
        return StoredStudy(where, tree["study"], tree["metric"], points, _speeds(costs), per_epoch)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{DATA} holds no results of a study: {type(error).__name__}: {error}"
        raise ConfigError.of(where, problem) from None


def _measured_once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without those of points that the same runs stand for; the last of them stays."""
    measured = {}
    for number, row in enumerate(rows):
        runs = tuple(sorted(_runs_of_row(row)))
        measured[(runs, row["images"], row["mean"]) if runs else number] = row
    return list(measured.values())


def _runs_of_row(row: Mapping[str, Any]) -> set[str]:
    """Return the runs of a row that are named; earlier releases named none."""
    return set(row.get("runs", {}).values()) - {""}


def _points_of_row(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[Measured]:
    """Yield the readings of a row; where they are not there of two seeds mean ± deviation / √2."""
    setting, images = setting_of(row["point"]), float(row["images"])
    mean, deviation, seeds = float(row["mean"]), float(row["deviation"]), int(row["num_seeds"])
    runs = _runs_of_row(row)
    reads_on = any(runs & _runs_of_row(other) for other in rows if other is not row)
    one = setting if reads_on else f"{setting}, {images:.0f} images"
    if values := row.get("value_by_seed"):
        for seed, value in values.items():
            run = _run_of(setting, images, seed, reads_on=reads_on)
            yield Measured(setting, run, images, float(value))
    elif reads_on:  # one run passes through several lengths: they are held out together
        yield Measured(setting, f"{setting}, its seeds", images, mean, seeds, deviation)
    elif seeds == 2:
        for number, sign in enumerate((-1, 1)):
            value = mean + sign * deviation / math.sqrt(2)
            yield Measured(setting, f"{one}, {number}", images, value)
    else:
        yield Measured(setting, one, images, mean, seeds, deviation)


def _speeds(costs: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {
        setting: images / seconds for setting, (images, seconds) in costs.items() if seconds > 0
    }
