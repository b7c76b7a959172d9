"""Evaluation while training: the scores of one process, by ranks that share the reading."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.source import Source
from simclr_ray.distributed.spawn import spawn
from simclr_ray.errors import DataError
from simclr_ray.evaluation.features import load_split
from simclr_ray.evaluation.online import OnlineEvaluation
from tests.distributed.ranks import evaluate_online
from tests.ray.images import write_shapes

CPU = torch.device("cpu")


def experiment_on(folder: Path) -> Experiment:
    """Return an experiment whose bank has a broken image and whose test split a missing label."""
    for name, rows in (("bank", 41), ("test", 23)):
        write_shapes(folder / f"{name}.parquet", rows, row_group_size=9)
    bank = pq.read_table(folder / "bank.parquet")
    images = bank["image"].to_pylist()
    images[3] = b"no image"
    bank = bank.set_column(bank.column_names.index("image"), "image", [images])
    pq.write_table(bank, folder / "bank.parquet", row_group_size=9)
    test = pq.read_table(folder / "test.parquet")
    labels = [None, *test["label"].to_pylist()[1:]]
    at = test.column_names.index("label")
    test = test.set_column(at, "label", pa.array(labels, pa.int64()))
    pq.write_table(test, folder / "test.parquet", row_group_size=9)
    data = {"train": str(folder / "bank.parquet"), "test": str(folder / "test.parquet")}
    encoder = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar"}
    tree = {"name": "t", "data": data, "encoder": encoder, "augment": {"size": 16}}
    return cfg.validate(Experiment, tree | {"evaluation": {"every_epochs": 1, "knn": {"k": 5}}})


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_decode_half_each_and_score_as_one(tmp_path: Path) -> None:
    experiment = experiment_on(tmp_path)
    ((alone, held),) = spawn(evaluate_online, 1, experiment)
    assert held == (40, 40, 22)
    (first, a), (second, b) = spawn(evaluate_online, 2, experiment)
    assert first == second == pytest.approx(alone, rel=1e-5)
    assert tuple(map(sum, zip(a, b, strict=True))) == held
    assert a == (17, 17, 8)  # of row groups of nine: two less a broken one, one less an unlabelled


def test_what_is_scored_are_the_labelled_rows_that_load_split_takes(tmp_path: Path) -> None:
    experiment = experiment_on(tmp_path)
    source = Source.open(experiment.data.train)
    online = OnlineEvaluation(experiment, source, 0, 1, CPU)
    split = load_split(Source.open(experiment.data.test), 16).labelled()
    assert torch.equal(online.test.images, split.images)
    assert torch.equal(online.test.labels, split.labels)
    assert torch.equal(online.probe.images, load_split(source, 16).images)


def test_a_split_without_an_image_is_refused_at_the_start(tmp_path: Path) -> None:
    experiment = experiment_on(tmp_path)
    table = pq.read_table(tmp_path / "test.parquet")
    broken = pa.array([b"no image"] * len(table), pa.binary())
    at = table.column_names.index("image")
    pq.write_table(table.set_column(at, "image", broken), tmp_path / "test.parquet")
    source = Source.open(experiment.data.train)
    with pytest.raises(DataError, match=r"test\.parquet: no row can be evaluated: not an image"):
        OnlineEvaluation(experiment, source, 0, 1, CPU)
