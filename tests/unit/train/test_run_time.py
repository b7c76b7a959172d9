"""How long a run will take: what is timed stands for its steps, and the sum is one by hand."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.source import Source
from simclr_ray.errors import RunError
from simclr_ray.evaluation import online
from simclr_ray.evaluation.cost import OnlineSeconds, online_seconds
from simclr_ray.evaluation.features import extract_features
from simclr_ray.evaluation.online import OnlineEvaluation, encoded_rows
from simclr_ray.nn.build import build_model
from simclr_ray.train import run_time, step_seconds
from simclr_ray.train.dry_run import step_memory
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.step_seconds import MOST_IMAGES, StepSeconds, shortened
from tests.ray.images import write_splits

NUM_ROWS = 64
SMALL = {"name": "resnet", "depth": 10, "width": 0.25, "stem": "cifar"}


def experiment(train: str = "x", **changes: Any) -> Experiment:
    tree = {
        "name": "t", "data": {"train": train}, "batch_size": 32, "epochs": 4, "encoder": SMALL,
        "augment": {"size": 16}, **changes,
    }  # fmt: skip
    return cfg.validate(Experiment, tree)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(step_seconds, "STEPS_S", 0.0)
    monkeypatch.setattr(step_seconds, "prepare_process", lambda *_: None)  # threads of the tests
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return write_splits(tmp_path, NUM_ROWS)


def resolved(folder: Path, **changes: Any) -> ResolvedExperiment:
    train = str(folder / "train.parquet")
    made = experiment(train, storage=str(folder / "runs"), **changes)
    return ResolvedExperiment(made, Source.open(train, made.data.columns))


def test_a_step_is_no_larger_than_one_of_the_run_and_views_are_of_full_size() -> None:
    four = experiment(batch_size=100, scaling={"num_workers": 4})
    assert shortened(four).batch_size == 25
    groups = experiment(batch_size=4096, batch_norm={"group_size": 16})
    assert shortened(groups).batch_size == 32  # two of them
    large: dict[str, Any] = {"batch_size": 4096, "augment": {"size": 224}}
    assert shortened(experiment(**large)).batch_size == MOST_IMAGES["cpu"]
    small: dict[str, Any] = {"batch_size": 4096, "augment": {"size": 112}}  # as many pixels
    assert shortened(experiment(**small)).batch_size == 4 * MOST_IMAGES["cpu"]
    grown = experiment(augment={"size": 64, "start_size": 32})
    assert shortened(grown).augment.size_at(0, 3) == 64


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 32),
        ({"scaling": {"num_workers": 2}}, 16),
        ({"optimizer": {"name": "lars"}, "batch_norm": {"group_size": 4}}, 8),  # two groups
        ({"loss": {"name": "supcon"}}, 32),
        (
            {
                "loss": {"name": "cross_entropy"},
                "head": {"name": "classifier", "num_classes": 12},
            },
            32,
        ),
    ],
)
def test_steps_of_any_kind_are_timed_and_nothing_is_written(
    changes: dict[str, Any], images: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_seconds, "LEAST_GAIN", 1.0)
    before = sorted(folder.rglob("*"))
    timed = step_seconds.step_seconds(resolved(folder, **changes))
    assert (timed.images, timed.steps) == (images, 2)
    assert timed.views_s > 0
    assert timed.update_s > 0
    assert sorted(folder.rglob("*")) == before


def test_the_slower_of_views_and_step_counts_beside_a_gpu_and_both_on_a_cpu() -> None:
    timed = StepSeconds(build_model(experiment()), views_s=0.6, update_s=0.2, images=8, steps=2)
    cpu = experiment().scaling
    assert timed.image_s(cpu) == pytest.approx(0.8)
    gpu = cpu.model_copy(update={"gpus_per_worker": 1.0, "data_actors_per_worker": 2})
    assert timed.image_s(gpu) == pytest.approx(0.3)
    assert timed.image_s(gpu.model_copy(update={"data_actors_per_worker": 6})) == 0.2
    decoding = timed._replace(decode_s=0.4)
    assert decoding.image_s(cpu) == pytest.approx(0.8)
    assert decoding.image_s(cpu, decodes=True) == pytest.approx(1.2)
    assert decoding.image_s(gpu, decodes=True) == pytest.approx(0.5)


@pytest.mark.parametrize(("cache_gib", "is_kept"), [(1.0, True), (1e-5, False), (0.0, False)])
def test_decoding_counts_once_where_images_are_kept_and_in_each_epoch_where_not(
    cache_gib: float, is_kept: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = ImageDecoder.decode

    def slow(decoder: ImageDecoder, *args: Any) -> Any:
        time.sleep(0.01)
        return decode(decoder, *args)

    monkeypatch.setattr(ImageDecoder, "decode", slow)
    data = {"train": str(folder / "train.parquet"), "cache_gib": cache_gib}
    timed = step_seconds.step_seconds(resolved(folder, data=data, batch_size=16))
    if is_kept:
        assert timed.steps == 4  # the first of each pass is not counted
        assert timed.views_s < 0.01 < timed.decode_s + timed.views_s
    else:
        assert (timed.steps, timed.decode_s) == (2, 0.0)
        assert timed.views_s > 0.01


def test_the_time_is_that_of_all_images_and_evaluations_and_its_basis_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    timed = StepSeconds(build_model(experiment()), 0.5, 1.5, images=16, steps=7)
    monkeypatch.setattr(run_time, "step_seconds", lambda *_: timed)
    monkeypatch.setattr(run_time, "online_seconds", lambda *_: OnlineSeconds(10.0, 30.0))
    evaluation = {"every_epochs": 3}
    run = resolved(
        folder, evaluation=evaluation, scaling={"num_workers": 2, "threads_per_worker": 1}
    )
    seconds = run_time.run_seconds(run, timed, OnlineSeconds(10.0, 30.0))
    # 4 epochs of 2 steps of 32; before the first step, after epoch 3 and after the last
    assert seconds == (4 * 64 * 2.0 / 2, (10 + 2 * 30) / 2)
    rows = run_time.time_rows(run)
    assert rows["time"].startswith("4:51, 0:35 of it evaluation; ")
    assert rows["measured"] == (
        "0.50 images/s here by one worker, in 7 steps of 16 images, as busy as this machine is; "
        "2 workers are taken to be twice as fast"
    )
    # of a run that has done 3 epochs: one epoch, and the evaluation after it
    assert run_time.run_seconds(run, timed, OnlineSeconds(10.0, 30.0), 6) == (64.0, 15.0)
    assert run_time.run_seconds(run, timed, OnlineSeconds(10.0, 30.0), 8) == (0.0, 0.0)
    decoding = run_time.run_seconds(run, timed._replace(decode_s=0.25), OnlineSeconds(0.0, 0.0), 6)
    assert decoding == (64 + 64 * 0.25 / 2, 0.0)  # each image once by the process that goes on
    monkeypatch.setattr(run_time, "newest_whole_step", lambda _: 6)
    assert run_time.time_rows(run)["time"].startswith("1:19 from step 6 on, ")
    assert run_time.time_rows(run, is_anew=True)["time"].startswith("4:51, ")


@pytest.mark.parametrize(
    ("scaling", "address", "times"),
    [
        ({"num_workers": 4}, "", 4),
        ({"num_workers": 8, "threads_per_worker": 1}, "", 4),  # four cores
        ({"num_workers": 2, "threads_per_worker": 4}, "", 1),
        ({"num_workers": 8, "threads_per_worker": 1}, "head:6379", 8),
        ({"num_workers": [1, 3]}, "", 3),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, "", 1),  # of one GPU
        ({"num_workers": 2, "gpus_per_worker": 2}, "", 2),
    ],
)
def test_workers_are_no_faster_than_the_cores_or_gpus_that_they_share(
    scaling: dict[str, Any], address: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert run_time.speedup(experiment(scaling=scaling)) == times


def test_a_step_that_is_timed_fits_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def most(memory: int, **changes: Any) -> int:
        monkeypatch.setattr(run_time, "machine_memory", lambda: memory)
        return run_time.images_that_fit(experiment(batch_size=4096, **changes))

    whole = step_memory(experiment(batch_size=4096))
    each = whole.activations // whole.images
    assert most(2 * (whole.weights + whole.loss + 10 * each)) == 10
    assert most(1) == 2
    groups = {"batch_norm": {"group_size": 16}}  # the activations of one of two
    assert most(2 * (whole.weights + whole.loss + 10 * each), **groups) == 20


def test_what_cannot_be_timed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = run_time.time_rows(resolved(folder, scaling={"gpus_per_worker": 1}))
    assert rows == {"time": run_time.NO_GPU}
    frozen = resolved(folder).config
    frozen = frozen.model_copy(update={"init": frozen.init.model_copy(update={"freeze": True})})
    assert run_time.untimed(frozen) == run_time.FROZEN

    def too_large(*_: object) -> StepSeconds:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(run_time, "step_seconds", too_large)
    with pytest.raises(RunError, match="does not fit into memory: tried to allocate 80 GiB; a sm"):
        run_time.time_rows(resolved(folder))


@pytest.mark.parametrize("test", ["", "test.parquet"])
def test_an_evaluation_encodes_as_many_images_as_are_counted(
    test: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = 0

    def counting(encoder: nn.Module, images: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal encoded
        encoded += len(images)
        return extract_features(encoder, images, **options)

    monkeypatch.setattr(online, "extract_features", counting)
    data = {"train": str(folder / "train.parquet"), "test": test and str(folder / test)}
    run = resolved(folder, data=data, evaluation={"eval_train_limit": 20, "test_limit": 0})
    model = build_model(run.config)
    evaluation = OnlineEvaluation(run.config, run.source, 0, 1, torch.device("cpu"))
    evaluation.before_training(model)
    rows = encoded_rows(run.config, run.source)
    assert encoded == rows.label_free == 3 * NUM_ROWS
    evaluation(model)
    assert encoded == 2 * rows.label_free + rows.knn
    seconds = online_seconds(run.config, run.source, model, 8)
    ratio = (rows.label_free + rows.knn) / rows.label_free
    assert seconds.epoch == pytest.approx(seconds.start * ratio)
