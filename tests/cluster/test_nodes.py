"""Three nodes of their own on this machine, and a run of which one node dies under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.machines import REPOSITORY, leftovers
from tests.cluster.needs import needing_this_machine
from tests.cluster.nodes import Network

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


def test_three_nodes_come_up_reach_all_services_and_leave_nothing(network: Network) -> None:
    with needing_this_machine(), network.s3() as s3, network.mlflow() as tracking:
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


def test_what_a_killed_session_left_is_removed_by_the_next() -> None:
    with needing_this_machine(), Network():
        pass
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


def test_a_run_whose_node_dies_goes_on_when_another_joins(network: Network) -> None:
    data, runs = network.folder / "data", network.folder / "runs"
    ours = [sys.executable, "-m", "simclr_ray"]
    env = {"GLOO_SOCKET_IFNAME": "eth0"}
    with (
        network.node("head", head=True, cpus=1, env=env) as head,
        network.node("second", cpus=1, env=env) as second,
    ):
        for split, number in (("train", 1024), ("test", 256)):
            target = str(data / split)
            made = head.run([*ours, "prepare", "shapes", target, f"num_images={number}"])
            assert made.returncode == 0, made.stderr
        run = head.popen([*ours, "pretrain", "shapes_demo", *_settings(data, runs)], log="pretrain")
        at_kill = _wait_for_steps(run, runs, 20)
        second.kill()
        killed = time.monotonic()
        time.sleep(15)  # the cluster is one node short for a while
        with network.node("third", cpus=1, env=env):
            joined = time.monotonic()
            _wait_for_steps(run, runs, at_kill + 1)
            went_on = time.monotonic()
            code = run.wait()
        told = (head.folder / "pretrain.log").read_text()
        # recorded only: how long it may take is for the reliability tests to say
        sys.stdout.write(
            f"{told}\nno step for {went_on - killed:.0f} s after the loss, "
            f"{went_on - joined:.0f} s after another node had joined\n"
        )
        assert code == 0, told
        assert max(json.loads(line)["step"] for line in _records(runs)) == 96


def test_workers_whose_storage_is_not_the_drivers_end_the_run_before_the_first_step(
    network: Network,
) -> None:
    data, own = network.folder / "data", Path("/tmp/runs")  # each node's own
    ours = [sys.executable, "-m", "simclr_ray"]
    with (
        network.node("head", head=True, cpus=1) as head,
        network.node("second", cpus=1),
    ):
        for split in ("train", "test"):
            made = head.run([*ours, "prepare", "shapes", str(data / split), "num_images=256"])
            assert made.returncode == 0, made.stderr
        apart = ["scaling.cpus_per_worker=0.6", "scaling.cpus_per_data_actor=0.4"]
        done = head.run([*ours, "pretrain", "shapes_demo", *_settings(data, own), *apart])
        assert done.returncode == 2, done.stdout + done.stderr
        assert "storage: /tmp/runs on second is not that of process" in done.stderr
        assert not head.run(["bash", "-c", "cat /tmp/runs/*/metrics.jsonl"]).stdout


def _settings(data: Path, runs: Path) -> list[str]:
    """Return a run of 96 steps whose two workers need a node of one CPU each."""
    return [
        *(f"data.train={data}/train", f"data.test={data}/test", f"storage={runs}", "epochs=12"),
        *("scaling.num_workers=2", "scaling.collective_timeout_s=60", "tracking.log_every_steps=1"),
        *("tracking.system_metrics=false", "checkpoint.every_epochs=1", "registry.name="),
        "evaluation.every_epochs=0",
    ]


def _records(runs: Path) -> list[str]:
    """Return the lines of the metrics of the one run in a folder."""
    return [line for log in runs.glob("*/metrics.jsonl") for line in log.read_text().splitlines()]


def _wait_for_steps(run: subprocess.Popen[str], runs: Path, number: int) -> int:
    """Return how many steps are logged, when there are `number`, or the run has ended."""
    while run.poll() is None and len(_records(runs)) < number:
        time.sleep(0.1)
    return len(_records(runs))
