"""Where a run is scored follows from its splits, and what cannot fit is refused at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.evaluation import encoded_splits
from simclr_ray.storage.space import Space
from simclr_ray.train import evaluation_plan as module
from simclr_ray.train.evaluation_plan import check_evaluation, evaluation_plan
from tests.ray.images import write_splits

VIEWS = 3 * 16**2  # bytes of one


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("splits"), 200)


def experiment_on(splits: Path, *, test: bool = True, **evaluation: object) -> Experiment:
    data = {"train": f"{splits}/train.parquet"}
    if test:
        data["test"] = f"{splits}/test.parquet"
    encoder = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar"}
    tree = {"name": "t", "data": data, "encoder": encoder, "augment": {"size": 16}}
    return cfg.validate(Experiment, tree | {"evaluation": evaluation})


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the views of 260 images be too many for one process."""
    monkeypatch.setattr(encoded_splits, "VIEWS_BYTES", 260 * VIEWS - 1)
    monkeypatch.setattr(module, "VIEWS_BYTES", 260 * VIEWS - 1)


def test_few_images_are_encoded_by_this_process(splits: Path) -> None:
    plan = evaluation_plan(experiment_on(splits))
    assert plan.rows == (260, False, 0)
    assert plan.views_bytes == 260 * VIEWS
    assert plan.text == "260 images in this process: 0.2 MiB of views"
    check_evaluation(experiment_on(splits))


@pytest.mark.usefixtures("many")
def test_many_are_encoded_by_actors_one_a_device(splits: Path) -> None:
    plan = evaluation_plan(experiment_on(splits))
    assert plan.rows == (260, True, 0)
    assert plan.features_bytes == 260 * 4 * (2 * 64 + VIEWS)
    assert plan.text == "260 images by one actor a device: 0.9 MiB of features in memory here"
    large = plan._replace(features_bytes=3 * 2**30)
    assert "3.0 GiB of features in files of" in large.text
    assert large.text.endswith("256.0 MiB of them in memory at a time")
    check_evaluation(experiment_on(splits))


@pytest.mark.usefixtures("many")
def test_unlabelled_images_are_scored_by_a_sample_which_is_few(splits: Path) -> None:
    assert evaluation_plan(experiment_on(splits, test=False)).rows == (200, False, 0)


def test_actors_that_are_asked_for_are_taken(splits: Path) -> None:
    plan = evaluation_plan(experiment_on(splits, actors=3))
    assert plan.rows == (260, True, 3)
    assert "by 3 actors" in plan.text


@pytest.mark.usefixtures("many")
def test_this_process_is_refused_for_more_than_its_memory(
    splits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "machine_memory", lambda: 2 * 260 * VIEWS)
    check_evaluation(experiment_on(splits, actors=0))
    monkeypatch.setattr(module, "machine_memory", lambda: 260 * VIEWS)
    with pytest.raises(ConfigError, match=r"evaluation\.actors: .*260 images do not fit.*auto"):
        check_evaluation(experiment_on(splits, actors=0))


@pytest.mark.usefixtures("many")
def test_a_disk_without_room_for_the_features_is_refused(
    splits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "space_at", lambda _: Space(2**10, None))
    with pytest.raises(ConfigError, match=r"TMPDIR: .* 0\.9 MiB of features of 260 images"):
        check_evaluation(experiment_on(splits))


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "many", None])
def test_a_number_of_actors_that_is_none_is_refused(splits: Path, wrong: object) -> None:
    with pytest.raises(ConfigError, match="0 or more, or auto"):
        experiment_on(splits, actors=wrong)
