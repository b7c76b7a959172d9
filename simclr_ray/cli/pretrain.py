"""The pretrain verb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray.cli.arguments import ConfigSource, Overrides
from simclr_ray.cli.console import command, is_done, loading, out, show_pairs
from simclr_ray.cli.dry_run import DryRun, Timed, show_arithmetic, show_time
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError

if TYPE_CHECKING:
    from simclr_ray.train.outcome import PretrainOutcome
    from simclr_ray.train.resolve import ResolvedExperiment

RESTART = "--restart"


def pretrain(
    source: ConfigSource,
    overrides: Overrides = None,
    *,
    dry_run: DryRun = False,
    timed: Timed = False,
    name: Annotated[str, typer.Option(help="Call the run so; the same as name=NAME.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to begin a new run.")] = False,
    restart: Annotated[
        bool, typer.Option(RESTART, help="Begin anew; set aside what there is of this run.")
    ] = False,
) -> None:
    """Pretrain an encoder, evaluate it, and register it if `registry.name` is set.

    The same command continues a run that was stopped; of one that is finished it shows what is
    stored. Whatever changes the result makes it another run.
    Example: simclr-ray pretrain cifar10_cpu data.train=cifar/train data.test=cifar/test epochs=10
    Example: simclr-ray pretrain cifar10_cpu data.train=cifar/train --time
    """
    if resume and restart:
        raise ConfigError.of("--resume", f"and {RESTART} exclude each other")
    named = [f"name={name}"] if name else []
    experiment = Experiment.load(source, *(overrides or []), *named)
    if dry_run or timed:
        _look_at(experiment, timed=timed, resume=resume, restart=restart)
        return
    run_experiment(experiment, resume=resume, restart=restart)


def run_experiment(
    experiment: Experiment,
    *,
    resume: bool = False,
    restart: bool = False,
    image: str = "IMAGE.png",
) -> None:
    """Train, evaluate and register an experiment, showing all of it.

    Args:
        experiment: What to run.
        resume: Refuse to begin a new run.
        restart: Begin anew, and set aside what there is of the run.
        image: File that the command to embed names.
    """
    loading("torch")
    from simclr_ray.train.resolve import enter

    enter(experiment, _run_and_show, resume=resume, restart=restart, image=image)


def _look_at(experiment: Experiment, *, timed: bool, resume: bool, restart: bool) -> None:
    """Show what an experiment means in numbers and, if asked, how long it takes here."""
    loading("torch")
    from simclr_ray.train.resolve import enter

    def show(resolved: ResolvedExperiment) -> None:
        from simclr_ray.train.evaluation_plan import check_evaluation
        from simclr_ray.train.identity import check_is_there

        if resume:
            check_is_there(resolved)
        show_arithmetic(resolved, timed=timed)
        check_evaluation(resolved.config, resolved.source)
        if timed:
            show_time(resolved, is_anew=restart)

    enter(experiment, show)


def _run_and_show(resolved: ResolvedExperiment, *, resume: bool, restart: bool, image: str) -> None:
    from simclr_ray.storage.run_folder import HELD_S
    from simclr_ray.train.disk_space import check_space
    from simclr_ray.train.evaluation_plan import check_evaluation
    from simclr_ray.train.identity import begin_anew, check_is_there
    from simclr_ray.train.outcome import stored_outcome

    if resume:
        check_is_there(resolved)
    outcome = None if restart else stored_outcome(resolved)
    if outcome is None:
        check_space(resolved)  # before the lock, which is a file
        check_evaluation(resolved.config, resolved.source)
        with resolved.folder.lock(HELD_S):  # before a cluster is started for nothing
            if restart:
                begin_anew(resolved)
                is_done(RESTART)
            outcome = stored_outcome(resolved)  # of the process that held the lock until now
            if outcome is None:
                outcome = _run(resolved)
    _show(resolved, outcome, image)


def _show_arithmetic(resolved: ResolvedExperiment) -> None:
    from simclr_ray.train.dry_run import derived

    show_pairs(derived(resolved))


def _run(resolved: ResolvedExperiment) -> PretrainOutcome:
    loading("ray")
    from simclr_ray.cli.progress import RunProgress
    from simclr_ray.train.head_start import start_cluster

    # counting the memory of a step takes a second, most of it an import of torch's compiler
    start_cluster(resolved, meanwhile=lambda: _show_arithmetic(resolved))
    from simclr_ray.train.pipeline import train_and_evaluate  # Ray's parts of it: after its start

    with RunProgress() as progress:
        return train_and_evaluate(resolved, on_progress=progress, is_last=True)


def _show(resolved: ResolvedExperiment, outcome: PretrainOutcome, image: str) -> None:
    from simclr_ray.cli.scores import show_classifier, show_next, show_scores, show_where
    from simclr_ray.train.advice import advise_after_scores

    if outcome.is_stored:
        notice = "this run is finished; its stored scores follow, and are made anew by:"
        out.print(notice, markup=False, soft_wrap=True)
        out.print(f"  {command('evaluate', outcome.run.folder)}", markup=False, soft_wrap=True)
    show_scores(outcome.scores)
    advice = advise_after_scores(resolved, outcome.scores, outcome.run.metrics)
    if advice:
        out.print(advice, markup=False, soft_wrap=True)
    if outcome.classifier is not None:
        show_classifier("test, of the classifier", outcome.classifier)
    show_where(outcome.run)
    model = ""
    if outcome.registered is not None:
        model, version = outcome.registered.address, outcome.registered.version
        number = f" (version {version})" if outcome.registered.alias else ""
        show_pairs({"registered": f"{model}{number}"})
        if outcome.registered.refusal:
            out.print(outcome.registered.refusal, markup=False, soft_wrap=True)
    show_next(resolved.folder, model, image)
