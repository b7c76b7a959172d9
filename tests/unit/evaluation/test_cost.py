"""What evaluation takes is timed on a part, and is of the size of what the whole takes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.protocols import PROBE
from simclr_ray.data.source import Source
from simclr_ray.evaluation import cost
from simclr_ray.evaluation.cost import evaluation_seconds
from simclr_ray.evaluation.evaluate import score_networks
from simclr_ray.nn.build import build_model
from tests.ray.images import write_shapes

PROTOCOLS = ["knn", "linear"]


def experiment(folder: Path, test: str = "test.parquet") -> Experiment:
    tree = {
        "name": "t",
        "data": {"train": str(folder / "train.parquet"), "test": test and str(folder / test)},
        "augment": {"size": 24},
        "encoder": {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"},
        "batch_size": 32,
        "evaluation": {"every_epochs": 1, "linear": {"epochs": 5}},
    }
    return cfg.validate(Experiment, tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    write_shapes(folder / "train.parquet", 1200)
    write_shapes(folder / "test.parquet", 400)
    return folder


def test_a_quarter_of_the_images_tells_what_all_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "ENCODED", 300)
    monkeypatch.setattr(cost, "LEARNED_FROM", 400)
    made = experiment(folder)
    model = build_model(made).train()
    source = Source.open(made.data.train, made.data.columns)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ratios = []
    foretold = evaluation_seconds(made, source, model, PROTOCOLS)
    for _ in range(3):
        began = time.perf_counter()
        score_networks(made, {"h": model.encoder}, PROTOCOLS)
        ratios.append((foretold.read / 2 + foretold.final) / (time.perf_counter() - began))
        foretold = evaluation_seconds(made, source, model, PROTOCOLS)
    torch.set_num_threads(threads)
    assert 0.4 < sorted(ratios)[1] < 2.5  # of what is measured on a busy machine
    assert foretold.baselines > foretold.final  # of the untrained encoder, and of pixels
    assert foretold.start > 0
    assert foretold.epoch > foretold.start / 4
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_evaluated_takes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment(folder)
    source = Source.open(made.data.train, made.data.columns)
    model = build_model(made)
    never = made.model_copy(
        update={"evaluation": made.evaluation.model_copy(update={"every_epochs": 0})}
    )
    seconds = evaluation_seconds(never, source, model, PROTOCOLS)
    assert (seconds.start, seconds.epoch) == (0, 0)
    unlabelled = experiment(folder, test="")
    assert evaluation_seconds(unlabelled, source, model, ["knn"]).final > 0  # label-free scores
    probed = evaluation_seconds(made, source, model, [PROBE])
    assert probed.final > 0
    assert probed.baselines == 0
    monkeypatch.setattr(cost, "first_splits", lambda *_: pytest.fail("nothing is to be scored"))
    for split in (made, unlabelled):
        nothing = evaluation_seconds(split, source, model, [])
        assert (nothing.final, nothing.baselines) == (0, 0)
