"""`simclr-ray model ...`: register a run's encoder, promote, compare, fine-tune, distill it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray.cli.arguments import Overrides, RunPlace, TrackingUri
from simclr_ray.cli.console import loading, out, show_table
from simclr_ray.cli.dry_run import DryRun, Timed, show_arithmetic, show_time
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError

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


Version = Annotated[
    str, typer.Argument(metavar="MODEL", help="models:/NAME/3, or models:/NAME@ALIAS.")
]
LABEL_FRACTION = 0.1  # of the labels, where nothing else is asked for
Named = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as champion.")]


def promote(
    model: Version,
    alias: Alias,
    overrides: Overrides = None,
    require: Annotated[
        str | None,
        typer.Option(help="Rule.", show_default="`registry.require` of the experiment"),
    ] = None,
    tracking_uri: TrackingUri = "",
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one no better than untrained.")
    ] = False,
) -> None:
    """Move an alias to a version, where it shows what is required on the same test images.

    A rule is comparisons of metrics with numbers, with `champion`, the metric's value for the
    version that has the alias, and with `se`, the standard error of the difference. What was found
    is kept as tags of the version. Exit code 1: it is not good enough.

    Example: simclr-ray model promote models:/enc/4 champion \
    --require 'linear_top1 >= champion - 0.2 * se and effective_rank > 10'
    """
    if require is not None and not require.strip():
        raise ConfigError.of("--require", "is empty; a rule is comparisons")
    loading("torch")
    from simclr_ray.inference.promotion import promote as move

    made = move(
        model,
        alias,
        *(overrides or []),
        require=require or "",
        force=force,
        tracking_uri=tracking_uri,
    )
    for line in made.lines:
        out.print(line, markup=False, soft_wrap=True)
    before = f", before it {made.previous}" if made.previous not in (0, made.version) else ""
    out.print(f"models:/{made.name}@{alias} is version {made.version}{before}", markup=False)


def rollback(name: Named, alias: Alias, tracking_uri: TrackingUri = "") -> None:
    """Move an alias back to the version that it pointed to before its last promotion."""
    loading("mlflow")
    from simclr_ray.inference.promotion import rollback as move_back

    made = move_back(name, alias, tracking_uri=tracking_uri)
    out.print(f"models:/{name}@{alias} is version {made.version} again", markup=False)


def compare(
    one: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="An encoder.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another one.")],
    overrides: Overrides = None,
    tracking_uri: TrackingUri = "",
) -> None:
    """Set two encoders side by side: their scores on the test images of the first.

    Example: simclr-ray model compare models:/enc/4 models:/enc@champion data.test=cifar/test
    """
    loading("torch")
    from simclr_ray.inference.promotion import compare as side_by_side

    headings, *rows = side_by_side(one, other, *(overrides or []), tracking_uri=tracking_uri)
    show_table("the same images", headings, rows)


def remove(
    model: Version,
    tracking_uri: TrackingUri = "",
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that an alias points to.")
    ] = False,
) -> None:
    """Delete a version of a registered model.

    Its logged model is marked as deleted; `mlflow gc` frees the files.
    """
    loading("mlflow")
    from simclr_ray.inference.promotion import remove_version

    number = remove_version(model, force=force, tracking_uri=tracking_uri)
    out.print(f"version {number} is deleted; `mlflow gc` frees its files", markup=False)


def finetune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or URI of a pretraining run.")],
    overrides: Overrides = None,
    labels: Annotated[
        float | None,
        typer.Option(
            help="Share of the labels, class-balanced.", show_default=f"{LABEL_FRACTION:g}"
        ),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="So many labels of each class, instead of a share.")
    ] = None,
    frozen: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--frozen", help="Fit a classifier on the features alone.")
    ] = False,
    random: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--random", help="Start from random weights, for comparison.")
    ] = False,
    dry_run: DryRun = False,  # noqa: FBT002
    timed: Timed = False,  # noqa: FBT002
) -> None:
    """Fine-tune a run's encoder on a share of the labels, and test the classifier.

    Without `data.test` it is tested on labelled images that it was not trained on, at most 10,000.

    Example: simclr-ray model finetune runs/cifar10_cpu-1a2b3c4d --labels 0.01 data.test=cifar/test
    Example: simclr-ray model finetune runs/photos-1a2b3c4d --per-class 10 --frozen data.train=new
    """
    loading("torch", "ray")
    from simclr_ray.train.finetune import plan_finetuning

    planned = plan_finetuning(
        run,
        LABEL_FRACTION if labels is None and not per_class else labels,
        *(overrides or []),
        per_class=per_class or 0,
        frozen=frozen,
        from_random=random,
    )
    if dry_run or timed:
        _show_dry_run(planned, timed=timed)
        return
    tuned = _train(planned)
    _show(f"test, after {counted(tuned.num_images, 'label')}", tuned)


def distill(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Folder or URI of a fine-tuning.")
    ],
    overrides: Overrides = None,
    dry_run: DryRun = False,  # noqa: FBT002
    timed: Timed = False,  # noqa: FBT002
) -> None:
    """Train a student of any size on what a fine-tuned classifier says of unlabelled images.

    Example: simclr-ray model distill runs/x-tuned-10pct-1a2b3c4d data.train=more encoder.width=0.25
    """
    loading("torch", "ray")
    from simclr_ray.train.finetune import plan_distillation

    planned = plan_distillation(teacher, *(overrides or []))
    if dry_run or timed:
        _show_dry_run(planned, timed=timed)
        return
    _show("test, of the student", _train(planned))


def _show_dry_run(planned: Planned, *, timed: bool) -> None:
    rows = {"scores at the end": "of the classifier, by data.test"}
    show_arithmetic(planned.experiment, timed=timed, changed=rows)
    if timed:
        show_time(planned.experiment)


def _train(planned: Planned) -> FineTuned:
    from simclr_ray.cli.progress import RunProgress
    from simclr_ray.train.finetune import train
    from simclr_ray.train.head_start import start_cluster

    if not planned.experiment.config.init.freeze:
        start_cluster(planned.experiment)
    with RunProgress() as progress:
        return train(planned, on_progress=progress)


def _show(title: str, tuned: FineTuned) -> None:
    from simclr_ray.cli.scores import show_classifier, show_where

    if tuned.scores is not None:
        show_classifier(title, tuned.scores)
    show_where(tuned.run)
