"""Three nodes of their own on this machine, and a run of which one node dies under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cluster.machines import REPOSITORY, leftovers
from tests.cluster.nodes import CannotBuild, Network

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

EACH_NODE = """
import json, logging, os, socket
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
import pyarrow.fs as pafs
from mlflow import MlflowClient

ray.init(logging_level=logging.ERROR, log_to_driver=False)

@ray.remote(num_cpus=0.5)
def look(bucket, tracking):
    fs, path = pafs.FileSystem.from_uri(f"{bucket}/{socket.gethostname()}")
    with fs.open_output_stream(path) as stream:
        stream.write(b"here")
    return socket.gethostname(), len(MlflowClient(tracking).search_experiments()), os.getpid()

alive = [node for node in ray.nodes() if node["Alive"]]
given = os.environ["BUCKET"], os.environ["TRACKING"]
told = [look.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote(*given) for n in alive]
print(json.dumps([[n["NodeManagerAddress"] for n in alive], ray.get(told)]))
"""
DIES = """
import os, sys, time
from tests.cluster.nodes import Network
with Network() as net:
    machine = net.machine("plain")
    machine.popen(["sleep", "1000"])
    print(net.token, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        try:
            net = stack.enter_context(Network())
        except CannotBuild as reason:
            pytest.skip(str(reason))
        yield net
    assert not leftovers(net.token)


def test_three_nodes_come_up_reach_all_services_and_leave_nothing(network: Network) -> None:
    try:
        with network.s3() as s3, network.mlflow() as tracking:
            told = {"BUCKET": s3.uri("bucket"), "TRACKING": tracking.uri}
            with (
                network.node("head", head=True) as head,
                network.node("second"),
                network.node("third"),
            ):
                done = head.run([sys.executable, "-c", EACH_NODE], env=told)
                assert done.returncode == 0, done.stdout + done.stderr + head.told()
                addresses, seen = json.loads(done.stdout.splitlines()[-1])
                assert len(set(addresses)) == 3
                assert {name for name, *_ in seen} == {"head", "second", "third"}
                assert {experiments for _, experiments, _ in seen} == {1}  # MLflow's own, "Default"
    except CannotBuild as reason:
        pytest.skip(str(reason))


def test_what_a_killed_session_left_is_removed_by_the_next() -> None:
    try:
        with Network():
            pass
    except CannotBuild as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [sys.executable, "-c", DIES],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    token = done.stdout.strip()
    assert len(token) == 6, done.stderr
    deadline = time.monotonic() + 20  # the kernel kills; names and the folder remain
    while "processes" in leftovers(token) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(leftovers(token)) == {"namespaces", "links", "folders", "mounts"}
    with Network():
        assert not leftovers(token)
