"""What nodes say of themselves, compared: versions, storage, clocks, addresses."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

from simclr_ray.cli.node_checks import CODE, NodeReport, compare_nodes, report_node
from simclr_ray.config.findings import Finding
from simclr_ray.storage.provenance import code_digest

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1"}


def node(
    host: str, *, sees_storage: bool = True, loopback: bool = False, **versions: str
) -> NodeReport:
    return NodeReport(host, VERSIONS | versions, sees_storage=sees_storage, loopback=loopback)


def by_check(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_nodes_that_are_alike_pass() -> None:
    (finding,) = compare_nodes([node("a"), node("b"), node("c")])
    assert finding.status == "ok"
    assert "3 answered" in finding.detail


def test_a_node_with_another_version_is_named_with_both_versions() -> None:
    finding, *rest = compare_nodes([node("a"), node("b", torch="2.13.0"), node("c")])
    assert finding.status == "fail"
    assert finding.detail == "b: torch 2.13.0, not 2.14.1"
    assert not rest


def test_a_node_that_does_not_see_the_storage_fails() -> None:
    found = by_check(compare_nodes([node("a"), node("b", sees_storage=False)]))
    assert found["shared storage"].status == "fail"
    assert "b" in found["shared storage"].detail
    assert "s3://" in found["shared storage"].advice


def test_a_loopback_host_name_matters_between_nodes_and_not_on_one() -> None:
    assert "network" not in by_check(compare_nodes([node("a", loopback=True)]))
    found = by_check(compare_nodes([node("a"), node("b", loopback=True)]))
    assert found["network"].status == "warn"
    assert "GLOO_SOCKET_IFNAME" in found["network"].advice


def test_a_node_reports_its_versions_and_whether_it_sees_a_file(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_text("")
    report = report_node(str(tmp_path), str(probe))
    assert report.sees_storage
    assert report.host == socket.gethostname()
    assert report.versions["python"] == platform.python_version()
    assert report.versions["ray"] == metadata.version("ray")
    assert not report_node(str(tmp_path), str(tmp_path / "gone")).sees_storage
    assert report.versions[CODE] == code_digest()
    assert not report.cannot_write
    assert list(tmp_path.iterdir()) == [probe], "it has taken its own file away"


def test_of_nodes_that_differ_the_one_that_is_not_as_the_driver_is_named() -> None:
    old = [node("a", torch="2.13.0"), node("b", torch="2.13.0")]
    (finding,) = compare_nodes([*old, node("c")], VERSIONS)
    assert finding.detail == "a: torch 2.13.0, not 2.14.1; b: torch 2.13.0, not 2.14.1"


def test_a_node_that_cannot_write_is_named_with_why() -> None:
    reports = [node("a"), node("b")._replace(cannot_write="Access Denied")]
    found = by_check(compare_nodes(reports))
    assert found["storage"].status == "fail"
    assert found["storage"].detail == "b: Access Denied"


@pytest.mark.parametrize(
    ("ahead_s", "within_s", "status", "said"),
    [
        (3600.0, 0.1, "fail", "b is 3,600 s ahead of this machine"),
        (-90.0, 0.1, "fail", "b is 90 s behind this machine"),
        (5.0, 0.5, "warn", "b is 5 s ahead of this machine"),
        (5.0, 4.0, "", ""),  # the question itself took as long
        (1.0, 0.1, "", ""),
    ],
)
def test_a_clock_that_is_off_is_named(
    ahead_s: float, within_s: float, status: str, said: str
) -> None:
    reports = [node("a"), node("b")._replace(ahead_s=ahead_s, within_s=within_s)]
    clocks = [finding for finding in compare_nodes(reports) if finding.check == "clock"]
    assert [finding.status for finding in clocks] == ([status] if status else [])
    assert all(finding.detail == said and "NTP" in finding.advice for finding in clocks)


def test_a_node_that_does_not_reach_the_tracking_server_is_named_with_why() -> None:
    reports = [node("a"), node("b")._replace(cannot_reach="head:5000: timed out")]
    found = by_check(compare_nodes(reports))
    assert (found["tracking"].status, found["tracking"].detail) == (
        "warn",
        "b: head:5000: timed out",
    )
    assert found["nodes"].status == "ok"


def test_a_node_connects_to_the_tracking_server_and_needs_no_storage_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        reached = report_node("", "", address)
    assert (reached.cannot_reach, reached.cannot_write, reached.sees_storage) == ("", "", True)
    refused = report_node("", "", address, 5.0).cannot_reach
    assert refused.startswith(f"127.0.0.1:{address[1]}: ")
    assert "refused" in refused


def test_a_folder_that_cannot_be_made_is_why_a_node_cannot_write(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert report_node(str(file / "below"), "").cannot_write
