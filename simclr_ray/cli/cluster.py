"""Verbs about the machine and the cluster: doctor, and `simclr-ray cluster ...`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from simclr_ray.cli.arguments import Overrides
from simclr_ray.cli.console import loading, out, show_pairs, show_table
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import counted
from simclr_ray.errors import ClusterError, ConfigError, ConfigIssue
from simclr_ray.storage.filesystem import filesystem


def doctor(
    storage: Annotated[str, typer.Option(help="Folder or URI for runs.")] = "runs",
    workers: Annotated[
        int, typer.Option(min=1, help="Workers of the planned run; up to 4 check the gradient.")
    ] = 2,
    loss: Annotated[
        str, typer.Option(help="Check only this loss of yours: module:attribute.")
    ] = "",
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the loss.")
    ] = None,
) -> None:
    """Check this machine and cluster, and say what to do about each finding.

    Example: simclr-ray doctor --loss own.losses:MyLoss temperature=0.2
    """
    if options and not loss:
        raise ConfigError([ConfigIssue(options[0], "is for a loss of yours, which --loss names")])
    filesystem(storage)  # a scheme that nobody knows is no finding about this machine
    loading("torch")
    from simclr_ray.cli.doctor import check_loss, run_checks

    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    failed = False
    alone = [check_loss(loss, options or [], workers)] if loss else []
    for finding in alone or run_checks(storage, num_workers=workers):
        failed |= finding.status == "fail"
        out.print(f"{marks[finding.status]}  {finding.check}: ", end="")
        out.print(finding.detail, markup=False, soft_wrap=True)
        if finding.advice:
            out.print(f"      -> {finding.advice}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


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
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ClusterError("RAY_ADDRESS is unset: without it, runs start Ray on this machine")
    loading("ray")
    from simclr_ray.distributed.placement import check_cluster, nodes
    from simclr_ray.distributed.ray_cluster import connect

    connect()
    all_nodes = nodes()
    alive = [node for node in all_nodes if node.is_alive]
    rows = [
        [n.address, "alive" if n.is_alive else "gone", f"{n.cpus:g}", f"{n.gpus:g}"]
        for n in all_nodes
    ]
    title = f"{counted(len(alive), 'node')} alive at {address}"
    show_table(title, ["node", "state", "CPUs", "GPUs"], rows)
    if experiment is not None:
        check_cluster(experiment)
        scaling = experiment.scaling
        demand = f"{counted(scaling.max_workers, 'worker')}, {scaling.num_cpus:g} CPUs"
        show_pairs({"fits": f"{demand}, {scaling.num_gpus:g} GPUs"})
