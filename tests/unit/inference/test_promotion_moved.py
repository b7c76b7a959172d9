"""Versions of a project that was really moved are compared, promoted, brought back and deleted."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.inference import promotion, registry
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.encoder_files import write_encoder
from simclr_ray.nn.build import build_encoder, feature_dim
from simclr_ray.storage.run_folder import CONFIG_FILE
from simclr_ray.tracking.moved import rewrite_moved_store
from simclr_ray.tracking.runs import Tracker
from tests.ray.images import write_splits
from tests.unit.inference.test_promotion import SIZE, png

RUN = "t-12345678"
RULE = "knn_top1 >= champion - 3 * se - 1"


def make(root: Path, scratch: Path, *, logged: bool) -> None:
    """Leave a project with data, a run and its store, and two versions of the run."""
    (root / "data").mkdir(parents=True)
    data, folder = write_splits(root / "data", 90), root / "runs" / RUN
    tree: dict[str, Any] = {
        "name": "t", "batch_size": 8, "epochs": 1, "storage": str(root / "runs"),
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 8},
        "augment": {"name": "simclr", "size": SIZE},
        "data": {"train": f"{data}/train.parquet", "test": f"{data}/test.parquet"},
        "evaluation": {"knn": {"k": 5}, "linear": {"epochs": 2}},
    }  # fmt: skip
    experiment = cfg.validate(Experiment, tree)
    text = cfg.dump_yaml(cfg.to_tree(experiment))
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(text)
    tracker = Tracker.open(experiment.tracking, experiment.storage)
    run = tracker.start_run(RUN, params={}, tags={"storage": str(folder)})
    if logged:
        run.log_text(text, CONFIG_FILE)
    for number in (1, 2):
        torch.manual_seed(number)
        network = build_encoder(experiment.encoder)
        encoder = Encoder(
            network, config=cfg.to_tree(experiment.encoder), size=SIZE,
            feature_dim=feature_dim(network),
        )  # fmt: skip
        write_encoder(scratch / f"{number}", encoder)
        registry.register_encoder(
            scratch / f"{number}", run, name="m", alias=None, example=png(), tags={}
        )


def store_of(root: Path) -> str:
    return f"sqlite:///{root}/runs/mlflow.db"


def champion(root: Path) -> int:
    aliases = MlflowClient(store_of(root)).get_registered_model("m").aliases
    return int(aliases.get("champion", 0))


def backups(root: Path) -> int:
    return len(list((root / "runs").glob("mlflow.db.before-move-*")))


@pytest.fixture(params=["logged", "in the folder alone"])
def moved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project in its second place; MLflow has its config, or its run folder alone."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make(tmp_path / "first", tmp_path / "scratch", logged=request.param == "logged")
    return (tmp_path / "first").rename(tmp_path / "second")


@pytest.mark.slow
def test_moved_versions_are_compared_without_a_write_and_promoted_after_one(
    moved: Path, tmp_path: Path
) -> None:
    database = moved / "runs" / "mlflow.db"
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    _, *rows = promotion.compare("models:/m/1", "models:/m/2", tracking_uri=store_of(moved))
    assert "knn_top1" in [row[0] for row in rows]
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before
    assert backups(moved) == 0
    promotion.promote(
        "models:/m/1", "champion", require=RULE, force=True, tracking_uri=store_of(moved)
    )
    assert (champion(moved), backups(moved)) == (1, 1)
    third = moved.rename(tmp_path / "third")  # what was rewritten is moved once more
    made = promotion.promote(
        "models:/m/2", "champion", require=RULE, force=True, tracking_uri=store_of(third)
    )
    assert (made.previous, champion(third), backups(third)) == (1, 2, 2)
    _, *again = promotion.compare("models:/m/1", "models:/m/2", tracking_uri=store_of(third))
    assert again == rows
    assert not (tmp_path / "first").exists()
    assert not moved.exists()


@pytest.mark.parametrize("moved", ["logged"], indirect=True)
@pytest.mark.parametrize(
    "act",
    [
        lambda uri: promotion.rollback("m", "champion", tracking_uri=uri),
        lambda uri: promotion.remove_version("models:/m/1", tracking_uri=uri),
    ],
    ids=["rollback", "rm"],
)
def test_other_verbs_that_write_rewrite_the_store_first(
    moved: Path, act: Callable[[str], object]
) -> None:
    client = MlflowClient(store_of(moved))
    client.set_registered_model_alias("m", "champion", "2")
    client.set_model_version_tag("m", "2", "previous.champion", "1")
    act(store_of(moved))
    assert backups(moved) == 1
    source = client.get_model_version("m", "2").source
    assert f"{moved}/" in str(source)


def test_paths_are_those_of_the_new_place_and_what_is_elsewhere_stays(
    moved: Path, tmp_path: Path
) -> None:
    uri = store_of(moved)
    run_id = MlflowClient(uri).get_model_version("m", "1").run_id or ""
    experiment = promotion._experiment_of(run_id, uri, [f"data.eval_train={tmp_path}/x"])
    assert experiment.data.train == f"{moved}/data/train.parquet"
    assert experiment.data.test == f"{moved}/data/test.parquet"
    assert experiment.storage == f"{moved}/runs"
    assert experiment.data.eval_train == f"{tmp_path}/x"


@pytest.mark.parametrize("moved", ["in the folder alone"], indirect=True)
def test_a_config_that_is_nowhere_is_said(moved: Path) -> None:
    (moved / "runs" / RUN / CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match=r"has no experiment\.yaml, and its folder is not here"):
        promotion.compare("models:/m/1", "models:/m/2", tracking_uri=store_of(moved))


@pytest.mark.parametrize("moved", ["logged"], indirect=True)
@pytest.mark.parametrize("settled", [False, True])
def test_a_version_whose_run_folder_was_deleted_finds_its_data_by_the_store(
    moved: Path, *, settled: bool
) -> None:
    uri = store_of(moved)
    if settled:
        rewrite_moved_store(uri)
    shutil.rmtree(moved / "runs" / RUN)  # as `run rm` does
    run_id = MlflowClient(uri).get_model_version("m", "1").run_id or ""
    assert promotion._experiment_of(run_id, uri, []).data.test == f"{moved}/data/test.parquet"
