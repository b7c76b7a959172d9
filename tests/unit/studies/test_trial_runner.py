"""A trial that has collapsed is ended, with the reason; a healthy one is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CollapseError, DivergedError, RunError
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import METRICS, RunFolder
from simclr_ray.studies import trial_runner as trial_module
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder
from simclr_ray.studies.plan import Cell, Trial
from simclr_ray.studies.trial_runner import Job, RunWatch, outcome_of, run_trial
from simclr_ray.studies.tune import _Driver, all_ended
from simclr_ray.train.outcome import Run
from tests.ray.images import write_shapes

N = 64
SPACE = {"loss.temperature": {"grid": [0.1, 0.5]}}
STUCK = math.log(2 * N - 1)


def experiment(**changes: object) -> Experiment:
    tree = {"name": "t", "data": {"train": "x"}, "batch_size": N, "epochs": 20, **changes}
    return cfg.validate(Experiment, {**tree, "schedule": {"warmup_epochs": 1.0}})


def told() -> tuple[list[tuple[int, dict[str, float]]], RunWatch]:
    epochs: list[tuple[int, dict[str, float]]] = []
    return epochs, RunWatch(experiment(), lambda epoch, values: epochs.append((epoch, values)))


def test_epoch_ends_carry_the_training_record_before_them() -> None:
    epochs, watch = told()
    watch({"step": 5, "epoch": 1.0, "total": 9, "train/mean_loss": 3.0})
    watch({"step": 5, "epoch": 1, "total": 9, "eval/knn_top1": 0.5, "eval/effective_rank": 9.0})
    assert epochs == [
        (1, {"train/mean_loss": 3.0, "eval/knn_top1": 0.5, "eval/effective_rank": 9.0})
    ]


def test_a_log_without_an_epoch_that_is_read_gives_no_result(tmp_path: Path) -> None:
    """In a bucket a checkpoint is there at once, and the log a minute later."""
    lines = "".join(
        json.dumps({"step": 10 * e, "epoch": e, "total": 200, "eval/knn_top1": 0.3}) + "\n"
        for e in (5, 10, 15)
    )
    resolved: Any = SimpleNamespace(config=experiment(), folder=RunFolder(str(tmp_path), "r-1"))
    (tmp_path / "r-1").mkdir()
    resolved.folder.write_text(METRICS, lines)
    tree = {"name": "s", "question": "?", "base": "cifar10_cpu", "space": SPACE}
    tree |= {"metric": "eval/knn_top1", "figure": {"x": "loss.temperature"}}
    study = cfg.validate(Study, tree)
    whole, middle = (Trial("t", (Cell({}, e),), 0, experiment()) for e in (0, 15))
    with pytest.raises(RunError, match="the log lacks epoch 20, lost with a driver"):
        trial_module._check_curve(study, whole, resolved)
    trial_module._check_curve(study, middle, resolved)
    resolved.folder.write_text(METRICS, lines + lines.splitlines()[0].replace("5", "20") + "\n")
    trial_module._check_curve(study, whole, resolved)


@pytest.mark.parametrize(("is_stopping", "ended"), [(False, True), (True, False)])
def test_a_trial_that_failed_before_has_not_ended_where_its_next_try_was_stopped(
    *, is_stopping: bool, ended: bool
) -> None:
    outcomes: Any = [
        SimpleNamespace(trial="a", status="finished"), SimpleNamespace(trial="b", status="failed")
    ]  # fmt: skip
    assert all_ended(outcomes, ["a", "b"], is_stopping=is_stopping) == ended
    assert all_ended(outcomes, ["a"], is_stopping=is_stopping)
    assert not all_ended(outcomes, ["a", "c"], is_stopping=is_stopping)


@pytest.mark.parametrize("starts", [True, False])
def test_what_a_trial_died_by_is_said_and_not_what_it_failed_by_before(
    tmp_path: Path, *, starts: bool
) -> None:
    tree = {"name": "s", "question": "?", "base": "cifar10_cpu", "space": SPACE}
    folder, trial = StudyFolder(str(tmp_path), "s"), Trial("t", (Cell({}, 0),), 0, experiment())
    driver = _Driver(cfg.validate(Study, tree), folder, lambda _: trial, None)
    before = outcome_of(trial, None, "failed", reason="no space left on device")
    folder.write_outcome(before)
    of_tune = SimpleNamespace(config={}, error_file="")
    if starts:
        driver.on_trial_start(0, [], of_tune)
        assert folder.outcome("t") is None  # it is open again
    driver.on_trial_error(0, [], of_tune)
    died = folder.outcome("t")
    assert died is not None
    assert (died.status, died.reason) == ("failed", "its process died")
    done = before._replace(status="finished")
    folder.write_outcome(done)
    driver.on_trial_start(0, [], of_tune)
    driver.on_trial_error(0, [], of_tune)
    assert folder.outcome("t") == done


@pytest.mark.parametrize(("loss", "ends"), [(STUCK, True), (STUCK - 0.2, False)])
def test_a_loss_of_equal_embeddings_ends_a_run_once_it_has_had_its_time(
    loss: float, *, ends: bool
) -> None:
    _, watch = told()
    records = [
        {"step": step, "epoch": step / 100, "total": 900, "train/mean_loss": loss}
        for step in range(10, 210, 10)
    ]
    for record in records[:-1]:
        watch(record)
    if not ends:
        watch(records[-1])
        return
    with pytest.raises(CollapseError, match=r"stuck: .* 4\.8442"):
        watch(records[-1])


def test_the_last_good_epoch_is_that_of_the_last_evaluation_that_ended_nothing() -> None:
    _, watch = told()
    good = {"eval/effective_rank": 9.0}
    watch({"step": 5, "epoch": 5, "total": 9, **good})
    with pytest.raises(DivergedError):
        watch({"step": 6, "epoch": 6.5, "total": 9, "train/mean_loss": math.nan})
    assert watch.last_good == 5
    _, watch = told()
    watch({"step": 5, "epoch": 5, "total": 9, **good})
    with pytest.raises(CollapseError):
        watch({"step": 10, "epoch": 10, "total": 9, "eval/effective_rank": 1.02})
    assert watch.last_good == 5


def test_a_trial_that_is_to_warn_goes_on_and_says_what_was_wrong() -> None:
    watch = RunWatch(experiment(health={"on_collapse": "warn"}), lambda *_: None)
    for epoch in (1, 2):
        watch({"step": epoch, "epoch": epoch, "total": 9, "eval/effective_rank": 1.02})
    assert "effective rank is 1.02 after epoch 1" in watch.warned


def test_features_of_one_direction_end_a_run() -> None:
    _, watch = told()
    with pytest.raises(CollapseError, match=r"effective rank is 1\.02"):
        watch({"step": 1, "epoch": 1, "total": 9, "eval/effective_rank": 1.02})


def test_a_loss_that_is_not_ntxent_is_not_evaluated_by_it() -> None:
    watch = RunWatch(experiment(loss={"name": "triplet"}), lambda *_: None)
    watch({"step": 1, "epoch": 9.0, "total": 9, "train/mean_loss": STUCK})


def test_cost_is_read_off_the_records_whatever_was_repeated(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    (tmp_path / "run").mkdir()
    records = [(10, 64.0), (20, 128.0), (10, 32.0)]  # step 10 again, after a kill
    lines = [json.dumps({"step": s, "epoch": s / 16, "train/images_per_s": v}) for s, v in records]
    (tmp_path / "run" / METRICS).write_text("\n".join(lines))
    made = experiment(scaling={"num_workers": 2})
    trial = Trial("t", (Cell({"a": 1}, 0),), 0, made)
    cost = outcome_of(trial, folder, "finished").cost
    assert cost == {
        "images": 20 * N, "seconds": 20.0 + 5.0, "device_seconds": 50.0, "epochs": 1.25
    }  # fmt: skip


def test_a_remote_run_is_evaluated_by_a_copy_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "step-00000007-0000000a"
    checkpoint.write(tmp_path / "run" / name, 7, {"model.w": torch.ones(2)}, {})
    run = Run("run", (tmp_path / "run").as_uri(), name, "", {})
    evaluated: list[Path] = []

    def evaluate(_study: Study, _experiment: Experiment, folder: Path) -> dict[str, float]:
        evaluated.append(folder)
        assert checkpoint.read(folder).step == 7
        return {"top1": 0.5}

    monkeypatch.setattr(trial_module, "_scores", evaluate)
    given = cfg.validate(Study, {"name": "s", "question": "?", "base": "b", "space": SPACE})
    made = experiment(storage=str(tmp_path / "runs"))
    assert trial_module.evaluate_trial(given, made, run) == {"top1": 0.5}
    assert evaluated[0].name == name
    assert not evaluated[0].exists()


def test_a_trial_whose_images_fill_no_batch_has_failed_and_takes_no_other_with_it(
    tmp_path: Path,
) -> None:
    write_shapes(tmp_path / "train.parquet", N - 1)
    tree = {"name": "s", "question": "q", "base": "x", "space": SPACE, "metric": "eval/knn_top1"}
    study = cfg.validate(Study, tree)
    job = Job(study, str(tmp_path), "s", "")
    trial = Trial("t", (), 0, experiment(data={"train": str(tmp_path / "train.parquet")}))
    outcome = run_trial(job, trial, lambda *_: None)
    assert (outcome.status, outcome.run["folder"], outcome.cost["images"]) == ("failed", "", 0)
    assert "63 rows do not fill one global batch of 64" in outcome.reason
    assert job.folder.outcome("t") == outcome
