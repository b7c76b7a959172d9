"""A run that has collapsed is ended or said, and its encoder is not registered unasked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CollapseError
from simclr_ray.inference.registry import check_scores
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_status import SCORES
from simclr_ray.train.health import HealthWatch

N = 64
STUCK = math.log(2 * N - 1)


def watch(**schedule: Any) -> HealthWatch:
    tree = {"name": "t", "data": {"train": "x"}, "batch_size": N, "schedule": schedule}
    return HealthWatch(cfg.validate(Experiment, tree))


@pytest.mark.parametrize(("step", "ends"), [(210, False), (290, False), (310, True)])
def test_a_warm_up_in_steps_is_waited_for_as_one_in_epochs(step: int, *, ends: bool) -> None:
    """100 steps an epoch: a warm-up of 100 steps, and two epochs more."""
    record = {"step": step, "epoch": step / 100, "total": 900, "train/mean_loss": STUCK}
    health = watch(warmup_steps=100)
    if not ends:
        health(record)
        return
    with pytest.raises(CollapseError, match="stuck: the loss"):
        health(record)
    assert health.collapsed_at == 3


def test_what_ends_a_run_is_no_part_of_its_digest() -> None:
    tree: dict[str, Any] = {"name": "t", "data": {"train": "x"}}
    one, other = (
        cfg.validate(Experiment, tree | {"health": {"on_collapse": policy}})
        for policy in ("stop", "warn")
    )
    assert one.digest() == other.digest() == cfg.validate(Experiment, tree).digest()


@pytest.mark.parametrize(
    ("trained", "untrained", "refused"),
    [(1.5, 2.3, True), (1.0, 1.4, True), (1.5, 1.4, False), (9.0, 11.0, False), (None, 2.0, False)],
)
def test_an_encoder_that_spans_less_than_an_untrained_one_is_not_registered(
    trained: float | None, untrained: float, tmp_path: Path, *, refused: bool
) -> None:
    folder = RunFolder(str(tmp_path), "r")
    rows = {"trained encoder": trained, "untrained encoder": untrained}
    scores = [{"name": name, "effective_rank": rank} for name, rank in rows.items()]
    folder.write_text(SCORES, json.dumps(scores))
    if not refused:
        check_scores(folder)
        return
    with pytest.raises(CollapseError, match=r"effective rank is 1\..*untrained.*--force"):
        check_scores(folder)


def test_a_run_that_was_not_evaluated_may_be_registered(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "r")
    check_scores(folder)
    folder.write_text(SCORES, "[]")
    check_scores(folder)
