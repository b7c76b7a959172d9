"""`simclr-ray study advise`: which settings suit some images, by a study of so many minutes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simclr_ray.cli.console import command, loading, out, say, show_pairs, show_table, to_continue
from simclr_ray.cli.signals import STOPPED_BY_SYSTEM
from simclr_ray.cli.study import run_shown
from simclr_ray.config import YAML_SUFFIXES
from simclr_ray.config.metrics import is_fraction
from simclr_ray.config.wording import clock, counted
from simclr_ray.errors import ConfigError, ConfigIssue

if TYPE_CHECKING:
    from simclr_ray.studies.definition import Study
    from simclr_ray.studies.folder import StudyFolder
    from simclr_ray.studies.tuning_advice import Advice, AdviceTask, TrialLengths

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
        bool, typer.Option("--dry-run", help="Check all, time steps, and say what is trained.")
    ] = False,
    record: Annotated[
        str, typer.Option("--json", metavar="FILE.json", help="Write it as JSON; - prints it.")
    ] = "",
) -> None:
    """Show which temperature, rate, crops and color suit some images, and what they gain.

    Example: simclr-ray study advise photos/train --test photos/test --minutes 30
    """
    if record and record != "-" and not record.endswith(JSON):
        raise ConfigError.of("--json", f"{record} does not end in {JSON}")
    if not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError.of("--minutes", f"must be above 0, got {minutes}")
    loading("torch", "ray")
    from simclr_ray.studies import tuning_advice

    settings = _settings(data, test, base, overrides or [])
    task = tuning_advice.advice_task(name, base, settings)
    lengths = _lengths(task, minutes)
    show = say_pairs if record == "-" else show_pairs
    _show_plan(task, lengths, show)
    if dry_run:
        return
    advice = tuning_advice.advise(task, lengths, _run)
    text = json.dumps(_tree(advice), indent=1, allow_nan=False)
    if record == "-":
        print(text)
        return
    _show(task, advice, settings)
    if record:
        Path(record).write_text(f"{text}\n", encoding="utf-8")


def _settings(data: str, test: str, base: str, overrides: list[str]) -> list[str]:
    """Return what is set of the experiment: of a preset nothing that is of other images."""
    settings = [f"data.train={data}"]
    is_preset = not base.endswith(YAML_SUFFIXES)
    if test or is_preset:
        settings.append(f"data.test={test}")
    if is_preset:
        settings.append("data.limit=0")
    return [*settings, *overrides]


def say_pairs(rows: dict[str, str]) -> None:
    """Show pairs on stderr, where stdout is for JSON alone."""
    for key, value in rows.items():
        say(f"{key}  {value}")


def _lengths(task: AdviceTask, minutes: float) -> TrialLengths:
    """Return how long trials are: as an earlier call has begun them, or as is timed here."""
    from simclr_ray.studies import tuning_advice
    from simclr_ray.studies.driver import check_startable

    begun = tuning_advice.begun_lengths(task)
    rows, epochs = (begun.rows, begun.epochs) if begun else (task.num_rows, 1)
    short = tuning_advice.short_study(task, rows, epochs)
    try:
        check_startable(short, tuning_advice.trials_of(short))
    except ConfigError as error:
        if begun is None:
            raise
        problem = f"{task.name} was begun with other images or settings; another --name is free"
        raise ConfigError([ConfigIssue("--name", problem), *error.issues]) from None
    if begun is not None:
        say(f"going on with {task.name}, whatever --minutes says; another --name begins anew")
        return begun
    lengths = tuning_advice.timed_lengths(task, minutes)
    tuning_advice.ensure_classes(task, lengths.rows)
    return lengths


def _show_plan(
    task: AdviceTask, lengths: TrialLengths, show: Callable[[dict[str, str]], None]
) -> None:
    from simclr_ray.studies import tuning_advice
    from simclr_ray.studies.advice_space import tried_of

    factor, seeds = tuning_advice.EPOCH_FACTOR, tuning_advice.FINAL_SEEDS
    rows = {
        "varied": f"{', '.join(task.factors)} of {task.base}",
        "evaluated by": task.metric,
        "first": f"{counted(len(tried_of(task.factors)), 'setting')}, "
        f"{counted(lengths.epochs, 'epoch')} of {lengths.rows:,} images",
        "then": f"the {tuning_advice.NUM_FINALISTS} that should be best and the experiment as it "
        f"is, {counted(len(seeds), 'seed')}, {counted(factor * lengths.epochs, 'epoch')}",
    }
    if math.isfinite(lengths.seconds):
        rows["time"] = clock(lengths.seconds)
    if task.note:
        rows["beware"] = (
            f"{task.note}: only temperature and rate are compared, by the effective rank, which "
            "says little; a few hundred labelled images say more"
        )
    show(rows)


def _run(study: Study) -> StudyFolder:
    """Run a study to its end; raise `typer.Exit` where it is stopped before."""
    from simclr_ray.studies.tuning_advice import trials_of

    folder = run_shown(study, trials_of(study))
    if not folder.state()["is_complete"]:
        say(f"stopped; to go on: {to_continue()}")
        raise typer.Exit(STOPPED_BY_SYSTEM)
    return folder


def _show(task: AdviceTask, advice: Advice, settings: list[str]) -> None:
    scale, unit = (100.0, "points") if is_fraction(advice.metric) else (1.0, advice.metric)
    fit = advice.fit
    show_table(
        f"What a level gives, by {counted(fit.num_trials, 'short trial')}",
        ["factor", "level", unit, "±"],
        [
            [e.factor, e.level, f"{scale * e.effect:+.1f}", _error(scale * e.error)]
            for e in fit.effects
        ],
    )
    show_table(
        f"The best of them, twice as long, on {advice.rows:,} images",
        ["setting", advice.metric, f"gain ({unit})", "±", "images", "seconds"],
        [
            [
                end.name,
                f"{scale * end.value:.1f}",
                f"{scale * end.gain:+.1f}",
                _error(scale * end.error),
                f"{end.images:,.0f}",
                f"{end.seconds:,.0f}",
            ]
            for end in advice.finalists
        ],
    )
    longer = scale * advice.gain_of_longer
    if math.isfinite(longer):
        chosen = "by other seeds, of settings chosen by the short trials: rather more"
        out.print(f"epochs  twice as many gave {longer:+.1f} {unit} ({chosen})", markup=False)
    out.print(f"cost    {advice.cost_fraction:.1%} of every setting once, as long as it is")
    if not advice.values:
        out.print("advice  leave it as it is: nothing that was tried is better", markup=False)
        return
    words = [f"{path}={json.dumps(value)}" for path, value in advice.values.items()]
    line = command("pretrain", task.base, *settings, *words)
    doubt = "" if advice.finalists[0].is_clear else "perhaps (the gain may be chance): "
    out.print(f"advice  {doubt}{line}", markup=False, soft_wrap=True)


def _error(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "?"


def _tree(advice: Advice) -> dict[str, Any]:
    """Return advice as JSON has it: what is not finite is null."""
    from simclr_ray.studies.claims import finite_tree

    fit = advice.fit
    return {
        "metric": advice.metric,
        "rows": advice.rows,
        "trials": fit.num_trials,
        "effects": [finite_tree(effect._asdict()) for effect in fit.effects],
        "finalists": [finite_tree(end._asdict()) for end in advice.finalists],
        **finite_tree({"deviation": fit.deviation, "gain_of_longer": advice.gain_of_longer}),
        "values": advice.values,
        "cost_fraction": advice.cost_fraction,
    }
