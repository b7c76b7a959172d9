"""`simclr-ray study plan`: what accuracy to expect of a budget, from stored studies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simclr_ray.cli.console import command, out, say, show_table
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError

if TYPE_CHECKING:
    from simclr_ray.studies.accuracy_plan import AccuracyPlan, PlanRow
    from simclr_ray.studies.stored_points import StoredStudy

JSON = ".json"
HOURS = "1,10,100"
PLACES = {"yes": "yes", "beyond": "no, longer", "below": "no, shorter"}


def plan(
    folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FOLDER]...", help="Studies, or reports that were kept."),
    ] = None,
    device_hours: Annotated[str, typer.Option(help="Budgets of one run, with commas.")] = HOURS,
    images_per_s: Annotated[
        float, typer.Option(help="Of one device; 0: what the stored runs of a setting show.")
    ] = 0.0,
    storage: Annotated[
        str, typer.Option(help="Without FOLDER: of whose studies each is taken.")
    ] = "runs",
    record: Annotated[
        str, typer.Option("--json", metavar="FILE.json", help="Write it as JSON; - prints it.")
    ] = "",
) -> None:
    """Show what accuracy to expect of 1, 10 and 100 device-hours, with its 90 % interval.

    Example: simclr-ray study plan runs/studies/batch_size --images-per-s 900
    """
    if record and record != "-" and not record.endswith(JSON):
        raise ConfigError.of("--json", f"{record} does not end in {JSON}")
    hours = _hours(device_hours)
    if not (math.isfinite(images_per_s) and images_per_s >= 0):
        raise ConfigError.of("--images-per-s", f"must be above 0, got {images_per_s}")
    studies = _studies(folders or [], storage)
    from simclr_ray.studies.accuracy_plan import plan_of

    plans = [plan_of(study, hours, images_per_s) for study in studies]
    if not any(made.rows for made in plans):
        notes = "; ".join(f"{made.study.name}: {made.note}" for made in plans)
        raise ConfigError.of("study plan", f"nothing can be planned from {notes}")
    if record:
        text = json.dumps({"studies": [_tree(made) for made in plans]}, indent=1, allow_nan=False)
        if record == "-":
            print(text)
        else:
            Path(record).write_text(f"{text}\n", encoding="utf-8")
        return
    for made in plans:
        _show(made)


def _studies(folders: list[str], storage: str) -> list[StoredStudy]:
    """Return the studies that are named, or those of the storage.

    Raises:
        ConfigError: There are none, or one that is named is none.
    """
    from simclr_ray.storage.filesystem import address_below
    from simclr_ray.studies.stored_points import read_stored, studies_in

    if folders:
        return [read_stored(folder) for folder in folders]
    studies = []
    for folder in studies_in(storage):
        try:
            studies.append(read_stored(folder))
        except ConfigError as error:
            say(f"left out  {error}")  # what is printed may be JSON
    if not studies:
        remedy = f"run one (`{command('study', 'list')}`), or name the folder of one"
        place = address_below(storage, "studies")
        raise ConfigError.of(place, f"holds no study; {remedy}")
    return studies


def _hours(text: str) -> list[float]:
    try:
        hours = [float(part) for part in text.split(",")]
    except ValueError:
        hours = []
    if not hours or not all(math.isfinite(hour) and hour > 0 for hour in hours):
        problem = f"must be numbers above 0, such as {HOURS}, got {text!r}"
        raise ConfigError.of("--device-hours", problem)
    return hours


def _show(made: AccuracyPlan) -> None:
    study = made.study
    points, settings = len(study.points), len({point.setting for point in study.points})
    title = (
        f"{study.name}: {study.metric} expected of one run, by {counted(points, 'point')} of "
        f"{counted(settings, 'setting')}"
    )
    if made.fit is not None:
        title += f", fitted as {made.fit.curves[0].form.name}"
    if made.rows:
        head = [
            "device-hours",
            "images",
            "epochs",
            "best setting",
            "expected",
            "90 % interval",
            "measured",
        ]
        show_table(title, head, map(_cells, made.rows))
    if made.note:
        out.print(f"{study.name}  {made.note}", markup=False, soft_wrap=True)


def _cells(row: PlanRow) -> list[str]:
    expected = row.expected
    return [
        f"{row.device_hours:.3g}",
        f"{row.images:,.0f}",
        f"{row.epochs:,.0f}" if row.epochs else "-",
        row.setting,
        f"{100 * expected.value:.1f} %",
        f"{100 * expected.low:.1f} to {100 * expected.high:.1f}",
        PLACES[expected.measured],
    ]


def _tree(made: AccuracyPlan) -> dict[str, Any]:
    """Return a plan as JSON has it."""
    fit = made.fit
    return {
        "study": made.study.name,
        "folder": made.study.where,
        "metric": made.study.metric,
        "points": len(made.study.points),
        "form": fit.curves[0].form.name if fit else None,
        "held_out_error": fit.held_out_error if fit else None,
        "longest_images": fit.longest if fit else None,
        "note": made.note,
        "rows": [{**row._asdict(), "expected": row.expected._asdict()} for row in made.rows],
    }
