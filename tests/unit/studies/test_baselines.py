"""Baselines of a study: those of its base, once, and no study fails for want of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CollapseError
from simclr_ray.evaluation.evaluate import score_networks, untrained_encoder
from simclr_ray.evaluation.scores import PIXELS, UNTRAINED, RawPixelEncoder
from simclr_ray.studies import baselines as module
from simclr_ray.studies.baselines import StudyBaselines
from simclr_ray.studies.definition import Study
from simclr_ray.studies.folder import StudyFolder, TrialOutcome
from tests.ray.images import write_splits
from tests.unit.cli.in_process import enter, run

PROTOCOLS = ["knn", "linear"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = write_splits(tmp_path_factory.mktemp("baselines"), 80)
    splits = {name: str(folder / f"{name}.parquet") for name in ("train", "test")}
    tree = {
        "name": "t",
        "data": splits,
        "augment": {"size": 16},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125},
        "batch_size": 16,
        "evaluation": {"linear": {"epochs": 2}},
        "scaling": {"threads_per_worker": 1},
        "storage": str(folder / "runs"),
    }
    return cfg.validate(Experiment, tree)


def study(**changes: Any) -> Study:
    space = {"loss.temperature": {"grid": [0.1, 0.5]}}
    tree = {"name": "s", "question": "?", "base": "b", "space": space, **changes}
    return cfg.validate(Study, tree)


class Task:
    """Stands for a Ray task: computed when it is asked for."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def remote(self, *args: Any) -> Any:
        return lambda: self.function(*args)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "remote", lambda **_: Task)
    monkeypatch.setattr(ray, "get", lambda pending: pending())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("without_ray")
def test_they_are_scored_as_any_encoder_by_the_first_seed_and_once(
    experiment: Experiment, tmp_path: Path
) -> None:
    folder = StudyFolder(str(tmp_path), "s")
    given = study(protocols=PROTOCOLS, seeds=[7, 8])
    StudyBaselines(given, experiment, folder).store()
    seeded = experiment.model_copy(update={"seed": 7})
    networks = {UNTRAINED: untrained_encoder(seeded), PIXELS: RawPixelEncoder()}
    expected = {
        score.name: {f"final/{key}": value for key, value in score.numbers().items()}
        for score in score_networks(seeded, networks, PROTOCOLS)
    }
    for values in expected.values():
        values["downstream_top1"] = values["final/linear_top1"]
    assert folder.baselines() == expected
    assert StudyBaselines(given, experiment, folder)._scores is None  # they are there


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("changes", [{"protocols": [], "metric": "eval/knn_top1"}, {}])
def test_without_protocols_or_labels_there_are_none(
    experiment: Experiment, tmp_path: Path, changes: dict[str, Any]
) -> None:
    data = experiment.data if changes else experiment.data.model_copy(update={"test": ""})
    folder = StudyFolder(str(tmp_path), "s")
    StudyBaselines(study(**changes), experiment.model_copy(update={"data": data}), folder).store()
    assert folder.baselines() == {}


@pytest.mark.usefixtures("without_ray")
def test_a_study_that_was_stopped_leaves_them_to_its_next_start(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder(str(tmp_path), "s")
    monkeypatch.setattr(ray, "wait", lambda pending, timeout: ([], pending))
    StudyBaselines(study(), experiment, folder).store(wait=False)
    assert folder.baselines() == {}
    monkeypatch.setattr(ray, "wait", lambda pending, timeout: (pending, []))
    StudyBaselines(study(), experiment, folder).store(wait=False)
    assert set(folder.baselines()) == {UNTRAINED, PIXELS}


@pytest.mark.usefixtures("without_ray")
def test_a_process_that_dies_costs_a_study_its_baselines_alone(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def dies(*_: Any) -> None:
        raise RayError("out of memory")

    monkeypatch.setattr(module, "_scores_of", dies)
    folder = StudyFolder(str(tmp_path), "s")
    StudyBaselines(study(), experiment, folder).store()
    assert "the study has no baselines: out of memory" in caplog.text
    assert folder.baselines() == {}


@pytest.mark.parametrize(("rank", "refused"), [(1.0, True), (9.0, False)])
def test_the_best_trial_is_not_registered_where_it_is_no_better_than_the_untrained_encoder(
    rank: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    refused: bool,
) -> None:
    enter(tmp_path, monkeypatch)
    folder = StudyFolder(str(tmp_path), "s")
    folder.write_definition(study(), Experiment.load("cifar10_cpu"), "0" * 16)
    folder.write_baselines({UNTRAINED: {"final/effective_rank": 2.3, "final/linear_top1": 0.25}})
    metrics = {"final/effective_rank": rank, "final/linear_top1": 0.3}
    cells = [{"point": {"loss.temperature": 0.1}, "epoch": 0}]
    cost = {"images": 1.0, "seconds": 1.0, "device_seconds": 1.0}
    run_of = {"folder": f"{folder.uri}/runs/t-00000000"}
    folder.write_outcome(TrialOutcome("t", "finished", "", cells, 0, metrics, {}, cost, run_of))
    ended = run(["study", "best", folder.uri, "--register", "encoder"], capsys)
    (line,) = ended.problems  # of the other, whose run is not there, another
    assert ended.code == CollapseError.exit_code if refused else ended.code != 0
    assert ("effective rank is 1.00" in line) == refused
    assert ("model register --force" in line) == refused
