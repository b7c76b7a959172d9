"""`scaling.num_workers: auto`: what this machine has, as numbers, before it is asked for any."""

from __future__ import annotations

import logging
import os
from typing import Final

import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.schema import AUTO
from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError, ConfigIssue

KEY: Final = "scaling.num_workers"
MOST_DATA_ACTORS: Final = 8  # a GPU: what ResNet-50 at 224 px takes (docs/scaling.md)
log = logging.getLogger(__name__)


def resolve_scaling(experiment: Experiment) -> Experiment:
    """Return the experiment with a number of workers: one a GPU of this machine, else one.

    Decode actors share the CPUs that workers leave, up to eight a GPU. What it computes is the
    same for any number.

    Raises:
        ConfigError: It is to run on a cluster, of which this machine says nothing.
    """
    scaling = experiment.scaling
    if scaling.num_workers != AUTO:
        return experiment
    if "RAY_ADDRESS" in os.environ:
        problem = (
            f"{AUTO} asks this machine, and RAY_ADDRESS names a cluster: give "
            f"{KEY}=N scaling.gpus_per_worker=1 (`simclr-ray cluster status` shows its GPUs)"
        )
        raise ConfigError([ConfigIssue(KEY, problem)])
    num_gpus, num_cpus = torch.cuda.device_count(), os.cpu_count() or 1
    update = by_gpus(scaling, num_gpus, num_cpus) if num_gpus else {"num_workers": 1}
    made = scaling.model_copy(update=update)
    on = counted(num_gpus, "GPU") if num_gpus else counted(num_cpus, "CPU")
    log.info("%s on %s of this machine", counted(made.max_workers, "worker"), on)
    return experiment.model_copy(update={"scaling": made})


def by_gpus(scaling: ScalingConfig, num_gpus: int, num_cpus: int) -> dict[str, float]:
    """Return the values of `scaling` for a worker on each GPU of a machine."""
    left = max(1.0, (num_cpus - num_gpus) / num_gpus)  # for the decode actors of one worker
    actors = int(min(MOST_DATA_ACTORS, left))
    return {
        "num_workers": num_gpus,
        "gpus_per_worker": max(1.0, scaling.gpus_per_worker),
        "cpus_per_worker": min(1.0, num_cpus / (2 * num_gpus)),
        "data_actors_per_worker": actors,
        "cpus_per_data_actor": min(1.0, num_cpus / (2 * num_gpus * actors)),
    }
