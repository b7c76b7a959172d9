"""`--dry-run` and `--time`: what a config means in numbers, and how long it takes here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from simclr_ray.cli.console import say, show_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simclr_ray.train.resolve import ResolvedExperiment

TIME: Final = "--time"
NOT_MEASURED: Final = f"not measured; {TIME} trains for some seconds here and tells it"
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the arithmetic and stop.")]
Timed = Annotated[
    bool, typer.Option(TIME, help="A dry run that also times steps here: how long the run takes.")
]


def show_arithmetic(
    resolved: ResolvedExperiment, *, timed: bool, changed: Mapping[str, str] | None = None
) -> None:
    """Show what a run means in numbers; a disk without room for its checkpoints is refused.

    Args:
        resolved: The run.
        timed: Its time follows.
        changed: Rows that read otherwise.
    """
    from simclr_ray.train.disk_space import check_space
    from simclr_ray.train.dry_run import derived

    hint = {} if timed else {"time": NOT_MEASURED}
    show_pairs({**derived(resolved), **(changed or {}), **hint})
    check_space(resolved)


def show_time(resolved: ResolvedExperiment, *, is_anew: bool = False) -> None:
    """Train for some seconds, and show how long the run takes.

    Args:
        resolved: The run.
        is_anew: It is to begin again, whatever its checkpoints hold.
    """
    from simclr_ray.train.run_time import time_rows, untimed

    if not untimed(resolved.config):
        say("timing some steps on this machine ...")
    show_pairs(time_rows(resolved, is_anew=is_anew))
