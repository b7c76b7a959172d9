"""Networks are compared on the same images, which are decoded once for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder, Pixels
from simclr_ray.config.experiment import Experiment
from simclr_ray.evaluation import scores as rows
from simclr_ray.evaluation.evaluate import score_networks
from simclr_ray.inference.comparison import Contender, score_all
from tests.ray.images import write_splits

NUM_IMAGES = 40 + 60  # of both splits
SIZE = 8


class Counting(ImageDecoder):
    """Counts what it decodes."""

    decoded: ClassVar[list[int]] = []

    def decode(self, encoded: bytes, least: tuple[int, int] = (0, 0)) -> Pixels:
        self.decoded.append(len(encoded))
        return super().decode(encoded, least)


class MeanColor(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    data = write_splits(tmp_path, 40)
    tree: dict[str, Any] = {
        "name": "t", "batch_size": 8, "augment": {"size": SIZE},
        "data": {"train": f"{data}/train.parquet", "test": f"{data}/test.parquet"},
        "evaluation": {"knn": {"k": 5}, "linear": {"epochs": 5}},
    }  # fmt: skip
    return cfg.validate(Experiment, tree)


def test_networks_of_the_same_views_have_each_image_decoded_once(experiment: Experiment) -> None:
    Counting.decoded.clear()
    same = [
        Contender(name, network, SIZE, Counting())
        for name, network in (("a", MeanColor()), ("b", rows.Pixels()), ("c", MeanColor()))
    ]
    score_all(same, experiment)
    assert len(Counting.decoded) == NUM_IMAGES
    Counting.decoded.clear()
    score_all([*same, same[0]._replace(size=2 * SIZE)], experiment)
    assert len(Counting.decoded) == 2 * NUM_IMAGES


def test_scores_are_those_of_the_evaluation_in_the_order_of_the_networks(
    experiment: Experiment,
) -> None:
    decoder = ImageDecoder()
    contenders = [
        Contender("a", MeanColor(), SIZE, decoder),
        Contender("large", MeanColor(), 2 * SIZE, decoder),
        Contender("pixels", rows.Pixels(), SIZE, decoder),
    ]
    first, large, pixels = score_all(contenders, experiment)
    own, plain = score_networks(
        experiment, {"a": MeanColor(), "pixels": rows.Pixels()}, ("knn", "linear")
    )
    assert first.metrics == own.numbers()
    assert pixels.metrics == plain.numbers()
    tree = cfg.to_tree(experiment) | {"augment": {"size": 2 * SIZE}}
    (expected,) = score_networks(
        cfg.validate(Experiment, tree), {"large": MeanColor()}, ("knn", "linear")
    )
    assert large.metrics == expected.numbers()
    ids, hits = first.hits["knn_top1"]
    assert ids.tolist() == list(range(1000, 1060))
    assert hits.mean() == first.metrics["knn_top1"]
