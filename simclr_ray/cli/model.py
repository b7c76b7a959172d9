"""`simclr-ray model ...`: register a run's encoder, fine-tune it, distill it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray.cli.arguments import Overrides, RunPlace
from simclr_ray.cli.console import loading, out
from simclr_ray.config.wording import counted

if TYPE_CHECKING:
    from simclr_ray.train.finetune import FineTuned, Planned


def register(
    run: RunPlace,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")],
    alias: Annotated[str, typer.Option(help="Alias to move to the new version.")] = "newest",
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one no better than untrained.")
    ] = False,
) -> None:
    """Register a run's newest checkpoint in MLflow's model registry."""
    loading("torch")
    from simclr_ray.inference.registry import register_run

    made = register_run(run, name, alias, force=force)
    out.print(f"models:/{made.name}@{alias} is version {made.version}", markup=False)


def finetune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or URI of a pretraining run.")],
    overrides: Overrides = None,
    labels: Annotated[float, typer.Option(help="Share of the labels, class-balanced.")] = 0.1,
    random: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--random", help="Start from random weights, for comparison.")
    ] = False,
) -> None:
    """Fine-tune a run's encoder on a share of the labels, and test the classifier.

    Example: simclr-ray model finetune runs/cifar10_cpu-1a2b3c4d --labels 0.01 data.test=cifar/test
    """
    loading("torch", "ray")
    from simclr_ray.train.finetune import plan_finetuning

    tuned = _train(plan_finetuning(run, labels, *(overrides or []), from_random=random))
    _show(f"test, after {counted(tuned.num_images, 'label')}", tuned)


def distill(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Folder or URI of a fine-tuning.")
    ],
    overrides: Overrides = None,
) -> None:
    """Train a student of any size on what a fine-tuned classifier says of unlabelled images.

    Example: simclr-ray model distill runs/x-tuned-10pct-1a2b3c4d data.train=more encoder.width=0.25
    """
    loading("torch", "ray")
    from simclr_ray.train.finetune import plan_distillation

    _show("test, of the student", _train(plan_distillation(teacher, *(overrides or []))))


def _train(planned: Planned) -> FineTuned:
    from simclr_ray.cli.progress import RunProgress
    from simclr_ray.train.driver import start_cluster
    from simclr_ray.train.finetune import train

    start_cluster(planned.experiment)
    with RunProgress() as progress:
        return train(planned, on_progress=progress)


def _show(title: str, tuned: FineTuned) -> None:
    from simclr_ray.cli.scores import show_classifier, show_where

    show_classifier(title, tuned.scores)
    show_where(tuned.run)
