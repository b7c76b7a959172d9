"""`scaling.num_workers: auto`: what this machine has, as numbers, before it is asked for any."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.schema import AUTO
from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.config.wording import counted
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.ray_address import names_cluster
from simclr_ray.errors import ConfigError
from simclr_ray.nn.precision import unusable_gpu

KEY: Final = "scaling.num_workers"
MOST_DATA_ACTORS: Final = 8  # a GPU, as the presets for ImageNet have
log = logging.getLogger(__name__)


def resolve_scaling(experiment: Experiment) -> Experiment:
    """Return the experiment with a number of workers: one a GPU of this machine, else one.

    Where `gpus_per_worker` is given, as many as the GPUs are enough for. Decode actors share the
    CPUs that workers leave, up to eight a GPU. What is given beside `auto` stays, unless it is the
    default. What it computes is the same for any number.

    Raises:
        ConfigError: It is to run on a cluster, of which this machine says nothing.
    """
    scaling = experiment.scaling
    if scaling.num_workers != AUTO:
        return experiment
    if names_cluster():
        problem = (
            f"{AUTO} asks this machine, and RAY_ADDRESS names a cluster: give "
            f"{KEY}=N scaling.gpus_per_worker=1 (`simclr-ray cluster status` shows its GPUs)"
        )
        raise ConfigError.of(KEY, problem)
    num_gpus, num_cpus = torch.cuda.device_count(), cores()
    made = of_machine(scaling, num_gpus, num_cpus)
    on = counted(num_gpus, "GPU") if num_gpus else counted(num_cpus, "CPU")
    log.info("%s on %s of this machine", counted(made.max_workers, "worker"), on)
    if problem := unusable_gpu():
        log.warning("%s", problem)
    return experiment.model_copy(update={"scaling": made})


def can_train_in_process(experiment: Experiment) -> bool:
    """Return whether one process without a GPU of its own can do all that an experiment asks for.

    That is one worker, on whichever node, that makes its views itself.
    """
    scaling = experiment.scaling
    return scaling.max_workers == 1 and not (
        scaling.gpus_per_worker or scaling.worker_selector or scaling.data_label_selector
    )


def of_machine(scaling: ScalingConfig, num_gpus: int, num_cpus: int) -> ScalingConfig:
    """Return the numbers of a machine, where `scaling` gives none itself."""
    if not num_gpus:
        return scaling.model_copy(update={"num_workers": 1})
    num_workers = max(1, int(num_gpus / (scaling.gpus_per_worker or 1.0)))
    of_worker = num_cpus / num_workers
    values: dict[str, Any] = {
        "gpus_per_worker": 1.0,
        "cpus_per_worker": min(1.0, of_worker / 2),
        "data_actors_per_worker": int(min(MOST_DATA_ACTORS, max(1.0, of_worker - 1))),
    }
    # a config that was written whole (`simclr-ray config`) has every key, and gives none by that
    own = set(scaling.model_fields_set)
    if own == set(ScalingConfig.model_fields):
        usual = ScalingConfig()
        own = {key for key in own if getattr(scaling, key) != getattr(usual, key)}
    if not scaling.gpus_per_worker:
        own.discard("gpus_per_worker")  # one that wants none gives num_workers=1
    values = {key: value for key, value in values.items() if key not in own}
    made = scaling.model_copy(update={"num_workers": num_workers, **values})
    if "cpus_per_data_actor" in own:
        return made
    left = max(of_worker - made.cpus_per_worker, of_worker / 2)
    each = min(1.0, left / made.data_actors_per_worker)
    return made.model_copy(update={"cpus_per_data_actor": each})
