"""Ray places workers, decode actors and encoding actors on nodes with the labels that are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.images import write_shapes

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

# In a process of its own: the test session has its own cluster. What runs where is asked of Ray
# itself, while it runs; and each expression of the unit tests is put to Ray's own scheduler.
PROGRAM = """
import logging
import sys
import threading

import ray
from ray.cluster_utils import Cluster

from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.distributed.placement import matches, nodes
from simclr_ray.train.pipeline import run_pipeline

train, storage = sys.argv[1:]
head = {"num_cpus": 0, "object_store_memory": 128 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=head)
for labels in ({"role": "gpu"}, {"role": "data"}, {"other": "x"}):
    cluster.add_node(num_cpus=2, labels=labels, object_store_memory=128 * 2**20)
cluster.wait_for_nodes()
ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
labels_of = {node.id: node.labels for node in nodes()}


@ray.remote(num_cpus=0.01)
def where():
    return ray.get_runtime_context().get_node_id()


for expression in ("data", "!data", "in(data,gpu)", "!in(data, gpu)"):
    selector = ScalingConfig(data_label_selector={"role": expression}).data_label_selector
    seen = ray.get([where.options(label_selector=selector, scheduling_strategy="SPREAD").remote()
                    for _ in range(12)])
    there = [(labels_of[node].get("role", "none"), labels_of[node].get("other")) for node in seen]
    assert all(matches(selector, labels_of[node]) for node in seen), (expression, there)

roles = {}
ended = threading.Event()


def watch():
    while not ended.wait(0.3):
        for actor in ray._private.state.actors().values():
            node = actor["Address"]["NodeID"]
            if node in labels_of:
                role = labels_of[node].get("role", "none")
                roles.setdefault(actor["ActorClassName"], set()).add(role)


thread = threading.Thread(target=watch, daemon=True)
thread.start()
run_pipeline(Experiment.load(
    "shapes_demo", f"data.train={train}", f"data.test={train}", f"storage={storage}", "epochs=2",
    "batch_size=32", "scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=0.8",
    "scaling.worker_label_selector.role=in(gpu)", "scaling.data_label_selector.role=data",
    "evaluation.actors=1", "evaluation.every_epochs=0", f"tracking.uri=sqlite:///{storage}.db"))
ended.set()
thread.join()
print(roles)
workers = {name: where for name, where in roles.items() if "TrainWorker" in name}
actors = [where for name, where in roles.items() if "_Actor" in name]
encoding = [where for name, where in roles.items() if "_Extractor" in name]
assert list(workers.values()) == [{"gpu"}], roles
assert actors == [{"data"}], roles
assert encoding == [{"gpu"}], roles
print("all where they belong")
ray.shutdown()
cluster.shutdown()
"""


def test_what_a_run_starts_lies_on_nodes_with_the_labels_that_are_named(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train.parquet", 128, row_group_size=64)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "train.parquet", tmp_path / "runs"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all where they belong" in done.stdout
