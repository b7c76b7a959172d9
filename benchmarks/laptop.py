"""Run the studies of laptops, keep their reports, and hold forecasts against the clock.

    python -m benchmarks.laptop $SIMCLR_RAY_DATA/cifar10/train $SIMCLR_RAY_DATA/cifar10/test
    python -m benchmarks.laptop … --studies temperature losses
    python -m benchmarks.laptop shapes/train shapes/test --scale laptop_shapes

Of each study the forecast of `study run --dry-run` is made first, then it is run by its command,
and its report is kept in `docs/studies` (`benchmarks.studies`); of finished ones it is kept again.
One that was stopped, or has trials that failed, goes on; where a study's file or images have
changed since, it is refused.
A forecast is as right as the machine is idle: `--again` makes it anew, of studies whose minutes are
stored, and stores it beside the first.
Writes `benchmarks/results/forecasts.json`; `python -m benchmarks.findings` then writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import studies as kept
from benchmarks.record import RESULTS, machine, portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import SimclrRayError
from simclr_ray.studies.definition import Study
from simclr_ray.studies.driver import checked_images
from simclr_ray.studies.files import load_study, study_names, summaries
from simclr_ray.studies.findings import SCALES, USUAL
from simclr_ray.studies.folder import FINAL, StudyFolder
from simclr_ray.studies.plan import base_tree, images_of, study_folder
from simclr_ray.studies.settings import digest_of_study
from simclr_ray.studies.time_forecast import forecast_time
from simclr_ray.studies.trials import plan

NAME = "forecasts"


def main() -> None:
    """Run, keep, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--scale", choices=list(SCALES), default=USUAL)
    parser.add_argument("--studies", nargs="+", choices=study_names(), help="All that have it.")
    parser.add_argument("--forecast", default="", help="Print this study's alone, as seconds.")
    parser.add_argument("--again", action="store_true", help="Forecast anew; run nothing.")
    args = parser.parse_args()
    data = overrides_of(args.scale, args.train, args.test)
    if args.forecast:
        print(json.dumps(forecast_s(args.forecast, args.scale, data)))
        return
    names = args.studies or studies_at(args.scale)
    studies = {name: load_study(name, args.scale, *data) for name in names}
    if args.again:
        for study in studies.values():
            _forecast_again(study, [args.train, args.test])
        return
    try:  # of all, before the first runs for an hour
        are_done = {name: is_done(study) for name, study in studies.items()}
    except SimclrRayError as error:
        raise SystemExit(f"error: {error}") from None
    for name, study in studies.items():
        folder = StudyFolder(*study_folder(study))
        if not folder.state():
            ahead = _forecast(name, args.scale, [args.train, args.test])
            seconds = _run(name, args.scale, data)
            # a run that was interrupted says nothing of a forecast
            called = f"{args.train} {args.test} --scale {args.scale}"
            _remember(kept.kept_name(study), ahead, seconds, called)
        elif not are_done[name]:
            _run(name, args.scale, data)
        kept.main([folder.uri])


def studies_at(scale: str) -> list[str]:
    """Return the names of the studies that have the scale."""
    return [summary.name for summary in summaries() if scale in summary.scales]


def overrides_of(scale: str, train: str, test: str) -> list[str]:
    """Return what is given to each study: its images, and a storage where names would clash."""
    storage = [] if scale == USUAL else [f"storage=runs/{scale}"]
    return [f"data.train={train}", f"data.test={test}", *storage]


def is_done(study: Study) -> bool:
    """Return whether all trials of a study have ended, and none of them by a failure.

    Raises:
        ConfigError: Its folder holds another definition, or results of other images.
        DataError: The images cannot be read.
    """
    folder, tree = StudyFolder(*study_folder(study)), base_tree(study)
    base = cfg.validate(Experiment, tree)
    folder.check(digest_of_study(study, base))
    checked_images(folder, [base, *(trial.experiment for trial in plan(study, tree))])
    has_failed = any(outcome.status not in FINAL for outcome in folder.outcomes())
    return bool(folder.state().get("is_complete")) and not has_failed


def forecast_s(name: str, scale: str, data: list[str]) -> float:
    """Return the seconds that a study should take here, its start included."""
    study = load_study(name, scale, *data)
    return forecast_time(study, plan(study, base_tree(study))).pace.seconds


def _forecast(name: str, scale: str, data: list[str]) -> float:
    """Return the same from a process of its own, whose cluster ends with it."""
    called = [sys.executable, "-m", "benchmarks.laptop", *data, "--scale", scale]
    called += ["--forecast", name]
    done = subprocess.run(called, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _run(name: str, scale: str, data: list[str]) -> float:
    """Run a study by its command; return the seconds from start to exit."""
    program = Path(sys.executable).with_name("simclr-ray")
    began = time.monotonic()
    subprocess.run([program, "study", "run", name, "--scale", scale, *data], check=True)
    return time.monotonic() - began


def _remember(name: str, ahead_s: float, seconds: float, data: str) -> None:
    """Store what was forecast beside what it took, with those of other studies."""
    one = {
        "forecast_minutes": round(ahead_s / 60, 2),
        "minutes": round(seconds / 60, 2),
        "error": round(ahead_s / seconds - 1, 3),
        "load_after": round(os.getloadavg()[2], 2),
        "commit": machine()["commit"],
    }
    _store(name, one, data)


def _forecast_again(study: Study, data: list[str]) -> None:
    """Store a forecast made now beside the minutes that a study took, and its first forecast."""
    name = kept.kept_name(study)
    stored, ran = _stored()[name], json.loads((kept.KEPT / name / "results.json").read_text())
    images = sum(images_of(plan(study, base_tree(study))).values())
    if (ran["seeds"], ran["images"]) != ([*study.seeds], images):
        raise SystemExit(f"error: {name} is another study now than the one that took its minutes")
    minutes = _forecast(study.name, study.scale, data) / 60
    again = {
        "forecast_minutes": round(minutes, 2),
        "error": round(minutes / stored["minutes"] - 1, 3),
        "commit": machine()["commit"],
    }
    called = f"{' '.join(data)} --scale {study.scale} --studies {study.name} --again"
    _store(name, {**stored, "again": again}, called)


def _stored() -> dict[str, Any]:
    file = RESULTS / f"{NAME}.json"
    studies: dict[str, Any] = json.loads(file.read_text())["studies"] if file.is_file() else {}
    return studies


def _store(name: str, one: dict[str, Any], called: str) -> None:
    """Store what is known of one study with that of others; `called`: the command's arguments."""
    command = portable(f"python -m benchmarks.laptop {called}")
    store(NAME, {"command": command, "studies": {**_stored(), name: one}})


if __name__ == "__main__":
    main()
