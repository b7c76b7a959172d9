"""`scaling: auto` is what this machine has, and computes what any other number does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from simclr_ray import config as cfg
from simclr_ray.cli.cluster import planned_run
from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed import ray_address
from simclr_ray.distributed.machine_limits import check_fits
from simclr_ray.errors import ConfigError
from simclr_ray.nn.precision import unusable_gpu
from simclr_ray.studies.files import load_study
from simclr_ray.studies.plan import base_tree
from simclr_ray.train.dry_run import device_line
from simclr_ray.train.scaling import resolve_scaling


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, cpus: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("cpus", [1, 2, 6, 16, 96, 256])
def test_a_machine_with_gpus_has_a_worker_on_each_and_room_for_all(
    gpus: int, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus, cpus)
    made = resolve_scaling(Experiment.load("photos_gpu")).scaling
    assert (made.num_workers, made.gpus_per_worker) == (gpus, 1.0)
    assert made.num_cpus <= cpus + 1e-9
    assert 1 <= made.data_actors_per_worker <= 8
    assert not made.is_elastic
    if cpus == 96 and gpus == 8:
        assert made.data_actors_per_worker == 8


def test_without_a_gpu_it_is_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0, 16)
    experiment = Experiment.load("cifar10_cpu", "data.train=x", "scaling=auto")
    assert (experiment.scaling.min_workers, experiment.scaling.max_workers) == (1, 1)
    made = resolve_scaling(experiment)
    assert made.scaling.num_workers == 1
    assert made.digest() == Experiment.load("cifar10_cpu", "data.train=x").digest()
    fixed = Experiment.load("cifar10_cpu", "data.train=x", "scaling.num_workers=3")
    assert resolve_scaling(fixed) is fixed
    other = Experiment.load("cifar10_cpu", "data.train=x", "scaling.num_workers=auto")
    assert resolve_scaling(other).scaling.threads_per_worker == fixed.scaling.threads_per_worker


def test_a_cluster_and_a_study_are_told_to_give_a_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, 2, 16)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="auto asks this machine, and RAY_ADDRESS names a"):
        resolve_scaling(Experiment.load("photos_gpu"))
    study = load_study("temperature", "cpu", "data.train=x", "scaling.num_workers=auto")
    with pytest.raises(
        ConfigError,
        match="is auto, which asks one machine; a cluster and a study",
    ):
        base_tree(study)


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="or auto"):
        Experiment.load("cifar10_cpu", "scaling.num_workers=many")
    with pytest.raises(ConfigError):
        Experiment.load("cifar10_cpu", "scaling=many")
    tree = cfg.to_tree(Experiment.load("photos_gpu"))
    assert tree["scaling"]["num_workers"] == "auto"
    assert cfg.validate(Experiment, tree) == Experiment.load("photos_gpu")


def test_what_is_given_beside_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, 32)
    given = Experiment.load(
        "photos_gpu", "scaling.data_actors_per_worker=12", "scaling.recompute_activations=true"
    )
    made = resolve_scaling(given).scaling
    assert (made.num_workers, made.data_actors_per_worker) == (2, 12)
    assert made.recompute_activations
    assert made.num_cpus <= 32
    either = [
        Experiment.load("cifar10_cpu", "scaling=auto", "scaling.cpus_per_worker=2"),
        Experiment.load("cifar10_cpu", "scaling.cpus_per_worker=2", "scaling.num_workers=auto"),
    ]
    assert [resolve_scaling(one).scaling.cpus_per_worker for one in either] == [2.0, 2.0]
    assert resolve_scaling(resolve_scaling(given)) == resolve_scaling(given)


@pytest.mark.parametrize(
    ("given", "workers", "on", "device"),
    [
        (1, 4, "4 GPUs", "GPU, 1 a worker"),
        (2, 2, "4 GPUs", "GPU, 2 a worker"),
        (0.5, 8, "4 GPUs", "GPU, 0.5 a worker"),
        (0, 4, "4 GPUs", "GPU, 1 a worker"),  # the default, which a config in a file has
    ],
)
def test_gpus_of_a_worker_that_are_given_decide_how_many_there_are(
    given: float,
    workers: int,
    on: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("simclr_ray.train.scaling.unusable_gpu", lambda: "")
    monkeypatch.setattr("simclr_ray.train.dry_run.unusable_gpu", lambda: "")
    machine(monkeypatch, 4, 32)
    caplog.set_level("INFO", "simclr_ray")
    made = resolve_scaling(Experiment.load("photos_gpu", f"scaling.gpus_per_worker={given}"))
    assert made.scaling.max_workers == workers
    assert made.scaling.num_gpus <= 4
    assert made.scaling.num_cpus <= 32
    assert caplog.messages[0].endswith(f" on {on} of this machine")
    assert device_line(made.scaling).startswith(device)
    check_fits(made)  # and the run is not refused


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_a_config_that_was_written_to_a_file_is_on_the_same_device(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus, 16)
    preset = Experiment.load("photos_gpu")
    written = cfg.validate(Experiment, cfg.to_tree(preset))  # as `simclr-ray config` prints it
    assert resolve_scaling(written).scaling == resolve_scaling(preset).scaling
    assert resolve_scaling(written).scaling.num_gpus == gpus


def test_a_ray_that_this_process_has_started_is_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, 0, 4)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setattr(ray_address, "STARTED_HERE", {"127.0.0.1:1234"})
    assert resolve_scaling(Experiment.load("photos_gpu")).scaling.num_workers == 1


def test_the_verbs_of_a_cluster_ask_for_a_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a cluster and a study take a number"):
        planned_run(["photos_gpu", f"storage={tmp_path}"])
    assert planned_run(["photos_gpu"], workers=4).scaling.num_workers == 4


def test_a_gpu_that_torch_cannot_use_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, 0, 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unusable_gpu(tmp_path) == ""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    problem = unusable_gpu(tmp_path)
    assert "none of this machine's NVIDIA devices (2)" in problem
    assert "driver" in problem
    monkeypatch.setattr("simclr_ray.train.scaling.unusable_gpu", lambda: problem)
    monkeypatch.setattr("simclr_ray.train.dry_run.unusable_gpu", lambda: problem)
    with caplog.at_level("WARNING"):
        scaling = resolve_scaling(Experiment.load("photos_gpu")).scaling
    assert caplog.messages == [problem]
    assert device_line(scaling) == f"CPU; {problem}"
    for hidden in ("", "-1", "NoDevFiles"):  # on purpose
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert unusable_gpu(tmp_path) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert unusable_gpu(tmp_path) == problem
    given = Experiment.load("photos_gpu", "scaling.num_workers=2", "scaling.gpus_per_worker=1")
    assert device_line(given.scaling) == f"GPU, 1 a worker; {problem}"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose GPUs are not this machine's
    assert device_line(given.scaling) == "GPU, 1 a worker"
    machine(monkeypatch, 2, 8)
    assert unusable_gpu(tmp_path) == ""


def test_a_dry_run_says_which_device_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_ray.train.dry_run.unusable_gpu", lambda: "")
    machine(monkeypatch, 2, 16)
    auto = Experiment.load("photos_gpu")
    assert device_line(resolve_scaling(auto).scaling) == "GPU, 1 a worker"
    by_number = Experiment.load("photos_gpu", "scaling.num_workers=2").scaling
    assert device_line(by_number).startswith("CPU; this machine's 2 GPUs will idle: scaling.")
    machine(monkeypatch, 0, 16)
    assert device_line(by_number) == "CPU"
