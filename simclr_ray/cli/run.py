"""Verbs about runs: evaluate, and `simclr-ray run ...`; how one stands is in `status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simclr_ray.cli.arguments import Overrides, RunOrCheckpoint, RunPlace, permitted_names
from simclr_ray.cli.console import command, loading, out, say, show_table
from simclr_ray.config.protocols import DEFAULT_PROTOCOLS, PROTOCOL_NAMES
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError, SimclrRayError

if TYPE_CHECKING:
    from simclr_ray.storage.run_status import RunStatus


def evaluate(
    run: RunOrCheckpoint,
    overrides: Overrides = None,
    protocols: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(PROTOCOL_NAMES)}, or module:function of yours."
        ),
    ] = ",".join(DEFAULT_PROTOCOLS),
) -> None:
    """Score a run's encoder beside the untrained encoder and raw pixels.

    Example: simclr-ray evaluate runs/cifar10_cpu-1a2b3c4d data.test=cifar/test
    """
    loading("torch")
    from simclr_ray.cli.scores import show_scores
    from simclr_ray.evaluation.evaluate import evaluate
    from simclr_ray.nn.pretrained import open_checkpoint

    names = permitted_names(protocols)
    with open_checkpoint(run, "RUN") as (_, folder):
        show_scores(evaluate(folder, names, *(overrides or [])))


def probe(run: RunOrCheckpoint, overrides: Overrides = None) -> None:
    """Ask what h and g(h) know of color, rotation, noise and edges (Table 3), and of the class.

    Only the class needs labels.

    Example: simclr-ray run probe runs/cifar10_cpu-1a2b3c4d data.test=cifar/test
    """
    loading("torch")
    from simclr_ray.evaluation.evaluate import probe_run
    from simclr_ray.nn.pretrained import open_checkpoint

    with open_checkpoint(run, "RUN") as (_, folder):
        probes = probe_run(folder, *(overrides or []))
    rows = [[p.target, *(f"{100 * value:.1f} %" for value in p[1:])] for p in probes]
    show_table("what features know", ["target", "chance", "h", "g(h)"], rows)


def stop(run: RunPlace) -> None:
    """Ask a run, wherever it trains, to save a checkpoint of its step and end.

    The command that began it goes on from there.
    Example: simclr-ray run stop runs/cifar10_cpu-1a2b3c4d
    """
    from simclr_ray.storage.run_folder import RunFolder
    from simclr_ray.storage.run_status import status_of_run
    from simclr_ray.train.stop import request_stop

    state = status_of_run(RunFolder.at(run))
    driver = state.folder.holder()
    if not driver:
        raise ConfigError.of(state.folder.uri, "no driver holds it: nothing to stop")
    if state.is_trained:  # no worker is there any more to hear it
        problem = "has trained to its end and is being scored: nothing to stop, it ends by itself"
        raise ConfigError.of(state.folder.uri, problem)
    done = "asked" if request_stop(state.folder, driver) else "had already asked"
    out.print(f"{done} {state.folder.uri} to stop", markup=False, soft_wrap=True)


def sync(run: RunPlace) -> None:
    """Deliver to MLflow what it lacks of a run: points, other writes, and how the run ended.

    A run that was killed, and that MLflow shows as running, is shown as killed.
    Example: simclr-ray run sync runs/cifar10_cpu-1a2b3c4d
    """
    loading("mlflow")
    from simclr_ray.storage.run_folder import RunFolder
    from simclr_ray.train.tracked import sync_run

    synced = sync_run(RunFolder.at(run))
    parts = synced.parts if synced.points else ["0 points", *synced.parts]
    out.print(f"delivered: {', '.join(parts)}", markup=False)


def remove(run: RunPlace) -> None:
    """Delete a run's folder, checkpoints included; in MLflow it is marked as deleted.

    Registered versions stay: their files lie in MLflow's store.
    Example: simclr-ray run rm runs/cifar10_cpu-1a2b3c4d
    """
    loading("mlflow")
    from simclr_ray.storage.run_folder import RunFolder
    from simclr_ray.train.tracked import remove_run

    folder = RunFolder.at(run)
    note = remove_run(folder)
    out.print(f"deleted {folder.uri}{note}", markup=False, soft_wrap=True)


def report(
    run: RunPlace,
    page: Annotated[
        str, typer.Option("--out", metavar="PAGE.html", help="Where.", show_default="in the run")
    ] = "",
    num: Annotated[
        int, typer.Option("--num", min=0, help="Test images for neighbours; 0: none.")
    ] = 1000,
) -> None:
    """Write a run's page: curves, scores, cost, neighbours, confused classes, what it survived.

    Example: simclr-ray run report runs/cifar10_cpu-1a2b3c4d
    """
    from simclr_ray.data.contact_sheet import PAGE, check_output

    if page:
        check_output(page, "--out", PAGE)
    loading("torch")
    from simclr_ray.storage.run_folder import RunFolder
    from simclr_ray.train.run_report import write_report

    out.print(write_report(RunFolder.at(run), page, num), markup=False, soft_wrap=True)


def list_runs(
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE", help="Folder or URI that holds runs.")
    ] = "runs",
) -> None:
    """List the runs of a storage: how each stands, its epoch, and its last kNN.

    One that cannot be read is a row too, and the reason stands below.
    """
    from simclr_ray.errors import one_line
    from simclr_ray.storage.run_folder import CONFIG_FILE, RunFolder
    from simclr_ray.storage.run_status import runs_in, status_of_run

    if "://" not in storage and not (storage and Path(storage).is_dir()):
        raise ConfigError.of(storage or repr(storage), "there is no folder of that name")
    if RunFolder.at(storage).read_text(CONFIG_FILE) is not None:
        problem = f"is a run itself; see {command('status', storage)}"
        raise ConfigError.of(storage, problem)
    rows, reasons = [], []
    for folder in runs_in(storage):
        try:
            rows.append(_row(status_of_run(folder)))
        except (SimclrRayError, OSError) as error:  # one of an older release, or removed meanwhile
            rows.append([folder.name, "unreadable", "-", "-", "-"])
            reasons.append(f"{folder.name}: {one_line(error)}")
    if not rows:
        out.print(f"{storage} holds no runs", markup=False)
        return
    title = counted(len(rows), "run")
    show_table(title, ["run", "state", "epoch", "kNN top-1", "written (UTC)"], rows)
    for reason in reasons:
        say(reason)


def _row(run: RunStatus) -> list[str]:
    knn = run.metrics.get("eval/knn_top1")
    shown = "-" if knn is None else f"{knn:.1%}"
    written = f"{run.written_at:%Y-%m-%d %H:%M}" if run.written_at else "-"
    return [run.folder.name, run.state, f"{run.epoch:.1f}", shown, written]
