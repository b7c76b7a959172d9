"""What this machine cannot give a run, told without Ray."""

from __future__ import annotations

import math
from typing import Final

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import counted
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.selectors import selectors_of, shown
from simclr_ray.errors import ClusterError

WORKERS_PER_CORE: Final = 4  # enough to try what many workers do; each takes memory of its own


def check_fits(experiment: Experiment, copies: int = 1) -> None:
    """Raise `ClusterError` for what a Ray that is started on this machine cannot give.

    Args:
        experiment: Of a run.
        copies: So many runs at a time.
    """
    _check_cores(experiment, copies)
    _check_devices(experiment)


def _check_cores(experiment: Experiment, copies: int) -> None:
    """Raise `ClusterError` for far more processes than this machine has cores."""
    there, scaling = cores(), experiment.scaling
    if copies * scaling.max_workers > WORKERS_PER_CORE * there:
        times = f"{copies} trials of " if copies > 1 else ""
        raise ClusterError(
            f"{times}scaling.num_workers={scaling.max_workers} on a machine of "
            f"{counted(there, 'core')}; more than {WORKERS_PER_CORE * there} would wait for each "
            "other (RAY_ADDRESS names a cluster)"
        )
    for key in ("cpus_per_worker", "cpus_per_data_actor"):
        if getattr(scaling, key) > there:
            raise ClusterError(
                f"scaling.{key}={getattr(scaling, key):g}, and this machine has "
                f"{counted(there, 'core')} (RAY_ADDRESS names a cluster)"
            )


def _check_devices(experiment: Experiment) -> None:
    """Raise `ClusterError` for GPUs or labels that this machine does not have."""
    scaling, evaluation = experiment.scaling, experiment.evaluation
    for key, selector in selectors_of(scaling).items():
        if selector:
            raise ClusterError(
                f"scaling.{key}={shown(selector)}: the cluster that is started on "
                "this machine has no labels of your own (RAY_ADDRESS names a cluster)"
            )
    wanted = {
        "scaling.gpus_per_worker": (scaling.gpus_per_worker, scaling.max_workers),
        "evaluation.gpus_per_actor": (evaluation.gpus_per_actor, evaluation.num_actors),
    }
    if not any(each * times for each, times in wanted.values()):
        return
    import torch

    there = torch.cuda.device_count()
    for key, (each, times) in wanted.items():
        if each * times > there:
            raise ClusterError(
                f"{key}={each:g} for {times} asks for {counted(math.ceil(each * times), 'GPU')}, "
                f"and PyTorch sees {there or 'none'} on this machine (RAY_ADDRESS names a cluster)"
            )
