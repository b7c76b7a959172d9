"""Trials that train in the process that reports them: the same numbers, whatever else happens."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import SimclrRayError
from simclr_ray.storage import checkpoint
from simclr_ray.studies.driver import run_study
from simclr_ray.studies.files import load_study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import Trial, base_tree, study_folder
from simclr_ray.studies.trial_runner import Job, run_trial
from simclr_ray.studies.trials import plan
from simclr_ray.train.driver import pretrain, train_resolved
from simclr_ray.train.outcome import Run
from simclr_ray.train.resolve import enter
from tests.ray import processes
from tests.ray.images import write_splits
from tests.ray.test_pretrain import losses_of, tree_of
from tests.ray.test_study import study_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ACTOR = "ray::ImplicitFunc"  # as Tune calls what reports trials


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("in_process"), 130)


def experiment(folder: Path, storage: str, **changes: object) -> Experiment:
    tree = {**tree_of(folder, storage, 1, "float32"), **changes}
    tree["scaling"] = {"threads_per_worker": 1}
    return cfg.validate(Experiment, tree)


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    return checkpoint.read(run.checkpoint).tensors


def test_a_run_in_process_is_that_of_a_worker_to_the_last_bit_and_either_goes_on_with_the_other(
    folder: Path, ray_cluster: str
) -> None:
    by_ray = pretrain(experiment(folder, "by-ray"))
    here = enter(experiment(folder, "here"), train_resolved, in_process=True)
    assert losses_of(Path(here.folder)) == losses_of(Path(by_ray.folder))
    ours, theirs = tensors_of(here), tensors_of(by_ray)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def end(record: dict[str, float]) -> None:
        if record.get("eval/knn_top1") and record["epoch"] < here.metrics["epoch"]:
            raise SimclrRayError("far enough")

    begun = experiment(folder, "begun")
    with pytest.raises(SimclrRayError, match="far enough"):
        enter(begun, train_resolved, in_process=True, on_progress=end)
    gone_on = pretrain(begun)
    assert all(torch.equal(tensors_of(gone_on)[name], theirs[name]) for name in theirs)


def _facts(outcome: TrialOutcome) -> tuple[Any, ...]:
    slow = {"train/images_per_s", "train/data_wait_fraction"}
    curve = {
        epoch: {name: value for name, value in values.items() if name not in slow}
        for epoch, values in outcome.curve.items()
    }
    return outcome.status, outcome.metrics, curve


def _alone(folder: Path, trial: Trial, job: Job) -> TrialOutcome:
    """Return what a trial gives that is run in this process, and in a storage of its own."""
    storage = str(folder / "each" / trial.name)
    moved = trial._replace(experiment=trial.experiment.model_copy(update={"storage": storage}))
    return run_trial(
        job._replace(storage=storage, parent_run="", in_process=True), moved, lambda *_: None
    )


def _kill_when_begun(study: StudyFolder, trial: str, killed: list[int]) -> None:
    """Kill the process of a trial once its run has a checkpoint."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        run = study.runs().get(trial)
        if run is not None and run.checkpoints():
            pid = processes.named(ACTOR)[-1]  # an earlier one may still be ending
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return
        time.sleep(0.005)


def test_trials_share_a_process_and_neither_a_kill_nor_a_collapse_changes_another(
    folder: Path, ray_cluster: str
) -> None:
    cases = {
        "first": {"loss.temperature": 0.2},
        "diverging": {"optimizer.name": "sgd", "schedule.learning_rate": 1e30},
        "killed": {"loss.temperature": 0.5},
        "last": {"loss.temperature": 0.1},
    }
    space = {"setting": {"cases": cases}}
    named: dict[str, Any] = {"figure": {"x": "setting"}, "comparisons": [], "concurrency": 1}
    named["set"] = {"epochs": 4, "checkpoint.every_epochs": 1}
    study = load_study(str(study_file(folder, "shared", space=space, **named)))
    trials = {trial.name: trial for trial in plan(study, base_tree(study))}
    where, killed = StudyFolder(*study_folder(study)), list[int]()
    killer = threading.Thread(
        target=_kill_when_begun, args=(where, "setting-killed_seed-0", killed), daemon=True
    )
    killer.start()
    run_study(study)
    killer.join()
    assert killed
    outcomes = {outcome.trial: outcome for outcome in where.outcomes()}
    statuses = {name.split("_")[0]: outcome.status for name, outcome in outcomes.items()}
    expected = dict.fromkeys(("setting-first", "setting-killed", "setting-last"), "finished")
    assert statuses == {**expected, "setting-diverging": "collapsed"}
    job = Job(study, where.files.storage, where.files.name, "")
    for name, outcome in outcomes.items():
        assert _facts(outcome) == _facts(_alone(folder, trials[name], job)), name
