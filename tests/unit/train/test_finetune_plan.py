"""What a distillation takes over of its teacher's run, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train import finetune

RECORD = RunRecord("1" * 32, "sqlite:////x/mlflow.db", "f", "d")


@pytest.mark.parametrize(
    ("overrides", "limit"), [([], 130), (["data.train=mine"], 0), (["data.limit=7"], 7)]
)
def test_the_limit_of_a_teacher_is_of_its_own_images_and_is_said(
    overrides: list[str],
    limit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ["data.train=theirs", "data.test=test", "data.limit=130", "loss.name=cross_entropy"]
    tree = cfg.to_tree(Experiment.load("cifar10_study_cpu", *given, "head.name=classifier"))

    def entered(experiment: Experiment, *_: Any) -> Experiment:
        return experiment

    monkeypatch.setattr(finetune, "_record", lambda *_: (tree, RECORD))
    monkeypatch.setattr(finetune, "enter", entered)
    student: Any = finetune.plan_distillation(str(tmp_path), *overrides)
    assert student.data.limit == limit
    said = f"the images are the first {limit} (data.limit)"
    assert [said] * bool(limit) == [m for m in caplog.messages if "data.limit" in m]
