"""The command line: `simclr-ray VERB ...`.

Exit codes: 0 done · 1 the run failed · 2 bad config, arguments or data · 75 stopped by the system
(SIGTERM), run the same command again to continue · 130 stopped by Ctrl-C, likewise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray import config as cfg
from simclr_ray.cli import study as cli_study
from simclr_ray.cli.console import RunProgress, ShardProgress, err, out, show_pairs, show_table
from simclr_ray.cli.signals import listen
from simclr_ray.config import preset_names
from simclr_ray.config.experiment import Experiment, PreparationConfig
from simclr_ray.errors import ConfigError, ConfigIssue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simclr_ray.evaluation.classification import Classification
    from simclr_ray.evaluation.scores import Score
    from simclr_ray.train.driver import Run


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(
    cli_study.study_app, name="study", help="Studies: what the paper varied, as commands."
)
ConfigSource = Annotated[
    str, typer.Argument(metavar="PRESET_OR_YAML", help="A preset, or a .yaml file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.path=value ...]", help="Values to override.")
]


@app.command()
def prepare(
    what: Annotated[
        str, typer.Argument(help="`shapes`, a folder, a parquet path, or a torchvision dataset.")
    ],
    to: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the shards; made if absent.")
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]")] = None,
    overwrite: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--overwrite", help="Start over where OUT holds other shards.")
    ] = False,
) -> None:
    """Turn images into parquet shards that training reads.

    Example: simclr-ray prepare ~/images data/images
    Example: simclr-ray prepare shapes data/shapes num_images=12000
    """
    _prepare(what, to, *(options or []), overwrite=overwrite)


def _prepare(what: str, to: str, *options: str, overwrite: bool = False) -> None:
    from simclr_ray.data.prepare import prepare as write_shards

    chosen = cfg.validate(PreparationConfig, cfg.apply_overrides({}, options))
    fields = {name: getattr(chosen, name) for name in type(chosen).model_fields}
    _connect()
    with ShardProgress(to) as progress:
        manifest = write_shards(what, to, **fields, overwrite=overwrite, on_progress=progress)
    out.print(f"{to}: {manifest.num_rows:,} images", markup=False)
    if manifest.rejected:
        shown = "; ".join(f"{r.name}: {r.reason}" for r in manifest.rejected[:5])
        out.print(f"left out {len(manifest.rejected)}: {shown}", markup=False, soft_wrap=True)


@app.command()
def preview(
    source: ConfigSource,
    overrides: Overrides = None,
    image: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("views.png"),
) -> None:
    """Draw what the views of a config show: originals with their crops, and both views."""
    from simclr_ray.data.source import Source
    from simclr_ray.train.figures import draw_views

    if image.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError([ConfigIssue("--out", f"got {image}; it must end in .png, .svg or .pdf")])
    experiment = Experiment.load(source, *(overrides or []))
    data = experiment.data
    image.parent.mkdir(parents=True, exist_ok=True)
    draw_views(experiment, Source.open(data.train, data.columns, data.limit), image)
    out.print(f"wrote {image}", markup=False)


@app.command()
def pretrain(
    source: ConfigSource,
    overrides: Overrides = None,
    dry_run: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--dry-run", help="Print the arithmetic and stop.")
    ] = False,
) -> None:
    """Pretrain an encoder, evaluate it, and register it if `registry.name` is set.

    The same command continues a run that was stopped.
    Example: simclr-ray pretrain cifar10_cpu data.train=cifar/train data.test=cifar/test epochs=10
    """
    experiment = Experiment.load(source, *(overrides or []))
    _pretrain(experiment, dry_run=dry_run)


def _pretrain(experiment: Experiment, *, dry_run: bool = False) -> None:
    from simclr_ray.train.dry_run import derived
    from simclr_ray.train.resolve import resolve

    resolved = resolve(experiment)
    show_pairs(derived(resolved))
    if dry_run:
        return
    from simclr_ray.train.pipeline import run_pipeline

    _connect(experiment)
    with RunProgress() as progress:
        outcome = run_pipeline(resolved, on_progress=progress)
    _show_scores(outcome.scores)
    if outcome.classifier is not None:
        _show_classifier("test, of the classifier", outcome.classifier, outcome.run)
    else:
        _show_where(outcome.run)
    if outcome.registered is not None:
        uri = f"models:/{outcome.registered.name}@{experiment.registry.alias}"
        out.print(f"registered  {uri} (version {outcome.registered.version})", markup=False)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder or its URI, or one checkpoint in it.")],
    overrides: Overrides = None,
    protocols: Annotated[
        str, typer.Option(help="Comma-separated: knn, linear, lbfgs, knn_k20, knn_k1.")
    ] = "knn,linear",
) -> None:
    """Score a run's encoder beside the untrained encoder and raw pixels.

    Example: simclr-ray evaluate runs/cifar10_cpu-1a2b3c4d data.test=cifar/test
    """
    from simclr_ray.evaluation.evaluate import evaluate
    from simclr_ray.nn.pretrained import open_checkpoint

    with open_checkpoint(run, "RUN") as (_, folder):
        _show_scores(evaluate(folder, protocols.split(","), *(overrides or [])))


@app.command()
def probe(
    run: Annotated[str, typer.Argument(help="A run folder or its URI, or one checkpoint in it.")],
    overrides: Overrides = None,
) -> None:
    """Ask what h and g(h) know of color, rotation, noise and edges (Table 3); needs no labels.

    Example: simclr-ray probe runs/cifar10_cpu-1a2b3c4d data.test=cifar/test
    """
    from simclr_ray.evaluation.evaluate import probe_run
    from simclr_ray.nn.pretrained import open_checkpoint

    with open_checkpoint(run, "RUN") as (_, folder):
        probes = probe_run(folder, *(overrides or []))
    rows = [[p.target, *(f"{100 * value:.1f} %" for value in p[1:])] for p in probes]
    show_table("what features know", ["target", "chance", "h", "g(h)"], rows)


@app.command()
def finetune(
    run: Annotated[str, typer.Argument(help="Folder or URI of a pretraining run.")],
    overrides: Overrides = None,
    labels: Annotated[float, typer.Option(help="Share of the labels, class-balanced.")] = 0.1,
    random: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool, typer.Option("--random", help="Start from random weights, for comparison.")
    ] = False,
) -> None:
    """Fine-tune a run's encoder on a share of the labels, and test the classifier.

    Example: simclr-ray finetune runs/cifar10_cpu-1a2b3c4d --labels 0.01 data.test=cifar/test
    """
    from simclr_ray.train.finetune import plan_finetuning, train

    planned = plan_finetuning(run, labels, *(overrides or []), from_random=random)
    _connect(planned.experiment.config)
    with RunProgress() as progress:
        tuned = train(planned, on_progress=progress)
    _show_classifier(f"test, after {tuned.num_images:,} labels", tuned.scores, tuned.run)


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="Folder or URI of a fine-tuning.")],
    overrides: Overrides = None,
) -> None:
    """Train a student of any size on what a fine-tuned classifier says of unlabelled images.

    Example: simclr-ray distill runs/x-tuned-10pct-1a2b3c4d data.train=more encoder.width=0.25
    """
    from simclr_ray.train.finetune import plan_distillation, train

    planned = plan_distillation(teacher, *(overrides or []))
    _connect(planned.experiment.config)
    with RunProgress() as progress:
        student = train(planned, on_progress=progress)
    _show_classifier("test, of the student", student.scores, student.run)


@app.command()
def register(
    run: Annotated[str, typer.Argument(help="A run folder or its URI.")],
    name: Annotated[str, typer.Argument(help="Registered model.")],
    alias: Annotated[str, typer.Option(help="Alias to move to the new version.")] = "newest",
) -> None:
    """Register a run's newest checkpoint in MLflow's model registry."""
    from simclr_ray.train.pipeline import register_run

    made = register_run(run, name, alias)
    out.print(f"models:/{made.name}@{alias} is version {made.version}", markup=False)


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="models:/name@alias, or a run or encoder folder.")],
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    tracking_uri: Annotated[
        str, typer.Option(help="MLflow store; empty: as MLflow finds it.")
    ] = "",
) -> None:
    """Print the embedding of each image: its path, then F numbers, tab-separated.

    Files that cannot be read or are no images are named on stderr and left out; the exit code is
    then 1.
    """
    from simclr_ray.inference.embed import embed_images

    bad: set[int] = set()

    def left_out(place: int, reason: str) -> None:
        bad.add(place)
        err.print(f"left out: {files[place]}: {reason}", markup=False, soft_wrap=True)

    read: dict[int, bytes] = {}
    for place, path in enumerate(files):
        try:
            read[place] = path.read_bytes()
        except OSError as error:
            left_out(place, error.strerror or str(error))
    places, images = list(read), list(read.values())
    rows = embed_images(
        model, images, tracking_uri=tracking_uri, on_bad=lambda at, why: left_out(places[at], why)
    )
    for place, row in zip(places, rows, strict=True):
        if place not in bad:
            print(files[place], *(f"{value:.6g}" for value in row), sep="\t")
    if bad:
        raise typer.Exit(1)


@app.command(name="config")
def show_config(
    source: Annotated[str, typer.Argument(metavar="[PRESET_OR_YAML]")] = "",
    overrides: Overrides = None,
) -> None:
    """Print a config whole, defaults included; without arguments, list the presets."""
    if not source:
        for name in preset_names():
            print(name)
        return
    print(cfg.dump_yaml(cfg.to_tree(Experiment.load(source, *(overrides or [])))), end="")


@app.command()
def doctor(
    storage: Annotated[str, typer.Option(help="Folder or URI for runs.")] = "runs",
    workers: Annotated[int, typer.Option(help="Processes of the gradient self-check.")] = 2,
) -> None:
    """Check this machine and cluster, and say what to do about each finding."""
    from simclr_ray.cli.doctor import run_checks

    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    failed = False
    for finding in run_checks(storage, num_workers=workers):
        failed |= finding.status == "fail"
        out.print(f"{marks[finding.status]}  {finding.check}: ", end="")
        out.print(finding.detail, markup=False, soft_wrap=True)
        if finding.advice:
            out.print(f"      -> {finding.advice}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _connect(experiment: Experiment | None = None) -> None:
    from simclr_ray.distributed.ray_cluster import connect

    connect(experiment)
    listen()  # Ray has put its own handler there


def _show_classifier(title: str, scores: Classification, run: Run) -> None:
    names = ["top-1", "top-5", "mean per class", "11-point mAP"]
    show_table(title, names, [[f"{100 * value:.1f} %" for value in scores]])
    _show_where(run)


def _show_where(run: Run) -> None:
    out.print(f"checkpoint  {run.checkpoint_uri}", soft_wrap=True, markup=False)
    out.print(f"run folder  {run.folder}", soft_wrap=True, markup=False)


def _show_scores(scores: Sequence[Score]) -> None:
    from simclr_ray.evaluation.scores import COLUMNS, NUM_ACCURACIES, cells, shown_columns

    shown = shown_columns(scores)
    rows = [cells(score) for score in scores]
    accuracies = [i for i in shown if 0 < i <= NUM_ACCURACIES]
    if any(row[i] != "-" for row in rows for i in accuracies):
        shown = [0, *accuracies]
    else:
        shown = [i for i in shown if i not in accuracies]
    show_table("scores", [COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in rows])
