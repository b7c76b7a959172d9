"""Which scores a pair of splits allows, and that it is said where some are left out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.evaluation.evaluate import score_networks
from simclr_ray.evaluation.scores import PIXELS, RawPixelEncoder
from tests.ray.images import noise_png


def test_a_test_split_without_labels_is_scored_without_them_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = pa.array([noise_png(seed, 8) for seed in range(8)], pa.binary())
    for name, labels in (("train", [0, 1] * 4), ("test", [None] * 8)):
        column = pa.array(labels, pa.int64())
        pq.write_table(pa.table({"image": images, "label": column}), tmp_path / f"{name}.parquet")
    data = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    tree = {"name": "t", "data": data, "augment": {"size": 8}, "batch_size": 4}
    experiment = cfg.validate(Experiment, tree)
    (score,) = score_networks(experiment, {PIXELS: RawPixelEncoder()}, ("knn",))
    assert score.accuracies == {}
    assert score.effective_rank is not None
    assert "test.parquet" in caplog.text
    assert "scores are those without labels" in caplog.text
