"""A container's limits count where cores and memory are counted, and so all that goes by them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import GIB
from simclr_ray.distributed import machine
from simclr_ray.evaluation.features import keep_within_cores
from simclr_ray.train.scaling import resolve_scaling
from simclr_ray.train.worker import threads_of

CORES = 192  # of the machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the control groups of a machine of 192 cores lie, as yet without a limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    return tmp_path / "cgroup"


def limit(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1600000 100000", 16), ("max 100000", CORES), ("150000 100000", 1), ("50000 100000", 1),
     ("99000000 100000", CORES), ("", CORES), ("x y", CORES)],
)  # fmt: skip
def test_cores_are_those_of_a_container(text: str, expected: int, groups: Path) -> None:
    assert machine.cores() == CORES
    limit(groups / "cpu.max", text)
    assert machine.cores() == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [("1600000", "100000", 16), ("-1", "100000", CORES), ("350000", "100000", 3)],
)
def test_cores_are_those_of_a_container_of_version_1(
    quota: str, period: str, expected: int, groups: Path
) -> None:
    limit(groups / "cpu" / "cpu.cfs_quota_us", quota)
    limit(groups / "cpu" / "cpu.cfs_period_us", period)
    assert machine.cores() == expected


def test_affinity_counts_too(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(groups / "cpu.max", "1600000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert machine.cores() == 2


def test_of_groups_within_groups_the_least_counts(groups: Path) -> None:
    """As Slurm and systemd limit a job, without a container."""
    limit(
        machine.OWN_GROUPS, "4:memory:/job_7\n3:cpu,cpuacct:/job_7/step_0\n0::/slurm/job_7/step_0"
    )
    limit(groups / "slurm" / "cpu.max", "6400000 100000")
    limit(groups / "slurm" / "job_7" / "cpu.max", "800000 100000")
    limit(groups / "slurm" / "job_7" / "step_0" / "cpu.max", "max 100000")
    limit(groups / "slurm" / "job_8" / "cpu.max", "100000 100000")  # of another
    assert machine.cores() == 8
    limit(groups / "cpu" / "job_7" / "cpu.cfs_quota_us", "400000")
    limit(groups / "cpu" / "job_7" / "cpu.cfs_period_us", "100000")
    assert machine.cores() == 4
    limit(groups / "slurm" / "job_7" / "memory.max", str(GIB // 4))
    assert machine.machine_memory() == GIB // 4
    limit(groups / "memory" / "job_7" / "memory.limit_in_bytes", str(GIB // 8))
    assert machine.machine_memory() == GIB // 8


def test_without_a_limit_memory_is_the_machines(groups: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit(groups / "memory.max", "max")
    limit(groups / "memory" / "memory.limit_in_bytes", "9223372036854771712")
    assert machine.machine_memory() == whole
    limit(groups / "memory.max", str(GIB // 2))
    assert machine.machine_memory() == GIB // 2


def test_what_a_run_takes_of_a_container_is_what_it_has(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(groups / "cpu.max", "1600000 100000")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("simclr_ray.train.scaling.unusable_gpu", lambda: "")
    experiment = resolve_scaling(Experiment.load("photos_gpu"))
    scaling = experiment.scaling
    assert (scaling.max_workers, scaling.data_actors_per_worker) == (8, 1)
    assert scaling.num_cpus <= 16
    assert threads_of(experiment, 8) == 2


def test_torch_keeps_within_the_limit(groups: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert keep_within_cores() == 3
        limit(groups / "cpu.max", "200000 100000")
        assert (keep_within_cores(), torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(threads)


def test_shared_memory_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED", tmp_path / "none")
    assert machine.free_shared_memory() is None
    monkeypatch.setattr(machine, "SHARED", tmp_path)
    assert machine.free_shared_memory()
