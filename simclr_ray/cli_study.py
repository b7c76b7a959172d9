"""The command line's `study` verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from simclr_ray.studies.definition import Study

study_app = typer.Typer(no_args_is_help=True, add_completion=False)
Where = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URI of a study.")]


@study_app.command()
def run(
    source: Annotated[
        str, typer.Argument(metavar="STUDY_OR_YAML", help="A study's name, or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key.path=value ...]", help="Of every trial; study.key=value of the study."
        ),
    ] = None,
    scale: Annotated[str, typer.Option(help="Size of the question, such as cpu.")] = "",
    dry_run: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--dry-run", help="Check all trials, print what they take, and stop.")
    ] = False,
) -> None:
    """Run a study, or go on with one that was stopped.

    Example: simclr-ray study run batch_size --scale cpu data.train=cifar/train data.test=cifar/test
    """
    from simclr_ray.studies.definition import load_study

    _run(load_study(source, scale, *(overrides or [])), dry_run=dry_run)


def _run(study: Study, *, dry_run: bool = False) -> None:
    from simclr_ray.studies.run import plan, run_study
    from simclr_ray.studies.trials import base_tree, forecast

    trials = plan(study, base_tree(study))
    print(forecast(study, trials))
    if dry_run:
        return
    folder = run_study(study)
    for o in folder.outcomes():
        print(o.trial, o.status, o.reason, o.metrics)
