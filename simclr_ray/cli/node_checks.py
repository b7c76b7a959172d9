"""What each node of a Ray cluster is asked: versions, code, clock, storage, and its own address."""

from __future__ import annotations

import contextlib
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pyarrow import fs

from simclr_ray.cli.environment import PACKAGE
from simclr_ray.cli.time_limit import in_thread, result_until
from simclr_ray.config.findings import CheckStatus, Finding, Findings, detail_of
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem, remove_file
from simclr_ray.storage.provenance import code_digest, versions_of

# Must be equal on all nodes: Ray insists on its own version; the others decide what a gradient is
# and whether an object that one node pickles can be read on the next.
COMPARED: Final = ("ray", "torch", "torchvision", "pyarrow", "numpy", PACKAGE)
CODE: Final = f"{PACKAGE} code"  # two checkouts may have one version
NODE_TIMEOUT_S: Final = 180.0  # a first task on a loaded machine imports torch for a minute
# A lock in a bucket goes by what the writer's clock says; S3 refuses what is 15 minutes off.
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 60.0
CLOCK_TRIES: Final = 3
CLOCKS_S: Final = 5.0  # for those of all nodes
LEAST_CLOCK_S: Final = 0.1
ANSWER_S: Final = 15.0  # of storage and tracking server to a node
UNUSABLE: Final = (OSError, ValueError, DataError)  # what a storage that is none raises

Server = tuple[str, int]  # host and port


class NodeReport(NamedTuple):
    """What a node says of itself.

    Attributes:
        host: Its name.
        versions: Of the packages that must be equal, and a digest of this one's code.
        sees_storage: Whether it sees there what another machine wrote.
        loopback: Whether its own name means 127.0.0.1, where gloo would listen.
        cannot_write: Why it cannot write to the storage; empty: it can.
        cannot_reach: Why it does not reach the tracking server; empty: it does, or there is none.
        ahead_s: By how much its clock is before the asking machine's.
        within_s: How exactly that is known: half of what the question took.
    """

    host: str
    versions: dict[str, str]
    sees_storage: bool
    loopback: bool
    cannot_write: str = ""
    cannot_reach: str = ""
    ahead_s: float = 0.0
    within_s: float = 0.0


def compare_nodes(
    reports: Sequence[NodeReport], versions: Mapping[str, str] | None = None
) -> Findings:
    """Return findings on whether all nodes agree on versions, storage, clock and network.

    Args:
        reports: Of the nodes, one at least.
        versions: What all are to have; by default what the first one has.
    """
    wanted = versions or reports[0].versions
    odd = [
        f"{node.host}: {name} {node.versions.get(name, 'absent')}, not {version}"
        for node in reports
        for name, version in wanted.items()
        if node.versions.get(name, "absent") != version
    ]
    findings = []
    if odd:
        advice = "install the same requirements.lock and wheel on every node"
        findings.append(Finding("nodes", "fail", "; ".join(odd), advice))
    else:
        detail = f"{len(reports)} answered, all with the same versions"
        findings.append(Finding("nodes", "ok", detail))
    if blind := [node.host for node in reports if not node.sees_storage]:
        advice = "choose a storage that all nodes share: s3://..., gs://..., or an NFS folder"
        detail = f"what this machine writes is not seen on {', '.join(blind)}"
        findings.append(Finding("shared storage", "fail", detail, advice))
    if mute := [f"{node.host}: {node.cannot_write}" for node in reports if node.cannot_write]:
        advice = "grant the account of that node the right to write there"
        findings.append(Finding("storage", "fail", "; ".join(mute), advice))
    if remote := [f"{node.host}: {node.cannot_reach}" for node in reports if node.cannot_reach]:
        advice = "open the server's port to these nodes: a study's trials run on any, and log there"
        findings.append(Finding("tracking", "warn", "; ".join(remote), advice))
    findings += _compare_clocks(reports)
    if bound := [node.host for node in reports if node.loopback and len(reports) > 1]:
        advice = (
            "set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to the network's interface on each node"
        )
        detail = f"the host name means 127.0.0.1 on {', '.join(bound)}"
        findings.append(Finding("network", "warn", detail, advice))
    return findings


def _compare_clocks(reports: Sequence[NodeReport]) -> Findings:
    """Return what is wrong with clocks, by as much as is known for sure."""
    findings: Findings = []
    for node in reports:
        off = abs(node.ahead_s) - node.within_s
        if off > CLOCK_WARN_S:
            direction = "ahead of" if node.ahead_s > 0 else "behind"
            detail = f"{node.host} is {abs(node.ahead_s):,.0f} s {direction} this machine"
            advice = "run chrony or another NTP client on every node"
            status: CheckStatus = "fail" if off > CLOCK_FAIL_S else "warn"
            findings.append(Finding("clock", status, detail, advice))
    return findings


def own_versions() -> dict[str, str]:
    """Return what must be equal on all nodes, as it is in this process."""
    return {"python": platform.python_version(), CODE: code_digest()} | versions_of(COMPARED)


def report_node(
    storage: str, probe: str, server: Server | None = None, limit_s: float = ANSWER_S
) -> NodeReport:
    """Return what the node that runs this says of itself.

    Args:
        storage: Folder or URI; empty: nothing is said of it.
        probe: A file there.
        server: Host and port of the tracking server, if any.
        limit_s: For an answer of either.
    """
    host = socket.gethostname()
    unanswered = f"no answer within {limit_s:.0f} s"
    storing = in_thread(lambda: _use_storage(storage, probe, host) if storage else ("", True))
    reaching = in_thread(lambda: _connect(server, limit_s) if server else "")
    until = time.monotonic() + limit_s
    cannot_write, sees = result_until(storing, until, (unanswered, True))
    cannot_reach = result_until(reaching, until, unanswered)
    try:
        loopback = socket.gethostbyname(host).startswith("127.")
    except OSError:
        loopback = False
    return NodeReport(host, own_versions(), sees, loopback, cannot_write, cannot_reach)


def _use_storage(storage: str, probe: str, content: str) -> tuple[str, bool]:
    """Return why nothing can be written to a storage, if so, and whether the file is seen there."""
    cannot_write = ""
    try:
        with stored_probe(storage, content):
            pass
    except UNUSABLE as error:
        cannot_write = detail_of(error)
    try:
        files, _ = filesystem(storage)
        return cannot_write, files.get_file_info(probe).type == fs.FileType.File
    except UNUSABLE:
        return cannot_write, False


def _connect(server: Server, limit_s: float) -> str:
    """Return why a server cannot be reached; empty: it can."""
    try:
        socket.create_connection(server, timeout=limit_s).close()
    except OSError as error:
        return f"{server[0]}:{server[1]}: {detail_of(error)}"
    return ""


class NodeProbe:
    """An actor on a node, which is asked for its report and then, quickly, for the time."""

    def report(self, storage: str, probe: str, server: Server | None, limit_s: float) -> NodeReport:
        """Same as `report_node`."""
        return report_node(storage, probe, server, limit_s)

    def time(self) -> float:
        """Return what this node's clock says, in seconds since 1970."""
        return time.time()


def check_nodes(
    storage: str, timeout_s: float = NODE_TIMEOUT_S, server: Server | None = None
) -> Findings:
    """Return findings on all nodes of the cluster at hand, those without CPUs included.

    Args:
        storage: Folder or URI that is to hold the runs; empty: nothing is said of it.
        timeout_s: A node that has not answered by then is one that does not.
        server: Host and port of the tracking server, if any.
    """
    with contextlib.ExitStack() as stack:
        probe = ""
        if storage:
            try:
                _, probe = stack.enter_context(stored_probe(storage, "seen"))
            except UNUSABLE:
                storage = ""  # `check_storage` has said why
        reports, findings = _ask_nodes(storage, probe, server, timeout_s)
    return [*findings, *(compare_nodes(reports, own_versions()) if reports else [])]


def _ask_nodes(
    storage: str, probe: str, server: Server | None, timeout_s: float
) -> tuple[list[NodeReport], Findings]:
    """Return the reports of the nodes that are alive, and what is wrong with those without one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from simclr_ray.distributed.placement import nodes

    remote = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
    limit_s = min(ANSWER_S, timeout_s / 3)  # its process has to start before
    reports, findings, tasks = [], [], {}
    for node in nodes():
        if node.is_alive:
            here = NodeAffinitySchedulingStrategy(node.id, soft=False)
            actor: Any = remote.options(scheduling_strategy=here).remote()
            report = actor.report.remote(storage, probe, server, limit_s)
            tasks[report] = (node.address, actor)
    answered, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout_s)
    until = time.monotonic() + CLOCKS_S
    for task, (address, actor) in tasks.items():
        why = f"no answer within {timeout_s:.0f} s"
        try:
            if task in answered:
                reports.append(_with_clock(ray.get(task), actor, until))
                continue
        except ray.exceptions.RayError as error:
            why = detail_of(error)
        finally:
            ray.kill(actor)
        advice = f"is {PACKAGE} installed there, and is the node not overloaded?"
        findings.append(Finding("nodes", "fail", f"{address}: {why}", advice))
    return reports, findings


def _with_clock(report: NodeReport, actor: Any, until: float) -> NodeReport:
    """Return a report with how far its node's clock is from this one: of a few tries the best."""
    import ray

    best = report._replace(within_s=float("inf"))
    for _ in range(CLOCK_TRIES):
        began = time.time()
        try:
            left_s = max(LEAST_CLOCK_S, until - time.monotonic())
            there = ray.get(actor.time.remote(), timeout=left_s)
        except ray.exceptions.GetTimeoutError:
            return best
        ended = time.time()
        within = (ended - began) / 2
        if within < best.within_s:
            best = report._replace(ahead_s=there - (began + ended) / 2, within_s=within)
    return best


@contextlib.contextmanager
def stored_probe(storage: str, content: str) -> Iterator[tuple[fs.FileSystem, str]]:
    """Give a file that was written and renamed in `storage`; delete it in the end."""
    files, root = filesystem(storage)
    files.create_dir(root, recursive=True)
    path = f"{root}/.doctor-{uuid.uuid4().hex}"
    try:
        with files.open_output_stream(f"{path}.partial") as stream:
            stream.write(content.encode())
        files.move(f"{path}.partial", path)
        yield files, path
    finally:
        for left in files.get_file_info([path, f"{path}.partial"]):
            if left.type == fs.FileType.File:
                remove_file(files, left.path)
