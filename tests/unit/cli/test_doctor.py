"""The doctor's findings on machines, folders and clusters, sound ones and broken ones."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import ray
import torch

from simclr_ray.augment.native import Native
from simclr_ray.cli import doctor
from simclr_ray.cli import environment as machine
from simclr_ray.config.findings import Finding
from simclr_ray.distributed.machine import cores


def by_check(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_versions_inside_the_supported_ranges_are_named() -> None:
    python, libraries = machine.compare_versions(
        ["torch>=2.9,<3", "ray[data,train]>=2.58", 'mypy>=99; extra == "dev"'], ">=3.11,<3.14"
    )
    assert (python.status, libraries.status) == ("ok", "ok")
    assert f"torch {torch.__version__.partition('+')[0]}" in libraries.detail
    assert f"ray {metadata.version('ray')}" in libraries.detail
    assert "mypy" not in libraries.detail, "extras are not asked for"


def test_versions_outside_name_what_is_there_and_what_is_supported() -> None:
    python, libraries = machine.compare_versions(
        ["torch>=99", "no-such-package>=1", "numpy>=1"], "<3"
    )
    assert python.status == "fail"
    assert platform.python_version() in python.detail
    assert libraries.status == "fail"
    assert f"torch {metadata.version('torch')} (supported: >=99)" in libraries.detail
    assert "no-such-package absent" in libraries.detail
    assert "numpy" not in libraries.detail
    assert python.advice
    assert libraries.advice


def test_the_projects_own_ranges_hold_here() -> None:
    findings = machine.check_versions()
    assert all(f.status != "fail" for f in findings), findings


def test_the_machine_is_measured() -> None:
    found = by_check(machine.check_machine())
    assert found["cores"].detail == str(cores())
    assert 0 < machine.memory_gib() < 2**16
    assert all(f.status == "ok" or f.advice for f in found.values())


@pytest.mark.parametrize(("gpus", "expected"), [(0, 1.0), (1, 1.0), (8, 5.09)])
def test_shared_memory_is_held_against_what_the_gpus_take(
    gpus: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(machine, "cores", lambda: 8 * max(gpus, 1))
    monkeypatch.setattr(machine, "free_shared_memory", lambda: 2 * 2**30)
    assert machine.store_gib() == pytest.approx(expected, rel=0.01)
    finding = by_check(machine.check_machine())["shared memory"]
    assert finding.status == ("ok" if expected < 2 else "warn")


def test_the_device_is_named() -> None:
    found = by_check(machine.check_device())
    expected = "CUDA" if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    assert expected in found["device"].detail


def test_views_made_with_torch_are_a_warning_that_says_why_and_what_to_do() -> None:
    compiled = machine.views_finding(Native(ctypes.CDLL(None), "from the package, x86-64-v3"))
    assert (compiled.status, compiled.detail) == ("ok", "compiled: from the package, x86-64-v3")
    slow = machine.views_finding(Native(None, "SIMCLR_RAY_NATIVE=off"))
    assert slow.status == "warn"
    assert slow.detail.endswith("SIMCLR_RAY_NATIVE=off")
    assert "gcc" in slow.advice


@pytest.mark.parametrize(("gain", "advised"), [(0.3, "float32"), (1.0, "float32"), (3.0, "bf16")])
def test_the_faster_precision_is_advised(gain: float, advised: str) -> None:
    finding = machine.precision_finding(gain)
    assert finding.advice == f"set precision={advised}"
    assert f"{gain:.2f} times" in finding.detail


def test_bf16_is_timed_on_this_machine() -> None:
    gain = machine.bf16_speedup(torch.device("cpu"), repeats=1)
    assert 1e-3 < gain < 1e3


def test_a_writable_folder_passes_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    finding = doctor.check_storage(str(tmp_path / "new" / "runs"))
    assert finding.status == "ok"
    assert list((tmp_path / "new" / "runs").iterdir()) == []


def test_a_file_uri_is_a_storage_too(tmp_path: Path) -> None:
    assert doctor.check_storage(f"file://{tmp_path}/runs").status == "ok"
    assert (tmp_path / "runs").is_dir()


@pytest.mark.parametrize("kind", ["under_a_file", "unknown_scheme"])
def test_a_storage_that_cannot_be_written_fails_with_its_name_and_advice(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    storage = {"under_a_file": f"{tmp_path}/file/runs", "unknown_scheme": "nosuch://bucket/runs"}[
        kind
    ]
    finding = doctor.check_storage(storage)
    assert finding.status == "fail"
    assert storage in finding.detail
    assert "storage=" in finding.advice


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"RAY_AUTH_MODE": "token"}, "ok"),
        ({"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "10.0.0.1:6379"}, "ok"),
        ({"RAY_AUTH_MODE": "disabled"}, "warn"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "10.0.0.1:6379"}, "warn"),
        ({}, "ok"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "warn"),
        ({"RAY_AUTH_MODE": "tokens"}, "warn"),
    ],
)
def test_authentication_is_to_be_on_and_chosen_where_a_cluster_is_joined(
    environment: dict[str, str], status: str
) -> None:
    finding = doctor.check_auth(environment)
    assert finding.status == status
    assert bool(finding.advice) == (status != "ok")


def test_a_run_that_does_not_fit_is_told_the_number_of_workers_that_does() -> None:
    nodes = [{"Alive": True}, {"Alive": True}, {"Alive": False}]
    resources = {"CPU": 3.0, "GPU": 1.0, "node:10.0.0.1": 1.0, "object_store_memory": 1e9}
    fits = doctor.check_resources(nodes, resources, num_workers=3)
    assert (fits.status, fits.detail) == ("ok", "2 nodes alive: CPU 3, GPU 1")
    too_many = doctor.check_resources(nodes, resources, num_workers=4)
    assert too_many.status == "warn"
    assert "scaling.num_workers to 3" in too_many.advice


def test_an_address_where_nothing_listens_is_found_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # in a process of its own: this one may be connected to the cluster that tests share
    program = (
        "import json; from simclr_ray.cli import doctor;"
        f"print(json.dumps(doctor.check_cluster({str(tmp_path)!r}, num_workers=2)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    (row,) = json.loads(done.stdout.splitlines()[-1])
    finding = Finding(*row)
    assert finding.status == "fail"
    assert address in finding.detail
    assert "RAY_ADDRESS" in finding.advice


@pytest.mark.parametrize("difference", [1e-6, float("nan"), float("inf")])
def test_a_gradient_that_differs_fails(difference: float) -> None:
    asked: list[int] = []

    def parity(workers: int) -> float:
        asked.append(workers)
        return difference

    finding = doctor.check_gradient(3, parity)
    assert finding.status == "fail"
    assert "3 processes" in finding.detail
    assert finding.advice
    assert asked == [3]


def test_a_gradient_that_agrees_passes() -> None:
    finding = doctor.check_gradient(2, lambda _: 1e-13)
    assert finding.status == "ok"
    assert "1.0e-13" in finding.detail


@pytest.mark.slow
def test_the_default_tracking_store_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    finding = doctor.check_tracking("", str(tmp_path))
    assert finding.status == "ok", finding
    assert str(tmp_path) in finding.detail


def test_a_tracking_server_that_is_not_there_fails_with_advice(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    finding = doctor.check_tracking(f"http://127.0.0.1:{port}", str(tmp_path))
    assert finding.status == "fail"
    assert "tracking.uri" in finding.advice


@pytest.mark.parametrize("uri", ["localhost:5000", "mysql2://x", "ftp://a/b"])
def test_an_address_that_mlflow_does_not_know_fails_with_advice(uri: str, tmp_path: Path) -> None:
    finding = doctor.check_tracking(uri, str(tmp_path))
    assert finding.status == "fail"
    assert "tracking.uri" in finding.advice


@pytest.mark.ray
@pytest.mark.slow
def test_every_check_runs_on_a_live_cluster(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del ray_cluster  # the checks find it: this process is connected to it
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def broken(_: int) -> float:
        raise OSError("no route to\nthe other process")

    found = by_check(doctor.run_checks(str(tmp_path / "runs"), num_workers=2, parity=broken))
    assert found["ray"].status == "ok", found["ray"]
    assert "1 node alive: CPU 4" in found["ray"].detail
    assert found["state API"].status == "ok", found["state API"]
    assert found["nodes"].detail == "1 answered, all with the same versions"
    assert found["storage"].status == "ok"
    assert found["gradient"].status == "fail"
    assert "the other process" in found["gradient"].detail
    assert all(f.status == "ok" or f.advice for f in found.values())
    assert ray.is_initialized(), "a cluster that the doctor did not start is left running"
