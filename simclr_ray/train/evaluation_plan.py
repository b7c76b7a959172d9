"""Where the scores after training are computed, and whether that fits, asked before it starts."""

from __future__ import annotations

import tempfile
from typing import Final, NamedTuple

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import counted
from simclr_ray.data.source import Source
from simclr_ray.distributed.machine import machine_memory
from simclr_ray.errors import ConfigError
from simclr_ray.evaluation.encoded_splits import VIEWS_BYTES, EvaluatedRows, evaluated_rows
from simclr_ray.evaluation.feature_file import BLOCK_BYTES
from simclr_ray.evaluation.scores import PIXEL_SIDE_PX
from simclr_ray.nn.build import build_model
from simclr_ray.nn.encoders import feature_dim
from simclr_ray.storage.space import sized, space_at
from simclr_ray.train.disk_space import counting_device

MAX_MEMORY_FRACTION: Final = 0.5  # of this machine, for decoded views; Ray is there as well


class EvaluationPlan(NamedTuple):
    """What the scores of a run take of the driver's machine.

    Attributes:
        rows: Of the splits.
        views_bytes: All their views, decoded.
        features_bytes: All features of the trained and the untrained encoder, and of pixels.
    """

    rows: EvaluatedRows
    views_bytes: int
    features_bytes: int

    @property
    def text(self) -> str:
        """Return it in a line."""
        images = counted(self.rows.num, "image")
        if not self.rows.by_actors:
            return f"{images} in this process: {sized(self.views_bytes)} of views"
        actors = "one actor a device"
        if self.rows.actors:
            actors = counted(self.rows.actors, "actor")
        here = f"{images} by {actors}: {sized(self.features_bytes)} of features"
        if self.features_bytes <= BLOCK_BYTES:
            return f"{here} in memory here"
        return (
            f"{here} in files of {tempfile.gettempdir()} here, {sized(BLOCK_BYTES)} of them in "
            "memory at a time"
        )


def evaluation_plan(config: Experiment, train: Source | None = None) -> EvaluationPlan:
    """Return what the scores after training take.

    Args:
        config: Of the run.
        train: Its training images, where they are open already.

    Raises:
        DataError: A split cannot be read.
    """
    return plan_of(config, evaluated_rows(config, train))


def plan_of(config: Experiment, rows: EvaluatedRows) -> EvaluationPlan:
    """Return what the scores of so many rows take."""
    size, channels = config.evaluation_size, config.data.channels
    with counting_device(config):
        width = feature_dim(build_model(config).encoder)
    pixels = channels * min(size, PIXEL_SIDE_PX) ** 2
    return EvaluationPlan(rows, channels * size**2 * rows.num, 4 * (2 * width + pixels) * rows.num)


def check_evaluation(config: Experiment, train: Source | None = None) -> None:
    """Refuse a run whose scores could not be computed where it is driven from.

    Args:
        config: Of the run.
        train: Its training images, where they are open already.

    Raises:
        ConfigError: The views are too many for one process, or the features for the disk.
        DataError: A split cannot be read.
    """
    plan = evaluation_plan(config, train)
    if plan.rows.by_actors:
        place = tempfile.gettempdir()
        free = space_at(place).free
        if plan.features_bytes > free:
            problem = (
                f"{place} has {sized(free)} free; {sized(plan.features_bytes)} of features of "
                f"{counted(plan.rows.num, 'image')} have to fit: make room, or set TMPDIR to "
                "another folder"
            )
            raise ConfigError.of("TMPDIR", problem)
        return
    memory = machine_memory()
    if plan.views_bytes > max(VIEWS_BYTES, MAX_MEMORY_FRACTION * memory):
        problem = (
            f"{sized(plan.views_bytes)} of views of {counted(plan.rows.num, 'image')} do not fit "
            f"this process, whose machine has {sized(memory)}: auto has actors encode them"
        )
        raise ConfigError.of("evaluation.actors", problem)
