"""What a dry run times: once for each kind of trial, in a step that stands for the run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.evaluation.cost import EvaluationSeconds
from simclr_ray.studies import step_timing as speed
from simclr_ray.studies.plan import Cell, Trial
from tests.ray.images import write_shapes

NUM_ROWS = 64


@pytest.fixture
def train(tmp_path: Path) -> str:
    write_shapes(tmp_path / "train.parquet", NUM_ROWS)
    return str(tmp_path / "train.parquet")


def experiment(train: str = "x", **changes: Any) -> Experiment:
    tree = {"name": "t", "data": {"train": train}, "batch_size": 32, "epochs": 4, **changes}
    return cfg.validate(Experiment, tree)


def trials(*experiments: Experiment) -> list[Trial]:
    return [
        Trial(f"t{i}", (Cell({"i": i}, 0),), 0, made.model_copy(update={"name": f"t{i}"}))
        for i, made in enumerate(experiments)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"temperature": 0.1}},
        {"schedule": {"learning_rate": 0.1}},
        {"optimizer": {"weight_decay": 0.1}},
        {"augment": {"strength": 0.1}},
        {"seed": 7},
        {"epochs": 100},
    ],
)
def test_what_costs_no_time_makes_no_other_kind(changes: dict[str, Any]) -> None:
    assert speed.kind_of(experiment(**changes)) == speed.kind_of(experiment())


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": {"depth": 34}},
        {"augment": {"size": 64}},
        {"augment": {"blur": 0.0}},
        {"augment": {"name": "pipeline", "a": [{"name": "crop"}, {"name": "sobel"}]}},
        {"optimizer": {"name": "adamw"}},
        {"batch_size": 16},
        {"batch_norm": {"group_size": 16}},
        {"precision": "bf16"},
        {"loss": {"name": "cross_entropy"}, "head": {"name": "classifier"}},
        {"loss": {"name": "cross_entropy", "views": 2}, "head": {"name": "classifier"}},
    ],
)
def test_what_costs_time_makes_another_kind(changes: dict[str, Any]) -> None:
    assert speed.kind_of(experiment(**changes)) != speed.kind_of(experiment())


def test_each_kind_is_timed_once_and_time_is_shared_by_what_runs_side_by_side(
    train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves: list[int] = []
    nothing = EvaluationSeconds(0.0, 0.0, 0.0, 0.0, 0.0)

    def timed(experiments: Sequence[Experiment], _: Sequence[str]) -> list[speed.TrialSeconds]:
        waves.append(len(experiments))
        images = [0.5 if e.encoder.depth == 18 else 2.0 for e in experiments]  # type: ignore[union-attr] # a ResNet
        return [speed.TrialSeconds(image, 0.0, nothing, 0.0) for image in images]

    monkeypatch.setattr(speed, "_timed", timed)
    monkeypatch.setattr(speed, "TRIAL_S", 0.0)
    small = [experiment(train, seed=seed, encoder={"depth": 18}) for seed in range(4)]
    large = experiment(train, encoder={"depth": 34})
    images = NUM_ROWS * 4
    pace = speed.pace_of(trials(*small), 2)
    assert waves == [1]
    assert (pace.seconds, pace.device_seconds) == (images, 2 * images)
    pace = speed.pace_of(trials(large, *small), 2)
    assert waves == [1, 2]
    assert pace.seconds == 2 * images  # of 2.0 and 4 x 0.5, two at a time
    assert speed.pace_of(trials(*small, large), 2).seconds == 3 * images  # the long one at the end
    assert speed.pace_of(trials(*small, large), 64).seconds == 2 * images  # the longest alone
    waves.clear()
    speed.pace_of(trials(*small), 3, cores=2.0)
    assert waves == [3]  # of one kind, beside as many as there will be


@pytest.mark.parametrize(
    ("seconds", "at_a_time", "ends"),
    [([3, 1, 1, 2], 2, 4), ([1, 1, 1], 1, 3), ([1, 5], 2, 5), ([5, 1, 1, 1, 1, 1], 2, 5)],
)
def test_trials_are_begun_in_turn_as_soon_as_there_is_room(
    seconds: list[float], at_a_time: int, ends: float
) -> None:
    assert speed.makespan(seconds, at_a_time) == ends


def test_evaluation_counts_at_each_epoch_that_has_one_and_once_at_the_end(
    train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = EvaluationSeconds(read=7.0, start=1.0, epoch=10.0, final=100.0, baselines=250.0)

    def timed(experiments: Sequence[Experiment], _: Sequence[str]) -> list[speed.TrialSeconds]:
        return [speed.TrialSeconds(0.0, 3.0, of, 5.0) for _ in experiments]

    monkeypatch.setattr(speed, "_timed", timed)
    monkeypatch.setattr(speed, "TRIAL_S", 0.5)
    every_second = experiment(train, evaluation={"every_epochs": 2}, epochs=5)
    pace = speed.pace_of(trials(every_second, every_second), 1)
    assert pace.start == 5 + 7 + 3  # images are decoded once for all trials
    assert pace.evaluation == 2 * (1 + 3 * 10 + 100)  # after epochs 2, 4 and the last
    assert pace.seconds == pace.start + pace.evaluation + 2 * 0.5
    with_baselines = speed.pace_of(trials(every_second, every_second), 1, baselines=True)
    assert with_baselines.seconds == pace.seconds + 250
    assert with_baselines.evaluation == pace.evaluation  # of the trials
    beside = speed.pace_of(trials(every_second, every_second), 2, baselines=True)
    assert beside.seconds == beside.start + 2 * (131 + 0.5)  # begun first, they end before
