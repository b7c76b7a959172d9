"""A run goes back to a good checkpoint, and its rate is halved from there on, whatever happens."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    DivergedError,
    UnhealthyRunError,
)
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.resolve import ResolvedExperiment, resolve
from simclr_ray.train.rollback import STATE, CheckpointKeeper, Rollbacks, roll_back
from simclr_ray.train.step_schedule import StepSchedule, schedule_of
from tests.ray.images import write_shapes

POLICY = ("health.on_divergence=rollback", "health.on_collapse=rollback")
NONE = Rollbacks()
DIVERGED = DivergedError("the loss is not finite at step 47")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "train.parquet"
    write_shapes(path, 160)  # ten steps an epoch
    return path


def resolved(images: Path, folder: Path, *overrides: str) -> ResolvedExperiment:
    given = {"data.train": images, "storage": folder / "runs", "batch_size": 16, "data.test": "''"}
    changes = [f"{key}={value}" for key, value in given.items()]
    return resolve(Experiment.load("cifar10_study_cpu", *changes, *overrides))


def save(run: ResolvedExperiment, step: int, rollbacks: Rollbacks = NONE) -> str:
    """Write a checkpoint as a worker does; return its name."""
    name = checkpoint.new_name(step)
    record = {**run.identity, **rollbacks.record}
    tensors = {"model.w": torch.full((2,), float(step))}
    checkpoint.write(Path(run.folder.uri) / name, step, tensors, record)
    return name


def steps_in(folder: RunFolder) -> list[int]:
    return sorted(checkpoint.step_of(name) for name in folder.checkpoints())


def begun(run: ResolvedExperiment, *steps: int) -> RunFolder:
    Path(run.folder.uri).mkdir(parents=True)
    RunRecord("1" * 32, "sqlite:///x", "f", run.digest).write(run.folder)
    for step in steps:
        save(run, step)
    return run.folder


def test_the_rate_is_halved_from_the_step_of_each_rollback_and_nowhere_before() -> None:
    plain = StepSchedule(10, 80, 10, 0.8, 16)
    twice = replace(plain, halved_at=(20, 30))
    for step in range(80):
        expected = 1.0 if step < 20 else 0.5 if step < 30 else 0.25
        assert twice.learning_rate(step) == expected * plain.learning_rate(step)


def test_a_run_goes_back_to_the_newest_finite_checkpoint_and_says_so_everywhere(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 20, 30, 40)
    state = roll_back(run, NONE, DIVERGED, 46)
    assert (state.halved_at, state.rate_multiplier) == ((40,), 0.5)
    assert schedule_of(run, state.halved_at).learning_rate(41) == 0.5 * schedule_of(
        run
    ).learning_rate(41)
    assert Rollbacks.read(folder) == state
    record = RunRecord.read(folder)
    assert (record.rollbacks, record.rate_multiplier) == (1, 0.5)
    assert steps_in(folder) == [20, 30, 40]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.endswith(
        "going back to the checkpoint of step 40, and on at 0.5 times the planned rate "
        "(rollback 1 of 3)"
    )
    assert state.record == {"rollbacks": 1, "rate_multiplier": 0.5, "halved_at": [40]}


def test_what_fails_again_no_later_goes_further_back_and_ends_at_the_start(
    images: Path, tmp_path: Path
) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 30, 40)
    state = roll_back(run, NONE, DIVERGED, 46)
    state = roll_back(run, state, DIVERGED, 46)  # before a further checkpoint
    assert state.halved_at == (30, 30)
    assert steps_in(folder) == [30]
    state = roll_back(run, state, DIVERGED, 44)
    assert state.halved_at == (0, 0, 0)
    assert steps_in(folder) == []
    with pytest.raises(DivergedError, match=r"rolled back 3 times before .* a rate of 0\.125 "):
        roll_back(run, state, DIVERGED, 44)
    reasons = json.loads((Path(folder.uri) / STATE).read_text())["history"]
    assert [entry["rate_multiplier"] for entry in reasons] == [0.5, 0.25, 0.125]


def test_checkpoints_later_than_the_last_record_count(images: Path, tmp_path: Path) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 20, 30)
    state = roll_back(run, NONE, DIVERGED, 0)  # nothing was logged yet
    assert (state.halved_at, steps_in(folder)) == ((30,), [20, 30])
    save(run, 40, state)
    assert roll_back(run, state, DIVERGED, 0).halved_at == (30, 40)


def test_what_gets_further_and_fails_goes_back_to_its_own_newest(
    images: Path, tmp_path: Path
) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 40)
    state = roll_back(run, NONE, DIVERGED, 46)
    save(run, 60, state)
    state = roll_back(run, state, DIVERGED, 66)
    assert state.halved_at == (40, 60)
    assert steps_in(folder) == [40, 60]


def test_a_collapse_goes_back_to_before_its_first_sign_and_leaves_nothing_later(
    images: Path, tmp_path: Path
) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 20, 30, 40, 50)
    error = CollapseError("stuck")
    error.good_until = 35
    state = roll_back(run, NONE, error, 55)
    assert state.halved_at == (30,)
    assert steps_in(folder) == [20, 30]


def test_a_kill_between_the_state_and_the_rest_changes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 30, 40)
    error = CollapseError("stuck")
    error.good_until = 35

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Rollbacks, "drop_abandoned", kill)
        with pytest.raises(Killed):
            roll_back(run, NONE, error, 45)
    state = Rollbacks.read(folder)
    assert state.halved_at == (30,)
    state.drop_abandoned(folder)
    assert steps_in(folder) == [30]
    later = save(run, 40, state)
    state.drop_abandoned(folder)  # of the new branch, it stays
    assert folder.checkpoints()[0] == later


def test_a_lost_state_is_taken_from_a_checkpoint_and_never_guessed(
    images: Path, tmp_path: Path
) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 40)
    state = roll_back(run, NONE, DIVERGED, 46)
    (Path(folder.uri) / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"rolled back 1 time, and rollbacks\.json"):
        Rollbacks.read(folder)
    save(run, 50, state)
    for altered in (
        None,
        "{}",
        "[1]",
        '{"halved_at": [], "history": [{"failed_after": 9}]}',
        '{"halved_at": [null], "history": [{}]}',
    ):
        if altered is not None:
            (Path(folder.uri) / STATE).write_text(altered)
        assert Rollbacks.read(folder).halved_at == state.halved_at


@pytest.mark.parametrize(
    ("policy", "error", "said"),
    [
        ((), DIVERGED, "at step 47$"),
        (("health.on_collapse=rollback",), DIVERGED, "at step 47$"),
        (("health.on_divergence=rollback",), CollapseError("stuck"), "stuck$"),
    ],
)
def test_an_error_whose_policy_is_another_ends_the_run(
    policy: tuple[str, ...], error: UnhealthyRunError, said: str, images: Path, tmp_path: Path
) -> None:
    run = resolved(images, tmp_path, *policy)
    folder = begun(run, 40)
    with pytest.raises(type(error), match=said):
        roll_back(run, NONE, error, 46)
    assert folder.read_text(STATE) is None


def test_what_no_rate_mends_is_not_rolled_back(images: Path, tmp_path: Path) -> None:
    run = resolved(images, tmp_path, *POLICY)
    folder = begun(run, 40)
    error = CollapseError("there is nothing to learn")
    error.rate_may_help = False
    with pytest.raises(CollapseError, match="not rolled back: a lower rate does not mend that"):
        roll_back(run, NONE, error, 46)
    assert steps_in(folder) == [40]


@pytest.mark.parametrize(
    ("checkpoints", "refused"),
    [
        (("checkpoint.every_epochs=8",), True),
        (("checkpoint.every_epochs=9",), True),
        (("checkpoint.every_epochs=9", "checkpoint.every_steps=40"), False),
        (("checkpoint.every_epochs=4",), False),
    ],
)
def test_a_policy_without_checkpoints_is_refused_before_anything_starts(
    checkpoints: tuple[str, ...], images: Path, tmp_path: Path, *, refused: bool
) -> None:
    resolved(images, tmp_path, *checkpoints)  # without the policy it may be
    if not refused:
        resolved(images, tmp_path, *checkpoints, POLICY[1])
        return
    with pytest.raises(ConfigError, match=r"health: rollback needs a checkpoint before") as error:
        resolved(images, tmp_path, *checkpoints, POLICY[1])
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("often", ["checkpoint.every_epochs=1", "checkpoint.every_steps=1000"])
def test_the_newest_checkpoint_without_a_sign_is_kept_beside_the_newest(
    images: Path, tmp_path: Path, often: str
) -> None:
    run = resolved(images, tmp_path, *POLICY, "checkpoint.keep=1", often)
    folder = begun(run)
    health, keeper = HealthWatch(run.config), CheckpointKeeper(run)
    values: dict[str, Any] = {"train/mean_loss": 3.0}
    for step in (10, 20):
        save(run, step)
        health({"step": step, "epoch": step / 10, **values})
        keeper.keep(health)
    assert steps_in(folder) == [20]
    for step in (30, 40):
        save(run, step)
        health({"step": step, "epoch": step / 10, "train/mean_loss": math.log(31)})
        keeper.keep(health)
    assert steps_in(folder) == [20, 40]
