"""Training by labels, and fine-tuning from a run: the same program, and where its scores appear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from simclr_ray import config as cfg
from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluation.evaluate import probe_run
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.encoder import Classifier
from simclr_ray.nn.pretrained import experiment_of
from simclr_ray.storage.checkpoint import read_record
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.train.advice import advise_before_start
from simclr_ray.train.driver import pretrain
from simclr_ray.train.finetune import plan_distillation, plan_finetuning, train
from simclr_ray.train.outcome import Run
from tests.ray.images import write_shapes

NAMES = {"id": "key", "image": "image", "label": "class"}
COLUMNS = ColumnsConfig(**NAMES)
CLASSES = [f"class of {number}" for number in range(10)]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetune")
    for name, rows in (("train", 256), ("test", 60)):  # a user's own names of columns
        write_shapes(path / f"{name}.parquet", rows)
        table = pq.read_table(path / f"{name}.parquet").rename_columns([*NAMES.values()])
        table = table.replace_schema_metadata({"class_names": json.dumps(CLASSES)})
        pq.write_table(table, path / f"{name}.parquet", row_group_size=64)
    table = pq.read_table(path / "train.parquet").replace_schema_metadata(None)
    months = pa.array([("jan", "feb")[row % 2] for row in range(table.num_rows)])
    pq.write_table(table.set_column(2, "class", months), path / "months.parquet")
    table = pq.read_table(path / "test.parquet")
    images = pa.array([b"broken", *table["image"].to_pylist()[1:]], pa.binary())
    pq.write_table(table.set_column(1, "image", images), path / "broken.parquet")
    return path


def published(client: MlflowClient, run_id: str, folder: Path) -> Experiment:
    """Return the experiment that MLflow has of a run."""
    text = Path(client.download_artifacts(run_id, "experiment.yaml", str(folder))).read_text()
    return cfg.validate(Experiment, cfg.parse_yaml(text))


def experiment(folder: Path, **changes: Any) -> Experiment:
    tree = {
        "name": "t",
        "data": {
            "train": str(folder / "train.parquet"),
            "test": str(folder / "test.parquet"),
            "columns": NAMES,
        },
        "augment": {"name": "simclr", "size": 16, "blur": 0.0},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.125, "stem": "strided"},
        "head": {"name": "mlp", "dim": 16},
        "batch_size": 64,
        "epochs": 2,
        "evaluation": {"every_epochs": 0},
        "scaling": {"num_workers": 2, "cpus_per_worker": 0.5, "cpus_per_data_actor": 0.3},
        "tracking": {"log_every_steps": 1, "system_metrics": False},
        "storage": str(folder / "runs"),
    }
    return cfg.validate(Experiment, tree | changes)


@pytest.fixture(scope="module")
def run(folder: Path, ray_cluster: str) -> Run:
    # temperature learned, one view's negatives, a list of transformations: each in a whole run
    return pretrain(
        experiment(
            folder,
            loss={"name": "ntxent", "temperature": 0.2, "learn_temperature": True},
            augment={
                "name": "pipeline",
                "size": 16,
                "a": [{"name": "crop"}, {"name": "color", "strength": 0.5}, {"name": "rotate"}],
            },
        )
    )


def records(run: Run) -> list[dict[str, float]]:
    lines = (Path(run.folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_share_of_the_labels_is_learned_from_the_runs_encoder(
    folder: Path, run: Run, tmp_path: Path
) -> None:
    tuned = train(plan_finetuning(run.folder, 0.25, "epochs=2", "batch_size=32", "head.layers=1"))
    record = read_record(tuned.run.checkpoint)["experiment"]
    assert record["init"]["weights"] == str(run.checkpoint)
    assert record["head"]["num_classes"] == 10
    assert tuned.num_images == 60
    assert tuned.scores is not None
    rows = Source.open(record["data"]["train"], COLUMNS)
    assert np.bincount(rows.labels()).tolist() == [6] * 10
    assert 0 <= tuned.scores.top1 <= tuned.scores.top5 <= 1
    first = next(r for r in records(tuned.run) if "train/loss" in r)
    assert first["train/loss"] == pytest.approx(np.log(10), abs=1e-4)  # the classifier is zero
    client = MlflowClient(RunRecord.read(RunFolder.at(run.folder)).tracking_uri)
    child = client.get_run(tuned.run.mlflow_run_id)
    assert child.data.tags["mlflow.parentRunId"] == run.mlflow_run_id
    assert child.data.metrics["final/classifier/top1"] == pytest.approx(tuned.scores.top1)
    parent = client.get_run(run.mlflow_run_id)
    assert parent.data.metrics["t-tuned-25pct/top1"] == pytest.approx(tuned.scores.top1)

    assert published(client, tuned.run.mlflow_run_id, tmp_path) == experiment_of(
        tuned.run.checkpoint
    )

    images = f"data.train={folder / 'months.parquet'}"
    student, scores, _ = train(
        plan_distillation(tuned.run.folder, images, "epochs=1", "encoder.width=0.25")
    )
    assert scores is not None
    assert read_record(student.checkpoint)["class_names"] == CLASSES  # not its images'
    assert published(client, student.mlflow_run_id, tmp_path) == experiment_of(student.checkpoint)
    record = read_record(student.checkpoint)["experiment"]
    assert record["loss"]["teacher"] == str(tuned.run.checkpoint)
    assert record["encoder"]["width"] == 0.25
    first = next(r for r in records(student) if "train/loss" in r)
    # whatever the teacher says, scores of zero cost ln K
    assert first["train/loss"] == pytest.approx(np.log(10), abs=1e-4)
    child = client.get_run(student.mlflow_run_id)
    assert child.data.tags["mlflow.parentRunId"] == tuned.run.mlflow_run_id
    assert child.data.metrics["final/classifier/top1"] == pytest.approx(scores.top1)


def test_a_frozen_encoder_gets_a_classifier_at_once(folder: Path, run: Run) -> None:
    planned = plan_finetuning(run.folder, None, "data.test=", per_class=5, frozen=True)
    assert advise_before_start(planned.experiment) == []  # one step is all that it takes
    tuned = train(planned)
    student, _ = plan_distillation(tuned.run.folder, f"data.train={folder / 'train.parquet'}")
    assert student.config.epochs == 30  # not the teacher's one
    assert tuned.num_images == 50
    assert tuned.run.name.startswith("t-frozen-5each-")
    before, classifier = load_encoder(run.checkpoint), load_encoder(tuned.run.folder)
    assert isinstance(classifier, Classifier)
    theirs = classifier.network.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in before.network.state_dict().items())
    source = Source.open(str(folder / "train.parquet"), COLUMNS)
    ids = Source.open(planned.experiment.config.data.train, COLUMNS).ids()
    learned = np.isin(source.ids(), ids)
    assert np.bincount(source.labels()[learned]).tolist() == [5] * 10
    rows = source.read_rows(np.arange(source.num_rows))
    said = classifier.predict_proba([image or b"" for image in rows.images]).argmax(1)
    right = said == source.labels()
    assert tuned.scores is not None
    assert tuned.scores.top1 == pytest.approx(right[~learned].mean())  # of all others
    assert right[learned].mean() == pytest.approx(tuned.run.metrics["train/classifier_top1"])
    client = MlflowClient(RunRecord.read(RunFolder.at(run.folder)).tracking_uri)
    child = client.get_run(tuned.run.mlflow_run_id)
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == run.mlflow_run_id
    assert child.data.metrics["final/classifier/top1"] == pytest.approx(tuned.scores.top1)
    again = train(plan_finetuning(run.folder, None, "data.test=", per_class=5, frozen=True))
    assert (again.run.checkpoint, again.scores) == (tuned.run.checkpoint, tuned.scores)


def test_images_that_cannot_be_used_are_said_and_not_counted(
    folder: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    images = f"data.train={folder / 'broken.parquet'}"
    for _ in range(2):  # the second time the run is there
        tuned = train(
            plan_finetuning(run.folder, 1.0, images, "data.max_bad_fraction=0.5", frozen=True)
        )
        assert tuned.num_images == 59
    assert "1 image of 60 left out, which could not be used; the first, id 1000" in caplog.text


def test_all_labels_without_a_test_split_are_learned_from_untested(run: Run) -> None:
    tuned = train(plan_finetuning(run.folder, 1.0, "data.test=", frozen=True))
    assert (tuned.num_images, tuned.scores) == (256, None)


def test_what_h_and_z_know_is_asked_without_labels_and_the_class_with_them(run: Run) -> None:
    found = probe_run(run.checkpoint)
    assert [p.target for p in found][1::3] == ["rotation", "class"]
    assert all(0 <= value <= 1 for p in found for value in p[1:])


def test_the_supervised_counterpart_runs_by_the_same_program(
    folder: Path, ray_cluster: str
) -> None:
    supervised = pretrain(
        experiment(
            folder,
            loss={"name": "cross_entropy", "views": 2},
            head={"name": "classifier"},
            schedule={"learning_rate": 0.3, "warmup_steps": 1},
        )
    )
    losses = [r["train/loss"] for r in records(supervised) if "train/loss" in r]
    assert losses[0] == pytest.approx(np.log(10), abs=1e-4)
    assert np.isfinite(losses).all()
    assert losses[-1] != losses[0]  # it moved
    assert read_record(supervised.checkpoint)["experiment"]["head"]["num_classes"] == 10


def test_what_cannot_be_tuned_is_said_before_anything_starts(folder: Path, run: Run) -> None:
    for fraction in (0.0, 1.5):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            plan_finetuning(run.folder, fraction)
    with pytest.raises(DataError, match="fewer than the 10 classes"):
        plan_finetuning(run.folder, 0.01)
    with pytest.raises(ConfigError, match="no run folder"):
        plan_finetuning(str(folder), 0.1)
    with pytest.raises(ConfigError, match=r"--frozen: an encoder of random weights"):
        plan_finetuning(run.folder, 0.5, frozen=True, from_random=True)
    with pytest.raises(ConfigError, match=r"registry.name: is for pretrain"):
        plan_finetuning(run.folder, 0.5, "registry.name=x")
    caching, _ = plan_finetuning(run.folder, 0.5, "batch_size=300", "batch_norm.group_size=50")
    config = caching.config
    assert (config.batch_size, config.batch_norm.group_size) == (100, 50)  # of some 128 rows
    random, _ = plan_finetuning(run.folder, 0.5, from_random=True)
    assert random.config.init.weights == ""
    assert random.config.name == "t-random-50pct"


def test_the_limit_of_a_run_is_of_its_own_images_and_is_said(
    folder: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def limited(checkpoint: Path) -> Experiment:
        made = experiment_of(checkpoint)
        return made.model_copy(update={"data": made.data.model_copy(update={"limit": 130})})

    monkeypatch.setattr("simclr_ray.train.finetune.experiment_of", limited)
    most = [f"storage={tmp_path}", "data.test="]

    def rows(*overrides: str) -> int:
        planned = plan_finetuning(run.folder, 1.0, *most, *overrides, frozen=True)
        return planned.experiment.source.num_rows

    assert rows(f"data.train={folder / 'train.parquet'}") == 256
    assert "data.limit" not in caplog.text
    assert rows() == 130
    assert "labels are those of the first 130 images (data.limit)" in caplog.text
