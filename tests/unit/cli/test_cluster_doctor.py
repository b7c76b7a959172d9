"""What `doctor --cluster` says of a cluster, and what that leaves behind."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
import ray

from simclr_ray.cli.cluster import planned_run
from simclr_ray.cli.cluster_doctor import (
    check_cluster_for,
    check_object_store,
    check_store,
    gradient_finding,
    network_finding,
    summary,
)
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.findings import Finding
from simclr_ray.config.wording import GIB
from simclr_ray.distributed import placement
from simclr_ray.distributed.cluster_health import cluster_result, keep
from simclr_ray.distributed.placement import Node
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.train.cluster_check import REDUCED, RankReport
from simclr_ray.train.gradient_parity import Worst

NOW = datetime(2026, 11, 29, 16, 5, tzinfo=UTC)
MIB = 2**20


def report(rank: int, difference: float = 1e-14, reduce_s: float = 0.1) -> RankReport:
    worst = Worst(difference, "weights: conv1")
    return RankReport(rank, f"host{rank}", "gloo", "cpu", worst, 0.002, reduce_s)


def test_a_gradient_that_agrees_is_said_with_nodes_and_backend() -> None:
    finding = gradient_finding([report(0), report(1, 3e-13)])
    assert finding.status == "ok"
    assert finding.detail == "2 workers on 2 nodes over gloo (cpu) against 1: 3.0e-13"


@pytest.mark.parametrize("difference", [1e-6, float("inf")])
def test_a_rank_that_computes_something_else_is_named(difference: float) -> None:
    finding = gradient_finding([report(0), report(1, difference), report(2)])
    assert finding.status == "fail"
    assert "host1, weights: conv1" in finding.detail


def test_what_a_step_exchanges_is_by_the_slowest_rank() -> None:
    finding = network_finding([report(0), report(1, reduce_s=REDUCED / MIB / 50)])
    assert finding.status == "warn", "107 MiB at 50 MiB/s are 2.1 s a step"
    assert "50 MiB/s: 2.1 s for a ResNet-50's" in finding.detail
    assert "compress_gradients" in finding.advice
    assert network_finding([report(0), report(1)]).status == "ok"
    assert network_finding([report(0, reduce_s=0.0)]).status == "ok"


def test_the_summary_says_what_failed_or_what_the_workers_have_shown() -> None:
    well = [Finding("auth", "ok", "x"), Finding("gradient", "ok", "2 workers: 1e-14")]
    assert summary(well, NOW) == "ok; 2 workers: 1e-14; 2026-11-29T16:05Z"
    bad = [*well, Finding("nodes", "fail", "y"), Finding("clock", "fail", "z")]
    assert summary(bad, NOW) == "failed: clock, nodes; 2 workers: 1e-14; 2026-11-29T16:05Z"
    assert summary(well[:1], NOW, is_whole=False) == "broken off; 2026-11-29T16:05Z"
    failed = "broken off; failed: nodes; 2026-11-29T16:05Z"
    assert summary(bad[2:3], NOW, is_whole=False) == failed


def test_a_planned_run_needs_no_images() -> None:
    config = planned_run(["scaling.cpus_per_worker=2"], "s3://bucket/runs", 3)
    assert (config.scaling.num_workers, config.scaling.cpus_per_worker) == (3, 2.0)
    assert config.storage == "s3://bucket/runs"
    assert planned_run(["shapes_demo", "storage=s3://x/y"], "", 2).storage == "s3://x/y"
    with pytest.raises(ConfigError, match="num_workrs"):
        planned_run(["scaling.num_workrs=2"], "runs", 2)


def test_storage_and_workers_that_are_stated_hold_for_a_preset_as_well() -> None:
    stated = planned_run(["imagenet_resnet50"], "s3://bucket/runs", 8)
    assert (stated.storage, stated.scaling.num_workers) == ("s3://bucket/runs", 8)
    preset = planned_run(["imagenet_resnet50"])
    loaded = Experiment.load("imagenet_resnet50")
    assert (preset.storage, preset.scaling) == (loaded.storage, loaded.scaling)
    later = planned_run(["imagenet_resnet50", "scaling.num_workers=3"], None, 8)
    assert later.scaling.num_workers == 3, "a key on the line holds before an option"
    assert planned_run([]).scaling.num_workers == 2
    assert planned_run([]).storage == str(Path("runs").absolute())


def test_without_an_address_there_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="RAY_ADDRESS is unset"):
        next(check_cluster_for(planned_run([], "runs", 1)))


def test_views_that_do_not_fit_the_object_store_are_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node("10.0.0.1", True, 192.0, 8.0, store=8 * GIB)
    monkeypatch.setattr(placement, "nodes", lambda: [node])
    scaling = ("scaling.num_workers=8", "scaling.gpus_per_worker=1")
    run = Experiment.load("imagenet_resnet50", "data.train=x", *scaling)
    finding = check_object_store(run)
    assert (finding.status, finding.detail) == ("ok", "8.0 GiB or more where views go")
    monkeypatch.setattr(placement, "nodes", lambda: [node._replace(store=4 * GIB)])
    finding = check_object_store(run)
    assert finding.status == "warn"
    assert "10.0.0.1 4.0 of 6.9 GiB; Ray writes each batch to disk" in finding.detail
    assert "--object-store-memory" in finding.advice


@pytest.mark.ray
def test_two_workers_are_checked_and_the_cluster_keeps_the_result(
    ray_cluster: str, tmp_path: Path
) -> None:
    tracking = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    config = planned_run([tracking], str(tmp_path / "runs"), 2)
    findings = {finding.check: finding for finding in check_cluster_for(config, within_s=400)}
    assert {f.check for f in findings.values() if f.status == "fail"} == set(), findings
    assert "2 workers on 1 node over gloo (cpu) against 1: " in findings["gradient"].detail
    assert "MiB/s" in findings["network"].detail
    assert str(cluster_result()).startswith("ok; 2 workers on 1 node over gloo")
    assert not list((tmp_path / "runs").iterdir()), "nothing is left in the storage"


@pytest.mark.ray
def test_a_storage_that_fails_here_is_asked_of_no_node_and_starts_no_worker(
    ray_cluster: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    storage = f"{tmp_path}/file/runs"
    config = planned_run([f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"], storage, 2)
    findings = list(check_cluster_for(config, within_s=400))
    failed = [finding for finding in findings if finding.status == "fail"]
    assert [finding.check for finding in failed] == ["storage", "gradient"], failed
    assert failed[1].detail == "not tried: workers cannot start"
    assert str(cluster_result()).startswith("failed: gradient, storage; ")


@pytest.mark.ray
def test_checks_that_are_broken_off_leave_no_earlier_result(
    ray_cluster: str, tmp_path: Path
) -> None:
    keep("ok; of yesterday")
    findings = check_cluster_for(planned_run([], str(tmp_path), 2))
    assert next(findings).check == "auth"
    findings.close()
    assert str(cluster_result()).startswith("broken off; ")


@pytest.mark.ray
def test_a_minute_that_is_over_is_none_that_raises(ray_cluster: str, tmp_path: Path) -> None:
    """What is left is then the least, which a loaded machine may not keep."""
    config = planned_run([f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"], str(tmp_path / "r"), 2)
    findings = list(check_cluster_for(config, within_s=-100))
    broken = [f for f in findings if "Error" in f.detail]
    assert broken == []
    assert findings[-1].check in ("gradient", "network")


def test_a_store_that_is_a_file_is_none_for_several_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    node = {"NodeManagerAddress": "a", "Alive": True, "Resources": {"CPU": 1.0}, "NodeID": "1"}
    config = planned_run([], str(tmp_path), 2)
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    several = check_store(config)
    assert (several.check, several.status) == ("mlflow", "fail")
    assert "SQLite in `storage` is no store for several machines" in several.detail
    assert "tracking.uri=http://HOST:5000" in several.advice
    assert not list(tmp_path.iterdir()), "and none is made"
    monkeypatch.setattr(ray, "nodes", lambda: [node, node | {"Alive": False}])
    assert check_store(config).status == "ok"
