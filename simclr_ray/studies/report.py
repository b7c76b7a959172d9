"""A study's page: one HTML file with everything in it, written from stored results alone."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.metrics import is_fraction
from simclr_ray.config.uris import hide_passwords
from simclr_ray.errors import ConfigError, TrackingError
from simclr_ray.storage.page import render_page
from simclr_ray.studies.analysis import Results, Row, as_json, results_of
from simclr_ray.studies.claim_words import CLAIM_HEAD, claim_cells, claim_line
from simclr_ray.studies.definition import Study
from simclr_ray.studies.figures import draw_curves, draw_study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import RUNS
from simclr_ray.studies.readings import epochs_of, readings_of, shown, shown_epochs
from simclr_ray.studies.settings import settings_of
from simclr_ray.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

FIGURE, CURVES, PAGE, TABLE, DATA, TRIALS = (
    "figure", "curves", "report.html", "results.md", "results.json", "results.csv",
)  # fmt: skip
DRAWN = ("png", "svg", "pdf")


class Link(NamedTuple):
    """A text that leads to a run; of one without a folder `target` is empty."""

    text: str
    target: str
    title: str  # the run's folder below the study's, or its id in MLflow


class Table(NamedTuple):
    """Cells as text, or as links; the template escapes them."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | list[Link]]]
    marked: Sequence[bool] = ()  # of rows: the best
    left: int = 1  # columns that are flush left


def write_report(folder: StudyFolder) -> tuple[str, Results]:
    """Write page, figures, table and data to the study's report folder.

    `results.json` has every point over its seeds, `results.csv` a row for each seed.

    Args:
        folder: The study; of a remote one the report is written to a local folder first.

    Returns:
        Path or URI of the report's folder, and the results.
    """
    with folder.report_folder() as target:
        return folder.report, _write(folder, target)


def publish_report(folder: StudyFolder) -> tuple[str, Results]:
    """Same as `write_report`, and store the report with the study's MLflow run."""
    with folder.report_folder() as target:
        results = _write(folder, target)
        state = folder.state()
        if state.get("mlflow_run_id"):
            try:
                _log_report(target, results, state)
            except TrackingError as error:  # the report is worth more than its copy
                log.warning("the report is not in MLflow: %s", error)
    return folder.report, results


def _write(folder: StudyFolder, target: Path) -> Results:
    study, base = folder.definition()
    outcomes = folder.outcomes()
    results = results_of(study, outcomes, folder.baselines())
    commits = {outcome.run.get("commit", "") for outcome in outcomes} - {""}
    state = folder.state()
    has_curves = any(len(curve.epochs) > 1 for curve in results.curves)
    for ending in DRAWN:
        draw_study(results, target / f"{FIGURE}.{ending}")
        if has_curves:
            draw_curves(results, target / f"{CURVES}.{ending}")
    data = as_json(
        results,
        state.get("command", ""),
        state.get("seconds", 0.0),
        settings=_settings(study, base),
    )
    (target / DATA).write_text(hide_passwords(data) + "\n", encoding="utf-8")
    (target / TABLE).write_text(hide_passwords(markdown(results)), encoding="utf-8")
    _write_trials(study, outcomes, target / TRIALS)
    drawn = (FIGURE, CURVES) if has_curves else (FIGURE,)
    svgs = [(target / f"{name}.svg").read_text(encoding="utf-8") for name in drawn]
    state["commits"] = sorted(commits)
    (target / PAGE).write_text(hide_passwords(page(results, svgs, state)), encoding="utf-8")
    return results


def _write_trials(study: Study, outcomes: Sequence[TrialOutcome], path: Path) -> None:
    """Write a row for each point and seed: settings, seed, every metric, cost, and the run."""
    readings = [reading for outcome in outcomes for reading in readings_of(study, outcome)]
    metrics = sorted({name for reading in readings for name in reading.values})
    costs = sorted({name for reading in readings for name in reading.cost})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*study.space, "seed", *metrics, *costs, "run"])
        for reading in readings:
            point = [reading.point.get(name, "") for name in study.space]
            values = [reading.values.get(name, "") for name in metrics]
            cost = [reading.cost.get(name, "") for name in costs]
            run = hide_passwords(reading.run)
            writer.writerow([*point, reading.seed, *values, *cost, run])


def _settings(study: Study, base: dict[str, Any]) -> dict[str, Any] | None:
    """Return a study's settings, or None where an earlier release's base is not read any more."""
    try:
        return settings_of(study, cfg.validate(Experiment, base))
    except ConfigError:
        return None


def _log_report(target: Path, results: Results, state: dict[str, Any]) -> None:
    run = TrackedRun.attach(state["tracking_uri"], state["mlflow_run_id"])
    run.log_artifact(target)
    best = results.best
    if best is not None:
        finished = results.num_trials - len(results.unfinished)
        run.log_metrics({f"best/{results.study.metric}": best.mean}, finished)
        run.set_tags({f"best/{key}": str(value) for key, value in best.point.items()})


def page(results: Results, svgs: Sequence[str], state: dict[str, Any]) -> str:
    """Return the page as HTML that needs nothing else; `report.html.j2` is its form.

    Args:
        results: Of a study.
        svgs: The figure, and the curves where there are some.
        state: Of the study as a whole, as its folder has it.
    """
    study = results.study
    return render_page(
        "studies",
        "report.html.j2",
        study=study,
        drawings=[svg[svg.index("<svg") :] for svg in svgs],
        claims=claims_table(results),
        baselines=baselines_table(results),
        agreement=agreement_text(results),
        points=points_table(results),
        total=total_text(results),
        others=others_table(results),
        command=state.get("command") or "(from Python)",
        versions=_versions(state),
        definition=cfg.dump_yaml(cfg.to_tree(study)),
    )


def claims_table(results: Results) -> Table:
    """Return the claims and what the seeds say of them."""
    unit = results.study.paper.metric
    return Table(CLAIM_HEAD, [claim_cells(verdict, unit) for verdict in results.verdicts], left=2)


def baselines_table(results: Results) -> Table:
    """Return what the points are held against, with the metrics that the table of points has."""
    names = [results.study.metric, *results.study.extra_metrics]
    has = [n for n in names if any(n in values for values in results.baselines.values())]
    head = ["baseline", *(f"{name}{' (%)' if is_fraction(name) else ''}" for name in has)]
    rows = [
        [name, *(shown(n, values[n]) if n in values else "-" for n in has)]
        for name, values in results.baselines.items()
    ]
    return Table(head, rows if has else [])


def agreement_text(results: Results) -> str:
    """Return in a sentence how alike the order of the points is to the paper's."""
    agreement = results.agreement
    if agreement is None:
        return "Fewer than three points stand for settings of the paper: no order to compare."
    return (
        f"Kendall's tau of {agreement.tau:+.2f} over {agreement.num_points} points that stand for "
        f"settings of the paper (1: the same order, 0: none, -1: reversed; p = {agreement.p:.2g})."
    )


def points_table(results: Results) -> Table:
    """Return every point with its value, its cost and the paper's value."""
    head, rows = points_of_table(results)
    marked = [row is results.best for row in results.rows]
    linked: list[list[str | list[Link]]] = [
        [*cells, _links(row)] for cells, row in zip(rows, results.rows, strict=True)
    ]
    return Table([*head, "run of seed"], linked, marked, left=len(results.study.space))


def _links(row: Row) -> list[Link]:
    """Return a link to the run of each seed: the report's folder lies beside that of the runs."""
    return [
        Link(str(seed), f"../{run}" if run.startswith(f"{RUNS}/") else "", run)
        for seed, run in sorted(row.runs.items())
    ]


def markdown(results: Results) -> str:
    """Return points and claims as Markdown."""
    head, rows = points_of_table(results)
    lines = [f"# {results.study.question}", "", _line(head), _line(["---"] * len(head))]
    lines += [_line(row) for row in rows]
    lines += ["", total_text(results), ""]
    if results.study.paper.rows:
        lines += [agreement_text(results), ""]
    lines += [f"- {claim_line(v, results.study.paper.metric)}" for v in results.verdicts]
    baselines = baselines_table(results)
    lines += [
        f"- {row[0]}, a baseline: {metric} {value}"
        for row in baselines.rows
        for metric, value in zip(baselines.head[1:], row[1:], strict=True)
        if value != "-"
    ]
    lines += [
        f"- {trial}: {status} after {epochs} epochs: {reason}"
        for trial, status, epochs, reason in others_table(results).rows
    ]
    return "\n".join(lines) + "\n"


def total_text(results: Results) -> str:
    """Return in a sentence what the whole study took."""
    return (
        f"In all {results.num_trials} trials, {shown_epochs(results.epochs)} epochs, "
        f"{results.images:,.0f} images through the encoder (two views each), "
        f"{results.device_hours:.2f} worker-hours of training."
    )


def others_table(results: Results) -> Table:
    """Return the trials that did not finish or learned nothing, and why."""
    rows = [
        [o.trial, o.status, shown_epochs(epochs_of(o)), _first_line(o.reason)]
        for o in results.others
    ]
    return Table(["trial", "status", "epochs", "reason"], rows, left=4)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def points_of_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of points, as text."""
    study = results.study
    unit = " (%)" if is_fraction(study.metric) else ""
    has_paper = ["paper"] if study.paper.rows else []
    extra_metrics = [f"{name}{' (%)' if is_fraction(name) else ''}" for name in study.extra_metrics]
    head = [
        *study.space, f"{study.metric}{unit}", "seeds", *extra_metrics, *has_paper,
        "images", "seconds", "worker-hours",
    ]  # fmt: skip
    rows = []
    for row in results.rows:
        spread = f" ± {shown(study.metric, row.deviation)}" if row.num_seeds > 1 else ""
        rows.append(
            [
                *(str(row.point[name]) for name in study.space),
                f"{shown(study.metric, row.mean)}{spread}",
                str(row.num_seeds),
                *(
                    shown(n, row.extra_metrics[n]) if n in row.extra_metrics else "-"
                    for n in study.extra_metrics
                ),
                *(["-" if row.paper is None else f"{row.paper:g}"] if has_paper else []),
                f"{row.images:,.0f}",
                f"{row.seconds:,.0f}",
                f"{row.device_hours:.3f}",
            ]
        )
    return head, rows


def _versions(state: dict[str, Any]) -> dict[str, str]:
    """Return what made the numbers: code, libraries, machine, images, definition."""
    versions = dict(state.get("versions", {}))
    commits = {*state.get("commits", []), versions.pop("commit", "")} - {""}
    made = {"commit": "; ".join(sorted(commits))} if commits else {}
    images = {f"{k} images": v for k, v in state.get("fingerprints", {}).items()}
    definition = {"definition": state["digest"]} if state.get("digest") else {}
    return {**made, **versions, **images, **definition}


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
