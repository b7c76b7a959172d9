"""A run whose nodes are still to be made: it waits, Ray's autoscaler brings them, and it trains.

The autoscaler is Ray's, second version; the nodes that it makes are Ray's own fake ones, processes
on the head.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)

from tests.cluster.needs import needing_this_machine
from tests.cluster.nodes import RAY_PORT, Network, Node
from tests.ray.images import write_splits

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(600)]

ENV = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
SMALL = (
    *("epochs=1", "batch_size=32", "encoder.width=0.125", "augment.size=16"),
    *("data.limit=64", "evaluation.every_epochs=0", "scaling.num_workers=2"),
    *("scaling.cpus_per_worker=1", "scaling.data_label_selector.node-group=data"),
)


def autoscaling(head_address: str) -> dict[str, object]:
    """Return a file of `ray up` with nodes that train and nodes that decode, none at first."""
    kinds = {
        "train": {"resources": {"CPU": 1}, "labels": {"node-group": "gpu"}, "max_workers": 3},
        "data": {"resources": {"CPU": 2}, "labels": {"node-group": "data"}, "max_workers": 1},
        "ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0},
    }
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            name: {"min_workers": 0, "node_config": {}} | kind for name, kind in kinds.items()
        },
        "provider": {
            "type": "external",  # by its own name, it wants a file that Ray's wheel lacks
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": f"{head_address}:{RAY_PORT}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        **{command: [] for command in COMMANDS},
        **{"file_mounts": {}, "auth": {}, "cluster_synced_files": []},
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 5,
    }


def pretrain(head: Node, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    given = [f"data.train={folder}/train.parquet", "data.test=", f"storage={folder}/runs"]
    command = [sys.executable, "-m", "simclr_ray", "pretrain", "shapes_demo", *given, *SMALL]
    return head.run([*command, *overrides])


def test_nodes_that_an_autoscaler_brings_are_waited_for(tmp_path: Path) -> None:
    write_splits(tmp_path, 64)
    file = tmp_path / "autoscaling.json"
    options = [f"--autoscaling-config={file}"]
    with needing_this_machine(), Network(shares=(tmp_path,)) as network:
        file.write_text(json.dumps(autoscaling(f"{network.subnet}2")))  # of the first machine
        with network.node("head", head=True, cpus=0, env=ENV, options=options) as head:
            refused = pretrain(head, tmp_path)
            assert refused.returncode == 2, refused.stderr
            assert "scaling asks for 3 CPUs" in refused.stderr
            assert "scaling.wait_for_nodes_s=900 waits" in refused.stderr
            done = pretrain(head, tmp_path, "scaling.wait_for_nodes_s=240")
            assert done.returncode == 0, done.stderr
            assert "waiting 240 s at most for nodes: scaling asks for 3 CPUs" in done.stderr
