"""`simclr-ray study ...`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray.cli.console import command, loading, out, say, show_pairs, show_table
from simclr_ray.cli.progress import StudyProgress, study_table
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM
from simclr_ray.config.wording import clock, counted
from simclr_ray.errors import RunError

if TYPE_CHECKING:
    from simclr_ray.studies.analysis import Results
    from simclr_ray.studies.definition import Study
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.plan import Trial

Isolated = Annotated[
    bool,
    typer.Option(
        "--isolated",
        help="Each trial in processes of its own; else small ones share processes, with the same "
        "results.",
    ),
]
StudyPlace = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URI of a study.")]


def list_studies() -> None:
    """List the studies that come with the package, with their scales."""
    from simclr_ray.studies.files import summaries

    for study in summaries():
        scales = ", ".join(study.scales)
        text = f"{study.name:<18} {study.answers}: {study.question} [{scales}]"
        out.print(text, markup=False, soft_wrap=True)


def run(
    source: Annotated[
        str, typer.Argument(metavar="STUDY_OR_YAML", help="A study's name, or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.PATH=VALUE", help="Of every trial; study.key=value of the study."
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="Size of the question, such as cpu; without it, the file's first.")
    ] = "",
    dry_run: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool,
        typer.Option("--dry-run", help="Check all trials and the cluster, time steps, and stop."),
    ] = False,
    isolated: Isolated = False,  # noqa: FBT002
    underpowered: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool,
        typer.Option("--underpowered", help="Run although the seeds are too few for the claims."),
    ] = False,
) -> None:
    """Run a study, or go on with one that was stopped.

    Example: simclr-ray study run batch_size --scale cpu data.train=cifar/train data.test=cifar/test
    """
    from simclr_ray.studies.files import load_study
    from simclr_ray.studies.plan import base_tree
    from simclr_ray.studies.trials import plan

    study = load_study(source, scale, *(overrides or []))
    trials = plan(study, base_tree(study))
    loading("torch", "ray")
    from simclr_ray.studies.driver import check_startable

    check_startable(study, trials)
    _show_plan(study, trials)
    _show_power(study, is_enough=underpowered)
    if dry_run:
        _show_time(study, trials)
    else:
        _run(study, trials, isolated=isolated)


def resume(where: StudyPlace, isolated: Isolated = False) -> None:  # noqa: FBT002
    """Go on with a study; finished trials are not run again, open ones go on where they stood."""
    from simclr_ray.studies.trials import stored_study

    with stored_study(where) as (study, trials):
        loading("torch", "ray")
        _run(study, trials, isolated=isolated)


def status(where: StudyPlace) -> None:
    """Show how the trials of a study stand."""
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.status import status_of
    from simclr_ray.studies.trials import stored_study

    with stored_study(where) as (study, trials):
        out.print(study_table(status_of(study, StudyFolder.at(where), trials)))


def stop(where: StudyPlace) -> None:
    """Ask a running study to stop; `resume` goes on with it."""
    from simclr_ray.studies.folder import StudyFolder

    StudyFolder.at(where).request_stop()
    say(f"asked; to go on: {command('study', 'resume', where)}")


def report(where: StudyPlace) -> None:
    """Draw figure, table and page again from what is stored."""
    from simclr_ray.studies.folder import StudyFolder

    _report(StudyFolder.at(where))


def best(
    where: StudyPlace,
    register: Annotated[
        str, typer.Option(help="Registered model that its encoder becomes a version of.")
    ] = "",
    alias: Annotated[str, typer.Option(help="Alias to move to the new version.")] = "best",
) -> None:
    """Name the best trial, and register its encoder if asked."""
    from simclr_ray.studies.analysis import best_outcome, results_of
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.readings import shown

    folder = StudyFolder.at(where)
    study, _ = folder.definition()
    outcomes = folder.outcomes()
    results = results_of(study, outcomes)
    if results.best is None:
        message = f"no trial of {where} has finished; see `{command('study', 'status', where)}`"
        raise RunError(message)
    chosen = best_outcome(results, outcomes)
    show_pairs(
        {
            "best point": ", ".join(f"{k}={v}" for k, v in results.best.point.items()),
            study.metric: f"{shown(study.metric, results.best.mean)}, mean of "
            f"{counted(results.best.num_seeds, 'seed')}",
            "trial": chosen.trial,
            "run folder": chosen.run["folder"],
        }
    )
    (cell,) = (c for c in chosen.cells if c["point"] == results.best.point)
    was_trained_on = chosen.status != "finished" or cell["epoch"] != max(chosen.curve, default=0)
    if register and cell["epoch"] and was_trained_on:
        raise RunError(
            "the best length is read off a longer run, whose encoder was trained on; run it alone "
            "to register it"
        )
    if register:
        loading("torch", "ray")
        from simclr_ray.inference.registry import register_run
        from simclr_ray.studies.baselines import check_trial

        check_trial(folder, chosen)
        made = register_run(chosen.run["folder"], register, alias)
        out.print(f"registered  models:/{made.name}@{alias} (version {made.version})", markup=False)


def run_shown(study: Study, trials: Sequence[Trial], *, isolated: bool = False) -> StudyFolder:
    """Run a study, or go on with it, showing how it stands; return its folder."""
    from simclr_ray.studies.driver import run_study
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.plan import study_folder
    from simclr_ray.studies.status import status_of

    folder = StudyFolder(*study_folder(study))
    called = shlex.join(["simclr-ray", *sys.argv[1:]])
    with StudyProgress(lambda: status_of(study, folder, trials)):
        run_study(study, command=called, isolated=isolated)
    return folder


def _run(study: Study, trials: Sequence[Trial], *, isolated: bool) -> None:
    from simclr_ray.studies.driver import has_code

    folder = run_shown(study, trials, isolated=isolated)
    if folder.outcomes():
        _report(folder)
    if not folder.state()["is_complete"]:
        code = ["--allow-code"] if has_code(study, trials) else []
        say(f"stopped; to go on: {command('study', 'resume', folder.uri, *code)}")
        raise typer.Exit(STOPPED_BY_SYSTEM)


def _report(folder: StudyFolder) -> None:
    from simclr_ray.storage.filesystem import address_below
    from simclr_ray.studies.claim_words import claim_line
    from simclr_ray.studies.report import PAGE, publish_report

    place, results = publish_report(folder)
    _show_results(results)
    for verdict in results.verdicts:
        line = claim_line(verdict, results.study.paper.metric)
        out.print(line, soft_wrap=True, markup=False)
    for status in ("stopped", "collapsed"):
        named = [o.trial for o in results.others if o.status == status]
        if named:
            out.print(f"{status} early: {', '.join(named)}", soft_wrap=True, markup=False)
    failed = [o for o in results.others if o.status == "failed"]
    for outcome in failed:
        out.print(f"failed: {outcome.trial}: {outcome.reason}", soft_wrap=True, markup=False)
    out.print(f"report  {address_below(place, PAGE)}", markup=False, soft_wrap=True)
    if failed:
        total = counted(results.num_trials, "trial")
        raise RunError(f"{len(failed)} of {total} failed; resume tries again")


def _show_results(results: Results) -> None:
    from simclr_ray.studies.report import points_of_table

    head, rows = points_of_table(results)
    shown = head.index("images")  # what a point cost is in the report
    show_table(results.study.question, head[:shown], [row[:shown] for row in rows])


def _show_plan(study: Study, trials: Sequence[Trial]) -> None:
    from simclr_ray.data.overlap import overlap_line
    from simclr_ray.studies.plan import forecast, note_on_lengths

    taken = forecast(study, trials)
    rows = {
        "study": f"{study.name}{f' ({study.scale})' if study.scale else ''}: {study.question}",
        **({"answers": study.answers} if study.answers else {}),
        "trials": f"{taken.num_trials}: {counted(taken.num_points, 'point')}, "
        f"{counted(len(study.seeds), 'seed')}",
        "images": f"{taken.images:,} in {counted(taken.epochs, 'epoch')}",
        "metric": f"{study.metric} ({study.mode})",
    }
    if taken.hours:
        rows["time"] = (
            f"{taken.hours:.1f} h of one trial after the other at {study.images_per_s:,.0f} "
            f"images/s, {taken.device_hours:.1f} worker-hours"
        )
    note = note_on_lengths(study, trials)
    if note:
        rows["lengths"] = note
    overlap = overlap_line(trials[0].experiment.data)
    if overlap:
        rows["beware"] = overlap
    show_pairs(rows)


def _show_power(study: Study, *, is_enough: bool) -> None:
    """Show what the seeds can find of each claim.

    Raises what `check_power` does, unless it is enough to show it.
    """
    from simclr_ray.studies.claim_words import effect_of_metric
    from simclr_ray.studies.planned_power import check_power, planned_powers

    planned = planned_powers(study)
    for claim in planned:
        effect = effect_of_metric(claim.smallest_effect, claim.metric)
        seeds = counted(claim.num_seeds, "seed")
        show_pairs({"power": f"{claim.power:.2f} for {effect} with {seeds}: {claim.claim}"})
    if study.comparisons and not planned and len(study.seeds) == 1:
        claims = counted(len(study.comparisons), "claim")
        why = f"one seed has no interval, so that nothing can be said of {claims}"
        show_pairs({"power": f"{why}; study.seeds=[0,1,2] or more"})
    if not is_enough:
        check_power(planned)


def _show_time(study: Study, trials: Sequence[Trial]) -> None:
    """Show what the cluster at hand makes of a plan; steps are timed on it if the study tells none.

    Raises what `start_cluster` and `pace_of` do.
    """
    from simclr_ray.studies.driver import can_share_processes, start_cluster
    from simclr_ray.studies.time_forecast import forecast_time

    if study.images_per_s:
        show_pairs({"at a time": counted(start_cluster(study, trials).now, "trial")})
        return
    forecast = forecast_time(study, trials)
    taken = forecast.pace
    show_pairs({"at a time": counted(forecast.at_a_time, "trial")})
    most = "at most " if study.scheduler.name != "none" else ""
    estimate = (
        f"{most}{clock(taken.seconds)}, {clock(taken.start)} of it the start; training is "
        f"{clock(taken.device_seconds)} of workers' time, evaluation {clock(taken.evaluation)}: by "
        "steps and images timed on it, as busy as it is"
    )
    if not can_share_processes(trials):
        estimate += "; the start of each trial comes on top"
    show_pairs({"time": estimate})
