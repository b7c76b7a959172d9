"""The logs of a job's workers and actors, which Ray writes: as JSON where that is asked for."""

from __future__ import annotations

from typing import Any

import ray
from ray.job_config import JobConfig

from simclr_ray.config import logging as config_logging


def options() -> dict[str, Any]:
    """Return what `ray.init` is given for it; nothing for text.

    Its own argument for it would take the driver's root logger as well, where the host's lines go.
    """
    if not config_logging.is_json():
        return {}
    config = JobConfig()
    config.set_py_logging_config(ray.LoggingConfig(encoding="JSON", log_level="INFO"))
    return {"job_config": config}
