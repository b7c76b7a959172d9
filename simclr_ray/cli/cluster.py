"""Verbs about the machine and the cluster: doctor, and `simclr-ray cluster ...`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from simclr_ray import config as cfg
from simclr_ray.cli.arguments import Overrides
from simclr_ray.cli.console import loading, out, show_pairs, show_table
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.findings import Finding
from simclr_ray.config.wording import counted
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.storage.filesystem import filesystem
from simclr_ray.storage.provenance import versions_of

STORAGE: Final = "runs"  # where none is stated
WORKERS: Final = 2


def doctor(
    storage: Annotated[
        str | None, typer.Option(help="Folder or URI for runs; by default runs.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers of the planned run, by default 2; at most 4 check gradients."
        ),
    ] = None,
    cluster: Annotated[  # noqa: FBT002 - typer makes it a flag
        bool,
        typer.Option("--cluster", help="Check the cluster of $RAY_ADDRESS for a planned run."),
    ] = False,
    loss: Annotated[
        str, typer.Option(help="Check only this loss of yours: module:attribute.")
    ] = "",
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET_OR_YAML] KEY=VALUE",
            help="With --cluster the planned run; with --loss options of the loss.",
        ),
    ] = None,
) -> None:
    """Check this machine and cluster, and say what to do about each finding.

    With --cluster it takes a minute at most, and encoders trained there are tagged by the result.
    Example: simclr-ray doctor --cluster scaling.num_workers=4 storage=s3://bucket/runs
    """
    if options and not (loss or cluster):
        problem = "is for a loss of yours, which --loss names, or a planned run, by --cluster"
        raise ConfigError.of(options[0], problem)
    if loss and cluster:
        raise ConfigError.of("--cluster", "checks no loss: give it without --loss")
    planned = planned_run(options or [], storage, workers) if cluster else None
    storage, workers = storage or STORAGE, workers or WORKERS
    if not cluster:  # which reaches no storage without a limit
        filesystem(storage)  # a scheme that nobody knows is no finding about this machine
    loading("torch")
    from simclr_ray.cli.doctor import check_loss, run_checks

    if planned is not None:
        loading("ray")
        from simclr_ray.cli.cluster_doctor import check_cluster_for

        findings: Iterable[Finding] = check_cluster_for(planned)
    elif loss:
        findings = [check_loss(loss, options or [], workers)]
    else:
        findings = run_checks(storage, num_workers=workers)
    if not _show_findings(findings):
        raise typer.Exit(1)


def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Of `ray up`, KubeRay, or a Slurm script.")
    ],
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET_OR_YAML] KEY.PATH=VALUE",
            help="Run to check; without a preset, the file's own command.",
        ),
    ] = None,
    images_per_second_per_worker: Annotated[
        float, typer.Option(min=0.0, help="Assumed speed of one worker on its device.")
    ] = 0.0,
    images: Annotated[int, typer.Option(min=0, help="Rows of data.train, for the hours.")] = 0,
) -> None:
    """Check a launch file and the run on it, without starting anything; exit code 2 if one fails.

    Example: simclr-ray cluster check cluster/aws.yaml scaling.num_workers=4
    """
    versions = versions_of(("ray", "simclr-ray"))
    loading("ray")
    from simclr_ray.cli.launch import runs_of
    from simclr_ray.distributed.launch.check import check_launch, derived, read_launch_file

    launch = read_launch_file(file, versions)
    runs = runs_of(launch.command, run or [])
    passed = _show_findings(check_launch(launch, runs[0] if runs else None))
    if runs:
        speed = images_per_second_per_worker
        show_pairs(derived(launch, runs, images_per_s=speed, images=images))
    if not passed:
        raise typer.Exit(2)


def _show_findings(findings: Iterable[Finding]) -> bool:
    """Print findings as they come; return whether none is a failure."""
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    failed = False
    for finding in findings:
        failed |= finding.status == "fail"
        out.print(marks[finding.status], end="")
        out.print(f"  {finding.check}: {finding.detail}", markup=False, soft_wrap=True)
        if finding.advice:
            out.print(f"      -> {finding.advice}", markup=False, soft_wrap=True)
    return not failed


def planned_run(
    arguments: Sequence[str], storage: str | None = None, workers: int | None = None
) -> Experiment:
    """Return the run that is planned, of which a cluster can be asked without its images.

    Args:
        arguments: A preset or YAML, if any, and overrides, of which the last of a key holds.
        storage: In place of the preset's; None: the preset's, else `STORAGE`.
        workers: In place of the preset's; None: the preset's, else `WORKERS`.
    """
    source, overrides = "", list(arguments)
    if overrides and "=" not in overrides[0]:
        source = overrides.pop(0)
    if source:
        stated = [f"storage={storage}"] if storage else []
        stated += [f"scaling.num_workers={workers}"] if workers else []
        return Experiment.load(source, *stated, *overrides).check_num_workers()
    storage = storage or STORAGE
    tree = {"name": "doctor", "data": {"train": storage}, "storage": storage}
    scaling = {"scaling": {"num_workers": workers or WORKERS}}
    return cfg.validate(Experiment, cfg.apply_overrides(tree | scaling, overrides))


def status(
    source: Annotated[
        str, typer.Argument(metavar="PRESET_OR_YAML", help="Config that is to run there.")
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Show the nodes of the cluster of $RAY_ADDRESS, and whether a config fits.

    Example: simclr-ray cluster status imagenet_resnet50 scaling.num_workers=8
    """
    experiment = Experiment.load(source, *(overrides or [])) if source else None
    if experiment is not None:
        experiment.check_num_workers()
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ClusterError(
            "RAY_ADDRESS is unset: without it, runs start Ray on this machine; set it to HOST:6379 "
            "of a cluster's head, or submit this by `ray job submit`"
        )
    loading("ray")
    from simclr_ray.distributed.placement import (
        OF_EVERY_NODE,
        check_cluster,
        free_nodes,
        nodes,
        room_text,
    )
    from simclr_ray.distributed.ray_cluster import connect

    connect()
    all_nodes = nodes()
    alive = [node for node in all_nodes if node.is_alive]
    free = {node.id: node for node in free_nodes()}
    rows = []
    for node in all_nodes:
        left = free.get(node.id, node._replace(cpus=0.0, gpus=0.0))
        labels = [f"{k}={v}" for k, v in node.labels.items() if k not in OF_EVERY_NODE]
        state = "gone" if not node.is_alive else "alive" if node.id in free else "leaving"
        amounts = [f"{left.cpus:g} of {node.cpus:g}", f"{left.gpus:g} of {node.gpus:g}"]
        rows.append([node.address, state, *amounts, ", ".join(labels)])
    title = f"{counted(len(alive), 'node')} alive at {address}"
    show_table(title, ["node", "state", "CPUs free", "GPUs free", "labels"], rows)
    if experiment is not None:
        check_cluster(experiment)
        show_pairs({"fits": room_text(experiment.scaling)})
