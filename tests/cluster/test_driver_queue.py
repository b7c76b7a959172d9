"""What the driver listens to lives where the driver lives."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# In a process of its own: the test session has its own cluster. Of actors without CPUs that Ray may
# place as it likes on two nodes, some land elsewhere; the queues' actors never do.
PROGRAM = """
import logging
import sys
import time

import ray
from ray.cluster_utils import Cluster

from simclr_ray.distributed.ray_cluster import driver_queue
from simclr_ray.train.recorder import WorkerReady

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)


@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
class Anywhere:
    def node(self):
        return ray.get_runtime_context().get_node_id()


def node_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


here = ray.get_runtime_context().get_node_id()
free, until = [], time.monotonic() + 60  # the second node takes a moment to be chosen
while len({node_of(actor) for actor in free}) < 2:
    assert time.monotonic() < until, "the cluster has one node after all"
    free.append(Anywhere.remote())
queues = [driver_queue() for _ in range(4)]
for queue in queues:
    queue.put(WorkerReady(0, 2))
    queue.put(None, block=False)
    assert queue.get() == WorkerReady(0, 2)
    assert queue.get_nowait() is None
    assert node_of(queue.actor) == here
imports_torch = queues[0].actor.__ray_call__.remote(lambda _: "torch" in sys.modules)
assert not ray.get(imports_torch), "the queue's process unpickles what passes it"
print("all here")
ray.shutdown()
cluster.shutdown()
"""


def test_the_queue_of_a_run_lives_on_the_drivers_node() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all here" in done.stdout
