"""What is likely wrong with a run is said, with what to change; and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import MIB
from simclr_ray.data.source import Source
from simclr_ray.evaluation.scores import PIXELS, TRAINED, Score
from simclr_ray.train import advice
from simclr_ray.train.resolve import ResolvedExperiment


def resolved(tmp_path: Path, *, rows: int = 1000, **tree: Any) -> Any:
    columns: dict[str, Any] = {"image": [b"x"] * rows}
    pq.write_table(pa.table(columns | {"label": [0] * rows}), tmp_path / "labelled.parquet")
    train = str(tmp_path / "labelled.parquet")
    data = {"train": train, "test": train}
    given = {"name": "t", "data": data, "augment": {"size": 32}, "batch_size": 100} | tree
    experiment = cfg.validate(Experiment, given)
    return ResolvedExperiment(experiment, Source.open(train))


def score(name: str, knn: float) -> Score:
    return Score(name, -1.0, 5.0, 0.1, accuracies={"knn_top1": knn})


def test_a_usual_run_gets_no_advice(tmp_path: Path) -> None:
    assert advice.advise_before_start(resolved(tmp_path, epochs=30)) == []


def test_an_abrupt_warm_up_is_said_with_the_key(tmp_path: Path) -> None:
    schedule = {"learning_rate": 3.0, "warmup_steps": 2}
    (line,) = advice.advise_before_start(resolved(tmp_path, epochs=30, schedule=schedule))
    assert line.startswith("warm-up of 2 steps to a rate of 1.17188 is abrupt")
    assert "schedule.warmup_steps=30" in line


@pytest.mark.parametrize(
    ("checkpoint", "named"),
    [({"every_epochs": 31}, "every_epochs=31"), ({"every_steps": 300}, "every_steps=300")],
)
def test_checkpoints_that_come_after_the_end_are_said(
    checkpoint: dict[str, int], named: str, tmp_path: Path
) -> None:
    (line,) = advice.advise_before_start(resolved(tmp_path, epochs=30, checkpoint=checkpoint))
    assert line.startswith(f"checkpoint.{named} is longer than the run")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"temperature": 5.0}, True),
        ({"temperature": 0.01}, True),
        ({"name": "supcon", "temperature": 5.0}, True),
        ({"temperature": 0.05}, False),
        ({"temperature": 10.0, "normalize": False}, False),  # as in Table 5
        ({"temperature": 5.0, "learn_temperature": True}, False),  # it does not stay
        ({"name": "ntlogistic", "temperature": 5.0}, True),
        ({"name": "triplet"}, False),
    ],
)
def test_temperatures_that_nobody_learned_with_are_said(
    loss: dict[str, Any], said: bool, tmp_path: Path
) -> None:
    lines = advice.advise_before_start(resolved(tmp_path, epochs=30, loss=loss))
    assert len(lines) == said
    assert all("is outside 0.05 to 1" in line for line in lines)


def test_few_steps_are_said(tmp_path: Path) -> None:
    lines = advice.advise_before_start(resolved(tmp_path, epochs=1, schedule={"warmup_steps": 1}))
    assert lines == ["10 steps are few to learn from: raise epochs, or lower batch_size"]


def test_an_encoder_no_better_than_pixels_is_said_with_its_reasons(tmp_path: Path) -> None:
    run = resolved(tmp_path, epochs=1, schedule={"warmup_steps": 8})
    worse = [score(TRAINED, 0.2), score(PIXELS, 0.25)]
    line = advice.advise_after_scores(run, worse, {"train/mean_loss": 5.2})
    assert line.startswith("the encoder is no better than raw pixels: 10 steps are few")
    assert "8 of 10 steps were warm-up" in line
    assert "the loss, 5.20, is near 5.29" in line
    better = [score(TRAINED, 0.3), score(PIXELS, 0.25)]
    assert advice.advise_after_scores(run, better, {}) == ""
    assert advice.advise_after_scores(run, [score(TRAINED, 0.3)], {}) == ""


def test_a_step_that_does_not_fit_names_the_largest_group_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(advice, "machine_memory", lambda: 1000 * MIB)
    run = resolved(tmp_path, epochs=30)
    assert advice.memory_advice(run, 5 * MIB, 100 * MIB) == ""
    line = advice.memory_advice(run, 20 * MIB, 100 * MIB)
    assert line == (
        "a step takes 2,100 MiB and this machine has 1,000: batch_norm.group_size=25 fits"
    )
    assert "no group fits" in advice.memory_advice(run, 2000 * MIB, 100 * MIB)


def test_workers_that_share_a_gpu_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total_memory=1000 * MIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    halves = {"num_workers": 2, "gpus_per_worker": 0.5}
    shared = resolved(tmp_path, epochs=30, scaling=halves)
    line = advice.memory_advice(shared, 10 * MIB, 100 * MIB)  # 50 images on each of the two
    assert line.startswith("a step takes 1,200 MiB and the GPU has 1,000: ")
    alone = resolved(tmp_path, epochs=30, scaling={"num_workers": 2, "gpus_per_worker": 1})
    assert advice.memory_advice(alone, 10 * MIB, 100 * MIB) == ""


def test_the_first_images_of_folders_of_classes_are_not_all_classes(tmp_path: Path) -> None:
    for index in range(12):
        folder = tmp_path / "photos" / f"class {index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    for limit, said in ((0, 0), (8, 1), (20, 0)):
        data = {"train": str(tmp_path / "photos"), "limit": limit}
        given = {"name": "t", "data": data, "augment": {"size": 32}, "batch_size": 4, "epochs": 99}
        experiment = cfg.validate(Experiment, given)
        source = Source.open(str(tmp_path / "photos"), limit=limit)
        lines = advice.advise_before_start(ResolvedExperiment(experiment, source))
        assert len([line for line in lines if "takes the first images by name" in line]) == said
