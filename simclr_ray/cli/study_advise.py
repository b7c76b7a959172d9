"""`simclr-ray study advise`: which settings suit some images, by a study of so many minutes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simclr_ray.cli.console import command, loading, out, say, show_pairs, show_table
from simclr_ray.cli.progress import StudyProgress
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM
from simclr_ray.config.wording import clock, counted
from simclr_ray.errors import ConfigError, ConfigIssue

if TYPE_CHECKING:
    from simclr_ray.studies.advise import Advice, Budget, Question
    from simclr_ray.studies.definition import Study
    from simclr_ray.studies.folder import StudyFolder

JSON = ".json"


def advise(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Images to train on.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Of every trial, and what is advised on."),
    ] = None,
    test: Annotated[
        str, typer.Option(help="Labelled images by which settings are evaluated (data.test).")
    ] = "",
    base: Annotated[
        str, typer.Option(help="Preset or YAML file to advise on; else one by the images' size.")
    ] = "",
    minutes: Annotated[float, typer.Option(help="That it may take here.")] = 30.0,
    name: Annotated[str, typer.Option(help="Of its two studies, in the storage.")] = "advise",
    dry_run: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--dry-run", help="Check all, say what would be trained, and stop.")
    ] = False,
    record: Annotated[
        str, typer.Option("--json", metavar="FILE.json", help="Write it as JSON; - prints it.")
    ] = "",
) -> None:
    """Show which temperature, rate, crops and color suit some images, and what they gain.

    Example: simclr-ray study advise photos/train --test photos/test --minutes 30
    """
    if record and record != "-" and not record.endswith(JSON):
        raise ConfigError([ConfigIssue("--json", f"{record} does not end in {JSON}")])
    if not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError([ConfigIssue("--minutes", f"must be above 0, got {minutes}")])
    loading("torch", "ray")
    from simclr_ray.studies import advise as studies

    # without labelled images of its own, a preset's test set is that of other images
    given = [f"data.train={data}", f"data.test={test}", *(overrides or [])]
    question = studies.question_of(name, base, given)
    budget = _budget(question, minutes)
    _show_plan(question, budget)
    if dry_run:
        return
    advice = studies.advise(question, budget, _run)
    tree = _tree(advice)
    if record == "-":
        print(json.dumps(tree, indent=1, allow_nan=False))
        return
    if record:
        text = json.dumps(tree, indent=1, allow_nan=False)
        Path(record).write_text(f"{text}\n", encoding="utf-8")
    _show(question, advice, given)


def _budget(question: Question, minutes: float) -> Budget:
    """Return what fits into the minutes: what an earlier call has begun with, or as timed here."""
    from simclr_ray.studies.advise import (
        MOST_ROWS,
        Budget,
        budget_of,
        short_study,
        trials_of,
    )
    from simclr_ray.studies.driver import shared_cores, start_cluster
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.plan import study_folder
    from simclr_ray.studies.step_timing import pace_of

    study = short_study(question, min(question.num_rows, MOST_ROWS), 1)
    folder = StudyFolder(*study_folder(study))
    if folder.state():
        _, tree = folder.definition()
        return Budget(tree["data"]["limit"], tree["epochs"], math.nan)
    trials = trials_of(study)
    began = time.monotonic()
    at_a_time = start_cluster(study, trials).now
    pace = pace_of(trials, at_a_time, shared_cores(trials), study.protocols)
    spent = time.monotonic() - began
    return budget_of(question, minutes - spent / 60, at_a_time, pace)


def _show_plan(question: Question, budget: Budget) -> None:
    from simclr_ray.studies import advise as studies
    from simclr_ray.studies.advice_results import SETTING

    short = studies.short_study(question, budget.rows, budget.epochs)
    rows = {
        "asked about": f"{question.base}: {', '.join(question.factors)}",
        "evaluated by": question.metric,
        "first": f"{counted(len(short.space[SETTING].cases), 'setting')}, "
        f"{counted(budget.epochs, 'epoch')} of {budget.rows:,} images",
        "then": f"the {studies.NUM_FINALISTS} that should be best and the experiment as it is, "
        f"{counted(studies.FINAL_SEEDS, 'seed')}, "
        f"{counted(studies.LONGER * budget.epochs, 'epoch')}",
    }
    if math.isfinite(budget.seconds):
        rows["time"] = clock(budget.seconds)
    if question.metric == studies.WITHOUT:
        rows["beware"] = (
            "without labels only temperature and rate are compared, by the effective rank, which "
            "says little; a few hundred labelled images (--test) say more"
        )
    show_pairs(rows)


def _run(study: Study) -> StudyFolder:
    from simclr_ray.studies.advise import trials_of
    from simclr_ray.studies.driver import run_study
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.plan import study_folder
    from simclr_ray.studies.status import status_of

    folder, trials = StudyFolder(*study_folder(study)), trials_of(study)
    with StudyProgress(lambda: status_of(study, folder, trials)):
        run_study(study)
    if not folder.state()["is_complete"]:
        say("stopped; the same command goes on with it")
        raise typer.Exit(STOPPED_BY_SYSTEM)
    return folder


def _show(question: Question, advice: Advice, given: list[str]) -> None:
    scale, unit = (100.0, "points") if advice.metric.endswith("top1") else (1.0, advice.metric)
    fit = advice.fit
    title = f"What a level gives, by {counted(fit.freedom + _num_effects(advice), 'short trial')}"
    show_table(
        title,
        ["factor", "level", unit, "±"],
        [
            [e.factor, e.level, f"{scale * e.effect:+.1f}", f"{scale * e.error:.1f}"]
            for e in fit.effects
        ],
    )
    show_table(
        f"Twice as long, {advice.rows:,} images",
        ["setting", advice.metric, f"gain ({unit})", "±", "images", "seconds"],
        [
            [
                end.name,
                f"{scale * end.value:.1f}",
                f"{scale * end.gain:+.1f}",
                f"{scale * end.error:.1f}",
                f"{end.images:,.0f}",
                f"{end.seconds:,.0f}",
            ]
            for end in advice.finalists
        ],
    )
    if math.isfinite(advice.longer):
        out.print(f"epochs  twice as many gave {scale * advice.longer:+.1f} {unit}", markup=False)
    out.print(f"cost    {advice.cost_fraction:.1%} of every setting once, as long as it is")
    best = advice.finalists[0]
    if not advice.values:
        out.print("advice  leave it as it is: nothing that was tried is better", markup=False)
        return
    words = [f"{path}={json.dumps(value)}" for path, value in advice.values.items()]
    if best.gain < 2 * best.error:
        out.print("advice  hardly: the gain is within two standard errors", markup=False)
    line = command("pretrain", question.base, *filter(_is_set, given), *words)
    out.print(f"advice  {line}", markup=False, soft_wrap=True)


def _is_set(text: str) -> bool:
    return not text.endswith("=")


def _num_effects(advice: Advice) -> int:
    """Return how many numbers were fitted: a mean, and of each factor one level less."""
    factors = {e.factor for e in advice.fit.effects}
    return 1 + len(advice.fit.effects) - len(factors)


def _tree(advice: Advice) -> dict[str, Any]:
    """Return advice as JSON has it."""
    fit = advice.fit
    return {
        "metric": advice.metric,
        "rows": advice.rows,
        "epochs": advice.epochs,
        "effects": [e._asdict() for e in fit.effects],
        "deviation": fit.deviation if math.isfinite(fit.deviation) else None,
        "finalists": [end._asdict() for end in advice.finalists],
        "longer": advice.longer if math.isfinite(advice.longer) else None,
        "values": advice.values,
        "cost_fraction": advice.cost_fraction,
    }
