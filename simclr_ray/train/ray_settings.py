"""What Ray Train is given of a run's workers, the same for whoever starts them."""

from __future__ import annotations

from typing import Any

import ray.train.torch
import ray.train.v2.api.config as ray_config

from simclr_ray.config.experiment import ScalingConfig
from simclr_ray.distributed.placement import worker_resources


def scaling_config(
    scaling: ScalingConfig, num_workers: int | tuple[int, int], **options: Any
) -> ray_config.ScalingConfig:
    """Return how many workers there are, with what, and on which nodes.

    Args:
        scaling: Of the run.
        num_workers: Of them; (least, most) where it may change.
        options: Further ones of Ray's.
    """
    return ray_config.ScalingConfig(
        num_workers=num_workers,
        use_gpu=scaling.gpus_per_worker > 0,
        resources_per_worker=worker_resources(scaling),
        label_selector=scaling.worker_selector or None,
        **options,
    )


def torch_config(scaling: ScalingConfig, timeout_s: float) -> ray.train.torch.TorchConfig:
    """Return the process group's backend, and how long it waits for a rank."""
    backend = "nccl" if scaling.gpus_per_worker else "gloo"
    return ray.train.torch.TorchConfig(backend=backend, timeout_s=max(1, int(timeout_s)))
