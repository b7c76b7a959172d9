"""How a study stands: what is planned, what runs, and what a search has yet to suggest."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.storage.run_folder import METRICS
from simclr_ray.studies.definition import Study
from simclr_ray.studies.driver import seconds_before
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from simclr_ray.studies.plan import RUNS, Trial, base_tree, make_trials, points_of
from simclr_ray.studies.status import status_of


def study(**changes: Any) -> Study:
    tree: dict[str, Any] = {
        "name": "s",
        "question": "?",
        "base": "cifar10_study_cpu",
        "set": {"epochs": 4},
        "space": {"loss.temperature": {"grid": [0.1, 0.2, 0.5]}},
        "metric": "eval/knn_top1",
        "protocols": [],
        **changes,
    }
    return cfg.validate(Study, tree)


def log(folder: StudyFolder, trial: str) -> None:
    """Write a run's log of two epochs."""
    record = {"step": 20, "epoch": 2, "eval/knn_top1": 0.25}
    folder.run(f"{trial}-0123").write_text(METRICS, json.dumps(record))


def end(folder: StudyFolder, trial: str) -> None:
    curve = {4: {"eval/knn_top1": 0.5}}
    folder.write_outcome(TrialOutcome(trial, "finished", "", [], 0, {}, curve, {}, {}))


def test_a_grid_has_what_waits_what_is_open_and_what_has_ended(tmp_path: Path) -> None:
    folder = StudyFolder(str(tmp_path), "s")
    trials: list[Trial] = make_trials(study(), base_tree(study()), points_of(study()))
    end(folder, trials[0].name)
    log(folder, trials[1].name)
    status = status_of(study(), folder, trials)
    states = [(t.state, t.epoch, t.epochs, t.metric) for t in status.trials]
    assert states == [("finished", 4, 4, "50.0"), ("open", 2, 4, "25.0"), ("waiting", 0, 4, "-")]
    assert (status.done, status.num_trials, status.epochs_left) == (1, 3, 6)
    with folder.files.lock():
        assert [t.state for t in status_of(study(), folder, trials).trials][1] == "running"


def test_of_a_search_that_learns_only_what_it_has_suggested_is_known(tmp_path: Path) -> None:
    searched = study(
        space={"loss.temperature": {"loguniform": [0.05, 1.0]}},
        search={"name": "optuna", "trials": 5},
    )
    folder = StudyFolder(str(tmp_path), "s")
    end(folder, "first")
    log(folder, "second")
    examples = make_trials(searched, base_tree(searched), [{"loss.temperature": 0.05}])
    status = status_of(searched, folder, examples)
    assert [(t.name, t.state, t.epochs) for t in status.trials] == [
        ("first", "finished", 4),
        ("second", "open", 4),
    ]
    assert (status.done, status.num_trials) == (1, 5)
    assert status.epochs_left == 2 + 3 * 4


def test_the_run_of_a_trial_is_the_one_that_was_last_written(tmp_path: Path) -> None:
    folder = StudyFolder(str(tmp_path), "s")
    assert folder.run_of("t") is None
    for name, age in (("t-ffffffff", 100), ("t-00000000", 0), ("t-other-99999999", 0)):
        file = tmp_path / "s" / RUNS / name / "metrics.jsonl"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    newest = folder.run_of("t")
    assert newest is not None
    assert newest.name == "t-00000000"
    assert set(folder.runs()) == {"t", "t-other"}


def test_the_command_of_a_study_is_the_one_that_began_it(tmp_path: Path) -> None:
    folder, base = StudyFolder(str(tmp_path), "s"), Experiment.load("cifar10_study_cpu")
    for command in ("simclr-ray study run s --scale laptop", f"simclr-ray study resume {folder}"):
        folder.write_definition(study(), base, "0" * 16, command)
        assert folder.state()["command"] == "simclr-ray study run s --scale laptop"
    begun = StudyFolder(str(tmp_path), "begun")  # by an earlier release, and killed at once
    begun.update_state(digest="0" * 16)
    begun.write_definition(study(), base, "0" * 16, "simclr-ray study run begun")
    assert begun.state() == {"digest": "0" * 16, "command": "simclr-ray study run begun"}


def test_a_start_that_was_killed_counts_until_it_last_wrote(tmp_path: Path) -> None:
    folder = StudyFolder(str(tmp_path), "s")
    assert seconds_before(folder) == 0.0
    folder.update_state(seconds=100.0, began_at=None)
    assert seconds_before(folder) == 100.0
    now = time.time()
    folder.update_state(seconds=100.0, began_at=now - 600)
    end(folder, "t")
    assert seconds_before(folder) == pytest.approx(700.0, abs=1.0)
    for place in Path(folder.uri, "outcomes").iterdir():
        os.utime(place, (now - 60, now - 60))
    folder.request_stop()  # by somebody, later
    assert seconds_before(folder) == pytest.approx(640.0, abs=0.2)
